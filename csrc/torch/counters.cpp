#include "counters.h"

#include <atomic>

#include "../cpu/dispatch.h"

namespace fastseq {

namespace {

constexpr const char* kNames[] = {"rnn_forward", "rnn_backward"};
std::atomic<int64_t> calls[static_cast<int>(Counted::count)][cpu::kCells][2];

template <class F>
void for_each(const F& f) {
  for (int kernel = 0; kernel < static_cast<int>(Counted::count); ++kernel)
    for (int cell = 0; cell < cpu::kCells; ++cell)
      for (int float32 = 0; float32 < 2; ++float32) f(kernel, cell, float32, calls[kernel][cell][float32]);
}

}  // namespace

void count_call(Counted kernel, CellKind cell, bool float32) {
  calls[static_cast<int>(kernel)][static_cast<int>(cell)][float32].fetch_add(1, std::memory_order_relaxed);
}

std::map<std::string, int64_t> counters() {
  std::map<std::string, int64_t> out;
  for_each([&](int kernel, int cell, int float32, std::atomic<int64_t>& n) {
    if (n > 0)
      out[std::string(kNames[kernel]) + "/" + cpu::kernels().cells[cell].name + (float32 ? "/float32" : "/float64")] =
          n;
  });
  return out;
}

void reset_counters() {
  for_each([](int, int, int, std::atomic<int64_t>& n) { n = 0; });
}

}  // namespace fastseq
