// Autograd of attention_forward, as autograd.cpp has it for the recurrent layers.
#include "attention.h"
#include "autograd.h"

namespace fastseq {

namespace {

AttentionOutputs redispatch(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const AttentionOptions& o) {
  static const auto op = find_operator<AttentionForwardSignature>("fastseq::attention_forward");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(query, key, value, o.attn_mask, o.alibi_slopes, o.dropout_seed, o.query_starts, o.key_starts,
                 o.query_lengths, o.key_lengths, o.scale, o.softcap, o.dropout_p, o.low, o.high, o.from_end);
}

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static constexpr bool is_traceable = true;  // compiled autograd may trace through

  // attn_mask is among the options as well; autograd has to see it as an argument.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const OptionalTensor& attn_mask, const AttentionOptions& o) {
    auto [out, lse] = redispatch(query, key, value, o);
    const auto tensor = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    ctx->save_for_backward(
        {query, key, value, tensor(attn_mask), tensor(o.alibi_slopes), tensor(o.dropout_seed), tensor(o.query_starts),
         tensor(o.key_starts), tensor(o.query_lengths), tensor(o.key_lengths), out, lse});
    ctx->saved_data["scale"] = o.scale;
    ctx->saved_data["softcap"] = o.softcap;
    ctx->saved_data["dropout_p"] = o.dropout_p;
    ctx->saved_data["low"] = o.low;
    ctx->saved_data["high"] = o.high;
    ctx->saved_data["from_end"] = o.from_end;
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    for (const at::Tensor& grad : grads)
      if (grad.defined()) check_no_tangent(grad);
    const variable_list saved = ctx->get_saved_variables();
    c10::List<bool> needs;
    for (size_t edge = 0; edge < 3; ++edge) needs.push_back(ctx->needs_input_grad(edge));
    needs.push_back(saved[3].defined() && ctx->needs_input_grad(3));

    // Without create_graph nobody differentiates the backward: its own autograd rule, in Python, is skipped.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    static const auto op = find_operator<AttentionBackwardSignature>("fastseq::attention_backward");
    auto& data = ctx->saved_data;
    const std::vector<at::Tensor> found = op.call(
        optional(grads[0]), optional(grads[1]), saved[0], saved[1], saved[2], optional(saved[3]), optional(saved[4]),
        optional(saved[5]), optional(saved[6]), optional(saved[7]), optional(saved[8]), optional(saved[9]),
        data["scale"].toDouble(), data["softcap"].toDouble(), data["dropout_p"].toDouble(),
        data["low"].toOptional<int64_t>(), data["high"].toOptional<int64_t>(), data["from_end"].toBool(), saved[10],
        saved[11], needs);
    auto next = found.begin();
    variable_list out;
    for (bool needed : needs) out.push_back(needed ? *next++ : at::Tensor());
    out.emplace_back();  // the options have none
    return out;
  }
};

}  // namespace

AttentionOutputs attention_forward_autograd(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& dropout_seed, const OptionalTensor& query_starts,
    const OptionalTensor& key_starts, const OptionalTensor& query_lengths, const OptionalTensor& key_lengths,
    double scale, double softcap, double dropout_p, std::optional<int64_t> low, std::optional<int64_t> high,
    bool from_end) {
  const AttentionOptions options{
      attn_mask, alibi_slopes, dropout_seed, query_starts, key_starts, query_lengths, key_lengths,
      scale,     softcap,      dropout_p,    low,          high,       from_end};
  bool needs_grad = false;
  for (const at::Tensor* t : {&query, &key, &value, attn_mask ? &*attn_mask : &value}) {
    check_no_tangent(*t);
    needs_grad = needs_grad || t->requires_grad();
  }
  const bool recorded = at::GradMode::is_enabled();
  TORCH_CHECK_NOT_IMPLEMENTED(!(alibi_slopes && alibi_slopes->requires_grad() && recorded),
                              "alibi_slopes have no gradient: give them detached, or, to learn them, their bias as "
                              "attn_mask");
  if (!needs_grad || !recorded) return redispatch(query, key, value, options);
  const variable_list out = AttentionFunction::apply(query, key, value, attn_mask, options);
  return {out[0], out[1]};
}

}  // namespace fastseq
