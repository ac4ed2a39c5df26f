// A row of scores between the product and the softmax, the softmax of a block of them, and dropout.
#pragma once

// The whole vectors in which columns are, and, where they are terms of a product of F, all that it takes with them.
template <class F>
FASTSEQ_INLINE Range whole_vectors_of(Range columns) {
  constexpr int64_t vector = Vec<Compute<F>>::size, V = vector > kTermsTaken<F> ? vector : kTermsTaken<F>;
  return {columns.begin / V * V, (columns.end + V - 1) / V * V};
}

// Columns of `vectors` that are not of `mine`, which may be none.
template <class A>
FASTSEQ_INLINE void hide_outside(A* scores, Range mine, Range vectors) {
  const A hidden = -static_cast<A>(__builtin_inf());
  if (mine.begin >= mine.end) mine = {vectors.end, vectors.end};
  for (int64_t j = vectors.begin; j < mine.begin; ++j) scores[j] = hidden;
  for (int64_t j = mine.end; j < vectors.end; ++j) scores[j] = hidden;
}

template <class A>
FASTSEQ_INLINE void scale_row(A factor, Range vectors, A* scores) {
  using V = Vec<A>;
  for (int64_t j = vectors.begin; j < vectors.end; j += V::size) (V::load(scores + j) * V(factor)).store(scores + j);
}

// s -> c tanh(s); the derivative of this in s / c, 1 - tanh^2, where it is asked for.
template <class A>
void cap_row(double softcap, Range vectors, A* scores, A* derivative) {
  using V = Vec<A>;
  const V cap(static_cast<A>(softcap * kLog2e));
  for (int64_t j = vectors.begin; j < vectors.end; j += V::size) {
    const V t = tanh(V::load(scores + j));
    (t * cap).store(scores + j);
    if (derivative) (V(1) - t * t).store(derivative + j);
  }
}

// Less slope |j - i|, from the key beside the query: Press et al., "Train short, test long" (ALiBi), 2022.
template <class A>
void add_slope(A slope, int64_t from_diagonal, Range vectors, A* scores) {
  using V = Vec<A>;
  A lanes[V::size];
  for (int l = 0; l < V::size; ++l) lanes[l] = static_cast<A>(l);
  const V lane = V::load(lanes), factor(slope * static_cast<A>(kLog2e));
  for (int64_t j = vectors.begin; j < vectors.end; j += V::size)
    fma(negative_magnitude(V(static_cast<A>(from_diagonal + j)) + lane), factor, V::load(scores + j)).store(scores + j);
}

// What a mask hides becomes -inf; an additive one is added. offset: of the row's first key within the mask.
template <class T>
void mask_row(const AttentionMask<T>& mask, int64_t offset, Range columns, Compute<T>* scores) {
  using A = Compute<T>;
  using V = Vec<A>;
  const A hidden = -static_cast<A>(__builtin_inf());
  for (int64_t j = columns.begin; j < columns.end; j += V::size) {
    const int64_t valid = columns.end - j < V::size ? columns.end - j : V::size;
    const int64_t at = offset + j * mask.column;
    const V s = V::load(scores + j, valid);
    if (mask.bias) {
      V bias;
      if (mask.column == 1) {
        bias = V::load(mask.bias + at, valid);
      } else {
        A lanes[V::size] = {};
        for (int64_t i = 0; i < valid; ++i) lanes[i] = to_compute(mask.bias[at + i * mask.column]);
        bias = V::load(lanes);
      }
      fma(bias, V(static_cast<A>(kLog2e)), s).store(scores + j, valid);
    } else {
      const uint8_t* bytes = mask.visible + at;
      uint8_t lanes[V::size] = {};
      if (mask.column != 1 || valid < V::size) {
        for (int64_t i = 0; i < valid; ++i) lanes[i] = bytes[i * mask.column];
        bytes = lanes;
      }
      const V masked = V::widened_bytes(bytes) != 0 ? s.v : V(hidden).v;
      masked.store(scores + j, valid);
    }
  }
}

// From the product with the keys from j0 on to the scores of query i, head n: capped, biased and masked, and -inf where
// columns of `vectors` are not of `mine`.
template <class T>
void finish_scores(const Attention<T, Compute<T>>& p, int64_t n, int64_t i, int64_t j0, Range mine, Range vectors,
                   Compute<T>* scores, Compute<T>* cap_derivative = nullptr) {
  if (p.softcap != 0) cap_row(p.softcap, vectors, scores, cap_derivative);
  if (p.slopes) add_slope(p.slopes[n * p.slopes_head], j0 - i - p.diagonal, vectors, scores);
  hide_outside(scores, mine, vectors);
  if (p.mask.present()) mask_row(p.mask, n * p.mask.head + i * p.mask.row + j0 * p.mask.column, mine, scores);
}

