// Autograd of rnn_forward, in C++ since a Python callback costs more than a small step does. rnn_backward is an
// operator of its own; its derivative (double backward) is registered in fastseq/ops.py by the reference.
#include "autograd.h"

#include "memory.h"
#include "rnn.h"

namespace fastseq {

namespace {

RnnOutputs redispatch(const std::string& cell, const at::Tensor& x, const OptionalTensor& hx, const OptionalTensor& cx,
                      at::TensorList weights, at::TensorList masks, const OptionalTensor& lengths,
                      const OptionalTensor& batch_sizes, int64_t num_layers, bool bidirectional, bool bias, bool save) {
  static const auto op = find_operator<RnnForwardSignature>("fastseq::rnn_forward");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(cell, x, hx, cx, weights, masks, lengths, batch_sizes, num_layers, bidirectional, bias, save);
}

struct RnnFunction : torch::autograd::Function<RnnFunction> {
  static constexpr bool is_traceable = true;  // compiled autograd may trace through

  static variable_list forward(AutogradContext* ctx, const std::string& cell, const at::Tensor& x,
                               const OptionalTensor& hx, const OptionalTensor& cx, at::TensorList weights,
                               at::TensorList masks, const OptionalTensor& lengths, const OptionalTensor& batch_sizes,
                               int64_t num_layers, bool bidirectional, bool bias) {
    auto [output, h_n, c_n, reserve] =
        redispatch(cell, x, hx, cx, weights, masks, lengths, batch_sizes, num_layers, bidirectional, bias, true);
    variable_list saved = {x, hx.value_or(at::Tensor()), cx.value_or(at::Tensor()), lengths.value_or(at::Tensor()),
                           batch_sizes.value_or(at::Tensor()),
                           // The caller may edit his output in place.
                           copy_on_write(output), reserve};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), masks.begin(), masks.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["cell"] = cell;
    ctx->saved_data["num_layers"] = num_layers;
    ctx->saved_data["bidirectional"] = bidirectional;
    ctx->saved_data["bias"] = bias;
    ctx->saved_data["num_masks"] = static_cast<int64_t>(masks.size());
    ctx->set_materialize_grads(false);
    variable_list constants = {reserve};
    if (h_n.dim() == 1) constants.push_back(h_n);  // empty: the output of a single step is its h_n
    if (c_n.dim() == 1) constants.push_back(c_n);
    ctx->mark_non_differentiable(constants);
    return {output, h_n, c_n, reserve};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    for (const at::Tensor& grad : grads)
      if (grad.defined()) check_no_tangent(grad);
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &hx = saved[1], &cx = saved[2];
    const auto num_masks = static_cast<size_t>(ctx->saved_data["num_masks"].toInt());
    const variable_list weights(saved.begin() + 7, saved.end() - num_masks);
    const variable_list masks(saved.end() - num_masks, saved.end());

    // Edges count the tensors that were given, in the order of the arguments.
    size_t edge = 0;
    c10::List<bool> needs;
    needs.push_back(ctx->needs_input_grad(edge++));
    needs.push_back(hx.defined() && ctx->needs_input_grad(edge++));
    needs.push_back(cx.defined() && ctx->needs_input_grad(edge++));
    for (size_t i = 0; i < weights.size(); ++i) needs.push_back(ctx->needs_input_grad(edge++));

    // Without create_graph nobody differentiates the backward: its own autograd rule, in Python, is skipped.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    static const auto op = find_operator<RnnBackwardSignature>("fastseq::rnn_backward");
    const std::vector<at::Tensor> found = op.call(
        optional(grads[0]), optional(grads[1]), optional(grads[2]), ctx->saved_data["cell"].toStringRef(), x,
        optional(hx), optional(cx), weights, masks, optional(saved[3]), optional(saved[4]),
        ctx->saved_data["num_layers"].toInt(), ctx->saved_data["bidirectional"].toBool(),
        ctx->saved_data["bias"].toBool(), saved[5], saved[6], needs);

    // One place for each argument of forward, the lists spread out: cell, x, hx, cx, weights, masks, five more.
    auto next = found.begin();
    variable_list out = {at::Tensor()};
    for (bool needed : needs) out.push_back(needed ? *next++ : at::Tensor());
    out.resize(out.size() + masks.size() + 5);
    return out;
  }
};

}  // namespace

RnnOutputs rnn_forward_autograd(std::string cell, const at::Tensor& x, const OptionalTensor& hx,
                                const OptionalTensor& cx, at::TensorList weights, at::TensorList masks,
                                const OptionalTensor& lengths, const OptionalTensor& batch_sizes, int64_t num_layers,
                                bool bidirectional, bool bias, bool save) {
  check_no_tangent(x);
  if (hx) check_no_tangent(*hx);
  if (cx) check_no_tangent(*cx);
  for (const at::Tensor& w : weights) check_no_tangent(w);
  const auto tracked = [](const at::Tensor& t) { return t.requires_grad(); };
  const bool needs_grad = at::GradMode::is_enabled() && (tracked(x) || (hx && tracked(*hx)) || (cx && tracked(*cx)) ||
                                                         std::any_of(weights.begin(), weights.end(), tracked));
  if (!needs_grad)  // a traced graph, which does its own autograd, asks for the reserve here
    return redispatch(cell, x, hx, cx, weights, masks, lengths, batch_sizes, num_layers, bidirectional, bias, save);
  const variable_list out =
      RnnFunction::apply(cell, x, hx, cx, weights, masks, lengths, batch_sizes, num_layers, bidirectional, bias);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace fastseq
