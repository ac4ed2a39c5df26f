"""Scaled dot-product attention on the CPU's fused kernels, and the rules of its operators that are written in Python.

Letters: B batch, N heads of queries, N_kv of keys and values, L queries, S keys, D head size of queries and keys, Dv of
values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastseq import reference
from fastseq.ops import is_transformed

__all__ = ["scaled_dot_product_attention"]

_attention_forward = torch.ops.fastseq.attention_forward.default


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | tuple[int | None, int | None] | None = None,
    causal_alignment: Literal["top_left", "bottom_right"] = "top_left",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""softmax(scale · Q Kᵀ + mask) V in one kernel, scores never in memory: torch.nn.functional's function, and more.

    Vaswani et al., "Attention is all you need", 2017; computed as Dao et al., "FlashAttention", 2022. Memory beyond
    inputs and outputs is O(L + S), forward and backward. A row of the result is the same to the last bit whatever the
    batch is and however many threads run.

    Args:
        query: (..., N, L, D). key: (..., N, S, D). value: (..., N, S, Dv). Leading dimensions broadcast; of fewer than
            four dimensions those missing are 1.
        attn_mask: broadcastable to (..., N, L, S): bool, False where a query does not see a key; or of query's dtype,
            added to the scores, and differentiable.
        dropout_p: must be 0; dropout is not there yet.
        is_causal: query i sees key j where j ≤ i. Not with `attn_mask`, as in torch.
        scale: None means 1/√D.
        enable_gqa: key and value may have N_kv heads, N a multiple of it: query head n reads head n·N_kv/N.
        window: (left, right): query i sees keys from i - left to i + right, None: all on that side; an int w is
            (w, w), and with `is_causal` (w, 0). Attention within a window costs time in proportion to it.
        causal_alignment: what i stands for in `is_causal` and `window` where L ≠ S: "top_left", the i-th query beside
            the i-th key, as in torch; "bottom_right", the last query beside the last key, as in FlashAttention and when
            keys were cached.
        return_lse: return (out, lse) with lse (..., N, L) the log of the sum of the exponentials of each row's scores,
            float32 (float64 of float64), differentiable: results over parts of the keys can be merged by it.

    Returns:
        (..., N, L, Dv). A query that sees no key has zeros and zero gradients, where torch has NaN.

    float32, float64 and bfloat16 (with sums in float32) have kernels; float16 is converted to float32 and back.
    Differentiable twice. Under `torch.func` transforms and forward-mode AD the call runs `fastseq.reference.attention`,
    which is plain PyTorch and holds all scores in memory; so does the second derivative.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message has what was expected and what arrived.
        ValueError: a negative window, dropout outside [0, 1), an unknown alignment.
        NotImplementedError: dropout, or a device without a kernel.
    """
    if dropout_p:
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p must be within [0, 1); got {dropout_p}")
        raise NotImplementedError(f"dropout_p must be 0, as attention has no dropout yet; got {dropout_p}")
    if is_causal and attn_mask is not None:
        raise RuntimeError("attn_mask must be None where is_causal is set; give the causal mask in it, or neither")
    if window is None and causal_alignment == "top_left":
        band = (None, 0 if is_causal else None)
    else:
        band = _band(query, key, is_causal, window, causal_alignment)
    if query.dtype is torch.float16:
        mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.float()
        out, lse = _attention(query.float(), key.float(), value.float(), mask, scale, enable_gqa, band)
        out = out.half()
    else:
        out, lse = _attention(query, key, value, attn_mask, scale, enable_gqa, band)
    return (out, lse) if return_lse else out


