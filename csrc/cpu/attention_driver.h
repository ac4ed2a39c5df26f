// What the forward and the backward of attention share: blocks of queries against blocks of keys and their products.
//
// A product with the scores is one of
//   S (rows, keys)  = Q K^T     K in panels, transposed: [panel][D][lanes], zero past the last key
//   O (rows, Dv)   += P V       V in panels of a few columns: [group of columns][S][lanes]
// and backward's likewise; the left side's numbers are broadcast, so it may be transposed where it lies. Both sides are
// of the type Factor: of pairs, two neighbours along the sum lie side by side in a lane (terms.h), and P and dS are
// rounded. Sums are pieces of kTermBlock terms, added in order, from a block's first key on, so a row's bits do not
// depend on the batch, its place in it or the threads.
#pragma once

// A block of scores: rows begin a cache line further than a power of two, or their columns would share one set of it.
template <class A>
constexpr int64_t score_stride(int64_t keys) {
  return keys + kLineNumbers<A>;
}

template <class T>
constexpr int64_t whole_vectors(int64_t numbers) {
  constexpr int64_t V = Vec<Compute<T>>::size;
  return (numbers + V - 1) / V * V;
}

// What the products take: bfloat16 as it is where the processor multiplies it, else what is computed in.
#if FASTSEQ_PAIRS
template <class T>
using Factor = T;
#else
template <class T>
using Factor = Compute<T>;
#endif

// The whole steps that hold some terms: none where there are none, as nobody has prepared what those would read.
template <class F>
constexpr Range whole_steps(Range terms) {
  if (terms.begin >= terms.end) return {terms.begin, terms.begin};
  return {terms.begin / Terms<F>::count * Terms<F>::count, whole_steps<F>(terms.end)};
}

// c (rows, NV vectors) (+)= a b for some terms of the sum, in whole steps, and at most kTileRows rows.
template <int NV, int MR, class F>
FASTSEQ_INLINE void score_tile(int64_t rows, const F* a, int64_t a_row, int64_t a_step, const F* b, int64_t b_step,
                               Range k, Compute<F>* c, int64_t ldc, bool accumulate) {
  if constexpr (MR > 0) {
    constexpr int64_t count = Terms<F>::count;
    if (rows < MR) return score_tile<NV, MR - 1, F>(rows, a, a_row, a_step, b, b_step, k, c, ldc, accumulate);
    for (int64_t k0 = k.begin; k0 < k.end; k0 += kTermBlock)
      tile<MR, NV, 1, F>(
          a + k0 / count * a_step, a_row, a_step, b + k0 / count * b_step, b_step, 0,
          k.end - k0 < kTermBlock ? k.end - k0 : kTermBlock, accumulate || k0 > k.begin ? c : nullptr, ldc, c, ldc);
  }
}

// What the next head reads, of which products ask for a few lines at every tile: a small head is done before the
// processor sees what comes next. Of large ones products take so long that this does not matter, and of few the caches
// have more.
template <class T, int Parts>
class HeadAhead {
 public:
  HeadAhead() = default;
  // columns: of all that is computed for a query. Keys and values are two of the parts, others are added.
  HeadAhead(const Attention<T, Compute<T>>& p, int64_t kv_head, int64_t columns) {
    calls_ = p.heads / p.kv_heads * (p.queries / kTileRows + 1) * (columns / PanelShape<Factor<T>, 1>::width + 1);
    add(p.k, kv_head, p.keys, p.size);
    add(p.v, kv_head, p.keys, p.value_size);
  }
  void add(const Heads<const T>& of, int64_t head, int64_t rows, int64_t size) {
    parts_[count_++] = {of.at(head, 0), of.row, rows, size, calls_};
  }
  FASTSEQ_INLINE void ask() {
#pragma GCC unroll 5
    for (int i = 0; i < Parts; ++i) parts_[i].ask();
  }

  static bool helps(const Attention<T, Compute<T>>& p) {
    const int64_t group = p.heads / p.kv_heads,
                  bytes = (group * p.queries * p.size + p.keys * (p.size + p.value_size)) * sizeof(T);
    return group > 0 && bytes <= kBytesOfSmallHead && bytes * p.batch * p.kv_heads >= kBytesOfMany;
  }

 private:
  static constexpr int64_t kBytesOfSmallHead = 256 << 10, kBytesOfMany = 4 << 20;
  RowsAhead<T> parts_[Parts];
  int count_ = 0;
  int64_t calls_ = 0;
};
struct NothingAhead {
  void ask() {}
};

