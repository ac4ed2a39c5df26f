// Attention, backward: the probabilities once more from the log of each row's sum (Dao et al., "FlashAttention", 2022),
//
//   P = exp(S - lse),  dV = P^T dO,  dP = dO V^T,  dS = P o (dP - delta),  delta = rows of dO o O, less dlse
//   dQ = scale dS K,   dK = scale dS^T Q,  dmask = dS
//
// With dropout M, 0 or 1 / (1 - p): dV = (P o M)^T dO, dP = M o dO V^T. With a softcap, dQ and dK take dS o (1 -
// tanh^2).
//
// A block of keys stays with its K and V, and their gradients, while the queries that see it go by. Nobody else adds
// to them. dQ is added up in the order of the blocks; where the keys of a head are shared among threads, in sums of
// each part, which are added in order at the end, and the parts depend on the sizes alone: so do the bits.
#pragma once

template <class F>
constexpr int64_t kGradientQueries = kInAmx<F> ? 64 : 48;  // whole tiles, and whole tiles of terms
constexpr int64_t kGradientKeys = 256;
static_assert(48 % kTileRows == 0 && 64 % kAmxTerms == 0 && kGradientKeys % kAmxTerms == 0, "blocks have whole tiles");

// P and dS of one block of queries and keys.
template <class T>
class ScoreGradients {
 public:
  using A = Compute<T>;
  using V = Vec<A>;
  using F = Factor<T>;
  using Shape = PanelShape<F, 1>;
  static constexpr int count = Terms<F>::count;
  static constexpr int64_t kQueries = kGradientQueries<F>;

  // Of the product of queries and keys, times the scale, or of the score that the softmax sees.
  enum class Of { product, score };
  ScoreGradients(const AttentionBackward<T, A>& p, Of of)
      : factor_(static_cast<A>(of == Of::product ? p.scale : 1)),
        through_cap_(of == Of::product && p.softcap != 0),
        joins_rows_(of == Of::product && count == 2) {
    const int64_t panels = Shape::blocks(kGradientKeys);
    ld_ = score_stride<A>(kGradientKeys);
    k_panels_.allocate(panels * Shape::panel_numbers(p.size));
    v_panels_.allocate(panels * Shape::panel_numbers(p.value_size));
    probabilities_.allocate(kQueries * ld_), gradients_.allocate(kQueries * ld_);
    const int64_t most = p.size > p.value_size ? p.size : p.value_size;
    k_packed_.allocate(kGradientKeys * whole_vectors<T>(p.size));
    q_packed_.allocate(kQueries * whole_vectors<T>(p.size));
    d_out_packed_.allocate(kQueries * whole_vectors<T>(p.value_size));
    if (FactorRows<T>::copies(p.size) || FactorRows<T>::copies(p.value_size))
      memory_.allocate(kQueries * padded_terms<F>(most));
    if (sizeof(T) != sizeof(F)) scratch_.allocate(Shape::panel_numbers(most));
    if (joins_rows_) gradient_rows_.allocate(kQueries * ld_);
    if (through_cap_) cap_derivative_.allocate(kGradientKeys);
    if (p.dropout.threshold) multipliers_.allocate(kGradientKeys);
  }

  // Of a batch entry, which stays where it is.
  void take_keys(const AttentionBackward<T, A>& p, int64_t kv_head, int64_t j0, int64_t keys) {
    p_ = &p, visible_ = {p.band, p.keys};
    j0_ = j0, keys_ = keys;
    const T *const k = p.k.at(kv_head, j0), *const v = p.v.at(kv_head, j0);
    for (int64_t j = 0; j < Shape::blocks(keys); ++j) {
      pack_scores_panel(k, p_->k.row, keys, p_->size, j, static_cast<A>(score_factor(p)), scratch_.get(),
                        k_panels_.get() + j * Shape::panel_numbers(p_->size));
      pack_scores_panel(v, p_->v.row, keys, p_->value_size, j, A(1), scratch_.get(),
                        v_panels_.get() + j * Shape::panel_numbers(p_->value_size));
    }
    pack_rows(k, p_->k.row, keys, p_->size, k_packed_.get());
  }

