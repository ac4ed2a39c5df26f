#include "cpu_features.h"

#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastseq::cpu {

namespace {

// AMX multiplies bfloat16, and the system lends this process the tiles: it keeps their 8 KiB for a thread only once it
// has been asked. Refused where the system is too old (Linux before 5.16), or some thread's signal stack too small.
bool amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of leaf 7's EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
  static const bool lent = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return lent;
#else
  return false;
#endif
}

}  // namespace

bool machine_runs(const char* isa) {
#if defined(__x86_64__)
  // The builtins read CPUID, and XGETBV for whether the operating system saves the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(isa, "avx2")) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(isa, "avx512")) return avx512;
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (!std::strcmp(isa, "avx512bf16")) return avx512bf16;
  if (!std::strcmp(isa, "amx")) return avx512bf16 && amx();
#endif
  return !std::strcmp(isa, "baseline") || !std::strcmp(isa, "neon") || !std::strcmp(isa, "amx_emulated");
}

}  // namespace fastseq::cpu
