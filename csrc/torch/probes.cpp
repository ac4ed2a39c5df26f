#include "probes.h"

#include <stdexcept>

#include "../cpu/dispatch.h"

namespace fastseq {

std::string isa() { return cpu::kernels().isa; }
std::vector<std::string> available_isas() { return cpu::available_isas(); }
std::vector<CellFacts> cells() {
  const auto& table = cpu::kernels().cells;
  return {table, table + cpu::kCells};
}

namespace {

template <class T>
void apply(const std::string& function, const T* x, T* y, int64_t n) {
  const cpu::VectorFunctions<T>& kernels = cpu::kernels().functions<T>();
  if (function == "exp") return kernels.exp(x, y, n);
  if (function == "sigmoid") return kernels.sigmoid(x, y, n);
  if (function == "tanh") return kernels.tanh(x, y, n);
  throw std::invalid_argument("function must be exp, sigmoid or tanh; got '" + function + "'");
}

}  // namespace

void vec_math(const std::string& function, const float* x, float* y, int64_t n) { apply(function, x, y, n); }
void vec_math(const std::string& function, const double* x, double* y, int64_t n) { apply(function, x, y, n); }

}  // namespace fastseq
