// Attention, forward, on CUDA cores: of 64 queries, 16 kColumns columns of the output by a block.
#pragma once

#include "attention_simt.cuh"
#include "attention_work.cuh"

namespace fastseq::cuda {

template <class T, int kColumns, bool kFew>
__global__ void __launch_bounds__(kSimtThreads, kFew ? 0 : 1)
    attention_forward_simt(const AttentionForward<T, Computed<T>> all, const ForwardGrid grid,
                           const SplitStates<Computed<T>> states) {
  using A = Computed<T>;
  FASTSEQ_SHARED(memory);
  A *const factors = reinterpret_cast<A*>(memory), *const block = factors + kFactorNumbers;
  const ForwardWork<T, kBlockRows, kFew> work(all, grid);
  if (!work.any) return;
  const auto& p = work.p;
  const Scores<T> scores(p);
  const Sight sight(p);
  const SimtPlace place;
  const int64_t column0 = blockIdx.y * kSide * kColumns;

  A sums[kEach][kColumns], largest[kEach], total[kEach];
#pragma unroll
  for (int a = 0; a < kEach; ++a) {
    largest[a] = -kInfinity<A>, total[a] = 0;
#pragma unroll
    for (int b = 0; b < kColumns; ++b) sums[a][b] = 0;
  }
  const int end = work.end_key(sight);
  for (int j0 = work.first_key(sight) / kBlockRows * kBlockRows; j0 < end; j0 += kBlockRows) {
    const int keys = sight.keys - j0 < kBlockRows ? sight.keys - j0 : kBlockRows;
    BlockNumbers<A> s;
    multiply_rows_simt<T>(
        s, work.here, [&](int r) { return work.query_at(r); }, keys,
        [&](int r) { return p.k.at(work.kv_head, j0 + r); }, p.size, factors);
#pragma unroll
    for (int a = 0; a < kEach; ++a) {
      const int row = place.y + kSide * a;
      const bool there = row < work.here;
      const int n = there ? work.head(row) : 0, i = there ? work.query(row) : 0;
      const Visible seen = there ? sight.keys_of(i, j0, kBlockRows) : Visible{0, 0};
      A most = largest[a];
#pragma unroll
      for (int b = 0; b < kEach; ++b) {
        const int column = place.x + kSide * b;
        s[a][b] = seen.has(column) ? scores.of(s[a][b], n, i, j0 + column).value : -kInfinity<A>;
        most = larger(most, s[a][b]);
      }
      most = row_largest_simt(most);
      const A shift = most == -kInfinity<A> ? A(0) : most, correction = power_of_2(largest[a] - shift);
      largest[a] = most, total[a] *= correction;
#pragma unroll
      for (int b = 0; b < kEach; ++b) {
        const int column = place.x + kSide * b;
        s[a][b] = power_of_2(s[a][b] - shift);
        total[a] += s[a][b];
        if (p.dropout.threshold && seen.has(column)) s[a][b] *= scores.multiplier(n, i, j0 + column);
      }
#pragma unroll
      for (int b = 0; b < kColumns; ++b) sums[a][b] *= correction;
    }
    keep_block(s, block);
    multiply_add_simt<T>(
        sums, block, keys, [&](int r) { return p.v.at(work.kv_head, j0 + r); }, column0, p.value_size, factors);
  }
#pragma unroll
  for (int a = 0; a < kEach; ++a) {
    const int row = place.y + kSide * a;
    const A all_columns = row_sum_simt(total[a]);
    if (row < work.here)
      finish_row<kFew>(work, states, row, largest[a], all_columns, A(1), column0 + place.x == 0,
                       [&](auto* to, A by) { store_row_simt(to, p.value_size, column0, sums[a], by); });
  }
}

template <bool kFew, class T, class A>
cudaError_t launch_forward_simt(const AttentionForward<T, A>& p, const SplitStates<A>& states, void* stream) {
  return with_columns(p.value_size, [&](auto columns, int64_t slices) {
    constexpr int kColumns = decltype(columns)::value;
    const ForwardGrid grid = forward_grid<kFew>(p, kBlockRows);
    return launch_blocks(attention_forward_simt<T, kColumns, kFew>, forward_blocks<kFew>(p, grid), slices, kSimtThreads,
                         (kFactorNumbers + kBlockNumbers) * sizeof(A), stream, p, grid, states);
  });
}

}  // namespace fastseq::cuda
