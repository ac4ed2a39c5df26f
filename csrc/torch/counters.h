// How often each kernel ran: what lets a test assert that no call left the kernels.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "../cell_list.h"

namespace fastseq {

enum class Counted : int {
  rnn_forward,
  rnn_backward,
  attention_forward,
  attention_backward,
  attention_mask_backward,
  count
};

// A kernel without cells is counted under the first.
template <class T>
void count_call(Counted kernel, CellKind cell = CellKind{});

#define FASTSEQ_API __attribute__((visibility("default")))
FASTSEQ_API std::map<std::string, int64_t> counters();  // "rnn_forward/gru/float32" or "attention_forward/float32" ->
                                                        // calls; only what ran
FASTSEQ_API void reset_counters();

}  // namespace fastseq
