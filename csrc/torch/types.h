// torch's tensors and numbers as the kernels take them.
#pragma once

#include <ATen/core/Tensor.h>

#include "../params.h"

namespace fastseq {

// The kernels have a bfloat16 and a float16 of their own: they know no torch.
template <class T>
struct TensorType {
  using type = T;
};
template <>
struct TensorType<bfloat16> {
  using type = at::BFloat16;
};
template <>
struct TensorType<float16> {
  using type = at::Half;
};

template <class T>
const T* pointer(const at::Tensor& t) {
  return t.defined() ? reinterpret_cast<const T*>(t.const_data_ptr<typename TensorType<T>::type>()) : nullptr;
}
template <class T>
T* mutable_pointer(const at::Tensor& t) {
  return t.defined() ? reinterpret_cast<T*>(t.mutable_data_ptr<typename TensorType<T>::type>()) : nullptr;
}

// f of a number of the type, which is one that the device's kernels take.
template <class Device, class F>
auto with_type(at::ScalarType type, const F& f) {
  if constexpr (Device::kTakesFloat16)
    if (type == at::kHalf) return f(float16());
  switch (type) {
    case at::kDouble:
      return f(double());
    case at::kBFloat16:
      return f(bfloat16());
    default:
      return f(float());
  }
}

inline void check_device(const char* name, const at::Tensor& t, const at::Tensor& input) {
  TORCH_CHECK(t.device() == input.device(), name, " must be on the device of the input, ", input.device(), "; got ",
              t.device());
}

inline void check_kernel_type(const at::Tensor& t) {
  const at::ScalarType type = t.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || (type == at::kHalf && t.is_cuda()),
              "the kernels take float32, float64 and bfloat16", t.is_cuda() ? " and float16" : "", "; got ", type);
}

}  // namespace fastseq
