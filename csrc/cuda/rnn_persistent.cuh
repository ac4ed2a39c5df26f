// All steps of a layer in one cooperative launch: each block keeps its part of W_hh in registers and shared memory and
// its part of the state in registers, and all blocks meet once a step.
//
// A block has a tile of kUnits hidden units, of one direction, and of kRows rows of the batch. Its product is
// (rows x K) times (K x columns), on tensor cores: its eight warps share the rows and the depth K, and their parts of
// the sums meet in shared memory.
//   forward   K = H      columns = gates * kUnits   from h of the step before; then Cell::update
//   backward  K = G * H  columns = kUnits           from dg of the step after; then Cell::update_backward
//
// Along K a thread takes 16 bytes at once, of a row of the left side from the L2 cache and of a column of the weights
// from its registers, which hold the first of each warp's part, or from shared memory. A fragment of mma wants two
// words that are not neighbours (of 16-bit numbers 2t, 2t + 1 and 2t + 8, 2t + 9 of 16): as the order along K does not
// matter while both sides have the same, thread t takes its four words as those of two fragments.
//
// Floats are split in two for tensor cores (number.h) unless TF32 is allowed.
#pragma once

#include "cells.cuh"
#include "rnn_plan.h"
#include "rnn_steps.cuh"

namespace fastseq::cuda {

// Of a block. Sixteen warps are quicker at the long sums of backward than eight (a seventh, on an H100), and no quicker
// at forward's; of floats they would not find registers enough.
constexpr int kForwardThreads = 256;
FASTSEQ_INLINE constexpr int backward_threads(int64_t number_bytes) { return number_bytes == 2 ? 512 : 256; }
constexpr int64_t kChunkBytes = 4 * sizeof(Words4);  // of a row along K that a warp reads at once
template <class T>
constexpr int64_t kChunkOfK = kChunkBytes / static_cast<int64_t>(sizeof(T));

// How a tile's work is shared by the warps.
FASTSEQ_INLINE constexpr int row_groups_of(int rows) { return rows >= 64 ? 2 : 1; }
FASTSEQ_INLINE constexpr int depth_groups_of(int threads, int rows) { return threads / kWarp / row_groups_of(rows); }
template <int kThreads, int kRows>
struct WarpGrid {
  static constexpr int row_groups = row_groups_of(kRows), depth_groups = depth_groups_of(kThreads, kRows);
  static constexpr int row_tiles = kRows / 16 / row_groups;  // of mma, a warp
};

// Chunks of each part of K that a warp's registers hold of its weights, where they do: what the sums, the loads under
// way and the state of the tile's units leave.
FASTSEQ_INLINE constexpr int held_chunks(PersistentTile tile, int threads, int columns, int parts) {
  if (!tile.held) return 0;
  if (threads > 256) return 1;  // of 128 registers
  const int row_tiles = tile.rows / 16 / row_groups_of(tile.rows), column_tiles = columns / 8;
  const int sums = row_tiles * column_tiles * 4, moving = (2 * row_tiles + column_tiles) * 4;
  const int state = tile.rows * columns / threads, others = 72 + 10 * row_tiles, chunk = column_tiles * parts * 4;
  return (65536 / threads - sums - moving - state - others) / chunk;
}
// Bytes of one part of K (all of it forward, a gate backward) that each depth group has, and of these in shared memory.
FASTSEQ_INLINE constexpr int64_t depth_of_group(int64_t hidden_bytes, int depth_groups) {
  const int64_t step = kChunkBytes * depth_groups;
  return (hidden_bytes + step - 1) / step * kChunkBytes;
}
FASTSEQ_INLINE constexpr int64_t stored_of_group(int64_t hidden_bytes, int depth_groups, int held) {
  const int64_t left = depth_of_group(hidden_bytes, depth_groups) - held * kChunkBytes;
  return left > 0 ? left : 0;
}
// Of a row of weights in shared memory: rows lie half the banks apart, as a quarter of a warp reads 64 bytes of each of
// two rows.
FASTSEQ_INLINE constexpr int64_t weight_row_bytes(int64_t bytes) { return (bytes + 127) / 128 * 128 + 64; }
// Of the sums that warps add up, in floats.
FASTSEQ_INLINE constexpr int sums_row(int columns) { return columns + 8; }

template <class T>
struct PersistentForward {
  Schedule schedule;   // in the device's memory
  int64_t begin, end;  // steps to go, in each direction's own order
  int64_t hidden, directions;
  const float* gx[2];    // (rows of these steps, G*H), without b_ih
  int64_t projected[2];  // the row of all steps at which it begins
  const T *w_hh[2], *b_ih[2], *b_hh[2];
  const T* h0[2];  // (B, H) or null
  float* c[2];     // (B, H), read and overwritten
  T* output;       // (N, D*H)
  T* kept[2];      // (N, kept*H) or null
};

template <class T>
struct PersistentBackward {
  Schedule schedule;  // in the device's memory
  int64_t hidden, directions;
  const T* w_hh[2];
  const T *h0[2], *c0[2];  // (B, H) or null
  const T* output;         // (N, D*H)
  const T* d_output;       // or null
  const T* kept[2];
  float *dh[2], *dc[2];  // (B, H): of the last step, and overwritten with those of the initial state
  T* dg[2];              // (N, grads*H)
};

// sums += left * weights of numbers [k, end) along K, of which `left` has `valid`; its rows are those from `first` on,
// and from `rows` on there are none. The weights are those held, then those from `stored` on.
template <class T, bool kSplit, int kThreads, int kHeld, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void multiply_strip(
    float (&sums)[kRowTiles][kColumnTiles][4], const Before<T>& left, int64_t first, int64_t rows,
    const Words4 (&held)[kHeld > 0 ? kHeld : 1][kColumnTiles], const unsigned char* stored, int64_t weight_row,
    int64_t k, int64_t end, int valid) {
  constexpr int kEach = sizeof(Words4) / sizeof(T), kChunk = kChunkOfK<T>;  // numbers that a thread takes at once
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const T* lines[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + 16 * i + 8 * half + g;
      lines[i][half] = row < rows ? left.row(row) : nullptr;
    }
  const auto read = [&](int chunk, Words4(&a)[kRowTiles][2]) {
    const int at = chunk + kEach * t;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[i][half] = Words4{{0, 0, 0, 0}};
        if (lines[i][half] && at < valid) a[i][half] = load_l2(reinterpret_cast<const Words4*>(lines[i][half] + at));
      }
  };
  const auto multiply = [&](const Words4(&a)[kRowTiles][2], const Words4(&b)[kColumnTiles]) {
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
      uint32_t y[kColumnTiles][2], y_rest[kColumnTiles][2];
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int w = 0; w < 2; ++w) y[j][w] = factor<T, kSplit>(b[j].word[pair + w], y_rest[j][w]);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t x[4], x_rest[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) x[w] = factor<T, kSplit>(a[i][w % 2].word[pair + w / 2], x_rest[w]);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          if constexpr (kSplit) {
            mma<T>(sums[i][j], x_rest, y[j]);
            mma<T>(sums[i][j], x, y_rest[j]);
          }
          mma<T>(sums[i][j], x, y[j]);
        }
      }
    }
  };
  // As many loads under way as registers hold: fewer beside weights.
  constexpr int kWords = 2 * kRowTiles + kColumnTiles, kMost = kSplit ? 4 : kThreads > 256 ? 5 : 6;
  constexpr int kMany = (kWords <= 3 ? 8 : kWords <= kMost ? 4 : 2) * 256 / kThreads;
  [[maybe_unused]] constexpr int kUnroll = kHeld > 0 && kThreads > 256 ? 1 : kMany;
  constexpr int kAhead = kHeld == 0 ? 1 : kHeld < kUnroll ? kHeld : kUnroll;
