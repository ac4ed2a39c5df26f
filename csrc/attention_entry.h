// The parameters of one batch entry alone. Included inside the namespace of whoever computes (cpu/kernels.cpp tells
// why), on the host and on the device.
#pragma once

template <class T>
FASTSEQ_INLINE void move(T*& data, int64_t numbers) {
  if (data) data += numbers;
}
template <class T>
FASTSEQ_INLINE void move(Heads<T>& heads, int64_t b, int64_t row) {
  move(heads.data, b * heads.batch + row * heads.row);
}
template <class A>
FASTSEQ_INLINE void move(RowNumbers<A>& numbers, int64_t b, int64_t row) {
  move(numbers.data, b * numbers.batch + row);
}

template <class T, class A>
FASTSEQ_INLINE void select(Attention<T, A>& p, int64_t b) {
  const int64_t key = p.ragged_keys.first(b);
  move(p.q, b, p.ragged_queries.first(b)), move(p.k, b, key), move(p.v, b, key);
  move(p.mask.visible, b * p.mask.batch), move(p.mask.bias, b * p.mask.batch);
  move(p.slopes, b * p.slopes_batch);
  p.queries = p.ragged_queries.count(b, p.queries), p.keys = p.ragged_keys.count(b, p.keys);
  p.first_head = b * p.heads;
  if (p.from_end) p.diagonal = p.keys - p.queries, p.band.low += p.diagonal, p.band.high += p.diagonal;
}
template <class T, class A>
FASTSEQ_INLINE void select(AttentionForward<T, A>& p, int64_t b) {
  const int64_t query = p.ragged_queries.first(b);
  move(p.out, b, query), move(p.lse, b, query);
  select(static_cast<Attention<T, A>&>(p), b);
}
template <class T, class A>
FASTSEQ_INLINE void select(AttentionBackward<T, A>& p, int64_t b) {
  const int64_t query = p.ragged_queries.first(b), key = p.ragged_keys.first(b);
  move(p.out, b, query), move(p.d_out, b, query), move(p.lse, b, query), move(p.d_lse, b, query);
  move(p.dq, b, query), move(p.dk, b, key), move(p.dv, b, key);
  select(static_cast<Attention<T, A>&>(p), b);
}
template <class P>
FASTSEQ_INLINE P entry(P p, int64_t b) {
  select(p, b);
  return p;
}
