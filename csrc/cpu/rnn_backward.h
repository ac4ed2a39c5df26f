// The backward driver: backpropagation through time of one layer, all directions, any cell.
//
//   for each chunk of steps, last first:
//     for each step, last first:  dh = d_output + carry;  dg = Cell::update_backward;  carry += dgh W_hh
//     dx = dgx W_ih;  dW_ih += dgx^T x;  dW_hh += dgh^T h_prev;  db += column sums; one product or reduction each
//
// carry is dL/dh of a row's earlier step; at the end of the walk it is dL/dh0. A row that is not alive yet holds
// dL/dh_n.
#pragma once

// out[j] (+)= sum over rows of a[row][j], in chains of kChain rows. Strips of columns that fill a few cache lines: one
// vector at a time would touch every page of a once for each vector.
template <class T>
void column_sums(int threads, const T* a, int64_t lda, int64_t rows, int64_t columns, bool accumulate,
                 Compute<T>* out) {
  using V = Vec<Compute<T>>;
  constexpr int kStrip = 8;
  constexpr int64_t kWidth = kStrip * V::size;
  const int64_t strips = (columns + kWidth - 1) / kWidth;
  parallel_for(rows * columns >= kNumbersToShare ? threads : 1, strips, [&](int64_t i) {
    const int64_t j0 = i * kWidth, wide = columns - j0 < kWidth ? columns - j0 : kWidth;
    const int vectors = static_cast<int>((wide + V::size - 1) / V::size);
    V totals[kStrip];
    for (int s = 0; s < vectors; ++s)
      totals[s] = accumulate ? V::load(out + j0 + s * V::size, wide - s * V::size) : V(0);
    for (int64_t r0 = 0; r0 < rows; r0 += kChain) {
      const int64_t r1 = r0 + kChain < rows ? r0 + kChain : rows;
      V sums[kStrip] = {V(0), V(0), V(0), V(0), V(0), V(0), V(0), V(0)};
      if (wide == kWidth) {
        for (int64_t r = r0; r < r1; ++r)
#pragma GCC unroll 8
          for (int s = 0; s < kStrip; ++s) sums[s] = sums[s] + V::load(a + r * lda + j0 + s * V::size);
      } else {
        for (int64_t r = r0; r < r1; ++r)
          for (int s = 0; s < vectors; ++s)
            sums[s] = sums[s] + V::load(a + r * lda + j0 + s * V::size, wide - s * V::size);
      }
      for (int s = 0; s < vectors; ++s) totals[s] = totals[s] + sums[s];
    }
    for (int s = 0; s < vectors; ++s) totals[s].store(out + j0 + s * V::size, wide - s * V::size);
  });
}

template <class Cell, class T>
class BackwardDirection {
 public:
  using A = Compute<T>;
  using V = Vec<A>;
  using Shape = PanelShape<T, 1>;
  static constexpr bool kSameType = sizeof(A) == sizeof(T);

  void prepare(const RnnBackward<T>& p, int direction, int64_t chunk_steps) {
    p_ = &p;
    d_ = direction;
    walk_ = {&p.schedule, direction == 1};
    w_ = p.weights[direction];
    H_ = p.hidden_size;
    GH_ = Cell::gates * H_;
    hout_ = p.out_size();
    ldo_ = p.directions * hout_;
    ldg_ = Cell::grads * H_;
    const int64_t B = p.schedule.batch;
    const int64_t chunk_rows = (chunk_steps < p.schedule.steps ? chunk_steps : p.schedule.steps) * B;
    dg_.allocate(chunk_rows * ldg_);
    d_h0_.open(p.d_h0 ? p.d_h0 + d_ * B * hout_ : nullptr, B * hout_, true);
    carry_ = d_h0_.get();
    copy_or_zero(carry_, p.d_h_n ? p.d_h_n + d_ * B * hout_ : nullptr, B * hout_);
    if (Cell::cell_state) {
      d_c0_.open(p.d_c0 ? p.d_c0 + d_ * B * H_ : nullptr, B * H_, true);
      dc_ = d_c0_.get();
      copy_or_zero(dc_, p.d_c_n ? p.d_c_n + d_ * B * H_ : nullptr, B * H_);
    }
    zeros_.zeros(H_ > hout_ ? H_ : hout_);
    packed_ = packs(p);
    hidden_.prepare(w_.w_hh, hout_, hout_, GH_, packed_);
    if (p.proj_size) {
      d_projected_.allocate(chunk_rows * hout_);
      projection_.prepare(w_.w_hr, H_, H_, hout_, packed_);
    }
    const DirectionGrads<T>& grads = p.grads[d_];
    d_w_ih_.open(grads.w_ih, GH_ * p.input_size);
    d_w_hh_.open(grads.w_hh, GH_ * hout_);
    d_b_ih_.open(grads.b_ih, GH_);
    d_b_hh_.open(grads.b_hh, GH_);
    d_w_hr_.open(grads.w_hr, hout_ * H_);
    if (p.schedule.batch_sizes && grads.w_hh) h_prev_.allocate(chunk_rows * hout_);
    int64_t k = 0;
    for (const GateRun& run : Cell::hidden_runs) runs_[k++] = {run.plane * H_, run.count * H_};
  }