  // Queries [i0, i0 + rows) against those keys. delta: of these rows.
  template <class Ahead = NothingAhead>
  void compute(int64_t n, int64_t i0, int64_t rows, const A* delta, Ahead&& ahead = {}) {
    i0_ = i0, rows_ = rows;
    const auto product = [&](const Heads<const T>& from, int64_t size, const F* panels, F* packed, A* to) {
      const T* const at = from.at(n, i0);
      const FactorRows<T> left(at, from.row, rows, size, memory_.get());
      score_product(
          left.data, left.row, rows, size, panels, keys_, to, ld_,
          [&](int64_t m0, int64_t) { return keys_of_tile(m0); }, ahead);
#if FASTSEQ_AMX
      if constexpr (kInAmx<F>) return amx_gather_columns(at, from.row, size, rows, kAmxRows, packed);
#endif
      pack_rows(at, from.row, rows, size, packed);
    };
    product(p_->q, p_->size, k_panels_.get(), q_packed_.get(), probabilities_.get());
    product(p_->d_out, p_->value_size, v_panels_.get(), d_out_packed_.get(), gradients_.get());
    const A* const lse = p_->lse.of(n) + i0;
    for (int64_t r = 0; r < rows; ++r) {
      const Range tile = keys_of_tile(r);
      row(n, r, lse[r], delta[r], keys_of(r, r + 1), tile);
      if (joins_rows_ && (r % 2 == 1 || r + 1 == rows)) join_rows(r / 2 * 2, rows, read_of(tile));
    }
    if (joins_rows_ && kInAmx<F>) {  // terms past the last query
      const Range read = read_of(keys_of_tile(0));
      for (int64_t r = whole_steps<F>(rows); r < padded_terms<F>(rows); r += 2)
        for (int64_t j = read.begin; j < read.end; ++j)
          probabilities_.get()[r * ld_ + j] = gradients_.get()[r * ld_ + j] = 0;
    }
  }

  // Relative to the blocks: the keys that rows see, and the queries that see keys.
  Range keys_of(int64_t m0, int64_t m1) const { return visible_.in_block(i0_ + m0, i0_ + m1, j0_, keys_); }
  // What is computed of row m: of AMX, the same for the whole block.
  Range keys_of_tile(int64_t m) const {
    if (kInAmx<F>) return keys_of(0, rows_);
    const int64_t m0 = m / kTileRows * kTileRows, m1 = m0 + kTileRows;
    return keys_of(m0, m1 < rows_ ? m1 : rows_);
  }
  Range queries_of(int64_t c0, int64_t c1) const {
    const int64_t begin = j0_ + c0 - p_->band.high - i0_, end = j0_ + c1 - p_->band.low - i0_;
    return {begin < 0 ? 0 : begin, end < rows_ ? end : rows_};
  }

  // dS, where it is of the score, else, as P, the left sides' pairs.
  const A* probabilities() const { return probabilities_.get(); }
  const A* gradients() const { return gradients_.get(); }
  int64_t ld() const { return ld_; }

  // The left sides of products, where it is of the product: P after dropout and dS, transposed, and dS.
  struct Left {
    const F* data;
    int64_t row, step;
  };
  Left probabilities_transposed() const { return transposed(probabilities_.get()); }
  Left gradients_transposed() const { return transposed(gradients_.get()); }
  Left gradient_rows() const {
    if constexpr (count == 2) {
      return {gradient_rows_.get(), ld_, count};
    } else {
      return {gradients_.get(), ld_, 1};
    }
  }

  // Packed rows; of queries and d_out, for AMX, their columns gathered.
  const F* keys() const { return k_packed_.get(); }
  const F* queries() const { return q_packed_.get(); }
  const F* d_out() const { return d_out_packed_.get(); }

 private:
  Left transposed(const A* rows) const {
    constexpr int64_t each = sizeof(A) / sizeof(F);
    return {reinterpret_cast<const F*>(rows), count, count * each * ld_};
  }

  // What products read of the rows that see these keys: of keys, too, whole tiles, and whole steps.
  Range read_of(Range tile) const {
#if FASTSEQ_AMX
    if constexpr (kInAmx<F>) return amx_whole_terms(tile);
#endif
    const int64_t last = (tile.end + kTileRows - 1) / kTileRows * kTileRows;
    return {tile.begin / kTileRows * kTileRows, last < keys_ ? last : whole_steps<F>(keys_)};
  }

