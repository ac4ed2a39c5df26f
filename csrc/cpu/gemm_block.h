// The blocks that a large product is made of: B in packed panels, rows of A in tiles.
#pragma once

// Depth of a block: a panel of it, and the rows that it goes by, stay in cache, which is smaller where vectors are.
constexpr int64_t kGemmK = FASTSEQ_VECTOR_BYTES == 32 ? 512 : 1024;
constexpr int64_t kGemmRows = 96;  // rows of A that a thread takes against all panels; a multiple of every tile
// Panels of so many bytes in a block are asked for ahead of their use: a core's own cache does not hold them.
constexpr int64_t kGemmBytesFar = 1 << 20;

// Element (i, j) is data[i * row + j * column]; one of the strides is 1.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
};
template <class T>
Matrix<T> rows_of(const T* data, int64_t ld) {
  return {data, ld, 1};
}
template <class T>
Matrix<T> columns_of(const T* data, int64_t ld) {  // the transpose of what lies in memory
  return {data, 1, ld};
}

// How B (k, Gates * n) is packed: blocks of K, each of all panels, which stay as far apart in a shorter last one, as
// threads may be a block apart.
template <class T, int Gates = 1>
struct GemmPanels {
  using Shape = PanelShape<T, Gates>;
  int64_t panels, blocks, depth, panel_stride, block_numbers;

  GemmPanels(int64_t n, int64_t k, int64_t most = kGemmK) {
    panels = Shape::blocks(n);
    blocks = (k + most - 1) / most;
    depth = blocks <= 1 ? k : ((k + blocks - 1) / blocks + kChain - 1) / kChain * kChain;  // whole chains
    panel_stride = Shape::panel_numbers(depth);
    block_numbers = panels * panel_stride;
  }
  int64_t numbers() const { return blocks * block_numbers; }
};

// Rows [k0, k0 + k_size) of B, panel j: [k][V lanes of each vector], zero past n.
template <int Gates, class T>
void pack_b(const Matrix<T>& b, int64_t k0, int64_t k_size, int64_t n, int64_t j, T* panel) {
  if constexpr (Gates == 1)
    if (b.column == 1) return pack_straight(b.data + k0 * b.row, b.row, n, k_size, j, panel);
  pack_transposed<Gates>(b.data + k0, b.column, n, k_size, j, panel);
}

// C, its rows and panels so many numbers apart, and its columns.
template <class A>
struct GemmResult {
  A* data;
  int64_t row, panel, columns;
};

// Whether A is packed: always, where a step takes several k.
template <class T>
bool packs(const Matrix<T>& a) {
  return a.column != 1 || Terms<T>::count > 1;
}

