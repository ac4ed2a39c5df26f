// The attention operators of any device: check, allocate, fill the parameter block, call the kernel. Device is
// CpuDevice or CudaDevice.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "../attention_params.h"
#include "attention.h"
#include "types.h"

namespace fastseq {

namespace attention_operators {

inline void check_sizes(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t most_size) {
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
  check_kernel_type(query);
  TORCH_CHECK(key.size(0) == query.size(0) && key.size(3) == query.size(3),
              "key must be (B, N_kv, S, D) with B and D of ", "the query ", query.sizes(), "; got ", key.sizes());
  TORCH_CHECK(value.size(0) == key.size(0) && value.size(1) == key.size(1) && value.size(2) == key.size(2),
              "value must be (B, N_kv, S, Dv) with B, N_kv and S of the key ", key.sizes(), "; got ", value.sizes());
  const int64_t heads = query.size(1), kv_heads = key.size(1);
  TORCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0,
              "the query's heads must be a multiple of those of key and value; got ", heads, " and ", kv_heads);
  TORCH_CHECK(query.size(3) >= 1 && query.size(3) <= most_size && value.size(3) >= 1 && value.size(3) <= most_size,
              "head sizes must be within 1..", most_size, "; got ", query.size(3), " of query and key, ", value.size(3),
              " of value");
}

inline void check_mask(const at::Tensor& mask, const at::Tensor& query, int64_t keys) {
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
inline at::Tensor with_whole_rows(const at::Tensor& t) {
  return t.stride(3) == 1 || t.size(3) <= 1 ? t : t.contiguous();
}

// A single batch entry is no distance from the next: of ragged batches all lie in it.
inline int64_t batch_stride(const at::Tensor& t) { return t.size(0) == 1 ? 0 : t.stride(0); }

template <class T>
Heads<const T> heads_of(const at::Tensor& t) {
  return {pointer<T>(t), batch_stride(t), t.stride(1), t.stride(2)};
}
template <class T>
Heads<T> mutable_heads_of(const at::Tensor& t) {
  return {mutable_pointer<T>(t), batch_stride(t), t.stride(1), t.stride(2)};
}

// In like's order of dimensions, (B, N, L, size) or, where the heads of a row lie side by side, (B, L, N, size).
template <class Device>
at::Tensor empty_heads(const Device& device, const at::Tensor& like, int64_t size) {
  const int64_t B = like.size(0), N = like.size(1), L = like.size(2);
  if (N > 1 && L > 1 && like.stride(1) < like.stride(2)) return device.empty({B, L, N, size}, like).transpose(1, 2);
  return device.empty({B, N, L, size}, like);
}

// Starts or lengths as int64. Of those on the CPU the values are checked; to read others would be to wait for them.
inline at::Tensor checked_rows(const char* name, const at::Tensor& t, const at::Tensor& query, int64_t count,
                               int64_t rows, bool starts) {
  TORCH_CHECK((t.device().is_cpu() || t.device() == query.device()) &&
                  (t.scalar_type() == at::kInt || t.scalar_type() == at::kLong),
              name, " must be int32 or int64 on the CPU", query.is_cuda() ? " or on query's device" : "", "; got ",
              t.scalar_type(), " on ", t.device());
  TORCH_CHECK(t.dim() == 1 && (starts ? t.size(0) >= 1 : t.size(0) == count), name, " must be ",
              starts ? "(B + 1)" : "(B) = (" + std::to_string(count) + ")", "; got ", t.sizes());
  const at::Tensor numbers = t.to(at::kLong).contiguous();
  if (!numbers.device().is_cpu()) return numbers;
  const int64_t* const n = numbers.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < numbers.size(0); ++b) {
    TORCH_CHECK(n[b] >= 0 && n[b] <= rows, name, " must be within 0..", rows, ", the rows that are there; got ", n[b],
                " at ", b);
    TORCH_CHECK(
        !starts || n[b] >= (b == 0 ? 0 : n[b - 1]), name, " must not decrease; got ", n[b - 1], " and then ", n[b]);
  }
  TORCH_CHECK(!starts || n[0] == 0, name, " must begin with 0; got ", n[0]);
  return numbers;
}

// The tensors that the parameter block points into, and what is only known of their values.
struct Inputs {
  at::Tensor query, key, value, mask, slopes, query_rows, key_rows;
  int64_t batch, queries, keys;
  bool starts, ragged;

