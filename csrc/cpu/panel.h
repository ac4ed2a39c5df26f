// The matrix product inside a step: a few rows times one packed panel of weights, the sums held in registers.
//
// A panel holds NV vectors of output units for every k, k slowest: [K][NV][V]; of bfloat16 for every two k, side by
// side in a lane: [K/2][NV][V][2], zero past the last and, for AMX, up to whole tiles. Rows of a product are summed in
// chains of kChain terms along K, the chains added in order (in AMX's tiles: amx_product.h). The order depends on K
// alone, never on how many rows are computed together or on which thread, so a row's result does not depend on its
// company.
#pragma once

constexpr int64_t kRowBlock = 64;  // rows that share one pass over a panel; bounds the scratch

// Register tiles: rows MR by NV vectors, MR*NV accumulators plus the operands within the register file. Where that is
// small, a step has few multiplications for what else it does: several steps at a time, longer chains.
#if defined(FASTSEQ_AMX_EMULATED)  // soon compiled
constexpr int tile_rows(int) { return 1; }
constexpr int kWideVectors = 4;
constexpr int64_t kChain = 128;
constexpr int kStepsAtOnce = 1;
#elif FASTSEQ_VECTOR_BYTES == 64 || defined(__aarch64__)  // 32 registers
constexpr int tile_rows(int nv) { return nv == 3 ? 8 : 6; }
constexpr int kWideVectors = 4;  // vectors of units in a panel that has no gates to fill it
constexpr int64_t kChain = 128;
constexpr int kStepsAtOnce = 1;
#else                                                     // 16 registers
constexpr int tile_rows(int nv) { return nv == 2 ? 6 : nv == 3 ? 4 : 3; }
constexpr int kWideVectors = 2;
constexpr int64_t kChain = 256;
constexpr int kStepsAtOnce = 4;
#endif

// Gates that a cell computes side by side, of one vector or more (vectors.h).
#if FASTSEQ_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kGatesAtOnce = 12;
#else
constexpr int kGatesAtOnce = 6;
#endif

// Of terms of a sum a product takes so many at a time; a panel has whole such, those past the last zero.
template <class T>
constexpr int64_t kTermsTaken = kInAmx<T> ? kAmxTerms : Terms<T>::count;
template <class T>
constexpr int64_t padded_terms(int64_t k) {
  return (k + kTermsTaken<T> - 1) / kTermsTaken<T> * kTermsTaken<T>;
}

