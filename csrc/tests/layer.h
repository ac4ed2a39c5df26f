// One layer to test: its sizes, its tensors, and calls of the kernels on them.
#pragma once

#include <algorithm>
#include <array>
#include <random>

#include "check.h"
#include "cpu/dispatch.h"

namespace fastseq::test {

// Those of the CPU, or others in their place. What is null is not there and not tested.
struct Kernels : cpu::Kernels {
  cpu::TypedKernels<float16> f16{};

  template <class T>
  const cpu::TypedKernels<T>& typed() const {
    if constexpr (std::is_same_v<T, float16>) {
      return f16;
    } else {
      return cpu::Kernels::typed<T>();
    }
  }
};

struct Shape {
  int64_t T, B, I, H;
  int64_t P;  // projected size, for the cells with a cell state; 0 for none
  int directions;
  bool ragged, bias, states;
};

// What goes into a layer and what comes out, by place, so that a gradient is found where its input is.
enum Input { kX, kH0, kC0, kWeights, kInputs = kWeights + 2 * 5 };
enum Output { kOutput, kHn, kCn, kOutputs };
inline const char* input_name(int i) {
  static const char* const names[] = {
      "x",    "h0",           "c0",           "w_ih",         "w_hh",         "b_ih",        "b_hh",
      "w_hr", "w_ih reverse", "w_hh reverse", "b_ih reverse", "b_hh reverse", "w_hr reverse"};
  return names[i];
}
inline const char* output_name(int i) {
  static const char* const names[] = {"output", "h_n", "c_n"};
  return names[i];
}

struct Case : Shape {
  int cell;
  CellFacts facts;
  std::vector<int64_t> batch_sizes, offsets;  // empty when dense

  Case(int cell_index, const CellFacts& cell_facts, const Shape& shape)
      : Shape(shape), cell(cell_index), facts(cell_facts) {
    if (!facts.cell_state) P = 0;
    if (!ragged) return;
    std::vector<int64_t> lengths(B, T);  // from T down to 0, every row another where there is room
    for (int64_t r = 1; r < B; ++r) lengths[r] = T - (r * T + B - 2) / (B - 1);
    set_lengths(lengths);
  }

  // Of B rows, longest first.
  void set_lengths(const std::vector<int64_t>& lengths) {
    batch_sizes.assign(T, 0);
    offsets.assign(1, 0);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t length : lengths) batch_sizes[t] += length > t;
      offsets.push_back(offsets.back() + batch_sizes[t]);
    }
  }

  Schedule schedule() const { return {T, B, ragged ? batch_sizes.data() : nullptr, ragged ? offsets.data() : nullptr}; }
  int64_t total_rows() const { return schedule().total_rows(); }
  int64_t length(int64_t row) const {
    int64_t t = T;
    while (t > 0 && schedule().rows(t - 1) <= row) --t;
    return t;
  }
  int64_t hout() const { return P ? P : H; }
  double flops() const { return 2.0 * total_rows() * directions * facts.gates * H * (I + hout()); }

  // 0 for what this case does not have.
  std::array<int64_t, kInputs> input_sizes() const {
    const int64_t GH = facts.gates * H;
    std::array<int64_t, kInputs> sizes{};
    sizes[kX] = total_rows() * I;
    if (states) sizes[kH0] = directions * B * hout();
    if (states && facts.cell_state) sizes[kC0] = directions * B * H;
    for (int d = 0; d < directions; ++d) {
      int64_t* weights = &sizes[kWeights + 5 * d];
      weights[0] = GH * I;
      weights[1] = GH * hout();
      weights[2] = weights[3] = bias ? GH : 0;
      weights[4] = P * H;
    }
    return sizes;
  }
  std::array<int64_t, kOutputs> output_sizes() const {
    return {total_rows() * directions * hout(), directions * B * hout(), facts.cell_state ? directions * B * H : 0};
  }

  std::string name() const {
    std::ostringstream out;
    out << facts.name << " T=" << T << " B=" << B << " I=" << I << " H=" << H << " P=" << P << " D=" << directions
        << (ragged ? " ragged" : " dense") << (bias ? " bias" : "") << (states ? " states" : "");
    return out.str();
  }
};

template <class T>
using Inputs = std::array<Guarded<T>, kInputs>;
template <class T>
using Outputs = std::array<Guarded<T>, kOutputs>;

