// Tiles of rows in shared memory, and their products on tensor cores. kSize is a head's size, padded with zeros.
//
// A tile's row is in chunks of 16 bytes. Chunk c of row r lies in place c ^ (r % 8): the 8 rows that ldmatrix reads at
// once are then in 8 different groups of 4 banks.
//
// A result of 16 rows is in the registers of a warp as mma leaves it: with g = lane / 4, t = lane % 4, numbers 0 and 1
// are of row g, 2 and 3 of row g + 8, columns 2t and 2t + 1. So packed they are what mma takes as its left side of
// 16-bit numbers, and of floats, where it takes numbers t and t + 4 of 8 along K, they are that in another order, which
// does not matter while the right side has the same. So probabilities never go through memory.
#pragma once

#include "attention_scores.cuh"

namespace fastseq::cuda {

constexpr int kTileWarps = 4, kTileThreads = kTileWarps * kWarp;
template <class T>
constexpr int kChunk = static_cast<int>(sizeof(Words4) / sizeof(T));  // numbers
template <class T>
constexpr int kDepth = 2 * kChunk<T>;  // of an mma, along K

template <int kSize, class T>
__device__ int tile_at(int row, int chunk) {
  return row * kSize + (chunk ^ (row % 8)) * kChunk<T>;
}

// Whether rows of `size` numbers can be read in chunks.
template <class T>
__device__ bool in_chunks(const T* data, int size, int64_t row, int64_t head = 0) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Words4) == 0 && (row | head | size) % kChunk<T> == 0;
}

// A chunk of a row that is at `from`, of which `valid` numbers are there (none where that is not positive), the rest
// zeros. It is there once the thread has waited for cp_async, and all threads have met.
template <class T>
__device__ void load_chunk(T* to, const T* from, int valid, bool chunks) {
  if (valid <= 0 || (chunks && valid >= kChunk<T>)) {
    cp_async(to, from, valid > 0);
    return;
  }
  Words4 words;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (kHalf<T>) {
      const uint32_t low = 2 * w < valid ? from[2 * w].bits : 0, high = 2 * w + 1 < valid ? from[2 * w + 1].bits : 0;
      words.word[w] = low | high << 16;
    } else {
      words.word[w] = w < valid ? as_word(from[w]) : 0;
    }
  }
  *reinterpret_cast<Words4*>(to) = words;
}

// A tile of kRows rows from row0 on, of which the first `rows` are there, with `size` numbers each, and all else is
// zeros. Rows are counted from the head's first: a thread's place in a tile, kept from tile to tile, would take
// registers. Of tiles that are there, in chunks, nothing is asked about their parts.
template <int kSize, class T>
struct TileLoad {
  static constexpr int kChunks = kSize / kChunk<T>,
                       kStep = kTileThreads / kChunks;  // rows that all threads load at once
  int row, chunk;                                       // the first of this thread
  __device__ TileLoad() : row(threadIdx.x / kChunks), chunk(threadIdx.x % kChunks) {}
};
template <int kRows, int kSize, class T, class Row>
__device__ void load_tile(T* tile, const T* head, int64_t stride, Row row0, int rows, int size, bool chunks) {
  using Load = TileLoad<kSize, T>;
  static_assert(kRows % Load::kStep == 0, "each thread has as many chunks");
  const Load mine;
  const int valid = size - mine.chunk * kChunk<T>;
  const T* at = head + (row0 + mine.row) * stride + mine.chunk * kChunk<T>;
  if (chunks && rows >= kRows) {
#pragma unroll
    for (int row = 0; row < kRows; row += Load::kStep, at += Load::kStep * stride)
      cp_async(tile + tile_at<kSize, T>(mine.row + row, mine.chunk), at, valid > 0);
    return;
  }
#pragma unroll 1
  for (int row = mine.row; row < kRows; row += Load::kStep, at += Load::kStep * stride) {
    const bool there = row < rows && valid > 0;
    load_chunk(tile + tile_at<kSize, T>(row, mine.chunk), there ? at : head, there ? valid : 0, chunks);
  }
}
// The same, where row r is at row_at(r).
template <int kRows, int kSize, class T, class RowAt>
__device__ void load_tile_of(T* tile, const RowAt& row_at, int rows, int size, bool chunks) {
  using Load = TileLoad<kSize, T>;
  const Load mine;
  const int valid = size - mine.chunk * kChunk<T>;
#pragma unroll 1
  for (int row = mine.row; row < kRows; row += Load::kStep) {
    const bool there = row < rows && valid > 0;
    load_chunk(tile + tile_at<kSize, T>(row, mine.chunk),
               row_at(there ? row : 0) + (there ? mine.chunk * kChunk<T> : 0), there ? valid : 0, chunks);
  }
}

