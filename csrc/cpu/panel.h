// The matrix product inside a step: a few rows times one packed panel of weights, the sums held in registers.
//
// A panel holds NV vectors of output units for every k, k slowest: [K][NV][V]. Rows of a product are summed in chains
// of kChain terms along K, the chains added in order. The order depends on K alone, never on how many rows are computed
// together or on which thread, so a row's result does not depend on its company.
#pragma once

constexpr int64_t kChain = 64;
constexpr int64_t kRowBlock = 64;  // rows that share one pass over a panel; bounds the scratch

// Register tiles: rows MR by NV vectors, MR*NV accumulators plus the operands within the register file.
#if FASTSEQ_VECTOR_BYTES == 64 || defined(__aarch64__)  // 32 registers
constexpr int tile_rows(int nv) { return nv == 3 ? 8 : 6; }
constexpr int kWideVectors = 4;  // vectors of units in a panel that has no gates to fill it
#else                            // 16 registers
constexpr int tile_rows(int nv) { return nv == 2 ? 6 : nv == 3 ? 4 : 3; }
constexpr int kWideVectors = 2;
#endif

// The shape of one product's panels: `gates` planes of `unit_vectors` vectors side by side.
template <class T, int Gates>
struct PanelShape {
  static constexpr int gates = Gates;
  static constexpr int unit_vectors = Gates == 1 ? kWideVectors : 1;
  static constexpr int vectors = gates * unit_vectors;       // NV
  static constexpr int units = unit_vectors * Vec<T>::size;  // output units a panel covers
  static constexpr int width = vectors * Vec<T>::size;       // numbers a k
  static constexpr int64_t blocks(int64_t n) { return (n + units - 1) / units; }
  static constexpr int64_t panel_numbers(int64_t k) { return k * width; }
};

// A transposition, a step at a time: of each two rows D apart, the off-diagonal blocks of D by D lanes change places.
template <int D, class T, int... lane>
FASTSEQ_INLINE void swap_blocks(Vec<T>* rows, Lanes<lane...> lanes) {
  constexpr int size = Vec<T>::size;
  if constexpr (D < size) {
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i) {
      if (i & D) continue;
      const Vec<T> a = rows[i], b = rows[i + D];
      rows[i] = shuffle<(lane & D ? size + lane - D : lane)...>(a, b);
      rows[i + D] = shuffle<(lane & D ? size + lane : lane + D)...>(a, b);
    }
    swap_blocks<2 * D>(rows, lanes);
  }
}

// to[k][u] = from[u][k] for as many k and u as a vector has lanes.
template <class T>
FASTSEQ_INLINE void transpose(const T* from, int64_t ld_from, T* to, int64_t ld_to) {
  using V = Vec<T>;
  V rows[V::size];
#pragma GCC unroll 16
  for (int i = 0; i < V::size; ++i) rows[i] = V::load(from + i * ld_from);
  swap_blocks<1>(rows, typename CountLanes<V::size>::type{});
#pragma GCC unroll 16
  for (int i = 0; i < V::size; ++i) rows[i].store(to + i * ld_to);
}

// w is (Gates*n, K) row-major, ld numbers between rows, the product is a W^T: panel j, k, gate g, lane u =
// w[g*n + j*units + u][k]; zero past n.
template <class T, int Gates>
void pack_transposed(const T* w, int64_t ld, int64_t n, int64_t k_size, int64_t j, T* panel) {
  using Shape = PanelShape<T, Gates>;
  constexpr int64_t V = Vec<T>::size;
  const int64_t first = j * Shape::units;
  const int64_t valid = n - first < Shape::units ? n - first : Shape::units;
  for (int64_t k0 = 0; k0 < k_size; k0 += V) {  // whole cache lines of the panel at a time
    const int64_t k1 = k0 + V < k_size ? k0 + V : k_size;
    for (int64_t g = 0; g < Gates; ++g) {
      for (int64_t u0 = 0; u0 < Shape::units; u0 += V) {
        const T* from = w + (g * n + first + u0) * ld;
        T* to = panel + g * Shape::units + u0;
        if (u0 + V <= valid && k0 + V <= k_size) {
          transpose(from + k0, ld, to + k0 * Shape::width, Shape::width);
          continue;
        }
        for (int64_t u = 0; u < V; ++u)
          for (int64_t k = k0; k < k1; ++k) to[k * Shape::width + u] = u0 + u < valid ? from[u * ld + k] : T(0);
      }
    }
  }
}

