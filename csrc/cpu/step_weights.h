// The weights of the product inside a step: packed into panels, or where the caller has them.
#pragma once

// Weights of so many bytes come from so far away every step that they are asked for ahead of their use: fewer where
// caches are smaller, as they are where vectors are.
constexpr int64_t kBytesFar = FASTSEQ_VECTOR_BYTES == 32 ? 1 << 20 : 6 << 20;
// Tiles are done sooner. But of rows that are a single tile's each panel is read once, and reading is all that takes
// time: asking comes on top.
constexpr int64_t kAmxBytesFar = 1 << 20;
// Of fewer rows a part of a panel takes nearly as long as all of it: its lines come along.
constexpr int64_t kRowsToSplitPanels = 4;

// W^T in place: direct.h. W (K, n) in place: a full block of columns is a panel with another stride; the last block,
// when it is not full, is packed all the same, since a load would leave the matrix, and so is every block where a panel
// has pairs of k.
template <int Gates, class T, bool kTransposed>
class StepWeights {
 public:
  using Shape = PanelShape<T, Gates>;

  // All panels.
  static int64_t packed_numbers(int64_t n, int64_t k_size) { return Shape::blocks(n) * Shape::panel_numbers(k_size); }

  // W^T of w (Gates*n, K), or W of w (K, n); ld is the numbers between two rows of w. Panels that are `ready` need no
  // packing any more.
  void prepare(const T* w, int64_t ld, int64_t n, int64_t k_size, bool packed, const T* ready = nullptr) {
    w_ = w, ld_ = ld, n_ = n, k_ = k_size;
    blocks_ = Shape::blocks(n);
    first_packed_ = packed ? 0 : kTransposed ? blocks_ : Terms<T>::count == 1 ? n / Shape::units : 0;
    ready_ = ready != nullptr;
    panels_ = ready ? ready : memory_.allocate((blocks_ - first_packed_) * Shape::panel_numbers(k_));
  }
  int64_t blocks() const { return blocks_; }

  // Packing, in pieces that threads can share.
  int64_t panels() const { return ready_ ? 0 : blocks_ - first_packed_; }
  void pack(int64_t i) { pack(first_packed_ + i, memory_.get() + i * Shape::panel_numbers(k_)); }
  // Panel j.
  void pack(int64_t j, T* panel) const {
    if constexpr (kTransposed) {
      pack_transposed<Gates>(w_, ld_, n_, k_, j, panel);
    } else {
      pack_straight(w_, ld_, n_, k_, j, panel);
    }
  }

  static int64_t vectors(int64_t n) { return (n + Shape::V::size - 1) / Shape::V::size; }
  int64_t vectors() const { return vectors(n_); }
  // What threads share: vectors of units, or, of few rows, panels of them.
  static int64_t parts(int64_t n, int64_t rows) { return rows < kRowsToSplitPanels ? Shape::blocks(n) : vectors(n); }
  // A member's vectors.
  Range part_of(Share share, int64_t rows) const {
    const Range mine = share.of(parts(n_, rows));
    if (rows >= kRowsToSplitPanels) return mine;
    const int64_t end = mine.end * Shape::unit_vectors;
    return {mine.begin * Shape::unit_vectors, end < vectors() ? end : vectors()};
  }