// Rows [i0, i0 + rows) of A in blocks of as many as a tile has: [block][step][MR][numbers of a step], zero past K. The
// last block may hold fewer rows.
template <int MR, class T>
void pack_a(const Matrix<T>& a, int64_t i0, int64_t rows, int64_t k0, int64_t k_size, typename Terms<T>::Left* to) {
  using Left = typename Terms<T>::Left;
  constexpr int count = Terms<T>::count;
  const auto left = [](T x) __attribute__((always_inline)) -> Left {
    if constexpr (sizeof(Left) == sizeof(T)) {
      return x;
    } else {
      return to_compute(x);
    }
  };
  const int64_t steps = (k_size + count - 1) / count;
  if constexpr (count == 2 && sizeof(Left) == sizeof(T)) {
    if (a.column != 1) {
      // The pairs of a step side by side first.
      using V = Vec<Compute<T>>;
      alignas(64) Left pairs[(kGemmRows + V::size) * count];
      for (int64_t s = 0; s < steps; ++s) {
        const T* const from = a.data + i0 + (k0 + s * count) * a.column;
        const bool two = s * count + 1 < k_size;
        for (int64_t r = 0; r < rows; r += V::size)
          pairs_at(from + r, from + (two ? a.column : 0) + r, rows - r, two ? rows - r : 0)
              .store(reinterpret_cast<Compute<T>*>(pairs + r * count));
        for (int64_t i = 0; i < rows; i += MR)
          memcpy(to + (i * steps + s * MR) * count, pairs + i * count, MR * count * sizeof(Left));
      }
      return;
    }
  }
  if constexpr (count == 1) {  // columns: a few rows of memory at a time, of which a few sets of the cache hold all
    constexpr int64_t kSteps = 8;
    for (int64_t s0 = 0; s0 < steps; s0 += kSteps)
      for (int64_t i = 0; i < rows; i += MR) {
        const T* const from = a.data + i0 + i + (k0 + s0) * a.column;
        T* const at = to + i * steps + s0 * MR;
        if (i + MR <= rows && s0 + kSteps <= steps) {
#pragma GCC unroll 8
          for (int64_t s = 0; s < kSteps; ++s) __builtin_memcpy(at + s * MR, from + s * a.column, MR * sizeof(T));
        } else {
          for (int64_t s = 0; s < kSteps && s0 + s < steps; ++s)
            for (int64_t r = 0; r < MR && i + r < rows; ++r) at[s * MR + r] = from[s * a.column + r];
        }
      }
    return;
  }
  for (int64_t i = 0; i < rows; i += MR, to += steps * MR * count) {
    const T* from = a.data + (i0 + i) * a.row + k0 * a.column;
    const int64_t here = rows - i < MR ? rows - i : MR;
    if (a.column == 1) {
      for (int64_t r = 0; r < here; ++r)
        for (int64_t k = 0; k < steps * count; ++k)
          to[k / count * MR * count + r * count + k % count] = k < k_size ? left(from[r * a.row + k]) : Left{};
      continue;
    }
    const int64_t whole = here == MR ? k_size / count : 0;
    for (int64_t s = 0; s < whole; ++s)
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < count; ++c) to[(s * MR + r) * count + c] = left(from[(s * count + c) * a.column + r]);
    for (int64_t s = whole; s < steps; ++s)
      for (int64_t r = 0; r < here; ++r)
        for (int c = 0; c < count; ++c)
          to[(s * MR + r) * count + c] = s * count + c < k_size ? left(from[(s * count + c) * a.column + r]) : Left{};
  }
}

// Rows that are needed next: their cache lines are asked for a few at a time while the ones before are multiplied, as
// many as come in meanwhile without keeping the panel's own waiting.
template <class T>
struct RowsAhead {
  const T* at = nullptr;
  int64_t row = 0, numbers = 0, done = 0, left = 0, every = 0;  // left: rows

  RowsAhead() = default;
  // `rows` of so many numbers, `stride` apart.
  RowsAhead(const T* data, int64_t stride, int64_t rows, int64_t size, int64_t calls)
      : at(data), row(stride), numbers(size), left(rows) {
    const int64_t lines = (numbers + kLineNumbers<T> - 1) / kLineNumbers<T>;
    every = (rows * lines + calls - 1) / calls;
  }
  // Of A, where they lie in columns.
  RowsAhead(const Matrix<T>& a, Range rows, int64_t k0, int64_t k_size, int64_t calls) {
    if (a.column == 1 || k_size <= 0) return;
    const int64_t size = rows.end - rows.begin;
    *this = {a.data + rows.begin + k0 * a.column, a.column, k_size, size < kGemmRows ? size : kGemmRows, calls};
  }
  FASTSEQ_INLINE void ask() {
    for (int64_t i = 0; i < every && left > 0; ++i) {
      __builtin_prefetch(at + done, 0, 2);
      done += kLineNumbers<T>;
      if (done >= numbers) done = 0, at += row, --left;
    }
  }
};

// The sums of one chain, of MR rows or the fewer that are left.
template <int MR, int NV, int PV, class T, bool fetches = false>
FASTSEQ_INLINE void gemm_tile(int64_t rows, const typename Terms<T>::Left* a, int64_t a_row, int64_t a_step,
                              const T* panel, int64_t k_size, const Compute<T>* before, int64_t ld_before,
                              Compute<T>* sums, int64_t ld_sums, const T* ahead = nullptr) {
  if constexpr (MR > 0) {
    if (rows < MR)
      return gemm_tile<MR - 1, NV, PV, T>(rows, a, a_row, a_step, panel, k_size, before, ld_before, sums, ld_sums);
    tile<MR, NV, 1, T, fetches>(a, a_row, a_step, panel, PV * Vec<Compute<T>>::size * Terms<T>::count, 0, k_size,
                                before, ld_before, sums, ld_sums, ahead);
  }
}