// Where chunk 2 k + half of a lane's row is, `row` of the tile and `rows` after it, a multiple of 8. A tile begins at a
// multiple of 128 bytes, so that 2 k only turns bits of the address of chunk `half`: an instruction for each k % 4 of a
// tile, and all else is constants of those that read.
template <int kSize, class T>
__device__ SharedAddress lane_at(const T* tile, int row, int half, int k, int rows) {
  return (shared_address(tile + tile_at<kSize, T>(row, half)) ^ (k % 4 * 2 * kChunk<T> * sizeof(T))) +
         (k / 4 * 8 * kChunk<T> + rows * kSize) * sizeof(T);
}

// 16 rows from row0 on and columns [kDepth k, kDepth (k + 1)), as a left side.
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
// Two right sides of which rows are the terms, kDepth from row0 on, a multiple of 8: columns [16 k, 16 k + 16). Floats
// are in the order of results: terms 2t and 2t + 1 of column g. Each such row is in 8 banks of its own.
template <int kSize, class T>
__device__ void load_right_terms(uint32_t (&to)[4], const T* tile, int row0, int k) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (kHalf<T>) {
    ldmatrix_transposed(to, lane_at<kSize>(tile, lane % 16, lane / 16, k, row0));
  } else {
    const int first = tile_at<kSize, T>(lane % 4 * 2, lane / 16) + lane / 4 % 4;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int column = k % 2 * 16 + w / 2 * 8;  // and chunks of odd rows are those of even ones, by pairs in turn
      to[w] = as_word(tile[((first + w % 2 * kSize) ^ (column + w % 2 * kChunk<T>)) + k / 2 * 32 + row0 * kSize]);
    }
  }
}

// Of kTiles times 16 rows and 8 kGroups columns.
template <int kTiles, int kGroups>
using Fragments = float[kTiles][kGroups][4];

template <int kTiles, int kGroups, class Use>
__device__ void each(const Use& use) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) use(m, n, e);
}
template <int kTiles, int kGroups>
__device__ void clear(Fragments<kTiles, kGroups>& fragments) {
  each<kTiles, kGroups>([&](int m, int n, int e) { fragments[m][n][e] = 0; });
}

// A left side, or two right sides; of floats in two parts, the larger first.
template <class T>
struct Factors {
  uint32_t parts[2][4];
  __device__ void split(const uint32_t (&words)[4]) {
#pragma unroll
    for (int w = 0; w < 4; ++w) parts[0][w] = factor<T, !kHalf<T>>(words[w], parts[1][w]);
  }
};

// Columns [8 n, 8 n + 16) of the sums; of floats those of the smaller products may be elsewhere.
template <class T, int kTiles, int kGroups>
__device__ void multiply_pair(Fragments<kTiles, kGroups>& sums, Fragments<kTiles, kGroups>& smaller, int n,
                              const Factors<T> (&lefts)[kTiles], const Factors<T>& rights) {
  const auto add = [&](Fragments<kTiles, kGroups>& to, int left, int right) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t side[2] = {rights.parts[right][2 * i], rights.parts[right][2 * i + 1]};
        mma<T>(to[m][n + i], lefts[m].parts[left], side);
      }
  };
  if constexpr (!kHalf<T>) add(smaller, 1, 0), add(smaller, 0, 1);
  add(sums, 0, 0);
}