def _band(
    query: Tensor, key: Tensor, is_causal: bool, window: int | tuple[int | None, int | None] | None, alignment: str
) -> tuple[int | None, int | None]:
    """(low, high): query i sees key j where low ≤ j - i ≤ high."""
    if alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment must be 'top_left' or 'bottom_right'; got {alignment!r}")
    left, right = (window, 0 if is_causal else window) if window is None or isinstance(window, int) else window
    for side in (left, right):
        if side is not None and side < 0:
            raise ValueError(f"window must be of numbers that are not negative; got {window!r}")
    if is_causal:
        right = 0
    elif window is None:
        right = None
    shift = key.shape[-2] - query.shape[-2] if alignment == "bottom_right" else 0
    return (None if left is None else shift - left), (None if right is None else shift + right)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    band: tuple[int | None, int | None],
) -> tuple[Tensor, Tensor]:
    q, k, v, leading = query.shape, key.shape, value.shape, None
    if not (len(q) == len(k) == len(v) == 4 and q[0] == k[0] == v[0]):
        for name, shape in (("query", q), ("key", k), ("value", v)):
            if len(shape) < 2:
                raise RuntimeError(f"{name} must be (..., rows, size), of two dimensions or more; got {tuple(shape)}")
        query, key, value, attn_mask, leading = _to_heads(query, key, value, attn_mask, enable_gqa)
        q, k, v = query.shape, key.shape, value.shape
    if not enable_gqa and not q[1] == k[1] == v[1]:
        if len({q[1], k[1], v[1]} - {1}) > 1:
            raise RuntimeError(
                f"query, key and value must have the same number of heads, unless enable_gqa=True; "
                f"got {q[1]}, {k[1]} and {v[1]}"
            )
        query, key, value = _same_heads(query, key, value)
    if scale is None:
        scale = q[-1] ** -0.5 if q[-1] else 1.0
    if not is_compiling() and is_transformed():
        out, lse = reference.attention(query, key, value, attn_mask, scale=scale, low=band[0], high=band[1])
        lse = lse.to(_sums(query.dtype))
    else:
        out, lse = _attention_forward(query, key, value, attn_mask, scale, *band)
    if leading is not None:
        out, lse = out.reshape(*leading, *out.shape[-2:]), lse.reshape(*leading, lse.shape[-1])
    return out, lse


def _same_heads(*tensors: Tensor) -> list[Tensor]:
    heads = max(t.shape[1] for t in tensors)
    return [t.expand(-1, heads, -1, -1) for t in tensors]


def _to_heads(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """Each as (B, N, rows, size), all leading dimensions but the last in B; and the result's leading ones."""
    tensors = [query, key, value]
    heads = [t.shape[-3] if t.dim() > 2 else 1 for t in tensors]
    if not enable_gqa:
        heads = list(torch.broadcast_shapes(*[(n,) for n in heads])) * 3
    batch = torch.broadcast_shapes(*[t.shape[:-3] for t in tensors])
    out = [
        t.expand(*batch, n, *t.shape[-2:]).reshape(math.prod(batch), n, *t.shape[-2:])
        for t, n in zip(tensors, heads, strict=True)
    ]
    leading = (*batch, heads[0]) if max(t.dim() for t in tensors) > 2 else ()
    if attn_mask is not None and attn_mask.dim() > 3 and len(batch) != 1:
        rows = attn_mask.shape[-3:]
        attn_mask = attn_mask.expand(*batch, *rows).reshape(math.prod(batch), *rows)
    return out[0], out[1], out[2], attn_mask, leading


# ---- Fake tensors: shapes without data, for torch.compile and torch.export ------------------------------------------


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty_heads(like: Tensor, size: int) -> Tensor:
    """In the order of like's dimensions, as the kernels' results are."""
    B, N, L, _ = like.shape
    if N > 1 and L > 1 and like.stride(1) < like.stride(2):
        return like.new_empty(B, L, N, size).transpose(1, 2)
    return like.new_empty(B, N, L, size)


@torch.library.register_fake("fastseq::attention_forward")
def _attention_forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    low: int | None,
    high: int | None,
) -> tuple[Tensor, Tensor]:
    # One tensor on the meta device brings a call here: without this, real tensors beside it would get no result.
    for name, t in (("key", key), ("value", value), ("attn_mask", attn_mask)):
        if t is not None and t.device != query.device:
            raise RuntimeError(f"{name} must be on query's device, {query.device}; got {t.device}")
    return _empty_heads(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=_sums(query.dtype))


