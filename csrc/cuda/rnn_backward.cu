// The backward of a layer: from dh of a step to dg, and by a product with W_hh to dh of the step before, all steps in
// one launch (rnn_persistent.cuh) or one by one (rnn_steps.cuh); then what is summed over all rows, by one product
// each. Nothing is added up by atomics, so that the same call gives the same bits.
#include "rnn.h"

#include "rnn_layer.h"
#include "rnn_persistent.cuh"

namespace fastseq::cuda {

namespace {

template <class Cell, class T>
class LayerBackward {
 public:
  using V = Computed<T>;

  LayerBackward(const RnnBackward<T>& p, const Call& call) : p_(p), call_(call), memory_(call.workspace) {
    const int64_t D = p.directions, B = p.schedule.batch, H = p.hidden_size, hout = p.out_size();
    const int64_t N = p.schedule.total_rows();
    for (int64_t d = 0; d < D; ++d) {
      dg_[d] = memory_.take<T>(N * Cell::grads * H);
      dh_[d] = memory_.take<V>(B * hout);
      if (Cell::cell_state) dc_[d] = memory_.take<V>(B * H);
      if (p.proj_size) {
        projected_[d] = memory_.take<T>(N * hout);
        emitted_[d] = memory_.take<V>(B * H);
      }
      if (p.grads[d].w_hh) h_before_[d] = memory_.take<T>(N * hout);
    }
    if (p.dx && sums_apart()) dx_ = memory_.take<V>(N * p.input_size);
  }

  int64_t workspace() const { return memory_.bytes(); }

  cudaError_t run() {
    RnnSizes sizes = sizes_of(p_, call_, Cell::gates);
    sizes.aligned = aligned(dg_[0], dg_[1]);
    RnnPlan plan;
    FASTSEQ_TRY(choose(call_, sizes, plan_rnn_backward, plan));
    for (int d = 0; d < p_.directions; ++d) FASTSEQ_TRY(start(direction(d)));
    if (plan.persistent) FASTSEQ_TRY(retreat_all(plan));
    for (int64_t step = plan.persistent ? -1 : p_.schedule.steps - 1; step >= 0; --step)
      for (int d = 0; d < p_.directions; ++d) FASTSEQ_TRY(retreat(direction(d), direction(d).time(step)));
    for (int d = 0; d < p_.directions; ++d) FASTSEQ_TRY(finish(direction(d)));
    return input_gradient();
  }

 private:
  Direction<T> direction(int d) const { return {p_, d}; }
  // The directions' parts of dx are added up before they are rounded.
  bool sums_apart() const { return kHalf<T> && p_.directions > 1; }

  cudaError_t start(const Direction<T>& at) {
    const int64_t B = p_.schedule.batch, H = p_.hidden_size, hout = p_.out_size();
    FASTSEQ_TRY(copy(at.state_at(p_.d_h_n, 0, hout), hout, dh_[at.d], hout, B, hout, call_.stream));
    if (!Cell::cell_state) return cudaSuccess;
    return copy(at.state_at(p_.d_c_n, 0, H), H, dc_[at.d], H, B, H, call_.stream);
  }

  // The rows of dg that belong to gh, as factors that begin at this row of all steps.
  T* hidden_part(int d, const GateRun& run, int64_t n) const {
    return dg_[d] + (n * Cell::grads + run.plane) * p_.hidden_size;
  }

  // All steps of all directions in one launch.
  cudaError_t retreat_all(const RnnPlan& plan) {
    if constexpr (std::is_same_v<T, double>) {
      return cudaErrorNotSupported;
    } else {
      PersistentBackward<T> p{};
      p.schedule = device_schedule(p_, call_), p.hidden = p_.hidden_size, p.directions = p_.directions;
      p.output = p_.output, p.d_output = p_.d_output;
      for (int d = 0; d < p_.directions; ++d) {
        p.w_hh[d] = p_.weights[d].w_hh, p.kept[d] = p_.kept[d];
        p.h0[d] = direction(d).state_at(p_.h0, 0, p_.hidden_size);
        p.c0[d] = direction(d).state_at(p_.c0, 0, p_.hidden_size);
        p.dh[d] = dh_[d], p.dc[d] = dc_[d], p.dg[d] = dg_[d];
      }
      return with_tile<Cell, T, backward_threads(sizeof(T))>(plan.tile, [&](auto units, auto rows, auto holds) {
        const auto run = [&](auto kernel) {
          return launch<true>(kernel, plan.grid, dim3(backward_threads(sizeof(T))),
                              static_cast<std::size_t>(plan.shared), call_.stream, p);
        };
        if constexpr (!kHalf<T>)
          if (!call_.tf32) return run(persistent_backward_kernel<Cell, T, true, units(), rows(), holds()>);
        return run(persistent_backward_kernel<Cell, T, false, units(), rows(), holds()>);
      });
    }
  }

