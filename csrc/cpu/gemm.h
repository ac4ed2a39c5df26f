// A matrix product of our own: C (m, n) (+)= A (m, k) B (k, n), the large products of a layer.
//
// B is packed into panels (panel.h), a block of K at a time, by all threads together; A is read where it lies when its
// rows are contiguous, else packed too, or else the two change places (gemm_turned_block). Sums along K are chains of
// kChain terms, added in order, so an element's bits do not depend on m, n or the threads.
#pragma once

// The depth of a block where C has at most so many numbers, and going over it more often costs little: half of the
// memory.
constexpr int64_t kGemmKSmall = 512;
constexpr int64_t kGemmNumbersSmall = 1 << 19;
constexpr int64_t kRowsInPlace = 8;        // for so few rows of A, B is not packed; at most kRowBlock
constexpr int64_t kGemmPart = 64;          // rows or columns that a thread has at least
constexpr int64_t kGemmToShare = 1 << 18;  // multiplications worth starting a team for
// What a thread takes of the rows at a time, at least: tiles that make up for reading all panels, and multiplications.
constexpr int64_t kGemmTilesToTake = 4;
constexpr int64_t kGemmToTake = 1 << 22;
constexpr int64_t kGemmNumbersToTake = 1 << 13;  // likewise of B to pack, as members ask one another for the next piece

constexpr int64_t kTermsToTurn = 256;  // for which A and B change places: what comes of it has to be turned back
// All strips of B go by every panel of A: one as wide as with AVX-512 makes up for that.
template <class T>
constexpr bool kTurns = PanelShape<T, 1>::width * sizeof(T) >= 256;

// How many of some threads share a product.
inline int gemm_team(int threads, int64_t m, int64_t n, int64_t k) {
  const int64_t parts = (m > n ? m : n) / kGemmPart;  // every thread has work
  return m * n * k < kGemmToShare || parts < 1 ? 1 : parts < threads ? static_cast<int>(parts) : threads;
}

// The same for so few rows of A that packing B would cost as much as the product: B is read where it lies.
template <class T>
void gemm_few_rows(int threads, int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b,
                   bool accumulate, T* c, int64_t ldc) {
  using V = Vec<T>;
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
                                 const V sum = V::load(sums + i * ld_sums + PanelShape<T, 1>::place_of_vector(u));
                                 (accumulate ? V::load(to, valid) + sum : sum).store(to, valid);
                               }
                           });
  });
}

// The same for so few columns of B, where A's columns lie in memory: C^T = B^T A^T, of few rows.
template <class T>
void gemm_few_columns(int threads, int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b,
                      bool accumulate, T* c, int64_t ldc) {
  const bool in_place = n == 1 && b.row == 1 && ldc == 1;
  if (in_place) return gemm_few_rows(threads, 1, m, k, rows_of(b.data, k), rows_of(a.data, a.column), accumulate, c, m);
  Workspace<T> b_memory, c_memory;
  T *const left = b_memory.allocate(n * k), *const sums = c_memory.allocate(n * m);
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < k; ++i) left[j * k + i] = b.data[i * b.row + j * b.column];
  gemm_few_rows(threads, n, m, k, rows_of<T>(left, k), rows_of(a.data, a.column), false, sums, m);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      T& to = c[i * ldc + j];
      to = accumulate ? to + sums[j * m + i] : sums[j * m + i];
    }
}

