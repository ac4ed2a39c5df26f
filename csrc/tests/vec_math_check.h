// exp, sigmoid, tanh and exp2_of_score of one instruction set against the C library's in a wider type, over the whole
// domain.
#pragma once

#include "check.h"
#include "cpu/dispatch.h"

namespace fastseq::test {

// The C library is asked in a type with at least ten more digits: its own error is then nothing in units of T's last
// place.
template <class T>
struct Wider;
template <>
struct Wider<float> {
  using type = double;
};
template <>
struct Wider<double> {
  using type = long double;
};

// Some emulators compute long double with the digits of a double.
template <class W>
bool has_its_digits() {
  volatile W one = 1, epsilon = std::numeric_limits<W>::epsilon();
  return one + epsilon != one;
}

// |got - want| in units of T's last place at `want`. An infinity counts as the largest number: no unit is larger there.
template <class T, class W>
double ulps(T got, W want) {
  using Limits = std::numeric_limits<T>;
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got) ? 0 : HUGE_VAL;
  const auto within = [](auto value) -> W { return std::fmin(std::fmax(value, Limits::lowest()), Limits::max()); };
  const W a = within(got), b = within(want);
  const int exponent = b == 0 ? Limits::min_exponent - 1 : std::max(std::ilogb(b), Limits::min_exponent - 1);
  return static_cast<double>(std::fabs(a - b) / std::ldexp(W(1), exponent - (Limits::digits - 1)));
}

template <class T>
std::vector<T> domain(int64_t points) {
  using Limits = std::numeric_limits<T>;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  std::vector<T> out;
  const auto both_signs = [&](T x) {
    out.push_back(x);
    out.push_back(-x);
  };
  for (const T x :
       {T(0),
        T(1),
        Limits::infinity(),
        Limits::quiet_NaN(),
        Limits::denorm_min(),
        Limits::min(),
        Limits::max(),
        Limits::epsilon(),
        T(88.72),
        T(88.73),
        T(89),
        T(103.9),
        T(104),
        T(709.7),
        T(709.8),
        T(710),
        T(745.1),
        T(745.2),
        T(746),
        T(1000),
        T(9),
        T(9.02),
        T(10),
        T(19),
        T(19.1),
        T(20)}) {
    both_signs(x);
    if (std::isfinite(x)) {
      both_signs(std::nextafter(x, T(0)));
      both_signs(std::nextafter(x, Limits::infinity()));
    }
  }
  const Bits stride = (std::numeric_limits<Bits>::max() / static_cast<Bits>(points)) | 1;
  Bits bits = 0;
  for (int64_t i = 0; i < points; ++i, bits += stride) {  // every exponent, both signs, NaNs too
    T x;
    std::memcpy(&x, &bits, sizeof x);
    out.push_back(x);
  }
  for (const double reach : {1.0, 25.0, sizeof(T) == 4 ? 110.0 : 760.0})
    for (int64_t i = -points / 2; i < points / 2; ++i) out.push_back(static_cast<T>(2 * reach * (i + 0.37) / points));
  return out;
}

template <class T, class Reference>
void check_function(Report& report, const std::string& name, void (*function)(const T*, T*, int64_t),
                    const Reference& reference, double bound, const std::vector<T>& x) {
  using W = typename Wider<T>::type;
  const int64_t n = static_cast<int64_t>(x.size());
  Guarded<T> y(n);
  function(x.data(), y.data(), n);
  report.check(y.intact(), name, [] { return "written outside its bounds"; });
  double worst = 0;
  int64_t at = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double error = ulps(y[i], reference(static_cast<W>(x[i])));
    if (error > worst) worst = error, at = i;
  }
  report.check(worst <= bound, name, [&] {
    std::ostringstream out;
    out.precision(20);
    out << "at " << x[at] << ": expected " << reference(static_cast<W>(x[at])) << " within " << bound << " ulp; got "
        << y[at] << ", " << worst << " ulp away";
    return out.str();
  });
  // A tail has the bits that its numbers have inside a vector.
  for (int64_t size = 1; size <= 33; ++size) {
    Guarded<T> in(size), tail(size);
    std::memcpy(in.data(), x.data() + n / 2, size * sizeof(T));
    function(in.data(), tail.data(), size);
    report.check(tail.intact(), name, [] { return "a tail is written outside its bounds"; });
    report.same_bits(name + ", a tail", tail.data(), y.data() + n / 2, size);
  }
}

template <class T>
void check_vec_math(Report& report, const cpu::Kernels& kernels, bool quick) {
  using W = typename Wider<T>::type;
  report.where = std::string(kernels.isa) + (sizeof(T) == 4 ? " float" : " double");
  const auto& table = kernels.probes<T>();
  const T infinity = std::numeric_limits<T>::infinity();
  const auto exactly = [&](const std::string& what, void (*function)(const T*, T*, int64_t), T x, T want) {
    T y;
    function(&x, &y, 1);
    report.same_bits(what, &y, &want, 1);
  };
  exactly("exp(inf)", table.exp, infinity, infinity);
  exactly("exp(1000)", table.exp, 1000, infinity);
  exactly("exp(-inf)", table.exp, -infinity, 0);
  exactly("exp(-0)", table.exp, T(-0.0), 1);
  exactly("sigmoid(inf)", table.sigmoid, infinity, 1);
  exactly("sigmoid(-inf)", table.sigmoid, -infinity, 0);
  exactly("sigmoid(0)", table.sigmoid, 0, T(0.5));
  exactly("exp2_of_score(-inf)", table.exp2_of_score, -infinity, 0);
  exactly("exp2_of_score(0)", table.exp2_of_score, 0, 1);
  exactly("tanh(0)", table.tanh, 0, 0);
  exactly("tanh(-0)", table.tanh, T(-0.0), T(-0.0));
  exactly("tanh(inf)", table.tanh, infinity, 1);
  exactly("tanh(-inf)", table.tanh, -infinity, -1);

  if (!has_its_digits<W>()) {
    std::printf(
        "%s: long double has no more digits than double here; the functions are not compared\n", report.where.c_str());
    return;
  }
  const std::vector<T> x = domain<T>(quick ? 5000 : sizeof(T) == 4 ? 300000 : 100000);
  check_function(report, "exp", table.exp, [](W v) { return std::exp(v); }, 2, x);
  check_function(report, "sigmoid", table.sigmoid, [](W v) { return 1 / (1 + std::exp(-v)); }, 4, x);
  check_function(report, "tanh", table.tanh, [](W v) { return std::tanh(v); }, 4, x);
  std::vector<T> scores;
  for (T v : x)
    if (!(v > 1)) scores.push_back(v);
  const auto exp2 = [](W v) { return v < std::numeric_limits<T>::min_exponent - 1 ? 0 : std::exp2(v); };
  check_function(report, "exp2_of_score", table.exp2_of_score, exp2, 2, scores);
}

}  // namespace fastseq::test
