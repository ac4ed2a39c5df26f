// What the Python module asks of the operator library.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../cell_list.h"
#include "../params.h"
#include "counters.h"

namespace fastseq {

FASTSEQ_API std::string isa();  // throws std::runtime_error for a FASTSEQ_ISA that makes no sense
FASTSEQ_API std::vector<std::string> available_isas();
FASTSEQ_API std::vector<CellFacts> cells();
// function: "exp", "sigmoid" or "tanh".
FASTSEQ_API void vec_math(const std::string& function, const float* x, float* y, int64_t n);
FASTSEQ_API void vec_math(const std::string& function, const double* x, double* y, int64_t n);
FASTSEQ_API void gemm(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c);
FASTSEQ_API void gemm(int64_t m, int64_t n, int64_t k, const bfloat16* a, const bfloat16* b, float* c);
// The machine's own speed: FLOP/s in registers of dtype "float32" or "float64"; bytes/s read, `bytes` by each thread;
// seconds in which the threads meet once.
FASTSEQ_API double fma_rate(int64_t iterations, int threads, const std::string& dtype);
FASTSEQ_API double read_rate(int64_t bytes, int64_t repeats, int threads);
FASTSEQ_API double meeting_seconds(int64_t times, int threads);

}  // namespace fastseq