// All of B, as gemm_by_gates() takes it packed: GemmPanels<T, Gates>(n, k).numbers(). Its panel i of blocks * panels.
template <int Gates, class T>
void gemm_pack_panel(int64_t n, int64_t k, const Matrix<T>& b, int64_t i, T* to) {
  const GemmPanels<T, Gates> layout(n, k);
  const int64_t block = i / layout.panels, j = i % layout.panels, k0 = block * layout.depth;
  pack_b<Gates>(b, k0, k - k0 < layout.depth ? k - k0 : layout.depth, n, j,
                to + block * layout.block_numbers + j * layout.panel_stride);
}
template <int Gates, class T>
void gemm_pack(int threads, int64_t n, int64_t k, const Matrix<T>& b, T* to) {
  const GemmPanels<T, Gates> layout(n, k);
  parallel_for(threads, layout.blocks * layout.panels, [&](int64_t i) { gemm_pack_panel<Gates>(n, k, b, i, to); });
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

// One product of a team: C (+)= A (m, k) B (k, Gates * n), as gemm() and gemm_by_gates() have it.
template <class T, int Gates, bool turned = false>
class Gemm {
 public:
  using Shape = PanelShape<T, Gates>;

  Gemm(int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b, bool accumulate,
       const GemmResult<Compute<T>>& c, const T* packed_b)
      : m_(m),
        n_(n),
        k_(k),
        a_(a),
        b_(b),
        accumulate_(accumulate),
        c_(c),
        packed_b_(packed_b),
        layout_(n, k, packed_b || m * n * Gates > kGemmNumbersSmall ? kGemmK : kGemmKSmall),
        tiles_((m + kTileRows - 1) / kTileRows) {}

  // The longer side is shared.
  void run(int threads) {
    team_ = gemm_team(threads, m_, c_.columns, k_);
    a_numbers_ = packs(a_) ? (turned ? kTileRows : kGemmRows) * padded_terms<T>(layout_.depth) : 0;
    a_memory_.allocate(team_ * a_numbers_);
    if (!turned && (team_ == 1 || (tiles_ < layout_.panels && tiles_ < 8 * team_))) {
      share_panels();
    } else {
      share_rows();
    }
  }

 private:
  static constexpr int64_t kTileRows = turned ? Shape::width : kInAmx<T> ? kAmxRows : tile_rows(Shape::vectors);
  static constexpr int64_t kMost = turned ? 1 : kGemmRows / kTileRows;  // tiles that are multiplied at a time
  static constexpr int64_t kColumnsToPack = 8 * kStripColumns<T>;       // of B at a time, if turned

  // Of B packed.
  int64_t block_numbers() const {
    if (!turned) return layout_.block_numbers;
    return (n_ + kStripColumns<T> - 1) / kStripColumns<T> * kStripColumns<T> * layout_.depth;
  }
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
    const Range next = rows_of(first_of(more ? left : mine));
    const Depth k_next = more ? k : depth_from(k.begin + layout_.depth);
    auto* const memory = a_memory_.get() + member * a_numbers_;
    const bool accumulate = accumulate_ || k.begin > 0;
    if constexpr (turned) return gemm_turned_block(a_, rows_of(tiles), k, block, memory, accumulate, c_);
#if FASTSEQ_AMX
    if constexpr (kInAmx<T>)
      return amx_gemm_block<Shape::vectors>(
          a_, rows_of(tiles), k, next, k_next, block, layout_.panel_stride, panels, memory, accumulate, c_);
#endif
    gemm_block<Shape::vectors>(
        a_, rows_of(tiles), k, next, k_next, block, layout_.panel_stride, panels, memory, accumulate, c_);
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
            pack_b<Gates>(b_, k.begin, k.size, n_, j, memory + j * layout_.panel_stride);
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
    T* const memory = packed_b_ ? nullptr : b_memory_.allocate((blocks > 1 ? kBuffers : 1) * block_numbers());
    const int64_t tile_work = kTileRows * c_.columns * layout_.depth,
                  enough = (kGemmToTake + tile_work - 1) / tile_work;
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
        const T* block = packed_b_ ? packed_b_ + i * block_numbers() : memory + i % kBuffers * block_numbers();
        if (!packed_b_) {
          if (i >= kBuffers) wait_until([&] { return progress[i - kBuffers].multiplied() == tiles_; });
          pack_together(k, memory + i % kBuffers * block_numbers(), progress[i]);
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
    int64_t pieces;
    if constexpr (turned) {
      pieces = (n_ + kColumnsToPack - 1) / kColumnsToPack;
      for (int64_t i; (i = progress.take_packing()) < pieces;) {
        const int64_t j = i * kColumnsToPack, count = n_ - j < kColumnsToPack ? n_ - j : kColumnsToPack;
        pack_a<kStripColumns<T>>(columns_of(b_.data, b_.row), j, count, k.begin, k.size, to + j * k.size);
        progress.add_packed();
      }
    } else {
      const int64_t chains = (k.size + kChain - 1) / kChain, all = layout_.panels * chains;
      const int64_t worth_taking = layout_.panels * Shape::panel_numbers(k.size) / kGemmNumbersToTake;
      const int64_t wanted = worth_taking > team_ ? worth_taking : team_;
      pieces = wanted < all ? wanted : all;
      for (int64_t i; (i = progress.take_packing()) < pieces;) {
        const Range piece = part(all, i, pieces);
        for (int64_t n = piece.begin; n < piece.end; ++n) {
          const int64_t j = n / chains, from = n % chains * kChain;
          pack_b<Gates>(b_, k.begin + from, k.size - from < kChain ? k.size - from : kChain, n_, j,
                        to + j * layout_.panel_stride + from * Shape::width);
        }
        progress.add_packed();
      }
    }
    wait_until([&] { return progress.packed() == pieces; });
  }

  static constexpr int64_t kBuffers = 2;  // others may still read the block before

  int64_t m_, n_, k_;
  Matrix<T> a_, b_;
  bool accumulate_;
  GemmResult<Compute<T>> c_;
  const T* packed_b_;
  GemmPanels<T, Gates> layout_;
  int64_t tiles_, a_numbers_ = 0;
  int team_ = 1;
  Workspace<T> b_memory_;
  Workspace<typename Terms<T>::Left> a_memory_;
};

// C (m, n) (+)= A B, C of the type that is computed in. packed_b: B once more, from gemm_pack<1>, or null.
template <class T>
void gemm(int threads, int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b, bool accumulate,
          Compute<T>* c, int64_t ldc, const T* packed_b = nullptr) {
  if (m <= 0 || n <= 0) return;
  if (k <= 0) {
    if (!accumulate)
      for (int64_t i = 0; i < m; ++i) memset(c + i * ldc, 0, n * sizeof(Compute<T>));
    return;
  }
  if constexpr (Terms<T>::count == 1) {  // rows of pairs lie nowhere
    if (m <= kRowsInPlace && a.column == 1 && b.column == 1 && !packed_b)
      return gemm_few_rows(threads, m, n, k, a, b, accumulate, c, ldc);
    if (n <= kRowsInPlace && a.row == 1 && a.column > 1)
      return gemm_few_columns(threads, m, n, k, a, b, accumulate, c, ldc);
    if constexpr (kTurns<T>) {
      const bool tiles_for_all = m >= PanelShape<T, 1>::width * gemm_team(threads, m, n, k);
      if (a.row == 1 && a.column > 1 && b.column == 1 && m >= n && k >= kTermsToTurn && tiles_for_all && !packed_b)
        return Gemm<T, 1, true>(m, n, k, a, b, accumulate, {c, ldc, PanelShape<T, 1>::width, n}, nullptr).run(threads);
    }
  }
  Gemm<T, 1>(m, n, k, a, b, accumulate, {c, ldc, PanelShape<T, 1>::width, n}, packed_b).run(threads);
}

// A (m, k) W^T of w (Gates * n, k) whose rows are ldw apart, a panel's columns after another's: [panel][m][width], what
// comes of units past n being zero. packed: w once more, from gemm_pack<Gates>, or null.
template <int Gates, class T>
void gemm_by_gates(int threads, int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const T* w, int64_t ldw,
                   Compute<T>* to, const T* packed) {
  using Shape = PanelShape<T, Gates>;
  const int64_t columns = Shape::blocks(n) * Shape::width;
  if (m <= 0 || n <= 0) return;
  if (k <= 0) {
    memset(to, 0, m * columns * sizeof(Compute<T>));
    return;
  }
  Gemm<T, Gates>(m, n, k, a, columns_of(w, ldw), false, {to, Shape::width, m * Shape::width, columns}, packed)
      .run(threads);
}
