// A call's workspace in parts. The same function lays it out twice: with no memory to learn its size, then for real.
#pragma once

#include <cstdint>

#include "launch.h"

namespace fastseq::cuda {

class Workspace {
 public:
  explicit Workspace(void* begin) : begin_(static_cast<char*>(begin)) {}

  template <class T>
  T* take(int64_t numbers) {
    constexpr int64_t kAligned = 256;
    char* const at = begin_ ? begin_ + bytes_ : nullptr;
    bytes_ += (numbers * static_cast<int64_t>(sizeof(T)) + kAligned - 1) / kAligned * kAligned;
    return reinterpret_cast<T*>(at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* begin_;
  int64_t bytes_ = 0;
};

}  // namespace fastseq::cuda

// In a function that returns cudaError_t: goes on if nothing failed.
#define FASTSEQ_TRY(call)                                               \
  do {                                                                  \
    if (const cudaError_t fastseq_error = (call)) return fastseq_error; \
  } while (false)
