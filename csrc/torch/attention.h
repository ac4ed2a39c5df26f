// The attention operators; schemas in ops.cpp.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "counters.h"

namespace fastseq {

using OptionalTensor = std::optional<at::Tensor>;
using AttentionOutputs = std::tuple<at::Tensor, at::Tensor>;

// query (B, N, L, D), key (B, N_kv, S, D), value (B, N_kv, S, Dv), attn_mask broadcastable to (B, N, L, S): bool, or of
// query's dtype and added; scale; low and high: query i sees key j where low <= j - i <= high, a side that is open
// None.
// -> out (B, N, L, Dv), lse (B, N, L) in the type that is computed in.
using AttentionForwardSignature = AttentionOutputs(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                   const OptionalTensor&, double, std::optional<int64_t>,
                                                   std::optional<int64_t>);
// d_out, d_lse, forward's arguments, out, lse, needs -> the gradients that `needs` asks for, of query, key, value and
// attn_mask in this order.
using AttentionBackwardSignature = std::vector<at::Tensor>(
    const OptionalTensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const OptionalTensor&, double, std::optional<int64_t>, std::optional<int64_t>, const at::Tensor&, const at::Tensor&,
    c10::List<bool>);

AttentionForwardSignature attention_forward_cpu;
AttentionBackwardSignature attention_backward_cpu;

// On the autograd keys: runs the operator below and records attention_backward.
FASTSEQ_API AttentionForwardSignature attention_forward_autograd;

}  // namespace fastseq
