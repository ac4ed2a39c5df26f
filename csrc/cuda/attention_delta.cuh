// What backward subtracts in each row of dP: delta = rows of dO o O, less dlse. Kept in the workspace as (B, N, L).
#pragma once

#include "attention_scores.cuh"

namespace fastseq::cuda {

constexpr int kDeltaThreads = 128, kDeltaRows = kDeltaThreads / kWarp;

// A warp has a row.
template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta(const AttentionBackward<T, Computed<T>> all, Computed<T>* delta) {
  using A = Computed<T>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kDeltaRows + threadIdx.x / kWarp;
  const int64_t i = at % all.queries, head = at / all.queries, b = head / all.heads, n = head % all.heads;
  if (b >= all.batch) return;
  const auto p = entry(all, b);
  if (i >= p.queries) return;
  const T *const out = p.out.at(n, i), *const d_out = p.d_out.at(n, i);
  A sum = 0;
  for (int64_t j = threadIdx.x % kWarp; j < p.value_size; j += kWarp) sum = fma(load(out[j]), load(d_out[j]), sum);
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % kWarp == 0) delta[at] = p.d_lse.data ? sum - p.d_lse.of(n)[i] : sum;
}

template <class T, class A>
int64_t delta_numbers(const AttentionBackward<T, A>& p) {
  return p.batch * p.heads * p.queries;
}
template <class T, class A>
cudaError_t launch_delta(const AttentionBackward<T, A>& p, A* delta, void* stream) {
  return launch_blocks(
      attention_delta<T>, blocks_of(delta_numbers(p), kDeltaRows), 1, kDeltaThreads, 0, stream, p, delta);
}

}  // namespace fastseq::cuda