  template <class Device>
  Inputs(const Device& device, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
         const AttentionOptions& options, at::ScalarType computed)
      : query(with_whole_rows(q)),
        key(with_whole_rows(k)),
        value(with_whole_rows(v)),
        batch(q.size(0)),
        queries(q.size(2)),
        keys(k.size(2)),
        starts(options.query_starts || options.key_starts),
        ragged(starts || options.query_lengths || options.key_lengths) {
    check_sizes(q, k, v, Device::kMostHeadSize);
    const int64_t heads = q.size(1);
    if (starts) {
      TORCH_CHECK(options.query_starts && options.key_starts && !options.query_lengths && !options.key_lengths,
                  "query_starts and key_starts must be given together, and without lengths");
      TORCH_CHECK(batch == 1, "where starts are given, query, key and value must be of one batch entry, which holds ",
                  "all rows; got ", batch);
      TORCH_CHECK(!options.attn_mask, "attn_mask must be None where starts are given");
      query_rows = checked_rows("query_starts", *options.query_starts, q, 0, queries, true);
      key_rows = checked_rows("key_starts", *options.key_starts, q, 0, keys, true);
      TORCH_CHECK(
          query_rows.size(0) == key_rows.size(0), "query_starts and key_starts must be of as many numbers; got ",
          query_rows.size(0), " and ", key_rows.size(0));
      batch = query_rows.size(0) - 1;
      queries = most(query_rows, queries), keys = most(key_rows, keys);
    }
    if (options.query_lengths)
      query_rows = checked_rows("query_lengths", *options.query_lengths, q, batch, queries, false);
    if (options.key_lengths) key_rows = checked_rows("key_lengths", *options.key_lengths, q, batch, keys, false);
    if (query_rows.defined()) query_rows = device.take(query_rows, starts ? "query_starts" : "query_lengths");
    if (key_rows.defined()) key_rows = device.take(key_rows, starts ? "key_starts" : "key_lengths");
    if (options.attn_mask) {
      check_mask(*options.attn_mask, q, keys);
      mask = options.attn_mask->expand({batch, heads, queries, keys});
    }
    if (options.alibi_slopes) {
      const at::Tensor& given = *options.alibi_slopes;
      TORCH_CHECK(given.is_floating_point() && given.device() == q.device(),
                  "alibi_slopes must be of floating-point numbers on query's device; got ", given.scalar_type(), " on ",
                  given.device());
      TORCH_CHECK((given.dim() == 1 || (given.dim() == 2 && given.size(0) == batch)) && given.size(-1) == heads,
                  "alibi_slopes must be (N) or (B, N) = (", batch, ", ", heads, "); got ", given.sizes());
      slopes = given.to(computed).expand({batch, heads});
    }
  }

  // The tensor's rows that no entry has are zero.
  at::Tensor zero_if_ragged(at::Tensor t) const { return ragged ? t.zero_() : t; }

 private:
  // The rows of the longest entry; all where the starts are not on the CPU.
  static int64_t most(const at::Tensor& starts, int64_t all) {
    if (!starts.device().is_cpu()) return all;
    return starts.size(0) > 1 ? starts.diff().max().item<int64_t>() : 0;
  }
};

template <class Device, class T, class A>
void fill(const Device& device, Attention<T, A>& p, const Inputs& in, const AttentionOptions& options) {
  p.batch = in.batch, p.heads = in.query.size(1), p.kv_heads = in.key.size(1);
  p.queries = in.queries, p.keys = in.keys;
  p.size = in.query.size(3), p.value_size = in.value.size(3);
  p.q = heads_of<T>(in.query), p.k = heads_of<T>(in.key), p.v = heads_of<T>(in.value);
  (in.starts ? p.ragged_queries.starts : p.ragged_queries.lengths) = pointer<int64_t>(in.query_rows);
  (in.starts ? p.ragged_keys.starts : p.ragged_keys.lengths) = pointer<int64_t>(in.key_rows);
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
  if (options.low) p.band.low = within(*options.low);
  if (options.high) p.band.high = within(*options.high);
  p.from_end = options.from_end;
  if (in.slopes.defined()) {
    p.slopes = pointer<A>(in.slopes), p.slopes_batch = in.slopes.stride(0), p.slopes_head = in.slopes.stride(1);
  }
  p.scale = options.scale;
  TORCH_CHECK(options.softcap >= 0, "softcap must not be negative; got ", options.softcap);
  p.softcap = options.softcap;
  TORCH_CHECK(
      options.dropout_p >= 0 && options.dropout_p <= 1, "dropout_p must be within [0, 1]; got ", options.dropout_p);
  if (options.dropout_p > 0) {
    const OptionalTensor& seed = options.dropout_seed;
    TORCH_CHECK(seed && seed->numel() == 1 && seed->scalar_type() == at::kLong && seed->device().is_cpu(),
                "dropout_seed must be one int64 number on the CPU where dropout_p > 0");
    device.check_runs_once("dropout");
    // In steps of 2^-16, and all only for 1.
    const double most = options.dropout_p < 1 ? 65535 : 65536;
    p.dropout.threshold = static_cast<uint32_t>(std::min(most, std::nearbyint(options.dropout_p * 65536)));
    p.dropout.seed = static_cast<uint64_t>(seed->item<int64_t>());
  }
  p.threads = at::get_num_threads();
}

template <class A>
RowNumbers<const A> numbers_of(const at::Tensor& t) {
  return {pointer<A>(t), batch_stride(t), t.stride(1)};
}

// The second, lse, is none where it is not wanted.
template <class Device>
AttentionOutputs forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const AttentionOptions& options, bool wants_lse) {
  const Device device(query);
  return with_type<Device>(query.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Computed<T>;
    constexpr at::ScalarType computed = c10::CppTypeToScalarType<A>::value;
    const Inputs in(device, query, key, value, options, computed);
    AttentionForward<T, A> p;
    fill(device, p, in, options);
    at::Tensor out = in.zero_if_ragged(empty_heads(device, query, value.size(3))), lse;
    p.out = mutable_heads_of<T>(out);
    if (wants_lse) {
      lse = at::empty({query.size(0), query.size(1), query.size(2)}, query.options().dtype(computed));
      if (in.ragged) lse.fill_(-std::numeric_limits<double>::infinity());
      p.lse = {mutable_pointer<A>(lse), batch_stride(lse), lse.stride(1)};
    }
    count_call<T>(Counted::attention_forward);
    device.template attention_forward<T>(p);
    return AttentionOutputs(out, lse);
  });
}

}  // namespace attention_operators