template <class T, int... lane>
FASTSEQ_INLINE T sum_of_lanes(Vec<T> v, Lanes<lane...> lanes) {
  return lane_sums<1, Vec<T>::size / 2>(&v, lanes).v[0];
}
template <class T>
FASTSEQ_INLINE T sum_of_lanes(Vec<T> v) {
  return sum_of_lanes(v, typename CountLanes<Vec<T>::size>::type{});
}

template <int D, class T, int... lane>
FASTSEQ_INLINE T largest_lane(Vec<T> v, Lanes<lane...> lanes) {
  if constexpr (D == 0) {
    return v.v[0];
  } else {
    const Vec<T> other = shuffle<((lane ^ D) % Vec<T>::size)...>(v, v);
    return largest_lane<D / 2>(at_least(v, other), lanes);
  }
}
template <class T>
FASTSEQ_INLINE T largest_lane(Vec<T> v) {
  return largest_lane<Vec<T>::size / 2>(v, typename CountLanes<Vec<T>::size>::type{});
}

// Rows whose softmax is computed side by side: a row alone waits for its largest score and for its sum.
#if FASTSEQ_VECTOR_BYTES == 64 || defined(__aarch64__)  // 32 registers
constexpr int kSoftmaxRows = 3;
#else
constexpr int kSoftmaxRows = 2;
#endif

// Scores of R rows, `ld` apart, times a positive factor, become exponentials, in units of 2^largest. largest: of
// earlier keys, and then of these, too. totals: the sums of the rows. Out: stored as they are, or rounded, as left
// sides, from a row's start on.
template <int R, class Out, class A>
FASTSEQ_INLINE void exponentiate(Range vectors, A factor, A* s, int64_t ld, A* largest, A* totals) {
  using V = Vec<A>;
  constexpr bool rounds = sizeof(Out) < sizeof(A);
  const A hidden = -static_cast<A>(__builtin_inf());
  V most[R], shift[R], sums[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) most[r] = V(hidden);
  for (int64_t j = vectors.begin; j < vectors.end; j += V::size)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) most[r] = at_least(most[r], V::load(s + r * ld + j));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const A here = largest_lane(most[r]) * factor;
    largest[r] = here > largest[r] ? here : largest[r];
    shift[r] = V(largest[r] == hidden ? A(0) : -largest[r]), sums[r] = V(0);
  }
  const V times(factor);
  for (int64_t j = vectors.begin; j < vectors.end; j += V::size)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V e = exp2_of_score(fma(V::load(s + r * ld + j), times, shift[r]));
      sums[r] = sums[r] + e;
      if constexpr (rounds) {
        store_rounded(e, reinterpret_cast<Out*>(s + r * ld) + j);
      } else {
        e.store(s + r * ld + j);
      }
    }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) totals[r] = sum_of_lanes(sums[r]);
}

// What dropout multiplies the probabilities of query i, head n, and keys j0 + columns with; written in whole groups of
// kDropoutKeys, on whose multiples j0 lies.
template <class T, class A>
void dropout_multipliers(const Attention<T, A>& p, int64_t n, int64_t i, int64_t j0, Range columns, A* multipliers) {
  const A kept = static_cast<A>(p.dropout.kept());
  for (int64_t j = columns.begin / kDropoutKeys * kDropoutKeys; j < columns.end; j += kDropoutKeys) {
    uint32_t words[4][kDropoutLanes];
    dropout_counters(p.first_head + n, i, j0 + j, words);
    philox(words, p.dropout.seed);
    A* to = multipliers + j;
    for (int w = 0; w < 4; ++w)
      for (int bits = 0; bits < 32; bits += 16, to += kDropoutLanes)
        for (int l = 0; l < kDropoutLanes; ++l)
          to[l] = ((words[w][l] >> bits) & 0xffff) >= p.dropout.threshold ? kept : A(0);
  }
}

template <class A>
FASTSEQ_INLINE void multiply_row(const A* multipliers, Range vectors, A* row) {
  using V = Vec<A>;
  for (int64_t j = vectors.begin; j < vectors.end; j += V::size)
    (V::load(row + j) * V::load(multipliers + j)).store(row + j);
}
