// Attention of a few queries, as in decoding: reading K and V is all the work, so they are read once, where they lie.
//
// The keys are cut into blocks of kKeyBlock, of which threads take one after another; each gives a row's largest score,
// the sum of exponentials and the output up to that sum, and these states are merged in the order of the blocks.
#pragma once

// The state of a row over some keys: sums[columns] and total are in units of 2^largest.
template <class A>
struct SoftmaxState {
  A* numbers;  // largest, total, sums
  A& largest() const { return numbers[0]; }
  A& total() const { return numbers[1]; }
  A* sums() const { return numbers + 2; }
};

// How far ahead rows are asked for that come from far away; what the processor asks for itself ends with a page. Of a
// page whose place in memory is not known yet a single line, in time to find it.
constexpr int64_t kBytesAhead = 2048, kBytesToPage = 12288, kPage = 4096;

template <class T>
class FewQueriesWorker {
 public:
  using A = Compute<T>;
  using V = Vec<A>;

  explicit FewQueriesWorker(const AttentionForward<T, A>& p) {
    const int64_t most = p.queries < kFewQueries ? p.queries : kFewQueries, rows = p.heads / p.kv_heads * most;
    queries_.allocate(rows * p.size);
    scores_.allocate(rows * kKeyBlock);
    if (p.dropout.threshold) multipliers_.allocate(kKeyBlock);
  }

  // Keys [j0, j0 + keys) of a batch entry for all queries that read them; a state for each, `states_stride` apart.
  void run(const AttentionForward<T, A>& p, int64_t kv_head, int64_t j0, int64_t keys, A* states,
           int64_t states_stride) {
    p_ = &p;
    const int64_t group = p.heads / p.kv_heads, rows = group * p.queries, first = kv_head * group;
    for (int64_t r = 0; r < rows; ++r)
      memcpy(queries_.get() + r * p.size, p.q.at(first + r / p.queries, r % p.queries), p.size * sizeof(T));
    const T *const k = p.k.at(kv_head, j0), *const v = p.v.at(kv_head, j0);
    const int64_t ahead = kBytesAhead / (p.size * static_cast<int64_t>(sizeof(T))) + 1;
    const int64_t page = rows_in(kPage, p.k.row), to_page = rows_in(kBytesToPage, p.k.row);
    int64_t next_page = 0;
    for (int64_t j = 0; j < keys; j += kDotColumns<T>) {
      if (j >= next_page) {
        const int64_t far = j + to_page;
        if (far < keys) __builtin_prefetch(k + far * p.k.row, 0, 2);
        else if (far - keys < keys) __builtin_prefetch(v + (far - keys) * p.v.row, 0, 2);
        next_page += page;
      }
      const int64_t here = keys - j < kDotColumns<T> ? keys - j : kDotColumns<T>;
      for (int64_t i = j + ahead; i < j + ahead + here; ++i) {
        if (i < keys) fetch(k + i * p.k.row, p.size);
        else if (i - keys < keys) fetch(v + (i - keys) * p.v.row, p.value_size);
      }
      int64_t r = 0;
      const auto dots = [&](auto count) __attribute__((always_inline)) {
        constexpr int MR = decltype(count)::value;
        for (; r + MR <= rows; r += MR)
          dot_tile<MR>(queries_.get() + r * p_->size, p_->size, k + j * p_->k.row, p_->k.row, p_->size, here,
                       scores_.get() + r * kKeyBlock + j, kKeyBlock);
      };
      dots(Part<kDotRows>{});
      dots(Part<1>{});
    }
    for (int64_t r = 0; r < rows; ++r)
      row(first + r / p.queries, r % p.queries, v, j0, keys, scores_.get() + r * kKeyBlock,
          {states + r * states_stride});
  }

 private:
  // How many rows so many bytes have, `row` numbers apart: one at least.
  static int64_t rows_in(int64_t bytes, int64_t row) {
    const int64_t each = (row < 0 ? -row : row) * static_cast<int64_t>(sizeof(T));
    return each > 0 && each < bytes ? bytes / each : 1;
  }
  static FASTSEQ_INLINE void fetch(const T* row, int64_t size) {
    for (int64_t i = 0; i < size; i += kLineNumbers<T>) __builtin_prefetch(row + i);
  }

  void row(int64_t n, int64_t i, const T* v, int64_t j0, int64_t keys, A* s, SoftmaxState<A> state) {
    constexpr int64_t size = V::size;
    const A hidden = -static_cast<A>(__builtin_inf());
    const Range mine = VisibleKeys{p_->band, p_->keys}.in_block(i, i + 1, j0, keys);
    state.largest() = hidden, state.total() = 0;
    memset(state.sums(), 0, p_->value_size * sizeof(A));
    if (mine.begin >= mine.end) return;
    const Range vectors = whole_vectors_of<A>(mine);
    scale_row(static_cast<A>(score_factor(*p_)), vectors, s);
    finish_scores(*p_, n, i, j0, mine, vectors, s);
    exponentiate<1, A>(vectors, A(1), s, 0, &state.largest(), &state.total());
    if (p_->dropout.threshold) {
      dropout_multipliers(*p_, n, i, j0, mine, multipliers_.get());
      multiply_row(multipliers_.get(), vectors, s);
    }
    int64_t c = 0;
    const auto add = [&](auto count) __attribute__((always_inline)) {
      constexpr int NV = decltype(count)::value;
      for (; c + NV * size <= p_->value_size; c += NV * size)
        weighted_sum<NV>(s, mine, v + c, NV * size, state.sums() + c);
    };
    add(Part<8>{});
    add(Part<4>{});
    add(Part<2>{});
    add(Part<1>{});
    if (c < p_->value_size) weighted_sum<1>(s, mine, v + c, p_->value_size - c, state.sums() + c);
  }

