// The library for other languages: the parameter blocks of csrc/params.h and csrc/attention_params.h by their address,
// types by number. Status 0 is success, else an error of CUDA's runtime.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define FASTSEQ_CUDA_API extern "C" __declspec(dllexport)
#else
#define FASTSEQ_CUDA_API extern "C" __attribute__((visibility("default")))
#endif

// cell: CellKind; type: fastseq::cuda::NumberType; call: fastseq::cuda::Call. *_bytes is the size of the workspace that
// the call needs.
FASTSEQ_CUDA_API int64_t fastseq_cuda_rnn_forward_bytes(int cell, int type, const void* block);
FASTSEQ_CUDA_API int fastseq_cuda_rnn_forward(int cell, int type, const void* block, const void* call);
FASTSEQ_CUDA_API int64_t fastseq_cuda_rnn_backward_bytes(int cell, int type, const void* block);
FASTSEQ_CUDA_API int fastseq_cuda_rnn_backward(int cell, int type, const void* block, const void* call);

FASTSEQ_CUDA_API int64_t fastseq_cuda_attention_forward_bytes(int type, const void* block);
FASTSEQ_CUDA_API int fastseq_cuda_attention_forward(int type, const void* block, const void* call);
FASTSEQ_CUDA_API int64_t fastseq_cuda_attention_backward_bytes(int type, const void* block);
FASTSEQ_CUDA_API int fastseq_cuda_attention_backward(int type, const void* block, const void* call);
FASTSEQ_CUDA_API int fastseq_cuda_attention_mask_backward(int type, const void* block, const void* call);

FASTSEQ_CUDA_API const char* fastseq_cuda_error(int status);
