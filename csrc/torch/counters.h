// How often each kernel ran: what lets a test assert that no call left the kernels.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "../cell_list.h"

namespace fastseq {

enum class Counted : int { rnn_forward, rnn_backward, count };

template <class T>
void count_call(Counted kernel, CellKind cell);

#define FASTSEQ_API __attribute__((visibility("default")))
FASTSEQ_API std::map<std::string, int64_t> counters();  // "rnn_forward/gru/float32" -> calls; only what ran
FASTSEQ_API void reset_counters();

}  // namespace fastseq
