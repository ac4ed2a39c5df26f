// The forward driver: one layer, all directions, any cell.
//
//   for each chunk of steps:   gx = x W_ih^T, one product a direction
//                              for each step: gh = h W_hh^T a block of units at a time, Cell::update on the sums, h
//                              stored
//
// Threads share rows when there are enough, else units, with a barrier a step (rnn_driver.h). Of a few steps the
// weights are not packed, gx is computed in the same region as the steps, and threads share units alone.
#pragma once

// The weights of a direction as the steps and the input projection take them packed, one after another: W_hh, W_hr,
// W_ih.
template <class Cell, class T>
struct PackedDirection {
  using Hidden = StepWeights<Cell::gates, T, true>;
  using Projection = StepWeights<1, T, true>;
  int64_t w_hr, w_ih, numbers;  // where they begin, and all of it

  explicit PackedDirection(const RnnLayer<T>& p) {
    w_hr = Hidden::packed_numbers(p.hidden_size, p.out_size());
    w_ih = w_hr + (p.proj_size ? Projection::packed_numbers(p.proj_size, p.hidden_size) : 0);
    numbers = w_ih + GemmPanels<T>(Cell::gates * p.hidden_size, p.input_size).numbers();
  }
};

template <class Cell, class T>
int64_t rnn_packed_numbers(const RnnLayer<T>& p) {
  return PackedDirection<Cell, T>(p).numbers;
}

template <class Cell, class T>
void rnn_pack(const RnnLayer<T>& p, int direction, T* to) {
  const PackedDirection<Cell, T> at(p);
  const DirectionWeights<T>& w = p.weights[direction];
  const auto pack = [&](auto weights, const T* from, int64_t n, int64_t k, T* panels) {
    weights.prepare(from, k, n, k, true, panels);
    parallel_for(p.threads, weights.blocks(),
                 [&](int64_t j) { weights.pack(j, panels + j * decltype(weights)::Shape::panel_numbers(k)); });
  };
  pack(typename PackedDirection<Cell, T>::Hidden(), w.w_hh, p.hidden_size, p.out_size(), to);
  if (p.proj_size)
    pack(typename PackedDirection<Cell, T>::Projection(), w.w_hr, p.proj_size, p.hidden_size, to + at.w_hr);
  gemm_pack(p.threads, Cell::gates * p.hidden_size, p.input_size, columns_of(w.w_ih, p.input_size), to + at.w_ih);
}

template <class Cell, class T>
class ForwardDirection {
 public:
  static_assert(Cell::kept == 0 || Cell::kept >= Cell::gates, "the kept planes take the place of gx");
  // Whether numbers are computed in the type in which they are stored. Otherwise gx, and c from step to step, have
  // memory of their own.
  static constexpr bool kSameType = sizeof(Compute<T>) == sizeof(T);
  using A = Compute<T>;
  using V = Vec<A>;
  using Hidden = PanelShape<T, Cell::gates>;
  using Projection = PanelShape<T, 1>;

  void prepare(const RnnForward<T>& p, int direction) {
    p_ = &p;
    d_ = direction;
    walk_ = {&p.schedule, direction == 1};
    w_ = p.weights[direction];
    H_ = p.hidden_size;
    hout_ = p.out_size();
    ldo_ = p.directions * hout_;
    packed_ = p.schedule.nominal_steps() >= kStepsToPack;
    const int64_t B = p.schedule.batch;
    const T* ready = packed_ ? p.packed[d_] : nullptr;
    const PackedDirection<Cell, T> at(p);
    hidden_.prepare(w_.w_hh, hout_, H_, hout_, packed_, ready);
    if (!packed_) input_.prepare(w_.w_ih, p.input_size, H_, p.input_size, false);
    if (p.proj_size) projection_.prepare(w_.w_hr, H_, hout_, H_, packed_, ready ? ready + at.w_hr : nullptr);
    panels_w_ih_ = ready ? ready + at.w_ih : nullptr;
    if (Cell::cell_state) {
      if constexpr (kSameType) c_ = p.c_n ? p.c_n + d_ * B * H_ : nullptr;
      if (!c_) c_ = c_memory_.allocate(B * H_);
      copy_or_zero(c_, p.c0 ? p.c0 + d_ * B * H_ : nullptr, B * H_);
    }
    const int64_t gate_zeros = w_.b_ih && w_.b_hh ? 0 : Cell::gates * H_, state_zeros = p.h0 ? 0 : B * hout_;
    zeros_.zeros(gate_zeros > state_zeros ? gate_zeros : state_zeros);
    b_ih_ = w_.b_ih ? w_.b_ih : zeros_.get();
    b_hh_ = w_.b_hh ? w_.b_hh : zeros_.get();
    h0_ = p.h0 ? p.h0 + d_ * B * hout_ : zeros_.get();
    if (p.proj_size && !p.emitted[d_]) emitted_.allocate(B * H_);
    if (Cell::kept > 0) kept_ = p.kept[d_];
    gx_ld_ = in_output() ? ldo_ : in_kept() ? Cell::kept * H_ : Cell::gates * H_;
  }

