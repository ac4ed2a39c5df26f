// What the programs that test the CUDA kernels have in common: their arguments, and how they end.
#pragma once

#include <cstdio>
#include <cstring>

#include "device_memory.h"  // first: it says where check.h has its numbers
#include "tests/check.h"

namespace fastseq::test {

// Runs run(option, wanted): option is --quick, --races or empty, wanted the one thing to test, or null for all.
template <class Run>
int run_program(int argc, char** argv, const char* what, const Run& run) {
  const bool has_option = argc > 1 && (!std::strcmp(argv[1], "--quick") || !std::strcmp(argv[1], "--races"));
  if (argc > 2 + has_option) {
    std::fprintf(stderr, "usage: %s [--quick | --races] [%s]\n", argv[0], what);
    return 2;
  }
  return run(has_option ? argv[1] : "", argc > 1 + has_option ? argv[1 + has_option] : nullptr);
}

// Says what was found; a run that has checked nothing has not passed.
inline int end_program(const Report& report, int64_t calls) {
  std::printf("%lld calls; %lld passed, %lld failed\n", static_cast<long long>(calls),
              static_cast<long long>(report.passed), static_cast<long long>(report.failed));
  if (report.passed + report.failed > 0) return report.failed ? 1 : 0;
  std::fprintf(stderr, "nothing was tested: there is nothing of the name that was given\n");
  return 2;
}

}  // namespace fastseq::test
