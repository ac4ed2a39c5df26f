// A matrix product of our own: C (m, n) (+)= A (m, k) B (k, n), the large products of a layer.
//
// B is packed into panels (panel.h), a block of K at a time, by all threads together; A is read where it lies when its
// rows are contiguous, else packed too. Sums along K are chains of kChain terms, added in order, so an element's bits
// do not depend on m, n or the threads.
#pragma once

constexpr int64_t kGemmK = 1024;  // depth of a block: a panel of it stays in cache while rows go by
// The same where C has at most so many numbers, and going over it more often costs little: half of the memory.
constexpr int64_t kGemmKSmall = 512;
constexpr int64_t kGemmNumbersSmall = 1 << 19;
constexpr int64_t kGemmRows = 96;          // rows of A that a thread takes against all panels; a multiple of every tile
constexpr int64_t kRowsInPlace = 8;        // for so few rows of A, B is not packed; at most kRowBlock
constexpr int64_t kGemmPart = 64;          // rows or columns that a thread has at least
constexpr int64_t kGemmToShare = 1 << 18;  // multiplications worth starting a team for
// What a thread takes of the rows at a time, at least: tiles that make up for reading all panels, and multiplications.
constexpr int64_t kGemmTilesToTake = 4;
constexpr int64_t kGemmToTake = 1 << 22;
constexpr int64_t kGemmNumbersToTake = 1 << 13;  // likewise of B to pack, as members ask one another for the next piece
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

