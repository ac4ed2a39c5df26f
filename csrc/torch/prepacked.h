// The weights of a stack packed once, for calls without gradients (fastseq/rnn.py: prepack).
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "counters.h"

namespace fastseq {

struct RnnArguments;

class FASTSEQ_API Prepacked {
 public:
  // `arguments` have the weights and what says how to read them; no state and no lengths. Throws c10::Error for weights
  // whose changes could not be seen.
  explicit Prepacked(const RnnArguments& arguments);

  // What has changed since: a weight, by its place, or the way to read them; nothing as a rule.
  struct Change {
    int64_t weight;  // -1: not a weight
    const char* what;
  };
  std::optional<Change> change(const RnnArguments& arguments) const;

  // A direction's weights as RnnForward::packed has them.
  const void* direction(int64_t layer, int64_t direction) const {
    return packed_[layer * directions_ + direction].const_data_ptr();
  }

 private:
  struct Packed {         // what a weight was
    at::Storage storage;  // held, so that its address is nobody else's
    int64_t offset;
    at::ScalarType type;
    at::DimVector sizes, strides;
    int64_t version;
  };
  std::string cell_;
  int64_t layers_, directions_;
  std::vector<Packed> weights_;
  std::vector<at::Tensor> packed_;
};

}  // namespace fastseq
