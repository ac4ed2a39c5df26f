"""The attention operators' rules that are written in Python: fake tensors, double backward, and torch.func."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastseq import _load, reference
from fastseq.ops import is_transformed

_attention_forward = torch.ops.fastseq.attention_forward.default


class AttentionOptions(NamedTuple):
    """What the operators take beside query, key and value, in this order; `reference.attention` says what each is."""

    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    dropout_seed: Tensor | None
    query_starts: Tensor | None
    key_starts: Tensor | None
    query_lengths: Tensor | None
    key_lengths: Tensor | None
    scale: float
    softcap: float
    dropout_p: float
    low: int | None
    high: int | None
    from_end: bool


def attention(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """out and lse of (B, N, L, D), (B, N_kv, S, D) and (B, N_kv, S, Dv)."""
    too_large = is_too_large(query, query.shape[-1], value.shape[-1])
    if too_large or (not is_compiling() and is_transformed()):
        out, lse = reference.attention(query, key, value, **options._asdict())
        return out, lse.to(sums(query.dtype))
    return _attention_forward(query, key, value, *options)


def is_too_large(query: Tensor, *sizes: int) -> bool:
    """Whether query's device has kernels, but none for heads of these sizes."""
    return _load.CUDA_BUILT and query.is_cuda and max(sizes) > _load._C.MOST_CUDA_HEAD_SIZE


