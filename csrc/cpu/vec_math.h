// exp, sigmoid, tanh on vectors of float and double, over the whole domain: infinities, NaN (comes out as NaN), results
// down to the denormals. Bounds in units in the last place, held by tests/test_vec_math.py over the domain:
//   exp 2, sigmoid 4, tanh 4, exp2_of_score 2.
// exp(x) = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2, ln 2 split in two so that n ln2_hi is exact.
#pragma once

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504088896341f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr float round = 12582912.0f;                // 1.5 * 2^23: adding it leaves round(x) in the low bits
  static constexpr float lowest = -104.0f, highest = 89.0f;  // exp is 0 below, infinite above
  static constexpr float tanh_one = 10.0f;                   // tanh rounds to 1 from here
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.44269504088896340736, ln2_hi = 6.93147180369123816490e-01,
                          ln2_lo = 1.90821492927058770002e-10;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -746.0, highest = 710.0;
  static constexpr double tanh_one = 20.0;
  static constexpr int mantissa = 52, bias = 1023;
};

// (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, by pairs of terms (Estrin): a shorter chain, so that more vectors are under
// way at a time.
FASTSEQ_INLINE Vec<float> exp_tail(Vec<float> r) {  // minimax, Cephes expf
  using V = Vec<float>;
  const V r2 = r * r;
  const V high = fma(V(1.9875691500e-4f), r, V(1.3981999507e-3f)),
          low = fma(V(1.6666665459e-1f), r, V(5.0000001201e-1f));
  return fma(fma(high, r2, fma(V(8.3334519073e-3f), r, V(4.1665795894e-2f))), r2, low);
}
FASTSEQ_INLINE Vec<double> exp_tail(Vec<double> r) {  // Taylor: the first term left out is 4e-18
  using V = Vec<double>;
  V q = fma(V(1.0 / 6227020800.0), r, V(1.0 / 479001600.0));
  q = fma(q, r, V(1.0 / 39916800.0));
  q = fma(q, r, V(1.0 / 3628800.0));
  q = fma(q, r, V(1.0 / 362880.0));
  q = fma(q, r, V(1.0 / 40320.0));
  q = fma(q, r, V(1.0 / 5040.0));
  q = fma(q, r, V(1.0 / 720.0));
  q = fma(q, r, V(1.0 / 120.0));
  q = fma(q, r, V(1.0 / 24.0));
  q = fma(q, r, V(1.0 / 6.0));
  return fma(q, r, V(0.5));
}

// 2^r for |r| <= 1/2.
FASTSEQ_INLINE Vec<float> exp2_fraction(Vec<float> r) {  // interpolates at the zeros of a Chebyshev polynomial: 2.5e-9
  using V = Vec<float>;
  V q = fma(V(1.5461444574e-4f), r, V(1.3400428178e-3f));
  q = fma(q, r, V(9.6180566790e-3f));
  q = fma(q, r, V(5.5503272267e-2f));
  q = fma(q, r, V(2.4022650922e-1f));
  q = fma(q, r, V(6.9314720670e-1f));
  return fma(q, r, V(1));
}
FASTSEQ_INLINE Vec<double> exp2_fraction(Vec<double> r) {
  using V = Vec<double>;
  r = r * V(6.93147180559945309417e-01);
  return V(1) + fma(r * r, exp_tail(r), r);
}

// 2^n for integers n in the exponent's range; of others anything, in arithmetic that may wrap around.
template <class T>
FASTSEQ_INLINE Vec<T> power_of_two(typename Vec<T>::Bits n) {
  using C = ExpConstants<T>;
  using Unsigned = typename VecTraits<T>::unsigned_bits;
  return (typename Vec<T>::Native)(((Unsigned)n + C::bias) << C::mantissa);
}

// The whole number nearest to each lane's, of a size that the mantissa holds: as a number, and as an integer.
template <class T>
struct Rounded {
  Vec<T> number;
  typename Vec<T>::Bits integer;
};
// Of what ExpConstants::round was added to.
template <class T>
FASTSEQ_INLINE Rounded<T> rounded(Vec<T> shifted) {
  using Unsigned = typename VecTraits<T>::unsigned_bits;
  const Vec<T> round(ExpConstants<T>::round);
  return {shifted - round, (typename Vec<T>::Bits)((Unsigned)shifted.v - (Unsigned)round.v)};
}

