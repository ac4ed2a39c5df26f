// Parameter blocks of scaled dot-product attention, as params.h has them for the recurrent layers.
//
// Letters: B batch, N heads, N_kv heads of keys and values, L queries, S keys, D head size of queries and keys, Dv of
// values.
#pragma once

#include <cstdint>

namespace fastseq {

// (B, heads, rows, size): the numbers of a row lie side by side, all else is wherever the strides say.
template <class T>
struct Heads {
  T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // numbers from one to the next

  T* at(int64_t b, int64_t n, int64_t r) const { return data + b * batch + n * head + r * row; }
};

// What a score is masked with, (B, N, L, S) by any strides, 0 where it is broadcast. At most one of the two is there.
template <class T>
struct AttentionMask {
  const uint8_t* visible = nullptr;  // 0: the query does not see the key
  const T* bias = nullptr;           // is added to the score
  int64_t batch = 0, head = 0, row = 0, column = 0;

  int64_t offset(int64_t b, int64_t n, int64_t i) const { return b * batch + n * head + i * row; }
  bool present() const { return visible || bias; }
};

// Query i sees key j where low <= j - i <= high: what causal and windowed attention are. Far beyond any size at a side
// that is open.
struct Band {
  static constexpr int64_t kOpen = int64_t(1) << 60;
  int64_t low = -kOpen, high = kOpen;

  // Of keys [0, keys), those that query i sees: [first, end).
  int64_t first(int64_t i, int64_t keys) const { return i + low < 0 ? 0 : i + low < keys ? i + low : keys; }
  int64_t end(int64_t i, int64_t keys) const { return i + high < 0 ? 0 : i + high < keys ? i + high + 1 : keys; }
};

template <class T>
struct Attention {
  int64_t batch = 0, heads = 0, kv_heads = 0;  // heads is a multiple of kv_heads: head n reads kv head n N_kv / N
  int64_t queries = 0, keys = 0;
  int64_t size = 0, value_size = 0;  // D, Dv
  Heads<const T> q, k, v;
  AttentionMask<T> mask;
  Band band;
  double scale = 1;
  int threads = 1;
};

template <class T, class A>
struct AttentionForward : Attention<T> {
  Heads<T> out;      // (B, N, L, Dv)
  A* lse = nullptr;  // (B, N, L) log of the sum of the exponentials of a row's scores; -inf where no key is seen
};

template <class T, class A>
struct AttentionBackward : Attention<T> {
  Heads<const T> out, d_out;
  const A* lse = nullptr;
  const A* d_lse = nullptr;  // (B, N, L) or null for zeros
  Heads<T> dq, dk, dv;       // overwritten
};

// The gradient of an additive mask, in a pass of its own.
template <class T, class A>
struct AttentionMaskBackward : AttentionBackward<T, A> {
  int64_t mask_batch = 1, mask_heads = 1, mask_rows = 1, mask_columns = 1;  // each 1 or the full size
  A* d_mask = nullptr;  // (mask_batch, mask_heads, mask_rows, mask_columns) contiguous, overwritten
};

}  // namespace fastseq