#pragma unroll
  for (int first_held = 0; first_held < kHeld; first_held += kAhead) {
    Words4 a[kAhead][kRowTiles][2];
#pragma unroll
    for (int c = 0; c < kAhead; ++c)
      if (first_held + c < kHeld && k + c * kChunk < end) read(k + c * kChunk, a[c]);
#pragma unroll
    for (int c = 0; c < kAhead; ++c)
      if (first_held + c < kHeld && k + c * kChunk < end) multiply(a[c], held[first_held + c]);
    k += (kHeld - first_held < kAhead ? kHeld - first_held : kAhead) * kChunk;
  }
  const unsigned char* line = stored + g * weight_row + t * int(sizeof(Words4));
#pragma unroll kUnroll
  for (; k < end; k += kChunk, line += kChunkBytes) {
    Words4 a[kRowTiles][2], b[kColumnTiles];
    read(k, a);
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) b[j] = *reinterpret_cast<const Words4*>(line + 8 * j * weight_row);
    multiply(a, b);
  }
}

// A warp's part of the sums to its depth group's plane in shared memory, (rows, columns).
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void put_sums(const float (&sums)[kRowTiles][kColumnTiles][4], float* plane) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  constexpr int kRow = sums_row(8 * kColumnTiles);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const to = plane + (16 * i + 8 * half + g) * kRow + 8 * j + 2 * t;
        to[0] = sums[i][j][2 * half], to[1] = sums[i][j][2 * half + 1];
      }
}