  static Work work(const RnnLayer<T>& p) {
    const Schedule& schedule = p.schedule;
    const int64_t hout = p.out_size();
    return {Cell::gates * p.hidden_size * hout,
            schedule.total_rows(),
            StepWeights<1, T, false>::parts(hout, schedule.batch),
            !packs(p),
            kWeightsToStreamBackward,
            kWeightsOfFewRows,
            kWorkToShareUnitsBackward};
  }
  static bool packs(const RnnLayer<T>& p) {
    return p.schedule.steps >= kStepsToPack || p.schedule.batch >= kRowsToPack;
  }
  int64_t panels() const { return hidden_.panels() + projection_.panels() + w_ih_panels_; }
  void pack(int64_t i) {
    if (i < hidden_.panels()) return hidden_.pack(i);
    i -= hidden_.panels();
    if (i < projection_.panels()) return projection_.pack(i);
    i -= projection_.panels();
    gemm_pack_panel<1>(p_->input_size, GH_, rows_of(w_.w_ih, p_->input_size), i, w_ih_memory_.get());
  }

  // Where one thread has the layer, and the layer below waits for its dx.
  void plan_wave(int64_t steps) {
    const GemmPanels<T> layout(p_->input_size, GH_);
    w_ih_panels_ = layout.blocks * layout.panels;
    w_ih_memory_.allocate(layout.numbers());
    if (!kSameType) dx_memory_.allocate(steps * p_->schedule.batch * p_->input_size);
  }

  void begin_chunk(int64_t s0, int64_t s1) { rows_ = walk_.packed_rows(s0, s1); }

  void run(int64_t s0, int64_t s1, Range mine, Share share, Barrier& barrier) {
    Range units, outputs;
    const auto take = [&] {
      const int64_t rows = mine.end - mine.begin;
      outputs = hidden_.part_of(share, rows);
      units = p_->proj_size ? projection_.part_of(share, rows) : outputs;
    };
    take();
    const auto meet = [&] {  // as in ForwardDirection::run
      if (!barrier.wait(share)) return true;
      if (share.member != 0) return false;
      share = {0, 1};
      take();
      return true;
    };
    for (int64_t s = s1 - 1; s >= s0; --s) {
      const int64_t t = walk_.time(s);
      Segment pieces[2];
      const int n = segments(walk_, t, mine, pieces);
      const Range rows = n ? Range{pieces[0].rows.begin, pieces[n - 1].rows.end} : Range{0, 0};
      if (p_->proj_size) {
        add_output_gradient(t, rows, outputs);
        if (!meet()) return;
      }
      for (int i = 0; i < n; ++i) step(t, pieces[i], units);
      if (!meet()) return;
      // Past the first step of the walk the product is dL/dh0, which nobody may have asked for.
      if (s > 0 || p_->d_h0) carry_back(t, rows, outputs, share.members > 1);
    }
  }

  // dx of steps [s0, s1), of a layer that plan_wave() was called for.
  void input_gradient(int64_t s0, int64_t s1) {
    const Range rows = walk_.packed_rows(s0, s1);
    const int64_t count = rows.end - rows.begin, I = p_->input_size;
    T* const to = p_->dx + rows.begin * I;
    A* dx = dx_memory_.get();
    if constexpr (kSameType) dx = to;
    gemm(1, count, I, GH_, rows_of(dg_row(rows.begin), ldg_), rows_of(w_.w_ih, I), false, dx, I, w_ih_memory_.get());
    if (!kSameType) copy_or_zero(to, dx, count * I);
  }

