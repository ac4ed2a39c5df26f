// The forward of a layer: gx of some steps by one product, then these steps, in one launch (rnn_persistent.cuh) or each
// by a product with W_hh and a kernel that does the rest (rnn_steps.cuh).
#include "rnn.h"

#include "rnn_layer.h"
#include "rnn_persistent.cuh"

namespace fastseq::cuda {

namespace {

// Of gx of all directions together: what a call's workspace is made of, mostly.
constexpr int64_t kProjectedBytes = int64_t(256) << 20;

template <class Cell, class T>
class LayerForward {
 public:
  using V = Computed<T>;

  LayerForward(const RnnForward<T>& p, const Call& call) : p_(p), call_(call), memory_(call.workspace) {
    const int64_t D = p.directions, B = p.schedule.batch, H = p.hidden_size;
    const int64_t step_bytes = D * B * Cell::gates * H * static_cast<int64_t>(sizeof(V));
    chunk_ = step_bytes ? kProjectedBytes / step_bytes : p.schedule.steps;
    chunk_ = chunk_ < 1 ? 1 : chunk_ < p.schedule.steps ? chunk_ : p.schedule.steps;
    for (int64_t d = 0; d < D; ++d) {
      gx_[d] = memory_.take<V>(chunk_ * B * Cell::gates * H);
      gh_[d] = memory_.take<V>(B * Cell::gates * H);
      if (Cell::cell_state) c_[d] = memory_.take<V>(B * H);
      if (p.proj_size && !p.emitted[d]) emitted_[d] = memory_.take<T>(B * H);
    }
  }

  int64_t workspace() const { return memory_.bytes(); }

  cudaError_t run() {
    RnnSizes sizes = sizes_of(p_, call_, Cell::gates);
    sizes.aligned = aligned(p_.output, p_.h0);
    RnnPlan plan;
    FASTSEQ_TRY(choose(call_, sizes, plan_rnn_forward, plan));
    for (int d = 0; d < p_.directions; ++d) FASTSEQ_TRY(start(direction(d)));
    for (int64_t begin = 0; begin < p_.schedule.steps; begin += chunk_) {
      const int64_t end = begin + chunk_ < p_.schedule.steps ? begin + chunk_ : p_.schedule.steps;
      for (int d = 0; d < p_.directions; ++d) FASTSEQ_TRY(project(direction(d), begin, end));
      if (plan.persistent) {
        FASTSEQ_TRY(advance_all(plan, begin, end));
        continue;
      }
      for (int64_t step = begin; step < end; ++step)
        for (int d = 0; d < p_.directions; ++d) FASTSEQ_TRY(advance(direction(d), direction(d).time(step)));
    }
    for (int d = 0; d < p_.directions; ++d) FASTSEQ_TRY(finish(direction(d)));
    return cudaSuccess;
  }

 private:
  Direction<T> direction(int d) const { return {p_, d}; }

  cudaError_t start(const Direction<T>& at) {
    if (!Cell::cell_state) return cudaSuccess;
    const int64_t B = p_.schedule.batch, H = p_.hidden_size;
    return copy(at.state_at(p_.c0, 0, H), H, c_[at.d], H, B, H, call_.stream);
  }

  // gx of steps [begin, end).
  cudaError_t project(const Direction<T>& at, int64_t begin, int64_t end) {
    const int64_t t0 = at.d == 0 ? begin : p_.schedule.steps - end, t1 = t0 + end - begin;
    projected_[at.d] = p_.schedule.offset(t0);
    Product product;
    product.m = p_.schedule.offset(t1) - projected_[at.d], product.n = Cell::gates * p_.hidden_size;
    product.k = p_.input_size;
    product.a = p_.x + projected_[at.d] * p_.input_size, product.a_row = p_.input_size;
    product.b = p_.weights[at.d].w_ih, product.b_row = p_.input_size, product.b_transposed = true;
    product.c = gx_[at.d], product.c_row = product.n;
    product.factors = number_type<T>(), product.result = number_type<V>();
    return multiply(call_, product);
  }

  // Steps [begin, end) of all directions in one launch.
  cudaError_t advance_all(const RnnPlan& plan, int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<T, double>) {
      return cudaErrorNotSupported;
    } else {
      PersistentForward<T> p{};
      p.begin = begin, p.end = end;
      p.schedule = device_schedule(p_, call_), p.hidden = p_.hidden_size, p.directions = p_.directions;
      p.output = p_.output;
      for (int d = 0; d < p_.directions; ++d) {
        p.gx[d] = gx_[d], p.projected[d] = projected_[d], p.c[d] = c_[d], p.kept[d] = p_.kept[d];
        p.h0[d] = direction(d).state_at(p_.h0, 0, p_.hidden_size);
        p.w_hh[d] = p_.weights[d].w_hh, p.b_ih[d] = p_.weights[d].b_ih, p.b_hh[d] = p_.weights[d].b_hh;
      }
      return with_tile<Cell, T, kForwardThreads>(plan.tile, [&](auto units, auto rows, auto holds) {
        const auto run = [&](auto kernel) {
          return launch<true>(
              kernel, plan.grid, dim3(kForwardThreads), static_cast<std::size_t>(plan.shared), call_.stream, p);
        };
        if constexpr (!kHalf<T>)
          if (!call_.tf32) return run(persistent_forward_kernel<Cell, T, true, units(), rows(), holds()>);
        return run(persistent_forward_kernel<Cell, T, false, units(), rows(), holds()>);
      });
    }
  }