// A block's product: columns of weights, of which each has `parts` of H numbers along K.
template <class T, int kThreads, int kColumns, int kParts, int kRows, int kHeld>
struct TileProduct {
  using Warps = WarpGrid<kThreads, kRows>;
  static constexpr int planes = Warps::depth_groups;  // of sums
  static constexpr int64_t held_numbers = kHeld * kChunkOfK<T>;
  using Held = Words4[kParts][kHeld > 0 ? kHeld : 1][kColumns / 8];

  // Numbers of a part that each depth group has, of these in shared memory, and of a part there.
  static FASTSEQ_INLINE constexpr int64_t depth(int64_t hidden) {
    return depth_of_group(hidden * int64_t(sizeof(T)), planes) / int64_t(sizeof(T));
  }
  static FASTSEQ_INLINE constexpr int64_t stored(int64_t hidden) {
    return stored_of_group(hidden * int64_t(sizeof(T)), planes, kHeld) / int64_t(sizeof(T));
  }
  static FASTSEQ_INLINE constexpr int64_t stored_part(int64_t hidden) { return stored(hidden) * planes; }
  // Bytes of a column in shared memory.
  static FASTSEQ_INLINE constexpr int64_t weights_row(int64_t hidden) {
    return weight_row_bytes(kParts * stored_part(hidden) * int64_t(sizeof(T)));
  }

  // Where along K the i-th number of a part in shared memory is.
  static __device__ __forceinline__ int place(int i, int stored, int depth) {
    return kHeld == 0 ? i : i / stored * depth + i % stored + static_cast<int>(held_numbers);
  }

  // This thread's registers. weight(column, part, k) is the number there, or 0 where there is none.
  template <class Weight>
  static __device__ __forceinline__ void hold(Held& to, int64_t hidden, int depth_group, const Weight& weight) {
    constexpr int kEach = sizeof(Words4) / sizeof(T);
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int c = 0; c < kHeld; ++c)
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          T numbers[kEach];
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            const int64_t k = c * kChunkOfK<T> + lane % 4 * kEach + e;
            numbers[e] = k < depth(hidden) ? weight(8 * j + lane / 4, part, depth_group * depth(hidden) + k) : T{0};
          }
          memcpy(&to[part][c][j], numbers, sizeof(Words4));
        }
  }
};

// Units of a block's rows that a thread has.
template <int kThreads, int kUnits, int kRows>
constexpr int kUnitsOfThread = (kRows * kUnits + kThreads - 1) / kThreads;

