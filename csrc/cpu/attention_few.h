// Attention of a few queries, as in decoding: reading K and V is all the work, so they are read once, where they lie.
//
// The keys are cut into blocks of kKeyBlock, of which threads take one after another; each gives a row's largest score,
// the sum of exponentials and the output up to that sum, and these states are merged in the order of the blocks.
#pragma once

constexpr int64_t kFewQueries = 16;

// The state of a row over some keys: sums[columns] and total are in units of 2^largest.
template <class A>
struct SoftmaxState {
  A* numbers;  // largest, total, sums
  A& largest() const { return numbers[0]; }
  A& total() const { return numbers[1]; }
  A* sums() const { return numbers + 2; }
};

template <class T>
class FewQueriesWorker {
 public:
  using A = Compute<T>;
  using V = Vec<A>;

  explicit FewQueriesWorker(const AttentionForward<T, A>& p) : p_(&p) {
    rows_ = p.heads / p.kv_heads * p.queries;
    queries_.allocate(rows_ * p.size);
    scores_.allocate(rows_ * kKeyBlock);
  }

  // Keys [j0, j0 + keys) for all queries that read them; a state for each, `states_stride` apart.
  void run(int64_t b, int64_t kv_head, int64_t j0, int64_t keys, A* states, int64_t states_stride) {
    const int64_t first = kv_head * (p_->heads / p_->kv_heads);
    for (int64_t r = 0; r < rows_; ++r)
      memcpy(
          queries_.get() + r * p_->size, p_->q.at(b, first + r / p_->queries, r % p_->queries), p_->size * sizeof(T));
    const T* const k = p_->k.at(b, kv_head, j0);
    for (int64_t j = 0; j < keys; j += kDotColumns<T>) {
      const int64_t here = keys - j < kDotColumns<T> ? keys - j : kDotColumns<T>;
      int64_t r = 0;
      const auto dots = [&](auto count) __attribute__((always_inline)) {
        constexpr int MR = decltype(count)::value;
        for (; r + MR <= rows_; r += MR)
          dot_tile<MR>(queries_.get() + r * p_->size, p_->size, k + j * p_->k.row, p_->k.row, p_->size, here,
                       scores_.get() + r * kKeyBlock + j, kKeyBlock);
      };
      dots(Part<kDotRows>{});
      dots(Part<1>{});
    }
    for (int64_t r = 0; r < rows_; ++r)
      row(b, first + r / p_->queries, r % p_->queries, p_->v.at(b, kv_head, j0), j0, keys,
          scores_.get() + r * kKeyBlock, {states + r * states_stride});
  }

 private:
  void row(int64_t b, int64_t n, int64_t i, const T* v, int64_t j0, int64_t keys, A* s, SoftmaxState<A> state) {
    constexpr int64_t size = V::size;
    const A hidden = -static_cast<A>(__builtin_inf());
    const Range mine = VisibleKeys{&p_->band, p_->keys}.in_block(i, i + 1, j0, keys);
    state.largest() = hidden, state.total() = 0;
    memset(state.sums(), 0, p_->value_size * sizeof(A));
    if (mine.begin >= mine.end) return;
    const V factor(static_cast<A>(p_->scale * kLog2e));
    for (int64_t j = whole_vectors_of<A>(mine).begin; j < mine.end; j += size) (V::load(s + j) * factor).store(s + j);
    const Exponentials<A> e = exponentiate(p_->mask, p_->mask.offset(b, n, i), j0, mine, hidden, s);
    state.largest() = e.largest, state.total() = e.total;
    int64_t c = 0;
    const auto add = [&](auto count) __attribute__((always_inline)) {
      constexpr int NV = decltype(count)::value;
      for (; c + NV * size <= p_->value_size; c += NV * size)
        weighted_sum<NV>(s, mine, v + c, NV * size, state.sums() + c);
    };
    add(Part<8>{});
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
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const V w = V::broadcast(weights + j);
      const T* const from = v + j * p_->v.row;
#pragma GCC unroll 16
      for (int n = 0; n < NV; ++n) c[n] = fma(w, NV > 1 ? V::load(from + n * V::size) : V::load(from, valid), c[n]);
    }
#pragma GCC unroll 16
    for (int n = 0; n < NV; ++n) c[n].store(sums + n * V::size, valid - n * V::size);
  }

  const AttentionForward<T, A>* p_;
  int64_t rows_ = 0;
  Workspace<T> queries_;
  Workspace<A> scores_;
};

// Of one row, the states of the blocks, `stride` apart, in their order.
template <class T>
void merge_states(const AttentionForward<T, Compute<T>>& p, int64_t b, int64_t n, int64_t i, Compute<T>* states,
                  int64_t stride, int64_t blocks) {
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
  write_row(p, b, n, i, largest, total, sums);
}

template <class T>
void attention_of_few_queries(const AttentionForward<T, Compute<T>>& p, int threads) {
  using A = Compute<T>;
  const int64_t group = p.heads / p.kv_heads, blocks = p.keys > 0 ? (p.keys + kKeyBlock - 1) / kKeyBlock : 1;
  const int64_t state = p.value_size + 2, row = blocks * state, rows = p.batch * p.heads * p.queries;
  Workspace<A> memory;
  A* const states = memory.allocate(rows * row);
  parallel_tasks(threads, p.batch * p.kv_heads * blocks, [&] {
    return [worker = FewQueriesWorker<T>(p), &p, states, blocks, group, state, row](int64_t task) mutable {
      const int64_t head = task / blocks, j0 = task % blocks * kKeyBlock;
      const int64_t left = p.keys - j0;
      worker.run(head / p.kv_heads, head % p.kv_heads, j0, left < kKeyBlock ? left : kKeyBlock,
                 states + head * group * p.queries * row + task % blocks * state, row);
    };
  });
  parallel_for(rows * row >= kNumbersToShare ? threads : 1, rows, [&](int64_t r) {
    merge_states(p, r / p.queries / p.heads, r / p.queries % p.heads, r % p.queries, states + r * row, state, blocks);
  });
}

template <class T>
void attention_forward(const AttentionForward<T, Compute<T>>& p) {
  const int64_t groups = p.batch * p.kv_heads;
  if (groups == 0 || p.queries == 0) return;
  const int threads = p.batch * p.heads * p.queries * p.keys * p.size < kGemmToShare ? 1 : p.threads;
  if (p.queries <= kFewQueries) return attention_of_few_queries(p, threads);
  // A head's queries in as many parts as keep all threads busy to the end.
  const int64_t blocks = (p.queries + kQueryBlock - 1) / kQueryBlock;
  const int64_t wanted = (4 * threads + groups - 1) / groups;
  const int64_t parts = threads == 1 ? 1 : wanted < blocks ? wanted : blocks;
  parallel_tasks(threads, groups * parts, [&] {
    return [worker = AttentionForwardWorker<T>(p), &p, parts, blocks](int64_t task) mutable {
      const Range mine = part(blocks, task % parts, parts);
      const int64_t group = task / parts, end = mine.end * kQueryBlock;
      worker.run(group / p.kv_heads, group % p.kv_heads, mine.begin * kQueryBlock, end < p.queries ? end : p.queries);
    };
  });
}
