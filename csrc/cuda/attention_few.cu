// Attention of few queries: the forward kernels over each split of the keys, then a row's states are merged in the
// order of the splits.
#include "attention_few.h"

#include "attention_forward.cuh"
#include "attention_forward_simt.cuh"

namespace fastseq::cuda {
namespace {

constexpr int kMergeThreads = 64;

// A block has a row of the output.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_splits(const AttentionForward<T, Computed<T>> all, const SplitStates<Computed<T>> states) {
  using A = Computed<T>;
  const int64_t i = blockIdx.x % states.queries, head = blockIdx.x / states.queries, n = head % all.heads;
  const auto p = entry(all, head / all.heads);
  if (p.queries > kFewQueries || i >= p.queries) return;
  const int64_t splits = blocks_of(p.keys, kSplitKeys), first = states.at(head, i, 0);
  A largest = -kInfinity<A>;
  for (int64_t split = 0; split < splits; ++split) largest = larger(largest, states.largest(first + split));
  const A shift = largest == -kInfinity<A> ? A(0) : largest;
  A total = 0;
  for (int64_t split = 0; split < splits; ++split)
    total = fma(power_of_2(states.largest(first + split) - shift), states.total(first + split), total);
  const A factor = total == 0 ? A(0) : 1 / total;
  T* const out = p.out.at(n, i);
  for (int64_t column = threadIdx.x; column < p.value_size; column += kMergeThreads) {
    A sum = 0;
    for (int64_t split = 0; split < splits; ++split)
      sum = fma(power_of_2(states.largest(first + split) - shift), states.sums(first + split)[column], sum);
    store(out[column], sum * factor);
  }
  if (threadIdx.x == 0 && p.lse.data)
    p.lse.of(n)[i] = total == 0 ? -kInfinity<A> : fma(largest, static_cast<A>(kLn2), natural_log(total));
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
    if constexpr (kHalf<T>) {
      if (on_tensor_cores(p)) return launch_forward_tiles<true>(p, states, call.stream);
    }
    return launch_forward_simt<true>(p, states, call.stream);
  };
  if (const cudaError_t error = splits(); error != cudaSuccess) return error;
  return launch_blocks(merge_splits<T>, states.rows, 1, kMergeThreads, 0, call.stream, p, states);
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
