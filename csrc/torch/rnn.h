// The recurrent operators; schemas in ops.cpp.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "counters.h"

namespace fastseq {

using OptionalTensor = std::optional<at::Tensor>;
using RnnOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // output, h_n, c_n, reserve

using RnnForwardSignature = RnnOutputs(std::string, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                       at::TensorList, at::TensorList, const OptionalTensor&, const OptionalTensor&,
                                       int64_t, bool, bool, bool);
using RnnBackwardSignature = std::vector<at::Tensor>(
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, std::string, const at::Tensor&,
    const OptionalTensor&, const OptionalTensor&, at::TensorList, at::TensorList, const OptionalTensor&,
    const OptionalTensor&, int64_t, bool, bool, const at::Tensor&, const at::Tensor&, c10::List<bool>);

// On the key of a device, CpuDevice or, in a build with CUDA, CudaDevice.
template <class Device>
RnnForwardSignature rnn_forward;
template <class Device>
RnnBackwardSignature rnn_backward;

class CpuDevice;

// On the autograd keys: runs the operator below and records rnn_backward.
FASTSEQ_API RnnForwardSignature rnn_forward_autograd;

}  // namespace fastseq
