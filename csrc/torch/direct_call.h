// The direct calls of layers, cells and attention, a part of fastseq._C.
#pragma once

#include <torch/csrc/python_headers.h>

#include <cstdint>

namespace fastseq {

void add_direct_calls(PyObject* module);  // direct_layer, direct_cell and direct_attention

PyObject* direct_attention(PyObject*, PyObject* const* args, Py_ssize_t count);

int64_t direct_calls();  // those that ran, since the start or the last reset
void reset_direct_calls();

}  // namespace fastseq
