// Which rows of queries and which keys a block of the forward pass works on.
//
// Of an entry of many queries, a block has rows of one head, and all keys. Of an entry of few (kFewQueries), as in
// decoding, reading the keys is all the work: the queries of all heads that share keys are rows of one block, one head
// after another, and the keys are cut into splits, each with blocks of its own. A split is of kSplitKeys keys whatever
// the batch and the device, so the bits depend on neither.
#pragma once

#include "attention_scores.cuh"

namespace fastseq::cuda {

constexpr int kSplitKeys = 256;

// What the blocks of a grid are: tiles of rows of each pack of rows, and splits.
struct ForwardGrid {
  int64_t tiles = 1, splits = 1;
};

// The states of softmax over the splits, of rows (B N, queries) in this order.
template <class A>
struct SplitStates {
  A* data = nullptr;
  int64_t rows = 0, queries = 0, splits = 0, size = 0;

  constexpr int64_t numbers() const { return rows * splits * (2 + size); }
  FASTSEQ_INLINE int64_t at(int64_t head, int64_t query, int64_t split) const {
    return (head * queries + query) * splits + split;
  }
  // In units of log 2; of exponentials less the largest; Dv of these times V.
  FASTSEQ_INLINE A& largest(int64_t state) const { return data[state]; }
  FASTSEQ_INLINE A& total(int64_t state) const { return data[rows * splits + state]; }
  FASTSEQ_INLINE A* sums(int64_t state) const { return data + 2 * rows * splits + state * size; }
};

// Of entries of few queries, the most.
template <class T, class A>
int64_t few_queries(const Attention<T, A>& p) {
  return p.queries < kFewQueries ? p.queries : kFewQueries;
}
template <class T, class A>
SplitStates<A> split_states(const Attention<T, A>& p, void* memory) {
  return {static_cast<A*>(memory), p.batch * p.heads * few_queries(p), few_queries(p), blocks_of(p.keys, kSplitKeys),
          p.value_size};
}

template <bool kFew, class T, class A>
ForwardGrid forward_grid(const Attention<T, A>& p, int rows) {
  if (!kFew) return {blocks_of(p.queries, rows), 1};
  return {blocks_of(p.heads / p.kv_heads * few_queries(p), rows), blocks_of(p.keys, kSplitKeys)};
}
template <bool kFew, class T, class A>
int64_t forward_blocks(const Attention<T, A>& p, const ForwardGrid& grid) {
  return p.batch * (kFew ? p.kv_heads : p.heads) * grid.tiles * grid.splits;
}

template <class T, int kRows, bool kFew>
struct ForwardWork {
  const AttentionForward<T, Computed<T>>& all;
  Attention<T, Computed<T>> p;  // of the batch entry
  int batch, kv_head, first_head, split, group;
  int first_row, here;  // of the pack of rows
  bool any;

  __device__ ForwardWork(const AttentionForward<T, Computed<T>>& all, const ForwardGrid& grid) : all(all) {
    // Tiles of a head are neighbours, so that its keys are read from L2; the last, which may see most, go first.
    // There are fewer blocks than 32 bits count, so that each part of their number is less, too.
    const int splits = static_cast<int>(grid.splits), tiles = static_cast<int>(grid.tiles);
    const int heads = static_cast<int>(all.heads), kv_heads = static_cast<int>(all.kv_heads);
    int block = static_cast<int>(blockIdx.x);
    split = block % splits, block /= splits;
    first_row = (tiles - 1 - block % tiles) * kRows, block /= tiles;
    group = heads / kv_heads;
    const int packs = kFew ? kv_heads : heads, pack = block % packs;
    batch = block / packs;
    p = entry<Attention<T, Computed<T>>>(all, batch);
    kv_head = kFew ? pack : pack / group, first_head = kFew ? pack * group : pack;
    const int rows = static_cast<int>(kFew ? group * p.queries : p.queries);
    here = rows - first_row < kRows ? rows - first_row : kRows;
    any = (p.queries <= kFewQueries) == kFew && here > 0;
  }

  __device__ int query(int row) const {
    return kFew ? (first_row + row) % static_cast<int>(p.queries) : first_row + row;
  }
  __device__ int head(int row) const {
    return kFew ? first_head + (first_row + row) / static_cast<int>(p.queries) : first_head;
  }
  __device__ const T* query_at(int row) const { return p.q.at(head(row), query(row)); }

  __device__ Heads<T> out() const { return of_entry(all.out, batch, all.ragged_queries); }
  __device__ RowNumbers<Computed<T>> lse() const { return of_entry(all.lse, batch, all.ragged_queries); }

  // The queries that rows may be of.
  __device__ int first_query() const { return kFew ? 0 : first_row; }
  __device__ int end_query() const { return kFew ? static_cast<int>(p.queries) : first_row + here; }
  // The keys that some of them see.
  __device__ int first_key(const Sight& sight) const {
    const int first = sight.first_key(first_query()), begin = split * kSplitKeys;
    return kFew && first < begin ? begin : first;
  }
  __device__ int end_key(const Sight& sight) const {
    const int last = sight.end_key(end_query() - 1), end = (split + 1) * kSplitKeys;
    return kFew && last > end ? end : last;
  }
};

// Output and lse of a row, or its state over a split, from the state of its softmax: write(to, factor) stores the
// sums times a factor.
template <bool kFew, class T, int kRows, class A, class Write>
__device__ void finish_row(const ForwardWork<T, kRows, kFew>& work, const SplitStates<A>& states, int row, A largest,
                           A total, A kept, bool leader, const Write& write) {
  const int n = work.head(row), i = work.query(row);
  if constexpr (kFew) {
    const int64_t state = states.at(int64_t{work.batch} * work.p.heads + n, i, work.split);
    if (leader) states.largest(state) = largest, states.total(state) = total;
    write(states.sums(state), kept);
  } else {
    write(work.out().at(n, i), total == 0 ? A(0) : kept / total);
    if (leader && work.all.lse.data)
      work.lse().of(n)[i] = total == 0 ? -kInfinity<A> : fma(largest, static_cast<A>(kLn2), natural_log(total));
  }
}

}  // namespace fastseq::cuda
