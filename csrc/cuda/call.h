// What a call of the library is given beside its parameter block. The library allocates nothing, waits for nothing and
// needs no torch: it enqueues kernels on a stream, and answers whether that worked.
#pragma once

#include <cstdint>

#include "launch.h"

namespace fastseq::cuda {

enum class NumberType : int { float32, float64, bfloat16, float16 };

// c (m, n) = a b, or c += a b; rows of each are `*_row` numbers from one to the next, and the numbers of a row are side
// by side. a is (m, k), or (k, m) if transposed; b is (k, n), or (n, k) if transposed. Sums are in float, of float64 in
// double.
struct Product {
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  const void* b = nullptr;
  void* c = nullptr;
  int64_t a_row = 0, b_row = 0, c_row = 0;
  bool a_transposed = false, b_transposed = false, accumulate = false;
  NumberType factors = NumberType::float32, result = NumberType::float32;
};

// Of a recurrent layer: what the planner chooses (rnn_plan.h), or one of both, which is an error where it cannot be.
enum class RnnPath : int { planned, stepwise, persistent };

struct Call {
  void* stream = nullptr;     // a cudaStream_t of the current device
  void* workspace = nullptr;  // so many bytes on the device as the call's *_workspace says, aligned to 256
  cudaError_t (*gemm)(const Product&, void* context, void* stream) = nullptr;  // null: the library's own
  void* gemm_context = nullptr;
  // Of a recurrent layer whose rows are of different lengths: the tables of its Schedule once more, in the device's
  // memory. Null: it goes step by step.
  const int64_t* batch_sizes = nullptr;
  const int64_t* offsets = nullptr;
  RnnPath rnn_path = RnnPath::planned;
  bool tf32 = false;  // whether the library's own products of floats may round factors to 11 bits
};

}  // namespace fastseq::cuda
