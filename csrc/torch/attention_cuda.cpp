// The attention operators on CUDA.
#include "attention.h"

#include <torch/library.h>

#include "attention_operators.h"
#include "cuda_device.h"

TORCH_LIBRARY_IMPL(fastseq, CUDA, m) {
  m.impl("attention_forward", fastseq::attention_forward<fastseq::CudaDevice>);
  m.impl("attention_backward", fastseq::attention_backward<fastseq::CudaDevice>);
}
