// Memory that host and device see under the same address, for tests: under emulation any, else pinned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "cuda/launch.h"

namespace fastseq::test {

inline void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::abort();
}

// After a call: what its kernels have written is there, and they did not fail.
inline void wait_for_device() {
#if !defined(FASTSEQ_EMULATE_CUDA)
  must(cudaDeviceSynchronize(), "the kernels of a call");
#endif
}

#if !defined(FASTSEQ_EMULATE_CUDA)
template <class T>
struct PinnedAllocator {
  using value_type = T;

  PinnedAllocator() = default;
  template <class Other>
  PinnedAllocator(const PinnedAllocator<Other>&) {}

  T* allocate(std::size_t count) {
    void* data = nullptr;
    must(cudaHostAlloc(&data, count * sizeof(T), cudaHostAllocPortable), "cudaHostAlloc");
    return static_cast<T*>(data);
  }
  void deallocate(T* data, std::size_t) { must(cudaFreeHost(data), "cudaFreeHost"); }
  bool operator==(const PinnedAllocator&) const { return true; }
  bool operator!=(const PinnedAllocator&) const { return false; }
};
#define FASTSEQ_TEST_ALLOCATOR ::fastseq::test::PinnedAllocator
#endif

// A workspace that nobody has written to: full of NaN.
template <class Use>
cudaError_t with_workspace(int64_t bytes, const Use& use) {
#if defined(FASTSEQ_EMULATE_CUDA)
  void* const data = std::aligned_alloc(256, static_cast<std::size_t>(bytes + 256) / 256 * 256);
  std::memset(data, 0xff, static_cast<std::size_t>(bytes));
  const cudaError_t error = use(data);
  std::free(data);
#else
  void* data = nullptr;
  must(cudaMalloc(&data, static_cast<std::size_t>(bytes) + 1), "cudaMalloc");
  must(cudaMemset(data, 0xff, static_cast<std::size_t>(bytes)), "cudaMemset");
  const cudaError_t error = use(data);
  wait_for_device();
  must(cudaFree(data), "cudaFree");
#endif
  return error;
}

}  // namespace fastseq::test
