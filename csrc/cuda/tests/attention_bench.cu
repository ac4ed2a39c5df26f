// Times attention on a device: milliseconds, TFLOP/s of what has to be multiplied (backward: 2.5 times forward), and
// for decoding TB/s of keys and values. Before that, how far results are from those in double: the largest difference,
// over the largest number.
//
//   attention_bench [repeats [type]]
#include <cmath>
#include <cstring>
#include <vector>

#include "device_memory.h"

#include "cuda/attention.h"
#include "cuda/number.h"

namespace fastseq::test {
namespace {

struct Timed {
  int64_t batch, heads, kv_heads, queries, keys, size;
  bool causal, backward;
  uint32_t dropout = 0;
};
const Timed kTimed[] = {
    {4, 16, 16, 4096, 4096, 64, false, true},      {4, 16, 16, 4096, 4096, 64, true, true},
    {4, 16, 16, 4096, 4096, 128, false, true},     {4, 16, 16, 4096, 4096, 128, true, true},
    {4, 32, 8, 4096, 4096, 128, true, true},       {4, 8, 8, 4096, 4096, 256, true, true},
    {16, 16, 16, 1024, 1024, 64, false, true},     {32, 16, 16, 512, 512, 128, false, true},
    {4, 16, 16, 2048, 2048, 64, true, true, 6554}, {4, 16, 16, 2048, 2048, 128, true, true, 6554},
    {8, 32, 8, 1, 8192, 128, false, false},        {64, 32, 8, 1, 4096, 128, false, false},
    {1, 32, 8, 1, 32768, 128, false, false},       {8, 16, 16, 1, 8192, 64, false, false},
};

// use(i) for each number, on the device.
template <class Use>
__global__ void each_number(int64_t numbers, Use use) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < numbers; i += step) use(i);
}

// Small numbers that differ: time depends on them, by the power they take.
template <class T>
struct Fill {
  T* to;
  uint32_t seed;
  __device__ void operator()(int64_t i) const {
    uint32_t x = (static_cast<uint32_t>(i) + seed) * 2654435761u;
    x = (x ^ x >> 15) * 2246822519u, x ^= x >> 13;
    cuda::store(to[i], static_cast<Computed<T>>(static_cast<float>(x) * 0x1p-31f - 1));
  }
};
template <class To, class From>
struct Copy {
  To* to;
  const From* from;
  __device__ void operator()(int64_t i) const { to[i] = static_cast<To>(cuda::load(from[i])); }
};

