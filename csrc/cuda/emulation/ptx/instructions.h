// What the instructions mean that translate.py knows, after the PTX ISA's manual, not after ../../ptx.h: the two are to
// be each other's check. `add<s32>` is add.s32; the operands are in the order of PTX.
#pragma once

#include <type_traits>

#include "../cuda.h"

namespace fastseq::cuda::emulation::ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using b16 = uint16_t;
using b32 = uint32_t;
using b64 = uint64_t;
using f32 = float;
using f64 = double;
using pred = bool;
// Numbers that a register holds as bits: each has a type of its own.
struct f16 {
  u16 word;
};
struct bf16 {
  u16 word;
};
struct tf32 {
  u32 word;
};
struct f16x2 {
  u32 word;
};
struct bf16x2 {
  u32 word;
};

template <class T, int kCount>
struct Vector {
  T numbers[kCount];
  T& operator[](int i) { return numbers[i]; }
  const T& operator[](int i) const { return numbers[i]; }
};

// The same bits as another type.
template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "of another size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---- Kernels -------------------------------------------------------------------------------------------------------
// The launch that is going on; there is never another.
struct Launched {
  const char* kernel;
  const unsigned char* parameters;
  std::size_t parameter_bytes;
};
extern Launched launched;

// Makes a kernel known to the launches of the program: runtime.cpp.
struct Add {
  Add(const char* name, void (*run)(), std::size_t parameter_bytes, u64 most_threads);
};
// What %envreg1 and %envreg2 hold of a cooperative launch: the address of 8 bytes with the counter of grid syncs.
u64 grid_workspace();

// A place is an instruction's file and line, and its opcode.
[[noreturn]] inline void fail(const char* place, const char* what) {
  char text[1000];
  std::snprintf(text, sizeof text, "%s: %s: %s", place, launched.kernel, what);
  emulation::fail(text);
}

inline u32 special_tid_x() { return current->in_block.x; }
inline u32 special_tid_y() { return current->in_block.y; }
inline u32 special_tid_z() { return current->in_block.z; }
inline u32 special_ntid_x() { return current->block_size.x; }
inline u32 special_ntid_y() { return current->block_size.y; }
inline u32 special_ntid_z() { return current->block_size.z; }
inline u32 special_ctaid_x() { return current->block.x; }
inline u32 special_ctaid_y() { return current->block.y; }
inline u32 special_ctaid_z() { return current->block.z; }
inline u32 special_nctaid_x() { return current->grid_size.x; }
inline u32 special_nctaid_y() { return current->grid_size.y; }
inline u32 special_nctaid_z() { return current->grid_size.z; }
inline u32 special_envreg1() { return static_cast<u32>(grid_workspace() >> 32); }
inline u32 special_envreg2() { return static_cast<u32>(grid_workspace()); }

// ---- Whole numbers and floats --------------------------------------------------------------------------------------
// Whole numbers wrap around.
template <class T, bool = std::is_floating_point_v<T>>
struct WrappingOf {
  using type = T;
};
template <class T>
struct WrappingOf<T, false> {
  using type = std::make_unsigned_t<T>;
};
template <class T>
using Wrapping = typename WrappingOf<T>::type;