  // sums = the rows of v, weighted, of NV vectors or, of the last one, `valid` numbers.
  template <int NV>
  FASTSEQ_INLINE void weighted_sum(const A* weights, Range keys, const T* v, int64_t valid, A* sums) const {
    V c[NV];
#pragma GCC unroll 16
    for (int n = 0; n < NV; ++n) c[n] = V(0);
    const int64_t ahead = kBytesAhead / (p_->value_size * static_cast<int64_t>(sizeof(T))) + 1;
    const int64_t page = rows_in(kPage, p_->v.row), to_page = rows_in(kBytesToPage, p_->v.row);
    for (int64_t j0 = keys.begin; j0 < keys.end; j0 += page) {
      const int64_t j1 = j0 + page < keys.end ? j0 + page : keys.end;
      if (j0 + to_page < keys.end) __builtin_prefetch(v + (j0 + to_page) * p_->v.row, 0, 2);
      for (int64_t j = j0; j < j1; ++j) {
        const V w = V::broadcast(weights + j);
        const T* const from = v + j * p_->v.row;
        if (j + ahead < keys.end) fetch(from + ahead * p_->v.row, NV * V::size);
#pragma GCC unroll 16
        for (int n = 0; n < NV; ++n) c[n] = fma(w, NV > 1 ? V::load(from + n * V::size) : V::load(from, valid), c[n]);
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < NV; ++n) c[n].store(sums + n * V::size, valid - n * V::size);
  }

  const AttentionForward<T, A>* p_ = nullptr;
  Workspace<T> queries_;
  Workspace<A> scores_, multipliers_;
};

// Of one row, the states of the blocks, `stride` apart, in their order.
template <class T>
void merge_states(const AttentionForward<T, Compute<T>>& p, int64_t n, int64_t i, Compute<T>* states, int64_t stride,
                  int64_t blocks) {
  using A = Compute<T>;
  using V = Vec<A>;
  const A hidden = -static_cast<A>(__builtin_inf());
  A largest = hidden, total = 0;
  for (int64_t k = 0; k < blocks; ++k) {
    const A other = SoftmaxState<A>{states + k * stride}.largest();
    largest = other > largest ? other : largest;
  }
  const V shift(largest == hidden ? A(0) : largest);
  A* const sums = SoftmaxState<A>{states}.sums();
  for (int64_t k = 0; k < blocks; ++k) {
    const SoftmaxState<A> state{states + k * stride};
    const A factor = exp2_of_score(V(state.largest()) - shift).v[0];
    total += state.total() * factor;
    for (int64_t j = 0; j < p.value_size; j += V::size) {
      const int64_t valid = p.value_size - j;
      const V more = V::load(state.sums() + j, valid) * V(factor);
      (k == 0 ? more : V::load(sums + j, valid) + more).store(sums + j, valid);
    }
  }
  write_row(p, n, i, largest, total, sums);
}

inline int64_t key_blocks(int64_t keys) { return keys > kKeyBlock ? (keys + kKeyBlock - 1) / kKeyBlock : 1; }

template <class T, class Wanted>
void attention_of_few_queries(const AttentionForward<T, Compute<T>>& p, int threads, const Wanted& wanted) {
  using A = Compute<T>;
  const int64_t blocks = key_blocks(p.keys);
  const int64_t queries = p.queries < kFewQueries ? p.queries : kFewQueries, group = p.heads / p.kv_heads;
  const int64_t state = p.value_size + 2, row = blocks * state, head = queries * row, heads = p.batch * p.heads;
  Workspace<A> memory;
  A* const states = memory.allocate(heads * head);
  parallel_tasks(threads, p.batch * p.kv_heads * blocks, [&] {
    return
        [worker = FewQueriesWorker<T>(p), &p, &wanted, states, blocks, group, state, row, head](int64_t task) mutable {
          const int64_t kv_head = task / blocks, j0 = task % blocks * kKeyBlock;
          const auto mine = entry(p, kv_head / p.kv_heads);
          if (!wanted(mine.queries)) return;
          const int64_t left = mine.keys > j0 ? mine.keys - j0 : 0;
          worker.run(mine, kv_head % p.kv_heads, j0, left < kKeyBlock ? left : kKeyBlock,
                     states + kv_head * group * head + task % blocks * state, row);
        };
  });
  parallel_for(heads * head >= kNumbersToShare ? threads : 1, heads, [&](int64_t n) {
    const auto mine = entry(p, n / p.heads);
    if (!wanted(mine.queries)) return;
    A* const first = states + n / group * group * head + n % group * mine.queries * row;
    for (int64_t i = 0; i < mine.queries; ++i)
      merge_states(mine, n % p.heads, i, first + i * row, state, key_blocks(mine.keys));
  });
}

template <class T>
void attention_forward(const AttentionForward<T, Compute<T>>& p) {
  if (p.batch * p.kv_heads == 0 || p.queries == 0) return;
  const int threads = p.batch * p.heads * p.queries * p.keys * p.size < kGemmToShare ? 1 : p.threads;
  // Which way an entry goes does not depend on the others, as the bits of its rows do not.
  const auto few = [](int64_t queries) { return queries <= kFewQueries; };
  const auto many = [](int64_t queries) { return queries > kFewQueries; };
  bool any_few = few(p.queries);
  const bool any_many = many(p.queries);
  if (p.ragged_queries.starts || p.ragged_queries.lengths)
    for (int64_t b = 0; b < p.batch; ++b) any_few = any_few || few(p.ragged_queries.count(b, p.queries));
  if (any_many) attention_of_many_queries(p, threads, many);
  if (any_few) attention_of_few_queries(p, threads, few);
}
