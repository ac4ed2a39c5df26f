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

// Numbers of a head that the kernels take.
constexpr int64_t kMostHeadSize = 512, kMostCudaHeadSize = 256;

// Of both operators, all arguments but the tensors that are multiplied.
//
// attn_mask: broadcastable to (B, N, L, S): bool, or of query's dtype and added. alibi_slopes: (N) or (B, N).
// dropout_seed: one int64 on the CPU, where dropout_p > 0.
// Ragged batches: query_starts and key_starts, (B + 1), of tensors of one batch entry in which the rows of all lie one
// after another; or query_lengths and key_lengths, (B). int32 or int64, on the CPU, where their values are checked; or
// on query's CUDA device, where nobody looks: values that are not as those on the CPU must be read or write anywhere.
// low, high: query i sees key j where low <= j - i <= high, a side that is open None; from_end: i counted so that an
// entry's last query is beside its last key.
struct AttentionOptions {
  OptionalTensor attn_mask, alibi_slopes, dropout_seed, query_starts, key_starts, query_lengths, key_lengths;
  double scale, softcap, dropout_p;
  std::optional<int64_t> low, high;
  bool from_end;
};

// query (B, N, L, D), key (B, N_kv, S, D), value (B, N_kv, S, Dv), the options
// -> out (B, N, L, Dv), lse (B, N, L) in the type that is computed in.
using AttentionForwardSignature = AttentionOutputs(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    double, double, double, std::optional<int64_t>, std::optional<int64_t>, bool);
// d_out, d_lse, forward's arguments, out, lse, needs -> the gradients that `needs` asks for, of query, key, value and
// attn_mask in this order.
using AttentionBackwardSignature = std::vector<at::Tensor>(
    const OptionalTensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, double, double, double, std::optional<int64_t>,
    std::optional<int64_t>, bool, const at::Tensor&, const at::Tensor&, c10::List<bool>);

// On the key of a device, CpuDevice or, in a build with CUDA, CudaDevice.
template <class Device>
AttentionForwardSignature attention_forward;
template <class Device>
AttentionBackwardSignature attention_backward;

class CpuDevice;
// Its out alone, on the CPU,, for a little less.
FASTSEQ_API at::Tensor attention_output_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                            const AttentionOptions& options);

// On the autograd keys: runs the operator below and records attention_backward.
FASTSEQ_API AttentionForwardSignature attention_forward_autograd;

}  // namespace fastseq