template <class To, class From, size_t N>
std::array<Guarded<To>, N> convert(const std::array<Guarded<From>, N>& from) {
  std::array<Guarded<To>, N> to;
  for (size_t i = 0; i < N; ++i) to[i] = convert<To>(from[i]);
  return to;
}

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  // In [-scale, scale], and a float, so that the float and the double kernels can be given the same number.
  double uniform(double scale) {
    return static_cast<float>(scale * (std::ldexp(static_cast<double>(bits_() >> 11), -52) - 1));
  }

 private:
  std::mt19937_64 bits_;
};

inline Inputs<double> random_inputs(const Case& c, uint64_t seed) {
  Random random(seed);
  const auto sizes = c.input_sizes();
  Inputs<double> in;
  for (int i = 0; i < kInputs; ++i) {
    const int weight = i < kWeights ? -1 : (i - kWeights) % 5;
    const double fan_in = weight == 0 ? c.I : weight == 1 ? c.hout() : weight == 4 ? c.H : 1;
    in[i] = Guarded<double>(sizes[i]);
    for (int64_t j = 0; j < sizes[i]; ++j) in[i][j] = random.uniform(1.2 / std::sqrt(fan_in));
  }
  return in;
}

inline Outputs<double> random_output_gradients(const Case& c, uint64_t seed) {
  Random random(seed);
  Outputs<double> out;
  for (int i = 0; i < kOutputs; ++i) {
    out[i] = Guarded<double>(c.output_sizes()[i]);
    for (int64_t j = 0; j < out[i].size(); ++j) out[i][j] = random.uniform(1);
  }
  return out;
}

// Some rows of a case's batch, in their order: the case that they are alone, and their part of its tensors.
class Rows {
 public:
  Rows(const Case& all, const std::vector<int64_t>& rows) : few(all), all_(all), rows_(rows) {
    std::vector<int64_t> lengths;
    for (int64_t row : rows) lengths.push_back(all.length(row));
    few.T = lengths[0];
    few.B = static_cast<int64_t>(rows.size());
    if (few.ragged) few.set_lengths(lengths);
  }

  Case few;

  template <class T>
  Guarded<T> of_steps(const Guarded<T>& from, int64_t size) const {  // (N, size)
    Guarded<T> to(few.total_rows() * size);
    for_each_number(size, [&](int64_t in_few, int64_t in_all) { to[in_few] = from[in_all]; });
    return to;
  }
  template <class T>
  void put_back(const Guarded<T>& from, int64_t size, Guarded<T>& to) const {
    for_each_number(size, [&](int64_t in_few, int64_t in_all) { to[in_all] = from[in_few]; });
  }
  template <class T>
  Guarded<T> of_state(const Guarded<T>& from, int64_t size) const {  // (D, B, size), or absent
    Guarded<T> to(from.size() ? few.directions * few.B * size : 0);
    for (int64_t i = 0; i < to.size(); ++i)
      to[i] = from[(i / size / few.B * all_.B + rows_[i / size % few.B]) * size + i % size];
    return to;
  }
  // Inputs or their gradients; the weights as they are.
  template <class T>
  Inputs<T> of_inputs(const Inputs<T>& from) const {
    Inputs<T> to = from;
    to[kX] = of_steps(from[kX], few.I);
    to[kH0] = of_state(from[kH0], few.hout());
    to[kC0] = of_state(from[kC0], few.H);
    return to;
  }
  template <class T>
  Outputs<T> of_outputs(const Outputs<T>& from) const {
    return {of_steps(from[kOutput], few.directions * few.hout()), of_state(from[kHn], few.hout()),
            of_state(from[kCn], few.H)};
  }

 private:
  template <class Use>
  void for_each_number(int64_t size, const Use& use) const {
    const Schedule some = few.schedule(), all = all_.schedule();
    for (int64_t t = 0; t < some.steps; ++t)
      for (int64_t k = 0; k < some.rows(t); ++k)
        for (int64_t i = 0; i < size; ++i) use((some.offset(t) + k) * size + i, (all.offset(t) + rows_[k]) * size + i);
  }

  Case all_;
  std::vector<int64_t> rows_;
};

template <class T>
struct Forward {
  Outputs<T> out;
  std::array<Guarded<T>, 2> kept, emitted;
};

