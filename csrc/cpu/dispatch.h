// The kernels of the instruction set in use.
#pragma once

#include <string>
#include <vector>

#include "../cell_list.h"
#include "../params.h"

namespace fastseq::cpu {

constexpr int kCells = static_cast<int>(CellKind::count);

template <class T>
struct TypedKernels {
  void (*rnn_forward[kCells])(const RnnForward<T>&);
  void (*rnn_backward[kCells])(const RnnBackward<T>&);
};

// Probes for the tests of the vector mathematics: n numbers in, n out.
template <class T>
struct VectorFunctions {
  void (*exp)(const T*, T*, int64_t);
  void (*sigmoid)(const T*, T*, int64_t);
  void (*tanh)(const T*, T*, int64_t);
};

struct Kernels {
  const char* isa;
  CellFacts cells[kCells];
  TypedKernels<float> f32;
  TypedKernels<double> f64;
  TypedKernels<bfloat16> bf16;
  VectorFunctions<float> functions_f32;
  VectorFunctions<double> functions_f64;

  template <class T>
  const TypedKernels<T>& typed() const;
  template <class T>
  const VectorFunctions<T>& functions() const;
};
template <>
inline const TypedKernels<float>& Kernels::typed<float>() const {
  return f32;
}
template <>
inline const TypedKernels<double>& Kernels::typed<double>() const {
  return f64;
}
template <>
inline const TypedKernels<bfloat16>& Kernels::typed<bfloat16>() const {
  return bf16;
}
template <>
inline const VectorFunctions<float>& Kernels::functions<float>() const {
  return functions_f32;
}
template <>
inline const VectorFunctions<double>& Kernels::functions<double>() const {
  return functions_f64;
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