template <class Device>
AttentionOutputs attention_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& dropout_seed, const OptionalTensor& query_starts,
    const OptionalTensor& key_starts, const OptionalTensor& query_lengths, const OptionalTensor& key_lengths,
    double scale, double softcap, double dropout_p, std::optional<int64_t> low, std::optional<int64_t> high,
    bool from_end) {
  const AttentionOptions options{
      attn_mask, alibi_slopes, dropout_seed, query_starts, key_starts, query_lengths, key_lengths,
      scale,     softcap,      dropout_p,    low,          high,       from_end};
  return attention_operators::forward<Device>(query, key, value, options, true);
}

template <class Device>
std::vector<at::Tensor> attention_backward(
    const OptionalTensor& d_out, const OptionalTensor& d_lse, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
    const OptionalTensor& dropout_seed, const OptionalTensor& query_starts, const OptionalTensor& key_starts,
    const OptionalTensor& query_lengths, const OptionalTensor& key_lengths, double scale, double softcap,
    double dropout_p, std::optional<int64_t> low, std::optional<int64_t> high, bool from_end, const at::Tensor& out,
    const at::Tensor& lse, c10::List<bool> needs) {
  TORCH_CHECK(needs.size() == 4, "needs must hold a flag for query, key, value and attn_mask, 4; got ", needs.size());
  const AttentionOptions options{
      attn_mask, alibi_slopes, dropout_seed, query_starts, key_starts, query_lengths, key_lengths,
      scale,     softcap,      dropout_p,    low,          high,       from_end};
  const auto check_output = [&](const char* name, const at::Tensor& t, at::IntArrayRef sizes, at::ScalarType type) {
    check_device(name, t, query);
    TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == type, name, " must be ", sizes, " ", type, "; got ", t.sizes(),
                " ", t.scalar_type());
  };
  using namespace attention_operators;
  const Device device(query);
  return with_type<Device>(query.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Computed<T>;
    constexpr at::ScalarType sums = c10::CppTypeToScalarType<A>::value;
    const Inputs in(device, query, key, value, options, sums);
    const int64_t B = query.size(0), N = query.size(1), L = query.size(2);
    check_output("out", out, {B, N, L, value.size(3)}, query.scalar_type());
    check_output("lse", lse, {B, N, L}, sums);
    if (d_out) check_output("d_out", *d_out, out.sizes(), query.scalar_type());
    if (d_lse) check_output("d_lse", *d_lse, lse.sizes(), sums);

    AttentionMaskBackward<T, A> p;
    fill(device, p, in, options);
    const at::Tensor out_rows = with_whole_rows(out), lse_rows = lse.contiguous();
    const at::Tensor d_out_rows = d_out ? with_whole_rows(*d_out) : at::zeros_like(out_rows);
    const at::Tensor d_lse_rows = d_lse ? d_lse->contiguous() : at::Tensor();
    p.out = heads_of<T>(out_rows), p.d_out = heads_of<T>(d_out_rows);
    p.lse = numbers_of<A>(lse_rows);
    if (d_lse) p.d_lse = numbers_of<A>(d_lse_rows);

    std::vector<at::Tensor> found;
    if (needs[0] || needs[1] || needs[2]) {
      const at::Tensor dq = in.zero_if_ragged(empty_heads(device, query, query.size(3)));
      const at::Tensor dk = in.zero_if_ragged(empty_heads(device, key, key.size(3)));
      const at::Tensor dv = in.zero_if_ragged(empty_heads(device, value, value.size(3)));
      p.dq = mutable_heads_of<T>(dq), p.dk = mutable_heads_of<T>(dk), p.dv = mutable_heads_of<T>(dv);
      count_call<T>(Counted::attention_backward);
      device.template attention_backward<T>(p);
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
      if (d_mask.numel()) device.template attention_mask_backward<T>(p);
      found.push_back(d_mask.to(query.scalar_type()));
    }
    return found;
  });
}

}  // namespace fastseq
