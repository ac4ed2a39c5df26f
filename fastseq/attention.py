"""Scaled dot-product attention on fused kernels, on the CPU and, in a build with CUDA, there.

Letters: B batch, N heads of queries, N_kv of keys and values, L queries, S keys, D head size of queries and keys, Dv of
values.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastseq import _load
from fastseq.attention_ops import AttentionOptions, attention

__all__ = ["scaled_dot_product_attention", "varlen_attention"]

Window = int | tuple[int | None, int | None] | None


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
    window: Window = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
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
        attn_mask: broadcastable to (..., N, L, S): bool, False where a query does not see a key; or of floating-point
            numbers, which are added to the scores, in query's dtype, and differentiable.
        dropout_p: each probability is 0 with this probability, in steps of 2⁻¹⁶, and the others are divided by
            1 - dropout_p (Srivastava et al., "Dropout", 2014); at 1 the output is 0. Which ones are is a function of
            one number that is drawn from torch's generator, so `torch.manual_seed` repeats them; no mask is kept for
            backward.
        is_causal: query i sees key j where j ≤ i. Not with `attn_mask`, as in torch.
        scale: None means 1/√D.
        enable_gqa: key and value may have N_kv heads, N a multiple of it: query head n reads head n·N_kv/N.
        window: (left, right): query i sees keys from i - left to i + right, None: all on that side; an int w is
            (w, w), and with `is_causal` (w, 0). Attention within a window costs time in proportion to it.
        alibi_slopes: (N) or (B, N): slope · |i - j| is taken from the score (Press et al., "Train short, test long",
            2022). Not differentiable.
        softcap: c > 0: scores scale · Q Kᵀ become c · tanh(scale · Q Kᵀ / c) before anything is added, as in Gemma 2.
        causal_alignment: what i stands for in `is_causal`, `window` and `alibi_slopes` where L ≠ S: "top_left", the
            i-th query beside the i-th key, as in torch; "bottom_right", the last query beside the last key, as in
            FlashAttention and when keys were cached.
        return_lse: return (out, lse) with lse (..., N, L) the log of the sum of the exponentials of each row's scores,
            float32 (float64 of float64), differentiable: results over parts of the keys can be merged by it.

    Returns:
        (..., N, L, Dv). A query that sees no key has zeros and zero gradients, where torch has NaN.

    float32, float64 and bfloat16 (with sums in float32) have kernels, and on CUDA float16; on the CPU float16 is
    converted to float32 and back. Under autocast all but float64 is converted to its dtype, as for torch's function.
    On CUDA, which takes an extension built with it, all runs on the current stream and waits for nothing; a CUDA graph
    can capture a call, but not one with dropout, whose one number is drawn on the CPU. Heads of more than 256 numbers
    run the reference there.
    Differentiable twice. Under `torch.func` transforms and forward-mode AD the call runs `fastseq.reference.attention`,
    plain PyTorch, and so does the second derivative; a piece of the queries at a time, so that no more than 2²² scores
    are there at once, unless autograd keeps them.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message has what was expected and what arrived.
        ValueError: a negative window, dropout outside [0, 1), a softcap that is not positive, an unknown alignment.
        NotImplementedError: a device without a kernel; slopes that require a gradient.
    """
    usual = not dropout_p and window is None and alibi_slopes is None and softcap is None
    if usual and causal_alignment == "top_left" and not return_lse and not is_dynamo_compiling():
        # All that follows in one go, if nobody could tell the difference: csrc/torch/direct_attention.cpp.
        out = _load._C.direct_attention(query, key, value, attn_mask, scale, is_causal, enable_gqa)
        if out is not None:
            return out
    if is_causal and attn_mask is not None:
        raise RuntimeError("attn_mask must be None where is_causal is set; give the causal mask in it, or neither")
    shape, k, v, leading = query.shape, key.shape, value.shape, None
    if not (len(shape) == len(k) == len(v) == 4 and shape[0] == k[0] == v[0]):
        query, key, value, attn_mask, leading = _to_heads(query, key, value, attn_mask, enable_gqa)
        shape, k, v = query.shape, key.shape, value.shape
    if not enable_gqa and not shape[1] == k[1] == v[1]:
        query, key, value = _same_heads(query, key, value)
    options = attention_options(
        query, attn_mask, dropout_p, is_causal, scale, window, alibi_slopes, softcap, causal_alignment
    )
    out, lse = attention_in_kernel_type(query, key, value, options)
    if leading is not None:
        out, lse = out.reshape(*leading, *out.shape[-2:]), lse.reshape(*leading, lse.shape[-1])
    return (out, lse) if return_lse else out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: Window = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    causal_alignment: Literal["top_left", "bottom_right"] = "bottom_right",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a ragged batch whose sequences are packed one after another, as in FlashAttention: no padding.

    Sequence b has the queries from cu_seqlens_q[b] to cu_seqlens_q[b + 1] and the keys from cu_seqlens_k[b] to
    cu_seqlens_k[b + 1], and is as `scaled_dot_product_attention` makes it of those alone, to the last bit.

    Args:
        q: (total_q, N, D). k: (total_k, N_kv, D). v: (total_k, N_kv, Dv). N is a multiple of N_kv.
        cu_seqlens_q, cu_seqlens_k: (B + 1), int32 or int64: the sums of the lengths before each sequence, from 0 on.
            Rows after the last sequence belong to none: they give zeros. Where q is on CUDA these may be, too, and are
            not waited for then: nobody checks their values, and those that do not fit read or write anywhere.
        max_seqlen_q, max_seqlen_k: not needed; taken for FlashAttention's callers.
        dropout_p, is_causal, scale, window, alibi_slopes, softcap: as in `scaled_dot_product_attention`, within each
            sequence.
        causal_alignment: the last query of a sequence beside its last key, if not told otherwise.
        return_lse: return (out, lse) with lse (N, total_q).

    Returns:
        (total_q, N, Dv).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; starts that decrease, do not begin with 0 or lie beyond
            the rows that are there.
        ValueError: as `scaled_dot_product_attention`.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3:
            raise RuntimeError(f"{name} must be (total, heads, size), of three dimensions; got {tuple(t.shape)}")
    options = attention_options(
        q,
        None,
        dropout_p,
        is_causal,
        scale,
        window,
        alibi_slopes,
        softcap,
        causal_alignment,
        query_starts=cu_seqlens_q,
        key_starts=cu_seqlens_k,
    )
    query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    out, lse = attention_in_kernel_type(query, key, value, options)
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (out, lse) if return_lse else out


