// The library's own matrix product, for callers that have none: what emulation runs.
#pragma once

#include "call.h"

namespace fastseq::cuda {

cudaError_t gemm(const Product& product, void* stream);

// By the caller's function if the call has one.
inline cudaError_t multiply(const Call& call, const Product& product) {
  if (product.m == 0 || product.n == 0) return cudaSuccess;
  return call.gemm ? call.gemm(product, call.gemm_context, call.stream) : gemm(product, call.stream);
}

}  // namespace fastseq::cuda
