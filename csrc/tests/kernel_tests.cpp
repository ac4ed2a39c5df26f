// The kernels of every instruction set that this machine runs, without torch: attention and each cell of the list, in
// float, double and bfloat16, forward and backward.
//
//   fastseq_kernel_tests [--quick]      --quick: fewer sizes, for emulators and checkers
//   FASTSEQ_ISA=name                    only that instruction set
#include <cmath>
#include <cstdlib>
#include <exception>

#include "attention_check.h"
#include "cpu/memory.h"
#include "layer_check.h"
#include "stack_check.h"
#include "vec_math_check.h"

namespace fastseq::test {
namespace {

void check_isa(Report& report, const Kernels& kernels, bool quick) {
  const auto section = [&](const char* name, const auto& run) {
    const Report before = report;
    run();
    std::printf(
        "%s %s: %lld passed, %lld failed\n", kernels.isa, name, static_cast<long long>(report.passed - before.passed),
        static_cast<long long>(report.failed - before.failed));
    std::fflush(stdout);
  };
  section("exp, sigmoid, tanh, exp2_of_score", [&] {
    check_vec_math<float>(report, kernels, quick);
    check_vec_math<double>(report, kernels, quick);
  });
  section("attention", [&] {
    const std::string of = kernels.isa;
    report.where = of + " float32";
    check_attention(report, *kernels.f32, epsilon<float>(), kForwardBound, quick);
    report.where = of + " float64";
    check_attention(report, *kernels.f64, epsilon<double>(), kForwardBound, quick);
    report.where = of + " bfloat16";
    check_attention(report, *kernels.bf16, epsilon<bfloat16>(), kHalfBound, quick);
  });
  for (int cell = 0; cell < cpu::kCells; ++cell) {
    const CellFacts& facts = kernels.cells[cell];
    section(facts.name, [&] {
      if (!oracle_cell(facts.name)) std::printf("%s has no formula in oracle.h to be compared with\n", facts.name);
      const int shapes = quick ? kQuickShapes : sizeof(kShapes) / sizeof(kShapes[0]);
      for (int i = 0; i < shapes; ++i) {
        const Case c(cell, facts, kShapes[i]);
        check_case(report, kernels, c);
        if (c.P == 0) continue;
        Shape plain = kShapes[i];
        plain.P = 0;
        check_case(report, kernels, Case(cell, facts, plain));
      }
      check_stacks(report, kernels, cell, quick);
      if (quick) return;
      check_chunks(report, kernels, cell, 2, false);
      check_chunks(report, kernels, cell, 2, true);
      check_chunks(report, kernels, cell, 1, true);
    });
  }
}

void check_dispatch(Report& report) {
  const std::vector<std::string> available = cpu::available_isas();
  const std::string chosen = cpu::kernels().isa;
  report.where = "dispatch";
  report.check(cpu::find_kernels("nonsense") == nullptr, "find_kernels", [] { return "expected null for nonsense"; });
  report.check(cpu::find_kernels(chosen) == &cpu::kernels(), "find_kernels", [&] { return "got another " + chosen; });
  report.check(std::find(available.begin(), available.end(), chosen) != available.end(), "available_isas",
               [&] { return "expected it to hold " + chosen; });
  for (const std::string& isa : available) {
    const cpu::Kernels* kernels = cpu::find_kernels(isa);
    report.check(kernels && kernels->isa == isa, "find_kernels", [&] { return "expected the kernels of " + isa; });
  }
}

// What is given back comes again, if it is about as large as what is asked for, and is never too much in all.
void check_memory(Report& report) {
  report.where = "memory";
  constexpr size_t kMiB = size_t(1) << 20;
  const auto take = [&](size_t bytes) {
    const cpu::Block block = cpu::take_block(bytes);
    report.check(block.bytes >= bytes && reinterpret_cast<uintptr_t>(block.data) % 64 == 0, "take_block",
                 [&] { return "expected aligned memory of " + std::to_string(bytes) + " bytes or more"; });
    std::memset(block.data, 1, bytes);
    return block;
  };
  const cpu::Block first = take(kMiB + 1);
  cpu::give_block(first);
  if (cpu::kept_bytes() > 0) {  // nothing is kept under a sanitizer
    const cpu::Block again = take(kMiB), other = take(kMiB);
    report.check(again.data == first.data && other.data != first.data, "take_block",
                 [] { return "expected the block that was given back, and once only"; });
    cpu::give_block(again);
    const cpu::Block small = take(kMiB / 4);
    report.check(small.bytes < kMiB, "take_block", [] { return "a block four times as large was taken"; });
    cpu::give_block(small);
    cpu::give_block(other);
  }
  cpu::poison_blocks(true);
  const cpu::Block full = cpu::take_block(kMiB);
  report.check(std::isnan(static_cast<float*>(full.data)[kMiB / sizeof(float) - 1]), "poison_blocks",
               [] { return "expected a block full of NaN"; });
  cpu::give_block(full);
  cpu::poison_blocks(false);
  std::vector<cpu::Block> many;
  for (int i = 0; i < 200; ++i) many.push_back(take(kMiB / 2 + i * 4096));
  many.push_back(take(2 * cpu::kKeptBytes));
  for (const cpu::Block& block : many) {
    cpu::give_block(block);
    report.check(cpu::kept_bytes() <= cpu::kKeptBytes, "give_block", [] { return "more is kept than kKeptBytes"; });
  }
}

int run(bool quick) {
  Report report;
  const char* forced = std::getenv("FASTSEQ_ISA");
  const std::vector<std::string> isas =
      forced && *forced ? std::vector<std::string>{cpu::kernels().isa} : cpu::available_isas();
  check_dispatch(report);
  check_memory(report);
  cpu::poison_blocks(true);
  for (const std::string& isa : isas)
    if (const cpu::Kernels* kernels = cpu::find_kernels(isa)) check_isa(report, {*kernels}, quick);
  std::printf(
      "%lld passed, %lld failed\n", static_cast<long long>(report.passed), static_cast<long long>(report.failed));
  return report.failed ? 1 : 0;
}

}  // namespace
}  // namespace fastseq::test

int main(int argc, char** argv) {
  const bool quick = argc == 2 && !std::strcmp(argv[1], "--quick");
  if (argc > 1 && !quick) {
    std::fprintf(stderr, "usage: %s [--quick]\n", argv[0]);
    return 2;
  }
  try {
    return fastseq::test::run(quick);
  } catch (const std::exception& error) {  // FASTSEQ_ISA names no instruction set of this machine
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