def attention_options(
    query: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window: Window,
    alibi_slopes: Tensor | None,
    softcap: float | None,
    causal_alignment: str,
    *,
    query_starts: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> AttentionOptions:
    """The operators' options from the functions' arguments, which are checked."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be within [0, 1]; got {dropout_p}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for none; got {softcap}")
    if causal_alignment != "top_left" and causal_alignment != "bottom_right":
        raise ValueError(f"causal_alignment must be 'top_left' or 'bottom_right'; got {causal_alignment!r}")
    if window is None:
        low, high = None, 0 if is_causal else None
    else:
        left, right = (window, window) if isinstance(window, int) else window
        if (left is not None and left < 0) or (right is not None and right < 0):
            raise ValueError(f"window must be of numbers that are not negative; got {window!r}")
        low, high = None if left is None else -left, 0 if is_causal else right
    size = query.shape[-1]
    return AttentionOptions(
        attn_mask,
        alibi_slopes,
        # From torch's generator of the CPU, as a kernel gets it with its sizes; for backward to draw the same numbers.
        torch.randint(1 << 62, (1,), device="cpu") if dropout_p else None,
        query_starts,
        key_starts,
        query_lengths,
        key_lengths,
        (1 / math.sqrt(size) if size else 1.0) if scale is None else scale,
        softcap or 0.0,
        dropout_p,
        low,
        high,
        causal_alignment == "bottom_right",
    )


def attention_in_kernel_type(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """`attention`, under autocast in its dtype; of float16, where it has no kernel, converted to float32 and back."""
    query, key, value = autocast(query, key, value)
    half = query.dtype is torch.float16 and not (_load.CUDA_BUILT and query.is_cuda)
    if half:
        query, key, value = query.float(), key.float(), value.float()
    mask = options.attn_mask
    if mask is not None and mask.dtype != query.dtype and mask.is_floating_point():
        options = options._replace(attn_mask=mask.to(query.dtype))
    out, lse = attention(query, key, value, options)
    return (out.half() if half else out), lse


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast in its dtype, but for float64, as torch's operators of lower precision have it."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _same_heads(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    heads = [t.shape[1] for t in (query, key, value)]
    if len({*heads} - {1}) > 1:
        raise RuntimeError(
            f"query, key and value must have the same number of heads, unless enable_gqa=True; "
            f"got {heads[0]}, {heads[1]} and {heads[2]}"
        )
    return [t.expand(-1, max(heads), -1, -1) for t in (query, key, value)]


def _to_heads(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """Each as (B, N, rows, size), all leading dimensions but the last in B; and the result's leading ones."""
    tensors = [query, key, value]
    for name, t in zip(("query", "key", "value"), tensors, strict=True):
        if t.dim() < 2:
            raise RuntimeError(f"{name} must be (..., rows, size), of two dimensions or more; got {tuple(t.shape)}")
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
