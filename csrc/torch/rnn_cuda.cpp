// The recurrent operators on CUDA.
#include "rnn.h"

#include <torch/library.h>

#include "cuda_device.h"
#include "rnn_operators.h"

TORCH_LIBRARY_IMPL(fastseq, CUDA, m) {
  m.impl("rnn_forward", fastseq::rnn_forward<fastseq::CudaDevice>);
  m.impl("rnn_backward", fastseq::rnn_backward<fastseq::CudaDevice>);
}
