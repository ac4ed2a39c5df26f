// Attention, backward, on CUDA cores: as attention_backward.cuh, in blocks of 64 queries and 64 keys.
#pragma once

#include "attention_simt.cuh"

namespace fastseq::cuda {

// Of dQ, dK and dV a block has 16 kGradientColumns columns.
constexpr int kGradientColumns = 4, kGradientWidth = kSide * kGradientColumns;

// Probabilities after dropout and the gradients of the scores before their softcap, or, kOfScores, of the scores: of
// queries from i0 on, head n, and keys from j0 on. delta: of the head.
template <bool kOfScores, class T>
__device__ void block_gradients(const AttentionBackward<T, Computed<T>>& p, const Computed<T>* delta, int n, int i0,
                                int j0, BlockNumbers<Computed<T>>& probabilities, BlockNumbers<Computed<T>>& gradients,
                                Computed<T>* factors) {
  using A = Computed<T>;
  const Sight sight(p);
  const int queries = sight.queries - i0 < kBlockRows ? sight.queries - i0 : kBlockRows;
  const int keys = sight.keys - j0 < kBlockRows ? sight.keys - j0 : kBlockRows;
  const int kv_head = n / static_cast<int>(p.heads / p.kv_heads);
  multiply_rows_simt<T>(
      probabilities, queries, [&](int r) { return p.q.at(n, i0 + r); }, keys,
      [&](int r) { return p.k.at(kv_head, j0 + r); }, p.size, factors);
  multiply_rows_simt<T>(
      gradients, queries, [&](int r) { return p.d_out.at(n, i0 + r); }, keys,
      [&](int r) { return p.v.at(kv_head, j0 + r); }, p.value_size, factors);
  const Scores<T> scores(p);
  const SimtPlace place;
#pragma unroll
  for (int a = 0; a < kEach; ++a) {
    const int row = place.y + kSide * a;
    const bool there = row < queries;
    const A shift = there ? shift_of(p.lse.of(n)[i0 + row]) : kInfinity<A>, less = there ? delta[i0 + row] : A(0);
    const Visible seen = there ? sight.keys_of(i0 + row, j0, kBlockRows) : Visible{0, 0};
#pragma unroll
    for (int b = 0; b < kEach; ++b) {
      const int column = place.x + kSide * b;
      A &x = probabilities[a][b], &y = gradients[a][b];
      if (seen.has(column)) {
        const auto gradient = scores.gradient(x, y, n, i0 + row, j0 + column, shift, less);
        x = gradient.probability, y = kOfScores ? gradient.d_score : gradient.d_score * gradient.derivative;
      } else {
        x = y = 0;
      }
    }
  }
}

template <class A>
__device__ void clear_simt(A (&sums)[kEach][kGradientColumns]) {
#pragma unroll
  for (int a = 0; a < kEach; ++a)
#pragma unroll
    for (int b = 0; b < kGradientColumns; ++b) sums[a][b] = 0;
}

// Rows [first, count) of a head, 64 at most.
template <class A, class T>
__device__ void store_gradients(const Heads<T>& to, int64_t n, int64_t first, int64_t count, int64_t size,
                                int64_t column0, const A (&sums)[kEach][kGradientColumns], A factor) {
#pragma unroll
  for (int a = 0; a < kEach; ++a) {
    const int64_t row = first + SimtPlace().y + kSide * a;
    if (row < count) store_row_simt(to.at(n, row), size, column0, sums[a], factor);
  }
}

template <class T>
__global__ void __launch_bounds__(kSimtThreads)
    attention_key_gradients_simt(const AttentionBackward<T, Computed<T>> all, const Computed<T>* deltas,
                                 int64_t tiles) {
  using A = Computed<T>;
  FASTSEQ_SHARED(memory);
  A* const factors = reinterpret_cast<A*>(memory);
  A *const probabilities = factors + kFactorNumbers, *const gradients = probabilities + kBlockNumbers;
  int64_t block = blockIdx.x;
  const int j0 = static_cast<int>(block % tiles) * kBlockRows;
  block /= tiles;
  const int kv_head = static_cast<int>(block % all.kv_heads);
  const int64_t b = block / all.kv_heads;
  const auto p = entry(all, b);
  if (j0 >= p.keys) return;
  const Sight sight(p);
  const int64_t column0 = blockIdx.y * kGradientWidth;
  const int group = static_cast<int>(p.heads / p.kv_heads);
  // The queries that see some of the keys.
  const int last_key = (sight.keys - j0 < kBlockRows ? sight.keys : j0 + kBlockRows) - 1;
  const int first = sight.first_query(j0) / kBlockRows * kBlockRows, end = sight.end_query(last_key);

  A dk[kEach][kGradientColumns], dv[kEach][kGradientColumns];
  clear_simt(dk);
  clear_simt(dv);
  for (int n = kv_head * group; n < (kv_head + 1) * group; ++n)
    for (int i0 = first; i0 < end; i0 += kBlockRows) {
      BlockNumbers<A> s, d;
      block_gradients<false, T>(p, deltas + (b * all.heads + n) * all.queries, n, i0, j0, s, d, factors);
      keep_block<true>(s, probabilities);
      keep_block<true>(d, gradients);
      const int queries = sight.queries - i0 < kBlockRows ? sight.queries - i0 : kBlockRows;
      multiply_add_simt<T>(
          dv, probabilities, queries, [&](int r) { return p.d_out.at(n, i0 + r); }, column0, p.value_size, factors);
      multiply_add_simt<T>(dk, gradients, queries, [&](int r) { return p.q.at(n, i0 + r); }, column0, p.size, factors);
    }
  store_gradients(p.dk, kv_head, j0, p.keys, p.size, column0, dk, static_cast<A>(p.scale));
  store_gradients(p.dv, kv_head, j0, p.keys, p.value_size, column0, dv, A(1));
}

template <class T>
__global__ void __launch_bounds__(kSimtThreads)
    attention_query_gradients_simt(const AttentionBackward<T, Computed<T>> all, const Computed<T>* deltas,
                                   int64_t tiles) {
  using A = Computed<T>;
  FASTSEQ_SHARED(memory);
  A *const factors = reinterpret_cast<A*>(memory), *const gradients = factors + kFactorNumbers;
  int64_t block = blockIdx.x;
  const int i0 = static_cast<int>(tiles - 1 - block % tiles) * kBlockRows;
  block /= tiles;
  const int n = static_cast<int>(block % all.heads);
  const int64_t b = block / all.heads;
  const auto p = entry(all, b);
  if (i0 >= p.queries) return;
  const Sight sight(p);
  const int64_t column0 = blockIdx.y * kGradientWidth;
  const int kv_head = n / static_cast<int>(p.heads / p.kv_heads);
  const int last_query = (sight.queries - i0 < kBlockRows ? sight.queries : i0 + kBlockRows) - 1;

  A dq[kEach][kGradientColumns];
  clear_simt(dq);
  const int end = sight.end_key(last_query);
  for (int j0 = sight.first_key(i0) / kBlockRows * kBlockRows; j0 < end; j0 += kBlockRows) {
    BlockNumbers<A> s, d;
    block_gradients<false, T>(p, deltas + (b * all.heads + n) * all.queries, n, i0, j0, s, d, factors);
    keep_block(d, gradients);
    const int keys = sight.keys - j0 < kBlockRows ? sight.keys - j0 : kBlockRows;
    multiply_add_simt<T>(dq, gradients, keys, [&](int r) { return p.k.at(kv_head, j0 + r); }, column0, p.size, factors);
  }
  store_gradients(p.dq, n, i0, p.queries, p.size, column0, dq, static_cast<A>(p.scale));
}

template <class T, class A>
cudaError_t launch_backward_simt(const AttentionBackward<T, A>& p, const A* delta, void* stream) {
  const int64_t key_tiles = blocks_of(p.keys, kBlockRows), query_tiles = blocks_of(p.queries, kBlockRows);
  const int64_t slices = blocks_of(p.size, kGradientWidth), value_slices = blocks_of(p.value_size, kGradientWidth);
  if (const cudaError_t error = launch_blocks(
          attention_key_gradients_simt<T>, p.batch * p.kv_heads * key_tiles,
          slices > value_slices ? slices : value_slices, kSimtThreads, (kFactorNumbers + 2 * kBlockNumbers) * sizeof(A),
          stream, p, delta, key_tiles);
      error != cudaSuccess)
    return error;
  return launch_blocks(attention_query_gradients_simt<T>, p.batch * p.heads * query_tiles, slices, kSimtThreads,
                       (kFactorNumbers + kBlockNumbers) * sizeof(A), stream, p, delta, query_tiles);
}

}  // namespace fastseq::cuda
