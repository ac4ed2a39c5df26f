// What backward subtracts in each row of dP: delta = rows of dO o O, less dlse. Kept in the workspace as (B, N, L).
#pragma once

#include "attention_scores.cuh"

namespace fastseq::cuda {

constexpr int kDeltaThreads = 128, kDeltaLanes = 8, kDeltaRows = kDeltaThreads / kDeltaLanes;

// 8 lanes have a row, of which each reads 16 bytes at once where rows are so aligned; a block has rows of one head.
template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta(const AttentionBackward<T, Computed<T>> all, Computed<T>* delta, int64_t tiles) {
  using A = Computed<T>;
  const unsigned block = blockIdx.x, row_tiles = static_cast<unsigned>(tiles), heads = static_cast<unsigned>(all.heads);
  const unsigned head = block / row_tiles, b = head / heads, n = head % heads;
  const int64_t i = block % row_tiles * kDeltaRows + threadIdx.x / kDeltaLanes;
  const int lane = threadIdx.x % kDeltaLanes;
  const auto p = entry(all, b);
  const bool there = i < p.queries;
  A sum = 0;
  if (there) {
    const T *const out = p.out.at(n, i), *const d_out = p.d_out.at(n, i);
    constexpr int kEach = sizeof(Words4) / sizeof(T);
    const auto places = reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(d_out);
    if (places % sizeof(Words4) == 0 && p.value_size % kEach == 0) {
      for (int64_t j = lane * kEach; j < p.value_size; j += kDeltaLanes * kEach) {
        T x[kEach], y[kEach];
        const Words4 from[2] = {*reinterpret_cast<const Words4*>(out + j), *reinterpret_cast<const Words4*>(d_out + j)};
        memcpy(x, &from[0], sizeof x), memcpy(y, &from[1], sizeof y);
#pragma unroll
        for (int e = 0; e < kEach; ++e) sum = fma(load(x[e]), load(y[e]), sum);
      }
    } else {
      for (int64_t j = lane; j < p.value_size; j += kDeltaLanes) sum = fma(load(out[j]), load(d_out[j]), sum);
    }
  }
#pragma unroll
  for (int distance = 1; distance < kDeltaLanes; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (there && lane == 0) delta[head * all.queries + i] = p.d_lse.data ? sum - p.d_lse.of(n)[i] : sum;
}

template <class T, class A>
int64_t delta_numbers(const AttentionBackward<T, A>& p) {
  return p.batch * p.heads * p.queries;
}
template <class T, class A>
cudaError_t launch_delta(const AttentionBackward<T, A>& p, A* delta, void* stream) {
  const int64_t tiles = blocks_of(p.queries, kDeltaRows);
  return launch_blocks(attention_delta<T>, p.batch * p.heads * tiles, 1, kDeltaThreads, 0, stream, p, delta, tiles);
}

}  // namespace fastseq::cuda