  cudaError_t advance(const Direction<T>& at, int64_t t) {
    const int64_t H = p_.hidden_size, GH = Cell::gates * H, hout = p_.out_size(), rows = at.rows(t);
    const int64_t n = p_.schedule.offset(t);
    StepForward<T> step;
    step.rows = rows, step.hidden = H;
    step.gx = gx_[at.d] + (n - projected_[at.d]) * GH;
    step.gh = gh_[at.d];
    step.h_before = at.h_before(p_.output, t);
    const Before<T>& before = step.h_before;
    step.gh_rows = before.initial ? rows : before.going_rows;

    Product product;
    product.n = GH, product.k = hout;
    product.b = p_.weights[at.d].w_hh, product.b_row = hout, product.b_transposed = true;
    product.c_row = GH;
    product.factors = number_type<T>(), product.result = number_type<V>();
    product.m = before.going_rows;
    product.a = before.going, product.a_row = before.going_row, product.c = gh_[at.d];
    FASTSEQ_TRY(multiply(call_, product));
    product.m = step.gh_rows - before.going_rows;
    product.a = before.initial ? before.initial + before.going_rows * hout : nullptr, product.a_row = hout;
    product.c = gh_[at.d] + before.going_rows * GH;
    FASTSEQ_TRY(multiply(call_, product));

    step.b_ih = p_.weights[at.d].b_ih, step.b_hh = p_.weights[at.d].b_hh;
    step.c = c_[at.d];
    T* const output = at.output_at(p_.output, n);
    T* const emitted = p_.emitted[at.d] ? p_.emitted[at.d] + n * H : emitted_[at.d];
    step.h = p_.proj_size ? emitted : output, step.h_row = p_.proj_size ? H : at.output_row();
    step.kept = p_.kept[at.d] ? p_.kept[at.d] + n * Cell::kept * H : nullptr;
    FASTSEQ_TRY(launch(step_forward_kernel<Cell, T>, grid_of(rows, H), dim3(kStepThreads), 0, call_.stream, step));
    if (!p_.proj_size) return cudaSuccess;

    Product projection;
    projection.m = rows, projection.n = p_.proj_size, projection.k = H;
    projection.a = emitted, projection.a_row = H;
    projection.b = p_.weights[at.d].w_hr, projection.b_row = H, projection.b_transposed = true;
    projection.c = output, projection.c_row = at.output_row();
    projection.factors = projection.result = number_type<T>();
    return multiply(call_, projection);
  }

  cudaError_t finish(const Direction<T>& at) {
    const int64_t B = p_.schedule.batch, H = p_.hidden_size, hout = p_.out_size();
    if (p_.c_n && Cell::cell_state) FASTSEQ_TRY(copy(c_[at.d], H, at.state_at(p_.c_n, 0, H), H, B, H, call_.stream));
    if (!p_.h_n) return cudaSuccess;
    return for_each_end(at, [&](int64_t first, int64_t end, int64_t t) {
      const T* const from = t < 0 ? at.state_at(p_.h0, first, hout)
                                  : at.output_at(static_cast<const T*>(p_.output), p_.schedule.offset(t) + first);
      const int64_t row = t < 0 ? hout : at.output_row();
      return copy(from, row, at.state_at(p_.h_n, first, hout), hout, end - first, hout, call_.stream);
    });
  }

  const RnnForward<T>& p_;
  const Call& call_;
  Workspace memory_;
  int64_t chunk_;              // steps whose gx is there at once
  int64_t projected_[2] = {};  // the row of all steps at which gx begins
  V* gx_[2] = {};
  V* gh_[2] = {};
  V* c_[2] = {};
  T* emitted_[2] = {};
};

}  // namespace

CellFacts cell_facts(CellKind cell) {
  switch (cell) {
#define X(name, type)  \
  case CellKind::name: \
    return {#name, type::gates, type::kept, type::cell_state};
    FASTSEQ_FOR_EACH_CELL(X)
#undef X
    case CellKind::count:
      break;
  }
  return {};
}

template <class T>
int64_t rnn_forward_workspace(CellKind cell, const RnnForward<T>& p) {
  int64_t bytes = 0;
  with_cell(cell, [&](auto type) {
    bytes = LayerForward<decltype(type), T>(p, Call()).workspace();
    return cudaSuccess;
  });
  return bytes;
}

template <class T>
cudaError_t rnn_forward(CellKind cell, const RnnForward<T>& p, const Call& call) {
  return with_cell(cell, [&](auto type) { return LayerForward<decltype(type), T>(p, call).run(); });
}

#define FASTSEQ_INSTANTIATE(T)                                               \
  template int64_t rnn_forward_workspace<T>(CellKind, const RnnForward<T>&); \
  template cudaError_t rnn_forward<T>(CellKind, const RnnForward<T>&, const Call&);
FASTSEQ_INSTANTIATE(float)
FASTSEQ_INSTANTIATE(double)
FASTSEQ_INSTANTIATE(bfloat16)
FASTSEQ_INSTANTIATE(float16)
#undef FASTSEQ_INSTANTIATE

}  // namespace fastseq::cuda