// Columns that are summed up at once, in groups of 8. Tensor cores cut sums off and do not round them: an error that
// grows with what is added to a sum. So floats are added up in parts, which are rounded; registers hold so many.
template <class T, int kTiles, int kGroups, int kMost = 4>
constexpr int kAtOnce = kHalf<T> || kGroups * kTiles < kMost ? kGroups : kMost / kTiles;

// products = rows of `left` from row0 on times all rows of `right`, transposed.
template <int kSize, class T, int kTiles, int kGroups, int kUnroll = 4>
__device__ void multiply_rows(Fragments<kTiles, kGroups>& products, const T* left, int row0, const T* right) {
  constexpr int kPart = kAtOnce<T, kTiles, kGroups>;
  using Part = Fragments<kTiles, kPart>;
  const auto add = [&](Part& sums, Part& smaller, int n0) {
#pragma unroll kUnroll
    for (int k = 0; k < kSize / kDepth<T>; ++k) {
      uint32_t words[4];
      Factors<T> lefts[kTiles], rights;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        load_left<kSize>(words, left + row0 * kSize, 16 * m, k);
        lefts[m].split(words);
      }
#pragma unroll
      for (int n = 0; n < kPart; n += 2) {
        load_right<kSize>(words, right, 8 * (n0 + n), k);
        rights.split(words);
        multiply_pair<T, kTiles, kPart>(sums, smaller, n, lefts, rights);
      }
    }
  };
  if constexpr (kHalf<T>) {
    clear<kTiles, kGroups>(products);
    add(products, products, 0);
  } else {
#pragma unroll
    for (int n0 = 0; n0 < kGroups; n0 += kPart) {
      Part sums, smaller;
      clear<kTiles, kPart>(sums);
      clear<kTiles, kPart>(smaller);
      add(sums, smaller, n0);
      each<kTiles, kPart>([&](int m, int n, int e) { products[m][n0 + n][e] = sums[m][n][e] + smaller[m][n][e]; });
    }
  }
}

// Fragments of T: those of 16 bits, rounded, take half the registers, columns 2t and 2t + 1 of rows g and g + 8.
template <class T, int kTiles, int kGroups>
using Lefts = uint32_t[kTiles][kGroups][sizeof(T)];

// Of a row of a fragment, g or g + 8.
template <class T>
__device__ void keep_left(uint32_t (&to)[sizeof(T)], int half, float x, float y) {
  if constexpr (kHalf<T>) to[half] = pack<T>(x, y);
  else to[2 * half] = as_word(x), to[2 * half + 1] = as_word(y);
}

// sums += left times the rows of `right`, of their columns from column0 on.
template <int kSize, class T, int kTiles, int kTerms, int kGroups, int kMost = 4>
__device__ void multiply_add(Fragments<kTiles, kGroups>& sums, const Lefts<T, kTiles, kTerms>& left, const T* right,
                             int column0 = 0) {
  constexpr int kPart = kAtOnce<T, kTiles, kGroups, kMost>;
  const auto add = [&](Fragments<kTiles, kPart>& to, int n0) {
#pragma unroll
    for (int k = 0; k < kTerms; k += kDepth<T> / 8) {
      uint32_t words[4];
      Factors<T> lefts[kTiles], rights;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (kHalf<T>) words[e] = left[m][k + e / 2][e % 2];
          else words[e] = left[m][k][e % 2 * 2 + e / 2];
        }
        lefts[m].split(words);
      }
#pragma unroll
      for (int n = 0; n < kPart; n += 2) {
        load_right_terms<kSize>(words, right, 8 * k, column0 / 16 + (n0 + n) / 2);
        rights.split(words);
        multiply_pair<T, kTiles, kPart>(to, to, n, lefts, rights);
      }
    }
  };
  if constexpr (kHalf<T>) {
    add(sums, 0);
  } else {
#pragma unroll
    for (int n0 = 0; n0 < kGroups; n0 += kPart) {
      Fragments<kTiles, kPart> part;
      clear<kTiles, kPart>(part);
      add(part, n0);
      each<kTiles, kPart>([&](int m, int n, int e) { sums[m][n0 + n][e] += part[m][n][e]; });
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
