// The gradient of an additive mask: a block has 64 x 64 numbers of it, or as many as there are, and adds up the
// gradients of the scores of all batch entries, heads, queries and keys that share them, in their order.
#include "attention_backward_simt.cuh"
#include "attention_delta.cuh"

namespace fastseq::cuda {
namespace {

// Of `all` where the mask has one number for them, or else of place `at` alone.
struct Shared {
  int first, end;
  __device__ Shared(int64_t mask, int64_t all, int64_t at, int64_t each)
      : first(static_cast<int>(mask == 1 ? 0 : at)),
        end(static_cast<int>(mask == 1 || at + each > all ? all : at + each)) {}
};

template <class T>
__global__ void __launch_bounds__(kSimtThreads, 1)
    mask_gradient(const AttentionMaskBackward<T, Computed<T>> all, const Computed<T>* deltas, int64_t row_tiles,
                  int64_t column_tiles) {
  using A = Computed<T>;
  FASTSEQ_SHARED(memory);
  A *const factors = reinterpret_cast<A*>(memory), *const sums = factors + kFactorNumbers;
  int64_t block = blockIdx.x;
  const int64_t column0 = block % column_tiles * kBlockRows;
  block /= column_tiles;
  const int64_t row0 = block % row_tiles * kBlockRows;
  block /= row_tiles;
  const Shared entries(all.mask_batch, all.batch, block / all.mask_heads, 1);
  const Shared heads(all.mask_heads, all.heads, block % all.mask_heads, 1);

  const SimtPlace place;
  BlockNumbers<A> sum;
#pragma unroll
  for (int a = 0; a < kEach; ++a)
#pragma unroll
    for (int c = 0; c < kEach; ++c) sum[a][c] = 0;
  for (int b = entries.first; b < entries.end; ++b) {
    const auto p = entry<AttentionBackward<T, A>>(all, b);
    const Shared queries(all.mask_rows, p.queries, row0, kBlockRows);
    const Shared keys(all.mask_columns, p.keys, column0, kBlockRows);
    for (int n = heads.first; n < heads.end; ++n)
      for (int i0 = queries.first; i0 < queries.end; i0 += kBlockRows)
        for (int j0 = keys.first; j0 < keys.end; j0 += kBlockRows) {
          BlockNumbers<A> s, d;
          block_gradients<true, T>(p, deltas + (b * all.heads + n) * all.queries, n, i0, j0, s, d, factors);
#pragma unroll
          for (int a = 0; a < kEach; ++a)
#pragma unroll
            for (int c = 0; c < kEach; ++c) sum[a][c] += d[a][c];
        }
  }
  keep_block(sum, sums);
  __syncthreads();
  const int rows_each = all.mask_rows == 1 ? kBlockRows : 1, columns_each = all.mask_columns == 1 ? kBlockRows : 1;
  for (int at = threadIdx.x; at < kBlockRows * kBlockRows; at += kSimtThreads) {
    const int row = at / kBlockRows, column = at % kBlockRows;
    if (row0 + row >= all.mask_rows || column0 + column >= all.mask_columns) continue;
    A total = 0;
    for (int r = row; r < row + rows_each; ++r)
      for (int c = column; c < column + columns_each; ++c) total += sums[r * kBlockStride + c];
    all.d_mask[(block * all.mask_rows + row0 + row) * all.mask_columns + column0 + column] = total;
  }
}

}  // namespace

template <class T>
cudaError_t attention_mask_backward(const AttentionMaskBackward<T, Computed<T>>& p, const Call& call) {
  if (!counts_fit(p)) return cudaErrorInvalidValue;
  const auto delta = static_cast<Computed<T>*>(call.workspace);
  if (const cudaError_t error = launch_delta<T>(p, delta, call.stream); error != cudaSuccess) return error;
  const int64_t row_tiles = blocks_of(p.mask_rows, kBlockRows), column_tiles = blocks_of(p.mask_columns, kBlockRows);
  return launch_blocks(
      mask_gradient<T>, p.mask_batch * p.mask_heads * row_tiles * column_tiles, 1, kSimtThreads,
      (kFactorNumbers + kBlockNumbers) * sizeof(Computed<T>), call.stream, p, delta, row_tiles, column_tiles);
}

#define INSTANTIATE(T) \
  template cudaError_t attention_mask_backward<T>(const AttentionMaskBackward<T, Computed<T>>&, const Call&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace fastseq::cuda
