// The attention operators on the CPU: check, allocate, fill the parameter block, call the kernel.
#include "attention.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "memory.h"
#include "types.h"

namespace fastseq {

namespace {

constexpr int64_t kMostSize = 512;

void check_sizes(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  const auto is_head = [&](const char* name, const at::Tensor& t, const char* letters) {
    TORCH_CHECK(t.dim() == 4, name, " must be ", letters, "; got ", t.sizes());
    TORCH_CHECK(t.scalar_type() == query.scalar_type(), name, " must be of query's dtype, ", query.scalar_type(),
                "; got ", t.scalar_type());
    TORCH_CHECK(
        t.device() == query.device(), name, " must be on query's device, ", query.device(), "; got ", t.device());
  };
  is_head("query", query, "(B, N, L, D)");
  is_head("key", key, "(B, N_kv, S, D)");
  is_head("value", value, "(B, N_kv, S, Dv)");
  check_kernel_type(query.scalar_type());
  TORCH_CHECK(key.size(0) == query.size(0) && key.size(3) == query.size(3),
              "key must be (B, N_kv, S, D) with B and D of ", "the query ", query.sizes(), "; got ", key.sizes());
  TORCH_CHECK(value.size(0) == key.size(0) && value.size(1) == key.size(1) && value.size(2) == key.size(2),
              "value must be (B, N_kv, S, Dv) with B, N_kv and S of the key ", key.sizes(), "; got ", value.sizes());
  const int64_t heads = query.size(1), kv_heads = key.size(1);
  TORCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0,
              "the query's heads must be a multiple of those of key and value; got ", heads, " and ", kv_heads);
  TORCH_CHECK(query.size(3) >= 1 && query.size(3) <= kMostSize && value.size(3) >= 1 && value.size(3) <= kMostSize,
              "head sizes must be within 1..", kMostSize, "; got ", query.size(3), " of query and key, ", value.size(3),
              " of value");
}

void check_mask(const at::Tensor& mask, const at::Tensor& query, int64_t keys) {
  TORCH_CHECK(mask.scalar_type() == at::kBool || mask.scalar_type() == query.scalar_type(),
              "attn_mask must be bool or of query's dtype, ", query.scalar_type(), "; got ", mask.scalar_type());
  TORCH_CHECK(mask.device() == query.device(), "attn_mask must be on query's device, ", query.device(), "; got ",
              mask.device());
  const int64_t sizes[] = {query.size(0), query.size(1), query.size(2), keys};
  bool fits = mask.dim() <= 4;
  for (int64_t d = 0; fits && d < mask.dim(); ++d) fits = mask.size(-1 - d) == 1 || mask.size(-1 - d) == sizes[3 - d];
  TORCH_CHECK(
      fits, "attn_mask must be broadcastable to (B, N, L, S) = ", at::IntArrayRef(sizes, 4), "; got ", mask.sizes());
}

// The numbers of a row side by side.
at::Tensor with_whole_rows(const at::Tensor& t) { return t.stride(3) == 1 || t.size(3) <= 1 ? t : t.contiguous(); }

template <class T>
Heads<const T> heads_of(const at::Tensor& t) {
  return {pointer<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}
template <class T>
Heads<T> mutable_heads_of(const at::Tensor& t) {
  return {mutable_pointer<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// In like's order of dimensions, (B, N, L, size) or, where the heads of a row lie side by side, (B, L, N, size).
at::Tensor empty_heads(const at::Tensor& like, int64_t size) {
  const int64_t B = like.size(0), N = like.size(1), L = like.size(2);
  if (N > 1 && L > 1 && like.stride(1) < like.stride(2)) return empty({B, L, N, size}, like).transpose(1, 2);
  return empty({B, N, L, size}, like);
}

struct Inputs {
  at::Tensor query, key, value, mask;

  Inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& m)
      : query(with_whole_rows(q)), key(with_whole_rows(k)), value(with_whole_rows(v)) {
    if (m) mask = m->expand({q.size(0), q.size(1), q.size(2), k.size(2)});
  }
};

template <class T>
void fill(Attention<T>& p, const Inputs& in, double scale, std::optional<int64_t> low, std::optional<int64_t> high) {
  p.batch = in.query.size(0), p.heads = in.query.size(1), p.kv_heads = in.key.size(1);
  p.queries = in.query.size(2), p.keys = in.key.size(2);
  p.size = in.query.size(3), p.value_size = in.value.size(3);
  p.q = heads_of<T>(in.query), p.k = heads_of<T>(in.key), p.v = heads_of<T>(in.value);
  if (in.mask.defined()) {
    if (in.mask.scalar_type() == at::kBool) {
      p.mask.visible = reinterpret_cast<const uint8_t*>(in.mask.const_data_ptr<bool>());
    } else {
      p.mask.bias = pointer<T>(in.mask);
    }
    p.mask.batch = in.mask.stride(0), p.mask.head = in.mask.stride(1);
    p.mask.row = in.mask.stride(2), p.mask.column = in.mask.stride(3);
  }
  const auto within = [](int64_t side) { return std::min(std::max(side, -Band::kOpen), Band::kOpen); };
  if (low) p.band.low = within(*low);
  if (high) p.band.high = within(*high);
  p.scale = scale;
  p.threads = at::get_num_threads();
}

}  // namespace

AttentionOutputs attention_forward_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                       const OptionalTensor& attn_mask, double scale, std::optional<int64_t> low,
                                       std::optional<int64_t> high) {
  check_sizes(query, key, value);
  if (attn_mask) check_mask(*attn_mask, query, key.size(2));
  one_thread_in_a_forked_child();
  return with_type(query.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = cpu::Computed<T>;
    AttentionForward<T, A> p;
    const Inputs in(query, key, value, attn_mask);
    fill(p, in, scale, low, high);
    at::Tensor out = empty_heads(query, value.size(3));
    at::Tensor lse =
        at::empty({p.batch, p.heads, p.queries}, query.options().dtype(c10::CppTypeToScalarType<A>::value));
    p.out = mutable_heads_of<T>(out);
    p.lse = mutable_pointer<A>(lse);
    count_call<T>(Counted::attention_forward);
    cpu::kernels().typed<T>().attention_forward(p);
    return AttentionOutputs(out, lse);
  });
}