def sums(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, and what lse is of."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- Fake tensors: shapes without data, for torch.compile and torch.export ------------------------------------------


def _empty_heads(like: Tensor, size: int) -> Tensor:
    """In the order of like's dimensions, as the kernels' results are."""
    B, N, L, _ = like.shape
    if N > 1 and L > 1 and like.stride(1) < like.stride(2):
        return like.new_empty(B, L, N, size).transpose(1, 2)
    return like.new_empty(B, N, L, size)


@torch.library.register_fake("fastseq::attention_forward")
def _attention_forward_fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    attn_mask = AttentionOptions(*options).attn_mask
    # One tensor on the meta device brings a call here: without this, real tensors beside it would get no result.
    for name, t in (("key", key), ("value", value), ("attn_mask", attn_mask)):
        if t is not None and t.device != query.device:
            raise RuntimeError(f"{name} must be on query's device, {query.device}; got {t.device}")
    return _empty_heads(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=sums(query.dtype))


@torch.library.register_fake("fastseq::attention_backward")
def _attention_backward_fake(
    d_out: Tensor | None, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> list[Tensor]:
    *options, _, _, needs = rest
    attn_mask = AttentionOptions(*options).attn_mask
    found = [_empty_heads(t, t.shape[3]) for t, need in zip((query, key, value), needs, strict=False) if need]
    return [*found, attn_mask.new_empty(attn_mask.shape)] if needs[3] and attn_mask is not None else found


# ---- Double backward: the reference's backward, differentiated, piece of the queries by piece ------------------------


def _attention_double_backward(
    dd: Sequence[Tensor | None],
    d_out: Tensor | None,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> list[Tensor]:
    """The gradients through attention_backward of those of [d_out, d_lse, query, key, value, mask] that are `wanted`.

    `dd` has, for each gradient that attention_backward returned, the gradient of the loss in it, or None; `rest` is the
    options, attention_backward's `needs` and `wanted`. Memory is of a piece's scores, unless the result is to be
    differentiated once more.
    """
    *all_options, needs, wanted = rest
    options = AttentionOptions(*all_options)
    create_graph = torch.is_grad_enabled()
    starts = (options.query_starts, options.key_starts)
    others = {
        name: option
        for name, option in options._asdict().items()
        if name not in ("attn_mask", "query_starts", "key_starts")
    }
    with torch.enable_grad():
        differentiable = [*wanted[:2], *needs]
        places = [
            t if t is None or not (want or d) else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t, want, d in zip(
                (d_out, d_lse, query, key, value, options.attn_mask), wanted, differentiable, strict=True
            )
        ]
        remaining = iter(dd)
        given = [next(remaining) if need else None for need in needs]
        found = [torch.zeros_like(t) if want else None for t, want in zip(places, wanted, strict=True)]
        for piece in reference.attention_pieces(query, key, *starts):
            at = [_of_piece(place, piece, t) for place, t in enumerate(places)]
            mine = [None if t is None else t[k] for t, k in zip(places, at, strict=True)]
            mine_dd = [None if t is None else t[k] for t, k in zip(given, at[2:], strict=True)]
            parts = _double_backward_of_piece(piece, mine_dd, mine, others, needs, wanted, create_graph)
            for total, k, part in zip(found, at, parts, strict=True):
                if total is not None and part is not None:
                    total[k] += part
    return [t for t in found if t is not None]


def _of_piece(place: int, piece: reference.AttentionPiece, t: Tensor | None) -> tuple[Any, ...]:
    """The index of a piece's part of [d_out, d_lse, query, key, value, mask]."""
    if place in (3, 4):
        return (slice(None), slice(None), piece.keys)
    if place < 5:
        return (slice(None), slice(None), piece.rows)
    rows = t is not None and t.dim() > 1 and t.shape[-2] > 1
    return (..., piece.rows, slice(None)) if rows else (...,)


def _double_backward_of_piece(
    piece: reference.AttentionPiece,
    dd: Sequence[Tensor | None],
    places: Sequence[Tensor | None],
    options: dict[str, Any],
    needs: Sequence[bool],
    wanted: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    d_out, d_lse, *tensors = places
    out, lse = reference.attention_piece(piece, *tensors, **options)
    pairs = [(y, d) for y, d in ((out, d_out), (lse.to(sums(out.dtype)), d_lse)) if d is not None and y.requires_grad]
    of = [t for t, need in zip(tensors, needs, strict=True) if need]
    ys, dys = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(ys, of, dys, create_graph=True, allow_unused=True, materialize_grads=True)
    needed = [d for d, need in zip(dd, needs, strict=True) if need]
    again = [(g, d) for g, d in zip(gradients, needed, strict=True) if d is not None and g.requires_grad]
    if not again:
        return [None] * len(places)
    inputs = [t for t, want in zip(places, wanted, strict=True) if want]
    outputs, grad_outputs = zip(*again, strict=True)
    found = iter(torch.autograd.grad(outputs, inputs, grad_outputs, create_graph=create_graph, materialize_grads=True))
    return [next(found) if want else None for want in wanted]


# Options that are tensors, which come first.
_TENSORS = AttentionOptions._fields.index("scale")


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *places, _, _, needs = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*places[: 5 + _TENSORS])
    ctx.options, ctx.needs = places[5 + _TENSORS :], needs


def _differentiate_attention_backward(ctx: Any, dd: list[Tensor | None]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    wanted = [t is not None and need for t, need in zip(saved, ctx.needs_input_grad[:6], strict=False)]
    function = (
        torch.ops.fastseq.attention_double_backward if is_in_torch_dispatch_mode() else _attention_double_backward
    )
    remaining = iter(function(dd, *saved, *ctx.options, ctx.needs, wanted))
    places = [next(remaining) if want else None for want in wanted]
    # The other options have no gradient, and out and lse are determined by the arguments before them.
    return (*places, *[None] * (_TENSORS - 1 + len(ctx.options) + 3))


# In a trace one opaque operator, as the recurrent layers' is.
torch.library.define(
    "fastseq::attention_double_backward",
    "(Tensor?[] dd, Tensor? d_out, Tensor? d_lse, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    "Tensor? alibi_slopes, Tensor? dropout_seed, Tensor? query_starts, Tensor? key_starts, Tensor? query_lengths, "
    "Tensor? key_lengths, float scale, float softcap, float dropout_p, SymInt? low, SymInt? high, bool from_end, "
    "bool[] needs, bool[] wanted) -> Tensor[]",
)


@torch.library.impl("fastseq::attention_double_backward", ("cpu", "cuda"))
def _attention_double_backward_opaque(*args: Any) -> list[Tensor]:
    return [t.detach().clone() for t in _attention_double_backward(*args)]


@torch.library.register_fake("fastseq::attention_double_backward")
def _attention_double_backward_fake(*args: Any) -> list[Tensor]:
    _, *places, _, wanted = args
    return [torch.empty_like(t) for t, want in zip(places, wanted, strict=False) if want]


torch.library.register_autograd(
    "fastseq::attention_backward", _differentiate_attention_backward, setup_context=_save_for_double_backward
)