// The shape of one product's panels: `gates` planes of `unit_vectors` vectors side by side.
template <class T, int Gates>
struct PanelShape {
  using V = Vec<Compute<T>>;
  static constexpr int gates = Gates;
  static constexpr int unit_vectors = Gates == 1 ? kWideVectors : 1;
  static constexpr int vectors = gates * unit_vectors;  // NV
  static constexpr int units = unit_vectors * V::size;  // output units a panel covers
  static constexpr int width = vectors * V::size;       // sums a row
  static constexpr int step = width * Terms<T>::count;  // numbers of a panel that are taken at a time
  // Of the sums of panels side by side, where those of a vector of units are.
  static constexpr int64_t place_of_vector(int64_t u) { return u / unit_vectors * width + u % unit_vectors * V::size; }
  static constexpr int64_t blocks(int64_t n) { return (n + units - 1) / units; }
  static constexpr int64_t panel_numbers(int64_t k) { return padded_terms<T>(k) / Terms<T>::count * step; }
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

// to[k][u] = from[u][k] for as many u as a vector has lanes, and as many k, or, of bfloat16, pairs of k.
template <class T>
FASTSEQ_INLINE void transpose(const T* from, int64_t ld_from, T* to, int64_t ld_to) {
  using V = Vec<Compute<T>>;  // for its lanes: nothing is computed
  V rows[V::size];
#pragma GCC unroll 16
  for (int i = 0; i < V::size; ++i) __builtin_memcpy(&rows[i].v, from + i * ld_from, sizeof rows[i].v);
  swap_blocks<1>(rows, typename CountLanes<V::size>::type{});
#pragma GCC unroll 16
  for (int i = 0; i < V::size; ++i) __builtin_memcpy(to + i * ld_to, &rows[i].v, sizeof rows[i].v);
}

// The same of fewer rows, of fewer numbers each, zero past them; so many rows of `to` are written.
template <class T>
void transpose_part(const T* from, int64_t ld_from, int64_t rows_there, int64_t numbers, T* to, int64_t ld_to,
                    int64_t rows_wanted) {
  using V = Vec<Compute<T>>;
  constexpr int64_t all = sizeof(V) / sizeof(T);
  V rows[V::size];
#pragma GCC unroll 16
  for (int i = 0; i < V::size; ++i) {
    rows[i] = V(0);
    if (i >= rows_there) continue;
    const T* const row = from + i * ld_from;
    if (numbers >= all) {
      __builtin_memcpy(&rows[i].v, row, sizeof rows[i].v);
    } else if constexpr (all == V::size) {
      rows[i] = V::load(row, numbers);
    } else {
      T line[all] = {};
      memcpy(line, row, numbers * sizeof(T));
      __builtin_memcpy(&rows[i].v, line, sizeof line);
    }
  }
  swap_blocks<1>(rows, typename CountLanes<V::size>::type{});
#pragma GCC unroll 16
  for (int i = 0; i < V::size; ++i)
    if (i < rows_wanted) __builtin_memcpy(to + i * ld_to, &rows[i].v, sizeof rows[i].v);
}

// Where the panel keeps (k, u), u a lane of some vector.
template <class Shape>
FASTSEQ_INLINE int64_t panel_place(int64_t k, int64_t u) {
  constexpr int count = Shape::step / Shape::width;
  return k / count * Shape::step + u * count + k % count;
}

// w is (Gates*n, K) row-major, ld numbers between rows, the product is a W^T: panel j, k, gate g, lane u =
// w[g*n + j*units + u][k]; zero past n and past K. lanes: of each gate, whole vectors, where nobody reads the others.
template <int Gates, class T>
void pack_transposed(const T* w, int64_t ld, int64_t n, int64_t k_size, int64_t j, T* panel,
                     int64_t lanes = PanelShape<T, Gates>::units) {
  using Shape = PanelShape<T, Gates>;
  constexpr int64_t V = Shape::V::size, count = Terms<T>::count;
  const int64_t first = j * Shape::units;
  const int64_t valid = n - first < Shape::units ? n - first : Shape::units;
  const int64_t padded = padded_terms<T>(k_size);
  for (int64_t k0 = 0; k0 < padded; k0 += V * count) {  // whole cache lines of the panel at a time
    const int64_t k1 = k0 + V * count < padded ? k0 + V * count : padded;
    for (int64_t g = 0; g < Gates; ++g) {
      for (int64_t u0 = 0; u0 < lanes; u0 += V) {
        const T* from = w + (g * n + first + u0) * ld;
        T* const to = panel + panel_place<Shape>(k0, g * Shape::units + u0);
        if (u0 + V <= valid && k0 + V * count <= k_size) {
          transpose(from + k0, ld, to, Shape::step);
        } else {
          transpose_part(from + k0, ld, valid - u0, k_size - k0, to, Shape::step, (k1 - k0) / count);
        }
      }
    }
  }
}

// w is (K, n) row-major, ld numbers between rows, the product is a W: panel j, k, lane u = w[k][j*units + u]; zero
// past n and past K.
template <class T>
void pack_straight(const T* w, int64_t ld, int64_t n, int64_t k_size, int64_t j, T* panel) {
  using Shape = PanelShape<T, 1>;
  constexpr int count = Terms<T>::count;
  const int64_t first = j * Shape::units;
  const int64_t valid = n - first < Shape::units ? n - first : Shape::units;
  for (int64_t k = 0; k < padded_terms<T>(k_size); k += count) {
    T* to = panel + panel_place<Shape>(k, 0);
    const T* from = w + k * ld + first;
    if constexpr (count == 1 && sizeof(T) == sizeof(Compute<T>)) {
      if (valid < Shape::units) {
        using V = typename Shape::V;
#pragma GCC unroll 4
        for (int64_t u = 0; u < Shape::units; u += V::size)
          (u < valid ? V::load(from + u, valid - u) : V(0)).store(to + u);
        continue;
      }
    }
    if (valid < Shape::units || k + count > k_size) {
      for (int64_t u = 0; u < Shape::units; ++u)
        for (int i = 0; i < count; ++i) to[u * count + i] = u < valid && k + i < k_size ? from[i * ld + u] : T{};
    } else if constexpr (count == 1) {
      __builtin_memcpy(to, from, Shape::units * sizeof(T));  // of a size known here: no call
    } else {
      using V = typename Shape::V;
#pragma GCC unroll 4
      for (int u = 0; u < Shape::units; u += V::size)
        pairs_at(from + u, from + ld + u, V::size, V::size).store(reinterpret_cast<float*>(to + 2 * u));
    }
  }
}

// sums[m][nb][NV*V] = before, or nothing where that is null, + a[m][0..k) . panel nb, for MR rows and NB panels side by
// side: one chain. NB > 1 gives a single row enough independent sums to hide the latency of the fused multiply-add. The
// numbers of step s of row m are at a[m * a_row + s * a_step], those of the panel at panel + s * panel_step; both have
// whole steps.
template <int MR, int NV, int NB, class T, bool fetches = false>
FASTSEQ_INLINE void tile(const typename Terms<T>::Left* a, int64_t a_row, int64_t a_step, const T* panel,
                         int64_t panel_step, int64_t panel_stride, int64_t k_size, const Compute<T>* before,
                         int64_t ld_before, Compute<T>* sums, int64_t ld_sums, const T* ahead = nullptr) {
  using V = Vec<Compute<T>>;
  using Step = Terms<T>;
  V c[MR][NB * NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int i = 0; i < NB * NV; ++i) c[m][i] = V(0);
  const auto add = [&](auto part, int64_t s) __attribute__((always_inline)) {
    constexpr int p = decltype(part)::value;
    const auto weights = [&](int i) __attribute__((always_inline)) {
      return Step::template load<p>(
          panel + (i / NV) * panel_stride + s * panel_step + (i % NV) * V::size * Step::count);
    };
    const auto row = [&](int m) __attribute__((always_inline)) {
      return Step::template broadcast<p>(a + m * a_row + s * a_step);
    };
    if constexpr (MR < NV) {  // fewer rows than vectors: the rows' broadcasts stay in registers, the weights stream
      V b[MR];
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) b[m] = row(m);
#pragma GCC unroll 16
      for (int i = 0; i < NB * NV; ++i) {
        const V w = weights(i);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) c[m][i] = Step::add(b[m], w, c[m][i]);
      }
    } else {
      V w[NB * NV];
#pragma GCC unroll 16
      for (int i = 0; i < NB * NV; ++i) w[i] = weights(i);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const V b = row(m);
#pragma GCC unroll 16
        for (int i = 0; i < NB * NV; ++i) c[m][i] = Step::add(b, w[i], c[m][i]);
      }
    }
  };
  const int64_t steps = (k_size + Step::count - 1) / Step::count;
  if constexpr (Step::parts == 1) {
#pragma GCC unroll kStepsAtOnce
    for (int64_t s = 0; s < steps; ++s) {
      if constexpr (fetches) __builtin_prefetch(ahead + s * kLineNumbers<T>, 0, 2);
      add(Part<0>{}, s);
    }
  } else {  // several of two parts would take more registers
    for (int64_t s = 0; s < steps; ++s) {
      if constexpr (fetches) __builtin_prefetch(ahead + s * kLineNumbers<T>, 0, 2);
      add(Part<0>{}, s), add(Part<1>{}, s);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
    for (int i = 0; i < NB * NV; ++i) {
      const V sum = before ? V::load(before + m * ld_before + i * V::size) + c[m][i] : c[m][i];
      sum.store(sums + m * ld_sums + i * V::size);
    }
  }
}

