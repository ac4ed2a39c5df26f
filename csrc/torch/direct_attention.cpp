// The direct call of attention: what fastseq.scaled_dot_product_attention does of a plain call without extras.
#include "attention.h"
#include "direct_call.h"
#include "plain_call.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <cmath>

namespace fastseq {

namespace {

// A new reference to None where the call is not plain.
PyObject* call_attention(PyObject* const* args) {
  PlainTensors plain;
  const at::Tensor *query = plain(args[0]), *key = plain(args[1]), *value = plain(args[2]);
  if (!query || !key || !value || !plain_thread()) Py_RETURN_NONE;
  OptionalTensor mask;
  if (args[3] != Py_None) {
    const at::Tensor* given = plain.or_bool(args[3]);
    if (!given) Py_RETURN_NONE;
    mask = *given;
  }
  const bool causal = args[5] == Py_True, grouped = args[6] == Py_True;
  if ((!causal && args[5] != Py_False) || (!grouped && args[6] != Py_False) || (causal && mask)) Py_RETURN_NONE;
  if (query->dim() != 4 || key->dim() != 4 || value->dim() != 4 || query->size(3) == 0) Py_RETURN_NONE;
  if (!grouped && (query->size(1) != key->size(1) || key->size(1) != value->size(1))) Py_RETURN_NONE;
  if (args[4] != Py_None && !PyFloat_CheckExact(args[4])) Py_RETURN_NONE;
  const double scale =
      args[4] == Py_None ? 1 / std::sqrt(static_cast<double>(query->size(3))) : PyFloat_AS_DOUBLE(args[4]);
  const std::optional<int64_t> high = causal ? std::optional<int64_t>(0) : std::nullopt;
  at::Tensor out;
  try {
    const Unlocked unlocked;
    if (plain.recorded()) {
      out = std::get<0>(
          attention_forward_autograd(*query, *key, *value, mask, {}, {}, {}, {}, {}, {}, scale, 0, 0, {}, high, false));
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      out = attention_output_cpu(
          *query, *key, *value, {mask, {}, {}, {}, {}, {}, {}, scale, 0, 0, std::nullopt, high, false});
    }
  } catch (const std::exception&) {  // the operator will say it, in the usual way
    Py_RETURN_NONE;
  }
  ++direct_call_count;
  return wrap(out).release().ptr();
}

}  // namespace

PyObject* direct_attention(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 7, "direct_attention takes query, key, value, attn_mask, scale, is_causal and enable_gqa");
  return call_attention(args);
  END_HANDLE_TH_ERRORS
}

}  // namespace fastseq
