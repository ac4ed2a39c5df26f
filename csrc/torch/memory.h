// Tensors in memory that the kernels keep from call to call (cpu/memory.h).
#pragma once

#include <ATen/core/Tensor.h>

#include "counters.h"

namespace fastseq {

// A contiguous tensor on the CPU of like's dtype, its contents anything. Not at::empty, which goes through the
// dispatcher, and takes as long as a small step.
at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like);

FASTSEQ_API void empty_cache();

}  // namespace fastseq