template <class Cell, class T, bool kSplit, int kUnits, int kRows, bool kHolds>
__global__ void __launch_bounds__(kForwardThreads, 1) persistent_forward_kernel(PersistentForward<T> p) {
  constexpr int kThreads = kForwardThreads;
  constexpr int kColumns = Cell::gates * kUnits, kEach = kUnitsOfThread<kThreads, kUnits, kRows>;
  constexpr int kHeld = held_chunks({kUnits, kRows, kHolds}, kThreads, kColumns, 1);
  using Tile = TileProduct<T, kThreads, kColumns, 1, kRows, kHeld>;
  using Warps = WarpGrid<kThreads, kRows>;
  FASTSEQ_SHARED(shared);
  const int64_t B = p.schedule.batch, H = p.hidden, GH = Cell::gates * H, output_row = p.directions * H;
  const int d = blockIdx.z, warp = threadIdx.x / kWarp;
  const int64_t first_unit = int64_t(blockIdx.x) * kUnits, first_row = int64_t(blockIdx.y) * kRows;
  const int weight_row = static_cast<int>(Tile::weights_row(H)), depth = static_cast<int>(Tile::depth(H));
  const int stored = static_cast<int>(Tile::stored(H));
  unsigned char* const weights = shared;
  float* const sums = reinterpret_cast<float*>(shared + kColumns * weight_row);

  const int row_group = warp / Warps::depth_groups, depth_group = warp % Warps::depth_groups;
  const int64_t warp_row = first_row + row_group * Warps::row_tiles * 16;
  const auto weight = [&](int column, int, int64_t k) {
    const int64_t unit = first_unit + column % kUnits;
    return unit < H && k < H ? p.w_hh[d][(column / kUnits * H + unit) * H + k] : T{0};
  };
  typename Tile::Held held;
  Tile::hold(held, H, depth_group, weight);
  for (int column = 0; column < kColumns; ++column)
    for (int i = threadIdx.x; i < stored * Tile::planes; i += kThreads)
      reinterpret_cast<T*>(weights + column * weight_row)[i] = weight(column, 0, Tile::place(i, stored, depth));
  const DirectionSteps steps{p.schedule, d};
  const auto h_before = [&](int64_t t) {
    return steps.before(static_cast<const T*>(p.output) + d * H, output_row, p.h0[d], H, t);
  };
  float c[kEach], h[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = threadIdx.x + e * kThreads;
    const int64_t row = first_row + i / kUnits, unit = first_unit + i % kUnits;
    c[e] = h[e] = 0;
    if (i >= kRows * kUnits || row >= B || unit >= H) continue;
    if (Cell::cell_state) c[e] = p.c[d][row * H + unit];
    // A row that starts later finds its initial state here then.
    h[e] = h_before(steps.time(p.begin)).at(row, unit);
  }
  __syncthreads();

  // Of the next step, asked for before all meet: it takes as long to come as the meeting does.
  float gx[kEach][Cell::gates];
  const auto fetch = [&](int64_t step) {
    const int64_t t = steps.time(step), n = p.schedule.offset(t) - p.projected[d], rows = p.schedule.rows(t);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x + e * kThreads;
      const int64_t row = first_row + i / kUnits, unit = first_unit + i % kUnits;
      if (i >= kRows * kUnits || row >= rows || unit >= H) continue;
#pragma unroll
      for (int gate = 0; gate < Cell::gates; ++gate) gx[e][gate] = p.gx[d][(n + row) * GH + gate * H + unit];
    }
  };
  if (p.begin < p.end) fetch(p.begin);

  for (int64_t step = p.begin; step < p.end; ++step) {
    const int64_t t = steps.time(step), n = p.schedule.offset(t), rows = p.schedule.rows(t);
    const Before<T> left = h_before(t);
    float part[Warps::row_tiles][kColumns / 8][4] = {};
    if (left.going || left.initial)
      multiply_strip<T, kSplit, kThreads, kHeld>(
          part, left, warp_row, rows, held[0], weights + depth_group * stored * int(sizeof(T)), weight_row,
          depth_group * depth, (depth_group + 1) * depth, static_cast<int>(H));
    put_sums(part, sums + (depth_group * kRows + row_group * Warps::row_tiles * 16) * sums_row(kColumns));
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x + e * kThreads;
      const int64_t row = first_row + i / kUnits, unit = first_unit + i % kUnits;
      if (i >= kRows * kUnits || row >= rows || unit >= H) continue;
      float gh[Cell::gates], keep[Cell::kept + 1];
#pragma unroll
      for (int gate = 0; gate < Cell::gates; ++gate) {
        const int64_t at = gate * H + unit;
        if (p.b_ih[d]) gx[e][gate] += load(p.b_ih[d][at]);
        gh[gate] = p.b_hh[d] ? load(p.b_hh[d][at]) : 0.0f;
#pragma unroll
        for (int plane = 0; plane < Tile::planes; ++plane)
          gh[gate] += sums[(plane * kRows + i / kUnits) * sums_row(kColumns) + gate * kUnits + i % kUnits];
      }
      T stored;
      store(stored, Cell::update(gx[e], gh, h[e], c[e], keep));
      h[e] = load(stored);
      p.output[(n + row) * output_row + d * H + unit] = stored;
      if (p.kept[d])
#pragma unroll
        for (int k = 0; k < Cell::kept; ++k) store(p.kept[d][((n + row) * Cell::kept + k) * H + unit], keep[k]);
    }
    if (step + 1 < p.end) fetch(step + 1);
    // Also before the next step's sums overwrite these.
    grid_sync();
  }
  if constexpr (Cell::cell_state) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x + e * kThreads;
      const int64_t row = first_row + i / kUnits, unit = first_unit + i % kUnits;
      if (i < kRows * kUnits && row < B && unit < H) p.c[d][row * H + unit] = c[e];
    }
  }
}

