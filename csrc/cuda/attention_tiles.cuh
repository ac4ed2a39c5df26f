// Tiles of 16-bit rows in shared memory, and their products on tensor cores. kSize is a head's size, padded with zeros.
//
// A tile's row is in chunks of 16 bytes. Chunk c of row r lies in place c ^ (r % 8): the 8 rows that ldmatrix reads at
// once are then in 8 different groups of 4 banks.
//
// A result of 16 rows is in the registers of a warp as mma leaves it: with g = lane / 4, t = lane % 4, numbers 0 and 1
// are of row g, 2 and 3 of row g + 8, columns 2t and 2t + 1. So packed they are what mma takes as its left side, which
// is why probabilities never go through memory.
#pragma once

#include "attention_scores.cuh"

namespace fastseq::cuda {

constexpr int kTileWarps = 4, kTileThreads = kTileWarps * kWarp;
constexpr int kChunk = 8;  // numbers

template <int kSize>
__device__ int tile_at(int row, int chunk) {
  return row * kSize + (chunk ^ (row % 8)) * kChunk;
}

// Whether rows of `size` numbers can be read in chunks.
template <class T>
__device__ bool in_chunks(const T* data, int size, int64_t row, int64_t head = 0) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Words4) == 0 && (row | head | size) % kChunk == 0;
}

// A chunk of a row that is at `from`, of which `valid` numbers are there (none where that is not positive), the rest
// zeros. It is there once the thread has waited for cp_async, and all threads have met.
template <class T>
__device__ void load_chunk(T* to, const T* from, int valid, bool chunks) {
  if (valid <= 0 || (chunks && valid >= kChunk)) {
    cp_async(to, from, valid > 0);
    return;
  }
  Words4 words;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t low = 2 * w < valid ? from[2 * w].bits : 0, high = 2 * w + 1 < valid ? from[2 * w + 1].bits : 0;
    words.word[w] = low | high << 16;
  }
  *reinterpret_cast<Words4*>(to) = words;
}

// A tile of kRows rows from row0 on, of which the first `rows` are there, with `size` numbers each, and all else is
// zeros. Rows are counted from the head's first: a thread's place in a tile, kept from tile to tile, would take
// registers. Of tiles that are there, in chunks, nothing is asked about their parts.
template <int kSize>
struct TileLoad {
  static constexpr int kChunks = kSize / kChunk, kStep = kTileThreads / kChunks;  // rows that all threads load at once
  int row, chunk;                                                                 // the first of this thread
  __device__ TileLoad() : row(threadIdx.x / kChunks), chunk(threadIdx.x % kChunks) {}
};
template <int kRows, int kSize, class T, class Row>
__device__ void load_tile(T* tile, const T* head, int64_t stride, Row row0, int rows, int size, bool chunks) {
  using Load = TileLoad<kSize>;
  static_assert(kRows % Load::kStep == 0, "each thread has as many chunks");
  const Load mine;
  const int valid = size - mine.chunk * kChunk;
  const T* at = head + (row0 + mine.row) * stride + mine.chunk * kChunk;
  if (chunks && rows >= kRows) {
#pragma unroll
    for (int row = 0; row < kRows; row += Load::kStep, at += Load::kStep * stride)
      cp_async(tile + tile_at<kSize>(mine.row + row, mine.chunk), at, valid > 0);
    return;
  }
#pragma unroll 1
  for (int row = mine.row; row < kRows; row += Load::kStep, at += Load::kStep * stride) {
    const bool there = row < rows && valid > 0;
    load_chunk(tile + tile_at<kSize>(row, mine.chunk), there ? at : head, there ? valid : 0, chunks);
  }
}
// The same, where row r is at row_at(r).
template <int kRows, int kSize, class T, class RowAt>
__device__ void load_tile_of(T* tile, const RowAt& row_at, int rows, int size, bool chunks) {
  using Load = TileLoad<kSize>;
  const Load mine;
  const int valid = size - mine.chunk * kChunk;
#pragma unroll 1
  for (int row = mine.row; row < kRows; row += Load::kStep) {
    const bool there = row < rows && valid > 0;
    load_chunk(tile + tile_at<kSize>(row, mine.chunk), row_at(there ? row : 0) + (there ? mine.chunk * kChunk : 0),
               there ? valid : 0, chunks);
  }
}

// Where chunk 2 k + half of a lane's row is, `row` of the tile and `rows` after it, a multiple of 8. A tile begins at a
// multiple of 128 bytes, so that 2 k only turns bits of the address of chunk `half`: an instruction for each k % 4 of a
// tile, and all else is constants of those that read.
template <int kSize, class T>
__device__ SharedAddress lane_at(const T* tile, int row, int half, int k, int rows) {
  return (shared_address(tile + tile_at<kSize>(row, half)) ^ (k % 4 * 2 * kChunk * sizeof(T))) +
         (k / 4 * 8 * kChunk + rows * kSize) * sizeof(T);
}