// Rows of A: `count` of them, and how many numbers lie from one row, one step and one tile to the next.
template <class T>
struct GemmRows {
  const typename Terms<T>::Left* data;
  int64_t row, step, tile, count;
};

// to[j][i] = from[i][j].
template <class A>
void transpose_all(const A* from, int64_t ld_from, int64_t rows, int64_t columns, A* to, int64_t ld_to) {
  constexpr int64_t V = Vec<A>::size;
  for (int64_t j = 0; j < columns; j += V)
    for (int64_t i = 0; i < rows; i += V) {
      if (i + V <= rows && j + V <= columns) {
        transpose<A>(from + i * ld_from + j, ld_from, to + j * ld_to + i, ld_to);
        continue;
      }
      for (int64_t y = j; y < j + V && y < columns; ++y)
        for (int64_t x = i; x < i + V && x < rows; ++x) to[y * ld_to + x] = from[x * ld_from + y];
    }
}

// c[rows][columns], if `transposed` c[columns][rows], (+)= a . the first NV vectors of the panel's PV; columns may be
// fewer. A chain's part of the panel stays in the first cache while all rows go by; `rows_first` where that is not
// worth that A comes in pieces from many rows of memory. Between chains the sums lie side by side: rows of C a power of
// two apart share a few sets of the cache. next: the panel after this one, or null; while a chain's rows go by, the
// weights of the next chain come.
template <int MR, int NV, int PV, bool transposed, class T>
void gemm_panel(const GemmRows<T>& a, const T* panel, int64_t k_size, Compute<T>* c, int64_t ldc, int64_t columns,
                bool accumulate, bool rows_first, RowsAhead<T>& rows_ahead, const T* next) {
  using A = Compute<T>;
  using V = Vec<A>;
  constexpr int64_t width = NV * V::size, panel_width = PV * V::size, count = Terms<T>::count;
  constexpr int64_t line = kLineNumbers<T>, lines = width * count / line;
  alignas(64) A sums[kGemmRows * width];
  const bool apart = transposed || columns < width;  // all chains' sums lie there
  const auto each_vector = [&](const auto& use) {
    for (int64_t r = 0; r < a.count; ++r)
      for (int64_t j = 0; j < columns; j += V::size) use(sums + r * width + j, c + r * ldc + j, columns - j);
  };
  if (apart && accumulate) {
    if constexpr (transposed) {
      transpose_all(c, ldc, columns, a.count, sums, width);
    } else {
      each_vector([](A* sum, A* at, int64_t valid) { V::load(at, valid).store(sum); });
    }
  }
  const auto multiply = [&](int64_t i, int64_t k) __attribute__((always_inline)) {
    const bool last = k + kChain >= k_size;
    const int64_t size = last ? k_size - k : kChain, rows = a.count - i;
    const auto* const from = a.data + i / MR * a.tile + k / count * a.step;
    const T* const part = panel + k * panel_width;
    A *const own = sums + i * width, *const at = c + i * ldc;
    const A* before = k > 0 || apart ? own : at;
    const int64_t ld_before = before == own ? width : ldc;
    if (k == 0 && !accumulate) before = nullptr;
    if (before == at)  // what is added to comes from far away, in time for the end of the chain
      for (int64_t r = 0; r < MR && r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) __builtin_prefetch(at + r * ldc + v * V::size, 1);
    A* const to = last && !apart ? at : own;
    const int64_t ld = to == own ? width : ldc;
    rows_ahead.ask();
    if (next && i / MR < lines && rows >= MR) {  // a line at each step
      const T* const ahead = (last ? next : part + size * panel_width) + i / MR * (kChain / count) * line;
      gemm_tile<MR, NV, PV, T, true>(rows, from, a.row, a.step, part, size, before, ld_before, to, ld, ahead);
    } else {
      gemm_tile<MR, NV, PV, T>(rows, from, a.row, a.step, part, size, before, ld_before, to, ld);
    }
  };
  if (rows_first) {
    for (int64_t i = 0; i < a.count; i += MR)
      for (int64_t k = 0; k < k_size; k += kChain) multiply(i, k);
  } else {
    for (int64_t k = 0; k < k_size; k += kChain)
      for (int64_t i = 0; i < a.count; i += MR) multiply(i, k);
  }
  if constexpr (transposed) {
    transpose_all(sums, width, a.count, columns, c, ldc);
  } else if (apart) {
    each_vector([](A* sum, A* at, int64_t valid) { V::load(sum).store(at, valid); });
  }
}

