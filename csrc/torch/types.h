// torch's tensors and numbers as the kernels take them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "../cpu/dispatch.h"

namespace fastseq {

// The kernels run serially in a forked child, whose OpenMP threads did not survive; torch's operators would wait for
// them for ever. As DataLoader in its workers, this leaves the child with one thread.
inline void one_thread_in_a_forked_child() {
  if (cpu::in_forked_child() && at::get_num_threads() > 1) at::set_num_threads(1);
}

// The kernels have a bfloat16 of their own: they know no torch.
template <class T>
struct TensorType {
  using type = T;
};
template <>
struct TensorType<bfloat16> {
  using type = at::BFloat16;
};

template <class T>
const T* pointer(const at::Tensor& t) {
  return t.defined() ? reinterpret_cast<const T*>(t.const_data_ptr<typename TensorType<T>::type>()) : nullptr;
}
template <class T>
T* mutable_pointer(const at::Tensor& t) {
  return t.defined() ? reinterpret_cast<T*>(t.mutable_data_ptr<typename TensorType<T>::type>()) : nullptr;
}

// f of a number of the type, which is one that the kernels take.
template <class F>
auto with_type(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kDouble:
      return f(double());
    case at::kBFloat16:
      return f(bfloat16());
    default:
      return f(float());
  }
}

inline void check_kernel_type(at::ScalarType type) {
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16,
              "the kernels take float32, float64 and bfloat16; got ", type);
}

}  // namespace fastseq
