// The blocks that a large product is made of: B in packed panels, rows of A in tiles.
#pragma once

constexpr int64_t kGemmK = 1024;   // depth of a block: a panel of it stays in cache while rows go by
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

// The next rows of A, where they lie in columns: their cache lines are asked for a few at a time while the ones before
// are multiplied, as many as come in meanwhile without keeping the panel's own waiting.
template <class T>
struct RowsAhead {
  const T* at = nullptr;
  int64_t column = 0, numbers = 0, done = 0, left = 0, every = 0;  // left: of k

  RowsAhead(const Matrix<T>& a, Range rows, int64_t k0, int64_t k_size, int64_t calls)
      : column(a.column), numbers(rows.end - rows.begin < kGemmRows ? rows.end - rows.begin : kGemmRows) {
    if (a.column == 1 || k_size <= 0) return;
    at = a.data + rows.begin + k0 * a.column;
    left = k_size;
    const int64_t lines = (numbers + kLineNumbers<T> - 1) / kLineNumbers<T>;
    every = (k_size * lines + calls - 1) / calls;
  }
  FASTSEQ_INLINE void ask() {
    for (int64_t i = 0; i < every && left > 0; ++i) {
      __builtin_prefetch(at + done, 0, 2);
      done += kLineNumbers<T>;
      if (done >= numbers) done = 0, at += column, --left;
    }
  }
};

// c[MR][columns] (+)= a . the first NV vectors of the panel's PV; columns may be fewer.
template <int MR, int NV, int PV, class T, bool fetches = false>
FASTSEQ_INLINE void gemm_tile(const typename Terms<T>::Left* a, int64_t a_row, int64_t a_step, const T* panel,
                              int64_t k_size, Compute<T>* c, int64_t ldc, int64_t columns, bool accumulate,
                              RowsAhead<T>& rows_ahead, const T* ahead = nullptr) {
  using V = Vec<Compute<T>>;
  constexpr int width = NV * V::size, panel_width = PV * V::size, count = Terms<T>::count;
  alignas(64) Compute<T> sums[MR * width];
  Compute<T>* to = c;
  int64_t ld = ldc;
  if (columns < width) {
    to = sums, ld = width;
    for (int i = 0; i < MR * NV; ++i)
      (accumulate ? V::load(c + i / NV * ldc + i % NV * V::size, columns - i % NV * V::size) : V(0))
          .store(sums + i * V::size);
  }
  if (accumulate)  // what is added to comes from far away, in time for the end of the first chain
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) __builtin_prefetch(to + i * ld + v * V::size, 1);
  // Between chains the sums lie side by side: rows of C a power of two apart share a few sets of the cache.
  const Compute<T>* before = accumulate ? to : nullptr;
  int64_t ld_before = ld;
  for (int64_t k = 0; k < k_size; k += kChain) {
    const bool last = k + kChain >= k_size;
    rows_ahead.ask();
    tile<MR, NV, 1, T, fetches>(a + k / count * a_step, a_row, a_step, panel + k * panel_width, panel_width * count, 0,
                                last ? k_size - k : kChain, before, ld_before, last ? to : sums, last ? ld : width,
                                fetches ? ahead + k / count * kLineNumbers<T> : nullptr);
    before = sums, ld_before = width;
  }
  if (columns < width)
    for (int i = 0; i < MR * NV; ++i)
      V::load(sums + i * V::size).store(c + i / NV * ldc + i % NV * V::size, columns - i % NV * V::size);
}

template <int MR, int NV, int PV, class T>
FASTSEQ_INLINE void gemm_tile_remainder(int64_t rows, const typename Terms<T>::Left* a, int64_t a_row, int64_t a_step,
                                        const T* panel, int64_t k_size, Compute<T>* c, int64_t ldc, int64_t columns,
                                        bool accumulate, RowsAhead<T>& rows_ahead) {
  if constexpr (MR > 0) {
    if (rows == MR)
      return gemm_tile<MR, NV, PV, T>(a, a_row, a_step, panel, k_size, c, ldc, columns, accumulate, rows_ahead);
    gemm_tile_remainder<MR - 1, NV, PV, T>(
        rows, a, a_row, a_step, panel, k_size, c, ldc, columns, accumulate, rows_ahead);
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
  constexpr int64_t line = kLineNumbers<T>, lines = width * count / line;
  const bool far = (columns.end - columns.begin) * panel_stride * static_cast<int64_t>(sizeof(T)) >= kGemmBytesFar;
  const int64_t steps = (k.size + count - 1) / count;
  const int64_t a_row = packed ? count : a.row, a_step = packed ? MR * count : count;
  const int64_t i0 = rows.begin, here = rows.end - i0;
  if (packed) pack_a<MR>(a, i0, here, k.begin, k.size, a_memory);
  const int64_t calls = (columns.end - columns.begin) * ((here + MR - 1) / MR) * ((k.size + kChain - 1) / kChain);
  RowsAhead<T> rows_ahead(a, next, k_next.begin, k_next.size, calls);
  for (int64_t j = columns.begin; j < columns.end; ++j) {
    const T* panel = panels + j * panel_stride;
    Compute<T>* to = c.data + i0 * c.row + j * c.panel;
    const int64_t valid = c.columns - j * width;
    for_vectors_of<NV, Vec<Compute<T>>>(valid, [&](auto part) __attribute__((always_inline)) {
      constexpr int vectors = decltype(part)::value;
      for (int64_t i = 0; i < here; i += MR) {
        const typename Terms<T>::Left* from = a_memory + i * steps * count;
        if constexpr (count == 1) {
          if (!packed) from = a.data + (i0 + i) * a.row + k.begin;
        }
        if (far && i / MR < lines && here - i >= MR && j + 1 < columns.end) {
          gemm_tile<MR, vectors, NV, T, true>(from, a_row, a_step, panel, k.size, to + i * c.row, c.row, valid,
                                              accumulate, rows_ahead, panel + panel_stride + i / MR * steps * line);
        } else if (here - i >= MR) {
          gemm_tile<MR, vectors, NV, T>(
              from, a_row, a_step, panel, k.size, to + i * c.row, c.row, valid, accumulate, rows_ahead);
        } else {
          gemm_tile_remainder<MR - 1, vectors, NV, T>(
              here - i, from, a_row, a_step, panel, k.size, to + i * c.row, c.row, valid, accumulate, rows_ahead);
        }
      }
    });
  }
}
