// Kernels with each inline instruction of ../../ptx.h, run twice: as nvcc compiles them, translated from PTX, and from
// their sources, whose bodies for the CPU ../tests.cpp checks by the manual. Both must give the same: so what the text
// of an instruction says is what its body for the CPU does.
#include "../../number.h"
#include "../../ptx.h"

namespace fastseq::cuda {

constexpr int kProbeThreads = 64;

template <class T>
__global__ void mma_probe(const uint32_t* from, float* to, int) {
  const int i = threadIdx.x;
  const uint32_t a[4] = {from[10 * i], from[10 * i + 1], from[10 * i + 2], from[10 * i + 3]};
  const uint32_t b[2] = {from[10 * i + 4], from[10 * i + 5]};
  float d[4];
  for (int j = 0; j < 4; ++j) d[j] = as_float(from[10 * i + 6 + j]);
  mma<T>(d, a, b);
  for (int j = 0; j < 4; ++j) to[4 * i + j] = d[j];
}

template <bool kTransposed>
__global__ void ldmatrix_probe(const Words4* from, uint32_t* to, int) {
  FASTSEQ_SHARED(shared);
  const int i = threadIdx.x;
  auto* const rows = reinterpret_cast<Words4*>(shared);
  rows[i] = from[i];
  __syncthreads();
  uint32_t got[4];
  const Words4* const row = rows + (i * 7 + 3) % kProbeThreads;
  if (kTransposed) ldmatrix_transposed(got, row);
  else ldmatrix(got, row);
  for (int j = 0; j < 4; ++j) to[4 * i + j] = got[j];
}

// Three groups, of which the last is not waited for at first: it is NaN then, but on a GPU anything.
__global__ void cp_async_probe(const Words4* from, Words4* to, int) {
  FASTSEQ_SHARED(shared);
  const int i = threadIdx.x;
  auto* const mine = reinterpret_cast<Words4*>(shared) + 3 * i;
  for (int group = 0; group < 3; ++group) {
    cp_async(mine + group, from + 3 * i + group, (i + group) % 4 != 0);
    cp_async_commit();
  }
  cp_async_wait<1>();
  for (int group = 0; group < 3; ++group) to[6 * i + group] = mine[group];
  cp_async_wait<0>();
  for (int group = 0; group < 3; ++group) to[6 * i + 3 + group] = mine[group];
}

__global__ void load_l2_probe(const Words4* from, Words4* to, int) { to[threadIdx.x] = load_l2(from + threadIdx.x); }

template <class T>
__global__ void to_float_probe(const T* from, float* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = to_float(from[i]);
}
template <class T>
__global__ void from_float_probe(const float* from, uint32_t* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    to[2 * i] = from_float<T>(from[i]).bits;
    to[2 * i + 1] = pack<T>(from[i], from[(i + 1) % count]);
  }
}
__global__ void tf32_probe(const float* from, float* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = round_to_tf32(from[i]);
}
__global__ void exp2_probe(const float* from, float* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = exp2_approximate(from[i]);
}

// What nvcc makes of functions and of divisions.
template <class T>
__global__ void functions_probe(const T* from, T* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const T x = from[i];
    to[3 * i] = std::exp(x), to[3 * i + 1] = std::tanh(x), to[3 * i + 2] = x / (T(1) + x * x);
  }
}
// Each thread adds up what the blocks before have left.
__global__ void grid_sync_probe(const uint32_t* from, uint32_t* to, int rounds) {
  const unsigned all = gridDim.x * gridDim.y * blockDim.x;  // a power of 2
  const unsigned at = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
  uint32_t mine = from[at];
  for (int round = 0; round < rounds; ++round) {
    uint32_t* const here = to + round % 2 * all;
    here[at] = mine;
    grid_sync();
    mine = 3 * mine + here[(at + blockDim.x + 1) & (all - 1)];
  }
}

}  // namespace fastseq::cuda

#if defined(FASTSEQ_EMULATE_CUDA)  // nvcc compiles the kernels alone
#include <random>
#include <utility>

#include "../../tests/device_memory.h"
#include "tests/check.h"
#include "tests/layer_check.h"

namespace fastseq::test {
namespace {

using namespace cuda;

// What the kernel gives as nvcc has compiled it, or from its source.
template <bool kCooperative, class From, class To>
std::vector<To> results(bool translated, void (*kernel)(const From*, To*, int), const std::vector<From>& from,
                        std::size_t results, int count) {
  std::vector<To> out(results);
  const auto found = std::exchange(emulation::find_translated, translated ? emulation::find_translated : nullptr);
  must(launch<kCooperative>(kernel, kCooperative ? dim3(4, 2) : dim3(1), dim3(kProbeThreads), 4096, nullptr,
                            from.data(), out.data(), count),
       "a probe");
  emulation::find_translated = found;
  return out;
}

template <bool kCooperative = false, class From, class To>
void check_same(Report& report, const char* what, void (*kernel)(const From*, To*, int), const std::vector<From>& from,
                std::size_t count_of_results, int count = -1) {
  const int given = count < 0 ? static_cast<int>(from.size()) : count;
  const auto got = results<kCooperative>(true, kernel, from, count_of_results, given);
  const auto expected = results<kCooperative>(false, kernel, from, count_of_results, given);
  report.check(!std::memcmp(got.data(), expected.data(), got.size() * sizeof(To)), what,
               [] { return "PTX gives other bits than the source"; });
}
// As far apart as so many units of the last bit, of normal numbers.
template <class T>
void check_near(Report& report, const char* what, void (*kernel)(const T*, T*, int), const std::vector<T>& from,
                std::size_t count_of_results, double units) {
  const int count = static_cast<int>(from.size());
  const auto got = results<false>(true, kernel, from, count_of_results, count);
  const auto expected = results<false>(false, kernel, from, count_of_results, count);
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double apart = std::fabs(double(got[i]) - expected[i]);
    const double most = units * epsilon<T>() * std::fabs(double(expected[i])) + std::numeric_limits<T>::min();
    report.check(got[i] == expected[i] || apart <= most, what, [&] {
      std::ostringstream out;
      out << "number " << i << ": " << got[i] << " from PTX, " << expected[i] << " from the source";
      return out.str();
    });
  }
}

template <class T>
std::vector<uint32_t> fragments(std::mt19937& random) {
  std::vector<uint32_t> out(10 * kProbeThreads);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const auto some = [&] { return static_cast<float>(static_cast<int>(random() % 17) - 8); };
    if (i % 10 >= 6 || sizeof(T) == 4) out[i] = as_word(some());
    else if constexpr (sizeof(T) == 2) out[i] = from_float<T>(some()).bits | uint32_t(from_float<T>(some()).bits) << 16;
  }
  return out;
}

