// Counted checks, and buffers that show who reads or writes past their ends.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "params.h"

namespace fastseq::test {

// A number to calculate with, and back; those of 16 bits have no arithmetic of their own.
template <class T>
T value(T x) {
  return x;
}
inline float value(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline float value(float16 x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float size = std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
  if (exponent == 31)
    size = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  return x.bits >> 15 ? -size : size;
}
template <class T>
T number(double x) {
  return static_cast<T>(x);
}
template <>
inline bfloat16 number<bfloat16>(double x) {  // to nearest, ties to even
  const float rounded = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  if (std::isnan(rounded)) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 number<float16>(double x) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::fabs(x);
  int exponent;
  if (std::isnan(x)) return {0x7e00};
  if (size >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size < 0x1p-14) return {static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(std::ldexp(size, 24))))};
  const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(std::frexp(size, &exponent), 11)));
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + mantissa - 1024))};
}
template <class T>
T quiet_nan() {
  return number<T>(std::numeric_limits<double>::quiet_NaN());
}

// Where the numbers of a test are: kernels of another device may not see all of the host's memory.
#if defined(FASTSEQ_TEST_ALLOCATOR)
template <class T>
using Allocator = FASTSEQ_TEST_ALLOCATOR<T>;
#else
template <class T>
using Allocator = std::allocator<T>;
#endif

// Of a Guarded that is made from now on. 37 numbers put it where no vector load is aligned.
#if defined(__SANITIZE_ADDRESS__)
inline size_t fence = 0;  // AddressSanitizer puts its own, which stops the first access
#else
inline size_t fence = 37;
#endif

// n numbers between two fences. Fences and fresh contents are NaN: a kernel that reads past an end, or leaves an output
// unwritten, shows it in its results.
template <class T>
class Guarded {
 public:
  Guarded() = default;  // absent: data() is null
  explicit Guarded(int64_t size) : fence_(size ? fence : 0), storage_(size + 2 * fence_, quiet_nan<T>()), size_(size) {}

  T* data() { return size_ ? storage_.data() + fence_ : nullptr; }
  const T* data() const { return size_ ? storage_.data() + fence_ : nullptr; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return storage_[fence_ + i]; }
  T operator[](int64_t i) const { return storage_[fence_ + i]; }

  bool intact() const {
    const T nan = quiet_nan<T>();
    const auto is_fence = [&](T value) { return std::memcmp(&value, &nan, sizeof(T)) == 0; };
    for (size_t i = 0; i < fence_; ++i)
      if (!is_fence(storage_[i]) || !is_fence(storage_[fence_ + size_ + i])) return false;
    return true;
  }

 private:
  size_t fence_ = 0;
  std::vector<T, Allocator<T>> storage_;
  int64_t size_ = 0;
};

template <class T>
Guarded<T> zeros_of(int64_t size) {
  Guarded<T> out(size);
  for (int64_t i = 0; i < size; ++i) out[i] = number<T>(0);
  return out;
}

template <class To, class From>
Guarded<To> convert(const Guarded<From>& from) {
  Guarded<To> to(from.size());
  for (int64_t i = 0; i < from.size(); ++i) to[i] = number<To>(value(from[i]));
  return to;
}

class Report {
 public:
  std::string where;  // the case that runs, for messages
  int64_t passed = 0, failed = 0;

  // `detail` is asked for only on failure.
  template <class Detail>
  void check(bool ok, const std::string& what, const Detail& detail) {
    if (ok) {
      ++passed;
      return;
    }
    if (failed++ == kShown) std::printf("(further failures are counted, not shown)\n");
    if (failed > kShown) return;
    const std::string text = detail();
    std::printf("FAILED %s: %s: %s\n", where.c_str(), what.c_str(), text.c_str());
    std::fflush(stdout);
  }

  template <class T>
  void same_bits(const std::string& what, const T* got, const T* want, int64_t n) {
    compare(what, got, want, n, "the same bits", [](T a, T b) { return std::memcmp(&a, &b, sizeof(T)) == 0; });
  }
  template <class T>
  void same_bits(const std::string& what, const Guarded<T>& got, const Guarded<T>& want) {
    same_bits(what, got.data(), want.data(), want.size());
  }

  // |got - want| <= tolerance, element by element; a NaN is never near.
  template <class T, class Want>
  void near(const std::string& what, const Guarded<T>& got, const Want& want, double tolerance) {
    std::ostringstream bound;
    bound << "within " << tolerance;
    compare(what, got, want, got.size(), bound.str(),
            [&](auto a, auto b) { return std::fabs(static_cast<double>(value(a) - value(b))) <= tolerance; });
  }

  // Everything written, nothing outside.
  template <class T>
  void written(const std::string& what, const Guarded<T>& got) {
    check(got.intact(), what, [] { return "written outside its bounds"; });
    int64_t first = 0;
    while (first < got.size() && std::isfinite(value(got[first]))) ++first;
    check(first == got.size(), what, [&] {
      std::ostringstream out;
      out << "element " << first << " of " << got.size() << ": expected a finite number, got " << value(got[first]);
      return out.str();
    });
  }

 private:
  static constexpr int64_t kShown = 40;

  template <class Got, class Want, class Equal>
  void compare(const std::string& what, const Got& got, const Want& want, int64_t n, const std::string& relation,
               const Equal& equal) {
    int64_t first = 0, wrong = 0;
    for (int64_t i = n - 1; i >= 0; --i) {
      if (equal(got[i], want[i])) continue;
      first = i;
      ++wrong;
    }
    check(wrong == 0, what, [&] {
      std::ostringstream out;
      out.precision(20);
      out << "element " << first << " of " << n << ": expected " << value(want[first]) << ", " << relation << "; got "
          << value(got[first]) << " (" << wrong << " wrong)";
      return out.str();
    });
  }
};

}  // namespace fastseq::test
