// Attention, forward: softmax(scale Q K^T + mask) V, the softmax built up block of keys by block of keys (Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022), so that scores
// never leave the cache.
#pragma once

// Output and lse of a row from the state of its softmax.
template <class T>
void write_row(const AttentionForward<T, Compute<T>>& p, int64_t n, int64_t i, Compute<T> largest, Compute<T> total,
               const Compute<T>* sums) {
  using A = Compute<T>;
  using V = Vec<A>;
  T* const out = p.out.at(n, i);
  const V factor(total == 0 ? A(0) : A(1) / total);
  for (int64_t j = 0; j < p.value_size; j += V::size) {
    const int64_t valid = p.value_size - j;
    (V::load(sums + j, valid) * factor).store(out + j, valid);
  }
  if (!p.lse.data) return;
  p.lse.of(n)[i] = total == 0 ? -static_cast<A>(__builtin_inf())
                              : static_cast<A>(largest * kLn2 + __builtin_log(static_cast<double>(total)));
}

template <class T>
class AttentionForwardWorker {
 public:
  using A = Compute<T>;
  using V = Vec<A>;
  using F = Factor<T>;
  using Shape = PanelShape<F, 1>;
  static constexpr int kRows = kScoreRows<F>;
  static constexpr int64_t kQueries = kQueryBlock<F>;

  explicit AttentionForwardWorker(const AttentionForward<T, A>& p) {
    columns_ = whole_vectors<T>(p.value_size);
    ld_scores_ = score_stride<A>(kKeyBlock);
    panels_.allocate(Shape::blocks(p.keys) * Shape::panel_numbers(p.size));
    scores_.allocate(kQueries * ld_scores_);
    sums_.allocate(kQueries * columns_);
    largest_.allocate(kQueries), total_.allocate(kQueries);
    values_in_place_ = rows_lie_packed(p.v, p.value_size);
    if (!values_in_place_) values_.allocate(padded_terms<F>(p.keys) * columns_);
    if (p.dropout.threshold) multipliers_.allocate(kKeyBlock);
    if (FactorRows<T>::copies(p.size)) queries_.allocate(kQueries * padded_terms<F>(p.size));
    if (sizeof(T) != sizeof(F)) scratch_.allocate(Shape::panel_numbers(p.size));
  }

  // Of a batch entry, the keys and values that are next.
  void ask_for(const AttentionForward<T, A>& p, int64_t kv_head) {
    ahead_ = {p, kv_head, p.keys + p.value_size};
    ahead_.add(p.q, kv_head * (p.heads / p.kv_heads), p.queries, p.size);
  }

  // Queries [i0, i1) of a batch entry, of all heads that share these keys and values.
  void run(const AttentionForward<T, A>& p, int64_t kv_head, int64_t i0, int64_t i1) {
    p_ = &p, visible_ = {p.band, p.keys};
    const int64_t group = p.heads / p.kv_heads;
    const Range keys = visible_.of_rows(i0, i1);
    if (keys.begin < keys.end) prepare_keys(kv_head, keys);
    for (int64_t n = kv_head * group; n < (kv_head + 1) * group; ++n)
      for (int64_t i = i0; i < i1; i += kQueries) block(n, i, i + kQueries < i1 ? i + kQueries : i1);
  }

 private:
  void prepare_keys(int64_t kv_head, Range keys) {
    const A factor = static_cast<A>(score_factor(*p_));
    for (int64_t j = keys.begin / Shape::width; j * Shape::width < keys.end; ++j)
      pack_scores_panel(p_->k.at(kv_head, 0), p_->k.row, p_->keys, p_->size, j, factor, scratch_.get(),
                        panels_.get() + j * Shape::panel_numbers(p_->size));
    if (values_in_place_) return;
    for (int64_t j0 = keys.begin / kKeyBlock * kKeyBlock; j0 < keys.end; j0 += kKeyBlock)
      pack_rows(p_->v.at(kv_head, j0), p_->v.row, keys_of_block(j0), p_->value_size, values_.get() + j0 * columns_);
  }

  int64_t keys_of_block(int64_t j0) const { return p_->keys - j0 < kKeyBlock ? p_->keys - j0 : kKeyBlock; }

  void block(int64_t n, int64_t i0, int64_t i1) {
    const int64_t rows = i1 - i0;
    const FactorRows<T> q(p_->q.at(n, i0), p_->q.row, rows, p_->size, queries_.get());
    for (int64_t r = 0; r < rows; ++r) largest_.get()[r] = -static_cast<A>(__builtin_inf()), total_.get()[r] = 0;
    memset(sums_.get(), 0, rows * columns_ * sizeof(A));
    const Range keys = visible_.of_rows(i0, i1);
    const int64_t first = keys.begin < keys.end ? keys.begin / kKeyBlock * kKeyBlock : keys.end;
    for (int64_t j0 = first; j0 < keys.end; j0 += kKeyBlock) {
      const int64_t here = keys_of_block(j0);
      const auto seen = [&](int64_t m0, int64_t m1) { return visible_.in_block(i0 + m0, i0 + m1, j0, here); };
      score_product(q.data, q.row, rows, p_->size, panels_.get() + j0 / Shape::width * Shape::panel_numbers(p_->size),
                    here, scores_.get(), ld_scores_, seen, ahead_);
      for (int64_t m = 0; m < rows; m += kRows) softmax(n, i0, m, rows - m < kRows ? rows - m : kRows, j0, seen);
      const F* values = values_.get() + j0 * columns_;
      if constexpr (sizeof(T) == sizeof(F)) {
        if (values_in_place_) values = p_->v.at(n / (p_->heads / p_->kv_heads), j0);
      }
      accumulate_product(
          reinterpret_cast<const F*>(scores_.get()), ld_scores_ * sizeof(A) / sizeof(F), Terms<F>::count, rows, here,
          values, values_in_place_ ? p_->v.row : 0, columns_, sums_.get(), columns_, seen, ahead_);
    }
    for (int64_t r = 0; r < rows; ++r)
      write_row(*p_, n, i0 + r, largest_.get()[r], total_.get()[r], sums_.get() + r * columns_);
  }