// c (rows, keys) = a panels, the panels of at least columns_of(rows) alone.
template <class F, class ColumnsOf, class Ahead = NothingAhead>
void score_product(const F* a, int64_t a_row, int64_t rows, int64_t size, const F* panels, int64_t keys, Compute<F>* c,
                   int64_t ldc, const ColumnsOf& columns_of, Ahead&& ahead = {}) {
  using Shape = PanelShape<F, 1>;
#if FASTSEQ_AMX
  if constexpr (kInAmx<F>) return amx_score_product(a, rows, size, panels, c, ldc, columns_of);
#endif
  for (int64_t j = 0; j < keys; j += Shape::width, panels += Shape::panel_numbers(size)) {
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const int64_t here = rows - m < kTileRows ? rows - m : kTileRows;
      const Range needed = columns_of(m, m + here);
      if (needed.begin >= needed.end || needed.end <= j || needed.begin >= j + Shape::width) continue;
      ahead.ask();
      for_vectors_of<Shape::vectors, Vec<Compute<F>>>(needed.end - j, [&](auto part) __attribute__((always_inline)) {
        score_tile<decltype(part)::value, kTileRows, F>(
            here, a + m * a_row, a_row, Terms<F>::count, panels, Shape::step, {0, size}, c + m * ldc + j, ldc, false);
      });
    }
  }
}

// Rows (rows, size) as the right side of a product: [group of columns][row][columns of the group], whole vectors, zero
// past the size; of pairs [group][two rows][columns][2], zero past the last row up to what a product takes.
template <class T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t size, Factor<T>* to) {
  using V = Vec<Compute<T>>;
  constexpr int count = Terms<Factor<T>>::count;
  for_each_column_group<Compute<T>>(whole_vectors<T>(size), [&](auto part, int64_t j) __attribute__((always_inline)) {
    constexpr int NV = decltype(part)::value;
    Factor<T>* group = to + padded_terms<Factor<T>>(rows) * j;
    if constexpr (count == 2) {
      for (int64_t i = 0; i < rows; i += 2)
        for (int v = 0; v < NV; ++v) {
          const T* const at = from + i * stride + j + v * V::size;
          const int64_t valid = size - j - v * V::size;
          pairs_at(at, at + (i + 1 < rows ? stride : 0), valid, i + 1 < rows ? valid : 0)
              .store(reinterpret_cast<float*>(group + (i * NV + 2 * v) * V::size));
        }
      const int64_t there = whole_steps<Factor<T>>(rows), past = padded_terms<Factor<T>>(rows) - there;
      memset(static_cast<void*>(group + there * NV * V::size), 0, past * NV * V::size * sizeof(Factor<T>));
    } else if (j + NV * V::size <= size) {
      for (int64_t i = 0; i < rows; ++i)
        for (int v = 0; v < NV; ++v) V::load(from + i * stride + j + v * V::size).store(group + (i * NV + v) * V::size);
    } else {
      for (int64_t i = 0; i < rows; ++i)
        for (int v = 0; v < NV; ++v)
          V::load(from + i * stride + j + v * V::size, size - j - v * V::size).store(group + (i * NV + v) * V::size);
    }
  });
}

// Rows as the right side of a product need no packing where they are whole vectors, side by side, and begin where
// vectors do.
template <class T>
bool rows_lie_packed(const Heads<const T>& rows, int64_t size) {
  constexpr int64_t V = Vec<Compute<T>>::size;
  return sizeof(T) == sizeof(Compute<T>) && size % V == 0 && rows.row == size && rows.head % V == 0 &&
         rows.batch % V == 0 && reinterpret_cast<uintptr_t>(rows.data) % FASTSEQ_VECTOR_BYTES == 0;
}

// c (rows, columns) += a b, b packed rows, or b_row > 0 numbers apart where they lie, for each tile of rows of c its
// own terms of all.
template <class F, class TermsOf, class Ahead = NothingAhead>
void accumulate_product(const F* a, int64_t a_row, int64_t a_step, int64_t rows, int64_t terms, const F* b,
                        int64_t b_row, int64_t columns, Compute<F>* c, int64_t ldc, const TermsOf& terms_of,
                        Ahead&& ahead = {}) {
  constexpr int count = Terms<F>::count;
#if FASTSEQ_AMX
  if constexpr (kInAmx<F>) return amx_accumulate_product(a, a_row, rows, terms, b, columns, c, ldc, terms_of);
#endif
  terms = whole_steps<F>(terms);
  for (int64_t k0 = 0; k0 < terms; k0 += kTermBlock) {
    const int64_t k1 = k0 + kTermBlock < terms ? k0 + kTermBlock : terms;
    for_each_column_group<Compute<F>>(columns, [&](auto part, int64_t j) __attribute__((always_inline)) {
      constexpr int NV = decltype(part)::value;
      for (int64_t m = 0; m < rows; m += kTileRows) {
        const int64_t here = rows - m < kTileRows ? rows - m : kTileRows;
        Range k = whole_steps<F>(terms_of(m, m + here));
        k = {k.begin > k0 ? k.begin : k0, k.end < k1 ? k.end : k1};
        if (k.begin >= k.end) continue;
        ahead.ask();
        score_tile<NV, kTileRows, F>(here, a + m * a_row, a_row, a_step, b_row ? b + j : b + terms * j,
                                     b_row ? b_row : NV * Vec<Compute<F>>::size * count, k, c + m * ldc + j, ldc, true);
      }
    });
  }
}

