// A vector of T as wide as the instruction set's registers, on the compilers' vector extensions; only what they cannot
// express (fused multiply-add) is spelt per instruction set.
#pragma once

#if defined(__AVX512F__) || defined(FASTSEQ_AMX_EMULATED)  // a vector is as wide as a row of a tile
#define FASTSEQ_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTSEQ_VECTOR_BYTES 32
#else
#define FASTSEQ_VECTOR_BYTES 16
#endif

template <class T>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float vector __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef int32_t bit;
  typedef uint32_t unsigned_bits __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef uint16_t halves __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 2)));
};
template <>
struct VecTraits<double> {
  typedef double vector __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef int64_t bit;
  typedef uint64_t unsigned_bits __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
};

template <class T>
using Compute = Computed<T>;

template <class T>
constexpr int64_t kLineNumbers = 64 / sizeof(T);  // in a cache line

FASTSEQ_INLINE float to_compute(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}
FASTSEQ_INLINE float to_compute(float x) { return x; }
FASTSEQ_INLINE double to_compute(double x) { return x; }

#if defined(__AVX512F__)
constexpr bool kStreamsLines = true;
inline void store_fence() { _mm_sfence(); }
#else  // a line takes several vectors
constexpr bool kStreamsLines = false;
inline void store_fence() {}
#endif

template <class T>
struct Vec {
  using Native = typename VecTraits<T>::vector;
  using Bits = typename VecTraits<T>::bits;
  using Bit = typename VecTraits<T>::bit;
  static constexpr int size = FASTSEQ_VECTOR_BYTES / sizeof(T);

  Native v;

  Vec() = default;
  FASTSEQ_INLINE Vec(Native native) : v(native) {}
  FASTSEQ_INLINE explicit Vec(T value) : v(Native{} + value) {}  // -0.0 becomes 0.0: no kernel broadcasts one
  FASTSEQ_INLINE explicit Vec(int value) : Vec(T(value)) {}

  FASTSEQ_INLINE static Vec load(const T* p) {
    Native n;
    __builtin_memcpy(&n, p, sizeof n);
    return n;
  }
  FASTSEQ_INLINE void store(T* p) const { __builtin_memcpy(p, &v, sizeof v); }

  // A whole line, past the caches, for whoever comes much later. Others see it after a store_fence() at the latest.
  FASTSEQ_INLINE void stream(T* p) const {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#else
    store(p);
#endif
  }

  // The first n lanes; the others read as zero and are never written, so no access leaves the row.
  FASTSEQ_INLINE static Vec load(const T* p, int64_t n) {
    if (n >= size) return load(p);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (Native)_mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(n)), p);
    else return (Native)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(n)), p);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return (Native)_mm256_maskload_ps(p, first_lanes(n));
    else return (Native)_mm256_maskload_pd(p, first_lanes(n));
#else
    T lanes[size] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
#endif
  }
  FASTSEQ_INLINE void store(T* p, int64_t n) const {
    if (n >= size) return store(p);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first_lanes(n)), (__m512)v);
    else _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n)), (__m512d)v);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
    else _mm256_maskstore_pd(p, first_lanes(n), (__m256d)v);
#else
    T lanes[size];
    store(lanes);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
  }
#if defined(__AVX512F__)
  FASTSEQ_INLINE static unsigned first_lanes(int64_t n) { return n > 0 ? (1u << n) - 1 : 0; }
#elif defined(__AVX2__)
  FASTSEQ_INLINE static __m256i first_lanes(int64_t n) {
    Bits lane;
    for (int i = 0; i < size; ++i) lane[i] = i;
    return (__m256i)(lane < Bits{} + static_cast<Bit>(n));
  }
#endif

  // In 32-bit lanes; compilers' own conversion of vectors takes halves of them.
  template <class Halves>
  FASTSEQ_INLINE static auto widened(Halves halves) {
    using Unsigned = typename VecTraits<T>::unsigned_bits;
#if defined(__AVX512F__)
    return (Unsigned)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)halves);
#elif defined(__AVX2__)
    return (Unsigned)_mm256_cvtepu16_epi32((__m128i)halves);
#else
    return __builtin_convertvector(halves, Unsigned);
#endif
  }

  // A byte in every lane.
  FASTSEQ_INLINE static Bits widened_bytes(const uint8_t* p) {
#if defined(__AVX2__)
    __m128i bytes = {};
    __builtin_memcpy(&bytes, p, size);
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (Bits)_mm512_maskz_cvtepu8_epi32(0xffff, bytes);
    else return (Bits)_mm512_maskz_cvtepu8_epi64(0xff, bytes);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return (Bits)_mm256_cvtepu8_epi32(bytes);
    else return (Bits)_mm256_cvtepu8_epi64(bytes);
#else
    Bits lanes;
    for (int i = 0; i < size; ++i) lanes[i] = p[i];
    return lanes;
#endif
  }

  // Numbers stored as bfloat16; rounded to nearest, ties to even, when stored. T is float.
  FASTSEQ_INLINE static Vec load(const bfloat16* p) {
    typename VecTraits<T>::halves halves;
    __builtin_memcpy(&halves, p, sizeof halves);
    return (Native)(widened(halves) << 16);
  }
  FASTSEQ_INLINE void store(bfloat16* p) const {
#if defined(__AVX512BF16__)
    // The instruction takes denormals for zeros.
    if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, 0x20) == 0, 1)) {
      const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
      __builtin_memcpy(p, &halves, sizeof halves);
    } else {
      store_by_bits(p);
    }
