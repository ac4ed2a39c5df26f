// Vectors that go through the same arithmetic side by side. What a cell computes of one is a long chain of operations;
// the processor waits for its end with few of the next vector's under way, unless other chains lie in between.
#pragma once

template <class T, int N>
struct Vectors {
  Vec<T> part[N];

  Vectors() = default;
  FASTSEQ_INLINE explicit Vectors(int value) {
    for (int i = 0; i < N; ++i) part[i] = Vec<T>(value);
  }
};

// f of each part.
template <class T, int N, class F, class... Same>
FASTSEQ_INLINE Vectors<T, N> of_each(const F& f, const Vectors<T, N>& a, const Same&... others) {
  Vectors<T, N> out;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) out.part[i] = f(a.part[i], others.part[i]...);
  return out;
}

#define FASTSEQ_OF_EACH_1(name)                                         \
  template <class T, int N>                                             \
  FASTSEQ_INLINE Vectors<T, N> name(const Vectors<T, N>& a) {           \
    return of_each([](Vec<T> x) FASTSEQ_LAMBDA { return name(x); }, a); \
  }
#define FASTSEQ_OF_EACH_2(name)                                                         \
  template <class T, int N>                                                             \
  FASTSEQ_INLINE Vectors<T, N> name(const Vectors<T, N>& a, const Vectors<T, N>& b) {   \
    return of_each([](Vec<T> x, Vec<T> y) FASTSEQ_LAMBDA { return name(x, y); }, a, b); \
  }
#define FASTSEQ_LAMBDA __attribute__((always_inline))
FASTSEQ_OF_EACH_1(sigmoid)
FASTSEQ_OF_EACH_1(tanh)
FASTSEQ_OF_EACH_1(exp)
FASTSEQ_OF_EACH_1(relu)
FASTSEQ_OF_EACH_2(relu_backward)
FASTSEQ_OF_EACH_2(operator+)
FASTSEQ_OF_EACH_2(operator-)
FASTSEQ_OF_EACH_2(operator*)
FASTSEQ_OF_EACH_2(operator/)
#undef FASTSEQ_OF_EACH_1
#undef FASTSEQ_OF_EACH_2
template <class T, int N>
FASTSEQ_INLINE Vectors<T, N> fma(const Vectors<T, N>& a, const Vectors<T, N>& b, const Vectors<T, N>& c) {
  return of_each([](Vec<T> x, Vec<T> y, Vec<T> z) FASTSEQ_LAMBDA { return fma(x, y, z); }, a, b, c);
}
#undef FASTSEQ_LAMBDA
