// Times attention on a device: milliseconds, TFLOP/s of what has to be multiplied (backward: 2.5 times forward), and
// for decoding TB/s of keys and values.
//
//   attention_bench [repeats]
#include <vector>

#include "device_memory.h"

#include "cuda/attention.h"

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

template <class T>
T* device(int64_t numbers) {
  void* data = nullptr;
  must(cudaMalloc(&data, static_cast<size_t>(numbers) * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(data);
}

// Small numbers that differ: time depends on them, by the power they take.
template <class T>
__global__ void fill(T* to, int64_t numbers, uint32_t seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < numbers; i += step) {
    uint32_t x = (static_cast<uint32_t>(i) + seed) * 2654435761u;
    x = (x ^ x >> 15) * 2246822519u, x ^= x >> 13;
    cuda::store(to[i], static_cast<Computed<T>>(static_cast<float>(x) * 0x1p-31f - 1));
  }
}
template <class T>
T* filled(int64_t numbers, uint32_t seed) {
  T* const data = device<T>(numbers);
  fill<<<1024, 256>>>(data, numbers, seed);
  return data;
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
  using A = Computed<T>;
  for (const Timed& t : kTimed) {
    if (sizeof(T) > 2 && t.queries > 2048) continue;
    const int64_t q = t.batch * t.heads * t.queries * t.size, k = t.batch * t.kv_heads * t.keys * t.size;
    const int64_t rows = t.batch * t.heads * t.queries;
    AttentionBackward<T, A> b;
    const auto set = [&](auto& p) {
      p.batch = t.batch, p.heads = t.heads, p.kv_heads = t.kv_heads, p.queries = t.queries, p.keys = t.keys;
      p.size = p.value_size = t.size, p.scale = 1 / std::sqrt(static_cast<double>(t.size));
      if (t.causal) p.band.high = 0;
      p.dropout = {t.dropout, 1234};
    };
    const auto heads = [&](auto* data, int64_t count, int64_t length) {
      return Heads<std::remove_pointer_t<decltype(data)>>{data, count * length * t.size, length * t.size, t.size};
    };
    T *const q_data = filled<T>(q, 1), *const k_data = filled<T>(k, 2), *const v_data = filled<T>(k, 3);
    T* const out = filled<T>(q, 4);
    A* const lse = device<A>(rows);
    const auto inputs = [&](auto& p) {
      set(p);
      p.q = heads(static_cast<const T*>(q_data), t.heads, t.queries);
      p.k = heads(static_cast<const T*>(k_data), t.kv_heads, t.keys);
      p.v = heads(static_cast<const T*>(v_data), t.kv_heads, t.keys);
    };
    AttentionForward<T, A> f;
    inputs(f), inputs(b);
    f.out = heads(out, t.heads, t.queries), f.lse = {lse, t.heads * t.queries, t.queries};
    cuda::Call call;
    void* const memory = device<char>(cuda::attention_forward_workspace<T>(f) + rows * 8 + 256);
    call.workspace = memory;
    const double forward = milliseconds(repeats, [&] { return cuda::attention_forward<T>(f, call); });
    const double pairs = t.causal ? 0.5 * t.queries * t.keys : 1.0 * t.queries * t.keys;
    const double flop = 4.0 * t.batch * t.heads * pairs * t.size;
    std::printf("%-8s B%-2lld N%lld/%lld L%lld S%lld D%lld%s%s: forward %.3f ms, ", name,
                static_cast<long long>(t.batch), static_cast<long long>(t.heads), static_cast<long long>(t.kv_heads),
                static_cast<long long>(t.queries), static_cast<long long>(t.keys), static_cast<long long>(t.size),
                t.causal ? " causal" : "", t.dropout ? " dropout" : "", forward);
    if (t.queries == 1) std::printf("%.2f TB/s", 2 * k * sizeof(T) / forward * 1e-9);
    else std::printf("%.0f TFLOP/s", flop / forward * 1e-9);
    if (t.backward) {
      T* const d_out = filled<T>(q, 5);
      T *const dq = device<T>(q), *const dk = device<T>(k), *const dv = device<T>(k);
      b.out = heads(static_cast<const T*>(out), t.heads, t.queries);
      b.d_out = heads(static_cast<const T*>(d_out), t.heads, t.queries);
      b.lse = {lse, t.heads * t.queries, t.queries};
      b.dq = heads(dq, t.heads, t.queries), b.dk = heads(dk, t.kv_heads, t.keys);
      b.dv = heads(dv, t.kv_heads, t.keys);
      const double backward = milliseconds(repeats, [&] { return cuda::attention_backward<T>(b, call); });
      std::printf("; backward %.3f ms, %.0f TFLOP/s", backward, 2.5 * flop / backward * 1e-9);
      for (T* data : {d_out, dq, dk, dv}) must(cudaFree(data), "cudaFree");
    }
    std::printf("\n");
    std::fflush(stdout);
    for (T* data : {q_data, k_data, v_data, out}) must(cudaFree(data), "cudaFree");
    must(cudaFree(lse), "cudaFree"), must(cudaFree(memory), "cudaFree");
  }
}

}  // namespace
}  // namespace fastseq::test

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 10;
  fastseq::test::time_all<fastseq::bfloat16>("bfloat16", repeats);
  fastseq::test::time_all<float>("float32", repeats);
}