std::vector<at::Tensor> attention_backward_cpu(
    const OptionalTensor& d_out, const OptionalTensor& d_lse, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const OptionalTensor& attn_mask, double scale, std::optional<int64_t> low,
    std::optional<int64_t> high, const at::Tensor& out, const at::Tensor& lse, c10::List<bool> needs) {
  check_sizes(query, key, value);
  if (attn_mask) check_mask(*attn_mask, query, key.size(2));
  TORCH_CHECK(needs.size() == 4, "needs must hold a flag for query, key, value and attn_mask, 4; got ", needs.size());
  const int64_t B = query.size(0), N = query.size(1), L = query.size(2);
  const auto check_output = [&](const char* name, const at::Tensor& t, at::IntArrayRef sizes, at::ScalarType type) {
    TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == type, name, " must be ", sizes, " ", type, "; got ", t.sizes(),
                " ", t.scalar_type());
  };
  one_thread_in_a_forked_child();
  return with_type(query.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = cpu::Computed<T>;
    constexpr at::ScalarType sums = c10::CppTypeToScalarType<A>::value;
    check_output("out", out, {B, N, L, value.size(3)}, query.scalar_type());
    check_output("lse", lse, {B, N, L}, sums);
    if (d_out) check_output("d_out", *d_out, out.sizes(), query.scalar_type());
    if (d_lse) check_output("d_lse", *d_lse, lse.sizes(), sums);

    AttentionMaskBackward<T, A> p;
    const Inputs in(query, key, value, attn_mask);
    fill(p, in, scale, low, high);
    const at::Tensor out_rows = with_whole_rows(out), lse_rows = lse.contiguous();
    const at::Tensor d_out_rows = d_out ? with_whole_rows(*d_out) : at::zeros_like(out_rows);
    const at::Tensor d_lse_rows = d_lse ? d_lse->contiguous() : at::Tensor();
    p.out = heads_of<T>(out_rows), p.d_out = heads_of<T>(d_out_rows);
    p.lse = pointer<A>(lse_rows), p.d_lse = pointer<A>(d_lse_rows);

    std::vector<at::Tensor> found;
    if (needs[0] || needs[1] || needs[2]) {
      const at::Tensor dq = empty_heads(query, query.size(3)), dk = empty_heads(key, key.size(3)),
                       dv = empty_heads(value, value.size(3));
      p.dq = mutable_heads_of<T>(dq), p.dk = mutable_heads_of<T>(dk), p.dv = mutable_heads_of<T>(dv);
      count_call<T>(Counted::attention_backward);
      cpu::kernels().typed<T>().attention_backward(p);
      if (needs[0]) found.push_back(dq);
      if (needs[1]) found.push_back(dk);
      if (needs[2]) found.push_back(dv);
    }
    if (needs[3]) {
      TORCH_CHECK(attn_mask && attn_mask->scalar_type() == query.scalar_type(),
                  "needs asks for the gradient of attn_mask, which is not an additive one");
      const auto size = [&](int64_t d) { return attn_mask->dim() >= d ? attn_mask->size(-d) : 1; };
      p.mask_batch = size(4), p.mask_heads = size(3), p.mask_rows = size(2), p.mask_columns = size(1);
      at::Tensor d_mask = at::empty(attn_mask->sizes(), query.options().dtype(sums));
      p.d_mask = mutable_pointer<A>(d_mask);
      count_call<T>(Counted::attention_mask_backward);
      if (d_mask.numel()) cpu::kernels().typed<T>().attention_mask_backward(p);
      found.push_back(d_mask.to(query.scalar_type()));
    }
    return found;
  });
}

}  // namespace fastseq
