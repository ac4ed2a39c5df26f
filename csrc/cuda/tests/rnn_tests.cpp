// The recurrent kernels of CUDA by the checks of those of the CPU, step by step and with all steps in one launch: under
// emulation, or, compiled by nvcc, on a device.
//
//   rnn_tests [--quick | --races] [cell]      --quick: fewer sizes; --races: each kernel once, for sanitizers
#include <utility>

#include "device_memory.h"
#include "program.h"

#include "cuda/rnn.h"
#include "cuda/rnn_plan.h"
#include "tests/layer_check.h"

namespace fastseq::test {
namespace {

using cuda::Call;
using cuda::RnnPath;

RnnPath path = RnnPath::stepwise;
bool tf32 = false;
int64_t launches = 0;

// A ragged schedule's tables where the device sees them.
struct Tables {
  std::vector<int64_t, Allocator<int64_t>> batch_sizes, offsets;

  Tables(const Schedule& schedule, Call& call) {
    if (!schedule.batch_sizes) return;
    batch_sizes.assign(schedule.batch_sizes, schedule.batch_sizes + schedule.steps);
    offsets.assign(schedule.offsets, schedule.offsets + schedule.steps + 1);
    call.batch_sizes = batch_sizes.data(), call.offsets = offsets.data();
  }
  ~Tables() { wait_for_device(); }
};

template <CellKind kCell, class T>
void forward(const RnnForward<T>* layers, int) {
  const RnnForward<T>& p = *layers;
  ++launches;
  must(with_workspace(cuda::rnn_forward_workspace(kCell, p),
                      [&](void* workspace) {
                        Call call;
                        call.workspace = workspace, call.rnn_path = path, call.tf32 = tf32;
                        const Tables tables(p.schedule, call);
                        return cuda::rnn_forward(kCell, p, call);
                      }),
       "rnn_forward");
}
template <CellKind kCell, class T>
void backward(const RnnBackward<T>* layers, int) {
  const RnnBackward<T>& p = *layers;
  ++launches;
  must(with_workspace(cuda::rnn_backward_workspace(kCell, p),
                      [&](void* workspace) {
                        Call call;
                        call.workspace = workspace, call.rnn_path = path, call.tf32 = tf32;
                        const Tables tables(p.schedule, call);
                        return cuda::rnn_backward(kCell, p, call);
                      }),
       "rnn_backward");
}

template <class T>
const cpu::TypedKernels<T>& typed_kernels() {
  static cpu::TypedKernels<T> out{};
#define X(name, type)                                                             \
  out.rnn_forward[static_cast<int>(CellKind::name)] = forward<CellKind::name, T>; \
  out.rnn_backward[static_cast<int>(CellKind::name)] = backward<CellKind::name, T>;
  FASTSEQ_FOR_EACH_CELL(X)
#undef X
  return out;
}

Kernels all_kernels() {
  Kernels out{};
  out.isa = "cuda";
  for (int i = 0; i < cpu::kCells; ++i) out.cells[i] = cuda::cell_facts(static_cast<CellKind>(i));
  out.f32 = &typed_kernels<float>(), out.f64 = &typed_kernels<double>();
  out.bf16 = &typed_kernels<bfloat16>(), out.f16 = typed_kernels<float16>();
  return out;
}

// Sizes at which blocks, tiles of 64 and warps are full, begun and more than one; those with H a multiple of 8 can go
// in one launch.
const Shape kStepwiseShapes[] = {
    // T, B, I, H, P, directions, ragged, bias, states
    {5, 3, 5, 17, 9, 2, true, true, true},    {3, 7, 3, 15, 0, 2, false, true, true},
    {4, 3, 4, 7, 5, 2, false, false, false},  {2, 70, 2, 3, 0, 1, true, true, false},
    {3, 2, 3, 129, 0, 1, false, true, false}, {0, 3, 2, 5, 0, 2, false, true, true},
    {3, 4, 0, 5, 0, 2, false, true, true},    {3, 5, 33, 72, 70, 1, true, true, true},
};
constexpr int kQuickStepwiseShapes = 3;
const Shape kPersistentShapes[] = {
    {4, 5, 3, 24, 0, 2, false, true, true},   {3, 33, 2, 40, 0, 1, false, true, false},
    {3, 70, 4, 16, 0, 2, false, false, true}, {2, 3, 2, 264, 0, 1, false, true, true},
    {5, 37, 3, 24, 0, 2, true, true, true},   {4, 5, 2, 16, 0, 2, true, true, false},
};
constexpr int kQuickPersistentShapes = 1;

// Errors are bound by so many units of the last bit that products keep.
template <class T>
void check_persistent(Report& report, const Kernels& kernels, const Case& c, const char* type, double forward_bound,
                      double backward_bound, RnnPath wanted = RnnPath::persistent) {
  report.where = std::string("cuda, in one launch, ") + type + " " + c.name();
  const size_t odd_fence = std::exchange(fence, fence ? 40 : 0);  // these kernels read 16 bytes at once
  path = wanted;
  const Inputs<T> in = convert<T>(random_inputs(c, 3));
  const Outputs<T> d_out = convert<T>(random_output_gradients(c, 4));
  const Forward<T> f = check_forward(report, kernels, c, in);
  check_absent(report, kernels, c, in, f);
  const Inputs<T> grads = check_backward(report, kernels, c, in, f, d_out);
  path = RnnPath::stepwise;  // those of double go no other way
  const Forward<double> near = run_forward(kernels, c, convert<double>(in), true, 1);
  for (int i = 0; i < kOutputs; ++i)
    report.near(
        std::string("against double: ") + output_name(i), f.out[i], near.out[i], forward_bound * largest(near.out[i]));
  const Forward<double> same{convert<double>(f.out), convert<double>(f.kept), convert<double>(f.emitted)};
  const Inputs<double> want = run_backward(kernels, c, convert<double>(in), same, convert<double>(d_out), 1);
  for (int i = 0; i < kInputs; ++i)
    report.near(
        std::string("against double: d ") + input_name(i), grads[i], want[i], backward_bound * largest(want[i]));
  fence = odd_fence;
}

#if defined(FASTSEQ_EMULATE_CUDA)
// Weights that registers hold a part of, on devices whose blocks have just too little shared memory for all of them.
struct HeldShape {
  Shape shape;
  int multiprocessors;  // for tiles of 16 units alone
  bool backward;        // what holds them
};
const HeldShape kHeldShapes[] = {
    {{2, 3, 2, 520, 0, 1, false, true, true}, 34, false}, {{2, 3, 2, 520, 0, 1, false, true, true}, 34, true},
    {{3, 20, 2, 136, 0, 1, true, true, true}, 10, false}, {{3, 40, 2, 136, 0, 1, true, true, true}, 10, false},
    {{2, 9, 2, 40, 0, 2, true, true, true}, 6, true},
};

void check_held(Report& report, const Kernels& kernels, int cell) {
  const CellFacts& facts = kernels.cells[cell];
  const cuda::emulation::Device before = cuda::emulation::device;
  for (const HeldShape& held : kHeldShapes) {
    if (facts.gates == 1) continue;
    const Case c(cell, facts, held.shape);
    cuda::RnnSizes sizes;
    sizes.gates = facts.gates, sizes.batch = c.B, sizes.hidden = c.H, sizes.directions = c.directions;
    sizes.number_bytes = 2, sizes.aligned = true;
    cuda::RnnPlan plan;
    int& shared = cuda::emulation::device.shared_of_block;
    cuda::emulation::device.multiprocessors = held.multiprocessors;
    for (; shared > 0 && !(plan.persistent && plan.tile.held); shared -= 1024) {
      cuda::DeviceFacts device;
      must(cuda::device_facts(device), "device_facts");
      plan = held.backward ? plan_rnn_backward(sizes, device) : plan_rnn_forward(sizes, device);
    }
    shared += 1024;
    report.where = std::string("cuda, weights in registers, ") + c.name();
    report.check(plan.persistent && plan.tile.held, "a plan that has them", [&] { return plan.reason; });
    const double bound = kHalfBound * epsilon<bfloat16>();
    check_persistent<bfloat16>(report, kernels, c, "bfloat16", bound, bound, RnnPath::planned);
    cuda::emulation::device = before;
  }
}
#endif

// Two blocks and a tail along each axis, three stages of K (32) and a tail.
const Shape kStepwiseRaces = {2, 70, 40, 136, 72, 2, true, true, true};
const Shape kPersistentHalfRaces = {3, 70, 3, 24, 0, 1, false, true, true};
const Shape kPersistentRaces = {3, 33, 3, 24, 0, 1, false, true, true};
const Shape kPersistentRaggedRaces = {3, 5, 3, 24, 0, 2, true, true, true};

template <class T>
void run_once(Report& report, const Kernels& kernels, const Case& c) {
  report.where = c.name();
  const Inputs<T> in = convert<T>(random_inputs(c, 5));
  const Forward<T> f = run_forward(kernels, c, in, true, 1);
  for (int i = 0; i < kOutputs; ++i) report.written(output_name(i), f.out[i]);
  const Inputs<T> grads = run_backward(kernels, c, in, f, convert<T>(random_output_gradients(c, 6)), 1);
  for (int i = 0; i < kInputs; ++i) report.written(std::string("d ") + input_name(i), grads[i]);
}

void check_races(Report& report, const Kernels& kernels, const std::vector<int>& cells) {
  fence = fence ? 40 : 0;  // rows of 16 bytes' multiples can be copied so
#if defined(FASTSEQ_EMULATE_CUDA)
  cuda::emulation::device.multiprocessors = 4;  // larger tiles, and fewer threads, as each takes its time
#endif
  for (const int cell : cells) {
    const Case stepwise(cell, kernels.cells[cell], kStepwiseRaces);
    path = RnnPath::stepwise;
    run_once<double>(report, kernels, stepwise), run_once<float>(report, kernels, stepwise);
    run_once<bfloat16>(report, kernels, stepwise), run_once<float16>(report, kernels, stepwise);
  }
  path = RnnPath::persistent;
  for (const int cell : cells) {
    const Case half(cell, kernels.cells[cell], kPersistentHalfRaces), one(cell, kernels.cells[cell], kPersistentRaces);
    const Case two(cell, kernels.cells[cell], kPersistentRaggedRaces);
    run_once<bfloat16>(report, kernels, half), run_once<bfloat16>(report, kernels, two);
    run_once<float16>(report, kernels, half), run_once<float16>(report, kernels, two);
    for (const bool rounded : {false, true}) {
      tf32 = rounded;
      run_once<float>(report, kernels, one), run_once<float>(report, kernels, two);
    }
    tf32 = false;
  }
}

void check_all(Report& report, const Kernels& kernels, const std::vector<int>& cells, bool quick) {
  for (const int cell : cells) {
    const CellFacts& facts = kernels.cells[cell];
    const Report before = report;
    path = RnnPath::stepwise;
    const int stepwise = quick ? kQuickStepwiseShapes : sizeof(kStepwiseShapes) / sizeof(kStepwiseShapes[0]);
    for (int i = 0; i < stepwise; ++i) check_case(report, kernels, Case(cell, facts, kStepwiseShapes[i]));
    const int persistent = quick ? kQuickPersistentShapes : sizeof(kPersistentShapes) / sizeof(kPersistentShapes[0]);
    for (int i = 0; i < persistent; ++i) {
      const Case c(cell, facts, kPersistentShapes[i]);
      const double bfloat16_bound = kHalfBound * epsilon<bfloat16>(), float16_bound = kHalfBound * epsilon<float16>();
      check_persistent<bfloat16>(report, kernels, c, "bfloat16", bfloat16_bound, bfloat16_bound);
      check_persistent<float16>(report, kernels, c, "float16", float16_bound, float16_bound);
      check_persistent<float>(
          report, kernels, c, "float", kForwardBound * epsilon<float>(), kBackwardBound * epsilon<float>());
      tf32 = true;
      check_persistent<float>(report, kernels, c, "tf32", float16_bound, float16_bound);  // as many bits
      tf32 = false;
    }
#if defined(FASTSEQ_EMULATE_CUDA)
    if (!quick) check_held(report, kernels, cell);
#endif
    std::printf("%s: %lld passed, %lld failed\n", facts.name, static_cast<long long>(report.passed - before.passed),
                static_cast<long long>(report.failed - before.failed));
    std::fflush(stdout);
  }
}

int run(const char* option, const char* wanted) {
  Report report;
  const Kernels kernels = all_kernels();
  std::vector<int> cells;
  for (int cell = 0; cell < cpu::kCells; ++cell)
    if (!wanted || !std::strcmp(wanted, kernels.cells[cell].name)) cells.push_back(cell);
  if (!std::strcmp(option, "--races")) check_races(report, kernels, cells);
  else check_all(report, kernels, cells, !std::strcmp(option, "--quick"));
  return end_program(report, launches);
}

}  // namespace
}  // namespace fastseq::test

int main(int argc, char** argv) { return fastseq::test::run_program(argc, argv, "cell", fastseq::test::run); }