// How B (k, n) is packed: blocks of K, each of all panels, which stay as far apart in a shorter last one, as threads
// may be a block apart.
template <class T>
struct GemmPanels {
  using Shape = PanelShape<T, 1>;
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
template <class T>
void pack_b(const Matrix<T>& b, int64_t k0, int64_t k_size, int64_t n, int64_t j, T* panel) {
  if (b.column == 1) {
    pack_straight(b.data + k0 * b.row, b.row, n, k_size, j, panel);
  } else {
    pack_transposed<1>(b.data + k0, b.column, n, k_size, j, panel);
  }
}

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

// At most kGemmRows rows of C against some panels of one block of K. Rows `next` of block k_next of A come after them.
template <class T>
void gemm_block(const Matrix<T>& a, Range rows, Depth k, Range next, Depth k_next, const T* panels,
                int64_t panel_stride, Range columns, int64_t n, typename Terms<T>::Left* a_memory, bool accumulate,
                Compute<T>* c, int64_t ldc) {
  using Shape = PanelShape<T, 1>;
  constexpr int NV = Shape::vectors, MR = tile_rows(NV), count = Terms<T>::count;
  const bool packed = packs(a);
  constexpr int64_t line = kLineNumbers<T>, lines = Shape::width * count / line;
  const bool far = (columns.end - columns.begin) * panel_stride * static_cast<int64_t>(sizeof(T)) >= kGemmBytesFar;
  const int64_t steps = (k.size + count - 1) / count;
  const int64_t a_row = packed ? count : a.row, a_step = packed ? MR * count : count;
  const int64_t i0 = rows.begin, here = rows.end - i0;
  if (packed) pack_a<MR>(a, i0, here, k.begin, k.size, a_memory);
  const int64_t calls = (columns.end - columns.begin) * ((here + MR - 1) / MR) * ((k.size + kChain - 1) / kChain);
  RowsAhead<T> rows_ahead(a, next, k_next.begin, k_next.size, calls);
  for (int64_t j = columns.begin; j < columns.end; ++j) {
    const T* panel = panels + j * panel_stride;
    Compute<T>* to = c + i0 * ldc + j * Shape::width;
    const int64_t valid = n - j * Shape::width;
    for_vectors_of<NV, Vec<Compute<T>>>(valid, [&](auto part) __attribute__((always_inline)) {
      constexpr int vectors = decltype(part)::value;
      for (int64_t i = 0; i < here; i += MR) {
        const typename Terms<T>::Left* from = a_memory + i * steps * count;
        if constexpr (count == 1) {
          if (!packed) from = a.data + (i0 + i) * a.row + k.begin;
        }
        if (far && i / MR < lines && here - i >= MR && j + 1 < columns.end) {
          gemm_tile<MR, vectors, NV, T, true>(from, a_row, a_step, panel, k.size, to + i * ldc, ldc, valid, accumulate,
                                              rows_ahead, panel + panel_stride + i / MR * steps * line);
        } else if (here - i >= MR) {
          gemm_tile<MR, vectors, NV, T>(
              from, a_row, a_step, panel, k.size, to + i * ldc, ldc, valid, accumulate, rows_ahead);
        } else {
          gemm_tile_remainder<MR - 1, vectors, NV, T>(
              here - i, from, a_row, a_step, panel, k.size, to + i * ldc, ldc, valid, accumulate, rows_ahead);
        }
      }
    });
  }
}

// The same for so few rows of A that packing B would cost as much as the product: B is read where it lies.
template <class T>
void gemm_few_rows(int threads, int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b,
                   bool accumulate, T* c, int64_t ldc) {
  using V = Vec<T>;
  using Shape = PanelShape<T, 1>;
  StepWeights<1, T, false> weights;
  weights.prepare(b.data, b.row, n, k, false);
  if (weights.panels()) weights.pack(0);
  const KPiece all[1] = {{0, k}};
  parallel(m * n * k >= kGemmToShare ? threads : 1, [&](int member, int team) {
    weights.for_each_block(a.data, a.row, m, all, 1, weights.part_of({member, team}, m), false,
                           [&](int64_t first, int vectors, const T* sums, int64_t ld_sums) {
                             for (int64_t i = 0; i < m; ++i)
                               for (int u = 0; u < vectors; ++u) {
                                 const int64_t j = (first + u) * V::size, valid = n - j;
                                 T* to = c + i * ldc + j;
                                 const V sum = V::load(sums + i * ld_sums + u * V::size);
                                 (accumulate ? V::load(to, valid) + sum : sum).store(to, valid);
                               }
                           });
  });
}

// All of B, as gemm() takes it packed: GemmPanels<T>(n, k).numbers().
template <class T>
void gemm_pack(int threads, int64_t n, int64_t k, const Matrix<T>& b, T* to) {
  const GemmPanels<T> layout(n, k);
  parallel_for(threads, layout.blocks * layout.panels, [&](int64_t i) {
    const int64_t block = i / layout.panels, j = i % layout.panels, k0 = block * layout.depth;
    pack_b(b, k0, k - k0 < layout.depth ? k - k0 : layout.depth, n, j,
           to + block * layout.block_numbers + j * layout.panel_stride);
  });
}

// How far a team is with a block of K.
class alignas(64) GemmProgress {
 public:
  int64_t take_packing() { return __atomic_fetch_add(&packing_, 1, __ATOMIC_RELAXED); }
  void add_packed() { __atomic_fetch_add(&packed_, 1, __ATOMIC_RELEASE); }
  int64_t packed() const { return __atomic_load_n(&packed_, __ATOMIC_ACQUIRE); }
  void add_multiplied(int64_t tiles) { __atomic_fetch_add(&multiplied_, tiles, __ATOMIC_RELEASE); }
  int64_t multiplied() const { return __atomic_load_n(&multiplied_, __ATOMIC_ACQUIRE); }

 private:
  int64_t packing_ = 0, packed_ = 0, multiplied_ = 0;
};

// One product of a team: C (m, n) (+)= A B, as gemm() has it.
template <class T>
class Gemm {
 public:
  using Shape = PanelShape<T, 1>;