// A block of K, or what there is of it.
struct Depth {
  int64_t begin, size;
};

// At most kGemmRows rows of C against some panels of NV vectors of one block of K. Rows `next` of block k_next of A
// come after them.
template <int NV, class T>
void gemm_block(const Matrix<T>& a, Range rows, Depth k, Range next, Depth k_next, const T* panels,
                int64_t panel_stride, Range columns, typename Terms<T>::Left* a_memory, bool accumulate,
                const GemmResult<Compute<T>>& c) {
  constexpr int MR = tile_rows(NV), count = Terms<T>::count;
  constexpr int64_t width = NV * Vec<Compute<T>>::size;
  const bool packed = packs(a);
  const bool far = (columns.end - columns.begin) * panel_stride * static_cast<int64_t>(sizeof(T)) >= kGemmBytesFar;
  const int64_t i0 = rows.begin, here = rows.end - i0, steps = (k.size + count - 1) / count;
  GemmRows<T> left{a_memory, count, MR * count, MR * steps * count, here};
  if (packed) {
    pack_a<MR>(a, i0, here, k.begin, k.size, a_memory);
  } else if constexpr (count == 1) {
    left = {a.data + i0 * a.row + k.begin, a.row, 1, MR * a.row, here};
  }
  const int64_t calls = (columns.end - columns.begin) * ((here + MR - 1) / MR) * ((k.size + kChain - 1) / kChain);
  RowsAhead<T> rows_ahead(a, next, k_next.begin, k_next.size, calls);
  for (int64_t j = columns.begin; j < columns.end; ++j) {
    const T* const panel = panels + j * panel_stride;
    const int64_t valid = c.columns - j * width;
    for_vectors_of<NV, Vec<Compute<T>>>(valid, [&](auto part) {
      gemm_panel<MR, decltype(part)::value, NV, false>(
          left, panel, k.size, c.data + i0 * c.row + j * c.panel, c.row, valid, accumulate,
          !packed && j == columns.begin, rows_ahead, far && j + 1 < columns.end ? panel + panel_stride : nullptr);
    });
  }
}

// The product turned round, where A's columns lie in memory: a panel's worth of them is the panel, and B's columns are
// the rows that go by, in strips of as many as a tile has. What is packed in such small pieces is then B, which has to
// be the smaller of the two.
template <class T>
constexpr int kStripColumns = tile_rows(PanelShape<T, 1>::vectors);

// The rows of C that belong to some columns of A, at most a panel's worth, against one block of K. strips: [strip][k]
// [kStripColumns], of all columns of B; panel: memory for [k][a panel's worth].
template <class T>
void gemm_turned_block(const Matrix<T>& a, Range rows, Depth k, const T* strips, T* panel, bool accumulate,
                       const GemmResult<T>& c) {
  constexpr int NV = PanelShape<T, 1>::vectors, MR = kStripColumns<T>;
  const int64_t here = rows.end - rows.begin;
  pack_straight(a.data + rows.begin + k.begin * a.column, a.column, here, k.size, 0, panel);
  RowsAhead<T> nothing;
  for_vectors_of<NV, Vec<T>>(here, [&](auto part) {
    for (int64_t j = 0; j < c.columns; j += kGemmRows) {
      const int64_t count = c.columns - j < kGemmRows ? c.columns - j : kGemmRows;
      const GemmRows<T> columns{strips + j * k.size, 1, MR, MR * k.size, count};
      gemm_panel<MR, decltype(part)::value, NV, true>(columns, panel, k.size, c.data + rows.begin * c.row + j, c.row,
                                                      here, accumulate, false, nothing, static_cast<const T*>(nullptr));
    }
  });
}
