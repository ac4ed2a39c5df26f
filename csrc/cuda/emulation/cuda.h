// The CUDA that kernels are written in, on the CPU: README.md. What is not here does not exist for a kernel.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
};
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unknown error";
}

namespace fastseq::cuda::emulation {

// The device that is emulated; a test may make it another.
struct Device {
  int multiprocessors = 24;
  int shared_of_block = 227 << 10, shared_of_multiprocessor = 228 << 10;
  int threads_of_multiprocessor = 2048;
  int cooperative = 1;
};
inline Device device;

// In which order threads that could go on do so.
enum class Order { first_to_last, last_to_first, random };
void set_schedule(Order order, uint64_t seed);

// 16 bytes on their way from global to shared memory.
struct AsyncCopy {
  void* shared;
  const void* global;
  bool valid;
  int group;
};
struct AsyncCopies {
  static constexpr int kMost = 512;
  AsyncCopy waiting[kMost];
  int count = 0, group = 0;
};

// A thread of a kernel.
struct Thread {
  uint3 in_block, block;
  dim3 block_size, grid_size;
  AsyncCopies copies;
};
extern Thread* current;

[[noreturn]] void fail(const char* what);

// Of each thread; one that writes past its end is told so.
extern const std::size_t stack_bytes;

// Runs body(argument) as every thread of the grid.
cudaError_t run_threads(bool cooperative, dim3 grid, dim3 block, std::size_t shared, void (*body)(void*),
                        void* argument);
template <class Body>
cudaError_t run(bool cooperative, dim3 grid, dim3 block, std::size_t shared, const Body& body) {
  return run_threads(
      cooperative, grid, block, shared, [](void* argument) { (*static_cast<const Body*>(argument))(); },
      const_cast<Body*>(&body));
}

// A launch of a kernel; the parameters' bytes are as CUDA has them.
struct Launch {
  const void* kernel;
  bool cooperative;
  uint64_t threads;  // of a block
  const unsigned char* parameters;
  std::size_t parameter_bytes;
};
// What each thread runs in place of the kernel's source, or null: of a program with kernels from PTX (ptx/).
inline void (*(*find_translated)(const Launch&))() = nullptr;

template <class... Parameters>
cudaError_t run_kernel(bool cooperative, dim3 grid, dim3 block, std::size_t shared, void (*kernel)(Parameters...),
                       Parameters... arguments) {
  if (find_translated) {
    alignas(16) unsigned char bytes[(sizeof(Parameters) + ... + 0) + 16 * sizeof...(Parameters)] = {};
    std::size_t end = 0;
    const auto put = [&](const auto& argument) {
      end = (end + alignof(decltype(argument)) - 1) / alignof(decltype(argument)) * alignof(decltype(argument));
      std::memcpy(bytes + end, &argument, sizeof argument);
      end += sizeof argument;
    };
    (put(arguments), ...);
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (void (*const translated)() =
            find_translated({reinterpret_cast<const void*>(kernel), cooperative, threads, bytes, end}))
      return run(cooperative, grid, block, shared, translated);
  }
  return run(cooperative, grid, block, shared, [&] { kernel(arguments...); });
}

unsigned char* shared_memory();
std::size_t shared_bytes();
void block_sync();
void grid_sync();
// Lets others go on before the thread looks once more for what it waits for in memory.
void poll();

// All 32 lanes of a warp meet, and each sees what every lane has brought, until it meets the others once more. `place`
// tells meetings apart: all lanes have to come to the same. Memory is in no order by that: only __syncwarp says so.
struct WarpSlot {
  uint32_t words[8];
};
const WarpSlot* warp_exchange(const WarpSlot& own, const char* place);
void warp_sync();

inline int lane() {
  const Thread& t = *current;
  return static_cast<int>((t.in_block.x + t.block_size.x * (t.in_block.y + t.block_size.y * t.in_block.z)) % 32);
}

template <class T>
T shuffle(T value, int from, const char* place) {
  static_assert(sizeof(T) <= sizeof(WarpSlot), "too large to shuffle");
  WarpSlot own{};
  std::memcpy(&own, &value, sizeof value);
  std::memcpy(&value, warp_exchange(own, place) + from, sizeof value);
  return value;
}

}  // namespace fastseq::cuda::emulation

#define threadIdx (::fastseq::cuda::emulation::current->in_block)
#define blockIdx (::fastseq::cuda::emulation::current->block)
#define blockDim (::fastseq::cuda::emulation::current->block_size)
#define gridDim (::fastseq::cuda::emulation::current->grid_size)

#define __syncthreads() ::fastseq::cuda::emulation::block_sync()
inline void __syncwarp(unsigned mask = ~0u) {
  if (mask != ~0u) fastseq::cuda::emulation::fail("__syncwarp with a mask, and whole warps alone are emulated");
  fastseq::cuda::emulation::warp_sync();
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return fastseq::cuda::emulation::shuffle(value, from & 31, "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return fastseq::cuda::emulation::shuffle(value, (fastseq::cuda::emulation::lane() ^ mask) & 31, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  const int lane = fastseq::cuda::emulation::lane(), from = lane + static_cast<int>(delta);
  return fastseq::cuda::emulation::shuffle(value, from < 32 ? from : lane, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const int lane = fastseq::cuda::emulation::lane(), from = lane - static_cast<int>(delta);
  return fastseq::cuda::emulation::shuffle(value, from >= 0 ? from : lane, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned, int vote) {
  fastseq::cuda::emulation::WarpSlot own{};
  own.words[0] = vote != 0;
  const fastseq::cuda::emulation::WarpSlot* all = fastseq::cuda::emulation::warp_exchange(own, "__ballot_sync");
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= all[i].words[0] << i;
  return out;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == ~0u; }

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

// ---- The host's side --------------------------------------------------------------------------------------------
using cudaStream_t = void*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrCooperativeLaunch,
};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const fastseq::cuda::emulation::Device& device = fastseq::cuda::emulation::device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_of_block;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_of_multiprocessor;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = device.cooperative;
      break;
  }
  return cudaSuccess;
}
