// The recurrent operators of any device: check, allocate, fill the parameter block, call the kernel, layer by layer.
// Device is CpuDevice or CudaDevice.
#pragma once

#include <ATen/Parallel.h>

#include "counters.h"
#include "rnn.h"
#include "stack.h"
#include "types.h"

namespace fastseq {

namespace rnn_operators {

// A plane of a state (L*D, B, size) where a layer's directions begin.
template <class T>
T* layer_state(T* base, const RnnStack& stack, int64_t layer, int64_t size) {
  return base ? base + layer * stack.directions * stack.batch * size : nullptr;
}

struct Inputs {
  at::Tensor x, hx, cx;                     // as rows, in the schedule's order; undefined when absent
  c10::SmallVector<at::Tensor, 8> weights;  // contiguous
  std::vector<at::Tensor> masks;            // (N, D*Hout)

  Inputs(const RnnStack& stack, const RnnArguments& a) {
    x = stack.to_rows(a.x);
    if (a.hx) hx = stack.to_order(*a.hx);
    if (a.cx) cx = stack.to_order(*a.cx);
    for (const at::Tensor& w : a.weights) weights.push_back(w.contiguous());
    for (const at::Tensor& mask : a.dropout_masks)
      masks.push_back(stack.to_rows(mask).view({stack.total_rows(), stack.directions * stack.out_size}));
  }
};

template <class T>
void fill_layer(RnnLayer<T>& p, const RnnStack& stack, const Inputs& in, int64_t layer, const at::Tensor& layer_input) {
  p.schedule = stack.schedule();
  p.input_size = stack.layer_input_size(layer);
  p.hidden_size = stack.hidden_size;
  p.proj_size = stack.projected ? stack.out_size : 0;
  p.directions = static_cast<int>(stack.directions);
  p.x = pointer<T>(layer_input);
  p.h0 = layer_state(pointer<T>(in.hx), stack, layer, stack.out_size);
  p.c0 = layer_state(pointer<T>(in.cx), stack, layer, stack.hidden_size);
  p.threads = at::get_num_threads();
  auto next = in.weights.begin() + layer * stack.directions * stack.weights_per_direction();
  for (int64_t d = 0; d < stack.directions; ++d) {
    DirectionWeights<T>& w = p.weights[d];
    w.w_ih = pointer<T>(*next++);
    w.w_hh = pointer<T>(*next++);
    if (stack.bias) {
      w.b_ih = pointer<T>(*next++);
      w.b_hh = pointer<T>(*next++);
    }
    if (stack.projected) w.w_hr = pointer<T>(*next++);
  }
}

// Parameter blocks of layers that are given to a kernel together, and what they point to.
template <class Block>
class LayersAtOnce {
 public:
  // The tensor is held until clear().
  Block& add(const at::Tensor& read) {
    held_.push_back(read);
    blocks_.emplace_back();
    return blocks_.back();
  }
  void expect(int64_t layers) { expected_ = layers; }
  int64_t size() const { return static_cast<int64_t>(blocks_.size()); }
  bool complete() const { return size() == expected_; }
  at::ArrayRef<Block> layers() const { return blocks_; }
  void clear() {
    blocks_.clear();
    held_.clear();
    expected_ = 1;
  }

