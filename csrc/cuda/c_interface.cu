#include "c_interface.h"

#include "attention.h"
#include "rnn.h"

namespace fastseq::cuda {

namespace {

// f of a number of the type; `otherwise` for one that is unknown.
template <class Result, class Use>
Result with_type(int type, Result otherwise, const Use& use) {
  switch (static_cast<NumberType>(type)) {
    case NumberType::float32:
      return use(float());
    case NumberType::float64:
      return use(double());
    case NumberType::bfloat16:
      return use(bfloat16());
    case NumberType::float16:
      return use(float16());
  }
  return otherwise;
}

template <template <class, class> class Block, class T>
const Block<T, Computed<T>>& attention_block(const void* block) {
  return *static_cast<const Block<T, Computed<T>>*>(block);
}

constexpr int kUnknownType = cudaErrorInvalidValue;

}  // namespace

}  // namespace fastseq::cuda

using namespace fastseq;
using namespace fastseq::cuda;

int64_t fastseq_cuda_rnn_forward_bytes(int cell, int type, const void* block) {
  return with_type(type, int64_t(-1), [&](auto zero) {
    using T = decltype(zero);
    return rnn_forward_workspace(static_cast<CellKind>(cell), *static_cast<const RnnForward<T>*>(block));
  });
}

int fastseq_cuda_rnn_forward(int cell, int type, const void* block, const void* call) {
  return with_type(type, kUnknownType, [&](auto zero) {
    using T = decltype(zero);
    return static_cast<int>(rnn_forward(
        static_cast<CellKind>(cell), *static_cast<const RnnForward<T>*>(block), *static_cast<const Call*>(call)));
  });
}

int64_t fastseq_cuda_rnn_backward_bytes(int cell, int type, const void* block) {
  return with_type(type, int64_t(-1), [&](auto zero) {
    using T = decltype(zero);
    return rnn_backward_workspace(static_cast<CellKind>(cell), *static_cast<const RnnBackward<T>*>(block));
  });
}

int fastseq_cuda_rnn_backward(int cell, int type, const void* block, const void* call) {
  return with_type(type, kUnknownType, [&](auto zero) {
    using T = decltype(zero);
    return static_cast<int>(rnn_backward(
        static_cast<CellKind>(cell), *static_cast<const RnnBackward<T>*>(block), *static_cast<const Call*>(call)));
  });
}

int64_t fastseq_cuda_attention_forward_bytes(int type, const void* block) {
  return with_type(type, int64_t(-1), [&](auto zero) {
    using T = decltype(zero);
    return attention_forward_workspace<T>(attention_block<AttentionForward, T>(block));
  });
}

int fastseq_cuda_attention_forward(int type, const void* block, const void* call) {
  return with_type(type, kUnknownType, [&](auto zero) {
    using T = decltype(zero);
    return static_cast<int>(
        attention_forward<T>(attention_block<AttentionForward, T>(block), *static_cast<const Call*>(call)));
  });
}

int64_t fastseq_cuda_attention_backward_bytes(int type, const void* block) {
  return with_type(type, int64_t(-1), [&](auto zero) {
    using T = decltype(zero);
    return attention_backward_workspace<T>(attention_block<AttentionBackward, T>(block));
  });
}

int fastseq_cuda_attention_backward(int type, const void* block, const void* call) {
  return with_type(type, kUnknownType, [&](auto zero) {
    using T = decltype(zero);
    return static_cast<int>(
        attention_backward<T>(attention_block<AttentionBackward, T>(block), *static_cast<const Call*>(call)));
  });
}

int fastseq_cuda_attention_mask_backward(int type, const void* block, const void* call) {
  return with_type(type, kUnknownType, [&](auto zero) {
    using T = decltype(zero);
    return static_cast<int>(
        attention_mask_backward<T>(attention_block<AttentionMaskBackward, T>(block), *static_cast<const Call*>(call)));
  });
}

const char* fastseq_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