  cudaError_t retreat(const Direction<T>& at, int64_t t) {
    const int64_t H = p_.hidden_size, hout = p_.out_size(), rows = at.rows(t), n = p_.schedule.offset(t);
    const T* const output = at.output_at(p_.output, n);
    const T* const d_output = at.output_at(p_.d_output, n);
    StepBackward<T> step;
    step.rows = rows, step.hidden = H;
    step.kept = p_.kept[at.d] + n * Cell::kept * H;
    step.h = output, step.h_row = at.output_row();
    step.h_before = at.h_before(p_.output, t);
    step.c_before = at.c_before(p_.kept[at.d], Cell::kept, t);
    step.dh = dh_[at.d];
    step.d_output = d_output, step.d_output_row = at.output_row();
    step.dc = dc_[at.d];
    step.around = Cell::reads_h_prev ? dh_[at.d] : nullptr;
    step.dg = dg_[at.d] + n * Cell::grads * H;
    if (p_.proj_size) {
      T* const projected = projected_[at.d] + n * hout;
      FASTSEQ_TRY(launch(add_kernel<T>, grid_of(rows, hout), dim3(kStepThreads), 0, call_.stream, dh_[at.d], hout,
                         d_output, at.output_row(), projected, hout, rows, hout));
      Product product;
      product.m = rows, product.n = H, product.k = hout;
      product.a = projected, product.a_row = hout;
      product.b = p_.weights[at.d].w_hr, product.b_row = H;
      product.c = emitted_[at.d], product.c_row = H;
      product.factors = number_type<T>(), product.result = number_type<V>();
      FASTSEQ_TRY(multiply(call_, product));
      step.dh = emitted_[at.d], step.d_output = nullptr;
    }
    FASTSEQ_TRY(launch(step_backward_kernel<Cell, T>, grid_of(rows, H), dim3(kStepThreads), 0, call_.stream, step));

    bool accumulate = Cell::reads_h_prev;
    for (const GateRun& run : Cell::hidden_runs) {
      Product product;
      product.m = rows, product.n = hout, product.k = run.count * H;
      product.a = hidden_part(at.d, run, n), product.a_row = Cell::grads * H;
      product.b = p_.weights[at.d].w_hh + run.gate * H * hout, product.b_row = hout;
      product.c = dh_[at.d], product.c_row = hout;
      product.accumulate = accumulate;
      product.factors = number_type<T>(), product.result = number_type<V>();
      FASTSEQ_TRY(multiply(call_, product));
      accumulate = true;
    }
    return cudaSuccess;
  }

  // c = dg^T b, of some gates of a direction.
  cudaError_t weight_gradient(const Direction<T>& at, const GateRun& run, const T* b, int64_t columns, T* c) {
    Product product;
    product.m = run.count * p_.hidden_size, product.n = columns, product.k = p_.schedule.total_rows();
    product.a = hidden_part(at.d, run, 0), product.a_row = Cell::grads * p_.hidden_size, product.a_transposed = true;
    product.b = b, product.b_row = columns;
    product.c = c + run.gate * p_.hidden_size * columns, product.c_row = columns;
    product.factors = product.result = number_type<T>();
    return multiply(call_, product);
  }
  cudaError_t bias_gradient(const Direction<T>& at, const GateRun& run, T* to) {
    return column_sums(hidden_part(at.d, run, 0), Cell::grads * p_.hidden_size, p_.schedule.total_rows(),
                       run.count * p_.hidden_size, to + run.gate * p_.hidden_size, call_.stream);
  }

  cudaError_t finish(const Direction<T>& at) {
    const int64_t B = p_.schedule.batch, H = p_.hidden_size, hout = p_.out_size();
    const DirectionGrads<T>& grads = p_.grads[at.d];
    if (p_.d_h0) FASTSEQ_TRY(copy(dh_[at.d], hout, at.state_at(p_.d_h0, 0, hout), hout, B, hout, call_.stream));
    if (p_.d_c0 && Cell::cell_state) FASTSEQ_TRY(copy(dc_[at.d], H, at.state_at(p_.d_c0, 0, H), H, B, H, call_.stream));

    const GateRun input_side{0, 0, Cell::gates};
    if (grads.w_ih) FASTSEQ_TRY(weight_gradient(at, input_side, p_.x, p_.input_size, grads.w_ih));
    if (grads.b_ih) FASTSEQ_TRY(bias_gradient(at, input_side, grads.b_ih));
    if (grads.w_hh) FASTSEQ_TRY(gather_h_before(at));
    for (const GateRun& run : Cell::hidden_runs) {
      if (grads.w_hh) FASTSEQ_TRY(weight_gradient(at, run, h_before_[at.d], hout, grads.w_hh));
      if (grads.b_hh) FASTSEQ_TRY(bias_gradient(at, run, grads.b_hh));
    }
    if (!grads.w_hr) return cudaSuccess;
    Product product;
    product.m = hout, product.n = H, product.k = p_.schedule.total_rows();
    product.a = projected_[at.d], product.a_row = hout, product.a_transposed = true;
    product.b = p_.emitted[at.d], product.b_row = H;
    product.c = grads.w_hr, product.c_row = H;
    product.factors = product.result = number_type<T>();
    return multiply(call_, product);
  }

