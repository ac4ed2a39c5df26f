// Which kernels the backward pass of attention runs.
#include "attention_backward.cuh"

#include "attention_backward_simt.cuh"
#include "attention_delta.cuh"

namespace fastseq::cuda {

template <class T>
int64_t attention_backward_workspace(const AttentionBackward<T, Computed<T>>& p) {
  return delta_numbers(p) * static_cast<int64_t>(sizeof(Computed<T>));
}

template <class T>
cudaError_t attention_backward(const AttentionBackward<T, Computed<T>>& p, const Call& call) {
  if (!counts_fit(p)) return cudaErrorInvalidValue;
  if (p.batch * p.heads == 0) return cudaSuccess;
  const auto delta = static_cast<Computed<T>*>(call.workspace);
  if (const cudaError_t error = launch_delta(p, delta, call.stream); error != cudaSuccess) return error;
  if constexpr (kOnTensorCores<T>) {
    if (on_tensor_cores(p)) return launch_backward_tiles(p, delta, call.stream);
  }
  return launch_backward_simt(p, delta, call.stream);
}

#define INSTANTIATE(T)                                                                        \
  template int64_t attention_backward_workspace<T>(const AttentionBackward<T, Computed<T>>&); \
  template cudaError_t attention_backward<T>(const AttentionBackward<T, Computed<T>>&, const Call&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace fastseq::cuda
