// One block of 256 threads computes a tile of 64 x 64 of c. float and double: 4 x 4 numbers a thread. 16 bits: 8 warps
// of 16 x 32 on tensor cores, from tiles whose neighbours along k lie side by side, however a and b lie in memory.
#include "gemm.h"

#include "number.h"

namespace fastseq::cuda {

namespace {

constexpr int kTile = 64, kThreads = 256;

// A factor as lines: number k of line l, where m or n count lines.
template <class T>
struct Lines {
  const T* data;
  int64_t line, step;  // numbers from one to the next
  int64_t lines, depth;

  __device__ bool has(int64_t l, int64_t k) const { return l < lines && k < depth; }
  __device__ const T& at(int64_t l, int64_t k) const { return data[l * line + k * step]; }
};

template <class R, class A>
__device__ void put(R* c, int64_t at, A sum, bool accumulate) {
  if (accumulate) sum += load(c[at]);
  store(c[at], sum);
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads) gemm_kernel(Lines<T> a, Lines<T> b, R* c, int64_t c_row, int accumulate) {
  using A = Computed<T>;
  constexpr int kDepth = 16, kRow = kTile + 1, kEach = 4;
  FASTSEQ_SHARED(shared);
  A* const tile_a = reinterpret_cast<A*>(shared);  // [k][line]
  A* const tile_b = tile_a + kDepth * kRow;
  const int64_t first_a = int64_t(blockIdx.y) * kTile, first_b = int64_t(blockIdx.x) * kTile;
  const int thread = threadIdx.x, row = thread / 16, column = thread % 16;
  A sums[kEach][kEach] = {};
  const auto fetch = [&](const Lines<T>& from, int64_t first, int64_t begin, A* to) {
    for (int i = thread; i < kTile * kDepth; i += kThreads) {
      // Neighbours in memory by neighbouring threads.
      const int l = from.step == 1 ? i / kDepth : i % kTile, k = from.step == 1 ? i % kDepth : i / kTile;
      to[k * kRow + l] = A(0);
      if (from.has(first + l, begin + k)) to[k * kRow + l] = load(from.at(first + l, k));
    }
  };
  for (int64_t begin = 0; begin < a.depth; begin += kDepth) {
    Lines<T> here_a = a, here_b = b;
    here_a.data += begin * a.step;
    here_b.data += begin * b.step;
    fetch(here_a, first_a, begin, tile_a);
    fetch(here_b, first_b, begin, tile_b);
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kDepth; ++k) {
      A x[kEach], y[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) x[i] = tile_a[k * kRow + row + 16 * i], y[i] = tile_b[k * kRow + column + 16 * i];
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums[i][j] = fma(x[i], y[j], sums[i][j]);
    }
    __syncthreads();
  }
  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j) {
      const int64_t m = first_a + row + 16 * i, n = first_b + column + 16 * j;
      if (m < a.lines && n < b.lines) put(c, m * c_row + n, sums[i][j], accumulate != 0);
    }
}

// Tiles of 64 lines of 32 numbers in shared memory, in chunks of 8 (16 bytes). Chunk q of line l is at place
// (q + l / 2) % 4 of it, so that eight lines' chunks q, which ldmatrix reads at once, are in different banks.
struct HalfTile {
  static constexpr int kDepth = 32, kChunk = 8, kChunks = kDepth / kChunk;
  static constexpr int kNumbers = kTile * kDepth;

  static __device__ int place(int line, int chunk) { return line * kDepth + (chunk + line / 2) % kChunks * kChunk; }
};

