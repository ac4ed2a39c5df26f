// The checks of a recurrent layer, of whatever kernels there are in the tables of cpu::Kernels.
#pragma once

#include "layer.h"
#include "oracle.h"

namespace fastseq::test {

// Around the widths of vectors (2 to 16 numbers), of panels (up to 64), of chains (128 and 256) and of the row blocks
// (64), the number of steps from which weights are packed (8), and the work from which threads share rows or units. The
// first kQuickShapes of them touch every branch of the drivers at least once.
constexpr int kQuickShapes = 11;
const Shape kShapes[] = {
    // T, B, I, H, P, directions, ragged, bias, states
    {8, 3, 5, 17, 9, 2, true, true, true},
    {2, 3, 5, 17, 9, 2, true, true, true},
    {8, 7, 3, 15, 0, 2, false, true, true},
    {7, 3, 4, 7, 5, 2, false, false, false},
    {1, 7, 6, 33, 0, 1, false, true, true},
    {8, 1, 2, 33, 3, 1, false, false, true},
    {8, 70, 2, 3, 0, 1, true, true, false},
    {20, 3, 3, 1, 1, 2, true, false, true},
    {8, 1, 3, 100, 0, 1, false, true, true},   // panels side by side, the last one not full
    {9, 5, 7, 257, 0, 1, false, true, false},  // units shared by the threads, parts of a panel too
    {3, 1, 1, 33, 5, 2, false, true, true},    // products of one row
    {1, 1, 1, 1, 0, 1, false, false, false},
    {2, 1, 5, 364, 150, 1, false, true, true},  // products of one row that threads share
    {1, 3, 2, 64, 17, 2, false, true, true},
    {9, 3, 7, 129, 0, 1, false, true, false},   // units shared in whole panels
    {40, 30, 12, 100, 0, 1, true, true, true},  // gradients of several blocks of K, whose products are turned round
    {2, 70, 7, 7, 0, 2, true, false, false},
    {2, 1, 64, 3, 0, 1, false, true, true},
    {7, 7, 33, 17, 33, 1, true, true, true},  // P > H
    {7, 70, 3, 64, 0, 1, true, true, false},
    {8, 1, 17, 64, 0, 2, false, true, true},
    {8, 7, 1, 1, 0, 1, true, true, true},
    {8, 70, 257, 33, 64, 2, true, true, true},
    {20, 1, 15, 7, 3, 2, false, true, false},
    {20, 7, 64, 15, 0, 2, true, true, true},
    {12, 70, 5, 64, 15, 1, false, true, true},
    {12, 5, 20, 131, 130, 2, true, true, true},  // units shared in two directions, an odd tail
    {8, 150, 2, 17, 0, 1, false, false, true},   // more than two blocks of rows
    {3, 1100, 2, 31, 0, 1, true, true, true},    // rows shared where steps are GEMM calls
    {0, 3, 2, 5, 0, 2, false, true, true},       // no steps
    {9, 4, 0, 5, 0, 2, false, true, true},       // no input features
};

// Bounds on |error|, in the type's epsilon, relative to the largest number of the tensor; several times what was seen.
constexpr double kForwardBound = 64, kBackwardBound = 256, kHalfBound = 8;

template <class T>
double epsilon() {
  return std::numeric_limits<T>::epsilon();
}
template <>
inline double epsilon<bfloat16>() {
  return 0x1p-7;
}
template <>
inline double epsilon<float16>() {
  return 0x1p-10;
}
template <class Numbers>
double largest(const Numbers& numbers) {
  double out = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(numbers.size()); ++i)
    out = std::max(out, std::fabs(static_cast<double>(value(numbers[i]))));
  return out;
}

