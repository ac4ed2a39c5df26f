// What the library launches: its host code as it is, linked with a runtime that keeps a record of launches and has no
// device. Threads, shared memory and grids in the budget come from here, so they are those of the sources.
//
//   launches < requests      a request: a line of words and of key=value; answers each with a line of JSON
//
//   rnn type=bfloat16 cell=lstm backward=0 batch=64 steps=100 input=512 hidden=512 multiprocessors=132 shared=232448
//   attention type=float32 backward=1 batch=4 heads=16 queries=512 keys=512 size=64 multiprocessors=132 shared=232448
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/attention.h"
#include "cuda/gemm.h"
#include "cuda/rnn.h"

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::cerr << what << "\n";
  std::exit(1);
}

// ---- The record ----------------------------------------------------------------------------------------------------
struct Launch {
  std::string kernel;  // the mangled name
  dim3 grid, block;
  std::size_t shared;
  bool cooperative;
  int64_t m, n, k;  // of the product that it computes, or else zeros
  int64_t times;

  bool same(const Launch& other) const {
    const auto facts = [](const Launch& l) {
      return std::vector<int64_t>{
          l.grid.x, l.grid.y, l.grid.z,     l.block.x * l.block.y * l.block.z, int64_t(l.shared), l.m,
          l.n,      l.k,      l.cooperative};
    };
    return kernel == other.kernel && facts(*this) == facts(other);
  }
};
std::vector<Launch> launches;
fastseq::cuda::Product product;
int multiprocessors = 0, shared_of_block = 0;

// By the address of the function on the host. It is filled before main.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> names;
  return names;
}

cudaError_t record(const void* kernel, dim3 grid, dim3 block, std::size_t shared, bool cooperative) {
  const Launch launch{names().at(kernel), grid, block, shared, cooperative, product.m, product.n, product.k, 1};
  for (Launch& before : launches)
    if (before.same(launch)) return ++before.times, cudaSuccess;
  launches.push_back(launch);
  return cudaSuccess;
}

}  // namespace

// ---- The runtime: all of it that the library uses ------------------------------------------------------------------
extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = name;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, std::size_t shared, cudaStream_t) {
  return record(kernel, grid, block, shared, false);
}
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void**, std::size_t shared,
                                        cudaStream_t) {
  return record(kernel, grid, block, shared, true);
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= shared_of_block ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_of_block;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    default:
      fail("the library asks the device for attribute " + std::to_string(attribute) + ", which launches.cpp lacks");
  }
}
const char* cudaGetErrorString(cudaError_t) { return "an error"; }

// For kernel<<<>>>, which the library has nowhere.
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { fail("a kernel is not launched by launch.h"); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, std::size_t, cudaStream_t) {
  fail("a kernel is not launched by launch.h");
}
unsigned __cudaPopCallConfiguration(dim3*, dim3*, std::size_t*, void*) { fail("a kernel is not launched by launch.h"); }

}  // extern "C"

// ---- Requests ------------------------------------------------------------------------------------------------------
namespace fastseq::cuda {
namespace {

class Request {
 public:
  explicit Request(const std::string& line) {
    std::istringstream words(line);
    words >> operation;
    for (std::string word; words >> word;) {
      const std::size_t at = word.find('=');
      if (at == std::string::npos) fail("not key=value: " + word);
      values_[word.substr(0, at)] = word.substr(at + 1);
    }
  }
  std::string text(const std::string& key) const {
    const auto found = values_.find(key);
    return found == values_.end() ? "" : found->second;
  }
  int64_t number(const std::string& key, int64_t otherwise = 0) const {
    return text(key).empty() ? otherwise : std::stoll(text(key));
  }

  std::string operation;

