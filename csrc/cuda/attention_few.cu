// Attention of few queries: the forward kernels over each split of the keys, then a row's states are merged in the
// order of the splits.
#include "attention_few.h"

#include "attention_forward.cuh"
#include "attention_forward_simt.cuh"

namespace fastseq::cuda {
namespace {

constexpr int kMergeThreads = 128;

// A block has a row of the output. It takes as many splits at a time as it has threads: each finds the factor of one,
// then each adds up columns over them.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_splits(const AttentionForward<T, Computed<T>> all, const SplitStates<Computed<T>> states) {
  using A = Computed<T>;
  FASTSEQ_SHARED(memory);
  A* const factors = reinterpret_cast<A*>(memory);
  constexpr int kUnroll = sizeof(A) > 4 ? 4 : 8;  // what registers hold
  const int64_t i = blockIdx.x % states.queries, head = blockIdx.x / states.queries, n = head % all.heads;
  const auto p = entry(all, head / all.heads);
  if (p.queries > kFewQueries || i >= p.queries) return;
  const int splits = static_cast<int>(blocks_of(p.keys, kSplitKeys));
  const int64_t first = states.at(head, i, 0);
  A largest = -kInfinity<A>;
  for (int split = threadIdx.x % kWarp; split < splits; split += kWarp)
    largest = larger(largest, states.largest(first + split));
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2)
    largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  const A shift = largest == -kInfinity<A> ? A(0) : largest;

  T* const out = p.out.at(n, i);
  for (int64_t column0 = 0; column0 < p.value_size; column0 += kMergeThreads) {
    const int64_t column = column0 + threadIdx.x;
    const bool there = column < p.value_size;
    A total = 0, sum = 0;
    for (int split0 = 0; split0 < splits; split0 += kMergeThreads) {
      const int here = splits - split0 < kMergeThreads ? splits - split0 : kMergeThreads;
      const int split = static_cast<int>(threadIdx.x);
      __syncthreads();
      if (split < here) factors[split] = power_of_2(states.largest(first + split0 + split) - shift);
      __syncthreads();
#pragma unroll kUnroll
      for (int s = 0; s < here; ++s) {
        const int64_t state = first + split0 + s;
        total = fma(factors[s], states.total(state), total);
        if (there) sum = fma(factors[s], states.sums(state)[column], sum);
      }
    }
    if (there) store(out[column], sum * (total == 0 ? A(0) : 1 / total));
    if (column == 0 && p.lse.data)
      p.lse.of(n)[i] = total == 0 ? -kInfinity<A> : fma(largest, static_cast<A>(kLn2), natural_log(total));
  }
}

}  // namespace

template <class T>
int64_t attention_few_workspace(const AttentionForward<T, Computed<T>>& p) {
  return any_few(p) ? split_states(p, nullptr).numbers() * static_cast<int64_t>(sizeof(Computed<T>)) : 0;
}

template <class T>
cudaError_t attention_few(const AttentionForward<T, Computed<T>>& p, const Call& call) {
  const auto states = split_states(p, call.workspace);
  const auto splits = [&] {
    if constexpr (kOnTensorCores<T>) {
      if (on_tensor_cores(p)) return launch_forward_tiles<true>(p, states, call.stream);
    }
    return launch_forward_simt<true>(p, states, call.stream);
  };
  if (const cudaError_t error = splits(); error != cudaSuccess) return error;
  return launch_blocks(
      merge_splits<T>, states.rows, 1, kMergeThreads, kMergeThreads * sizeof(Computed<T>), call.stream, p, states);
}

#define INSTANTIATE(T)                                                                  \
  template int64_t attention_few_workspace<T>(const AttentionForward<T, Computed<T>>&); \
  template cudaError_t attention_few<T>(const AttentionForward<T, Computed<T>>&, const Call&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace fastseq::cuda