// 16 rows from row0 on and columns [16 k, 16 k + 16), as a left side.
template <int kSize, class T>
__device__ void load_left(uint32_t (&to)[4], const T* tile, int row0, int k) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix(to, lane_at<kSize>(tile, lane % 16, lane / 16, k, row0));
}
// Two right sides of which rows are the columns, columns the terms: 16 rows from row0 on.
template <int kSize, class T>
__device__ void load_right(uint32_t (&to)[4], const T* tile, int row0, int k) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix(to, lane_at<kSize>(tile, lane / 16 * 8 + lane % 8, lane / 8 % 2, k, row0));
}
// Two right sides of which rows are the terms: columns [16 k, 16 k + 16).
template <int kSize, class T>
__device__ void load_right_terms(uint32_t (&to)[4], const T* tile, int row0, int k) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix_transposed(to, lane_at<kSize>(tile, lane % 16, lane / 16, k, row0));
}

// Of kTiles times 16 rows and 8 kGroups columns.
template <int kTiles, int kGroups>
using Fragments = float[kTiles][kGroups][4];

template <int kTiles, int kGroups>
__device__ void clear(Fragments<kTiles, kGroups>& fragments) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) fragments[m][n][e] = 0;
}

template <class T>
__device__ void multiply_pair(float (&first)[4], float (&second)[4], const uint32_t (&left)[4],
                              const uint32_t (&rights)[4]) {
  const uint32_t right0[2] = {rights[0], rights[1]}, right1[2] = {rights[2], rights[3]};
  mma<T>(first, left, right0);
  mma<T>(second, left, right1);
}

// products = rows of `left` from row0 on times all rows of `right`, transposed.
template <int kSize, class T, int kTiles, int kGroups, int kUnroll = 4>
__device__ void multiply_rows(Fragments<kTiles, kGroups>& products, const T* left, int row0, const T* right) {
  clear<kTiles, kGroups>(products);
#pragma unroll kUnroll
  for (int k = 0; k < kSize / 16; ++k) {
    uint32_t lefts[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) load_left<kSize>(lefts[m], left + row0 * kSize, 16 * m, k);
#pragma unroll
    for (int n = 0; n < kGroups; n += 2) {
      uint32_t rights[4];
      load_right<kSize>(rights, right, 8 * n, k);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) multiply_pair<T>(products[m][n], products[m][n + 1], lefts[m], rights);
    }
  }
}

// Fragments rounded to 16 bits, which take half the registers: of columns 2t and 2t + 1 of rows g and g + 8.
template <int kTiles, int kGroups>
using Lefts = uint32_t[kTiles][kGroups][2];

// sums += left times the rows of `right`.
template <int kSize, class T, int kTiles, int kTerms, int kGroups>
__device__ void multiply_add(Fragments<kTiles, kGroups>& sums, const Lefts<kTiles, kTerms>& left, const T* right) {
#pragma unroll
  for (int k = 0; k < kTerms; k += 2) {
    uint32_t lefts[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) lefts[m][e] = left[m][k + e / 2][e % 2];
#pragma unroll
    for (int n = 0; n < kGroups; n += 2) {
      uint32_t rights[4];
      load_right_terms<kSize>(rights, right, 8 * k, n / 2);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) multiply_pair<T>(sums[m][n], sums[m][n + 1], lefts[m], rights);
    }
  }
}

// Where a thread's numbers are in its warp's results.
struct FragmentPlace {
  int row, column;
  __device__ FragmentPlace() : row(threadIdx.x % kWarp / 4), column(threadIdx.x % 4 * 2) {}
};

// Of the 4 threads that have a row.
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float row_largest(float x) {
  x = larger(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return larger(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// A thread's numbers of a row, times a factor, from column0 of the row on; half: 0 of row g, 1 of row g + 8.
template <class To, int kGroups>
__device__ void store_row(To* row, int size, int column0, const float (&groups)[kGroups][4], int half, float factor) {
  const int first = column0 + FragmentPlace().column;
  const bool pairs = reinterpret_cast<uintptr_t>(row) % (2 * sizeof(To)) == 0;
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    const int column = first + 8 * n;
    const float x = groups[n][2 * half] * factor, y = groups[n][2 * half + 1] * factor;
    if constexpr (sizeof(To) == 2) {
      if (pairs && column + 1 < size) {
        *reinterpret_cast<uint32_t*>(row + column) = pack<To>(x, y);
        continue;
      }
    }
    if (column < size) store(row[column], x);
    if (column + 1 < size) store(row[column + 1], y);
  }
}

}  // namespace fastseq::cuda
