#include "probes.h"

#include <ATen/Parallel.h>

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
  const cpu::Probes<T>& kernels = cpu::kernels().probes<T>();
  if (function == "exp") return kernels.exp(x, y, n);
  if (function == "sigmoid") return kernels.sigmoid(x, y, n);
  if (function == "tanh") return kernels.tanh(x, y, n);
  if (function == "exp2_of_score") return kernels.exp2_of_score(x, y, n);
  throw std::invalid_argument("function must be exp, sigmoid, tanh or exp2_of_score; got '" + function + "'");
}

}  // namespace

void vec_math(const std::string& function, const float* x, float* y, int64_t n) { apply(function, x, y, n); }
void vec_math(const std::string& function, const double* x, double* y, int64_t n) { apply(function, x, y, n); }

namespace {

void check_positive(const char* name, int64_t value) {
  if (value < 1) throw std::invalid_argument(std::string(name) + " must be at least 1; got " + std::to_string(value));
}

}  // namespace

void gemm(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c) {
  cpu::kernels().probes_f32->gemm(at::get_num_threads(), m, n, k, a, b, c);
}

void gemm(int64_t m, int64_t n, int64_t k, const bfloat16* a, const bfloat16* b, float* c) {
  cpu::kernels().gemm_bf16(at::get_num_threads(), m, n, k, a, b, c);
}

double fma_rate(int64_t iterations, int threads, const std::string& dtype) {
  check_positive("iterations", iterations);
  check_positive("threads", threads);
  if (dtype == "float32") return cpu::kernels().probes_f32->fma_rate(iterations, threads);
  if (dtype == "float64") return cpu::kernels().probes_f64->fma_rate(iterations, threads);
  throw std::invalid_argument("dtype must be float32 or float64; got '" + dtype + "'");
}

double read_rate(int64_t bytes, int64_t repeats, int threads) {
  check_positive("bytes", bytes);
  check_positive("repeats", repeats);
  check_positive("threads", threads);
  return cpu::kernels().read_rate(bytes, repeats, threads);
}

double meeting_seconds(int64_t times, int threads) {
  check_positive("times", times);
  check_positive("threads", threads);
  return cpu::kernels().meeting_seconds(times, threads);
}

}  // namespace fastseq