  Work work() const {
    const int64_t weights = Cell::gates * H_ * (hout_ + (packed_ ? 0 : p_->input_size));
    return {weights, hidden_.parts(p_->schedule.batch), !packed_, kWeightsToStream};
  }
  int64_t panels() const { return hidden_.panels() + projection_.panels(); }
  void pack(int64_t i) { i < hidden_.panels() ? hidden_.pack(i) : projection_.pack(i - hidden_.panels()); }

  // gx comes in chunks, of so many rows at most.
  void reserve_gx(int64_t chunk_rows, int64_t chunks) {
    const int64_t GH = Cell::gates * H_, I = p_->input_size;
    if (!in_output() && !in_kept()) gx_.allocate(chunk_rows * GH);
    if (packed_ && chunks > 1 && !panels_w_ih_) {  // once for all chunks
      T* const panels = w_ih_memory_.allocate(GemmPanels<T>(GH, I).numbers());
      gemm_pack(p_->threads, GH, I, columns_of(w_.w_ih, I), panels);
      panels_w_ih_ = panels;
    }
  }
  // gx of steps [s0, s1), without the bias.
  void project_input(int64_t s0, int64_t s1) {
    const Range rows = walk_.packed_rows(s0, s1);
    gx_rows_ = gx_.get() ? gx_.get() - rows.begin * gx_ld_ : nullptr;
    if constexpr (kSameType) {
      if (in_output()) gx_rows_ = p_->output + d_ * hout_;
      if (in_kept()) gx_rows_ = kept_;
    }
    if (!packed_) return;  // run() does it
    const int64_t I = p_->input_size;
    gemm(p_->threads, rows.end - rows.begin, Cell::gates * H_, I, rows_of(p_->x + rows.begin * I, I),
         columns_of(w_.w_ih, I), false, gx_rows_ + rows.begin * gx_ld_, gx_ld_, panels_w_ih_);
  }

