// The forward driver: one layer, all directions, any cell.
//
//   for each chunk of steps:   gx = x W_ih^T, one product a direction
//                              for each step: gh = h W_hh^T a block of units at a time, Cell::update on the sums, h
//                              stored
//
// Threads share rows when there are enough, else units, with a barrier a step (rnn_driver.h). Who has rows to himself
// computes their gx, too, some steps ahead. Of a few steps the weights are not packed, gx is computed in the same
// region as the steps, and threads share units alone.
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
    numbers = w_ih + GemmPanels<T, Cell::gates>(p.hidden_size, p.input_size).numbers();
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
  gemm_pack<Cell::gates>(p.threads, p.hidden_size, p.input_size, columns_of(w.w_ih, p.input_size), to + at.w_ih);
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
    packed_ = packs(p);
    const int64_t B = p.schedule.batch;
    const T* ready = packed_ ? p.packed[d_] : nullptr;
    if (Cell::kept > 0) kept_ = p.kept[d_];
    const PackedDirection<Cell, T> at(p);
    const T* const ready_w_ih = ready ? ready + at.w_ih : nullptr;
    hidden_.prepare(w_.w_hh, hout_, H_, hout_, packed_, ready);
    folded_ = packed_ && folds(p);
    if (!packed_ || folded_) input_.prepare(w_.w_ih, p.input_size, H_, p.input_size, packed_, ready_w_ih);
    if (p.proj_size) projection_.prepare(w_.w_hr, H_, hout_, H_, packed_, ready ? ready + at.w_hr : nullptr);
    panels_w_ih_ = ready_w_ih;
    if (Cell::cell_state) {
      if constexpr (kSameType) c_ = p.c_n ? p.c_n + d_ * B * H_ : nullptr;
      if (!c_) c_ = c_memory_.allocate(B * H_);
      copy_or_zero(c_, p.c0 ? p.c0 + d_ * B * H_ : nullptr, B * H_);
    }
    const int64_t GH = Cell::gates * H_, state_zeros = p.h0 ? 0 : B * hout_;
    const int64_t gate_zeros = !kSameType || (w_.b_ih && w_.b_hh) ? 0 : GH;
    zeros_.zeros(state_zeros > gate_zeros ? state_zeros : gate_zeros);
    if constexpr (kSameType) {
      b_ih_ = w_.b_ih ? w_.b_ih : zeros_.get();
      b_hh_ = w_.b_hh ? w_.b_hh : zeros_.get();
    } else {  // once, for every row of every step
      A* const biases = biases_.allocate(2 * GH);
      b_ih_ = biases, b_hh_ = biases + GH;
      copy_or_zero(biases, w_.b_ih, GH);
      copy_or_zero(biases + GH, w_.b_hh, GH);
    }
    h0_ = p.h0 ? p.h0 + d_ * B * hout_ : zeros_.get();
    if (p.proj_size && !p.emitted[d_]) emitted_.allocate(B * H_);
  }

  static Work work(const RnnLayer<T>& p) {
    const bool packed = packs(p), with_input = !packed || folds(p);
    const int64_t H = p.hidden_size, weights = Cell::gates * H * (p.out_size() + (with_input ? p.input_size : 0));
    const Schedule& schedule = p.schedule;
    return {weights,          schedule.total_rows(), PackedDirection<Cell, T>::Hidden::parts(H, schedule.batch),
            !packed,          kWeightsToStream,      kInAmx<T> ? kWeightsOfFewRowsInAmx : kWeightsOfFewRows,
            kWorkToShareUnits};
  }
  static bool packs(const RnnLayer<T>& p) { return p.schedule.nominal_steps() >= kStepsToPack; }
  // Whether gx is computed at each step, a panel's while its gates are due, and lies nowhere: AMX is done so soon that
  // writing and reading it counts. Where both weights stay in a core's own cache, and rows make up for reading W_ih as
  // often.
  static bool folds(const RnnLayer<T>& p) {
    if constexpr (!kInAmx<T>) return false;
    const int64_t weights = gx_numbers(p.hidden_size) * (p.out_size() + p.input_size);
    return p.input_size <= kGemmK && weights * static_cast<int64_t>(sizeof(T)) <= kBytesToFold &&
           p.schedule.batch >= kRowBlock && p.schedule.batch / p.threads >= kRowBlock / 2;
  }

  // How gx comes and where it lies; returns how many steps run() gets at a time.
  int64_t plan_gx(const Plan& plan) {
    const Schedule& schedule = p_->schedule;
    const int64_t measured = steps_to_measure<T>(plan, schedule, work(*p_));
    if (folded_) return measured;
    const int64_t I = p_->input_size, row_bytes = gx_numbers(H_) * sizeof(A);
    const bool alone = packed_ && plan.members == 1;
    if constexpr (kSameType) {
      if (!alone || plan.tasks() == 1) {
        in_kept_ = kept_ && !p_->packed[d_];
        in_output_ = Cell::gates == 1 && Cell::kept == 0 && !p_->proj_size;
      }
    }
    apart_ = alone && !gx_elsewhere();
    if (alone) {
      const int64_t rows = (schedule.batch + plan.row_groups - 1) / plan.row_groups;
      const bool far = kInAmx<T> && gx_numbers(H_) * I * static_cast<int64_t>(sizeof(T)) >= kGemmBytesFar;
      const int64_t with_x = row_bytes + I * static_cast<int64_t>(sizeof(T));
      gx_steps_ = steps_per_chunk(rows, with_x, kChunkBytesNear, far ? kChunkRows : kGemmRows);
    } else {
      gx_steps_ = steps_per_chunk(schedule.batch, row_bytes, kChunkBytes, kChunkRows);
    }
    take_gx_memory();
    return apart_ ? (measured + gx_steps_ - 1) / gx_steps_ * gx_steps_ : gx_steps_;
  }
  // Where one thread has the layer, and run_apart() gets so many steps at a time.
  void plan_wave(int64_t steps) {
    apart_ = true;
    gx_steps_ = steps;
    take_gx_memory();
  }
  // Numbers of gx that a row takes.
  static int64_t gx_numbers(int64_t hidden_size) { return Hidden::blocks(hidden_size) * Hidden::width; }

  // The weights, in pieces that threads share.
  int64_t panels() const {
    return hidden_.panels() + projection_.panels() + (folded_ ? input_.panels() : w_ih_panels_);
  }
  void pack(int64_t i) {
    if (i < hidden_.panels()) return hidden_.pack(i);
    i -= hidden_.panels();
    if (i < projection_.panels()) return projection_.pack(i);
    i -= projection_.panels();
    if (folded_) return input_.pack(i);
    const int64_t I = p_->input_size;
    const Matrix<T> w_ih = columns_of(w_.w_ih, I);
    gx_elsewhere() ? gemm_pack_panel<1>(Cell::gates * H_, I, w_ih, i, w_ih_memory_.get())
                   : gemm_pack_panel<Cell::gates>(H_, I, w_ih, i, w_ih_memory_.get());
  }

  // gx of steps [s0, s1), without the bias, where all threads compute it together.
  void project_input(int64_t s0, int64_t s1) {
    if (folded_ || apart_) return;
    const Range rows = walk_.packed_rows(s0, s1);
    const int64_t count = rows.end - rows.begin, I = p_->input_size;
    const Matrix<T> x = rows_of(p_->x + rows.begin * I, I);
    if (!gx_elsewhere()) {
      gx_ = {gx_memory_.get() - rows.begin * Hidden::width, Hidden::width, count * Hidden::width, Hidden::units};
      if (packed_) gemm_by_gates<Cell::gates>(p_->threads, count, H_, I, x, w_.w_ih, I, gx_memory_.get(), panels_w_ih_);
      return;
    }
    if constexpr (kSameType) {
      gx_ = {in_output_ ? p_->output + d_ * hout_ : kept_, in_output_ ? ldo_ : Cell::kept * H_, Hidden::units, H_};
      if (packed_)
        gemm(p_->threads, count, Cell::gates * H_, I, x, columns_of(w_.w_ih, I), false, gx_.data + rows.begin * gx_.row,
             gx_.row, panels_w_ih_);
    }
  }

  // Steps [s0, s1) of rows that nobody else computes. Their gx, side by side whatever rows are beside them, is in this
  // core's own cache when a step reads it.
  void run_apart(int64_t s0, int64_t s1, Range mine) {
    const int64_t I = p_->input_size, width = Hidden::width;
    const Range units{0, hidden_.vectors()}, outputs{0, projection_.vectors()};
    A* const own = gx_memory_.get() + mine.begin * gx_steps_ * gx_numbers(H_);
    const bool in_order = mine.end - mine.begin == p_->schedule.batch && !walk_.reverse;
    Workspace<T> memory;
    T* const gathered = in_order ? nullptr : memory.allocate((mine.end - mine.begin) * gx_steps_ * I);
    for (int64_t begin = s0; begin < s1; begin += gx_steps_) {
      const int64_t end = begin + gx_steps_ < s1 ? begin + gx_steps_ : s1;
      int64_t count = 0;  // rows of all steps
      for (int64_t s = begin; s < end; ++s) {
        const int64_t t = walk_.time(s);
        const Range rows = walk_.alive(t, mine);
        if (gathered)
          memcpy(gathered + count * I, p_->x + (p_->schedule.offset(t) + rows.begin) * I,
                 (rows.end - rows.begin) * I * sizeof(T));
        count += rows.end - rows.begin;
      }
      const T* const x = gathered ? gathered : p_->x + p_->schedule.offset(begin) * I;
      gemm_by_gates<Cell::gates>(1, count, H_, I, rows_of(x, I), w_.w_ih, I, own, panels_w_ih_);
      int64_t done = 0;
      for (int64_t s = begin; s < end; ++s) {
        const int64_t t = walk_.time(s);
        const Range rows = walk_.alive(t, mine);
        const Gx gx{own + (done - p_->schedule.offset(t) - rows.begin) * width, width, count * width, Hidden::units};
        done += rows.end - rows.begin;
        Segment pieces[2];
        const int n = segments(walk_, t, mine, pieces);
        for (int i = 0; i < n; ++i) step(t, pieces[i], units, gx, false);
        if (p_->proj_size && n) project_hidden(t, rows, outputs);
      }
    }
    if (streams_) store_fence();
  }

  // Steps [s0, s1) of some rows, this member's share of their units.
  void run(int64_t s0, int64_t s1, Range mine, Share share, Barrier& barrier) {
    if (apart_) return run_apart(s0, s1, mine);
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
      for (int i = 0; i < n; ++i) step(t, pieces[i], units, gx_, share.members > 1);
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
  // Where gx lies: row by row in other tensors, or in memory of its own as a step reads it, a panel's rows after
  // another's.
  struct Gx {
    A* data;
    int64_t row, panel, gate;  // numbers from one to the next
    A* at(int64_t n, int64_t vector) const {
      return data + n * row + vector / Hidden::unit_vectors * panel + vector % Hidden::unit_vectors * V::size;
    }
  };
  bool gx_elsewhere() const { return in_output_ || in_kept_; }
  void take_gx_memory() {
    const Schedule& schedule = p_->schedule;
    const int64_t I = p_->input_size;
    constexpr uintptr_t line = 64;
    const int64_t kept_bytes = kept_ ? schedule.total_rows() * Cell::kept * H_ * static_cast<int64_t>(sizeof(T)) : 0;
    streams_ = kSameType && kStreamsLines && apart_ && kept_bytes >= kBytesToStream && H_ * sizeof(T) % line == 0 &&
               reinterpret_cast<uintptr_t>(kept_) % line == 0;
    const bool one_piece = gx_steps_ >= schedule.steps;
    if (one_piece) gx_steps_ = schedule.steps;
    if (!gx_elsewhere()) gx_memory_.allocate(schedule.batch * gx_steps_ * gx_numbers(H_));
    if (packed_ && !panels_w_ih_ && (apart_ || !one_piece)) {
      const auto lie = [&](const auto& layout) {
        w_ih_panels_ = layout.blocks * layout.panels;
        panels_w_ih_ = w_ih_memory_.allocate(layout.numbers());
      };
      gx_elsewhere() ? lie(GemmPanels<T>(Cell::gates * H_, I)) : lie(GemmPanels<T, Cell::gates>(H_, I));
    }
  }
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
                                  for (int u = 0; u < vectors; ++u)
                                    V::load(sums + i * ld_sums + g * Hidden::units + Hidden::place_of_vector(u))
                                        .store(gx_.at(r0 + i, first + u) + g * gx_.gate, H_ - (first + u) * V::size);
                            });
    }
  }

  void step(int64_t t, const Segment& piece, Range units, const Gx& gx, bool shared) {
    const int64_t n0 = p_->schedule.offset(t);
    const T* h_prev = piece.initial ? h0_ : output_row(p_->schedule.offset(walk_.previous(t).from));
    const int64_t ldh = piece.initial ? hout_ : ldo_;
    if (shared) ask_for(h_prev + piece.rows.begin * ldh, ldh, piece.rows.end - piece.rows.begin, hout_);
    const bool zero_state = piece.initial && !p_->h0;  // 0 W_hh^T needs no product
    const KPiece k[1] = {{0, zero_state ? 0 : hout_}};
    for (int64_t r0 = piece.rows.begin; r0 < piece.rows.end; r0 += kRowBlock) {
      const int64_t rows = piece.rows.end - r0 < kRowBlock ? piece.rows.end - r0 : kRowBlock;
#if FASTSEQ_AMX
      if constexpr (kInAmx<T>) {
        if (folded_) {
          const int64_t I = p_->input_size;
          hidden_.for_each_amx_block(
              zero_state ? nullptr : h_prev + r0 * ldh, ldh, input_, p_->x + (n0 + r0) * I, I, rows, units, t % 2 == 1,
              [&](int64_t first, int vectors, const A* sums, A* sums_x, int64_t ld_sums) {
                const Gx here{sums_x - (n0 + r0) * ld_sums - Hidden::place_of_vector(first), ld_sums, Hidden::width,
                              Hidden::units};
                update(n0, r0, rows, first, vectors, here, sums, ld_sums, h_prev, ldh);
              });
          continue;
        }
      }
#endif
      hidden_.for_each_block(h_prev + r0 * ldh, ldh, rows, k, 1, units, t % 2 == 1,
                             [&](int64_t first, int vectors, const A* sums, int64_t ld_sums) {
                               update(n0, r0, rows, first, vectors, gx, sums, ld_sums, h_prev, ldh);
                             });
    }
  }

  // A vector of units of a row.
  struct Place {
    int64_t n, r, j;  // packed row, row, first unit
    const A* gx;      // without bias
    int64_t gate;     // numbers between the gates of gx
    const A* gh;      // the same, gates Hidden::units apart
    const T* h_prev;
    int64_t valid;
  };
  // Some vectors at a time, of as many rows as that takes. Whole vectors get code of their own, in which `valid` is a
  // constant and no access asks how many lanes there are.
  void update(int64_t n0, int64_t r0, int64_t rows, int64_t first, int vectors, const Gx& gx, const A* sums,
              int64_t ld_sums, const T* h_prev, int64_t ldh) {
    const bool whole = (first + vectors) * V::size <= H_;
    int64_t i = 0;
    int u = 0;
    const auto next = [&]() __attribute__((always_inline)) {
      const int64_t r = r0 + i, j = (first + u) * V::size;
      const Place place{
          n0 + r,
          r,
          j,
          gx.at(n0 + r, first + u),
          gx.gate,
          sums + i * ld_sums + Hidden::place_of_vector(u),
          h_prev + r * ldh,
          H_ - j};
      if (++u == vectors) u = 0, ++i;
      return place;
    };
    const auto several = [&](auto count) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Place places[N];
      for (int k = 0; k < N; ++k) places[k] = next();
      if (whole) {
        update_lanes<N, true>(places);
      } else {
        update_lanes<N, false>(places);
      }
    };
    constexpr int most = kGatesAtOnce / Cell::gates;
    int64_t left = rows * vectors;
    if constexpr (most >= 4)
      for (; left >= 4; left -= 4) several(Part<4>{});
    if constexpr (most >= 2)
      for (; left >= 2; left -= 2) several(Part<2>{});
    for (; left > 0; --left) several(Part<1>{});
  }
  template <int N, bool whole>
  FASTSEQ_INLINE void update_lanes(const Place* places) {
    using Vs = Vectors<A, N>;
    Vs x[Cell::gates], h[Cell::gates], c(0), before(0), keep[Cell::kept + 1];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Place& at = places[i];
      const int64_t valid = whole ? V::size : at.valid;
#pragma GCC unroll 4
      for (int g = 0; g < Cell::gates; ++g) {
        x[g].part[i] = V::load(at.gx + g * at.gate, valid) + V::load(b_ih_ + g * H_ + at.j, valid);
        h[g].part[i] = V::load(at.gh + g * Hidden::units, valid) + V::load(b_hh_ + g * H_ + at.j, valid);
      }
      if constexpr (Cell::cell_state) c.part[i] = V::load(c_ + at.r * H_ + at.j, valid);
      if constexpr (Cell::reads_h_prev) before.part[i] = V::load(at.h_prev + at.j, valid);
    }
    const Vs now = Cell::update(x, h, before, c, keep);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Place& at = places[i];
      const int64_t valid = whole ? V::size : at.valid;
      if constexpr (Cell::cell_state) c.part[i].store(c_ + at.r * H_ + at.j, valid);
      if constexpr (Cell::kept > 0) {
        if (kept_)
          for (int k = 0; k < Cell::kept; ++k) {
            T* const to = kept_ + (at.n * Cell::kept + k) * H_ + at.j;
            if constexpr (whole && kSameType)
              if (streams_) {
                keep[k].part[i].stream(to);
                continue;
              }
            keep[k].part[i].store(to, valid);
          }
      }
      if (p_->proj_size) {
        now.part[i].store(emitted_row(at.n, at.r) + at.j, valid);
      } else {
        now.part[i].store(output_row(at.n) + at.j, valid);
      }
    }
  }

  // h = W_hr m, for the rows of one step (Sak et al., 2014).
  void project_hidden(int64_t t, Range rows, Range outputs) {
    const int64_t n0 = p_->schedule.offset(t);
    const KPiece k[1] = {{0, H_}};
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRowBlock) {
      const int64_t count = rows.end - r0 < kRowBlock ? rows.end - r0 : kRowBlock;
      projection_.for_each_block(emitted_row(n0 + r0, r0), H_, count, k, 1, outputs, t % 2 == 1,
                                 [&](int64_t first, int vectors, const A* sums, int64_t ld_sums) {
                                   for (int64_t i = 0; i < count; ++i)
                                     for (int u = 0; u < vectors; ++u) {
                                       const int64_t j = (first + u) * V::size;
                                       V::load(sums + i * ld_sums + Projection::place_of_vector(u))
                                           .store(output_row(n0 + r0 + i) + j, hout_ - j);
                                     }
                                 });
    }
  }

  const RnnForward<T>* p_ = nullptr;
  int d_ = 0;
  Walk walk_{};
  DirectionWeights<T> w_;
  int64_t H_ = 0, hout_ = 0, ldo_ = 0;
  bool packed_ = false, folded_ = false;
  bool in_output_ = false, in_kept_ = false;  // gx takes no memory of its own: what comes of it overwrites it
  bool apart_ = false;                        // gx of a thread's rows is computed by that thread
  bool streams_ = false;                      // kept planes are written past the caches
  int64_t gx_steps_ = 0, w_ih_panels_ = 0;
  typename PackedDirection<Cell, T>::Hidden hidden_, input_;
  typename PackedDirection<Cell, T>::Projection projection_;
  Workspace<T> zeros_, emitted_, w_ih_memory_;
  Workspace<A> c_memory_, gx_memory_, biases_;
  Gx gx_{};
  const A *b_ih_ = nullptr, *b_hh_ = nullptr;
  const T *h0_ = nullptr, *panels_w_ih_ = nullptr;
  T* kept_ = nullptr;
  A* c_ = nullptr;
};