int run() {
  Report report;
  report.where = "probes of PTX";
  std::mt19937 random(1);
  check_same(report, "mma of bfloat16", mma_probe<bfloat16>, fragments<bfloat16>(random), 4 * kProbeThreads);
  check_same(report, "mma of float16", mma_probe<float16>, fragments<float16>(random), 4 * kProbeThreads);
  check_same(report, "mma of float", mma_probe<float>, fragments<float>(random), 4 * kProbeThreads);

  std::vector<Words4> words(3 * kProbeThreads);
  for (Words4& four : words)
    for (uint32_t& word : four.word) word = random();
  check_same(report, "ldmatrix", ldmatrix_probe<false>, words, 4 * kProbeThreads);
  check_same(report, "ldmatrix_transposed", ldmatrix_probe<true>, words, 4 * kProbeThreads);
  check_same(report, "cp_async", cp_async_probe, words, 6 * kProbeThreads);
  check_same(report, "load_l2", load_l2_probe, words, kProbeThreads);
  std::vector<uint32_t> numbers(8 * kProbeThreads);
  for (uint32_t& one : numbers) one = random();
  check_same<true>(report, "grid_sync", grid_sync_probe, numbers, 2 * numbers.size(), 5);

  std::vector<bfloat16> bfloat16s;
  std::vector<float16> float16s;
  for (int i = 0; i < 0x10000; ++i) {
    const auto word = static_cast<uint16_t>(i);
    if (!std::isnan(value(bfloat16{word}))) bfloat16s.push_back({word});  // NaN has many words
    if (!std::isnan(value(float16{word}))) float16s.push_back({word});
  }
  check_same(report, "to_float of bfloat16", to_float_probe<bfloat16>, bfloat16s, bfloat16s.size());
  check_same(report, "to_float of float16", to_float_probe<float16>, float16s, float16s.size());

  // All numbers of 16 bits with what is halfway to the next, and next to that.
  std::vector<float> floats;
  const auto add = [&](float x) {
    for (int i = -1; i <= 1; ++i)
      for (const uint32_t half : {0u, 0x1000u, 0x8000u}) floats.push_back(as_float(as_word(x) + half + i));
  };
  for (const bfloat16 x : bfloat16s) add(value(x));
  for (const float16 x : float16s) add(value(x));
  check_same(report, "from_float of bfloat16", from_float_probe<bfloat16>, floats, 2 * floats.size());
  check_same(report, "from_float of float16", from_float_probe<float16>, floats, 2 * floats.size());
  std::vector<float> finite;
  for (const float x : floats)
    if (!std::isnan(x)) finite.push_back(x);
  check_same(report, "round_to_tf32", tf32_probe, finite, finite.size());

  std::vector<float> moderate{-std::numeric_limits<float>::infinity(), 0};
  std::vector<double> moderate_double{0};
  for (int i = 0; i < 4000; ++i) {
    moderate.push_back(std::ldexp(static_cast<float>(static_cast<int32_t>(random())), -24));  // up to 128
    moderate_double.push_back(std::ldexp(static_cast<double>(static_cast<int32_t>(random())), -22));
  }
  check_near(report, "exp2_approximate", exp2_probe, moderate, moderate.size(), 2);
  moderate.erase(moderate.begin());
  check_near(report, "functions of float", functions_probe<float>, moderate, 3 * moderate.size(), 4);
  check_near(report, "functions of double", functions_probe<double>, moderate_double, 3 * moderate_double.size(), 4);
  std::printf(
      "%lld passed, %lld failed\n", static_cast<long long>(report.passed), static_cast<long long>(report.failed));
  return report.failed ? 1 : 0;
}

}  // namespace
}  // namespace fastseq::test

int main() { return fastseq::test::run(); }
#else
namespace fastseq::cuda {
template __global__ void mma_probe<bfloat16>(const uint32_t*, float*, int);
template __global__ void mma_probe<float16>(const uint32_t*, float*, int);
template __global__ void mma_probe<float>(const uint32_t*, float*, int);
template __global__ void ldmatrix_probe<false>(const Words4*, uint32_t*, int);
template __global__ void ldmatrix_probe<true>(const Words4*, uint32_t*, int);
template __global__ void to_float_probe<bfloat16>(const bfloat16*, float*, int);
template __global__ void to_float_probe<float16>(const float16*, float*, int);
template __global__ void from_float_probe<bfloat16>(const float*, uint32_t*, int);
template __global__ void from_float_probe<float16>(const float*, uint32_t*, int);
template __global__ void functions_probe<float>(const float*, float*, int);
template __global__ void functions_probe<double>(const double*, double*, int);
}  // namespace fastseq::cuda
#endif