// v 2^n with v in [1/2, 2], rounded where it is no normal number.
template <class T>
FASTSEQ_INLINE Vec<T> scale(Vec<T> v, Rounded<T> n) {
#if defined(__AVX512F__)
  return times_power_of_two(v, n.number);
#else
  // In two factors: 2^n alone leaves the range before the product does, at both ends.
  const typename Vec<T>::Bits half = n.integer >> 1;
  return v * power_of_two<T>(half) * power_of_two<T>(n.integer - half);
#endif
}
// The same for n in the exponent's range.
template <class T>
FASTSEQ_INLINE Vec<T> scale_normal(Vec<T> v, Rounded<T> n) {
#if defined(__AVX512F__)
  return times_power_of_two(v, n.number);
#else
  return v * power_of_two<T>(n.integer);
#endif
}

// x -> n and e^r - 1 with e^x = 2^n e^r.
template <class T>
struct Reduced {
  Rounded<T> n;
  Vec<T> expm1_r;
};
template <class T>
FASTSEQ_INLINE Reduced<T> reduce(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  const Rounded<T> n = rounded(fma(x, V(C::log2e), V(C::round)));
  V r = fma(n.number, V(-C::ln2_hi), x);
  r = fma(n.number, V(-C::ln2_lo), r);
  return {n, fma(r * r, exp_tail(r), r)};
}

// Of x up to `highest`.
template <class T>
FASTSEQ_INLINE Vec<T> exp_below(Vec<T> x) {
  const Reduced<T> e = reduce(at_least(x, Vec<T>(ExpConstants<T>::lowest)));
  return scale(Vec<T>(1) + e.expm1_r, e.n);
}
template <class T>
FASTSEQ_INLINE Vec<T> exp(Vec<T> x) {
  return exp_below(at_most(x, Vec<T>(ExpConstants<T>::highest)));
}

// 2^x for x up to 1, as a softmax has it, whose largest is 0: what would be no normal number is 0. NaN stays NaN.
template <class T>
FASTSEQ_INLINE Vec<T> exp2_of_score(Vec<T> x) {
  using V = Vec<T>;
  const Rounded<T> n = rounded(x + V(ExpConstants<T>::round));
  const V result = scale_normal(exp2_fraction(x - n.number), n);
  return x.v < V(T(1 - ExpConstants<T>::bias)).v ? V(0).v : result.v;
}

template <class T>
FASTSEQ_INLINE Vec<T> negative_magnitude(Vec<T> x) {
  using V = Vec<T>;
  constexpr typename V::Bit sign = typename V::Bit(1) << (8 * sizeof(T) - 1);
  return (typename V::Native)((typename V::Bits)x.v | sign);
}

template <class T>
FASTSEQ_INLINE Vec<T> sigmoid(Vec<T> x) {
  using V = Vec<T>;
  const V z = exp_below(negative_magnitude(x));  // <= 1: nothing overflows, and small results keep their digits
  const V top = (typename V::Bits)x.v < 0 ? z.v : V(1).v;
  return top / (V(1) + z);
}

// m / (m + 2) with m = e^(2|x|) - 1, the sign put back: accurate near 0 as well.
template <class T>
FASTSEQ_INLINE Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  constexpr typename V::Bit sign = typename V::Bit(1) << (8 * sizeof(T) - 1);
  const typename V::Bits sign_bit = (typename V::Bits)x.v & sign;
  const V magnitude = at_most(V((typename V::Native)((typename V::Bits)x.v & ~sign)), V(C::tanh_one));
  const Reduced<T> e = reduce(magnitude + magnitude);
  const V power = scale_normal(V(1), e.n);
  const V m = fma(power, e.expm1_r, power - V(1));
  return (typename V::Native)((typename V::Bits)(m / (m + V(2))).v | sign_bit);
}

// NaN stays NaN, as in torch.
template <class T>
FASTSEQ_INLINE Vec<T> relu(Vec<T> x) {
  return at_least(x, Vec<T>(0));
}
template <class T>
FASTSEQ_INLINE Vec<T> relu_backward(Vec<T> y, Vec<T> dy) {
  return y.v <= Vec<T>(0).v ? Vec<T>(0).v : dy.v;
}