// Rows as the left side of a product with scores' panels: where they lie, or copied to memory of rows *
// padded_terms(size) numbers; for AMX gathered.
template <class T>
struct FactorRows {
  using F = Factor<T>;
  const F* data;
  int64_t row;

  static bool copies(int64_t size) { return kInAmx<F> || sizeof(T) != sizeof(F) || size % Terms<F>::count != 0; }

  FactorRows(const T* from, int64_t stride, int64_t rows, int64_t size, F* memory) {
#if FASTSEQ_AMX
    if constexpr (kInAmx<F>) {
      const KPiece all[1] = {{0, size}};
      amx_gather(from, stride, rows, all, 1, memory);
      data = memory, row = 0;
      return;
    }
#endif
    if constexpr (sizeof(T) == sizeof(F)) {
      if (!copies(size)) {
        data = from, row = stride;
        return;
      }
    }
    data = memory, row = whole_steps<F>(size);
    for (int64_t i = 0; i < rows; ++i) {
      if constexpr (sizeof(T) == sizeof(F)) {
        to_left(from + i * stride, size, memory + i * row);
      } else {
        for (int64_t j = 0; j < size; j += Vec<F>::size)
          Vec<F>::load(from + i * stride + j, size - j).store(memory + i * row + j, size - j);
      }
    }
  }
};

// Numbers of a row as the left side of a product, from its start on, in their place. As many as whole vectors have are
// written.
template <class F>
void row_to_factors(Compute<F>* row, Range columns) {
  if constexpr (sizeof(F) < sizeof(Compute<F>)) {
    using V = Vec<Compute<F>>;
    for (int64_t j = columns.begin / V::size * V::size; j < columns.end; j += V::size)
      store_rounded(V::load(row + j), reinterpret_cast<F*>(row) + j);
  }
}

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

// Scores are in units of log 2, so that their exponentials are powers of two: products are times this, be it the keys
// where they are of the type that is computed in, or the scores.
template <class T, class A>
double score_factor(const Attention<T, A>& p) {
  return p.softcap != 0 ? p.scale / p.softcap : p.scale * kLog2e;
}
template <class T>
constexpr bool kScaledKeys = sizeof(Factor<T>) == sizeof(Compute<T>);

// Panel j of rows (n, size), transposed and, where they are of the type that is computed in, times a factor; of the
// last one the vectors that have a row. scratch: a panel's numbers, for another type.
template <class T>
void pack_scores_panel(const T* rows, int64_t stride, int64_t n, int64_t size, int64_t j, Compute<T> factor,
                       Compute<T>* scratch, Factor<T>* panel) {
  using A = Compute<T>;
  using V = Vec<A>;
  using Shape = PanelShape<Factor<T>, 1>;
  const int64_t first = j * Shape::units, here = n - first < Shape::units ? n - first : Shape::units;
  const int64_t lanes = whole_vectors<T>(here);
  if constexpr (sizeof(T) == sizeof(Factor<T>)) {
    (void)scratch;
    pack_transposed<1>(rows, stride, n, size, j, panel, lanes);
  } else {
    for (int64_t i = 0; i < here; ++i)
      for (int64_t k = 0; k < size; k += V::size)
        V::load(rows + (first + i) * stride + k, size - k).store(scratch + i * size + k, size - k);
    pack_transposed<1>(scratch, size, here, size, 0, panel, lanes);
  }
  if constexpr (kScaledKeys<T>)
    if (factor != 1)
      for (int64_t k = 0; k < size; ++k, panel += Shape::step)
        for (int64_t u = 0; u < lanes; u += V::size) (V::load(panel + u) * V(factor)).store(panel + u);
}

// The keys that rows [i0, i1) of the queries see, and of those each row for itself, relative to a block of keys.
struct VisibleKeys {
  Band band;
  int64_t keys;

  Range of_rows(int64_t i0, int64_t i1) const { return {band.first(i0, keys), band.end(i1 - 1, keys)}; }
  Range in_block(int64_t i0, int64_t i1, int64_t j0, int64_t n) const {
    const Range all = of_rows(i0, i1);
    const int64_t begin = all.begin - j0, end = all.end - j0;
    return {begin < 0 ? 0 : begin < n ? begin : n, end < 0 ? 0 : end < n ? end : n};
  }
};