template <class Cell, class T>
void layer_forward(const RnnForward<T>& p) {
  ForwardDirection<Cell, T> directions[2];
  for (int d = 0; d < p.directions; ++d) directions[d].prepare(p, d);
  const int64_t T_ = p.schedule.steps;
  if (p.schedule.total_rows() > 0 && p.hidden_size > 0) {
    const Work work = ForwardDirection<Cell, T>::work(p);
    const Plan plan = make_plan(p.threads, p.directions, p.schedule.batch, work);
    int64_t chunk = 0;  // of either direction
    for (int d = 0; d < p.directions; ++d) chunk = directions[d].plan_gx(plan);
    const int64_t panels = directions[0].panels();
    parallel_for(p.threads, panels * p.directions, [&](int64_t i) { directions[i / panels].pack(i % panels); });
    RowShares shares[2];
    for (int64_t s0 = 0; s0 < T_; s0 += chunk) {
      const int64_t s1 = s0 + chunk < T_ ? s0 + chunk : T_;
      for (int d = 0; d < p.directions; ++d) directions[d].project_input(s0, s1);
      run_plan(
          p.threads, p.schedule, {s0, s1}, p.directions, work, shares,
          [&](int d, Range rows, Share share, Barrier& barrier) { directions[d].run(s0, s1, rows, share, barrier); });
    }
  }
  for (int d = 0; d < p.directions; ++d) directions[d].finish();
}