template <class T>
T add(T a, T b) {
  return static_cast<T>(Wrapping<T>(a) + Wrapping<T>(b));
}
template <class T>
T add_rn(T a, T b) {
  return a + b;
}
template <class T>
T sub(T a, T b) {
  return static_cast<T>(Wrapping<T>(a) - Wrapping<T>(b));
}
template <class T>
T mul(T a, T b) {
  return a * b;
}
template <class T>
T mul_lo(T a, T b) {
  return static_cast<T>(Wrapping<T>(a) * Wrapping<T>(b));
}
template <class T>
T mad_lo(T a, T b, T c) {
  return add<T>(mul_lo<T>(a, b), c);
}
template <class T>
auto mul_wide(T a, T b) {
  return std::conditional_t<std::is_signed_v<T>, s64, u64>(a) * b;
}
template <class T>
T div(T a, T b) {
  if (b == 0) emulation::fail("a whole number is divided by 0");
  return b == T(-1) ? static_cast<T>(Wrapping<T>(a) * Wrapping<T>(b)) : a / b;
}
template <class T>
T rem(T a, T b) {
  if (b == 0) emulation::fail("a whole number is divided by 0");
  return b == T(-1) ? 0 : a % b;
}
template <class T>
T div_rn(T a, T b) {
  return a / b;
}
template <class T>
T rcp_rn(T a) {
  return 1 / a;
}
template <class T>
T fma_rn(T a, T b, T c) {
  return std::fma(a, b, c);
}
// Rounded down: nearest, and one back where that is above the exact value, of which double has the product and, in two
// parts, the sum (Knuth's).
template <class T>
T fma_rm(T a, T b, T c) {
  const f32 near = std::fma(a, b, c);
  const f64 product = f64(a) * b, sum = product + c, part = sum - product;
  const f64 lost = (product - (sum - part)) + (c - part);
  return (sum - near) + lost < 0 ? std::nextafter(near, -HUGE_VALF) : near;
}
template <class T>
T neg(T a) {
  return static_cast<T>(-Wrapping<T>(a));
}
template <class T>
T abs(T a) {
  if constexpr (std::is_floating_point_v<T>) return std::fabs(a);
  else return a < 0 ? neg<T>(a) : a;
}
// Of NaN and a number, the number; -0 is less than 0.
template <class T>
T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a > b ? a : b;
}
template <class T>
T min(T a, T b) {
  static_assert(std::is_integral_v<T>);
  return a < b ? a : b;
}
template <class T>
T copysign(T a, T b) {  // the sign of a
  return std::copysign(b, a);
}
// Numbers below the least normal one are zeros.
inline f32 flushed(f32 x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
template <class T>
T ex2_approx_ftz(T a) {
  return flushed(std::exp2(flushed(a)));
}
// Of double, from the upper half of the number to the upper half of the result.
template <class T>
T rcp_approx_ftz(T a) {
  if constexpr (std::is_same_v<T, f32>) return flushed(1 / flushed(a));
  const f64 upper = bits<f64>(bits<u64>(f64(a)) & ~0xffffffffull);
  const f64 of = std::fpclassify(upper) == FP_SUBNORMAL ? std::copysign(0.0, upper) : upper;
  const f64 out = bits<f64>(bits<u64>(1 / of) & ~0xffffffffull);
  return static_cast<T>(std::fpclassify(out) == FP_SUBNORMAL ? std::copysign(0.0, out) : out);
}

// ---- Bits ----------------------------------------------------------------------------------------------------------
template <class T>
T mov(T a) {
  return a;
}
template <class T>
T cvta_to_global(T a) {  // addresses of global memory are those of the host
  return a;
}
template <class T>
T and_(T a, T b) {
  return a & b;
}
template <class T>
T or_(T a, T b) {
  return a | b;
}
template <class T>
T xor_(T a, T b) {
  return a ^ b;
}
template <class T>
T not_(T a) {
  if constexpr (std::is_same_v<T, pred>) return !a;
  else return static_cast<T>(~a);
}
// By more than there are bits: by all.
template <class T>
T shl(T a, u32 b) {
  return b < 8 * sizeof(T) ? static_cast<T>(a << b) : 0;
}
template <class T>
T shr(T a, u32 b) {
  constexpr u32 kMost = 8 * sizeof(T) - 1;
  if (b > kMost) return std::is_signed_v<T> ? static_cast<T>(a >> kMost) : 0;
  return static_cast<T>(a >> b);
}
// b with the lower `length` bits of a from bit `position` on.
template <class T>
T bfi(T a, T b, u32 position, u32 length) {
  position &= 0xff, length &= 0xff;
  for (u32 i = 0; i < length && position + i < 8 * sizeof(T); ++i) {
    const T bit = T(1) << (position + i);
    b = (a >> i & 1) ? (b | bit) : (b & ~bit);
  }
  return b;
}
// Of the eight bytes of b, a the four that the digits of c choose; with the digit's upper bit, its sign all over.
template <class T>
T prmt(T a, T b, T c) {
  const u64 bytes = u64(b) << 32 | a;
  T out = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 digit = c >> 4 * i & 15, byte = static_cast<u32>(bytes >> 8 * (digit & 7)) & 0xff;
    out |= (digit & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return out;
}
template <class T>
T selp(T a, T b, bool c) {
  return c ? a : b;
}
// Of the forms of mov.b64 and mov.b32: the first of a vector is the lower half.
template <class T>
T mov(Vector<b32, 2> a) {
  return u64(a[1]) << 32 | a[0];
}
inline Vector<b32, 2> mov_halves(b64 a) { return {{static_cast<b32>(a), static_cast<b32>(a >> 32)}}; }
inline Vector<b16, 2> mov_halves(b32 a) { return {{static_cast<b16>(a), static_cast<b16>(a >> 16)}}; }

// ---- Comparisons: false of NaN, but for those with a `u` -----------------------------------------------------------
template <class T>
bool setp_eq(T a, T b) {
  return a == b;
}
template <class T>
bool setp_ne(T a, T b) {
  static_assert(std::is_integral_v<T>);
  return a != b;
}
template <class T>
bool setp_lt(T a, T b) {
  return a < b;
}
template <class T>
bool setp_le(T a, T b) {
  return a <= b;
}
template <class T>
bool setp_gt(T a, T b) {
  return a > b;
}
template <class T>
bool setp_ge(T a, T b) {
  return a >= b;
}
template <class T>
bool setp_neu(T a, T b) {
  return !(a == b);
}
template <class T>
bool setp_ltu(T a, T b) {
  return !(a >= b);
}
template <class T>
bool setp_gtu(T a, T b) {
  return !(a <= b);
}
template <class T>
bool setp_geu(T a, T b) {
  return !(a < b);
}

// ---- Conversions ---------------------------------------------------------------------------------------------------
template <class To, class From>
To cvt(From a) {
  if constexpr (std::is_same_v<From, f16>) {
    // With float's exponent 2^112 times too small: that of the least numbers, too.
    const f32 size = (a.word & 0x7c00) == 0x7c00 ? (a.word & 0x3ff ? NAN : HUGE_VALF)
                                                 : bits<f32>((a.word & 0x7fffu) << 13) * 0x1p112f;
    return std::copysign(size, a.word >> 15 ? -1.0f : 1.0f);
  } else {
    static_assert(!std::is_same_v<To, f32>, "with a rounding");
    return static_cast<To>(a);
  }
}

// A number of so many bits of fraction, from that of the least exponent on: the nearest, ties to the even one. float
// has all of bfloat16's exponents.
inline u16 nearest_of_16_bits(f32 x, int fraction_bits, int least_exponent) {
  const u16 sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7fff;
  const u16 infinity = static_cast<u16>(((1 << (15 - fraction_bits)) - 1) << fraction_bits);
  if (std::isinf(x)) return sign | infinity;
  int exponent;
  std::frexp(x, &exponent);
  const int unit = (x == 0 || exponent - 1 < least_exponent ? least_exponent : exponent - 1) - fraction_bits;
  // A carry goes on to the exponent, and from the greatest number to infinity.
  const u32 units = static_cast<u32>(std::nearbyint(std::ldexp(std::fabs(static_cast<f64>(x)), -unit)));
  const u32 word = units + (static_cast<u32>(unit + fraction_bits - least_exponent) << fraction_bits);
  return static_cast<u16>(sign | (word < infinity ? word : infinity));
}
template <class To, class From>
To cvt_rn(From a) {
  if constexpr (std::is_same_v<To, f16>) return {nearest_of_16_bits(a, 10, -14)};
  else if constexpr (std::is_same_v<To, bf16>) return {nearest_of_16_bits(a, 7, -126)};
  else return static_cast<To>(a);
}
// The first goes to the upper half.
template <class To, class From>
To cvt_rn(From a, From b) {
  using Half = std::conditional_t<std::is_same_v<To, f16x2>, f16, bf16>;
  return {static_cast<u32>(cvt_rn<Half>(a).word) << 16 | cvt_rn<Half>(b).word};
}
// To 11 bits, ties away from zero; the lower 13 are 0.
template <class To, class From>
To cvt_rna(From a) {
  static_assert(std::is_same_v<To, tf32> && std::is_same_v<From, f32>);
  if (!std::isfinite(a)) return {std::isnan(a) ? 0x7fffe000u : bits<u32>(a)};
  const f64 unit = bits<f64>((bits<u64>(f64(a)) & 0x7ff0000000000000ull) - (10ull << 52));  // 2^-10 of its power of 2
  const f64 least = 0x1p-136, by = std::fabs(a) < 0x1p-126f ? least : unit;
  const f64 size = std::floor(std::fabs(f64(a)) / by + 0.5) * by;
  return {bits<u32>(static_cast<f32>(std::copysign(size, a)))};
}
template <class To, class From>
To cvt_sat(From a) {
  return a > 0 ? (a < 1 ? a : 1) : 0;  // NaN, too
}
template <class To, class From>
To cvt_rni(From a) {
  return std::nearbyint(a);  // ties to the even one
}

// ---- Memory --------------------------------------------------------------------------------------------------------
// So many bytes at an address of shared memory, an offset in the block's.
inline unsigned char* shared(u32 address, std::size_t bytes, const char* place) {
  if (address % bytes) fail(place, "a shared address that is not aligned");
  if (address + bytes > shared_bytes()) fail(place, "past the end of the block's shared memory");
  return shared_memory() + address;
}
inline unsigned char* global(u64 address, std::size_t bytes, const char* place) {
  if (address % bytes) fail(place, "a global address that is not aligned");
  return reinterpret_cast<unsigned char*>(address);
}

template <class T>
T load(const unsigned char* from) {
  T out;
  std::memcpy(&out, from, sizeof out);
  return out;
}
template <class T>
T ld_param(u64 offset, const char* place) {
  if (offset % sizeof(T)) fail(place, "a parameter's address that is not aligned");
  if (offset + sizeof(T) > launched.parameter_bytes) fail(place, "past the end of the parameters");
  return load<T>(launched.parameters + offset);
}
template <class T>
T ld_shared(u32 address, const char* place) {
  return load<T>(shared(address, sizeof(T), place));
}
template <class T>
void st_shared(u32 address, T value, const char* place) {
  std::memcpy(shared(address, sizeof(T), place), &value, sizeof(T));
}
template <class T>
T ld_global(u64 address, const char* place) {
  return load<T>(global(address, sizeof(T), place));
}
template <class T>
T ld_global_cg(u64 address, const char* place) {
  return ld_global<T>(address, place);
}
template <class T>
void st_global(u64 address, T value, const char* place) {
  std::memcpy(global(address, sizeof(T), place), &value, sizeof(T));
}
// Threads wait for each other's numbers by these two, so others go on before one is read.
template <class T>
T ld_acquire_gpu(u64 address, const char* place) {
  poll();
  return ld_global<T>(address, place);
}
template <class T>
T atom_add_release_gpu(u64 address, T value, const char* place) {
  const T before = ld_global<T>(address, place);
  st_global<T>(address, before + value, place);
  return before;
}

// What is copied is there once its group has been waited for; until then there is NaN.
inline void cp_async_cg_shared_global(u32 to, u64 from, int bytes, u32 source_bytes, const char* place) {
  if (bytes != 16) fail(place, "other than 16 bytes past the L1 cache");
  if (source_bytes != 0 && source_bytes != 16) fail(place, "a part of the 16 bytes, which the emulation does not copy");
  AsyncCopies& copies = current->copies;
  if (copies.count == AsyncCopies::kMost) fail(place, "more copies under way than are emulated");
  unsigned char* const there = shared(to, 16, place);
  std::memset(there, 0xff, 16);
  copies.waiting[copies.count++] = {
      there, global(from, source_bytes ? 16 : 1, place), source_bytes == 16, copies.group};
}
inline void cp_async_commit_group(const char*) { ++current->copies.group; }
// For all groups but the latest, so many.
inline void cp_async_wait_group(int latest, const char*) {
  AsyncCopies& copies = current->copies;
  const int all = copies.count;
  copies.count = 0;
  for (int i = 0; i < all; ++i) {
    const AsyncCopy copy = copies.waiting[i];
    if (copy.group >= copies.group - latest) copies.waiting[copies.count++] = copy;
    else if (copy.valid) std::memcpy(copy.shared, copy.global, 16);
    else std::memset(copy.shared, 0, 16);
  }
}

// ---- Threads together: lanes that are all at the same instruction
// -----------------------------------------------------------------
inline void bar_sync(int barrier, const char* place) {
  if (barrier != 0) fail(place, "a barrier other than 0");
  block_sync();
}
inline void barrier_sync(int barrier, const char* place) { bar_sync(barrier, place); }
inline void trap(const char* place) { fail(place, "the kernel stops itself"); }

template <class T>
struct Shuffled {
  T value;
  bool predicate;  // whether the lane it comes from is in range
};
template <class T>
Shuffled<T> shfl_sync_bfly(T a, u32 mask, u32 clamp, u32 members, const char* place) {
  if (members != ~0u || clamp != 31) fail(place, "other than a whole warp");
  WarpSlot own{};
  own.words[0] = a;
  return {warp_exchange(own, place)[lane() ^ (mask & 31)].words[0], true};
}

// Four matrices of 8x8 numbers. Lanes 8 m to 8 m + 7 give the addresses of matrix m's rows; in result m, lane l has of
// row l / 4 the numbers 2 (l % 4) and the next, or of the transposed matrix's.
inline Vector<b32, 4> load_matrices(u32 row, bool transposed, const char* place) {
  WarpSlot own{};
  own.words[0] = row;
  const WarpSlot* const all = warp_exchange(own, place);
  u32 rows[32];
  for (int l = 0; l < 32; ++l) rows[l] = all[l].words[0];
  Vector<b32, 4> out;
  for (int m = 0; m < 4; ++m) {
    u16 matrix[8][8];
    for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], shared(rows[8 * m + i], 16, place), 16);
    const int i = lane() >> 2, j = 2 * (lane() & 3);
    const u16 first = transposed ? matrix[j][i] : matrix[i][j],
              second = transposed ? matrix[j + 1][i] : matrix[i][j + 1];
    out[m] = first | static_cast<u32>(second) << 16;
  }
  return out;
}
inline Vector<b32, 4> ldmatrix_sync_aligned_m8n8_x4_shared_b16(u32 row, const char* place) {
  return load_matrices(row, false, place);
}
inline Vector<b32, 4> ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(u32 row, const char* place) {
  return load_matrices(row, true, place);
}