  // What the chunk's dg gives, one product or reduction each; `first` overwrites, later chunks add. Those that are too
  // small for a team are done side by side, as soon as they are worth it where the steps were shared and each thread
  // has some of dg already.
  void gradients(bool first, A* dx, bool add_to_dx, bool steps_shared) {
    // dgh is dgx.
    const bool one_bias = Cell::runs == 1 && Cell::grads == Cell::gates && d_b_ih_.get() && d_b_hh_.get();
    int small[kGradients];
    int64_t count = 0, work = 0;
    for (int which = 0; which < kGradients; ++which) {
      if (!(which == kInput ? dx : sum_of(which)) || (which == kBiasHh && one_bias)) continue;
      const Size size = size_of(which);
      if (gemm_team(p_->threads, size.m, size.n, size.k) > 1) {
        gradient(which, p_->threads, first, dx, add_to_dx);
      } else {
        small[count++] = which;
        work += size.m * size.n * size.k;
      }
    }
    const bool shared = work >= (steps_shared ? kGemmToShare : kGradientsToShare);
    const auto worker = [&](int64_t i) { gradient(small[i], 1, first, dx, add_to_dx); };
    parallel_tasks(shared ? p_->threads : 1, count, [&] { return worker; }, true);
    if (one_bias) memcpy(d_b_hh_.get(), d_b_ih_.get(), GH_ * sizeof(A));
  }

  void finish_weights() {
    for (Result<T>* result : {&d_w_ih_, &d_w_hh_, &d_b_ih_, &d_b_hh_, &d_w_hr_}) result->close(p_->threads);
  }
  void finish_states() {
    for (Result<T>* result : {&d_h0_, &d_c0_}) result->close(p_->threads);
  }

 private:
  const T* output_row(int64_t n) const { return p_->output + n * ldo_ + d_ * hout_; }
  T* dg_row(int64_t n) const { return dg_.get() + (n - rows_.begin) * ldg_; }
  const T* initial_h() const { return p_->h0 ? p_->h0 + d_ * p_->schedule.batch * hout_ : nullptr; }
  const T* initial_c() const { return p_->c0 ? p_->c0 + d_ * p_->schedule.batch * H_ : nullptr; }

