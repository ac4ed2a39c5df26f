// Attention on CUDA by the checks of the CPU's kernels: under emulation, or, compiled by nvcc, on a device.
//
//   attention_tests [--quick | --races] [type]
//
// --quick: fewer sizes; --races: each kernel once, for sanitizers; type: float32, float64, bfloat16, float16.
#include "device_memory.h"
#include "program.h"

#include "cuda/attention.h"
#include "tests/attention_check.h"
#include "tests/layer_check.h"

namespace fastseq::test {
namespace {

using cuda::Call;

int64_t launches = 0;

template <class Use>
void call(int64_t bytes, const char* what, const Use& use) {
  ++launches;
  must(with_workspace(bytes,
                      [&](void* workspace) {
                        Call call;
                        call.workspace = workspace;
                        return use(call);
                      }),
       what);
}

template <class T>
void forward(const AttentionForward<T, Computed<T>>& p) {
  call(cuda::attention_forward_workspace<T>(p), "attention_forward",
       [&](const Call& call) { return cuda::attention_forward<T>(p, call); });
}
template <class T>
void backward(const AttentionBackward<T, Computed<T>>& p) {
  call(cuda::attention_backward_workspace<T>(p), "attention_backward",
       [&](const Call& call) { return cuda::attention_backward<T>(p, call); });
}
template <class T>
void mask_backward(const AttentionMaskBackward<T, Computed<T>>& p) {
  call(cuda::attention_backward_workspace<T>(p), "attention_mask_backward",
       [&](const Call& call) { return cuda::attention_mask_backward<T>(p, call); });
}

// The checks' rows are not aligned. Here are the same, aligned to 16 bytes, with NaN between them, which nobody may
// write.
template <class T>
class AlignedRows {
 public:
  template <class From>
  AlignedRows(Heads<From>& of, int64_t batch, int64_t heads, int64_t rows, int64_t size)
      : batch_(batch),
        heads_(heads),
        rows_(rows),
        size_(size),
        row_((size + 15) / 8 * 8),
        numbers_(static_cast<size_t>(batch * heads * rows * row_), quiet_nan<T>()) {
    each([&](int64_t b, int64_t n, int64_t i, T* mine) {
      std::memcpy(mine, of.at(n, i) + b * of.batch, static_cast<size_t>(size_) * sizeof(T));
    });
    of = {numbers_.data(), heads * rows * row_, rows * row_, row_};
  }

  void copy_to(const Heads<T>& to) {
    each([&](int64_t b, int64_t n, int64_t i, const T* mine) {
      std::memcpy(to.at(n, i) + b * to.batch, mine, static_cast<size_t>(size_) * sizeof(T));
      for (int64_t j = size_; j < row_; ++j)
        if (!std::isnan(value(mine[j]))) std::fprintf(stderr, "written between rows\n"), std::abort();
    });
  }

 private:
  template <class Use>
  void each(const Use& use) {
    for (int64_t b = 0; b < batch_; ++b)
      for (int64_t n = 0; n < heads_; ++n)
        for (int64_t i = 0; i < rows_; ++i) use(b, n, i, numbers_.data() + ((b * heads_ + n) * rows_ + i) * row_);
  }

