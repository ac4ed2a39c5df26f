// The checks of layers that are given to the kernels at once: they have the bits that they have one after another.
#pragma once

#include "layer_check.h"

namespace fastseq::test {

template <class T>
struct Stack {
  std::vector<Case> cases;  // one for each layer, the lowest first
  std::vector<Inputs<T>> in;
  std::vector<Outputs<T>> d_out;  // output gradients come from above, but the highest layer's

  Stack(int cell, const CellFacts& facts, const Shape& lowest, int layers) {
    for (int i = 0; i < layers; ++i) {
      Shape shape = lowest;
      if (i > 0) shape.I = cases[0].hout();
      cases.emplace_back(cell, facts, shape);
      in.push_back(convert<T>(random_inputs(cases[i], 10 + i)));
      d_out.push_back(convert<T>(random_output_gradients(cases[i], 20 + i)));
    }
  }
  int layers() const { return static_cast<int>(cases.size()); }

  // So many layers in a call.
  std::vector<Forward<T>> forward(const Kernels& kernels, bool keep, int threads, int at_once) const {
    std::vector<Forward<T>> f(cases.size());
    std::vector<RnnForward<T>> group;
    for (int i = 0; i < layers(); ++i) {
      group.push_back(forward_block(cases[i], in[i], f[i], keep, threads));
      if (i > 0) group.back().x = f[i - 1].out[kOutput].data();
      run(kernels.typed<T>().rnn_forward[cases[0].cell], group, at_once, i + 1 == layers());
    }
    return f;
  }
  std::vector<Inputs<T>> backward(const Kernels& kernels, const std::vector<Forward<T>>& f, int threads,
                                  int at_once) const {
    std::vector<Inputs<T>> grads(cases.size());
    std::vector<RnnBackward<T>> group;
    for (int i = layers() - 1; i >= 0; --i) {
      group.push_back(backward_block(cases[i], in[i], f[i], d_out[i], grads[i], threads));
      if (i > 0) group.back().x = f[i - 1].out[kOutput].data();
      if (i + 1 < layers()) group.back().d_output = grads[i + 1][kX].data();
      run(kernels.typed<T>().rnn_backward[cases[0].cell], group, at_once, i == 0);
    }
    return grads;
  }

 private:
  template <class Kernel, class Block>
  static void run(Kernel kernel, std::vector<Block>& group, int at_once, bool last) {
    if (static_cast<int>(group.size()) < at_once && !last) return;
    kernel(group.data(), static_cast<int>(group.size()));
    group.clear();
  }
};

template <class T>
void check_stack(Report& report, const Kernels& kernels, const Stack<T>& stack) {
  const std::vector<Forward<T>> f = stack.forward(kernels, true, 1, 1);
  const std::vector<Inputs<T>> grads = stack.backward(kernels, f, 1, 1);
  for (int threads = 1; threads <= 3; ++threads)
    for (const int at_once : {2, stack.layers()}) {
      const std::string what =
          std::to_string(threads) + " threads, " + std::to_string(at_once) + " layers at once, layer ";
      const std::vector<Forward<T>> infer = stack.forward(kernels, false, threads, at_once);
      const std::vector<Forward<T>> train = stack.forward(kernels, true, threads, at_once);
      const std::vector<Inputs<T>> got = stack.backward(kernels, train, threads, at_once);
      for (int i = 0; i < stack.layers(); ++i) {
        same_outputs(report, what + std::to_string(i), infer[i].out, f[i].out);
        same_outputs(report, what + std::to_string(i), train[i].out, f[i].out);
        report.same_bits(what + std::to_string(i) + ": kept", train[i].kept[0], f[i].kept[0]);
        report.same_bits(what + std::to_string(i) + ": emitted", train[i].emitted[0], f[i].emitted[0]);
        same_gradients(report, what + std::to_string(i), got[i], grads[i]);
      }
    }
}

// Steps that do not fill the last piece of a wave; rows that end early; a backward of several chunks of steps, and more
// layers than threads.
inline void check_stacks(Report& report, const Kernels& kernels, int cell, bool quick) {
  const CellFacts& facts = kernels.cells[cell];
  const Shape shapes[] = {
      // T, B, I, H, P, directions, ragged, bias, states
      {8, 1, 5, 17, 0, 1, false, true, true},
      {101, 1, 33, 40, 7, 1, false, true, false},
      {50, 5, 9, 20, 0, 1, true, false, true},
      {1100, 1, 3, 130, 0, 1, false, true, true},
  };
  // Layers of a direction go together where threads have nothing better to share.
  const auto at_once = [&](const Shape& shape, int threads, bool backward) {
    const Case c(cell, facts, shape);
    RnnLayer<float> p;
    fill_layer(p, c, {}, threads);
    return kernels.typed<float>().rnn_layers_at_once[cell](p, 3, backward);
  };
  report.where = std::string(kernels.isa) + " " + facts.name;
  for (const bool backward : {false, true}) {
    const auto expect = [&](int expected, const Shape& shape, int threads) {
      const int got = at_once(shape, threads, backward);
      report.check(got == expected, "rnn_layers_at_once", [&] {
        return "expected " + std::to_string(expected) + " for " + Case(cell, facts, shape).name() + ", got " +
               std::to_string(got);
      });
    };
    const Shape small{400, 1, 40, 40, 0, 1, false, true, true};
    Shape rows = small, steps = small, both = small, inputs = small, units = small;
    rows.B = 64, steps.T = 2, both.directions = 2, inputs.I = 400, units.H = units.I = 2000;
    expect(3, small, 2);
    expect(1, small, 1);
    for (const Shape& shape : {rows, steps, both, inputs, units}) expect(1, shape, 2);
  }
  for (const Shape& shape : shapes) {
    const bool chunks = shape.T > 1000;
    if (quick && chunks) continue;
    const int layers = chunks ? 2 : 4;
    const auto check = [&](auto zero, const char* type) {
      using T = decltype(zero);
      const Stack<T> stack(cell, facts, shape, layers);
      report.where = std::string(kernels.isa) + " " + type + " " + stack.cases[0].name() + ", a stack";
      check_stack(report, kernels, stack);
    };
    check(float(), "float");
    check(double(), "double");
    if (!chunks) check(bfloat16(), "bfloat16");
  }
}

}  // namespace fastseq::test