// Numbers on the device, until it is gone.
template <class T>
class Numbers {
 public:
  explicit Numbers(int64_t count) : count_(count) {
    void* data = nullptr;
    must(cudaMalloc(&data, static_cast<size_t>(count) * sizeof(T)), "cudaMalloc");
    data_ = static_cast<T*>(data);
  }
  Numbers(const Numbers&) = delete;
  ~Numbers() { cudaFree(data_); }
  T* data() const { return data_; }
  void fill(uint32_t seed) { each_number<<<1024, 256>>>(count_, Fill<T>{data_, seed}); }
  template <class From>
  void copy(const Numbers<From>& from) {
    each_number<<<1024, 256>>>(count_, Copy<T, From>{data_, from.data()});
  }
  std::vector<double> to_host() const {
    Numbers<double> wide(count_);
    wide.copy(*this);
    std::vector<double> out(static_cast<size_t>(count_));
    must(cudaMemcpy(out.data(), wide.data(), out.size() * sizeof(double), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return out;
  }

 private:
  int64_t count_;
  T* data_;
};

template <class T>
struct Problem {
  using A = Computed<T>;
  Timed t;
  int64_t q_count = t.batch * t.heads * t.queries * t.size, k_count = t.batch * t.kv_heads * t.keys * t.size;
  int64_t rows = t.batch * t.heads * t.queries;
  Numbers<T> q{q_count}, k{k_count}, v{k_count}, d_out{q_count}, out{q_count}, dq{q_count}, dk{k_count}, dv{k_count};
  Numbers<A> lse{rows};
  AttentionForward<T, A> f;
  AttentionBackward<T, A> b;

  explicit Problem(const Timed& timed) : t(timed) {
    inputs(f), inputs(b);
    f.out = of_queries(out.data()), f.lse = {lse.data(), t.heads * t.queries, t.queries};
    b.out = of_queries(static_cast<const T*>(out.data())), b.d_out = of_queries(static_cast<const T*>(d_out.data()));
    b.lse = {lse.data(), t.heads * t.queries, t.queries};
    b.dq = of_queries(dq.data()), b.dk = of_keys(dk.data()), b.dv = of_keys(dv.data());
  }
  void fill() { q.fill(1), k.fill(2), v.fill(3), d_out.fill(4); }
  template <class From>
  void copy(const Problem<From>& from) {
    q.copy(from.q), k.copy(from.k), v.copy(from.v), d_out.copy(from.d_out);
  }

 private:
  template <class Data>
  Heads<Data> of(Data* data, int64_t heads, int64_t length) const {
    return {data, heads * length * t.size, length * t.size, t.size};
  }
  template <class Data>
  Heads<Data> of_queries(Data* data) const {
    return of(data, t.heads, t.queries);
  }
  template <class Data>
  Heads<Data> of_keys(Data* data) const {
    return of(data, t.kv_heads, t.keys);
  }
  template <class Block>
  void inputs(Block& p) {
    p.batch = t.batch, p.heads = t.heads, p.kv_heads = t.kv_heads, p.queries = t.queries, p.keys = t.keys;
    p.size = p.value_size = t.size, p.scale = 1 / std::sqrt(static_cast<double>(t.size));
    if (t.causal) p.band.high = 0;
    p.dropout = {t.dropout, 1234};
    p.q = of_queries(static_cast<const T*>(q.data()));
    p.k = of_keys(static_cast<const T*>(k.data())), p.v = of_keys(static_cast<const T*>(v.data()));
  }
};

// What runs a problem, with memory for it.
template <class T>
struct Runs {
  Problem<T>& p;
  Numbers<char> memory{cuda::attention_forward_workspace<T>(p.f) + cuda::attention_backward_workspace<T>(p.b) + 256};
  cuda::Call call;
  explicit Runs(Problem<T>& problem) : p(problem) { call.workspace = memory.data(); }
  cudaError_t forward() const { return cuda::attention_forward<T>(p.f, call); }
  cudaError_t backward() const { return cuda::attention_backward<T>(p.b, call); }
};

template <class T>
double error(const Numbers<T>& got, const Numbers<double>& expected) {
  const auto a = got.to_host(), b = expected.to_host();
  double largest = 0, difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    largest = std::fmax(largest, std::fabs(b[i]));
    const double d = std::fabs(a[i] - b[i]);
    if (!(d <= difference)) difference = d;  // NaN, too
  }
  return difference / largest;
}

template <class Use>
double milliseconds(int repeats, const Use& use) {
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin), "cudaEventCreate"), must(cudaEventCreate(&end), "cudaEventCreate");
  for (int i = 0; i < 3; ++i) must(use(), "warm up");
  must(cudaEventRecord(begin), "cudaEventRecord");
  for (int i = 0; i < repeats; ++i) must(use(), "the call");
  must(cudaEventRecord(end), "cudaEventRecord");
  must(cudaEventSynchronize(end), "cudaEventSynchronize");
  float out = 0;
  must(cudaEventElapsedTime(&out, begin, end), "cudaEventElapsedTime");
  return out / repeats;
}

template <class T>
void time_all(const char* name, int repeats) {
  for (const Timed& t : kTimed) {
    Problem<T> problem(t);
    problem.fill();
    const Runs<T> runs(problem);
    std::printf("%-8s B%-2lld N%lld/%lld L%lld S%lld D%lld%s%s: error", name, static_cast<long long>(t.batch),
                static_cast<long long>(t.heads), static_cast<long long>(t.kv_heads), static_cast<long long>(t.queries),
                static_cast<long long>(t.keys), static_cast<long long>(t.size), t.causal ? " causal" : "",
                t.dropout ? " dropout" : "");
    {
      Problem<double> exact(t);
      exact.copy(problem);
      const Runs<double> exactly(exact);
      must(runs.forward(), "forward"), must(exactly.forward(), "forward of double");
      std::printf(" %.1e", error(problem.out, exact.out));
      if (t.backward) {
        must(runs.backward(), "backward"), must(exactly.backward(), "backward of double");
        std::printf(", of dQ %.1e, dK %.1e, dV %.1e", error(problem.dq, exact.dq), error(problem.dk, exact.dk),
                    error(problem.dv, exact.dv));
      }
    }
    const double pairs = t.causal ? 0.5 * t.queries * t.keys : 1.0 * t.queries * t.keys;
    const double flop = 4.0 * t.batch * t.heads * pairs * t.size;
    const double forward = milliseconds(repeats, [&] { return runs.forward(); });
    std::printf("; forward %.3f ms, ", forward);
    if (t.queries == 1) std::printf("%.2f TB/s", 2 * problem.k_count * sizeof(T) / forward * 1e-9);
    else std::printf("%.0f TFLOP/s", flop / forward * 1e-9);
    if (t.backward) {
      const double backward = milliseconds(repeats, [&] { return runs.backward(); });
      std::printf("; backward %.3f ms, %.0f TFLOP/s", backward, 2.5 * flop / backward * 1e-9);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace fastseq::test

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 10;
  const char* const type = argc > 2 ? argv[2] : "";
  if (!*type || !std::strcmp(type, "bfloat16")) fastseq::test::time_all<fastseq::bfloat16>("bfloat16", repeats);
  if (!*type || !std::strcmp(type, "float32")) fastseq::test::time_all<float>("float32", repeats);
}
