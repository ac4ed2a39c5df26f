// Products with row-major weights where they lie: for calls of so few steps that packing would cost as much as it
// saves.
//
// A product with W^T is sums of products of two contiguous rows: a vector of partial sums along K, which is added up at
// the end, whatever rows are computed together. So here too a row's result does not depend on its company.
#pragma once

// Rows of a by rows of w that run side by side.
constexpr int kDotRows = 3;
template <class T>
constexpr int kDotColumns = Vec<Compute<T>>::size < 4 ? Vec<Compute<T>>::size : 4;

// The sums of the lanes of each of `count` vectors, as the lanes 0, size / count, 2 size / count, ... of one vector.
// The halves of a vector are added, then the quarters, ...: the same order for every count.
template <int count, int D, class T, int... lane>
FASTSEQ_INLINE Vec<T> lane_sums(const Vec<T>* v, Lanes<lane...> lanes) {
  constexpr int size = Vec<T>::size;
  if constexpr (D == 0) {
    return v[0];
  } else if constexpr (count > 1) {  // halves of the blocks of 2D lanes of two vectors
    Vec<T> sums[count / 2];
    for (int i = 0; i < count / 2; ++i)
      sums[i] = shuffle<(lane / D * 2 * D + lane % D)...>(v[2 * i], v[2 * i + 1]) +
                shuffle<(lane / D * 2 * D + lane % D + D)...>(v[2 * i], v[2 * i + 1]);
    return lane_sums<count / 2, D / 2>(sums, lanes);
  } else {
    const Vec<T> sum = v[0] + shuffle<((lane ^ D) % size)...>(v[0], v[0]);
    return lane_sums<1, D / 2>(&sum, lanes);
  }
}

// to[m * ld + c] = a[m] . w[c] for MR rows of a and kDotColumns rows of w, of which the first `columns` are there.
template <int MR, class T>
FASTSEQ_INLINE void dot_tile(const T* a, int64_t lda, const T* w, int64_t ldw, int64_t k_size, int64_t columns,
                             Compute<T>* to, int64_t ld) {
  using V = Vec<Compute<T>>;
  using Step = Terms<T>;
  constexpr int NR = kDotColumns<T>, numbers = V::size * Step::count;
  V sums[MR][NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int c = 0; c < NR; ++c) sums[m][c] = V(0);
  const T* row[NR];
#pragma GCC unroll 16
  for (int c = 0; c < NR; ++c) row[c] = w + (c < columns ? c : 0) * ldw;
  const auto add = [&](auto part, int64_t k, int64_t valid) __attribute__((always_inline)) {
    constexpr int p = decltype(part)::value;
    V x[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) x[m] = Step::template load<p>(a + m * lda + k, valid);
#pragma GCC unroll 16
    for (int c = 0; c < NR; ++c) {
      const V y = Step::template load<p>(row[c] + k, valid);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) sums[m][c] = Step::add(x[m], y, sums[m][c]);
    }
  };
  int64_t k = 0;
  for (; k + numbers <= k_size; k += numbers) {
    add(Part<0>{}, k, numbers);
    if constexpr (Step::parts == 2) add(Part<1>{}, k, numbers);
  }
  if (k < k_size) {
    add(Part<0>{}, k, k_size - k);
    if constexpr (Step::parts == 2) add(Part<1>{}, k, k_size - k);
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    Compute<T> lanes[V::size];
    lane_sums<NR, V::size / 2>(sums[m], typename CountLanes<V::size>::type{}).store(lanes);
#pragma GCC unroll 16
    for (int c = 0; c < NR; ++c) to[m * ld + c] = lanes[c * (V::size / NR)];
  }
}

// sums[rows][Gates][units] = a . the rows of w that belong to units [first, first + valid), w (Gates*n, K) with ld
// numbers between rows; what is past them is left as it is.
template <int Gates, class T>
void direct_product(const T* a, int64_t lda, int64_t rows, const T* w, int64_t ld, int64_t n, int64_t k_size,
                    int64_t first, int64_t valid, Compute<T>* sums) {
  using Shape = PanelShape<T, Gates>;
  for (int64_t g = 0; g < Gates; ++g) {
    for (int64_t u = 0; u < valid; u += kDotColumns<T>) {
      const T* from = w + (g * n + first + u) * ld;
      Compute<T>* to = sums + g * Shape::units + u;
      int64_t r = 0;
      for (; r + kDotRows <= rows; r += kDotRows)
        dot_tile<kDotRows>(a + r * lda, lda, from, ld, k_size, valid - u, to + r * Shape::width, Shape::width);
      for (; r < rows; ++r)
        dot_tile<1>(a + r * lda, lda, from, ld, k_size, valid - u, to + r * Shape::width, Shape::width);
    }
  }
}