  // dh of the projected output, kept for dW_hr.
  void add_output_gradient(int64_t t, Range rows, Range outputs) {
    const int64_t n0 = p_->schedule.offset(t);
    const int64_t j0 = outputs.begin * V::size, j1 = outputs.end * V::size;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      A* carry = carry_ + r * hout_;
      T* to = d_projected_.get() + (n0 + r - rows_.begin) * hout_;
      const T* d_output = p_->d_output ? p_->d_output + (n0 + r) * ldo_ + d_ * hout_ : zeros_.get();
      for (int64_t j = j0; j < (j1 < hout_ ? j1 : hout_); j += V::size) {
        const int64_t valid = hout_ - j;
        (V::load(carry + j, valid) + V::load(d_output + j, valid)).store(to + j, valid);
        V(0).store(carry + j, valid);
      }
    }
  }

  void step(int64_t t, const Segment& piece, Range units) {
    const int64_t n0 = p_->schedule.offset(t);
    const int64_t from = p_->schedule.offset(walk_.previous(t).from);
    // Where a row's predecessor keeps h and c; row r is at + r * ld.
    const T* h_prev = piece.initial ? initial_h() : output_row(from);
    const int64_t ldh = piece.initial ? hout_ : ldo_;
    const T* c_prev = nullptr;
    int64_t ldc = 0;
    if constexpr (Cell::cell_state) {
      c_prev = piece.initial ? initial_c() : p_->kept[d_] + from * Cell::kept * H_ + (Cell::kept - 1) * H_;
      ldc = piece.initial ? H_ : Cell::kept * H_;
    }
    const auto pointwise = [&](int64_t r, int64_t j, V dh) {
      update_backward(
          n0 + r, r, j, dh, h_prev ? h_prev + r * ldh : zeros_.get(), c_prev ? c_prev + r * ldc : zeros_.get());
    };
    if (p_->proj_size) {
      for_each_emitted_gradient(n0, piece.rows, units, pointwise);
      return;
    }
    const int64_t j0 = units.begin * V::size, j1 = units.end * V::size;
    for (int64_t r = piece.rows.begin; r < piece.rows.end; ++r) {
      const T* d_output = p_->d_output ? p_->d_output + (n0 + r) * ldo_ + d_ * hout_ : zeros_.get();
      for (int64_t j = j0; j < (j1 < H_ ? j1 : H_); j += V::size) {
        const int64_t valid = H_ - j;
        pointwise(r, j, V::load(d_output + j, valid) + V::load(carry_ + r * hout_ + j, valid));
      }
    }
  }

  // dL/dm = dh W_hr, handed on a vector at a time.
  template <class Use>
  void for_each_emitted_gradient(int64_t n0, Range rows, Range units, const Use& use) {
    const T* dh = d_projected_.get() + (n0 - rows_.begin) * hout_;
    const KPiece k[1] = {{0, hout_}};
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRowBlock) {
      const int64_t count = rows.end - r0 < kRowBlock ? rows.end - r0 : kRowBlock;
      projection_.for_each_block(
          dh + r0 * hout_, hout_, count, k, 1, units, false,
          [&](int64_t first, int vectors, const A* sums, int64_t ld_sums) {
            for (int64_t i = 0; i < count; ++i)
              for (int u = 0; u < vectors; ++u)
                use(r0 + i, (first + u) * V::size, V::load(sums + i * ld_sums + Shape::place_of_vector(u)));
          });
    }
  }

  // As ForwardDirection::update: whole vectors have code of their own.
  FASTSEQ_INLINE void update_backward(int64_t n, int64_t r, int64_t j, V dh, const T* h_prev, const T* c_prev) {
    if (H_ - j >= V::size) {
      update_lanes(n, r, j, V::size, dh, h_prev, c_prev);
    } else {
      update_lanes(n, r, j, H_ - j, dh, h_prev, c_prev);
    }
  }
  FASTSEQ_INLINE void update_lanes(int64_t n, int64_t r, int64_t j, int64_t valid, V dh, const T* h_prev,
                                   const T* c_prev) {
    V keep[Cell::kept + 1], dg[Cell::grads], h(0), before(0), c_before(0), dc(0);
    const T* kept = p_->kept[d_] + n * Cell::kept * H_ + j;
    for (int k = 0; k < Cell::kept; ++k) keep[k] = V::load(kept + k * H_, valid);
    if constexpr (Cell::reads_h) h = V::load(output_row(n) + j, valid);
    if constexpr (Cell::reads_h_prev) before = V::load(h_prev + j, valid);
    if constexpr (Cell::cell_state) {
      c_before = V::load(c_prev + j, valid);
      dc = V::load(dc_ + r * H_ + j, valid);
    }
    const V direct = Cell::update_backward(keep, h, before, c_before, dh, dc, dg);
    for (int k = 0; k < Cell::grads; ++k) dg[k].store(dg_row(n) + k * H_ + j, valid);
    if constexpr (Cell::cell_state) dc.store(dc_ + r * H_ + j, valid);
    if (!p_->proj_size) direct.store(carry_ + r * hout_ + j, valid);
  }

  void carry_back(int64_t t, Range rows, Range outputs, bool shared) {
    const T* dg = dg_row(p_->schedule.offset(t));
    if (shared) ask_for(dg + rows.begin * ldg_, ldg_, rows.end - rows.begin, ldg_);
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRowBlock) {
      const int64_t count = rows.end - r0 < kRowBlock ? rows.end - r0 : kRowBlock;
      hidden_.for_each_block(dg + r0 * ldg_, ldg_, count, runs_, Cell::runs, outputs, t % 2 == 1,
                             [&](int64_t first, int vectors, const A* sums, int64_t ld_sums) {
                               for (int64_t i = 0; i < count; ++i)
                                 for (int u = 0; u < vectors; ++u) {
                                   const int64_t j = (first + u) * V::size, valid = hout_ - j;
                                   A* carry = carry_ + (r0 + i) * hout_ + j;
                                   const V sum = V::load(sums + i * ld_sums + Shape::place_of_vector(u));
                                   (V::load(carry, valid) + sum).store(carry, valid);
                                 }
                             });
    }
  }

  // What a chunk's dg gives.
  enum Gradient { kWeightIh, kWeightHh, kWeightHr, kInput, kBiasIh, kBiasHh, kGradients };
  struct Size {
    int64_t m, n, k;
  };
  Size size_of(int which) const {
    const int64_t rows = rows_.end - rows_.begin, I = p_->input_size;
    switch (which) {
      case kInput:
        return {rows, I, GH_};
      case kWeightIh:
        return {GH_, I, rows};
      case kWeightHh:
        return {GH_, hout_, rows};
      case kWeightHr:
        return {hout_, H_, rows};
      default:
        return {1, GH_, rows};
    }
  }
  A* sum_of(int which) const {
    const Result<T>* const all[kGradients] = {&d_w_ih_, &d_w_hh_, &d_w_hr_, nullptr, &d_b_ih_, &d_b_hh_};
    return all[which] ? all[which]->get() : nullptr;
  }
  void gradient(int which, int threads, bool first, A* dx, bool add_to_dx) {
    const int64_t rows = rows_.end - rows_.begin, I = p_->input_size;
    switch (which) {
      case kInput:
        gemm(threads, rows, I, GH_, rows_of(dg_.get(), ldg_), rows_of(w_.w_ih, I), add_to_dx, dx + rows_.begin * I, I);
        break;
      case kWeightIh:
        gemm(threads, GH_, I, rows, columns_of(dg_.get(), ldg_), rows_of(p_->x + rows_.begin * I, I), !first,
             d_w_ih_.get(), I);
        break;
      case kWeightHh:
        weight_hh(threads, first, d_w_hh_.get());
        break;
      case kWeightHr:
        gemm(threads, hout_, H_, rows, columns_of(d_projected_.get(), hout_),
             rows_of(p_->emitted[d_] + rows_.begin * H_, H_), !first, d_w_hr_.get(), H_);
        break;
      case kBiasIh:
        column_sums(threads, dg_.get(), ldg_, rows, GH_, !first, d_b_ih_.get());
        break;
      case kBiasHh:
        for (const GateRun& run : Cell::hidden_runs)
          column_sums(
              threads, dg_.get() + run.plane * H_, ldg_, rows, run.count * H_, !first, d_b_hh_.get() + run.gate * H_);
        break;
    }
  }

  void weight_hh(int threads, bool first, A* out) {
    const Schedule& schedule = p_->schedule;
    const int64_t B = schedule.batch;
    if (schedule.batch_sizes) {  // a row's predecessor is at no fixed distance: gather
      for (int64_t t = 0; t < schedule.steps; ++t) {
        const int64_t n0 = schedule.offset(t);
        if (n0 < rows_.begin || n0 >= rows_.end) continue;
        const Walk::Previous before = walk_.previous(t);
        for (int64_t r = 0; r < schedule.rows(t); ++r) {
          const T* from = r < before.carried ? output_row(schedule.offset(before.from) + r)
                          : initial_h()      ? initial_h() + r * hout_
                                             : zeros_.get();
          memcpy(h_prev_.get() + (n0 + r - rows_.begin) * hout_, from, hout_ * sizeof(T));
        }
      }
      accumulate_hh(threads, rows_.begin, rows_.end - rows_.begin, h_prev_.get(), hout_, !first, out);
      return;
    }
    // Dense: h_prev of packed row n is output row n -+ B, but for the first step of the walk.
    const int64_t edge = walk_.reverse ? (schedule.steps - 1) * B : 0;  // first packed row of that step
    const bool has_edge = rows_.begin <= edge && edge < rows_.end;
    bool accumulate = !first;
    if (has_edge && initial_h()) {
      accumulate_hh(threads, edge, B, initial_h(), hout_, accumulate, out);
      accumulate = true;
    }
    const int64_t begin = has_edge && !walk_.reverse ? B : rows_.begin;
    const int64_t end = has_edge && walk_.reverse ? edge : rows_.end;
    if (end > begin) {
      accumulate_hh(
          threads, begin, end - begin, output_row(walk_.reverse ? begin + B : begin - B), ldo_, accumulate, out);
    } else if (!accumulate) {
      memset(out, 0, GH_ * hout_ * sizeof(A));
    }
  }
  void accumulate_hh(int threads, int64_t n, int64_t rows, const T* h_prev, int64_t ldh, bool accumulate, A* out) {
    for (const GateRun& run : Cell::hidden_runs)
      gemm(threads, run.count * H_, hout_, rows, columns_of(dg_row(n) + run.plane * H_, ldg_), rows_of(h_prev, ldh),
           accumulate, out + run.gate * H_ * hout_, hout_);
  }

  const RnnBackward<T>* p_ = nullptr;
  int d_ = 0;
  Walk walk_{};
  DirectionWeights<T> w_;
  int64_t H_ = 0, GH_ = 0, hout_ = 0, ldo_ = 0, ldg_ = 0;
  bool packed_ = false;
  int64_t w_ih_panels_ = 0;
  Range rows_{};                        // packed rows of the chunk
  A *carry_ = nullptr, *dc_ = nullptr;  // (B, Hout), (B, H): where the walk ends, dL/dh0 and dL/dc0
  KPiece runs_[Cell::runs];
  StepWeights<1, T, false> hidden_, projection_;
  Result<T> d_h0_, d_c0_, d_w_ih_, d_w_hh_, d_b_ih_, d_b_hh_, d_w_hr_;
  Workspace<T> dg_, d_projected_, zeros_, h_prev_, w_ih_memory_;
  Workspace<A> dx_memory_;
};

