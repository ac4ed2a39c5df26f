// The arguments of the recurrent operators, checked and turned into what the kernels take.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/DimVector.h>

#include <optional>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "counters.h"
#include "prepacked.h"

namespace fastseq {

using OptionalTensor = std::optional<at::Tensor>;

struct RnnArguments {
  const std::string& cell;
  const at::Tensor& x;
  const OptionalTensor& hx;
  const OptionalTensor& cx;
  at::TensorList weights;
  at::TensorList dropout_masks;
  const OptionalTensor& lengths;
  const OptionalTensor& batch_sizes;
  int64_t num_layers;
  bool bidirectional, bias;
};

// A stack of layers: sizes, the schedule of the batch, where each tensor of the flat lists is.
class FASTSEQ_API RnnStack {
 public:
  explicit RnnStack(const RnnArguments& arguments);  // throws c10::Error: expected, got

  CellKind cell;
  CellFacts facts;
  bool single_step;  // x is (B, I): one step of one layer
  bool projected, bias;
  int64_t layers, directions;
  int64_t steps, batch, input_size, hidden_size, out_size;
  int64_t padded_rows;                        // T*B, or the rows of a packed batch
  std::vector<int64_t> batch_sizes, offsets;  // empty when dense
  // The next three are made on the CPU, and have to be on the device of the input where they are used.
  at::Tensor rows;   // lengths=: packed row -> padded row t*B + b; undefined otherwise
  at::Tensor order;  // lengths=: rows of the batch, longest first; undefined otherwise
  at::Tensor rank;   // its inverse

  Schedule schedule() const;
  int64_t total_rows() const { return schedule().total_rows(); }
  int64_t weights_per_direction() const { return 2 + (bias ? 2 : 0) + (projected ? 1 : 0); }
  int64_t layer_input_size(int64_t layer) const { return layer == 0 ? input_size : directions * out_size; }

  at::DimVector output_sizes(const at::Tensor& x) const;
  at::DimVector state_sizes(int64_t state_size) const;  // of hx, cx

  // The reserve: for each layer a direction's kept planes (N, kept*H) and, with a projection, its emitted h (N, H),
  // then, for all but the last, which the caller has, its output (N, D*Hout). Sized for the padded rows.
  int64_t reserve_numel() const;
  struct LayerReserve {
    int64_t kept[2], emitted[2], output;  // offsets
  };
  LayerReserve layer_reserve(int64_t layer) const;

  // x, an output or a gradient of one as contiguous rows, N times its last size, and back. What is dense is left in its
  // own sizes, as a call of one step would feel the cost of a view.
  at::Tensor to_rows(const at::Tensor& padded) const;
  at::Tensor from_rows(const at::Tensor& rows_of_all_steps, at::IntArrayRef sizes) const;
  // A state (L*D, B, size) in the schedule's row order, and back.
  at::Tensor to_order(const at::Tensor& state) const;
  at::Tensor from_order(const at::Tensor& state) const;

 private:
  void check_weights(const RnnArguments& a) const;
  void check_states(const RnnArguments& a) const;
  void take_batch_sizes(const at::Tensor& sizes, const at::Tensor& x);
  void take_lengths(const at::Tensor& lengths);
  void make_offsets();
};

// Checked arguments to the outputs, with nothing about autograd: output, h_n, c_n, reserve. Undefined: h_n of a single
// step, where it would equal the output; c_n of a cell without; the reserve if it was not to be saved. `prepacked`: of
// these very weights, or null.
FASTSEQ_API std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> run_forward(
    const RnnArguments& arguments, const RnnStack& stack, bool save, const Prepacked* prepacked = nullptr);

// Each direction's weights, layer by layer, as RnnForward::packed has them.
std::vector<at::Tensor> pack_weights(const RnnArguments& arguments, const RnnStack& stack);

}  // namespace fastseq
