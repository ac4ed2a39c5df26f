#include "counters.h"

#include <atomic>

#include "../cpu/dispatch.h"

namespace fastseq {

namespace {

constexpr const char* kNames[] = {
    "rnn_forward", "rnn_backward", "attention_forward", "attention_backward", "attention_mask_backward"};
constexpr const char* kTypes[] = {"float32", "float64", "bfloat16", "float16"};
constexpr int kTypeCount = sizeof(kTypes) / sizeof(kTypes[0]);
std::atomic<int64_t> calls[static_cast<int>(Counted::count)][cpu::kCells][kTypeCount];

template <class F>
void for_each(const F& f) {
  for (int kernel = 0; kernel < static_cast<int>(Counted::count); ++kernel)
    for (int cell = 0; cell < cpu::kCells; ++cell)
      for (int type = 0; type < kTypeCount; ++type) f(kernel, cell, type, calls[kernel][cell][type]);
}

}  // namespace

static void count_call(Counted kernel, CellKind cell, int type) {
  calls[static_cast<int>(kernel)][static_cast<int>(cell)][type].fetch_add(1, std::memory_order_relaxed);
}

template <>
void count_call<float>(Counted kernel, CellKind cell) {
  count_call(kernel, cell, 0);
}
template <>
void count_call<double>(Counted kernel, CellKind cell) {
  count_call(kernel, cell, 1);
}
template <>
void count_call<bfloat16>(Counted kernel, CellKind cell) {
  count_call(kernel, cell, 2);
}
template <>
void count_call<float16>(Counted kernel, CellKind cell) {
  count_call(kernel, cell, 3);
}

std::map<std::string, int64_t> counters() {
  std::map<std::string, int64_t> out;
  for_each([&](int kernel, int cell, int type, std::atomic<int64_t>& n) {
    const bool has_cells = kernel < static_cast<int>(Counted::attention_forward);
    const std::string name = has_cells ? std::string("/") + cpu::kernels().cells[cell].name : "";
    if (n > 0) out[kNames[kernel] + name + "/" + kTypes[type]] = n;
  });
  return out;
}

void reset_counters() {
  for_each([](int, int, int, std::atomic<int64_t>& n) { n = 0; });
}

}  // namespace fastseq