// Steps whose dg is kept.
template <class Cell, class T>
int64_t backward_chunk(const RnnBackward<T>& p) {
  const int64_t row_bytes = Cell::grads * p.hidden_size * sizeof(T);
  const int64_t part = p.schedule.batch < kRowsToShareUnits ? 2 : 1;  // layers of a wave have one each
  return steps_per_chunk(p.schedule.batch, row_bytes, kBackwardChunkBytes / part, kBackwardChunkRows / part);
}

template <class Cell, class T>
void layer_backward(const RnnBackward<T>& p) {
  BackwardDirection<Cell, T> directions[2];
  const int64_t T_ = p.schedule.steps;
  const int64_t chunk = backward_chunk<Cell>(p);
  for (int d = 0; d < p.directions; ++d) directions[d].prepare(p, d, chunk);
  if (p.schedule.total_rows() > 0 && p.hidden_size > 0) {
    const int64_t panels = directions[0].panels();
    parallel_for(p.threads, panels * p.directions, [&](int64_t i) { directions[i / panels].pack(i % panels); });
    // The directions reach a chunk's rows at different times: then both add to zeros.
    const bool dx_from_zero = p.directions == 2 && chunk < T_;
    Result<T> dx;
    dx.open(p.dx, p.schedule.total_rows() * p.input_size);
    if (p.dx && dx_from_zero) memset(dx.get(), 0, p.schedule.total_rows() * p.input_size * sizeof(Compute<T>));
    RowShares shares[2];
    const Work work = BackwardDirection<Cell, T>::work(p);
    const Plan plan = make_plan(p.threads, p.directions, p.schedule.batch, work);
    const bool steps_shared = plan.tasks() * plan.members > 1;
    const int64_t piece = steps_to_measure<T>(plan, p.schedule, work);
    for (int64_t s1 = T_; s1 > 0; s1 -= chunk) {
      const int64_t s0 = s1 > chunk ? s1 - chunk : 0;
      for (int d = 0; d < p.directions; ++d) directions[d].begin_chunk(s0, s1);
      for (int64_t end = s1; end > s0; end -= piece) {
        const int64_t begin = end - s0 > piece ? end - piece : s0;
        run_plan(p.threads, p.schedule, {begin, end}, p.directions, work, shares,
                 [&](int d, Range rows, Share share, Barrier& barrier) {
                   directions[d].run(begin, end, rows, share, barrier);
                 });
      }
      for (int d = 0; d < p.directions; ++d)
        directions[d].gradients(s1 == T_, dx.get(), dx_from_zero || d == 1, steps_shared);
    }
    dx.close(p.threads);
    for (int d = 0; d < p.directions; ++d) directions[d].finish_weights();
  }
  for (int d = 0; d < p.directions; ++d) directions[d].finish_states();
}
