// The kernels that walk a layer step by step, between the matrix products: a thread has one unit of one row.
#pragma once

#include "cells.cuh"

namespace fastseq::cuda {

constexpr int kStepThreads = 128;

// Rows of a matrix by blocks along y, its columns by threads along x; more rows than a grid is high, in turns.
inline dim3 grid_of(int64_t rows, int64_t columns) {
  constexpr int64_t kMost = 65535;
  if (rows == 0 || columns == 0) return dim3(0);
  return dim3(static_cast<unsigned>((columns + kStepThreads - 1) / kStepThreads),
              static_cast<unsigned>(rows < kMost ? rows : kMost));
}
template <class Use>
__device__ void for_each_row(int64_t rows, int64_t columns, const Use& use) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) use(row, column);
}

// to = from, of other types too; zeros where from is null.
template <class From, class To>
__global__ void copy_kernel(const From* from, int64_t from_row, To* to, int64_t to_row, int64_t rows, int64_t columns) {
  for_each_row(rows, columns, [&](int64_t r, int64_t i) {
    store(to[r * to_row + i], from ? static_cast<Computed<To>>(load(from[r * from_row + i])) : Computed<To>(0));
  });
}
template <class From, class To>
cudaError_t copy(const From* from, int64_t from_row, To* to, int64_t to_row, int64_t rows, int64_t columns,
                 void* stream) {
  return launch(copy_kernel<From, To>, grid_of(rows, columns), dim3(kStepThreads), 0, stream, from, from_row, to,
                to_row, rows, columns);
}

// The state before a step: of rows that go on, where the step before has left it; of those that start, the initial one
// or zeros.
template <class T>
struct Before {
  const T* going = nullptr;
  int64_t going_row = 0, going_rows = 0;
  const T* initial = nullptr;
  int64_t initial_row = 0;

  // Null for a row of zeros.
  __device__ const T* row(int64_t r) const {
    if (r < going_rows) return going + r * going_row;
    return initial ? initial + r * initial_row : nullptr;
  }
  __device__ Computed<T> at(int64_t r, int64_t i) const {
    const T* const from = row(r);
    return from ? static_cast<Computed<T>>(load(from[i])) : Computed<T>(0);
  }
};

// The steps of one direction, counted in its own order: its first is that of the last time in the reverse direction.
// On the device, the schedule's tables are in the device's memory.
struct DirectionSteps {
  Schedule schedule;
  int d;

  constexpr int64_t time(int64_t step) const { return d == 0 ? step : schedule.steps - 1 - step; }
  // Of the rows at time t, those that were there at the step before; the others start.
  constexpr int64_t going(int64_t t) const {
    const int64_t before = d == 0 ? t - 1 : t + 1;
    if (before < 0 || before >= schedule.steps) return 0;
    const int64_t now = schedule.rows(t), then = schedule.rows(before);
    return then < now ? then : now;
  }
  // The row of all steps at which that step begins.
  constexpr int64_t offset_before(int64_t t) const { return schedule.offset(d == 0 ? t - 1 : t + 1); }

  // The state before time t: `all` is that after every step, in rows of so many numbers.
  template <class T>
  FASTSEQ_INLINE constexpr Before<T> before(const T* all, int64_t all_row, const T* initial, int64_t initial_row,
                                            int64_t t) const {
    Before<T> out;
    out.going_rows = going(t), out.going_row = all_row;
    if (out.going_rows) out.going = all + offset_before(t) * all_row;
    out.initial = initial, out.initial_row = initial_row;
    return out;
  }
};

template <class T>
struct StepForward {
  int64_t rows, hidden;
  const Computed<T>* gx;  // (rows, G*H), without b_ih
  const Computed<T>* gh;  // (rows, G*H), without b_hh; the first gh_rows of them: for the others h is zero
  int64_t gh_rows;
  const T* b_ih;  // or null
  const T* b_hh;  // or null
  Before<T> h_before;
  Computed<T>* c;  // (rows, H), read and overwritten
  T* h;
  int64_t h_row;
  T* kept;  // (rows, kept*H) or null
};