 private:
  c10::SmallVector<Block, 1> blocks_;
  c10::SmallVector<at::Tensor, 1> held_;
  int64_t expected_ = 1;
};

template <class T, class Device>
RnnOutputs forward(const Device& device, const RnnArguments& a, const RnnStack& stack, bool save,
                   const Prepacked* prepacked) {
  const Inputs in(stack, a);
  const int64_t N = stack.total_rows(), L = stack.layers, D = stack.directions;
  at::Tensor reserve, h_n, c_n;
  // Sized for padded rows, of which a ragged batch fills a part: the rest is zero, so that equal calls give equal
  // outputs.
  if (save)
    reserve = stack.rows.defined() ? at::zeros({stack.reserve_numel()}, a.x.options())
                                   : device.empty({stack.reserve_numel()}, a.x);
  if (!stack.single_step) h_n = device.empty(stack.state_sizes(stack.out_size), a.x);
  if (stack.facts.cell_state) c_n = device.empty(stack.state_sizes(stack.hidden_size), a.x);

  const at::DimVector sizes = stack.output_sizes(a.x);
  at::Tensor layer_input = in.x, layer_output;
  LayersAtOnce<RnnForward<T>> group;
  for (int64_t layer = 0; layer < L; ++layer) {
    RnnForward<T>& p = group.add(layer_input);
    fill_layer(p, stack, in, layer, layer_input);
    if (group.size() == 1 && in.masks.empty()) group.expect(device.rnn_layers_at_once(stack.cell, p, L - layer, false));
    const bool masked = layer < static_cast<int64_t>(in.masks.size());
    if (save) {
      const RnnStack::LayerReserve at = stack.layer_reserve(layer);
      if (layer < L - 1)
        layer_output = reserve.narrow(0, at.output, N * D * stack.out_size).view({N, D * stack.out_size});
      T* base = mutable_pointer<T>(reserve);
      for (int64_t d = 0; d < D; ++d) {
        p.kept[d] = base + at.kept[d];
        if (stack.projected) p.emitted[d] = base + at.emitted[d];
      }
    }
    if (!save || layer == L - 1) {
      if (masked || stack.rows.defined()) {
        layer_output = device.empty({N, D * stack.out_size}, a.x);
      } else {
        layer_output = device.empty(sizes, a.x);
      }
    }
    for (int64_t d = 0; prepacked && d < D; ++d) p.packed[d] = static_cast<const T*>(prepacked->direction(layer, d));
    p.output = mutable_pointer<T>(layer_output);
    if (!stack.single_step) p.h_n = layer_state(mutable_pointer<T>(h_n), stack, layer, stack.out_size);
    if (stack.facts.cell_state) p.c_n = layer_state(mutable_pointer<T>(c_n), stack, layer, stack.hidden_size);
    if (group.complete()) {
      device.rnn_forward(stack.cell, group.layers());
      group.clear();
    }
    layer_input = masked ? layer_output * in.masks[layer] : layer_output;
  }
  at::Tensor output = stack.from_rows(layer_output, sizes);
  if (stack.order.defined()) {
    h_n = stack.from_order(h_n);
    if (stack.facts.cell_state) c_n = stack.from_order(c_n);
  }
  return {std::move(output), std::move(h_n), std::move(c_n), std::move(reserve)};
}

template <class T, class Device>
std::vector<at::Tensor> backward(const Device& device, const RnnArguments& a, const RnnStack& stack,
                                 const OptionalTensor& d_output, const OptionalTensor& d_h_n,
                                 const OptionalTensor& d_c_n, const at::Tensor& output, const at::Tensor& reserve,
                                 const std::vector<bool>& needs) {
  const Inputs in(stack, a);
  const auto options = a.x.options();
  const int64_t N = stack.total_rows(), L = stack.layers, D = stack.directions;
  const int64_t per_layer = D * stack.weights_per_direction();
  const auto empty_if = [&](bool needed, at::IntArrayRef sizes) {
    return !needed ? at::Tensor() : N ? device.empty(sizes, a.x) : at::zeros(sizes, options);
  };
  const bool needs_x = needs[0], needs_h = needs[1], needs_c = needs[2];
  at::Tensor d_hx = empty_if(needs_h, stack.state_sizes(stack.out_size));
  at::Tensor d_cx = empty_if(needs_c, stack.state_sizes(stack.hidden_size));
  std::vector<at::Tensor> d_weights(in.weights.size());
  for (size_t i = 0; i < d_weights.size(); ++i) d_weights[i] = empty_if(needs[3 + i], in.weights[i].sizes());

  // The lowest layer that anybody asked about: nothing flows below it.
  int64_t lowest = 0;
  if (!needs_x && !needs_h && !needs_c) {
    int64_t first = 0;
    while (first < static_cast<int64_t>(d_weights.size()) && !d_weights[first].defined()) ++first;
    lowest = first / per_layer;
  }

  const at::Tensor d_h = d_h_n && !stack.single_step ? stack.to_order(*d_h_n) : at::Tensor();
  const at::Tensor d_c = d_c_n && stack.facts.cell_state ? stack.to_order(*d_c_n) : at::Tensor();
  const at::Tensor last_output = stack.to_rows(output);
  at::Tensor d_layer_output = d_output ? stack.to_rows(*d_output) : at::Tensor(), dx;
  LayersAtOnce<RnnBackward<T>> group;
  for (int64_t layer = L - 1; layer >= lowest; --layer) {
    const RnnStack::LayerReserve at = stack.layer_reserve(layer);
    const T* base = pointer<T>(reserve);
    at::Tensor layer_input = in.x;
    if (layer > 0) {
      layer_input = reserve.narrow(0, stack.layer_reserve(layer - 1).output, N * D * stack.out_size)
                        .view({N, D * stack.out_size});
      if (!in.masks.empty()) layer_input = layer_input * in.masks[layer - 1];
    }
    RnnBackward<T>& p = group.add(d_layer_output);
    fill_layer(p, stack, in, layer, layer_input);
    if (group.size() == 1 && in.masks.empty())
      group.expect(device.rnn_layers_at_once(stack.cell, p, layer - lowest + 1, true));
    p.output = layer == L - 1 ? pointer<T>(last_output) : base + at.output;
    for (int64_t d = 0; d < D; ++d) {
      p.kept[d] = base + at.kept[d];
      if (stack.projected) p.emitted[d] = base + at.emitted[d];
    }
    p.d_output = pointer<T>(d_layer_output);
    p.d_h_n = layer_state(pointer<T>(d_h), stack, layer, stack.out_size);
    p.d_c_n = layer_state(pointer<T>(d_c), stack, layer, stack.hidden_size);
    if (needs_h) p.d_h0 = layer_state(mutable_pointer<T>(d_hx), stack, layer, stack.out_size);
    if (needs_c) p.d_c0 = layer_state(mutable_pointer<T>(d_cx), stack, layer, stack.hidden_size);
    dx = empty_if(layer > lowest || needs_x, {N, p.input_size});
    p.dx = mutable_pointer<T>(dx);
    auto next = d_weights.begin() + layer * per_layer;
    const auto grad = [&] {
      at::Tensor& t = *next++;
      return mutable_pointer<T>(t);
    };
    for (int64_t d = 0; d < D; ++d) {
      DirectionGrads<T>& g = p.grads[d];
      g.w_ih = grad();
      g.w_hh = grad();
      if (stack.bias) {
        g.b_ih = grad();
        g.b_hh = grad();
      }
      if (stack.projected) g.w_hr = grad();
    }
    if (group.complete()) {
      device.rnn_backward(stack.cell, group.layers());
      group.clear();
    }
    if (layer > lowest) d_layer_output = in.masks.empty() ? dx : dx * in.masks[layer - 1];
  }

  std::vector<at::Tensor> out;
  if (needs_x) out.push_back(stack.from_rows(dx, a.x.sizes()));
  if (needs_h) out.push_back(stack.from_order(d_hx));
  if (needs_c) out.push_back(stack.from_order(d_cx));
  for (size_t i = 0; i < d_weights.size(); ++i)
    if (needs[3 + i]) out.push_back(d_weights[i]);
  return out;
}

inline void check_gradient(const char* name, const OptionalTensor& gradient, at::IntArrayRef sizes,
                           const at::Tensor& x) {
  if (!gradient) return;
  check_device(name, *gradient, x);
  TORCH_CHECK(gradient->sizes() == sizes && gradient->scalar_type() == x.scalar_type(), name, " must be ", sizes, " ",
              x.scalar_type(), "; got ", gradient->sizes(), " ", gradient->scalar_type());
}

// The checked arguments, with the tables of lengths= on the device.
template <class Device>
RnnStack stack_on(const Device& device, const RnnArguments& a) {
  RnnStack stack(a);
  for (at::Tensor* table : {&stack.rows, &stack.order, &stack.rank})
    if (table->defined()) *table = device.take(*table, "lengths");
  return stack;
}

template <class Device>
RnnOutputs run_forward(const Device& device, const RnnArguments& a, const RnnStack& stack, bool save,
                       const Prepacked* prepacked) {
  return with_type<Device>(a.x.scalar_type(), [&](auto zero) {
    count_call<decltype(zero)>(Counted::rnn_forward, stack.cell);
    return forward<decltype(zero)>(device, a, stack, save, prepacked);
  });
}

}  // namespace rnn_operators

template <class Device>
RnnOutputs rnn_forward(std::string cell, const at::Tensor& x, const OptionalTensor& hx, const OptionalTensor& cx,
                       at::TensorList weights, at::TensorList dropout_masks, const OptionalTensor& lengths,
                       const OptionalTensor& batch_sizes, int64_t num_layers, bool bidirectional, bool bias,
                       bool save) {
  const Device device(x);
  const RnnArguments a{cell, x, hx, cx, weights, dropout_masks, lengths, batch_sizes, num_layers, bidirectional, bias};
  RnnOutputs out = rnn_operators::run_forward(device, a, rnn_operators::stack_on(device, a), save, nullptr);
  auto& [output, h_n, c_n, reserve] = out;
  for (at::Tensor* absent : {&h_n, &c_n, &reserve})
    if (!absent->defined()) *absent = device.empty({0}, x);
  return out;
}

template <class Device>
std::vector<at::Tensor> rnn_backward(
    const OptionalTensor& d_output, const OptionalTensor& d_h_n, const OptionalTensor& d_c_n, std::string cell,
    const at::Tensor& x, const OptionalTensor& hx, const OptionalTensor& cx, at::TensorList weights,
    at::TensorList dropout_masks, const OptionalTensor& lengths, const OptionalTensor& batch_sizes, int64_t num_layers,
    bool bidirectional, bool bias, const at::Tensor& output, const at::Tensor& reserve, c10::List<bool> needs_list) {
  const Device device(x);
  const RnnArguments a{cell, x, hx, cx, weights, dropout_masks, lengths, batch_sizes, num_layers, bidirectional, bias};
  const RnnStack stack = rnn_operators::stack_on(device, a);
  const std::vector<bool> needs(needs_list.begin(), needs_list.end());
  TORCH_CHECK(needs.size() == 3 + weights.size(), "needs must hold a flag for x, hx, cx and each weight, ",
              3 + weights.size(), "; got ", needs.size());
  TORCH_CHECK(!(needs[1] && !hx) && !(needs[2] && !cx), "needs asks for the gradient of a state that was not given");
  check_device("reserve", reserve, x);
  check_device("output", output, x);
  TORCH_CHECK(
      reserve.is_contiguous() && reserve.numel() == stack.reserve_numel() && reserve.scalar_type() == x.scalar_type(),
      "reserve must be what rnn_forward returned for these arguments with save=True, ", stack.reserve_numel(),
      " numbers; got ", reserve.numel());
  TORCH_CHECK(output.sizes() == stack.output_sizes(x) && output.scalar_type() == x.scalar_type(),
              "output must be what rnn_forward returned for these arguments, ", stack.output_sizes(x), " ",
              x.scalar_type(), "; got ", output.sizes(), " ", output.scalar_type());
  using rnn_operators::check_gradient;
  check_gradient("d_output", d_output, stack.output_sizes(x), x);
  if (!stack.single_step) check_gradient("d_h_n", d_h_n, stack.state_sizes(stack.out_size), x);
  if (stack.facts.cell_state) check_gradient("d_c_n", d_c_n, stack.state_sizes(stack.hidden_size), x);
  return with_type<Device>(x.scalar_type(), [&](auto zero) {
    count_call<decltype(zero)>(Counted::rnn_backward, stack.cell);
    return rnn_operators::backward<decltype(zero)>(device, a, stack, d_output, d_h_n, d_c_n, output, reserve, needs);
  });
}

}  // namespace fastseq