#else
    store_by_bits(p);
#endif
  }
#if defined(__AVX512BF16__)
  __attribute__((noinline, cold))
#else
  FASTSEQ_INLINE
#endif
  void store_by_bits(bfloat16* p) const {
    using Unsigned = typename VecTraits<T>::unsigned_bits;
    const Unsigned bits = (Unsigned)v;
    // A NaN stays one, and quiet: the sum below could carry it over into zero.
    const Unsigned nan = (Unsigned)((bits & 0x7fffffff) > 0x7f800000);
    const Unsigned rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Unsigned kept = (nan & ((bits >> 16) | 0x40)) | (~nan & rounded);
#if defined(__AVX512F__)
    const auto halves = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)kept);
#else
    const auto halves = __builtin_convertvector(kept, typename VecTraits<T>::halves);
#endif
    __builtin_memcpy(p, &halves, sizeof halves);
  }
  FASTSEQ_INLINE static Vec load(const bfloat16* p, int64_t n) {
    if (n >= size) return load(p);
#if defined(__AVX512F__)
    const auto halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes(n)), p);
    return (Native)(widened((typename VecTraits<T>::halves)halves) << 16);
#else
    bfloat16 lanes[size] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
#endif
  }
  FASTSEQ_INLINE void store(bfloat16* p, int64_t n) const {
    if (n >= size) return store(p);
    bfloat16 lanes[size];
    store(lanes);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }

  // The number at p in every lane.
  FASTSEQ_INLINE static Vec broadcast(const T* p) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (Native)_mm512_set1_ps(*p);
    else return (Native)_mm512_set1_pd(*p);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return (Native)_mm256_set1_ps(*p);
    else return (Native)_mm256_set1_pd(*p);
#else
    return Vec(*p);
#endif
  }
};

template <class T>
FASTSEQ_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return a.v + b.v;
}
template <class T>
FASTSEQ_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return a.v - b.v;
}
template <class T>
FASTSEQ_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return a.v * b.v;
}
template <class T>
FASTSEQ_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return a.v / b.v;
}

// The numbers 0 to N - 1 as a type.
template <int... I>
struct Lanes {};
template <int N, int... I>
struct CountLanes : CountLanes<N - 1, N - 1, I...> {};
template <int... I>
struct CountLanes<0, I...> {
  using type = Lanes<I...>;
};

// Lane i is lane from[i] of a and b side by side.
template <int... from, class T>
FASTSEQ_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a.v, b.v, from...);
#else
  return __builtin_shuffle(a.v, b.v, typename Vec<T>::Bits{from...});
#endif
}

// a * b + c, rounded once where the instruction set can.
FASTSEQ_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>::Native)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v);
#elif defined(__FMA__)
  return (Vec<float>::Native)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v);
#elif defined(__aarch64__)
  return (Vec<float>::Native)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v);
#else
  return a.v * b.v + c.v;
#endif
}
FASTSEQ_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>::Native)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v);
#elif defined(__FMA__)
  return (Vec<double>::Native)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v);
#elif defined(__aarch64__)
  return (Vec<double>::Native)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v);
#else
  return a.v * b.v + c.v;
#endif
}

// x, but at least or at most a bound that is no NaN; a NaN passes through.
template <class T>
FASTSEQ_INLINE Vec<T> at_least(Vec<T> x, Vec<T> low) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (typename Vec<T>::Native)_mm512_maskz_max_ps(0xffff, (__m512)low.v, (__m512)x.v);
  else return (typename Vec<T>::Native)_mm512_maskz_max_pd(0xff, (__m512d)low.v, (__m512d)x.v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (typename Vec<T>::Native)_mm256_max_ps((__m256)low.v, (__m256)x.v);
  else return (typename Vec<T>::Native)_mm256_max_pd((__m256d)low.v, (__m256d)x.v);
#else
  return x.v < low.v ? low.v : x.v;
#endif
}
template <class T>
FASTSEQ_INLINE Vec<T> at_most(Vec<T> x, Vec<T> high) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (typename Vec<T>::Native)_mm512_maskz_min_ps(0xffff, (__m512)high.v, (__m512)x.v);
  else return (typename Vec<T>::Native)_mm512_maskz_min_pd(0xff, (__m512d)high.v, (__m512d)x.v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (typename Vec<T>::Native)_mm256_min_ps((__m256)high.v, (__m256)x.v);
  else return (typename Vec<T>::Native)_mm256_min_pd((__m256d)high.v, (__m256d)x.v);
#else
  return x.v > high.v ? high.v : x.v;
#endif
}

#if defined(__AVX512F__)
// v 2^n for whole n, rounded once, the ends of the range included.
FASTSEQ_INLINE Vec<float> times_power_of_two(Vec<float> v, Vec<float> n) {
  return (Vec<float>::Native)_mm512_maskz_scalef_ps(0xffff, (__m512)v.v, (__m512)n.v);
}
FASTSEQ_INLINE Vec<double> times_power_of_two(Vec<double> v, Vec<double> n) {
  return (Vec<double>::Native)_mm512_maskz_scalef_pd(0xff, (__m512d)v.v, (__m512d)n.v);
}
#endif