template <class Cell, class T>
__global__ void __launch_bounds__(kStepThreads) step_forward_kernel(StepForward<T> p) {
  using V = Computed<T>;
  for_each_row(p.rows, p.hidden, [&](int64_t r, int64_t i) {
    V gx[Cell::gates], gh[Cell::gates], keep[Cell::kept + 1], c(0), h_before(0);
#pragma unroll
    for (int g = 0; g < Cell::gates; ++g) {
      const int64_t unit = g * p.hidden + i, at = r * Cell::gates * p.hidden + unit;
      gx[g] = p.gx[at] + (p.b_ih ? static_cast<V>(load(p.b_ih[unit])) : V(0));
      gh[g] = (r < p.gh_rows ? p.gh[at] : V(0)) + (p.b_hh ? static_cast<V>(load(p.b_hh[unit])) : V(0));
    }
    if constexpr (Cell::reads_h_prev) h_before = p.h_before.at(r, i);
    if constexpr (Cell::cell_state) c = p.c[r * p.hidden + i];
    store(p.h[r * p.h_row + i], Cell::update(gx, gh, h_before, c, keep));
    if constexpr (Cell::cell_state) p.c[r * p.hidden + i] = c;
    if (p.kept)
#pragma unroll
      for (int k = 0; k < Cell::kept; ++k) store(p.kept[(r * Cell::kept + k) * p.hidden + i], keep[k]);
  });
}

template <class T>
struct StepBackward {
  int64_t rows, hidden;
  const T* kept;  // (rows, kept*H)
  const T* h;     // with rows of h_row numbers
  int64_t h_row;
  Before<T> h_before, c_before;
  const Computed<T>* dh;  // (rows, H): by way of the later step, or, with a projection, all of it
  const T* d_output;      // is added to dh; or null
  int64_t d_output_row;
  Computed<T>* dc;      // (rows, H), read and overwritten
  Computed<T>* around;  // (rows, H): what of dh does not pass through W_hh; null where the cell has none
  T* dg;                // (rows, grads*H)
};

template <class Cell, class T>
__global__ void __launch_bounds__(kStepThreads) step_backward_kernel(StepBackward<T> p) {
  using V = Computed<T>;
  for_each_row(p.rows, p.hidden, [&](int64_t r, int64_t i) {
    const int64_t at = r * p.hidden + i;
    V keep[Cell::kept + 1], dg[Cell::grads], h(0), h_before(0), c_before(0), dc(0), dh = p.dh[at];
#pragma unroll
    for (int k = 0; k < Cell::kept; ++k) keep[k] = load(p.kept[(r * Cell::kept + k) * p.hidden + i]);
    if constexpr (Cell::reads_h) h = load(p.h[r * p.h_row + i]);
    if constexpr (Cell::reads_h_prev) h_before = p.h_before.at(r, i);
    if constexpr (Cell::cell_state) c_before = p.c_before.at(r, i), dc = p.dc[at];
    if (p.d_output) dh += static_cast<V>(load(p.d_output[r * p.d_output_row + i]));
    const V around = Cell::update_backward(keep, h, h_before, c_before, dh, dc, dg);
    if constexpr (Cell::cell_state) p.dc[at] = dc;
    if (p.around) p.around[at] = around;
#pragma unroll
    for (int k = 0; k < Cell::grads; ++k) store(p.dg[(r * Cell::grads + k) * p.hidden + i], dg[k]);
  });
}

// to = a + b; b may be null.
template <class T>
__global__ void add_kernel(const Computed<T>* a, int64_t a_row, const T* b, int64_t b_row, T* to, int64_t to_row,
                           int64_t rows, int64_t columns) {
  for_each_row(rows, columns, [&](int64_t r, int64_t i) {
    Computed<T> sum = a[r * a_row + i];
    if (b) sum += static_cast<Computed<T>>(load(b[r * b_row + i]));
    store(to[r * to_row + i], sum);
  });
}

// The sum of each column, in an order that depends on the number of rows alone: a block has 32 columns, and of them a
// line of 32 threads every 32nd row.
template <class T>
__global__ void __launch_bounds__(1024)
    column_sums_kernel(const T* from, int64_t from_row, int64_t rows, int64_t columns, T* to) {
  using V = Computed<T>;
  FASTSEQ_SHARED(shared);
  V* const sums = reinterpret_cast<V*>(shared);  // [32][32]
  const int column = threadIdx.x % kWarp, line = threadIdx.x / kWarp;
  const int64_t at = int64_t(blockIdx.x) * kWarp + column;
  V sum(0);
  if (at < columns)
    for (int64_t r = line; r < rows; r += kWarp) sum += static_cast<V>(load(from[r * from_row + at]));
  sums[line * kWarp + column] = sum;
  __syncthreads();
  if (line == 0 && at < columns) {
    for (int l = 1; l < kWarp; ++l) sum += sums[l * kWarp + column];
    store(to[at], sum);
  }
}
template <class T>
cudaError_t column_sums(const T* from, int64_t from_row, int64_t rows, int64_t columns, T* to, void* stream) {
  return launch(column_sums_kernel<T>, dim3(static_cast<unsigned>((columns + kWarp - 1) / kWarp)), dim3(kWarp * kWarp),
                kWarp * kWarp * sizeof(Computed<T>), stream, from, from_row, rows, columns, to);
}

}  // namespace fastseq::cuda
