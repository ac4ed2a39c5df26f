"""`fastseq.explain`: which path a call takes, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq import _load, ops
from fastseq.attention import autocast, scaled_dot_product_attention, varlen_attention
from fastseq.attention_ops import is_too_large
from fastseq.convert import TORCH_TO_FASTSEQ, qualified_name
from fastseq.multihead_attention import MultiheadAttention
from fastseq.rnn import TORCH_MODES, _Cell, _Layer, kernel_obstacle


@dataclass(frozen=True)
class Explanation:
    """What one call of a layer runs.

    Attributes:
        layer: the layer's class, or the function's name.
        path: "kernel" (fastseq's fused kernels), "reference" (`fastseq.reference`), "torch" (torch's own operator) or
            "none": the call raises an error.
        operator: what runs: the operator, cell, dtype and instruction set of a kernel, or a function's name.
        reason: why, in a sentence.
    """

    layer: str
    path: Literal["kernel", "reference", "torch", "none"]
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer} runs {self.operator}: {self.reason}."


def explain(layer: torch.nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells which path `layer(*args, **kwargs)` would take if it were called here and now, and why. It runs nothing.

    The path depends on the call: the input's device and dtype, autocast, and torch.func transforms or forward-mode AD
    around it. The answer is that of the very function that the layers ask.

    Args:
        layer: a layer or cell of fastseq, or of torch.nn; `fastseq.MultiheadAttention`, of which it tells what computes
            the heads; `fastseq.scaled_dot_product_attention` or
            `fastseq.varlen_attention`.
        args, kwargs: what it would be called with.

    Raises:
        TypeError: `layer` is none of these.
    """
    if layer is scaled_dot_product_attention or layer is varlen_attention:
        return _explain_attention(f"fastseq.{layer.__name__}", *args, **kwargs)
    if isinstance(layer, MultiheadAttention):
        return _explain_multihead_attention(layer, *args, **kwargs)
    if not isinstance(layer, torch.nn.Module):
        raise TypeError(f"explain takes a layer of fastseq or torch.nn, or fastseq's attention functions; got {layer}")
    if isinstance(layer, tuple(TORCH_TO_FASTSEQ)):
        reason = "only fastseq's layers have kernels: see fastseq.convert"
        return Explanation(qualified_name(type(layer)), "torch", "torch's own operator", reason)
    return _explain_recurrent(layer, *args, **kwargs)


def _explain_recurrent(layer: torch.nn.Module, input: Tensor | PackedSequence, hx: Any = None) -> Explanation:
    x = input.data if isinstance(input, PackedSequence) else input
    name = qualified_name(type(layer))
    if not isinstance(layer, (_Layer, _Cell)):
        raise TypeError(f"explain takes a recurrent layer or cell of fastseq or torch.nn; got {name}")
    obstacle = kernel_obstacle(x)
    if obstacle is not None and isinstance(layer, _Layer) and layer.mode not in TORCH_MODES:
        return Explanation(name, "reference", "fastseq.reference.rnn", f"{obstacle}; torch has no such cell")
    if obstacle is not None:
        return Explanation(name, "torch", f"torch.{layer._cell}{'_cell' if isinstance(layer, _Cell) else ''}", obstacle)
    if ops.is_transformed():
        reason = "a torch.func transform or forward-mode AD is active, and kernels have no rules for them"
        return Explanation(name, "reference", "fastseq.reference.rnn", reason)
    dtype = str(x.dtype).removeprefix("torch.")
    operator = f"fastseq::rnn_forward ({layer._cell}, {dtype}, {_code(x)})"
    return Explanation(name, "kernel", operator, f"the input is {dtype} on {_place(x)}")


def _place(t: Tensor) -> str:
    return "the CPU" if t.is_cpu else str(t.device)


def _code(t: Tensor) -> str:
    """What a kernel for this tensor was compiled for."""
    return _load._C.isa() if t.is_cpu else f"CUDA {_load._C.cuda()['version']}"


def _explain_multihead_attention(layer: MultiheadAttention, query: Tensor, *others: Any, **options: Any) -> Explanation:
    need_weights = inspect.signature(layer.forward).bind(query, *others, **options).arguments.get("need_weights", True)
    name, dropped = qualified_name(type(layer)), layer.training and layer.dropout > 0
    if need_weights and dropped:
        return Explanation(name, "torch", "products and a softmax of torch", "weights after dropout are asked for")
    # (..., L, size): what the kernel's choice depends on.
    queries = query if query.dim() == 2 or layer.batch_first else query.transpose(0, 1)
    told = _explain_attention(name, queries, head_size=layer.head_dim)
    if need_weights:
        return replace(told, reason=f"{told.reason}; the weights that are asked for, by products of torch")
    return told


def _explain_attention(
    name: str, query: Tensor, *others: Any, head_size: int | None = None, **options: Any
) -> Explanation:
    on_cuda = _load.CUDA_BUILT and query.is_cuda
    if not query.is_cpu and not on_cuda:
        return Explanation(name, "none", "nothing", f"there is no kernel for {query.device.type}; the call is an error")
    (query,) = autocast(query)
    dtype = str(query.dtype).removeprefix("torch.")
    if not query.is_floating_point():
        return Explanation(name, "none", "nothing", f"there is no kernel for {dtype}; the call is an error")
    if ops.is_transformed():
        reason = "a torch.func transform or forward-mode AD is active, and kernels have no rules for them"
        return Explanation(name, "reference", "fastseq.reference.attention", reason)
    value = others[1] if len(others) > 1 else options.get("value", query)
    size = head_size or max(query.shape[-1], value.shape[-1])
    if is_too_large(query, size):
        reason = f"its heads have {size} numbers, and the kernels on CUDA take {_load._C.MOST_CUDA_HEAD_SIZE}"
        return Explanation(name, "reference", "fastseq.reference.attention", reason)
    converted = query.dtype is torch.float16 and not on_cuda
    kind = "float32" if converted else dtype
    reason = f"the input is {dtype} on {_place(query)}" + (", converted to float32 and back" if converted else "")
    if name != "fastseq.varlen_attention" and not on_cuda:
        queries, few = query.shape[-2], _load._C.FEW_QUERIES
        reason += (
            f", and of {queries} queries, no more than {few}, each key is read once, where it lies"
            if queries <= few
            else f", and of {queries} queries, more than {few}, keys are packed and shared by blocks of them"
        )
    return Explanation(name, "kernel", f"fastseq::attention_forward ({kind}, {_code(query)})", reason)