  // For all vectors of units in [mine.begin, mine.end): rows of a (<= kRowBlock) times their weights, a panel or a part
  // of one at a time, or some panels side by side, handed to use(first vector, vectors, rows' sums, numbers between two
  // rows' sums); vector u has them at Shape::place_of_vector(u), the gates of a unit Shape::units apart. The pieces of
  // a's columns follow one another in K. What comes again every step is best read to and fro: a cache that does not
  // hold all of it holds the end of the last step.
  template <class Use>
  FASTSEQ_INLINE void for_each_block(const T* a, int64_t lda, int64_t rows, const KPiece* pieces, int pieces_n,
                                     Range mine, bool backwards, const Use& use) const {
    constexpr int NV = Shape::vectors, UV = Shape::unit_vectors;
    constexpr int NB = 8 / NV;  // panels side by side for a single row
    if (mine.end <= mine.begin) return;
    const Range blocks{mine.begin / UV, (mine.end + UV - 1) / UV};
    if constexpr (kInAmx<T>)
      if (blocks.begin >= first_packed_)
        return for_each_amx_block(a, lda, rows, pieces, pieces_n, mine, backwards, use);
    alignas(64) Compute<T> sums[kRowBlock * Shape::width];
    const int64_t all = blocks.end - blocks.begin;
    // Of one row, groups of full panels that lie alike, and then the others.
    const int64_t full = rows == 1 && NB > 1 && mine.begin % UV == 0 ? mine.end / UV - blocks.begin : 0;
    const int64_t in_place = first_packed_ - blocks.begin;
    const int64_t alike = in_place <= 0 ? full : kTransposed ? 0 : in_place < full ? in_place : full;
    const int64_t groups = alike / NB, pieces_of_work = groups + all - groups * NB;
    Workspace<typename Terms<T>::Left> memory;
    typename Terms<T>::Left* gathered = nullptr;
    const bool direct = kTransposed && blocks.end <= first_packed_;
    if (Terms<T>::count > 1 && rows > 1 && !direct) {
      int64_t k = 0;
      for (int p = 0; p < pieces_n; ++p) k += whole_steps<T>(pieces[p].size);
      gathered = memory.allocate(rows * k);
      if (gathered) gather_rows(a, lda, rows, pieces, pieces_n, gathered);
    }
    const bool far = all * Shape::panel_numbers(k_) * static_cast<int64_t>(sizeof(T)) >= kBytesFar;
    for (int64_t n = 0; n < pieces_of_work; ++n) {
      const int64_t i = backwards ? pieces_of_work - 1 - n : n;
      if (i < groups) {
        const int64_t j = blocks.begin + i * NB;
        const Panel panel = panel_of(j);
        panel_product<NV, NB, NV>(a, lda, 1, pieces, pieces_n, panel.data, panel.step, panel.block, sums);
        use(j * UV, NB * UV, sums, NB * Shape::width);
        continue;
      }
      const int64_t j = blocks.begin + groups * NB + i - groups;
      const int64_t begin = j * UV > mine.begin ? j * UV : mine.begin;
      const int64_t count = ((j + 1) * UV < mine.end ? (j + 1) * UV : mine.end) - begin;
      if (kTransposed && j < first_packed_) {
        const int64_t unit = begin * Shape::V::size, left = n_ - unit, most = count * Shape::V::size;
        direct_product<Gates>(
            a + pieces[0].column, lda, rows, w_, ld_, n_, pieces[0].size, unit, left < most ? left : most, sums);
      } else {
        const Panel panel = panel_of(j);
        const T* const data = panel.data + (begin - j * UV) * Shape::V::size * Terms<T>::count;
        const bool more = far && n + 1 < pieces_of_work && panel.step == Shape::step;
        const T* const next = more ? panel.data + (backwards ? -panel.block : panel.block) : nullptr;
        const auto product = [&](auto part) __attribute__((always_inline)) {
          constexpr int vectors = decltype(part)::value;
          panel_product<vectors, 1, NV>(a, lda, rows, pieces, pieces_n, data, panel.step, 0, sums, gathered, next);
        };
        if constexpr (Gates == 1) {
          for_vectors_of<NV, typename Shape::V>(count * Shape::V::size, product);
        } else {
          product(Part<NV>{});
        }
      }
      use(begin, static_cast<int>(count), sums, Shape::width);
    }
  }

 private:
#if FASTSEQ_AMX
  // Rows of a left side as AMX takes them.
  class AmxRows {
   public:
    AmxRows(const T* a, int64_t lda, int64_t rows, const KPiece* pieces, int pieces_n)
        : rows_(rows), terms_(amx_terms(amx_columns(pieces, pieces_n))) {
      const int64_t numbers = amx_gathered_numbers(rows, terms_);
      T* const gathered = numbers > kAmxNumbers ? memory_.allocate(numbers) : few_;
      amx_gather(a, lda, rows, pieces, pieces_n, gathered);
      left_ = AmxLeft::gathered(gathered, amx_block_rows(rows), terms_);
      Amx::configure(amx_block_rows(rows));
    }
    // Their products with `count` vectors of a panel; `next` is asked for meanwhile.
    void multiply(const T* panel, int64_t count, const T* next, float* sums) const {
      const auto product = [&](auto part) __attribute__((always_inline)) {
        constexpr int vectors = decltype(part)::value;
        if (next) {
          amx_product<vectors, true>(left_, rows_, terms_, panel, Shape::step, sums, Shape::width, false, next);
        } else {
          amx_product<vectors, false>(left_, rows_, terms_, panel, Shape::step, sums, Shape::width, false);
        }
      };
      if constexpr (Gates == 1) {
        for_vectors_of<Shape::vectors, typename Shape::V>(count * Shape::V::size, product);
      } else {
        product(Part<Shape::vectors>{});
      }
    }