template <class T>
__device__ void fetch_half_tile(const Lines<T>& from, int64_t first, int64_t begin, T* to) {
  for (int i = threadIdx.x; i < kTile * HalfTile::kChunks; i += kThreads) {
    const bool along = from.step == 1;
    const int l = along ? i / HalfTile::kChunks : i % kTile, chunk = along ? i % HalfTile::kChunks : i / kTile;
    const int64_t line = first + l, k = begin + chunk * HalfTile::kChunk;
    T* const place = to + HalfTile::place(l, chunk);
    const T* const source = from.data + line * from.line + k * from.step;
    if (along && from.has(line, k + HalfTile::kChunk - 1) && reinterpret_cast<uintptr_t>(source) % 16 == 0) {
      cp_async(place, source, true);
    } else {
#pragma unroll
      for (int j = 0; j < HalfTile::kChunk; ++j) {
        place[j] = T{0};
        if (from.has(line, k + j)) place[j] = source[j * from.step];
      }
    }
  }
  cp_async_commit();
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads)
    half_gemm_kernel(Lines<T> a, Lines<T> b, R* c, int64_t c_row, int accumulate) {
  FASTSEQ_SHARED(shared);
  T* const tiles = reinterpret_cast<T*>(shared);  // two stages of a and b
  const int64_t first_a = int64_t(blockIdx.y) * kTile, first_b = int64_t(blockIdx.x) * kTile;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_m = warp / 2 * 16, warp_n = warp % 2 * 32;
  float sums[4][4] = {};
  const auto fetch = [&](int64_t begin, int stage) {
    T* const to = tiles + stage * 2 * HalfTile::kNumbers;
    fetch_half_tile(a, first_a, begin, to);
    fetch_half_tile(b, first_b, begin, to + HalfTile::kNumbers);
  };
  const int64_t blocks = (a.depth + HalfTile::kDepth - 1) / HalfTile::kDepth;
  if (blocks > 0) fetch(0, 0);
  for (int64_t block = 0; block < blocks; ++block) {
    if (block + 1 < blocks) {
      fetch((block + 1) * HalfTile::kDepth, static_cast<int>((block + 1) % 2));
      cp_async_wait<2>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const T* const tile_a = tiles + block % 2 * 2 * HalfTile::kNumbers;
    const T* const tile_b = tile_a + HalfTile::kNumbers;
#pragma unroll
    for (int k = 0; k < HalfTile::kDepth / 16; ++k) {
      uint32_t x[4], y[2][4];
      // Matrices of a: rows 0 to 7 and 8 to 15 of the first 8 numbers, then of the second.
      ldmatrix(x, tile_a + HalfTile::place(warp_m + lane % 16, 2 * k + lane / 16));
      // Matrices of b: lines 0 to 7 of both halves of k, then lines 8 to 15.
#pragma unroll
      for (int j = 0; j < 2; ++j)
        ldmatrix(y[j], tile_b + HalfTile::place(warp_n + 16 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t two[2] = {y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]};
        mma<T>(sums[j], x, two);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = first_a + warp_m + lane / 4 + i / 2 * 8, n = first_b + warp_n + 8 * j + lane % 4 * 2 + i % 2;
      if (m < a.lines && n < b.lines) put(c, m * c_row + n, sums[j][i], accumulate != 0);
    }
}

template <class T, class R>
cudaError_t gemm_of(const Product& p, void* stream) {
  const Lines<T> a{static_cast<const T*>(p.a), p.a_transposed ? 1 : p.a_row, p.a_transposed ? p.a_row : 1, p.m, p.k};
  const Lines<T> b{static_cast<const T*>(p.b), p.b_transposed ? p.b_row : 1, p.b_transposed ? 1 : p.b_row, p.n, p.k};
  const dim3 grid(static_cast<unsigned>((p.n + kTile - 1) / kTile), static_cast<unsigned>((p.m + kTile - 1) / kTile));
  R* const c = static_cast<R*>(p.c);
  if constexpr (kHalf<T>) {
    const std::size_t shared = 2 * 2 * HalfTile::kNumbers * sizeof(T);
    return launch(half_gemm_kernel<T, R>, grid, dim3(kThreads), shared, stream, a, b, c, p.c_row, int(p.accumulate));
  } else {
    const std::size_t shared = 2 * 16 * (kTile + 1) * sizeof(Computed<T>);
    return launch(gemm_kernel<T, R>, grid, dim3(kThreads), shared, stream, a, b, c, p.c_row, int(p.accumulate));
  }
}

template <class T>
cudaError_t gemm_of_halves(const Product& p, void* stream) {
  return p.result == NumberType::float32 ? gemm_of<T, float>(p, stream) : gemm_of<T, T>(p, stream);
}

}  // namespace

cudaError_t gemm(const Product& p, void* stream) {
  constexpr int64_t kMostRows = int64_t(65535) * kTile;
  if (p.m > kMostRows) {  // in parts: a grid is no higher
    Product first = p, rest = p;
    const int64_t result_bytes = p.result == NumberType::float64 ? 8 : p.result == NumberType::float32 ? 4 : 2;
    const int64_t factor_bytes = p.factors == NumberType::float64 ? 8 : p.factors == NumberType::float32 ? 4 : 2;
    first.m = kMostRows, rest.m = p.m - kMostRows;
    rest.a = static_cast<const char*>(p.a) + kMostRows * (p.a_transposed ? 1 : p.a_row) * factor_bytes;
    rest.c = static_cast<char*>(p.c) + kMostRows * p.c_row * result_bytes;
    const cudaError_t error = gemm(first, stream);
    return error ? error : gemm(rest, stream);
  }
  switch (p.factors) {
    case NumberType::float32:
      return gemm_of<float, float>(p, stream);
    case NumberType::float64:
      return gemm_of<double, double>(p, stream);
    case NumberType::bfloat16:
      return gemm_of_halves<bfloat16>(p, stream);
    case NumberType::float16:
      return gemm_of_halves<float16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastseq::cuda