  // Of a tile of rows, from row m of the block on, the scores of the keys that a row sees become their exponentials,
  // those of others that the products read zero.
  template <class Seen>
  void softmax(int64_t n, int64_t i0, int64_t m, int64_t rows, int64_t j0, const Seen& seen) {
    const Range tile = seen(m, m + rows);
    if (tile.begin >= tile.end) return;
    const Range vectors = whole_vectors_of<F>(tile);
    A* const s = scores_.get() + m * ld_scores_;
    A *const largest = largest_.get() + m, before[kRows], totals[kRows];
    A factor = kScaledKeys<T> ? A(1) : static_cast<A>(score_factor(*p_));
    const bool scales_first = factor <= 0 || p_->softcap != 0 || p_->slopes || p_->mask.bias;
    for (int64_t r = 0; r < rows; ++r) {
      before[r] = largest[r];
      if (!kScaledKeys<T> && scales_first) scale_row(factor, vectors, s + r * ld_scores_);
      finish_scores(*p_, n, i0 + m + r, j0, seen(m + r, m + r + 1), vectors, s + r * ld_scores_);
    }
    if (scales_first) factor = 1;
    const auto exponentials = [&](auto out) __attribute__((always_inline)) {
      using Out = decltype(out);
      int64_t r = 0;
      for (; r + kSoftmaxRows <= rows; r += kSoftmaxRows)
        exponentiate<kSoftmaxRows, Out>(vectors, factor, s + r * ld_scores_, ld_scores_, largest + r, totals + r);
      for (; r < rows; ++r)
        exponentiate<1, Out>(vectors, factor, s + r * ld_scores_, ld_scores_, largest + r, totals + r);
    };
    const bool drops = p_->dropout.threshold != 0;
    drops ? exponentials(A()) : exponentials(F());
    for (int64_t r = 0; r < rows; ++r) {
      A& total = total_.get()[m + r];
      if (before[r] != largest[r] && before[r] != -static_cast<A>(__builtin_inf())) {
        const A factor = exp2_of_score(V(before[r] - largest[r])).v[0];
        total *= factor;
        A* const sums = sums_.get() + (m + r) * columns_;
        for (int64_t j = 0; j < columns_; j += V::size) (V::load(sums + j) * V(factor)).store(sums + j);
      }
      total += totals[r];
      if (drops) {
        dropout_multipliers(*p_, n, i0 + m + r, j0, vectors, multipliers_.get());
        multiply_row(multipliers_.get(), vectors, s + r * ld_scores_);
        row_to_factors<F>(s + r * ld_scores_, vectors);
      }
    }
  }

  const AttentionForward<T, A>* p_ = nullptr;
  VisibleKeys visible_{};
  int64_t columns_ = 0, ld_scores_ = 0;
  bool values_in_place_ = false;
  HeadAhead<T, 3> ahead_;
  Workspace<F> panels_, queries_, values_;
  Workspace<A> scores_, sums_, largest_, total_, scratch_, multipliers_;
};

// Of the entries whose number of queries is wanted, a head's queries in as many parts as keep all threads busy to the
// end.
template <class T, class Wanted>
void attention_of_many_queries(const AttentionForward<T, Compute<T>>& p, int threads, const Wanted& wanted) {
  constexpr int64_t kQueries = kQueryBlock<Factor<T>>;
  const int64_t groups = p.batch * p.kv_heads, most = (p.queries + kQueries - 1) / kQueries;
  const int64_t enough = (4 * threads + groups - 1) / groups;
  const int64_t parts = threads == 1 ? 1 : enough < most ? enough : most;
  const bool asks = parts == 1 && HeadAhead<T, 3>::helps(p);
  parallel_tasks(threads, groups * parts, [&] {
    return [worker = AttentionForwardWorker<T>(p), &p, &wanted, parts, asks](int64_t task) mutable {
      const int64_t group = task / parts;
      const auto mine = entry(p, group / p.kv_heads);
      if (asks && group + 1 < p.batch * p.kv_heads)
        worker.ask_for(entry(p, (group + 1) / p.kv_heads), (group + 1) % p.kv_heads);
      const Range blocks = part((mine.queries + kQueries - 1) / kQueries, task % parts, parts);
      const int64_t end = blocks.end * kQueries;
      if (wanted(mine.queries) && blocks.begin < blocks.end)
        worker.run(mine, group % p.kv_heads, blocks.begin * kQueries, end < mine.queries ? end : mine.queries);
    };
  });
}