// One piece of K: a's columns, and the panel's rows that go with them. All but the last have whole steps.
struct KPiece {
  int64_t column, size;
};

template <int MR, int NV, class T>
FASTSEQ_INLINE void tile_remainder(int64_t rows, const typename Terms<T>::Left* a, int64_t lda, const T* panel,
                                   int64_t panel_step, int64_t k_size, const Compute<T>* before, Compute<T>* sums,
                                   int64_t ld_sums) {
  if constexpr (MR > 0) {
    if (rows == MR)
      return tile<MR, NV, 1, T>(a, lda, Terms<T>::count, panel, panel_step, 0, k_size, before, ld_sums, sums, ld_sums);
    tile_remainder<MR - 1, NV, T>(rows, a, lda, panel, panel_step, k_size, before, sums, ld_sums);
  }
}

// use(the vectors that hold so many numbers, at most NV).
template <int NV, class V, class Use>
FASTSEQ_INLINE void for_vectors_of(int64_t numbers, const Use& use) {
  if constexpr (NV > 1)
    if (numbers <= (NV - 1) * V::size) return for_vectors_of<NV - 1, V>(numbers, use);
  use(Part<NV>{});
}

// Terms of a sum in whole steps.
template <class T>
constexpr int64_t whole_steps(int64_t k) {
  return (k + Terms<T>::count - 1) / Terms<T>::count * Terms<T>::count;
}