  Gemm(int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b, bool accumulate, Compute<T>* c,
       int64_t ldc, const T* packed_b)
      : m_(m),
        n_(n),
        k_(k),
        a_(a),
        b_(b),
        accumulate_(accumulate),
        c_(c),
        ldc_(ldc),
        packed_b_(packed_b),
        layout_(n, k, packed_b || m * n > kGemmNumbersSmall ? kGemmK : kGemmKSmall),
        tiles_((m + kTileRows - 1) / kTileRows) {}

  // The longer side is shared.
  void run(int threads) {
    const int64_t parts = (m_ > n_ ? m_ : n_) / kGemmPart;  // every thread has work
    team_ = m_ * n_ * k_ < kGemmToShare || parts < 1 ? 1 : parts < threads ? static_cast<int>(parts) : threads;
    a_numbers_ = packs(a_) ? kGemmRows * (layout_.depth + layout_.depth % Terms<T>::count) : 0;
    a_memory_.allocate(team_ * a_numbers_);
    if (team_ == 1 || (tiles_ < layout_.panels && tiles_ < 8 * team_)) {
      share_panels();
    } else {
      share_rows();
    }
  }

 private:
  static constexpr int kTileRows = tile_rows(Shape::vectors);
  static constexpr int64_t kMost = kGemmRows / kTileRows;  // tiles that are multiplied at a time

  Depth depth_from(int64_t k0) const { return {k0, k_ - k0 < layout_.depth ? (k0 < k_ ? k_ - k0 : 0) : layout_.depth}; }
  Range rows_of(Range tiles) const {
    return {tiles.begin * kTileRows, tiles.end * kTileRows < m_ ? tiles.end * kTileRows : m_};
  }
  static Range first_of(Range tiles) {
    return {tiles.begin, tiles.end - tiles.begin < kMost ? tiles.end : tiles.begin + kMost};
  }
  // Some tiles in a block of K. After them come the first ones of `left` or, when nothing is left, those of `mine` in
  // the next block.
  void multiply(int member, Range tiles, Depth k, Range left, Range mine, Range panels, const T* block) {
    const bool more = left.begin < left.end;
    gemm_block(a_, rows_of(tiles), k, rows_of(first_of(more ? left : mine)),
               more ? k : depth_from(k.begin + layout_.depth), block, layout_.panel_stride, panels, n_,
               a_memory_.get() + member * a_numbers_, accumulate_ || k.begin > 0, c_, ldc_);
  }

  // Each member has panels of his own.
  void share_panels() {
    T* const memory = packed_b_ ? nullptr : b_memory_.allocate(layout_.block_numbers);
    parallel(team_, [&](int member, int team) {
      const Range panels = part(layout_.panels, member, team), all{0, tiles_};
      for (int64_t i = 0; i < layout_.blocks; ++i) {
        const Depth k = depth_from(i * layout_.depth);
        const T* const block = packed_b_ ? packed_b_ + i * layout_.block_numbers : memory;
        if (!packed_b_)
          for (int64_t j = panels.begin; j < panels.end; ++j)
            pack_b(b_, k.begin, k.size, n_, j, memory + j * layout_.panel_stride);
        for (Range left = all; left.begin < left.end;) {
          const Range tiles = first_of(left);
          left.begin = tiles.end;
          multiply(member, tiles, k, left, all, panels, block);
        }
      }
    });
  }

