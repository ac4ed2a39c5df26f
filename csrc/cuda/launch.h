// What a kernel needs of CUDA, and the only ways to launch one. The same sources are compiled by nvcc, and by a C++
// compiler with FASTSEQ_EMULATE_CUDA, where csrc/cuda/emulation runs them on the CPU (its README.md).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(FASTSEQ_EMULATE_CUDA)
#include "emulation/cuda.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#endif

#define FASTSEQ_INLINE __host__ __device__ __forceinline__

// Dynamic shared memory: an array of bytes, aligned for any access. It is all the shared memory that a kernel has.
#if defined(FASTSEQ_EMULATE_CUDA)
#define FASTSEQ_SHARED(name) unsigned char* const name = ::fastseq::cuda::emulation::shared_memory()
#else
#define FASTSEQ_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace fastseq::cuda {

constexpr int kWarp = 32;
constexpr std::size_t kSharedByDefault = 48 << 10;  // more of it has to be asked for

// All blocks of a cooperative launch meet; what they wrote before is seen by all after.
__device__ inline void grid_sync() {
#if defined(FASTSEQ_EMULATE_CUDA)
  emulation::grid_sync();
#elif defined(__CUDACC__)  // csrc/torch, which launches nothing, is compiled by another compiler
  cooperative_groups::this_grid().sync();
#endif
}

template <class T>
struct Exactly {
  using type = T;
};

// Enqueues kernel(arguments...) on the stream and tells whether that worked; what fails as it runs is told later, by
// CUDA. An empty grid is nothing to do. Of a cooperative launch all blocks are on the device at once, or it fails.
template <bool kCooperative = false, class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, void* stream,
                   typename Exactly<Parameters>::type... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#if defined(FASTSEQ_EMULATE_CUDA)
  (void)stream;
  return emulation::run_kernel<Parameters...>(kCooperative, grid, block, shared, kernel, arguments...);
#else
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (shared > kSharedByDefault)
    if (const cudaError_t error =
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)))
      return error;
  void* pointers[] = {&arguments...};
  const auto on = static_cast<cudaStream_t>(stream);
  return kCooperative ? cudaLaunchCooperativeKernel(function, grid, block, pointers, shared, on)
                      : cudaLaunchKernel(function, grid, block, pointers, shared, on);
#endif
}

}  // namespace fastseq::cuda