  // Steps [s0, s1) of some rows, this member's share of their units.
  void run(int64_t s0, int64_t s1, Range mine, Share share, Barrier& barrier) {
    const int64_t rows = mine.end - mine.begin;
    Range units = hidden_.part_of(share, rows), outputs = projection_.part_of(share, rows);
    // False for the members whom member 0 goes on without.
    const auto meet = [&] {
      if (!barrier.wait(share)) return true;
      if (share.member != 0) return false;
      share = {0, 1};
      units = hidden_.part_of(share, rows), outputs = projection_.part_of(share, rows);
      return true;
    };
    if (!packed_) project_units(walk_.packed_rows(s0, s1), units);
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t t = walk_.time(s);
      Segment pieces[2];
      const int n = segments(walk_, t, mine, pieces);
      for (int i = 0; i < n; ++i) step(t, pieces[i], units);
      if (!meet()) return;
      if (p_->proj_size) {
        if (n) project_hidden(t, {pieces[0].rows.begin, pieces[n - 1].rows.end}, outputs);
        if (!meet()) return;
      }
    }
  }

  void finish() {
    const Schedule& schedule = p_->schedule;
    const int64_t B = schedule.batch, T_ = schedule.steps;
    if (!kSameType && Cell::cell_state && p_->c_n) copy_or_zero(p_->c_n + d_ * B * H_, c_, B * H_);
    if (p_->h_n) {
      T* h_n = p_->h_n + d_ * B * hout_;
      int64_t done = 0;  // rows from the back: the shortest end first
      for (int64_t t = T_; t >= 0; --t) {
        const int64_t ended = t > 0 ? schedule.rows(t - 1) : B;  // rows [done, ended) have length t
        for (; done < ended; ++done) {
          const int64_t last = walk_.reverse ? 0 : t - 1;
          const T* from = t > 0 ? output_row(schedule.offset(last) + done) : h0_ + done * hout_;
          memcpy(h_n + done * hout_, from, hout_ * sizeof(T));
        }
      }
    }
  }

 private:
  // Where gx takes no memory of its own: what comes of it overwrites it.
  bool in_output() const { return kSameType && Cell::gates == 1 && Cell::kept == 0 && !p_->proj_size; }
  bool in_kept() const { return kSameType && kept_; }
  T* output_row(int64_t n) const { return p_->output + n * ldo_ + d_ * hout_; }
  T* emitted_row(int64_t n, int64_t r) const {
    return p_->emitted[d_] ? p_->emitted[d_] + n * H_ : emitted_.get() + r * H_;
  }

  // gx of some units alone.
  void project_units(Range rows, Range units) {
    const int64_t I = p_->input_size;
    const KPiece k[1] = {{0, I}};
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRowBlock) {
      const int64_t count = rows.end - r0 < kRowBlock ? rows.end - r0 : kRowBlock;
      input_.for_each_block(p_->x + r0 * I, I, count, k, 1, units, false,
                            [&](int64_t first, int vectors, const A* sums, int64_t ld_sums) {
                              for (int64_t i = 0; i < count; ++i)
                                for (int g = 0; g < Cell::gates; ++g)
                                  for (int u = 0; u < vectors; ++u) {
                                    const int64_t j = (first + u) * V::size;
                                    V::load(sums + i * ld_sums + g * Hidden::units + u * V::size)
                                        .store(gx_rows_ + (r0 + i) * gx_ld_ + g * H_ + j, H_ - j);
                                  }
                            });
    }
  }

  void step(int64_t t, const Segment& piece, Range units) {
    const int64_t n0 = p_->schedule.offset(t);
    const T* h_prev = piece.initial ? h0_ : output_row(p_->schedule.offset(walk_.previous(t).from));
    const int64_t ldh = piece.initial ? hout_ : ldo_;
    const bool zero_state = piece.initial && !p_->h0;  // 0 W_hh^T needs no product
    const KPiece k[1] = {{0, zero_state ? 0 : hout_}};
    for (int64_t r0 = piece.rows.begin; r0 < piece.rows.end; r0 += kRowBlock) {
      const int64_t rows = piece.rows.end - r0 < kRowBlock ? piece.rows.end - r0 : kRowBlock;
      hidden_.for_each_block(h_prev + r0 * ldh, ldh, rows, k, 1, units, t % 2 == 1,
                             [&](int64_t first, int vectors, const A* sums, int64_t ld_sums) {
                               for (int64_t i = 0; i < rows; ++i) {
                                 const int64_t r = r0 + i;
                                 for (int u = 0; u < vectors; ++u)
                                   update(n0 + r, r, (first + u) * V::size, sums + i * ld_sums + u * V::size,
                                          Hidden::units, h_prev + r * ldh);
                               }
                             });
    }
  }

  // Units [j, j + V) of row r: gh without bias at gh[gate * gate_stride]. Whole vectors get code of their own, in which
  // `valid` is a constant and no access asks how many lanes there are.
  FASTSEQ_INLINE void update(int64_t n, int64_t r, int64_t j, const A* gh, int64_t gate_stride, const T* h_prev) {
    if (H_ - j >= V::size) {
      update_lanes(n, r, j, V::size, gh, gate_stride, h_prev);
    } else {
      update_lanes(n, r, j, H_ - j, gh, gate_stride, h_prev);
    }
  }
  FASTSEQ_INLINE void update_lanes(int64_t n, int64_t r, int64_t j, int64_t valid, const A* gh, int64_t gate_stride,
                                   const T* h_prev) {
    const A* gx = gx_rows_ + n * gx_ld_ + j;
    V x[Cell::gates], h[Cell::gates];
    for (int g = 0; g < Cell::gates; ++g) {
      x[g] = V::load(gx + g * H_, valid) + V::load(b_ih_ + g * H_ + j, valid);
      h[g] = V::load(gh + g * gate_stride, valid) + V::load(b_hh_ + g * H_ + j, valid);
    }
    V c(0), before(0), keep[Cell::kept + 1];
    if constexpr (Cell::cell_state) c = V::load(c_ + r * H_ + j, valid);
    if constexpr (Cell::reads_h_prev) before = V::load(h_prev + j, valid);
    const V now = Cell::update(x, h, before, c, keep);
    if constexpr (Cell::cell_state) c.store(c_ + r * H_ + j, valid);
    if constexpr (Cell::kept > 0) {
      if (kept_)
        for (int k = 0; k < Cell::kept; ++k) keep[k].store(kept_ + (n * Cell::kept + k) * H_ + j, valid);
    }
    if (p_->proj_size) {
      now.store(emitted_row(n, r) + j, valid);
    } else {
      now.store(output_row(n) + j, valid);
    }
  }

  // h = W_hr m, for the rows of one step (Sak et al., 2014).
  void project_hidden(int64_t t, Range rows, Range outputs) {
    const int64_t n0 = p_->schedule.offset(t);
    const KPiece k[1] = {{0, H_}};
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRowBlock) {
      const int64_t count = rows.end - r0 < kRowBlock ? rows.end - r0 : kRowBlock;
      projection_.for_each_block(
          emitted_row(n0 + r0, r0), H_, count, k, 1, outputs, t % 2 == 1,
          [&](int64_t first, int vectors, const A* sums, int64_t ld_sums) {
            for (int64_t i = 0; i < count; ++i)
              for (int u = 0; u < vectors; ++u) {
                const int64_t j = (first + u) * V::size;
                V::load(sums + i * ld_sums + u * V::size).store(output_row(n0 + r0 + i) + j, hout_ - j);
              }
          });
    }
  }

  const RnnForward<T>* p_ = nullptr;
  int d_ = 0;
  Walk walk_{};
  DirectionWeights<T> w_;
  int64_t H_ = 0, hout_ = 0, ldo_ = 0, gx_ld_ = 0;
  bool packed_ = false;
  typename PackedDirection<Cell, T>::Hidden hidden_, input_;
  typename PackedDirection<Cell, T>::Projection projection_;
  Workspace<T> zeros_, emitted_, w_ih_memory_;
  Workspace<A> c_memory_, gx_;
  const T *b_ih_ = nullptr, *b_hh_ = nullptr, *h0_ = nullptr, *panels_w_ih_ = nullptr;
  T* kept_ = nullptr;
  A *gx_rows_ = nullptr, *c_ = nullptr;
};