  // Of two rows, P and dS become pairs in the place of the first, and dS is copied as it is.
  void join_rows(int64_t r, int64_t rows, Range read) {
    if constexpr (count == 2) {
      A *const s = probabilities_.get() + r * ld_, *const d = gradients_.get() + r * ld_;
      F* const copies = gradient_rows_.get() + r * ld_;
      for (int64_t j = read.begin / V::size * V::size; j < read.end; j += V::size) {
        const bool two = r + 1 < rows;
        const V d0 = V::load(d + j), d1 = two ? V::load(d + ld_ + j) : V(0);
        store_rounded(d0, copies + j);
        store_rounded(d1, copies + ld_ + j);
        pairs_of(d0, d1).store(d + j);
        pairs_of(V::load(s + j), two ? V::load(s + ld_ + j) : V(0)).store(s + j);
      }
    } else {
      (void)r, (void)rows, (void)read;
    }
  }

  void row(int64_t n, int64_t r, A lse, A delta, Range mine, Range tile) {
    constexpr int64_t size = V::size;
    A *const s = probabilities_.get() + r * ld_, *const d = gradients_.get() + r * ld_;
    const auto [first, last] = read_of(tile);
    int64_t begin = first, end = first;
    if (mine.begin < mine.end && lse != -static_cast<A>(__builtin_inf())) {
      const Range vectors = whole_vectors_of<A>(mine);
      begin = vectors.begin, end = vectors.end;
      if (!kScaledKeys<T>) scale_row(static_cast<A>(score_factor(*p_)), vectors, s);
      finish_scores(*p_, n, i0_ + r, j0_, mine, vectors, s, cap_derivative_.get());
      if (multipliers_.get()) {
        dropout_multipliers(*p_, n, i0_ + r, j0_, mine, multipliers_.get());
        multiply_row(multipliers_.get(), vectors, d);
      }
      const V shift(lse * static_cast<A>(kLog2e)), less(delta), factor(factor_);
      for (int64_t j = begin; j < end; j += size) {
        const V probability = exp2_of_score(V::load(s + j) - shift);
        probability.store(s + j);
        (probability * (V::load(d + j) - less) * factor).store(d + j);
      }
      if (cap_derivative_.get()) multiply_row(cap_derivative_.get(), vectors, d);
      if (multipliers_.get()) multiply_row(multipliers_.get(), vectors, s);
      // What is hidden got a zero times whatever was there.
      for (int64_t j = begin; j < mine.begin; ++j) d[j] = 0;
      for (int64_t j = mine.end; j < end; ++j) d[j] = 0;
    }
    for (int64_t j = first; j < begin; ++j) s[j] = d[j] = 0;
    for (int64_t j = end > first ? end : first; j < last; ++j) s[j] = d[j] = 0;
  }

  const AttentionBackward<T, A>* p_ = nullptr;
  VisibleKeys visible_{};
  A factor_;
  bool through_cap_, joins_rows_;
  int64_t ld_ = 0, j0_ = 0, keys_ = 0, i0_ = 0, rows_ = 0;
  Workspace<F> k_panels_, v_panels_, k_packed_, q_packed_, d_out_packed_, memory_, gradient_rows_;
  Workspace<A> probabilities_, gradients_, scratch_, cap_derivative_, multipliers_;
};

// delta of all queries of a head.
template <class T>
void attention_delta(const AttentionBackward<T, Compute<T>>& p, int64_t n, Compute<T>* delta) {
  using V = Vec<Compute<T>>;
  for (int64_t i = 0; i < p.queries; ++i) {
    const T *const out = p.out.at(n, i), *const d_out = p.d_out.at(n, i);
    V sum(0);
    for (int64_t j = 0; j < p.value_size; j += V::size)
      sum = fma(V::load(out + j, p.value_size - j), V::load(d_out + j, p.value_size - j), sum);
    delta[i] = sum_of_lanes(sum);
    if (p.d_lse.data) delta[i] -= p.d_lse.of(n)[i];
  }
}

// Into how many parts, each with a dQ of its own, the keys of a head are cut: few heads leave threads without work.
// Where heads are fewer than the most parts, parts may be smaller than a block of keys: that costs a thread a
// twentieth, and gives a second one something to do.
constexpr int64_t kPartKeys = kDropoutKeys;
static_assert(kPartKeys % kAmxTerms == 0, "parts begin where dropout's groups and whole tiles do");
constexpr int64_t kMostParts = 4;
inline int64_t gradient_parts(int64_t groups, int64_t keys) {
  constexpr int64_t kGroupsEnough = 16;
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t large = least(least((kGroupsEnough + groups - 1) / groups, kMostParts), keys / (2 * kGradientKeys));
  const int64_t small = least((kMostParts + groups - 1) / groups, keys / kPartKeys);
  return large > small ? large : small > 1 ? small : 1;
}

