// Scaled dot-product attention on CUDA. T is float, double, bfloat16 or float16. As of csrc/attention_params.h, all
// pointers, those of Ragged and of the slopes too, are to the device's memory; `threads` does not matter.
#pragma once

#include "../attention_params.h"
#include "../params.h"
#include "call.h"

namespace fastseq::cuda {

template <class T>
int64_t attention_forward_workspace(const AttentionForward<T, Computed<T>>& p);
template <class T>
cudaError_t attention_forward(const AttentionForward<T, Computed<T>>& p, const Call& call);

template <class T>
int64_t attention_backward_workspace(const AttentionBackward<T, Computed<T>>& p);
template <class T>
cudaError_t attention_backward(const AttentionBackward<T, Computed<T>>& p, const Call& call);
template <class T>
cudaError_t attention_mask_backward(const AttentionMaskBackward<T, Computed<T>>& p, const Call& call);

}  // namespace fastseq::cuda