template <class T>
void fill_layer(RnnLayer<T>& p, const Case& c, const Inputs<T>& in, int threads) {
  p.schedule = c.schedule();
  p.input_size = c.I;
  p.hidden_size = c.H;
  p.proj_size = c.P;
  p.directions = c.directions;
  p.x = in[kX].data();
  p.h0 = in[kH0].data();
  p.c0 = in[kC0].data();
  p.threads = threads;
  for (int d = 0; d < c.directions; ++d) {
    const Guarded<T>* w = &in[kWeights + 5 * d];
    p.weights[d] = {w[0].data(), w[1].data(), w[2].data(), w[3].data(), w[4].data()};
  }
}

// Each direction's weights as the kernels pack them.
template <class T>
std::array<Guarded<T>, 2> pack_weights(const Kernels& kernels, const Case& c, const Inputs<T>& in, int threads) {
  RnnLayer<T> p;
  fill_layer(p, c, in, threads);
  std::array<Guarded<T>, 2> packed;
  for (int d = 0; d < c.directions; ++d) {
    packed[d] = Guarded<T>(kernels.typed<T>().rnn_packed_numbers[c.cell](p));
    kernels.typed<T>().rnn_pack[c.cell](p, d, packed[d].data());
  }
  return packed;
}

// f gets room for what the kernel writes. keep: as in training. Without `final_states` nobody asks for h_n and c_n.
template <class T>
RnnForward<T> forward_block(const Case& c, const Inputs<T>& in, Forward<T>& f, bool keep, int threads,
                            bool final_states = true, const std::array<Guarded<T>, 2>& packed = {}) {
  RnnForward<T> p;
  fill_layer(p, c, in, threads);
  for (int d = 0; d < c.directions; ++d) p.packed[d] = packed[d].data();
  for (int i = 0; i < (final_states ? kOutputs : 1); ++i) f.out[i] = Guarded<T>(c.output_sizes()[i]);
  p.output = f.out[kOutput].data();
  p.h_n = f.out[kHn].data();
  p.c_n = f.out[kCn].data();
  for (int d = 0; keep && d < c.directions; ++d) {
    f.kept[d] = Guarded<T>(c.total_rows() * c.facts.kept * c.H);
    f.emitted[d] = Guarded<T>(c.P ? c.total_rows() * c.H : 0);
    p.kept[d] = f.kept[d].data();
    p.emitted[d] = f.emitted[d].data();
  }
  return p;
}
template <class T>
Forward<T> run_forward(const Kernels& kernels, const Case& c, const Inputs<T>& in, bool keep, int threads,
                       bool final_states = true, const std::array<Guarded<T>, 2>& packed = {}) {
  Forward<T> f;
  const RnnForward<T> p = forward_block(c, in, f, keep, threads, final_states, packed);
  kernels.typed<T>().rnn_forward[c.cell](&p, 1);
  return f;
}

// grads gets room for the gradients of the inputs that `wanted` has a bit for, of those that the case has.
template <class T>
RnnBackward<T> backward_block(const Case& c, const Inputs<T>& in, const Forward<T>& f, const Outputs<T>& d_out,
                              Inputs<T>& grads, int threads, unsigned wanted = ~0u) {
  for (int i = 0; i < kInputs; ++i)
    if (wanted >> i & 1) grads[i] = Guarded<T>(c.input_sizes()[i]);
  RnnBackward<T> p;
  fill_layer(p, c, in, threads);
  p.output = f.out[kOutput].data();
  p.d_output = d_out[kOutput].data();
  p.d_h_n = d_out[kHn].data();
  p.d_c_n = d_out[kCn].data();
  p.dx = grads[kX].data();
  p.d_h0 = grads[kH0].data();
  p.d_c0 = grads[kC0].data();
  for (int d = 0; d < c.directions; ++d) {
    p.kept[d] = f.kept[d].data();
    p.emitted[d] = f.emitted[d].data();
    Guarded<T>* g = &grads[kWeights + 5 * d];
    p.grads[d] = {g[0].data(), g[1].data(), g[2].data(), g[3].data(), g[4].data()};
  }
  return p;
}
template <class T>
Inputs<T> run_backward(const Kernels& kernels, const Case& c, const Inputs<T>& in, const Forward<T>& f,
                       const Outputs<T>& d_out, int threads, unsigned wanted = ~0u) {
  Inputs<T> grads;
  const RnnBackward<T> p = backward_block(c, in, f, d_out, grads, threads, wanted);
  kernels.typed<T>().rnn_backward[c.cell](&p, 1);
  return grads;
}

}  // namespace fastseq::test