   private:
    int64_t rows_, terms_;
    AmxLeft left_;
    Workspace<T> memory_;
    alignas(64) T few_[kAmxNumbers];
  };

  // For each panel, or part of one, of some vectors: use(panel, vectors before it, first vector, vectors, next panel).
  template <class Use>
  static FASTSEQ_INLINE void for_each_part(Range mine, bool backwards, const Use& use) {
    constexpr int64_t UV = Shape::unit_vectors;
    const Range blocks{mine.begin / UV, (mine.end + UV - 1) / UV};
    for (int64_t n = blocks.begin; n < blocks.end; ++n) {
      const int64_t j = backwards ? blocks.end - 1 - (n - blocks.begin) : n;
      const int64_t begin = j * UV > mine.begin ? j * UV : mine.begin;
      const int64_t count = ((j + 1) * UV < mine.end ? (j + 1) * UV : mine.end) - begin;
      use(j, begin - j * UV, begin, count, n + 1 == blocks.end ? -1 : backwards ? j - 1 : j + 1);
    }
  }

  template <class Use>
  void for_each_amx_block(const T* a, int64_t lda, int64_t rows, const KPiece* pieces, int pieces_n, Range mine,
                          bool backwards, const Use& use) const {
    const AmxRows left(a, lda, rows, pieces, pieces_n);
    alignas(64) float sums[kRowBlock * Shape::width];
    const int64_t panels = (mine.end - mine.begin + Shape::unit_vectors - 1) / Shape::unit_vectors;
    const int64_t bytes = panels * Shape::panel_numbers(k_) * static_cast<int64_t>(sizeof(T));
    const bool far = rows > kAmxRows && bytes >= kAmxBytesFar;
    for_each_part(mine, backwards, [&](int64_t j, int64_t skipped, int64_t first, int64_t count, int64_t next) {
      left.multiply(
          panel_of(j).data + skipped * kAmxTerms, count, far && next >= 0 ? panel_of(next).data : nullptr, sums);
      use(first, static_cast<int>(count), sums, Shape::width);
    });
  }

 public:
  // Two products at a time, of weights that lie alike: use(first vector, vectors, sums, the other's sums, numbers
  // between two rows' sums).
  template <class Use>
  void for_each_amx_block(const T* a, int64_t lda, const StepWeights& other, const T* other_a, int64_t other_lda,
                          int64_t rows, Range mine, bool backwards, const Use& use) const {
    const KPiece k[1] = {{0, a ? k_ : 0}}, other_k[1] = {{0, other.k_}};
    const AmxRows left(a, lda, rows, k, 1), other_left(other_a, other_lda, rows, other_k, 1);
    alignas(64) float sums[kRowBlock * Shape::width], other_sums[kRowBlock * Shape::width];
    for_each_part(mine, backwards, [&](int64_t j, int64_t skipped, int64_t first, int64_t count, int64_t) {
      left.multiply(panel_of(j).data + skipped * kAmxTerms, count, nullptr, sums);
      other_left.multiply(other.panel_of(j).data + skipped * kAmxTerms, count, nullptr, other_sums);
      use(first, static_cast<int>(count), sums, other_sums, Shape::width);
    });
  }

 private:
#endif
  struct Panel {
    const T* data;
    int64_t step, block;  // numbers from one step, and from one block, to the next
  };
  Panel panel_of(int64_t j) const {
    if (j < first_packed_) return {w_ + j * Shape::width, ld_, Shape::width};
    return {panels_ + (j - first_packed_) * Shape::panel_numbers(k_), Shape::step, Shape::panel_numbers(k_)};
  }

  const T* w_ = nullptr;
  int64_t ld_ = 0, n_ = 0, k_ = 0, blocks_ = 0, first_packed_ = 0;
  bool ready_ = false;
  const T* panels_ = nullptr;
  Workspace<T> memory_;
};
