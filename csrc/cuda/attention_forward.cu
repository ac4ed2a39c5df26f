// Which kernels the forward pass of attention runs.
#include "attention_forward.cuh"

#include "attention_few.h"
#include "attention_forward_simt.cuh"

namespace fastseq::cuda {

template <class T>
int64_t attention_forward_workspace(const AttentionForward<T, Computed<T>>& p) {
  return attention_few_workspace<T>(p);
}

template <class T>
cudaError_t attention_forward(const AttentionForward<T, Computed<T>>& p, const Call& call) {
  if (!counts_fit(p)) return cudaErrorInvalidValue;
  if (p.batch * p.heads * p.queries == 0) return cudaSuccess;
  if (any_few(p))
    if (const cudaError_t error = attention_few<T>(p, call); error != cudaSuccess) return error;
  if (p.queries <= kFewQueries) return cudaSuccess;
  if constexpr (kOnTensorCores<T>) {
    if (on_tensor_cores(p)) return launch_forward_tiles<false>(p, SplitStates<float>{}, call.stream);
  }
  return launch_forward_simt<false>(p, SplitStates<Computed<T>>{}, call.stream);
}

#define INSTANTIATE(T)                                                                      \
  template int64_t attention_forward_workspace<T>(const AttentionForward<T, Computed<T>>&); \
  template cudaError_t attention_forward<T>(const AttentionForward<T, Computed<T>>&, const Call&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace fastseq::cuda
