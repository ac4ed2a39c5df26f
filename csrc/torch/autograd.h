// What the operators' autograd rules share.
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>

namespace fastseq {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

// Forward-mode AD finds no rule here, and would take the derivative to be zero without a word.
inline void check_no_tangent(const at::Tensor& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(!t._fw_grad(0).defined(),
                              "fastseq's operators have no forward-mode derivative, and a tensor of this call has a "
                              "tangent: call the function of fastseq inside the transform, which has one");
}

}  // namespace fastseq
