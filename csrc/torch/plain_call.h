// When a call may go to its kernel directly, without the dispatcher: what the direct calls share.
//
// A call is plain when its tensors would go through the dispatcher straight to the operator's CPU kernel, by way of its
// autograd at the most, with nothing transformed, traced or observed on the way.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

namespace fastseq {

namespace py = pybind11;

inline int64_t direct_call_count = 0;  // under the GIL

// No mode or profiler that wants to see the operator, and no forward-mode AD, for which ops.rnn takes the reference.
// Autocast, tracing, the modes of Python's dispatch and torch.func's transforms show in the keys that a tensor meets.
inline bool plain_thread() {
  return !at::impl::torch_function_mode_enabled() && !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION) &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

class PlainTensors {
 public:
  // The tensor of an exact Tensor or Parameter that is plain, and of the dtype of those before; else null.
  const at::Tensor* operator()(PyObject* object) { return take(object, false); }
  // The same, but of bool.
  const at::Tensor* or_bool(PyObject* object) { return take(object, true); }
  // Whether the call is one for autograd to record.
  bool recorded() const { return recorded_; }

 private:
  const at::Tensor* take(PyObject* object, bool may_be_bool) {
    if (!object || !THPVariable_CheckExact(object)) return nullptr;
    const at::Tensor& t = THPVariable_Unpack(object);
    const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
    const c10::DispatchKeySet keys = (impl->key_set() | local_.included_) - local_.excluded_;
    if (!keys.has(c10::DispatchKey::CPU) || (keys.raw_repr() & ~kPlainKeys.raw_repr())) return nullptr;
    recorded_ = recorded_ || (grad_ && impl->requires_grad());
    const at::ScalarType type = t.scalar_type();
    if (may_be_bool && type == at::kBool) return &t;
    if (type != at::kFloat && type != at::kDouble && type != at::kBFloat16) return nullptr;
    if (type_ == at::ScalarType::Undefined) type_ = type;
    return type == type_ ? &t : nullptr;
  }
  static constexpr c10::DispatchKeySet kPlainKeys{c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                                  c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect};
  const c10::impl::LocalDispatchKeySet local_ = c10::impl::tls_local_dispatch_key_set();
  const bool grad_ = at::GradMode::is_enabled();
  at::ScalarType type_ = at::ScalarType::Undefined;
  bool recorded_ = false;
};

// The interpreter's lock let go. Cheap enough for the smallest call, and better there too where threads stand in line.
struct Unlocked {
  PyThreadState* const state = PyEval_SaveThread();
  ~Unlocked() { PyEval_RestoreThread(state); }
};

inline py::object wrap(at::Tensor& t) {
  PyObject* object = THPVariable_Wrap(std::move(t));
  if (!object) throw python_error();
  return py::reinterpret_steal<py::object>(object);
}

}  // namespace fastseq
