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

  constexpr T* at(int64_t n, int64_t r) const { return data + n * head + r * row; }
};

// A number for each query, (B, N, L); those of a head lie side by side.
template <class A>
struct RowNumbers {
  A* data = nullptr;
  int64_t batch = 0, head = 0;

  constexpr A* of(int64_t n) const { return data + n * head; }
};

// What a score is masked with, (B, N, L, S) by any strides, 0 where it is broadcast. At most one of the two is there.
template <class T>
struct AttentionMask {
  const uint8_t* visible = nullptr;  // 0: the query does not see the key
  const T* bias = nullptr;           // is added to the score
  int64_t batch = 0, head = 0, row = 0, column = 0;

  constexpr bool present() const { return visible || bias; }
};

// Query i sees key j where low <= j - i <= high: what causal and windowed attention are. Far beyond any size at a side
// that is open.
struct Band {
  static constexpr int64_t kOpen = int64_t(1) << 60;
  int64_t low = -kOpen, high = kOpen;

  // Of keys [0, keys), those that query i sees: [first, end).
  constexpr int64_t first(int64_t i, int64_t keys) const { return i + low < 0 ? 0 : i + low < keys ? i + low : keys; }
  constexpr int64_t end(int64_t i, int64_t keys) const {
    return i + high < 0 ? 0 : i + high < keys ? i + high + 1 : keys;
  }
};

// The rows of batch entry b where they differ: either [starts[b], starts[b + 1]) of one sequence that holds all, or
// the first lengths[b] of its own.
struct Ragged {
  const int64_t* starts = nullptr;
  const int64_t* lengths = nullptr;

  constexpr int64_t first(int64_t b) const { return starts ? starts[b] : 0; }
  constexpr int64_t count(int64_t b, int64_t all) const {
    return starts ? starts[b + 1] - starts[b] : lengths ? lengths[b] : all;
  }
};

// Which probabilities are dropped: those whose number of 16 bits (random.h) is below the threshold.
struct AttentionDropout {
  uint32_t threshold = 0;  // 0: none
  uint64_t seed = 0;

  constexpr double kept() const {  // what the others are multiplied with
    return threshold < 65536 ? 65536.0 / (65536 - threshold) : 0;
  }
};

// Entries of no more queries than this go another way through the forward kernel, which reads keys where they lie.
constexpr int64_t kFewQueries = 16;

// T: what tensors are of; A: what is computed in.
template <class T, class A>
struct Attention {
  int64_t batch = 0, heads = 0, kv_heads = 0;  // heads is a multiple of kv_heads: head n reads kv head n N_kv / N
  int64_t queries = 0, keys = 0;               // of ragged ones the most
  int64_t size = 0, value_size = 0;            // D, Dv
  Heads<const T> q, k, v;
  Ragged ragged_queries, ragged_keys;
  AttentionMask<T> mask;
  Band band;
  bool from_end =
      false;  // for the band and the slopes, the last query is beside the last key, not the first by the first
  const A* slopes = nullptr;  // ALiBi: less slope |j - i|; (B, N) by the strides
  int64_t slopes_batch = 0, slopes_head = 0;
  double scale = 1;
  double softcap = 0;  // c > 0: scale Q K^T becomes c tanh(scale Q K^T / c)
  AttentionDropout dropout;
  int threads = 1;

  // Of one batch entry (select):
  int64_t diagonal = 0;    // the key beside query 0
  int64_t first_head = 0;  // heads of the batch entries before
};

template <class T, class A>
struct AttentionForward : Attention<T, A> {
  Heads<T> out;       // (B, N, L, Dv)
  RowNumbers<A> lse;  // log of the sum of the exponentials of a row's scores, -inf where no key is seen; or null
};

template <class T, class A>
struct AttentionBackward : Attention<T, A> {
  Heads<const T> out, d_out;
  RowNumbers<const A> lse;
  RowNumbers<const A> d_lse;  // or null for zeros
  Heads<T> dq, dk, dv;        // overwritten; rows that ragged batches have not are left as they are
};

// The gradient of an additive mask, in a pass of its own.
template <class T, class A>
struct AttentionMaskBackward : AttentionBackward<T, A> {
  int64_t mask_batch = 1, mask_heads = 1, mask_rows = 1, mask_columns = 1;  // each 1 or the full size
  A* d_mask = nullptr;  // (mask_batch, mask_heads, mask_rows, mask_columns) contiguous, overwritten
};

}  // namespace fastseq