@torch.library.register_fake("fastseq::attention_backward")
def _attention_backward_fake(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    low: int | None,
    high: int | None,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    found = [_empty_heads(t, t.shape[3]) for t, need in zip((query, key, value), needs, strict=False) if need]
    return [*found, attn_mask.new_empty(attn_mask.shape)] if needs[3] and attn_mask is not None else found


# ---- Double backward: the reference's backward, differentiated ------------------------------------------------------


def _attention_double_backward(
    dd: Sequence[Tensor | None],
    d_out: Tensor | None,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    low: int | None,
    high: int | None,
    needs: Sequence[bool],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients through attention_backward of those of [d_out, d_lse, query, key, value, mask] that are `wanted`.

    `dd` has, for each gradient that attention_backward returned, the gradient of the loss in it, or None.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        places = [d_out, d_lse, query, key, value, attn_mask]
        differentiable = [*wanted[:2], *needs]
        places = [
            t if t is None or not (want or d) else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t, want, d in zip(places, wanted, differentiable, strict=True)
        ]
        d_out, d_lse, *tensors = places
        out, lse = reference.attention(*tensors, scale=scale, low=low, high=high)
        lse = lse.to(_sums(query.dtype))
        pairs = [(y, d) for y, d in ((out, d_out), (lse, d_lse)) if d is not None and y.requires_grad]
        of = [t for t, need in zip(tensors, needs, strict=True) if need]
        ys, dys = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(ys, of, dys, create_graph=True, allow_unused=True, materialize_grads=True)
        again = [(g, d) for g, d in zip(gradients, dd, strict=True) if d is not None and g.requires_grad]
        inputs = [t for t, want in zip(places, wanted, strict=True) if want]
        if not again:
            return [torch.zeros_like(t) for t in inputs]
        outputs, grad_outputs = zip(*again, strict=True)
        found = torch.autograd.grad(outputs, inputs, grad_outputs, create_graph=create_graph, materialize_grads=True)
    return list(found)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    d_out, d_lse, query, key, value, attn_mask, *options, _, _, needs = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_out, d_lse, query, key, value, attn_mask)
    ctx.options, ctx.needs = options, needs


def _differentiate_attention_backward(ctx: Any, dd: list[Tensor | None]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    wanted = [t is not None and need for t, need in zip(saved, ctx.needs_input_grad[:6], strict=True)]
    function = (
        torch.ops.fastseq.attention_double_backward if is_in_torch_dispatch_mode() else _attention_double_backward
    )
    remaining = iter(function(dd, *saved, *ctx.options, ctx.needs, wanted))
    # out and lse, which the other arguments determine, get None.
    return (*[next(remaining) if want else None for want in wanted], *[None] * 6)


# In a trace one opaque operator, as the recurrent layers' is.
torch.library.define(
    "fastseq::attention_double_backward",
    "(Tensor?[] dd, Tensor? d_out, Tensor? d_lse, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    "float scale, SymInt? low, SymInt? high, bool[] needs, bool[] wanted) -> Tensor[]",
)


@torch.library.impl("fastseq::attention_double_backward", "cpu")
def _attention_double_backward_opaque(*args: Any) -> list[Tensor]:
    return [t.detach().clone() for t in _attention_double_backward(*args)]


@torch.library.register_fake("fastseq::attention_double_backward")
def _attention_double_backward_fake(*args: Any) -> list[Tensor]:
    _, *places, _, _, _, _, wanted = args
    return [torch.empty_like(t) for t, want in zip(places, wanted, strict=True) if want]


torch.library.register_autograd(
    "fastseq::attention_backward", _differentiate_attention_backward, setup_context=_save_for_double_backward
)