// The chains of a's columns, one after another, each [rows][whole steps]: for many panels to read what each
// would have to copy.
template <class T>
void gather_rows(const T* a, int64_t lda, int64_t rows, const KPiece* pieces, int pieces_n,
                 typename Terms<T>::Left* to) {
  for (int p = 0; p < pieces_n; ++p)
    for (int64_t k0 = 0; k0 < pieces[p].size; k0 += kChain) {
      const int64_t k_size = pieces[p].size - k0 < kChain ? pieces[p].size - k0 : kChain;
      for (int64_t r = 0; r < rows; ++r, to += whole_steps<T>(k_size))
        to_left(a + r * lda + pieces[p].column + k0, k_size, to);
    }
}

// sums[rows][NB][NV*V] = a . panels, rows <= kRowBlock. a's columns come in pieces that follow one another in the
// panel. gathered: the rows once more, from gather_rows, or null. Of a panel's PV vectors the first NV are computed.
// next: the panel after this one, or null; while a chain's rows go by, the weights of the next chain come.
template <int NV, int NB, int PV, class T>
void panel_product(const T* a, int64_t lda, int64_t rows, const KPiece* pieces, int pieces_n, const T* panel,
                   int64_t panel_step, int64_t panel_stride, Compute<T>* sums,
                   const typename Terms<T>::Left* gathered = nullptr, const T* next = nullptr) {
  using Left = typename Terms<T>::Left;
  constexpr int width = PV * Vec<Compute<T>>::size, count = Terms<T>::count;
  constexpr int MR = tile_rows(NV);
  static_assert(kChain % count == 0, "a chain has whole steps");
  constexpr bool copies = count > 1;  // rows may be odd, and Left may be another type
  alignas(64) Left memory[copies ? (NB > 1 ? 1 : kRowBlock) * kChain : 1];
  const Compute<T>* before = nullptr;  // the first chain's sums overwrite
  for (int p = 0; p < pieces_n; ++p) {
    for (int64_t k0 = 0; k0 < pieces[p].size; k0 += kChain) {
      const int64_t k_size = pieces[p].size - k0 < kChain ? pieces[p].size - k0 : kChain;
      const T* from = a + pieces[p].column + k0;
      const Left* columns = memory;
      int64_t ld = kChain;
      if (gathered) {
        columns = gathered, ld = whole_steps<T>(k_size);
        gathered += rows * ld;
      } else if constexpr (copies) {
        for (int64_t r = 0; r < rows; ++r) to_left(from + r * lda, k_size, memory + r * kChain);
      } else {
        columns = from, ld = lda;
      }
      if constexpr (NB > 1) {
        tile<1, NV, NB, T>(
            columns, ld, count, panel, panel_step, panel_stride, k_size, before, NB * width, sums, NB * width);
      } else {
        int64_t r = 0;
        if (next) {
          const bool last = k0 + k_size == pieces[p].size && p + 1 == pieces_n;
          const T* const ahead = last ? next : panel + k_size / count * panel_step;
          // A line at each step: so many rows ask for all of a chain.
          constexpr int64_t line = kLineNumbers<T>, lines = width * count / line;
          for (; r + MR <= rows && r < lines * MR; r += MR)
            tile<MR, NV, 1, T, true>(
                columns + r * ld, ld, count, panel, panel_step, 0, k_size, before ? before + r * width : nullptr, width,
                sums + r * width, width, ahead + r / MR * (kChain / count) * line);
        }
        for (; r + MR <= rows; r += MR)
          tile<MR, NV, 1, T>(columns + r * ld, ld, count, panel, panel_step, 0, k_size,
                             before ? before + r * width : nullptr, width, sums + r * width, width);
        tile_remainder<MR - 1, NV, T>(rows - r, columns + r * ld, ld, panel, panel_step, k_size,
                                      before ? before + r * width : nullptr, sums + r * width, width);
      }
      before = sums;
      panel += k_size / count * panel_step;
    }
  }
  if (!before) memset(sums, 0, rows * NB * width * sizeof(Compute<T>));  // an empty sum
}