template <class Cell, class T>
void rnn_forward(const RnnForward<T>& p) {
  ForwardDirection<Cell, T> directions[2];
  for (int d = 0; d < p.directions; ++d) directions[d].prepare(p, d);
  const int64_t T_ = p.schedule.steps;
  if (p.schedule.total_rows() > 0 && p.hidden_size > 0) {
    const int64_t panels = directions[0].panels();
    parallel_for(p.threads, panels * p.directions, [&](int64_t i) { directions[i / panels].pack(i % panels); });

    const int64_t chunk =
        steps_per_chunk(p.schedule, Cell::gates * p.hidden_size * sizeof(Compute<T>), kChunkBytes, kChunkRows);
    for (int d = 0; d < p.directions; ++d)
      directions[d].reserve_gx((chunk < T_ ? chunk : T_) * p.schedule.batch, (T_ + chunk - 1) / chunk);
    RowShares shares[2];
    for (int64_t s0 = 0; s0 < T_; s0 += chunk) {
      const int64_t s1 = s0 + chunk < T_ ? s0 + chunk : T_;
      for (int d = 0; d < p.directions; ++d) directions[d].project_input(s0, s1);
      run_plan(
          p.threads, p.schedule, {s0, s1}, p.directions, directions[0].work(), shares,
          [&](int d, Range rows, Share share, Barrier& barrier) { directions[d].run(s0, s1, rows, share, barrier); });
    }
  }
  for (int d = 0; d < p.directions; ++d) directions[d].finish();
}