template <class T>
void same_outputs(Report& report, const std::string& what, const Outputs<T>& got, const Outputs<T>& want) {
  for (int i = 0; i < kOutputs; ++i) report.same_bits(what + ": " + output_name(i), got[i], want[i]);
}
template <class T>
void same_gradients(Report& report, const std::string& what, const Inputs<T>& got, const Inputs<T>& want,
                    unsigned asked = ~0u) {
  for (int i = 0; i < kInputs; ++i)
    if (asked >> i & 1) report.same_bits(what + ": d " + input_name(i), got[i], want[i]);
}

// Outputs do not depend on whether backward will follow, on what else is asked for, or on the threads.
template <class T>
Forward<T> check_forward(Report& report, const Kernels& kernels, const Case& c, const Inputs<T>& in) {
  const Forward<T> f = run_forward(kernels, c, in, true, 1);
  for (int i = 0; i < kOutputs; ++i) report.written(output_name(i), f.out[i]);
  for (int d = 0; d < c.directions; ++d) {
    report.written("kept", f.kept[d]);
    report.written("emitted", f.emitted[d]);
  }
  same_outputs(report, "inference as training", run_forward(kernels, c, in, false, 1).out, f.out);
  report.same_bits("output alone", run_forward(kernels, c, in, false, 2, false).out[kOutput], f.out[kOutput]);
  for (int threads = 2; threads <= 3; ++threads) {
    const Forward<T> g = run_forward(kernels, c, in, true, threads);
    const std::string what = std::to_string(threads) + " threads";
    same_outputs(report, what, g.out, f.out);
    for (int d = 0; d < c.directions; ++d) {
      report.same_bits(what + ": kept", g.kept[d], f.kept[d]);
      report.same_bits(what + ": emitted", g.emitted[d], f.emitted[d]);
    }
  }
  return f;
}

// Weights packed beforehand give the bits of those packed for the call, and of many steps take their place altogether.
template <class T>
void check_packed(Report& report, const Kernels& kernels, const Case& c, const Inputs<T>& in, const Forward<T>& f) {
  constexpr int64_t kStepsToPack = 8;  // as in cpu/rnn_driver.h
  if (!kernels.typed<T>().rnn_pack[c.cell]) return;
  for (int threads = 1; threads <= 2; ++threads) {
    const auto packed = pack_weights(kernels, c, in, threads);
    Inputs<T> absent = in;
    for (int i = kWeights; i < kInputs && c.T >= kStepsToPack; ++i)
      if (const int weight = (i - kWeights) % 5; weight != 2 && weight != 3)
        absent[i] = Guarded<T>(in[i].size());  // NaN
    for (const bool keep : {false, true})
      same_outputs(report, "packed beforehand, " + std::to_string(threads) + " threads",
                   run_forward(kernels, c, absent, keep, threads, true, packed).out, f.out);
  }
}

// An absent state or bias is one of zeros.
template <class T>
void check_absent(Report& report, const Kernels& kernels, const Case& c, const Inputs<T>& in, const Forward<T>& f) {
  if (c.states && c.bias) return;
  Case full = c;
  full.states = full.bias = true;
  Inputs<T> zeros = in;
  for (int i = 0; i < kInputs; ++i)
    if (!in[i].size()) zeros[i] = zeros_of<T>(full.input_sizes()[i]);
  same_outputs(report, "absent as zero", run_forward(kernels, full, zeros, false, 1).out, f.out);
}

// A row has the same bits whatever rows are beside it, and how many, even if all of them are NaN.
template <class T>
void check_rows(Report& report, const Kernels& kernels, const Case& c, const Inputs<T>& in, const Forward<T>& f) {
  for (const int64_t row : {int64_t(0), c.B / 2, c.B - 1}) {
    // Row 0 comes too: it is a longest one and keeps the number of steps, on which the bits may depend.
    const Rows rows(c, row > 0 ? std::vector<int64_t>{0, row} : std::vector<int64_t>{0});
    const Inputs<T> few_in = rows.of_inputs(in);
    const Outputs<T> want = rows.of_outputs(f.out);
    const std::string what = "row " + std::to_string(row);

    Inputs<T> polluted = in;
    polluted[kX] = Guarded<T>(in[kX].size());  // NaN
    rows.put_back(few_in[kX], c.I, polluted[kX]);
    same_outputs(report, what + " among NaN", rows.of_outputs(run_forward(kernels, c, polluted, false, 1).out), want);

    same_outputs(report, what + " without the others", run_forward(kernels, rows.few, few_in, false, 1).out, want);
  }
}