template <class T>
class AttentionBackwardWorker {
 public:
  using A = Compute<T>;
  using V = Vec<A>;
  using F = Factor<T>;
  static constexpr int64_t kQueries = kGradientQueries<F>;

  explicit AttentionBackwardWorker(const AttentionBackward<T, A>& p) : scores_(p, ScoreGradients<T>::Of::product) {
    columns_ = whole_vectors<T>(p.size), value_columns_ = whole_vectors<T>(p.value_size);
    delta_.allocate(p.heads / p.kv_heads * p.queries);
    dk_.allocate(kGradientKeys * columns_), dv_.allocate(kGradientKeys * value_columns_);
  }

  // Of a batch entry, the keys and values that are next.
  void ask_for(const AttentionBackward<T, A>& p, int64_t kv_head) {
    const int64_t first = kv_head * (p.heads / p.kv_heads);
    ahead_ = {p, kv_head, 2 * p.keys + p.size};
    ahead_.add(p.out, first, p.queries, p.value_size);
    ahead_.add(p.d_out, first, p.queries, p.value_size);
    ahead_.add(p.q, first, p.queries, p.size);
  }

  // Keys [j0, j1) of a batch entry. dq, of its heads, is added to.
  void run(const AttentionBackward<T, A>& p, int64_t kv_head, int64_t j0, int64_t j1, const Heads<A>& dq) {
    p_ = &p;
    const int64_t group = p.heads / p.kv_heads, first = kv_head * group;
    for (int64_t n = 0; n < group; ++n) attention_delta(p, first + n, delta_.get() + n * p.queries);
    for (int64_t j = j0; j < j1; j += kGradientKeys) {
      const int64_t keys = j1 - j < kGradientKeys ? j1 - j : kGradientKeys;
      memset(dk_.get(), 0, (kInAmx<F> ? kGradientKeys : keys) * columns_ * sizeof(A));
      memset(dv_.get(), 0, (kInAmx<F> ? kGradientKeys : keys) * value_columns_ * sizeof(A));
      scores_.take_keys(p, kv_head, j, keys);
      for (int64_t n = 0; n < group; ++n)
        for (int64_t i = 0; i < p.queries; i += kQueries)
          block(first + n, i, j, keys, delta_.get() + n * p.queries + i, dq.at(first + n, i), dq.row);
      store(dk_.get(), columns_, p.dk, kv_head, j, keys, p.size);
      store(dv_.get(), value_columns_, p.dv, kv_head, j, keys, p.value_size);
    }
  }

 private:
  void block(int64_t n, int64_t i, int64_t j, int64_t keys, const A* delta, A* dq, int64_t dq_row) {
    const int64_t rows = p_->queries - i < kQueries ? p_->queries - i : kQueries;
    const VisibleKeys visible{p_->band, p_->keys};
    const Range seen = visible.in_block(i, i + rows, j, keys);
    if (seen.begin >= seen.end) return;
    scores_.compute(n, i, rows, delta, ahead_);
    const auto of_rows = [&](int64_t m0, int64_t m1) { return scores_.keys_of(m0, m1); };
#if FASTSEQ_AMX
    if constexpr (kInAmx<F>) {
      const Range columns = amx_whole_terms(seen);
      const int64_t terms = amx_terms(rows), ld = scores_.ld();
      amx_accumulate_pairs(
          scores_.d_out(), value_columns_, terms, scores_.probabilities(), ld, columns, dv_.get(), kGradientKeys);
      amx_accumulate_pairs(
          scores_.queries(), columns_, terms, scores_.gradients(), ld, columns, dk_.get(), kGradientKeys);
      return amx_accumulate_product(
          scores_.gradient_rows().data, ld, rows, keys, scores_.keys(), columns_, dq, dq_row, of_rows);
    }
#endif
    const auto queries = [&](int64_t c0, int64_t c1) { return scores_.queries_of(c0, c1); };
    const auto p = scores_.probabilities_transposed(), ds = scores_.gradients_transposed(),
               rows_of_ds = scores_.gradient_rows();
    accumulate_product(
        p.data, p.row, p.step, keys, rows, scores_.d_out(), 0, value_columns_, dv_.get(), value_columns_, queries);
    accumulate_product(
        ds.data, ds.row, ds.step, keys, rows, scores_.queries(), 0, columns_, dk_.get(), columns_, queries);
    accumulate_product(rows_of_ds.data, rows_of_ds.row, rows_of_ds.step, rows, keys, scores_.keys(), 0, columns_, dq,
                       dq_row, of_rows, ahead_);
  }

