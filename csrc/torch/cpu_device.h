// What the operators ask of a device, of the CPU. cuda_device.h answers the same for CUDA.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "../cpu/dispatch.h"
#include "attention.h"
#include "memory.h"

namespace fastseq {

class CpuDevice {
 public:
  static constexpr bool kTakesFloat16 = false;
  static constexpr int64_t kMostHeadSize = fastseq::kMostHeadSize;

  // For as long as the object lives, calls are for the device of the input. The kernels run serially in a forked child,
  // whose OpenMP threads did not survive; torch's operators would wait for them for ever. As DataLoader in its workers,
  // this leaves the child with one thread.
  explicit CpuDevice(const at::Tensor&) {
    if (cpu::in_forked_child() && at::get_num_threads() > 1) at::set_num_threads(1);
  }

  at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) const { return fastseq::empty(sizes, like); }
  // The same numbers where the kernels read them. `name` is for the error where that cannot be.
  at::Tensor take(const at::Tensor& on_cpu, const char* name) const {
    (void)name;
    return on_cpu;
  }
  // Refuses a call that is recorded to be run again if a number of it would then be the same that should be another.
  void check_runs_once(const char* name) const { (void)name; }

  // Of so many layers of a stack, of which this is the first, how many the next two are best given at a time.
  template <class T>
  int rnn_layers_at_once(CellKind cell, const RnnLayer<T>& p, int64_t layers, bool backward) const {
    return cpu::kernels().typed<T>().rnn_layers_at_once[static_cast<int>(cell)](p, static_cast<int>(layers), backward);
  }
  template <class T>
  void rnn_forward(CellKind cell, at::ArrayRef<RnnForward<T>> layers) const {
    cpu::kernels().typed<T>().rnn_forward[static_cast<int>(cell)](layers.data(), static_cast<int>(layers.size()));
  }
  template <class T>
  void rnn_backward(CellKind cell, at::ArrayRef<RnnBackward<T>> layers) const {
    cpu::kernels().typed<T>().rnn_backward[static_cast<int>(cell)](layers.data(), static_cast<int>(layers.size()));
  }
  template <class T>
  void attention_forward(const AttentionForward<T, Computed<T>>& p) const {
    cpu::kernels().typed<T>().attention_forward(p);
  }
  template <class T>
  void attention_backward(const AttentionBackward<T, Computed<T>>& p) const {
    cpu::kernels().typed<T>().attention_backward(p);
  }
  template <class T>
  void attention_mask_backward(const AttentionMaskBackward<T, Computed<T>>& p) const {
    cpu::kernels().typed<T>().attention_mask_backward(p);
  }
};

}  // namespace fastseq
