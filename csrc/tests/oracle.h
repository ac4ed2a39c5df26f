// The forward of the known cells again, from the papers' equations, in long double and one number at a time; it shares
// no code with csrc/cpu or csrc/cells.h.
#pragma once

#include "layer.h"

namespace fastseq::test {

using Real = long double;

inline Real logistic(Real x) { return 1 / (1 + std::exp(-x)); }

// One unit: a = W_ih x + b_ih and b = W_hh h + b_hh, one a gate; c is read and overwritten. Returns h.
using OracleCell = Real (*)(const Real* a, const Real* b, Real h, Real& c);

// Null for a cell that is not known here.
inline OracleCell oracle_cell(const std::string& name) {
  if (name == "rnn_tanh") return [](const Real* a, const Real* b, Real, Real&) { return std::tanh(a[0] + b[0]); };
  if (name == "rnn_relu")
    return [](const Real* a, const Real* b, Real, Real&) { return std::max(a[0] + b[0], Real(0)); };
  if (name == "lstm")
    return [](const Real* a, const Real* b, Real, Real& c) {
      const Real i = logistic(a[0] + b[0]), f = logistic(a[1] + b[1]);
      const Real g = std::tanh(a[2] + b[2]), o = logistic(a[3] + b[3]);
      c = f * c + i * g;
      return o * std::tanh(c);
    };
  if (name == "gru")
    return [](const Real* a, const Real* b, Real h, Real&) {
      const Real r = logistic(a[0] + b[0]), z = logistic(a[1] + b[1]);
      const Real n = std::tanh(a[2] + r * b[2]);
      return (1 - z) * n + z * h;
    };
  return nullptr;
}

inline std::array<std::vector<Real>, kOutputs> oracle_forward(OracleCell cell, const Case& c,
                                                              const Inputs<double>& in) {
  const Schedule schedule = c.schedule();
  const int64_t G = c.facts.gates, H = c.H, hout = c.hout();
  std::array<std::vector<Real>, kOutputs> out;
  for (int i = 0; i < kOutputs; ++i) out[i].resize(c.output_sizes()[i]);
  for (int d = 0; d < c.directions; ++d) {
    const Guarded<double>* w = &in[kWeights + 5 * d];
    for (int64_t row = 0; row < c.B; ++row) {
      std::vector<Real> h(hout), state(H), emitted(H), a(G * H), b(G * H), gates_a(G), gates_b(G);
      for (int64_t j = 0; j < hout && c.states; ++j) h[j] = in[kH0][(d * c.B + row) * hout + j];
      for (int64_t j = 0; j < H && in[kC0].size(); ++j) state[j] = in[kC0][(d * c.B + row) * H + j];
      const int64_t length = c.length(row);
      for (int64_t s = 0; s < length; ++s) {
        const int64_t n = schedule.offset(d == 1 ? length - 1 - s : s) + row;
        for (int64_t g = 0; g < G * H; ++g) {
          a[g] = c.bias ? w[2][g] : 0;
          b[g] = c.bias ? w[3][g] : 0;
          for (int64_t k = 0; k < c.I; ++k) a[g] += Real(w[0][g * c.I + k]) * in[kX][n * c.I + k];
          for (int64_t k = 0; k < hout; ++k) b[g] += w[1][g * hout + k] * h[k];
        }
        for (int64_t j = 0; j < H; ++j) {
          for (int64_t g = 0; g < G; ++g) {
            gates_a[g] = a[g * H + j];
            gates_b[g] = b[g * H + j];
          }
          emitted[j] = cell(gates_a.data(), gates_b.data(), c.P ? 0 : h[j], state[j]);
        }
        for (int64_t j = 0; j < hout; ++j) {
          h[j] = c.P ? 0 : emitted[j];
          for (int64_t k = 0; c.P && k < H; ++k) h[j] += w[4][j * H + k] * emitted[k];
          out[kOutput][(n * c.directions + d) * hout + j] = h[j];
        }
      }
      for (int64_t j = 0; j < hout; ++j) out[kHn][(d * c.B + row) * hout + j] = h[j];
      for (int64_t j = 0; j < H && c.facts.cell_state; ++j) out[kCn][(d * c.B + row) * H + j] = state[j];
    }
  }
  return out;
}

}  // namespace fastseq::test
