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

// A word of factors as tensor cores take it: of 16-bit numbers as it is. Of floats they multiply 11 bits, "tf32". Where
// that is not enough, a float is the sum of two such numbers, of which the second goes to `rest`, and of the four
// products the three larger are added up: an error as of float itself (Fasi et al., "Matrix multiplication in multiword
// arithmetic", 2023), as long as sums are short (attention_tiles.cuh). The first is rounded by hand, as cvt.rna.tf32 is
// four instructions for what is not finite: here the rest is NaN then. The second is cut off by tensor cores: it has 12
// bits and either sign.
template <class T, bool kSplit>
__device__ __forceinline__ uint32_t factor(uint32_t word, uint32_t& rest) {
  if constexpr (kHalf<T>) {
    return word;
  } else if constexpr (kSplit) {
    const uint32_t first = (word + 0x1000) & ~0x1fffu;
    rest = as_word(as_float(word) - as_float(first));
    return first;
  } else {
    return as_word(round_to_tf32(as_float(word)));
  }
}

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
