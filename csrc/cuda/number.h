// Numbers as they are stored and as they are computed with, on the device and in emulation.
#pragma once

#include <cmath>
#include <type_traits>

#include "../params.h"
#include "launch.h"
#include "ptx.h"

namespace fastseq::cuda {

// 16 bits: two to a register, and tensor cores multiply them.
template <class T>
constexpr bool kHalf = sizeof(T) == 2;

FASTSEQ_INLINE float load(const float& x) { return x; }
FASTSEQ_INLINE double load(const double& x) { return x; }
FASTSEQ_INLINE float load(const bfloat16& x) { return to_float(x); }
FASTSEQ_INLINE float load(const float16& x) { return to_float(x); }

FASTSEQ_INLINE void store(float& to, float x) { to = x; }
FASTSEQ_INLINE void store(double& to, double x) { to = x; }
FASTSEQ_INLINE void store(bfloat16& to, float x) { to = from_float<bfloat16>(x); }
FASTSEQ_INLINE void store(float16& to, float x) { to = from_float<float16>(x); }

// What csrc/cells.h asks of its V, which here is one number.
FASTSEQ_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FASTSEQ_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }
FASTSEQ_INLINE float tanh(float x) { return ::tanhf(x); }
FASTSEQ_INLINE double tanh(double x) { return ::tanh(x); }
FASTSEQ_INLINE float sigmoid(float x) { return 1 / (1 + ::expf(-x)); }
FASTSEQ_INLINE double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }
template <class V>
FASTSEQ_INLINE V relu(V x) {
  return x < 0 ? V(0) : x;  // NaN stays
}
template <class V>
FASTSEQ_INLINE V relu_backward(V h, V dh) {
  return h > 0 ? dh : V(0);
}

}  // namespace fastseq::cuda
