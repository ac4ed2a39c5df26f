// Products of rows in blocks of 64 x 64 on CUDA cores, for numbers that tensor cores do not multiply exactly, and heads
// of any size. A thread (x, y) of 16 x 16 has the results of rows y + 16 a and columns x + 16 b.
#pragma once

#include "attention_scores.cuh"

namespace fastseq::cuda {

constexpr int kSide = 16, kEach = 4, kBlockRows = kSide * kEach, kSimtThreads = kSide * kSide;
constexpr int kTerms = 32;                    // of a product that are in shared memory at once
constexpr int kBlockStride = kBlockRows + 1;  // columns would share a bank
constexpr int kFactorNumbers = 2 * kTerms * kBlockStride, kBlockNumbers = kBlockRows * kBlockStride;

template <class A>
using BlockNumbers = A[kEach][kEach];

struct SimtPlace {
  int x, y;
  __device__ SimtPlace() : x(threadIdx.x % kSide), y(threadIdx.x / kSide) {}
};

// kTerms columns of rows, from column k0 on, to memory, transposed; zeros where there is nothing. row_at: as of
// multiply_rows_simt.
template <class T, class RowAt>
__device__ void load_terms(Computed<T>* to, int rows, int64_t size, int64_t k0, const RowAt& row_at) {
  for (int at = threadIdx.x; at < kTerms * kBlockRows; at += kSimtThreads) {
    const int row = at / kTerms, k = at % kTerms;
    const bool there = row < rows && k0 + k < size;
    to[k * kBlockStride + row] = there ? load(row_at(row)[k0 + k]) : Computed<T>(0);
  }
}

// products = left rows times right rows, transposed. Row r of the first `rows` of a side is at row_at(r). factors:
// kFactorNumbers in shared memory.
template <class T, class LeftAt, class RightAt>
__device__ void multiply_rows_simt(BlockNumbers<Computed<T>>& products, int left_rows, const LeftAt& left_at,
                                   int right_rows, const RightAt& right_at, int64_t size, Computed<T>* factors) {
  const SimtPlace place;
  Computed<T>* const other = factors + kTerms * kBlockStride;
  for (int a = 0; a < kEach; ++a)
    for (int b = 0; b < kEach; ++b) products[a][b] = 0;
  for (int64_t k0 = 0; k0 < size; k0 += kTerms) {
    __syncthreads();
    load_terms<T>(factors, left_rows, size, k0, left_at);
    load_terms<T>(other, right_rows, size, k0, right_at);
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kTerms; ++k) {
      Computed<T> left[kEach], right[kEach];
#pragma unroll
      for (int a = 0; a < kEach; ++a) {
        left[a] = factors[k * kBlockStride + place.y + kSide * a];
        right[a] = other[k * kBlockStride + place.x + kSide * a];
      }
#pragma unroll
      for (int a = 0; a < kEach; ++a)
#pragma unroll
        for (int b = 0; b < kEach; ++b) products[a][b] = fma(left[a], right[b], products[a][b]);
    }
  }
}

// A block of results to shared memory, as [row][column], or [column][row] if transposed.
template <bool kTransposed = false, class A>
__device__ void keep_block(const BlockNumbers<A>& numbers, A* to) {
  const SimtPlace place;
#pragma unroll
  for (int a = 0; a < kEach; ++a)
#pragma unroll
    for (int b = 0; b < kEach; ++b) {
      const int row = place.y + kSide * a, column = place.x + kSide * b;
      to[kTransposed ? column * kBlockStride + row : row * kBlockStride + column] = numbers[a][b];
    }
}

// sums (64, 16 kColumns) += a block in shared memory times rows, of their columns [column0, size). The block need not
// be there yet for all threads.
template <class T, int kColumns, class RowAt>
__device__ void multiply_add_simt(Computed<T> (&sums)[kEach][kColumns], const Computed<T>* block, int rows,
                                  const RowAt& row_at, int64_t column0, int64_t size, Computed<T>* factors) {
  constexpr int kWidth = kSide * kColumns;
  static_assert(kTerms * kWidth <= kFactorNumbers, "factors hold the rows");
  const SimtPlace place;
  for (int k0 = 0; k0 < rows; k0 += kTerms) {
    __syncthreads();
    for (int at = threadIdx.x; at < kTerms * kWidth; at += kSimtThreads) {
      const int k = at / kWidth, column = at % kWidth;
      const bool there = k0 + k < rows && column0 + column < size;
      factors[at] = there ? load(row_at(k0 + k)[column0 + column]) : Computed<T>(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kTerms; ++k) {
      Computed<T> left[kEach];
#pragma unroll
      for (int a = 0; a < kEach; ++a) left[a] = block[(place.y + kSide * a) * kBlockStride + k0 + k];
#pragma unroll
      for (int b = 0; b < kColumns; ++b) {
        const Computed<T> right = factors[k * kWidth + place.x + kSide * b];
#pragma unroll
        for (int a = 0; a < kEach; ++a) sums[a][b] = fma(left[a], right, sums[a][b]);
      }
    }
  }
}

// Over the 16 threads that have a row.
template <class A>
__device__ A row_sum_simt(A x) {
#pragma unroll
  for (int distance = 1; distance < kSide; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}
template <class A>
__device__ A row_largest_simt(A x) {
#pragma unroll
  for (int distance = 1; distance < kSide; distance *= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

// Row `row` of the sums, times a factor, from column0 on.
template <class A, class To, int kColumns>
__device__ void store_row_simt(To* to, int64_t size, int64_t column0, const A (&row)[kColumns], A factor) {
  const int64_t first = column0 + SimtPlace().x;
#pragma unroll
  for (int b = 0; b < kColumns; ++b)
    if (first + kSide * b < size) store(to[first + kSide * b], row[b] * factor);
}

// Results have slices of 16 kColumns columns, of which a block has one: use(kColumns, slices).
template <class Use>
cudaError_t with_columns(int64_t size, const Use& use) {
  if (size <= kSide * 4) return use(std::integral_constant<int, 4>{}, int64_t{1});
  return use(std::integral_constant<int, 8>{}, blocks_of(size, kSide * 8));
}

}  // namespace fastseq::cuda