  int64_t batch_, heads_, rows_, size_, row_;
  std::vector<T, Allocator<T>> numbers_;
};

template <class T>
void forward_aligned(const AttentionForward<T, Computed<T>>& given) {
  auto p = given;
  const AlignedRows<T> q(p.q, p.batch, p.heads, p.queries, p.size), k(p.k, p.batch, p.kv_heads, p.keys, p.size);
  const AlignedRows<T> v(p.v, p.batch, p.kv_heads, p.keys, p.value_size);
  AlignedRows<T> out(p.out, p.batch, p.heads, p.queries, p.value_size);
  forward<T>(p);
  out.copy_to(given.out);
}
template <class T>
void backward_aligned(const AttentionBackward<T, Computed<T>>& given) {
  auto p = given;
  const AlignedRows<T> q(p.q, p.batch, p.heads, p.queries, p.size), k(p.k, p.batch, p.kv_heads, p.keys, p.size);
  const AlignedRows<T> v(p.v, p.batch, p.kv_heads, p.keys, p.value_size);
  const AlignedRows<T> out(p.out, p.batch, p.heads, p.queries, p.value_size);
  const AlignedRows<T> d_out(p.d_out, p.batch, p.heads, p.queries, p.value_size);
  AlignedRows<T> dq(p.dq, p.batch, p.heads, p.queries, p.size), dk(p.dk, p.batch, p.kv_heads, p.keys, p.size);
  AlignedRows<T> dv(p.dv, p.batch, p.kv_heads, p.keys, p.value_size);
  backward<T>(p);
  dq.copy_to(given.dq), dk.copy_to(given.dk), dv.copy_to(given.dv);
}

template <class T>
cpu::TypedKernels<T> kernels_of(bool aligned) {
  cpu::TypedKernels<T> out{};
  out.attention_forward = aligned ? forward_aligned<T> : forward<T>;
  out.attention_backward = aligned ? backward_aligned<T> : backward<T>;
  out.attention_mask_backward = mask_backward<T>;
  return out;
}

// Two blocks and more of queries (64, 128) and of keys, three stages of keys (16 to 128) and of queries (16 to 64), two
// splits (256 keys), more of them than are merged at once (128) and two blocks of rows of few queries (64), with a
// remainder of each, for each padded size (64, 128, 256, and more), without and with options.
const AttentionShape kShapes[] = {
    {2, 2, 1, 150, 270, 40, 64, -kOpen, 0, 0},
    {1, 2, 1, 150, 200, 104, 128, -40, 60, 0},
    {1, 1, 1, 70, 140, 200, 256, -kOpen, kOpen, 0},
    {1, 2, 1, 3, 600, 64, 64, -kOpen, kOpen, 0, kFromEnd},
    {1, 2, 1, 1, 530, 256, 200, -kOpen, kOpen, 0},
    {1, 10, 1, 8, 300, 128, 100, -kOpen, 0, 0, kDropout | kSlopes | kFromEnd},
    {1, 2, 2, 70, 200, 64, 33, -kOpen, kOpen, 2, kSoftcap},
    {1, 2, 1, 70, 150, 128, 72, -kOpen, 0, 1, kSlopes | kFromEnd},
    {2, 2, 1, 70, 200, 64, 64, -kOpen, kOpen, 0, kDropout | kLengths},
    {1, 1, 1, 70, 100, 150, 256, -20, 50, 4, kDropout | kSoftcap},
    {3, 2, 1, 20, 300, 16, 24, -kOpen, 0, 3, kLengths},
    {1, 1, 1, 70, 70, 300, 260, -kOpen, kOpen, 0},
    {1, 1, 1, 1, 33000, 8, 8, -kOpen, kOpen, 0},
};
constexpr int kQuickShapes = 6;

template <class T>
void check_type(Report& report, const char* name, double bound, bool quick, const char* wanted) {
  if (wanted && std::strcmp(wanted, name)) return;
  const Report before = report;
  for (bool aligned : {true, false}) {
    const auto kernels = kernels_of<T>(aligned);
    // Sums are in float of both 16-bit types; the checks take the bound for sums from the type's epsilon.
    const double of_sums = std::is_same_v<T, float16> ? 8 : 1;
    const auto check = [&](const AttentionShape& shape, int i, const char* list) {
      report.where = std::string(name) + (aligned ? ", aligned" : "") + list + std::to_string(i);
      const int64_t failed = report.failed;
      check_attention_shape<T>(report, kernels, epsilon<T>() * of_sums, bound / of_sums, shape, 1000 + i, {1});
      if (std::getenv("FASTSEQ_TEST_VERBOSE") || report.failed > failed)
        std::printf("%s %s\n", report.where.c_str(), report.failed > failed ? "FAILED" : "passed"), std::fflush(stdout);
    };
    const int shapes = quick ? kQuickShapes : sizeof(kShapes) / sizeof(kShapes[0]);
    for (int i = 0; i < shapes; ++i) check(kShapes[i], i, ", shape ");
    const int cpu_shapes = quick ? 0 : sizeof(kAttentionShapes) / sizeof(kAttentionShapes[0]);
    for (int i = 0; i < cpu_shapes; ++i) check(kAttentionShapes[i], i, ", the CPU's shape ");
  }
  std::printf("%s: %lld passed, %lld failed\n", name, static_cast<long long>(report.passed - before.passed),
              static_cast<long long>(report.failed - before.failed));
  std::fflush(stdout);
}

template <class T>
void check_races(Report& report, const char* name, const char* wanted) {
  if (wanted && std::strcmp(wanted, name)) return;
  const auto run_once = [&](const AttentionShape& shape, bool aligned) {
    const auto got = run_attention(kernels_of<T>(aligned), AttentionProblem<T>(shape, 1), 1);
    report.where = name;
    report.check(got.out.intact() && got.lse.intact() && got.dq.intact() && got.dk.intact() && got.dv.intact(),
                 "results", [] { return "written outside their bounds"; });
  };
  for (const AttentionShape& shape : kShapes) run_once(shape, true);
  if (sizeof(T) == 2) run_once(kShapes[0], false);
}

int run(const char* option, const char* wanted) {
  Report report;
  if (!std::strcmp(option, "--races")) {
    check_races<bfloat16>(report, "bfloat16", wanted), check_races<float16>(report, "float16", wanted);
    check_races<float>(report, "float32", wanted), check_races<double>(report, "float64", wanted);
  } else {
    const bool quick = !std::strcmp(option, "--quick");
    check_type<bfloat16>(report, "bfloat16", kHalfBound, quick, wanted);
    check_type<float16>(report, "float16", kHalfBound, quick, wanted);
    check_type<float>(report, "float32", kForwardBound, quick, wanted);
    check_type<double>(report, "float64", kForwardBound, quick, wanted);
  }
  return end_program(report, launches);
}

}  // namespace
}  // namespace fastseq::test

int main(int argc, char** argv) { return fastseq::test::run_program(argc, argv, "type", fastseq::test::run); }
