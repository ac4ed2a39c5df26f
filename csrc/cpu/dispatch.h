// The kernels of the instruction set in use.
#pragma once

#include <string>
#include <vector>

#include "../attention_params.h"
#include "../cell_list.h"
#include "../params.h"

namespace fastseq::cpu {

constexpr int kCells = static_cast<int>(CellKind::count);

using fastseq::Computed;

template <class T>
struct TypedKernels {
  // Of so many layers of a stack, of which this is the first, how many are best given to one call, which then computes
  // some of them at the same time: one where nothing is gained.
  int (*rnn_layers_at_once[kCells])(const RnnLayer<T>&, int layers, bool backward);
  // Layers of a stack, each of which reads what the one before it writes: forward the lowest comes first, backward the
  // highest.
  void (*rnn_forward[kCells])(const RnnForward<T>*, int layers);
  void (*rnn_backward[kCells])(const RnnBackward<T>*, int layers);
  // A direction's weights as rnn_forward packs them at each call of many steps: so many numbers, written to memory
  // that is aligned to cache lines. Of the layer, sizes, weights and threads matter alone.
  int64_t (*rnn_packed_numbers[kCells])(const RnnLayer<T>&);
  void (*rnn_pack[kCells])(const RnnLayer<T>&, int direction, T* to);
  void (*attention_forward)(const AttentionForward<T, Computed<T>>&);
  void (*attention_backward)(const AttentionBackward<T, Computed<T>>&);
  void (*attention_mask_backward)(const AttentionMaskBackward<T, Computed<T>>&);
};

// Parts of the kernels, for tests and the benchmark.
template <class T>
struct Probes {
  // n numbers in, n out.
  void (*exp)(const T*, T*, int64_t);
  void (*sigmoid)(const T*, T*, int64_t);
  void (*tanh)(const T*, T*, int64_t);
  void (*exp2_of_score)(const T*, T*, int64_t);
  // c (m, n) = a (m, k) b (k, n), all row-major.
  void (*gemm)(int threads, int64_t m, int64_t n, int64_t k, const T* a, const T* b, T* c);
  // FLOP/s of so many rounds in registers on so many threads.
  double (*fma_rate)(int64_t iterations, int threads);
};

struct Kernels {
  const char* isa;
  CellFacts cells[kCells];
  const TypedKernels<float>* f32;
  const TypedKernels<double>* f64;
  const TypedKernels<bfloat16>* bf16;
  const Probes<float>* probes_f32;
  const Probes<double>* probes_f64;
  // As Probes::gemm.
  void (*gemm_bf16)(int threads, int64_t m, int64_t n, int64_t k, const bfloat16* a, const bfloat16* b, float* c);
  // For the benchmark: bytes/s read by so many threads, each so often over so many bytes of its own.
  double (*read_rate)(int64_t bytes, int64_t repeats, int threads);
  double (*meeting_seconds)(int64_t times, int threads);

  template <class T>
  const TypedKernels<T>& typed() const;
  template <class T>
  const Probes<T>& probes() const;
};
template <>
inline const TypedKernels<float>& Kernels::typed<float>() const {
  return *f32;
}
template <>
inline const TypedKernels<double>& Kernels::typed<double>() const {
  return *f64;
}
template <>
inline const TypedKernels<bfloat16>& Kernels::typed<bfloat16>() const {
  return *bf16;
}
template <>
inline const Probes<float>& Kernels::probes<float>() const {
  return *probes_f32;
}
template <>
inline const Probes<double>& Kernels::probes<double>() const {
  return *probes_f64;
}

// The best instruction set of this build that the machine runs, or the one FASTSEQ_ISA names; chosen once. Throws
// std::runtime_error, in one sentence, for a name that is unknown, not in this build or not runnable here.
const Kernels& kernels();

// Instruction sets in this build that this machine runs, best first.
std::vector<std::string> available_isas();

// The kernels of one instruction set; null when it is not in this build or this machine does not run it.
const Kernels* find_kernels(const std::string& isa);

// True in a child that was forked after this library was loaded.
bool in_forked_child();

}  // namespace fastseq::cpu
