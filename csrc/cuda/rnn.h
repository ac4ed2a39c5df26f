// A recurrent layer on CUDA, all its directions. T is float, double, bfloat16 or float16. As of csrc/params.h, tensors
// are in the device's memory and the tables of Schedule in the host's; `threads` and `packed` do not matter.
#pragma once

#include "../cell_list.h"
#include "../params.h"
#include "call.h"

namespace fastseq::cuda {

CellFacts cell_facts(CellKind cell);

template <class T>
int64_t rnn_forward_workspace(CellKind cell, const RnnForward<T>& p);
template <class T>
cudaError_t rnn_forward(CellKind cell, const RnnForward<T>& p, const Call& call);

template <class T>
int64_t rnn_backward_workspace(CellKind cell, const RnnBackward<T>& p);
template <class T>
cudaError_t rnn_backward(CellKind cell, const RnnBackward<T>& p, const Call& call);

}  // namespace fastseq::cuda
