// The terms of a sum of products a[k] w[k], as the registers take them.
//
//   float, double   one k at a time: c += a w.
//   bfloat16        two at a time, a pair of neighbours in each 32-bit lane: c += a[k+1] w[k+1], c += a[k] w[k], in
//                   float. One instruction where the processor has it (AVX512-BF16, which takes denormals for zeros),
//                   else two passes over the upper and the lower halves of w, with the a of a panel product, which all
//                   panels share, made floats beforehand.
#pragma once

template <int N>
struct Part {
  static constexpr int value = N;
};

template <class T>
struct Terms {
  static constexpr int count = 1;  // of k in a step
  static constexpr int parts = 1;  // passes over a step
  using V = Vec<T>;
  using Left = T;  // what the a of a panel product is made of

  template <int part>
  FASTSEQ_INLINE static V load(const T* p) {
    return V::load(p);
  }
  template <int part>
  FASTSEQ_INLINE static V load(const T* p, int64_t numbers) {
    return V::load(p, numbers);
  }
  // The numbers of one step in every lane.
  template <int part>
  FASTSEQ_INLINE static V broadcast(const T* p) {
    return V::broadcast(p);
  }
  FASTSEQ_INLINE static V add(V a, V w, V c) { return fma(a, w, c); }
};

#if defined(__AVX512BF16__) || defined(FASTSEQ_AMX_EMULATED)
#define FASTSEQ_PAIRS 1  // a step of two terms is one instruction
#else
#define FASTSEQ_PAIRS 0
#endif

template <>
struct Terms<bfloat16> {
  static constexpr int count = 2;
#if FASTSEQ_PAIRS
  static constexpr int parts = 1;
  using Left = bfloat16;
#else
  static constexpr int parts = 2;
  using Left = float;
#endif
  using V = Vec<float>;

  template <int part>
  FASTSEQ_INLINE static V load(const bfloat16* p) {
    V pairs;
    __builtin_memcpy(&pairs.v, p, sizeof pairs.v);
    return half<part>(pairs);
  }
  template <int part>
  FASTSEQ_INLINE static V load(const bfloat16* p, int64_t numbers) {
    if (numbers >= 2 * V::size) return load<part>(p);
    bfloat16 lanes[2 * V::size] = {};
    for (int64_t i = 0; i < numbers; ++i) lanes[i] = p[i];
    return load<part>(lanes);
  }
  template <int part>
  FASTSEQ_INLINE static V broadcast(const float* p) {
    return V::broadcast(p + (part == 0));
  }
  template <int part>
  FASTSEQ_INLINE static V broadcast(const bfloat16* p) {
    float pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return V::broadcast(&pair);
  }
  FASTSEQ_INLINE static V add(V a, V w, V c) {
#if defined(__AVX512BF16__)
    return (V::Native)_mm512_dpbf16_ps((__m512)c.v, (__m512bh)a.v, (__m512bh)w.v);
#elif FASTSEQ_PAIRS
    return fma(half_of<1>(a), half_of<1>(w), fma(half_of<0>(a), half_of<0>(w), c));
#else
    return fma(a, w, c);
#endif
  }

 private:
  template <int part>
  FASTSEQ_INLINE static V half(V pairs) {
    return FASTSEQ_PAIRS ? pairs : half_of<part>(pairs);
  }
  template <int part>
  FASTSEQ_INLINE static V half_of(V pairs) {
    using Bits = V::Bits;
    return (V::Native)(part == 0 ? (Bits)pairs.v & static_cast<V::Bit>(0xffff0000) : (Bits)pairs.v << 16);
  }
};

// Pairs of the same number of two rows, of which so many are there.
FASTSEQ_INLINE Vec<float> pairs_at(const bfloat16* first, const bfloat16* second, int64_t valid, int64_t second_valid) {
  using Bits = VecTraits<float>::unsigned_bits;
  const Bits low = (Bits)Vec<float>::load(first, valid).v, high = (Bits)Vec<float>::load(second, second_valid).v;
  return (Vec<float>::Native)(low >> 16 | high);
}

#if defined(__AVX512BF16__)
// Rounded to nearest, ties to even; denormals become zero, as in a product of pairs.
FASTSEQ_INLINE void store_rounded(Vec<float> v, bfloat16* to) {
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)v.v);
  __builtin_memcpy(to, &halves, sizeof halves);
}
// Pairs, so rounded, of the same lane of two vectors.
FASTSEQ_INLINE Vec<float> pairs_of(Vec<float> first, Vec<float> second) {
  const auto lanes = [](Vec<float> v) __attribute__((always_inline)) {
    return Vec<float>::widened((VecTraits<float>::halves)_mm512_cvtneps_pbh((__m512)v.v));
  };
  return (Vec<float>::Native)(lanes(first) | lanes(second) << 16);
}
#elif FASTSEQ_PAIRS
FASTSEQ_INLINE void store_rounded(Vec<float> v, bfloat16* to) { v.store(to); }
FASTSEQ_INLINE Vec<float> pairs_of(Vec<float> first, Vec<float> second) {
  bfloat16 halves[2][Vec<float>::size];
  first.store(halves[0]);
  second.store(halves[1]);
  return pairs_at(halves[0], halves[1], Vec<float>::size, Vec<float>::size);
}
#endif

// n numbers as a panel product takes them, zero up to whole steps.
template <class T>
FASTSEQ_INLINE void to_left(const T* from, int64_t n, typename Terms<T>::Left* to) {
  using V = Vec<Compute<T>>;
  if constexpr (sizeof(typename Terms<T>::Left) == sizeof(T)) {
    memcpy(to, from, n * sizeof(T));
  } else {
    for (int64_t k = 0; k < n; k += V::size) V::load(from + k, n - k).store(to + k, n - k);
  }
  if (n % Terms<T>::count) to[n] = {};
}
