// Autograd of attention_forward, as autograd.cpp has it for the recurrent layers.
#include "attention.h"
#include "autograd.h"

namespace fastseq {

namespace {

AttentionOutputs redispatch(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const OptionalTensor& attn_mask, double scale, std::optional<int64_t> low,
                            std::optional<int64_t> high) {
  static const auto op = find_operator<AttentionForwardSignature>("fastseq::attention_forward");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(query, key, value, attn_mask, scale, low, high);
}

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static constexpr bool is_traceable = true;  // compiled autograd may trace through

  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const OptionalTensor& attn_mask, double scale,
                               std::optional<int64_t> low, std::optional<int64_t> high) {
    auto [out, lse] = redispatch(query, key, value, attn_mask, scale, low, high);
    ctx->save_for_backward({query, key, value, attn_mask.value_or(at::Tensor()), out, lse});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["low"] = low;
    ctx->saved_data["high"] = high;
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    for (const at::Tensor& grad : grads)
      if (grad.defined()) check_no_tangent(grad);
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& mask = saved[3];
    c10::List<bool> needs;
    for (size_t edge = 0; edge < 3; ++edge) needs.push_back(ctx->needs_input_grad(edge));
    needs.push_back(mask.defined() && ctx->needs_input_grad(3));

    // Without create_graph nobody differentiates the backward: its own autograd rule, in Python, is skipped.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    static const auto op = find_operator<AttentionBackwardSignature>("fastseq::attention_backward");
    const std::vector<at::Tensor> found =
        op.call(optional(grads[0]), optional(grads[1]), saved[0], saved[1], saved[2], optional(mask),
                ctx->saved_data["scale"].toDouble(), ctx->saved_data["low"].toOptional<int64_t>(),
                ctx->saved_data["high"].toOptional<int64_t>(), saved[4], saved[5], needs);
    auto next = found.begin();
    variable_list out;
    for (bool needed : needs) out.push_back(needed ? *next++ : at::Tensor());
    out.resize(7);  // scale, low and high have none
    return out;
  }
};

}  // namespace

AttentionOutputs attention_forward_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                            const OptionalTensor& attn_mask, double scale, std::optional<int64_t> low,
                                            std::optional<int64_t> high) {
  bool needs_grad = false;
  for (const at::Tensor* t : {&query, &key, &value, attn_mask ? &*attn_mask : &value}) {
    check_no_tangent(*t);
    needs_grad = needs_grad || t->requires_grad();
  }
  if (!needs_grad || !at::GradMode::is_enabled()) return redispatch(query, key, value, attn_mask, scale, low, high);
  const variable_list out = AttentionFunction::apply(query, key, value, attn_mask, scale, low, high);
  return {out[0], out[1]};
}

}  // namespace fastseq
