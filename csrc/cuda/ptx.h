// Every inline PTX instruction there is, each beside the same in C++, which the emulation runs. Positions of matrix
// fragments are those of the PTX ISA's manual.
#pragma once

#include <cstring>
#include <type_traits>

#include "../params.h"
#include "launch.h"

namespace fastseq::cuda {

// 16 bytes that are moved at once.
struct alignas(16) Words4 {
  uint32_t word[4];
};

FASTSEQ_INLINE float as_float(uint32_t word) {
  float out;
  memcpy(&out, &word, sizeof out);
  return out;
}
FASTSEQ_INLINE uint32_t as_word(float x) {
  uint32_t out;
  memcpy(&out, &x, sizeof out);
  return out;
}

// ---- Numbers of 16 bits --------------------------------------------------------------------------------------------
FASTSEQ_INLINE float to_float(bfloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

FASTSEQ_INLINE float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, size = x.bits & 0x7fff;
  if (size >= 0x7c00) return as_float(sign | 0x7f800000 | (size & 0x3ff) << 13);
  if (size >= 0x400) return as_float(sign | ((size << 13) + (112u << 23)));
  const float small = static_cast<float>(size) * 0x1p-24f;  // below the least normal number
  return sign ? -small : small;
#endif
}

// To nearest, ties to even.
template <class T>
FASTSEQ_INLINE T from_float(float x);
template <>
FASTSEQ_INLINE bfloat16 from_float<bfloat16>(float x) {
#if defined(__CUDA_ARCH__)
  bfloat16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
  return out;
#else
  const uint32_t word = as_word(x);
  if ((word & 0x7fffffff) > 0x7f800000) return {0x7fff};  // NaN, as the device's
  return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
#endif
}
template <>
FASTSEQ_INLINE float16 from_float<float16>(float x) {
#if defined(__CUDA_ARCH__)
  float16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
  return out;
#else
  const uint32_t word = as_word(x), sign = word >> 16 & 0x8000, size = word & 0x7fffffff;
  if (size > 0x7f800000) return {0x7fff};
  if (size >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and more
  if (size < 0x38800000)  // below the least normal number: adding 1/2 leaves the multiples of 2^-24 in the last bits
    return {static_cast<uint16_t>(sign | ((as_word(as_float(size) + 0.5f) - 0x3f000000) & 0xffff))};
  return {static_cast<uint16_t>(sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13)};
#endif
}

// Two of them in a register, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  }
  return out;
#else
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
#endif
}

// To 11 bits, as tensor cores take a float: to nearest, ties away from zero.
__device__ __forceinline__ float round_to_tf32(float x) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return as_float(out);
#else
  const uint32_t word = as_word(x);
  if ((word & 0x7f800000) == 0x7f800000) return x;
  return as_float((word + 0x1000) & ~0x1fffu);
#endif
}

// 2^x, to about 2 ulp; 2^-inf is 0.
__device__ __forceinline__ float exp2_approximate(float x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return std::exp2(x);
#endif
}

// ---- Memory --------------------------------------------------------------------------------------------------------
// Of global memory, past the L1 cache: what another multiprocessor has written in the same launch.
__device__ __forceinline__ Words4 load_l2(const Words4* from) {
#if defined(__CUDA_ARCH__)
  Words4 out;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.word[0]), "=r"(out.word[1]), "=r"(out.word[2]), "=r"(out.word[3])
               : "l"(from)
               : "memory");
  return out;
#else
  return *from;
#endif
}

// A place in shared memory, as instructions take it: a number of bytes, to calculate with.
#if defined(FASTSEQ_EMULATE_CUDA)
using SharedAddress = uintptr_t;
#else
using SharedAddress = uint32_t;
#endif
__device__ __forceinline__ SharedAddress shared_address(const void* at) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
#elif defined(FASTSEQ_EMULATE_CUDA)
  return reinterpret_cast<uintptr_t>(at);
#endif
}

// 16 bytes from global to shared memory, both so aligned, or zeros where not `valid`; nothing is read then. They are
// there once the thread has waited for their group; cp_async_wait<N> waits for all groups but the N latest.
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#elif defined(FASTSEQ_EMULATE_CUDA)
  emulation::AsyncCopies& copies = emulation::current->copies;
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16))
    emulation::fail("cp.async of an address that is not aligned to 16 bytes");
  if (copies.count == emulation::AsyncCopies::kMost) emulation::fail("more cp.async under way than are emulated");
  memset(shared, 0xff, 16);  // until it has been waited for
  copies.waiting[copies.count++] = {shared, global, valid, copies.group};
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(FASTSEQ_EMULATE_CUDA)
  ++emulation::current->copies.group;