// a b + c of a (16 x kDepth), b (kDepth x 8). Of the fragments, "Matrix fragments for mma.m16n8k16 with floating point
// type" and "for mma.m16n8k8" of .tf32 in the manual: number i of lane l lies at, with group = l >> 2 and in_group =
// l % 4, row and column of
//   a of 16 bits  group, + 8 for i = 2, 3, 6, 7           2 in_group + (i & 1), + 8 for i >= 4
//   b of 16 bits  2 in_group + (i & 1), + 8 for i >= 2    group
//   a of tf32     group, + 8 for i = 1, 3                 in_group, + 4 for i >= 2
//   b of tf32     in_group, + 4 for i = 1                 group
//   c             group, + 8 for i >= 2                   2 in_group + (i & 1)
template <int kDepth, class Number>
Vector<f32, 4> multiply(Vector<b32, 4> a, Vector<b32, 2> b, Vector<f32, 4> c, const Number& number, const char* place) {
  WarpSlot own{};
  for (int i = 0; i < 4; ++i) own.words[i] = a[i];
  for (int i = 0; i < 2; ++i) own.words[4 + i] = b[i];
  const WarpSlot* const all = warp_exchange(own, place);
  f32 left[16][kDepth], right[kDepth][8];
  for (int l = 0; l < 32; ++l) {
    const int group = l >> 2, in_group = l % 4;
    if (group == lane() >> 2) {  // of the left side this lane needs no other rows
      if (kDepth == 16) {
        for (int i = 0; i < 8; ++i)
          left[group + (i & 2 ? 8 : 0)][2 * in_group + (i & 1) + (i >= 4 ? 8 : 0)] =
              number(all[l].words[i / 2] >> (i & 1 ? 16 : 0) & 0xffff);
      } else {
        for (int i = 0; i < 4; ++i)
          left[group + (i & 1 ? 8 : 0)][in_group + (i >= 2 ? 4 : 0)] = number(all[l].words[i]);
      }
    }
    if (group >> 1 == lane() % 4) {  // and of the right side no other columns
      if (kDepth == 16) {
        for (int i = 0; i < 4; ++i)
          right[2 * in_group + (i & 1) + (i >= 2 ? 8 : 0)][group] =
              number(all[l].words[4 + i / 2] >> (i & 1 ? 16 : 0) & 0xffff);
      } else {
        for (int i = 0; i < 2; ++i) right[in_group + (i ? 4 : 0)][group] = number(all[l].words[4 + i]);
      }
    }
  }
  Vector<f32, 4> out = c;
  for (int i = 0; i < 4; ++i) {
    const int row = (lane() >> 2) + (i >= 2 ? 8 : 0), column = 2 * (lane() % 4) + (i & 1);
    for (int k = 0; k < kDepth; ++k) out[i] += left[row][k] * right[k][column];
  }
  return out;
}
inline Vector<f32, 4> mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(Vector<b32, 4> a, Vector<b32, 2> b,
                                                                          Vector<f32, 4> c, const char* place) {
  return multiply<16>(a, b, c, [](u32 word) { return bits<f32>(word << 16); }, place);
}
inline Vector<f32, 4> mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(Vector<b32, 4> a, Vector<b32, 2> b,
                                                                        Vector<f32, 4> c, const char* place) {
  return multiply<16>(a, b, c, [](u32 word) { return cvt<f32>(f16{static_cast<u16>(word)}); }, place);
}
// Tensor cores do not see a float's lower 13 bits.
inline Vector<f32, 4> mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(Vector<b32, 4> a, Vector<b32, 2> b,
                                                                         Vector<f32, 4> c, const char* place) {
  return multiply<8>(a, b, c, [](u32 word) { return bits<f32>(word & ~0x1fffu); }, place);
}

}  // namespace fastseq::cuda::emulation::ptx
