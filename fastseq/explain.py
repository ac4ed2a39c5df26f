"""`fastseq.explain`: which path a call takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq import _load, ops
from fastseq.convert import TORCH_TO_FASTSEQ, qualified_name
from fastseq.rnn import TORCH_MODES, _Cell, _Layer, kernel_obstacle


@dataclass(frozen=True)
class Explanation:
    """What one call of a layer runs.

    Attributes:
        layer: the layer's class.
        path: "kernel" (fastseq's fused kernels), "reference" (`fastseq.reference`) or "torch" (torch's own operator).
        operator: what runs: the operator, cell, dtype and instruction set of a kernel, or a function's name.
        reason: why, in a sentence.
    """

    layer: str
    path: Literal["kernel", "reference", "torch"]
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer} runs {self.operator}: {self.reason}."


def explain(layer: torch.nn.Module, input: Tensor | PackedSequence, hx: Any = None) -> Explanation:
    """Tells which path `layer(input, hx)` would take if it were called here and now, and why. It runs nothing.

    The path depends on the call: the input's device and dtype, autocast, and torch.func transforms or forward-mode AD
    around it. The answer is that of the very function that the layers ask.

    Args:
        layer: a layer or cell of fastseq, or of torch.nn.
        input: what the layer would be called with.
        hx: likewise; it has no influence on the path.

    Raises:
        TypeError: `layer` is no recurrent layer or cell.
    """
    x = input.data if isinstance(input, PackedSequence) else input
    name = qualified_name(type(layer))
    if isinstance(layer, tuple(TORCH_TO_FASTSEQ)):
        reason = "only fastseq's layers have kernels: see fastseq.convert"
        return Explanation(name, "torch", "torch's own operator", reason)
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
    operator = f"fastseq::rnn_forward ({layer._cell}, {dtype}, {_load._C.isa()})"
    return Explanation(name, "kernel", operator, f"the input is {dtype} on the CPU")
