#include "dispatch.h"

#include <pthread.h>

#include <cstdlib>
#include <stdexcept>

#include "cpu_features.h"
#include "isa_list.h"

namespace fastseq::cpu {

// Each defined by kernels.cpp compiled for that instruction set; the list is CMake's, least capable first.
#define X(name)                \
  namespace name {             \
  extern const Kernels kTable; \
  }
FASTSEQ_ISA_LIST(X)
#undef X

namespace {

constexpr const Kernels* kVariants[] = {
#define X(name) &name::kTable,
    FASTSEQ_ISA_LIST(X)
#undef X
};
constexpr int kVariantCount = sizeof(kVariants) / sizeof(kVariants[0]);

std::string join(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

const Kernels& choose() {
  const char* forced = std::getenv("FASTSEQ_ISA");
  std::vector<std::string> built;
  for (int i = kVariantCount - 1; i >= 0; --i) {
    const Kernels& variant = *kVariants[i];
    built.emplace_back(variant.isa);
    if (!forced || !*forced) {
      if (machine_runs(variant.isa)) return variant;
    } else if (built.back() == forced) {
      if (machine_runs(variant.isa)) return variant;
      throw std::runtime_error(
          "FASTSEQ_ISA=" + built.back() + " names an instruction set this processor does not have; it runs " +
          join(available_isas()));
    }
  }
  throw std::runtime_error("FASTSEQ_ISA must be one of " + join(built) + "; got '" + forced + "'");
}

bool forked = false;
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> out;
  for (int i = kVariantCount - 1; i >= 0; --i)
    if (machine_runs(kVariants[i]->isa)) out.emplace_back(kVariants[i]->isa);
  return out;
}

const Kernels* find_kernels(const std::string& isa) {
  for (const Kernels* variant : kVariants)
    if (variant->isa == isa) return machine_runs(variant->isa) ? variant : nullptr;
  return nullptr;
}

bool in_forked_child() { return forked; }

}  // namespace fastseq::cpu
