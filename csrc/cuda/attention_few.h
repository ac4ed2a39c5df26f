// The forward pass of the batch entries of few queries.
#pragma once

#include "attention.h"

namespace fastseq::cuda {

// Whether there may be such entries: the lengths are on the device.
template <class T, class A>
bool any_few(const Attention<T, A>& p) {
  return p.queries <= kFewQueries || p.ragged_queries.starts || p.ragged_queries.lengths;
}

template <class T>
int64_t attention_few_workspace(const AttentionForward<T, Computed<T>>& p);
template <class T>
cudaError_t attention_few(const AttentionForward<T, Computed<T>>& p, const Call& call);

}  // namespace fastseq::cuda