#endif
}
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
#elif defined(FASTSEQ_EMULATE_CUDA)
  emulation::AsyncCopies& copies = emulation::current->copies;
  int left = 0;
  for (int i = 0; i < copies.count; ++i) {
    const emulation::AsyncCopy copy = copies.waiting[i];
    if (copy.group + N >= copies.group) {
      copies.waiting[left++] = copy;
    } else if (copy.valid) {
      memcpy(copy.shared, copy.global, 16);
    } else {
      memset(copy.shared, 0, 16);
    }
  }
  copies.count = left;
#endif
}

// ---- Tensor cores --------------------------------------------------------------------------------------------------
#if defined(FASTSEQ_EMULATE_CUDA)
template <bool kTransposed>
void emulated_ldmatrix(uint32_t (&to)[4], SharedAddress shared_row) {
  if (shared_row % 16) emulation::fail("ldmatrix of a row that is not aligned to 16 bytes");
  emulation::WarpSlot own{};
  memcpy(own.words, &shared_row, sizeof shared_row);
  const emulation::WarpSlot* const all = emulation::warp_exchange(own, "ldmatrix");
  const int lane = emulation::lane();
  for (int m = 0; m < 4; ++m) {
    uint16_t numbers[2];
    for (int i = 0; i < 2; ++i) {
      const int row = kTransposed ? 2 * (lane % 4) + i : lane / 4, column = kTransposed ? lane / 4 : 2 * (lane % 4) + i;
      const uint16_t* address;
      memcpy(&address, all[8 * m + row].words, sizeof address);
      numbers[i] = address[column];
    }
    to[m] = numbers[0] | static_cast<uint32_t>(numbers[1]) << 16;
  }
}

// Number k of a row or column of a fragment, which in each lane has words of neighbours along k.
template <class T>
float emulated_factor(uint32_t word, int place) {
  if constexpr (sizeof(T) == 2) {
    return to_float(T{static_cast<uint16_t>(word >> 16 * place)});
  } else {
    return as_float(word & ~0x1fffu);  // tensor cores do not see the lower bits
  }
}

// Of the words that all lanes gave. Not under ThreadSanitizer, which would take most of its time here, on numbers that
// no other thread can change.
template <class T>
__attribute__((noinline, no_sanitize("thread"))) void emulated_mma(float (&d)[4], const emulation::WarpSlot* all,
                                                                   int lane) {
  constexpr int kPlaces = 4 / sizeof(T), kDepth = 8 * kPlaces;
  float rows[2][kDepth], columns[2][kDepth];  // those of this lane, along k
  for (int i = 0; i < 2; ++i)
    for (int half = 0; half < 2; ++half)
      for (int t = 0; t < 4; ++t)
        for (int place = 0; place < kPlaces; ++place) {
          const int k = (4 * half + t) * kPlaces + place;
          rows[i][k] = emulated_factor<T>(all[lane / 4 * 4 + t].words[2 * half + i], place);
          columns[i][k] = emulated_factor<T>(all[4 * (2 * (lane % 4) + i) + t].words[4 + half], place);
        }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < kDepth; ++k) d[i] += rows[i / 2][k] * columns[i % 2][k];
}
#endif

// Four 8x8 matrices of 16-bit numbers. Thread i gives the address of row i % 8 of matrix i / 8, 16 bytes in shared
// memory, and gets of matrix m in to[m] the numbers 2 (i % 4) and 2 (i % 4) + 1 of row i / 4; transposed: of column
// i / 4.
__device__ __forceinline__ void ldmatrix(uint32_t (&to)[4], SharedAddress shared_row) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_row)
               : "memory");
#elif defined(FASTSEQ_EMULATE_CUDA)
  emulated_ldmatrix<false>(to, shared_row);
#endif
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&to)[4], SharedAddress shared_row) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_row)
               : "memory");
#elif defined(FASTSEQ_EMULATE_CUDA)
  emulated_ldmatrix<true>(to, shared_row);
#endif
}

__device__ __forceinline__ void ldmatrix(uint32_t (&to)[4], const void* shared_row) {
  ldmatrix(to, shared_address(shared_row));
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&to)[4], const void* shared_row) {
  ldmatrix_transposed(to, shared_address(shared_row));
}

// d += a b of a warp. 16-bit numbers: a 16x16, b 16x8, d 16x8. With g = lane / 4 and t = lane % 4, pairs of neighbours:
//   a[0] (g, 2t) a[1] (g + 8, 2t) a[2] (g, 2t + 8) a[3] (g + 8, 2t + 8);  b[0] (2t, g) b[1] (2t + 8, g), along k;
//   d[0] d[1] (g, 2t)  d[2] d[3] (g + 8, 2t).
// float, rounded to tf32: a 16x8, b 8x8, a number for each pair: column or row t for 2t, and t + 4 for 2t + 8.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<T, float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif defined(FASTSEQ_EMULATE_CUDA)
  emulation::WarpSlot own{};
  memcpy(own.words, a, sizeof a);
  memcpy(own.words + 4, b, sizeof b);
  emulated_mma<T>(d, emulation::warp_exchange(own, "mma"), emulation::lane());
#endif
}

}  // namespace fastseq::cuda
