#include "cpu_features.h"

#include <cstring>

namespace fastseq::cpu {

bool machine_runs(const char* isa) {
#if defined(__x86_64__)
  // The builtins read CPUID, and XGETBV for whether the operating system saves the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(isa, "avx2")) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(isa, "avx512")) return avx512;
  if (!std::strcmp(isa, "avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return !std::strcmp(isa, "baseline") || !std::strcmp(isa, "neon");
}

}  // namespace fastseq::cpu