template <class Cell, class T, bool kSplit, int kUnits, int kRows, bool kHolds>
__global__ void __launch_bounds__(backward_threads(sizeof(T)), 1) persistent_backward_kernel(PersistentBackward<T> p) {
  constexpr int kThreads = backward_threads(sizeof(T));
  constexpr int kColumns = kUnits, kEach = kUnitsOfThread<kThreads, kUnits, kRows>;
  constexpr int kHeld = held_chunks({kUnits, kRows, kHolds}, kThreads, kColumns, Cell::gates);
  using Tile = TileProduct<T, kThreads, kColumns, Cell::gates, kRows, kHeld>;
  using Warps = WarpGrid<kThreads, kRows>;
  FASTSEQ_SHARED(shared);
  const int64_t B = p.schedule.batch, H = p.hidden, output_row = p.directions * H;
  const int d = blockIdx.z, warp = threadIdx.x / kWarp;
  const int64_t first_unit = int64_t(blockIdx.x) * kUnits, first_row = int64_t(blockIdx.y) * kRows;
  const int weight_row = static_cast<int>(Tile::weights_row(H)), depth = static_cast<int>(Tile::depth(H));
  const int stored = static_cast<int>(Tile::stored(H));
  unsigned char* const weights = shared;
  float* const sums = reinterpret_cast<float*>(shared + kColumns * weight_row);

  const int row_group = warp / Warps::depth_groups, depth_group = warp % Warps::depth_groups;
  const int64_t warp_row = first_row + row_group * Warps::row_tiles * 16;
  const auto weight = [&](int column, int gate, int64_t k) {
    return k < H && first_unit + column < H ? p.w_hh[d][(gate * H + k) * H + first_unit + column] : T{0};
  };
  typename Tile::Held held;
  Tile::hold(held, H, depth_group, weight);
  // Units' weights are columns of W_hh: neighbours are read by neighbouring threads.
  for (int i = threadIdx.x; i < Cell::gates * stored * Tile::planes * kUnits; i += kThreads) {
    const int column = i % kUnits, at = i / kUnits, part = stored * Tile::planes, gate = at / part;
    reinterpret_cast<T*>(weights + column * weight_row)[at] =
        weight(column, gate, Tile::place(at - gate * part, stored, depth));
  }
  float dh[kEach], dc[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = threadIdx.x + e * kThreads;
    const int64_t row = first_row + i / kUnits, unit = first_unit + i % kUnits;
    dh[e] = dc[e] = 0;
    if (i >= kRows * kUnits || row >= B || unit >= H) continue;
    dh[e] = p.dh[d][row * H + unit];
    if (Cell::cell_state) dc[e] = p.dc[d][row * H + unit];
  }

  const DirectionSteps steps{p.schedule, d};
  // Of the next step, asked for before the product of this one: it takes as long to come.
  struct Saved {
    float keep[Cell::kept + 1], h, h_before, c_before, d_output;
  };
  Saved saved[kEach] = {};
  const auto fetch = [&](int64_t step) {
    const int64_t t = steps.time(step), n = p.schedule.offset(t), rows = p.schedule.rows(t);
    const Before<T> h_before = steps.before(p.output + d * H, output_row, p.h0[d], H, t);
    const Before<T> c_before =
        steps.before(p.kept[d] + (Cell::cell_state ? Cell::kept - 1 : 0) * H, Cell::kept * H, p.c0[d], H, t);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x + e * kThreads;
      const int64_t row = first_row + i / kUnits, unit = first_unit + i % kUnits;
      Saved& s = saved[e];
      s.h = s.h_before = s.c_before = s.d_output = 0;
      if (i >= kRows * kUnits || row >= rows || unit >= H) continue;
      const int64_t at = (n + row) * output_row + d * H + unit;
#pragma unroll
      for (int k = 0; k < Cell::kept; ++k) s.keep[k] = load(p.kept[d][((n + row) * Cell::kept + k) * H + unit]);
      if (Cell::reads_h) s.h = load(p.output[at]);
      if (Cell::reads_h_prev) s.h_before = h_before.at(row, unit);
      if (Cell::cell_state) s.c_before = c_before.at(row, unit);
      if (p.d_output) s.d_output = load(p.d_output[at]);
    }
  };
  if (p.schedule.steps > 0) fetch(p.schedule.steps - 1);

  for (int64_t step = p.schedule.steps - 1; step >= 0; --step) {
    const int64_t t = steps.time(step), n = p.schedule.offset(t), rows = p.schedule.rows(t);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x + e * kThreads;
      const int64_t row = first_row + i / kUnits, unit = first_unit + i % kUnits;
      if (i >= kRows * kUnits || row >= rows || unit >= H) continue;
      float dg[Cell::grads];
      const Saved& s = saved[e];
      dh[e] = Cell::update_backward(s.keep, s.h, s.h_before, s.c_before, dh[e] + s.d_output, dc[e], dg);
#pragma unroll
      for (int k = 0; k < Cell::grads; ++k) store(p.dg[d][((n + row) * Cell::grads + k) * H + unit], dg[k]);
    }
    // Every block has read its sums of the step after, and dg is there for all.
    grid_sync();
    if (step > 0) fetch(step - 1);
    float part[Warps::row_tiles][kColumns / 8][4] = {};
    for_each_hidden_run<Cell>([&](GateRun run) {
#pragma unroll  // a gate's registers have to be known
      for (int i = 0; i < Cell::gates; ++i) {
        if (i >= run.count) break;
        const int gate = run.gate + i;
        Before<T> left;
        left.going = p.dg[d] + (n * Cell::grads + run.plane + i) * H, left.going_row = Cell::grads * H;
        left.going_rows = rows;
        multiply_strip<T, kSplit, kThreads, kHeld>(
            part, left, warp_row, rows, held[gate],
            weights + (gate * Tile::planes + depth_group) * stored * int(sizeof(T)), weight_row, depth_group * depth,
            (depth_group + 1) * depth, static_cast<int>(H));
      }
    });
    put_sums(part, sums + (depth_group * kRows + row_group * Warps::row_tiles * 16) * sums_row(kColumns));
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x + e * kThreads;
      if (i >= kRows * kUnits) continue;