// Gradients do not depend on the threads or on which of them are asked for, and an absent output gradient is zero.
template <class T>
Inputs<T> check_backward(Report& report, const Kernels& kernels, const Case& c, const Inputs<T>& in,
                         const Forward<T>& f, const Outputs<T>& d_out) {
  const Inputs<T> grads = run_backward(kernels, c, in, f, d_out, 1);
  for (int i = 0; i < kInputs; ++i) report.written(std::string("d ") + input_name(i), grads[i]);
  for (int threads = 2; threads <= 3; ++threads)
    same_gradients(
        report, std::to_string(threads) + " threads", run_backward(kernels, c, in, f, d_out, threads), grads);
  for (int i = 0; i < kInputs; ++i) {
    if (!in[i].size()) continue;
    const unsigned only = 1u << i;
    same_gradients(report, "asked for alone", run_backward(kernels, c, in, f, d_out, 1, only), grads, only);
  }
  for (int i = 0; i < kOutputs; ++i) {
    Outputs<T> absent = d_out, zero = d_out;
    absent[i] = Guarded<T>();
    zero[i] = zeros_of<T>(d_out[i].size());
    same_gradients(report, std::string("absent gradient of ") + output_name(i),
                   run_backward(kernels, c, in, f, absent, 1), run_backward(kernels, c, in, f, zero, 1));
  }
  return grads;
}

// loss = <d_output, output> + <d_h_n, h_n> + <d_c_n, c_n>
inline double loss(const Kernels& kernels, const Case& c, const Inputs<double>& in, const Outputs<double>& d_out) {
  const Outputs<double> out = run_forward(kernels, c, in, false, 1).out;
  long double sum = 0;
  for (int i = 0; i < kOutputs; ++i)
    for (int64_t j = 0; j < out[i].size(); ++j) sum += static_cast<long double>(d_out[i][j]) * out[i][j];
  return static_cast<double>(sum);
}

// The slope of the loss along a random direction in inputs [first, last), against central differences.
inline void check_slope(Report& report, const Kernels& kernels, const Case& c, const Inputs<double>& in,
                        const Outputs<double>& d_out, const Inputs<double>& grads, int first, int last) {
  Random random(17);
  Inputs<double> direction;
  double slope = 0, norm = 0, upstream = 0;
  for (int i = first; i < last; ++i) {
    direction[i] = Guarded<double>(in[i].size());
    for (int64_t j = 0; j < in[i].size(); ++j) {
      direction[i][j] = random.uniform(1);
      slope += direction[i][j] * grads[i][j];
      norm += grads[i][j] * grads[i][j];
    }
  }
  for (const Guarded<double>& d : d_out)
    for (int64_t j = 0; j < d.size(); ++j) upstream += d[j] * d[j];
  const double tolerance = 1e-6 * std::sqrt(norm) + 1e-9 * std::sqrt(upstream);

  // A kink (relu) may lie within one step of the difference, hardly within a far smaller one; a wrong gradient is wrong
  // at any.
  double difference = 0;
  for (const double step : {1e-5, 1e-6, 1e-7}) {
    Inputs<double> plus = in, minus = in;
    for (int i = first; i < last; ++i)
      for (int64_t j = 0; j < in[i].size(); ++j) {
        plus[i][j] += step * direction[i][j];
        minus[i][j] -= step * direction[i][j];
      }
    difference = (loss(kernels, c, plus, d_out) - loss(kernels, c, minus, d_out)) / (2 * step);
    if (std::fabs(difference - slope) <= tolerance) break;
  }
  const std::string what = last == first + 1 ? std::string("d ") + input_name(first) : "all gradients";
  report.check(std::fabs(difference - slope) <= tolerance, what, [&] {
    std::ostringstream out;
    out.precision(12);
    out << "the slope along a random direction: expected " << difference << " (central differences) within "
        << tolerance << "; got " << slope;
    return out.str();
  });
}

