"""Points of attention with torch's tensors: fastseq's function, torch's, and plain products with a softmax between."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from fastseq.bench.grid import WINDOW, AttentionPoint
from fastseq.bench.peers.base import Prepared
from fastseq.bench.problem import AttentionNumbers

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
_ROTATING_BYTES = 1 << 28  # of keys and values together: more than any cache


def of_fastseq(point: AttentionPoint, mask: Tensor | None) -> Attention:
    """Causal and windowed as options."""
    causal = point.form in ("causal", "window")
    window = WINDOW if point.form == "window" else None
    return lambda q, k, v: fastseq.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, window=window)


def of_torch(point: AttentionPoint, mask: Tensor | None) -> Attention:
    """A window as a mask."""
    mask = _visible(point) if point.form == "window" else mask
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, is_causal=point.form == "causal")


def plain(point: AttentionPoint, mask: Tensor | None) -> Attention:
    """Two products, a softmax between them."""
    visible = _visible(point) if point.form in ("causal", "window") else mask if point.form == "mask" else None
    hidden = None if visible is None else ~visible

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * (1 / math.sqrt(point.D))) @ k.transpose(-2, -1)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        elif mask is not None:
            scores = scores + mask
        return scores.softmax(-1) @ v

    return attention


def _visible(point: AttentionPoint) -> Tensor:
    distance = torch.arange(point.L)[:, None] - torch.arange(point.S)
    return (distance >= 0) & (distance <= (WINDOW if point.form == "window" else point.S))


def prepare(
    make: Callable[[AttentionPoint, Tensor | None], Attention], point: AttentionPoint, settings: str
) -> Prepared:
    """The point with one of these functions."""
    numbers, dtype = AttentionNumbers.of(point), getattr(torch, point.dtype)
    training = point.mode == "training"
    q, k, v = [torch.from_numpy(t).to(dtype).requires_grad_(training) for t in (numbers.q, numbers.k, numbers.v)]
    d_output = torch.from_numpy(numbers.d_output).to(dtype)
    mask = None if numbers.mask is None else torch.from_numpy(numbers.mask)
    attention = make(point, mask if mask is None or mask.dtype == torch.bool else mask.to(dtype))
    copies = 1 + (_ROTATING_BYTES // (2 * k.nbytes) if point.rotating else 0)
    cached = itertools.cycle([(k, v)] + [(k.clone(), v.clone()) for _ in range(copies - 1)])

    def inference() -> Tensor:
        with torch.no_grad():
            return attention(q, *next(cached))

    def step() -> Tensor:
        q.grad = k.grad = v.grad = None
        output = attention(q, k, v)
        output.backward(d_output)
        return output

    call = step if training else inference
    results = {"output": call().detach().float().numpy().copy()}
    if training:
        results |= {f"d_{name}": t.grad.float().numpy().copy() for name, t in zip("qkv", (q, k, v), strict=True)}
    return Prepared(call, results, settings)
