#include "prepacked.h"

#include "rnn.h"
#include "stack.h"

namespace fastseq {

Prepacked::Prepacked(const RnnArguments& a) {
  const RnnStack stack(a);
  cell_ = a.cell;
  layers_ = stack.layers, directions_ = stack.directions;
  for (const at::Tensor& w : a.weights) {
    TORCH_CHECK(w.device().is_cpu(), "prepack takes weights on the CPU; got one on ", w.device());
    TORCH_CHECK(!w.is_inference(), "prepack takes weights whose changes can be seen: those created under ",
                "torch.inference_mode() have no version counter. Create them outside of it");
    weights_.push_back({w.storage(), w.storage_offset(), w.scalar_type(), at::DimVector(w.sizes()),
                        at::DimVector(w.strides()), w._version()});
  }
  packed_ = pack_weights(a, stack);
}

std::optional<Prepacked::Change> Prepacked::change(const RnnArguments& a) const {
  if (a.cell != cell_ || a.num_layers != layers_ || (a.bidirectional ? 2 : 1) != directions_ ||
      a.weights.size() != weights_.size())
    return Change{-1, "the layer is not the one that it was"};
  for (size_t i = 0; i < weights_.size(); ++i) {
    const at::Tensor& now = a.weights[i];
    const Packed& then = weights_[i];
    if (now.storage().unsafeGetStorageImpl() != then.storage.unsafeGetStorageImpl() ||
        now.storage_offset() != then.offset || now.scalar_type() != then.type ||
        now.sizes() != at::IntArrayRef(then.sizes) || now.strides() != at::IntArrayRef(then.strides))
      return Change{static_cast<int64_t>(i), "is another tensor"};
    if (now._version() != then.version) return Change{static_cast<int64_t>(i), "has been written to"};
  }
  return std::nullopt;
}

}  // namespace fastseq