inline void check_differences(Report& report, const Kernels& kernels, const Case& c, const Inputs<double>& in,
                              const Outputs<double>& d_out, const Inputs<double>& grads) {
  constexpr double kFlopsForEach = 3e6;  // each input on its own where that takes no time
  if (c.flops() > kFlopsForEach) return check_slope(report, kernels, c, in, d_out, grads, 0, kInputs);
  for (int i = 0; i < kInputs; ++i)
    if (in[i].size()) check_slope(report, kernels, c, in, d_out, grads, i, i + 1);
}

template <class T>
void near_oracle(Report& report, const Forward<T>& f, const std::array<std::vector<Real>, kOutputs>& want) {
  for (int i = 0; i < kOutputs; ++i)
    report.near(std::string("against the oracle: ") + output_name(i), f.out[i], want[i],
                kForwardBound * epsilon<T>() * largest(want[i]));
}

// Numbers of 16 bits: outputs against double, and gradients against double from the same forward.
template <class T>
void check_half(Report& report, const Kernels& kernels, const Case& c, const Inputs<double>& exact,
                const Outputs<double>& exact_d_out, bool rows_alone) {
  const Inputs<T> in = convert<T>(exact);
  const Outputs<T> d_out = convert<T>(exact_d_out);
  const Forward<T> f = check_forward(report, kernels, c, in);
  check_packed(report, kernels, c, in, f);
  check_absent(report, kernels, c, in, f);
  if (rows_alone) check_rows(report, kernels, c, in, f);
  const Forward<double> near = run_forward(kernels, c, convert<double>(in), true, 1);
  for (int i = 0; i < kOutputs; ++i)
    report.near(std::string("against double: ") + output_name(i), f.out[i], near.out[i],
                kHalfBound * epsilon<T>() * largest(near.out[i]));
  if (c.total_rows() == 0) return;  // no gradient to speak of
  const Inputs<T> grads = check_backward(report, kernels, c, in, f, d_out);
  const Forward<double> same{convert<double>(f.out), convert<double>(f.kept), convert<double>(f.emitted)};
  const Inputs<double> want = run_backward(kernels, c, convert<double>(in), same, convert<double>(d_out), 1);
  for (int i = 0; i < kInputs; ++i)
    report.near(std::string("against double: d ") + input_name(i), grads[i], want[i],
                kHalfBound * epsilon<T>() * largest(want[i]));
}