  // The members pack a block of panels together, a chain at a time, and take tiles as they get on. Nobody waits for one
  // who has not come yet: what he has not begun is done by the others.
  void share_rows() {
    const int64_t blocks = layout_.blocks;
    T* const memory = packed_b_ ? nullptr : b_memory_.allocate((blocks > 1 ? kBuffers : 1) * layout_.block_numbers);
    const int64_t tile_work = kTileRows * n_ * layout_.depth, enough = (kGemmToTake + tile_work - 1) / tile_work;
    const int64_t least = enough < kGemmTilesToTake ? kGemmTilesToTake : enough < kMost ? enough : kMost;
    constexpr int64_t few = 16;  // are on the stack: a small product would feel the allocation
    GemmProgress few_progress[few];
    Backlog few_backlogs[few];
    Workspace<GemmProgress> progress_memory;
    Workspace<Backlog> backlog_memory;
    const bool many = blocks * team_ > few;
    GemmProgress* const progress = many ? progress_memory.zeros(blocks) : few_progress;
    Backlog* const backlogs = many ? backlog_memory.allocate(blocks * team_) : few_backlogs;
    for (int64_t i = 0; i < blocks * team_; ++i) backlogs[i].deal(part(tiles_, i % team_, team_));

    parallel(team_, [&](int member, int) {
      for (int64_t i = 0; i < blocks; ++i) {
        const Depth k = depth_from(i * layout_.depth);
        const T* block =
            packed_b_ ? packed_b_ + i * layout_.block_numbers : memory + i % kBuffers * layout_.block_numbers;
        if (!packed_b_) {
          if (i >= kBuffers) wait_until([&] { return progress[i - kBuffers].multiplied() == tiles_; });
          pack_together(k, memory + i % kBuffers * layout_.block_numbers, progress[i]);
        }
        // The order of the sums.
        if (i > 0) wait_until([&] { return progress[i - 1].multiplied() == tiles_; });
        Backlog* const all = backlogs + i * team_;
        for (;;) {
          const Range tiles = take_piece(all, Share{member, team_}, kMost, least);
          if (tiles.end <= tiles.begin) break;
          multiply(member, tiles, k, all[member].left(), part(tiles_, member, team_), {0, layout_.panels}, block);
          progress[i].add_multiplied(tiles.end - tiles.begin);
        }
      }
    });
  }
  void pack_together(Depth k, T* to, GemmProgress& progress) const {
    const int64_t chains = (k.size + kChain - 1) / kChain, all = layout_.panels * chains;
    const int64_t worth_taking = layout_.panels * Shape::panel_numbers(k.size) / kGemmNumbersToTake;
    const int64_t wanted = worth_taking > team_ ? worth_taking : team_, pieces = wanted < all ? wanted : all;
    for (int64_t i; (i = progress.take_packing()) < pieces;) {
      const Range piece = part(all, i, pieces);
      for (int64_t n = piece.begin; n < piece.end; ++n) {
        const int64_t j = n / chains, from = n % chains * kChain;
        pack_b(b_, k.begin + from, k.size - from < kChain ? k.size - from : kChain, n_, j,
               to + j * layout_.panel_stride + from * Shape::width);
      }
      progress.add_packed();
    }
    wait_until([&] { return progress.packed() == pieces; });
  }

  static constexpr int64_t kBuffers = 2;  // others may still read the block before

  int64_t m_, n_, k_;
  Matrix<T> a_, b_;
  bool accumulate_;
  Compute<T>* c_;
  int64_t ldc_;
  const T* packed_b_;
  GemmPanels<T> layout_;
  int64_t tiles_, a_numbers_ = 0;
  int team_ = 1;
  Workspace<T> b_memory_;
  Workspace<typename Terms<T>::Left> a_memory_;
};

// C (m, n) (+)= A B, C of the type that is computed in. packed_b: B once more, from gemm_pack, or null.
template <class T>
void gemm(int threads, int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b, bool accumulate,
          Compute<T>* c, int64_t ldc, const T* packed_b = nullptr) {
  if (m <= 0 || n <= 0) return;
  if (k <= 0) {
    if (!accumulate)
      for (int64_t i = 0; i < m; ++i) memset(c + i * ldc, 0, n * sizeof(Compute<T>));
    return;
  }
  if constexpr (Terms<T>::count == 1)  // rows of pairs lie nowhere
    if (m <= kRowsInPlace && a.column == 1 && b.column == 1)
      return gemm_few_rows(threads, m, n, k, a, b, accumulate, c, ldc);
  Gemm<T>(m, n, k, a, b, accumulate, c, ldc, packed_b).run(threads);
}
