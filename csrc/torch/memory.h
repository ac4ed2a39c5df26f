// Tensors in memory that the kernels keep from call to call (cpu/memory.h).
#pragma once

#include <ATen/core/Tensor.h>

#include "counters.h"

namespace fastseq {

// A contiguous tensor on the CPU of like's dtype, its contents anything. Not at::empty, which goes through the
// dispatcher, and takes as long as a small step.
at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like);

// t's numbers, for whoever gets it to edit without a change in t. A large t gives its memory (copy-on-write), which is
// copied when either is first written to; a trace gets a clone.
at::Tensor copy_on_write(const at::Tensor& t);

FASTSEQ_API void empty_cache();
FASTSEQ_API void poison_memory(bool poison);

}  // namespace fastseq