#pragma unroll
      for (int plane = 0; plane < Tile::planes; ++plane)
        dh[e] += sums[(plane * kRows + i / kUnits) * sums_row(kColumns) + i % kUnits];
    }
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = threadIdx.x + e * kThreads;
    const int64_t row = first_row + i / kUnits, unit = first_unit + i % kUnits;
    if (i >= kRows * kUnits || row >= B || unit >= H) continue;
    p.dh[d][row * H + unit] = dh[e];
    if (Cell::cell_state) p.dc[d][row * H + unit] = dc[e];
  }
}

// f of the tile's numbers as types, of a cell and its type of numbers.
template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;
template <class Cell, class T, int kThreads, class Use>
cudaError_t with_tile(PersistentTile tile, const Use& use) {
  const auto with_rows = [&](auto units, auto holds) {
    const auto with = [&](auto rows) {
      if constexpr (there_is({units(), rows(), holds()}, kThreads, Cell::gates, sizeof(T)))
        return use(units, rows, holds);
      return cudaErrorInvalidValue;
    };
    switch (tile.rows) {
      case 16:
        return with(Constant<16>());
      case 32:
        return with(Constant<32>());
      case 64:
        return with(Constant<64>());
    }
    return cudaErrorInvalidValue;
  };
  if (tile.held) return with_rows(Constant<16>(), Constant<true>());
  return tile.units == 8 ? with_rows(Constant<8>(), Constant<false>()) : with_rows(Constant<16>(), Constant<false>());
}

}  // namespace fastseq::cuda