// w is (K, n) row-major, ld numbers between rows, the product is a W: panel j, k, lane u = w[k][j*units + u]; zero
// past n.
template <class T>
void pack_straight(const T* w, int64_t ld, int64_t n, int64_t k_size, int64_t j, T* panel) {
  using Shape = PanelShape<T, 1>;
  const int64_t first = j * Shape::units;
  const int64_t valid = n - first < Shape::units ? n - first : Shape::units;
  for (int64_t k = 0; k < k_size; ++k) {
    T* to = panel + k * Shape::width;
    const T* from = w + k * ld + first;
    if (valid == Shape::units) {
      __builtin_memcpy(to, from, Shape::units * sizeof(T));  // of a size known here: no call
    } else {
      for (int64_t u = 0; u < Shape::units; ++u) to[u] = u < valid ? from[u] : T(0);
    }
  }
}

// sums[m][nb][NV*V] (+)= a[m][0..k) . panel nb, for MR rows and NB panels side by side: one chain. NB > 1 gives a
// single row enough independent sums to hide the latency of the fused multiply-add. a[m][k] is at a[m * lda + k * a_k],
// the vectors of the panel for k at panel + k * panel_k.
template <int MR, int NV, int NB, class T>
FASTSEQ_INLINE void tile(const T* a, int64_t lda, int64_t a_k, const T* panel, int64_t panel_k, int64_t panel_stride,
                         int64_t k_size, T* sums, int64_t ld_sums, bool accumulate) {
  using V = Vec<T>;
  V c[MR][NB * NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int i = 0; i < NB * NV; ++i) c[m][i] = V(0);
  for (int64_t k = 0; k < k_size; ++k) {
    if constexpr (MR < NV) {  // fewer rows than vectors: the rows' broadcasts stay in registers, the weights stream
      V b[MR];
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) b[m] = V::broadcast(a[m * lda + k * a_k]);
#pragma GCC unroll 16
      for (int i = 0; i < NB * NV; ++i) {
        const V w = V::load(panel + (i / NV) * panel_stride + k * panel_k + (i % NV) * V::size);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) c[m][i] = fma(b[m], w, c[m][i]);
      }
    } else {
      V w[NB * NV];
#pragma GCC unroll 16
      for (int i = 0; i < NB * NV; ++i)
        w[i] = V::load(panel + (i / NV) * panel_stride + k * panel_k + (i % NV) * V::size);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const V b = V::broadcast(a[m * lda + k * a_k]);
#pragma GCC unroll 16
        for (int i = 0; i < NB * NV; ++i) c[m][i] = fma(b, w[i], c[m][i]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
    for (int i = 0; i < NB * NV; ++i) {
      T* to = sums + m * ld_sums + i * V::size;
      (accumulate ? V::load(to) + c[m][i] : c[m][i]).store(to);
    }
  }
}

// One piece of K: a's columns, and the panel's rows that go with them.
struct KPiece {
  int64_t column, size;
};

template <int MR, int NV, class T>
FASTSEQ_INLINE void tile_remainder(int64_t rows, const T* a, int64_t lda, const T* panel, int64_t panel_k,
                                   int64_t k_size, T* sums, bool accumulate) {
  if constexpr (MR > 0) {
    if (rows == MR) return tile<MR, NV, 1>(a, lda, 1, panel, panel_k, 0, k_size, sums, NV * Vec<T>::size, accumulate);
    tile_remainder<MR - 1, NV>(rows, a, lda, panel, panel_k, k_size, sums, accumulate);
  }
}

// sums[rows][NB][NV*V] = a . panels, rows <= kRowBlock. a's columns come in pieces that follow one another in the
// panel.
template <int NV, int NB, class T>
void panel_product(const T* a, int64_t lda, int64_t rows, const KPiece* pieces, int pieces_n, const T* panel,
                   int64_t panel_k, int64_t panel_stride, T* sums) {
  constexpr int width = NV * Vec<T>::size;
  constexpr int MR = tile_rows(NV);
  bool accumulate = false;
  for (int p = 0; p < pieces_n; ++p) {
    for (int64_t k0 = 0; k0 < pieces[p].size; k0 += kChain) {
      const int64_t k_size = pieces[p].size - k0 < kChain ? pieces[p].size - k0 : kChain;
      const T* columns = a + pieces[p].column + k0;
      if constexpr (NB > 1) {
        tile<1, NV, NB>(columns, lda, 1, panel, panel_k, panel_stride, k_size, sums, NB * width, accumulate);
      } else {
        int64_t r = 0;
        for (; r + MR <= rows; r += MR)
          tile<MR, NV, 1>(columns + r * lda, lda, 1, panel, panel_k, 0, k_size, sums + r * width, width, accumulate);
        tile_remainder<MR - 1, NV>(
            rows - r, columns + r * lda, lda, panel, panel_k, k_size, sums + r * width, accumulate);
      }
      accumulate = true;
      panel += k_size * panel_k;
    }
  }
  if (!accumulate) memset(sums, 0, rows * NB * width * sizeof(T));  // an empty sum
}