  static void store(const A* from, int64_t row, const Heads<T>& to, int64_t head, int64_t first, int64_t rows,
                    int64_t size) {
    if constexpr (kInAmx<F>) {  // of a key, a column
      alignas(64) A lines[V::size * V::size];
      for (int64_t r0 = 0; r0 < rows; r0 += V::size)
        for (int64_t j = 0; j < size; j += V::size) {
          transpose(from + j * kGradientKeys + r0, kGradientKeys, lines, V::size);
          for (int64_t r = r0; r < rows && r < r0 + V::size; ++r)
            V::load(lines + (r - r0) * V::size).store(to.at(head, first + r) + j, size - j);
        }
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      T* const out = to.at(head, first + r);
      for (int64_t j = 0; j < size; j += V::size) V::load(from + r * row + j).store(out + j, size - j);
    }
  }

  const AttentionBackward<T, A>* p_ = nullptr;
  ScoreGradients<T> scores_;
  HeadAhead<T, 5> ahead_;
  int64_t columns_ = 0, value_columns_ = 0;
  Workspace<A> delta_, dk_, dv_;
};

template <class T>
void attention_backward(const AttentionBackward<T, Compute<T>>& p) {
  using A = Compute<T>;
  using V = Vec<A>;
  const int64_t groups = p.batch * p.kv_heads, group = groups ? p.heads / p.kv_heads : 0;
  if (groups == 0) return;
  const int64_t columns = whole_vectors<T>(p.size);
  const int64_t rows =
      p.ragged_queries.starts ? p.heads * p.ragged_queries.starts[p.batch] : p.batch * p.heads * p.queries;
  const int64_t parts = gradient_parts(groups, p.keys);
  const int64_t unit =
      p.keys / parts < 2 * kGradientKeys ? kPartKeys : kGradientKeys;  // of which parts are a whole number
  // Sums of dQ: in its place, or in memory of their own for each part.
  const bool in_place = parts == 1 && sizeof(T) == sizeof(A) && p.size % V::size == 0;
  Workspace<A> memory;
  A* const sums = in_place ? nullptr : memory.zeros(parts * rows * columns);
  // Of part 0 and a batch entry: its rows where they would be in (rows of the entries, N) contiguous.
  const auto sums_of = [&](const AttentionBackward<T, A>& mine, int64_t b) {
    const int64_t first = p.ragged_queries.starts ? p.ragged_queries.starts[b] : b * p.queries;
    return Heads<A>{sums + first * p.heads * columns, 0, mine.queries * columns, columns};
  };
  const bool asks = parts == 1 && HeadAhead<T, 5>::helps(p);
  parallel_tasks(p.threads, groups * parts, [&] {
    return [worker = AttentionBackwardWorker<T>(p), &p, &sums_of, in_place, parts, unit, asks, group, columns,
            rows](int64_t task) mutable {
      const int64_t b = task / parts / p.kv_heads, kv_head = task / parts % p.kv_heads;
      const auto mine = entry(p, b);
      // Of causal attention the first keys are seen by most queries, and neighbours are mostly one thread's: of four
      // parts the first and the last, and those between.
      constexpr int64_t order[kMostParts] = {0, 3, 1, 2};
      const int64_t which = parts == kMostParts ? order[task % parts] : task % parts;
      const Range blocks = part((mine.keys + unit - 1) / unit, which, parts);
      const int64_t end = blocks.end * unit < mine.keys ? blocks.end * unit : mine.keys;
      Heads<A> dq = sums_of(mine, b);
      move(dq.data, which * rows * columns);
      if constexpr (sizeof(T) == sizeof(A)) {
        if (in_place) {
          dq = mine.dq;
          for (int64_t n = kv_head * group; n < (kv_head + 1) * group; ++n)
            for (int64_t i = 0; i < mine.queries; ++i) memset(dq.at(n, i), 0, p.size * sizeof(A));
        }
      }
      const int64_t next = task + 1;
      if (asks && next < p.batch * p.kv_heads) worker.ask_for(entry(p, next / p.kv_heads), next % p.kv_heads);
      worker.run(mine, kv_head, blocks.begin * unit, end, dq);
    };
  });
  if (in_place) return;
  parallel_for(p.threads, p.batch * p.heads, [&](int64_t head) {
    const auto mine = entry(p, head / p.heads);
    const Heads<A> from = sums_of(mine, head / p.heads);
    for (int64_t i = 0; i < mine.queries; ++i) {
      T* const to = mine.dq.at(head % p.heads, i);
      const A* const first = from.at(head % p.heads, i);
      for (int64_t j = 0; j < p.size; j += V::size) {
        V sum = V::load(first + j);
        for (int64_t n = 1; n < parts; ++n) sum = sum + V::load(first + n * rows * columns + j);
        sum.store(to + j, p.size - j);
      }
    }
  });
}