 private:
  std::map<std::string, std::string> values_;
};

// A place that nobody reads, aligned for all accesses.
template <class T>
T* somewhere() {
  return reinterpret_cast<T*>(uintptr_t(1) << 40);
}

cudaError_t recorded_gemm(const Product& wanted, void*, void* stream) {
  product = wanted;
  const cudaError_t error = gemm(wanted, stream);
  product = Product();
  return error;
}

template <class T>
void fill(RnnLayer<T>& p, const Request& request) {
  p.schedule.steps = request.number("steps"), p.schedule.batch = request.number("batch");
  p.input_size = request.number("input"), p.hidden_size = request.number("hidden");
  p.proj_size = request.number("projected"), p.directions = static_cast<int>(request.number("directions", 1));
  for (DirectionWeights<T>& weights : p.weights) {
    const T* const at = somewhere<T>();
    weights = {at, at, at, at, p.proj_size ? at : nullptr};
  }
  p.x = p.h0 = p.c0 = somewhere<T>();
}

template <class T>
cudaError_t run_rnn(const Request& request, const Call& call) {
  int cell = 0;
  while (cell_facts(static_cast<CellKind>(cell)).name != request.text("cell"))
    if (++cell == static_cast<int>(CellKind::count)) fail("there is no cell " + request.text("cell"));
  const auto kind = static_cast<CellKind>(cell);
  T* const at = somewhere<T>();
  if (!request.number("backward")) {
    RnnForward<T> p;
    fill(p, request);
    p.output = p.h_n = p.c_n = at;
    if (request.number("training", 1)) p.kept[0] = p.kept[1] = p.emitted[0] = p.emitted[1] = at;
    return rnn_forward(kind, p, call);
  }
  RnnBackward<T> p;
  fill(p, request);
  p.output = p.d_output = p.d_h_n = p.d_c_n = at, p.dx = p.d_h0 = p.d_c0 = at;
  p.kept[0] = p.kept[1] = p.emitted[0] = p.emitted[1] = at;
  for (DirectionGrads<T>& grads : p.grads) grads = {at, at, at, at, at};
  if (!p.proj_size) p.grads[0].w_hr = p.grads[1].w_hr = nullptr;
  return rnn_backward(kind, p, call);
}

template <class T, class A>
void fill(Attention<T, A>& p, const Request& request) {
  p.batch = request.number("batch"), p.heads = request.number("heads");
  p.kv_heads = request.number("kv_heads", p.heads);
  p.queries = request.number("queries"), p.keys = request.number("keys");
  p.size = request.number("size"), p.value_size = request.number("value_size", p.size);
  p.q.data = p.k.data = p.v.data = somewhere<T>();
  p.q.row = p.k.row = p.size, p.v.row = p.value_size;
  if (request.number("causal")) p.band.high = 0, p.from_end = true;
  if (request.number("options")) p.softcap = 1;
}

template <class T>
cudaError_t run_attention(const Request& request, const Call& call) {
  using A = Computed<T>;
  if (!request.number("backward")) {
    AttentionForward<T, A> p;
    fill(p, request);
    p.out.data = somewhere<T>(), p.lse.data = somewhere<A>();
    return attention_forward<T>(p, call);
  }
  AttentionMaskBackward<T, A> p;
  fill(p, request);
  p.dq.data = p.dk.data = p.dv.data = somewhere<T>();
  p.out.data = p.d_out.data = somewhere<T>(), p.lse.data = somewhere<A>();
  if (!request.number("mask")) return attention_backward<T>(p, call);
  p.mask.bias = somewhere<T>(), p.d_mask = somewhere<A>();
  p.mask_rows = p.queries, p.mask_columns = p.keys;
  return attention_mask_backward<T>(p, call);
}

template <class T>
cudaError_t run(const Request& request) {
  Call call;
  call.workspace = somewhere<char>(), call.gemm = recorded_gemm, call.tf32 = request.number("tf32") != 0;
  if (request.text("path") == "stepwise") call.rnn_path = RnnPath::stepwise;
  if (request.operation == "rnn") return run_rnn<T>(request, call);
  if (request.operation == "attention") return run_attention<T>(request, call);
  fail("there is no operation " + request.operation);
}

cudaError_t run_typed(const Request& request) {
  const std::string type = request.text("type");
  if (type == "float32") return run<float>(request);
  if (type == "float64") return run<double>(request);
  if (type == "bfloat16") return run<bfloat16>(request);
  if (type == "float16") return run<float16>(request);
  fail("there is no type " + type);
}

void print(cudaError_t status) {
  std::cout << "{\"status\": " << status << ", \"launches\": [";
  for (const Launch& l : launches) {
    std::cout << (&l == launches.data() ? "" : ", ") << "{\"kernel\": \"" << l.kernel << "\", \"grid\": [" << l.grid.x
              << ", " << l.grid.y << ", " << l.grid.z << "], \"threads\": " << l.block.x * l.block.y * l.block.z
              << ", \"shared\": " << l.shared << ", \"cooperative\": " << (l.cooperative ? "true" : "false")
              << ", \"product\": [" << l.m << ", " << l.n << ", " << l.k << "], \"times\": " << l.times << "}";
  }
  std::cout << "]}\n";
}

}  // namespace
}  // namespace fastseq::cuda

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    const fastseq::cuda::Request request(line);
    multiprocessors = static_cast<int>(request.number("multiprocessors"));
    shared_of_block = static_cast<int>(request.number("shared"));
    launches.clear();
    fastseq::cuda::print(fastseq::cuda::run_typed(request));
  }
}