  // h before each step, as rows of all steps.
  cudaError_t gather_h_before(const Direction<T>& at) {
    const int64_t hout = p_.out_size(), B = p_.schedule.batch, N = p_.schedule.total_rows();
    T* const to = h_before_[at.d];
    if (!p_.schedule.batch_sizes && N) {  // all but the first step at once: their h lie as they do
      const int64_t first = at.d == 0 ? 0 : N - B;
      FASTSEQ_TRY(copy(at.state_at(p_.h0, 0, hout), hout, to + first * hout, hout, B, hout, call_.stream));
      return copy(at.output_at(p_.output, at.d == 0 ? 0 : B), at.output_row(), to + (at.d == 0 ? B : 0) * hout, hout,
                  N - B, hout, call_.stream);
    }
    for (int64_t t = 0; t < p_.schedule.steps; ++t) {
      const Before<T> before = at.h_before(p_.output, t);
      T* const step = to + p_.schedule.offset(t) * hout;
      FASTSEQ_TRY(copy(before.going, before.going_row, step, hout, before.going_rows, hout, call_.stream));
      FASTSEQ_TRY(copy(at.state_at(p_.h0, before.going_rows, hout), hout, step + before.going_rows * hout, hout,
                       at.rows(t) - before.going_rows, hout, call_.stream));
    }
    return cudaSuccess;
  }

  cudaError_t input_gradient() {
    if (!p_.dx) return cudaSuccess;
    const int64_t I = p_.input_size, N = p_.schedule.total_rows();
    for (int d = 0; d < p_.directions; ++d) {
      Product product;
      product.m = N, product.n = I, product.k = Cell::gates * p_.hidden_size;
      product.a = dg_[d], product.a_row = Cell::grads * p_.hidden_size;
      product.b = p_.weights[d].w_ih, product.b_row = I;
      product.c = p_.dx, product.c_row = I;
      product.accumulate = d > 0;
      product.factors = product.result = number_type<T>();
      if (sums_apart()) product.c = dx_, product.result = number_type<V>();
      FASTSEQ_TRY(multiply(call_, product));
    }
    if (!sums_apart()) return cudaSuccess;
    return copy(static_cast<const V*>(dx_), I, p_.dx, I, N, I, call_.stream);
  }

  const RnnBackward<T>& p_;
  const Call& call_;
  Workspace memory_;
  T* dg_[2] = {};         // (N, grads*H)
  V* dh_[2] = {};         // (B, Hout), by way of the later step
  V* dc_[2] = {};         // (B, H)
  T* projected_[2] = {};  // (N, P): dh of the projected output
  V* emitted_[2] = {};    // (B, H): dh before the projection
  T* h_before_[2] = {};   // (N, Hout)
  V* dx_ = nullptr;       // (N, I)
};

}  // namespace

template <class T>
int64_t rnn_backward_workspace(CellKind cell, const RnnBackward<T>& p) {
  int64_t bytes = 0;
  with_cell(cell, [&](auto type) {
    bytes = LayerBackward<decltype(type), T>(p, Call()).workspace();
    return cudaSuccess;
  });
  return bytes;
}

template <class T>
cudaError_t rnn_backward(CellKind cell, const RnnBackward<T>& p, const Call& call) {
  return with_cell(cell, [&](auto type) { return LayerBackward<decltype(type), T>(p, call).run(); });
}

#define FASTSEQ_INSTANTIATE(T)                                                 \
  template int64_t rnn_backward_workspace<T>(CellKind, const RnnBackward<T>&); \
  template cudaError_t rnn_backward<T>(CellKind, const RnnBackward<T>&, const Call&);
FASTSEQ_INSTANTIATE(float)
FASTSEQ_INSTANTIATE(double)
FASTSEQ_INSTANTIATE(bfloat16)
FASTSEQ_INSTANTIATE(float16)
#undef FASTSEQ_INSTANTIATE

}  // namespace fastseq::cuda
