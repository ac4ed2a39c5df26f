// The direct call of layers and cells, a part of fastseq._C.
#pragma once

#include <torch/csrc/python_headers.h>

#include <cstdint>

namespace fastseq {

void add_direct_calls(PyObject* module);  // direct_layer and direct_cell

int64_t direct_calls();  // those that ran, since the start or the last reset
void reset_direct_calls();

}  // namespace fastseq