// rows_alone: a row has the same bits whatever is beside it.
inline void check_case(Report& report, const Kernels& kernels, const Case& c, bool rows_alone = true) {
  const auto where = [&](const char* type) { report.where = std::string(kernels.isa) + " " + type + " " + c.name(); };
  const Inputs<double> in = random_inputs(c, 1);
  const Inputs<float> in_float = convert<float>(in);
  const Outputs<double> d_out = random_output_gradients(c, 2);

  where("double");
  const Forward<double> f = check_forward(report, kernels, c, in);
  check_packed(report, kernels, c, in, f);
  check_absent(report, kernels, c, in, f);
  if (rows_alone) check_rows(report, kernels, c, in, f);
  where("float");
  const Forward<float> f_float = check_forward(report, kernels, c, in_float);
  check_packed(report, kernels, c, in_float, f_float);
  check_absent(report, kernels, c, in_float, f_float);
  if (rows_alone) check_rows(report, kernels, c, in_float, f_float);
  for (int i = 0; i < kOutputs; ++i)
    report.near(std::string("against double: ") + output_name(i), f_float.out[i], f.out[i],
                kForwardBound * epsilon<float>() * largest(f.out[i]));
  if (const OracleCell cell = oracle_cell(c.facts.name)) {
    const auto want = oracle_forward(cell, c, in);
    near_oracle(report, f_float, want);
    where("double");
    near_oracle(report, f, want);
  }
  where("bfloat16");
  check_half<bfloat16>(report, kernels, c, in, d_out, rows_alone);
  where("float16");
  if (kernels.f16.rnn_forward[c.cell]) check_half<float16>(report, kernels, c, in, d_out, rows_alone);
  if (c.total_rows() == 0) return;  // no gradient to speak of

  where("double");
  const Inputs<double> grads = check_backward(report, kernels, c, in, f, d_out);
  check_differences(report, kernels, c, in, d_out, grads);
  where("float");
  const Inputs<float> grads_float = check_backward(report, kernels, c, in_float, f_float, convert<float>(d_out));
  // From the float forward, so that both are on the same side of every kink.
  const Forward<double> same{
      convert<double>(f_float.out), convert<double>(f_float.kept), convert<double>(f_float.emitted)};
  const Inputs<double> want = run_backward(kernels, c, in, same, d_out, 1);
  for (int i = 0; i < kInputs; ++i)
    report.near(std::string("against double: d ") + input_name(i), grads_float[i], want[i],
                kBackwardBound * epsilon<float>() * largest(want[i]));
}

// So many rows that both drivers work in several chunks of steps: every fourth of them alone is one chunk, and the four
// parts together must give what the whole gives.
inline void check_chunks(Report& report, const Kernels& kernels, int cell, int directions, bool ragged) {
  constexpr int64_t kNumbers = (20 << 20) / sizeof(double), B = 70, H = 8, kParts = 4;
  const CellFacts& facts = kernels.cells[cell];
  const Case c(cell, facts, {kNumbers / (facts.gates * H * B), B, 2, H, 3, directions, ragged, true, true});
  report.where = std::string(kernels.isa) + " double " + c.name();
  const Inputs<double> in = random_inputs(c, 1);
  const Outputs<double> d_out = random_output_gradients(c, 2);
  const Forward<double> f = run_forward(kernels, c, in, true, 2);
  const Inputs<double> grads = run_backward(kernels, c, in, f, d_out, 2);
  Inputs<double> sum;
  for (int64_t part = 0; part < kParts; ++part) {
    std::vector<int64_t> some;
    for (int64_t row = part; row < B; row += kParts) some.push_back(row);
    const Rows rows(c, some);
    const Inputs<double> few_in = rows.of_inputs(in);
    const Forward<double> g = run_forward(kernels, rows.few, few_in, true, 1);
    same_outputs(report, "a part", g.out, rows.of_outputs(f.out));
    const Inputs<double> few_grads = run_backward(kernels, rows.few, few_in, g, rows.of_outputs(d_out), 1);
    const Inputs<double> want = rows.of_inputs(grads);
    for (int i = 0; i < kWeights; ++i)
      report.near(std::string("a part: d ") + input_name(i), few_grads[i], want[i],
                  kBackwardBound * epsilon<double>() * largest(want[i]));
    for (int i = kWeights; i < kInputs; ++i) {
      if (part == 0) sum[i] = zeros_of<double>(grads[i].size());
      for (int64_t j = 0; j < grads[i].size(); ++j) sum[i][j] += few_grads[i][j];
    }
  }
  for (int i = kWeights; i < kInputs; ++i)  // bound by the size of the terms, of which there are many
    report.near(std::string("the parts' sum: d ") + input_name(i), sum[i], grads[i],
                kBackwardBound * epsilon<double>() * std::sqrt(c.total_rows()) * largest(grads[i]));
}

}  // namespace fastseq::test