// A part of the mask's gradient belongs to whoever computes it: one place of its batch and heads, and, unless all keys
// share a number, one block of keys.
template <class T>
void attention_mask_backward(const AttentionMaskBackward<T, Compute<T>>& p) {
  using A = Compute<T>;
  using V = Vec<A>;
  const int64_t blocks = p.mask_columns == 1 ? 1 : (p.keys + kGradientKeys - 1) / kGradientKeys;
  const int64_t keys_each = p.mask_columns == 1 ? p.keys : kGradientKeys;
  constexpr int64_t kQueries = kGradientQueries<Factor<T>>;
  memset(p.d_mask, 0, p.mask_batch * p.mask_heads * p.mask_rows * p.mask_columns * sizeof(A));
  if (p.batch * p.heads * p.queries == 0) return;
  struct Worker {
    ScoreGradients<T> scores;
    Workspace<A> delta;
    explicit Worker(const AttentionMaskBackward<T, A>& p) : scores(p, ScoreGradients<T>::Of::score) {
      delta.allocate(p.queries);
    }
  };
  parallel_tasks(p.threads, p.mask_batch * p.mask_heads * blocks, [&] {
    return [worker = Worker(p), &p, blocks, keys_each](int64_t task) mutable {
      const int64_t place = task / blocks, first = task % blocks * keys_each;
      const int64_t mask_n = place % p.mask_heads, mask_b = place / p.mask_heads;
      A* const d_mask = p.d_mask + place * p.mask_rows * p.mask_columns;
      for (int64_t b = p.mask_batch == 1 ? 0 : mask_b; b < (p.mask_batch == 1 ? p.batch : mask_b + 1); ++b) {
        const AttentionBackward<T, A> mine = entry<AttentionBackward<T, A>>(p, b);
        const int64_t last = first + keys_each < mine.keys ? first + keys_each : mine.keys;
        for (int64_t n = p.mask_heads == 1 ? 0 : mask_n; n < (p.mask_heads == 1 ? p.heads : mask_n + 1); ++n) {
          attention_delta(mine, n, worker.delta.get());
          for (int64_t j = first; j < last; j += kGradientKeys) {
            const int64_t keys = last - j < kGradientKeys ? last - j : kGradientKeys;
            worker.scores.take_keys(mine, n / (p.heads / p.kv_heads), j, keys);
            for (int64_t i = 0; i < mine.queries; i += kQueries) {
              const int64_t rows = mine.queries - i < kQueries ? mine.queries - i : kQueries;
              worker.scores.compute(n, i, rows, worker.delta.get() + i);
              for (int64_t r = 0; r < rows; ++r) {
                const Range seen = worker.scores.keys_of(r, r + 1);
                const A* const from = worker.scores.gradients() + r * worker.scores.ld();
                A* const to = d_mask + (p.mask_rows == 1 ? 0 : i + r) * p.mask_columns;
                if (p.mask_columns == 1) {
                  V sum(0);
                  for (int64_t c = seen.begin; c < seen.end; c += V::size) sum = sum + V::load(from + c, seen.end - c);
                  *to += sum_of_lanes(sum);
                } else {
                  for (int64_t c = seen.begin; c < seen.end; c += V::size)
                    (V::load(to + j + c, seen.end - c) + V::load(from + c, seen.end - c))
                        .store(to + j + c, seen.end - c);
                }
              }
            }
          }
        }
      }
    };
  });
}
