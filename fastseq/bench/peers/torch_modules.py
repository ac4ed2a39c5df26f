"""fastseq's own modules and torch.nn's: the same code with one or the other library."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq import _load
from fastseq.bench.grid import AnyPoint, AttentionPoint, Point
from fastseq.bench.peers import torch_attention
from fastseq.bench.peers.base import Peer, Prepared
from fastseq.bench.problem import Numbers


class _Modules(Peer):
    library: Any
    attention: Any

    def unsupported(self, point: AnyPoint) -> str | None:
        """All points are supported."""
        return None

    def use_threads(self, threads: int) -> None:
        """torch has one number for the process."""
        torch.set_num_threads(threads)

    def prepare(self, point: AnyPoint, threads: int) -> Prepared:
        """A layer, or a cell for the form "cells", with the point's weights; or attention."""
        torch.set_num_threads(threads)
        if isinstance(point, AttentionPoint):
            return torch_attention.prepare(type(self).attention, point, "eager")
        numbers, dtype = Numbers.of(point), getattr(torch, point.dtype)
        training = point.mode == "training"
        if point.form == "cells":
            module, run = self._cells(point)
        else:
            module = getattr(self.library, point.cell)(
                point.I, point.H, num_layers=point.layers, bidirectional=point.directions == 2
            )
            run = self._layer(module, point)
        module.to(dtype)
        parameters = dict(zip(numbers.weights, module.parameters(), strict=True))  # in torch.nn's order, also a cell's
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(numbers.weights[name]))
        x = torch.from_numpy(numbers.x).to(dtype).requires_grad_(training)
        d_output = torch.from_numpy(numbers.d_output).to(dtype)

        def inference() -> Tensor:
            with torch.no_grad():
                return run(x)

        def step() -> Tensor:
            x.grad = None
            module.zero_grad()
            output = run(x)
            output.backward(d_output)
            return output

        call = step if training else inference
        results = {"output": _array(call())}
        if training:
            results["d_x"] = _array(x.grad)
            results |= {f"d_{name}": _array(parameter.grad) for name, parameter in parameters.items()}
        return Prepared(call, results, self._settings(point, module, x))

    def _layer(self, layer: torch.nn.Module, point: Point) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(x)[0]

    def _cells(self, point: Point) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
        cell = getattr(self.library, f"{point.cell}Cell")(point.I, point.H)

        def run(x: Tensor) -> Tensor:
            state, outputs = None, []
            for x_t in x:
                state = cell(x_t, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(outputs)

        return cell, run

    def _settings(self, point: Point, module: torch.nn.Module, x: Tensor) -> str:
        return "eager" if point.form != "cells" else "eager, a loop in Python"


class Fastseq(_Modules):
    """Ours."""

    name = "fastseq"
    library = fastseq
    attention = staticmethod(torch_attention.of_fastseq)
    distributions = ("fastseq",)

    def _layer(self, layer: torch.nn.Module, point: Point) -> Callable[[Tensor], Tensor]:
        lengths = point.lengths()
        if lengths is None:
            return super()._layer(layer, point)
        return lambda x: layer(x, lengths=lengths)[0]

    def gemm_rate(self, dtype: str, size: int, threads: int) -> float | None:
        """Of the extension's own product, where this build has one."""
        gemm = getattr(_load._C, "gemm", None)
        if gemm is None:
            return None
        torch.set_num_threads(threads)
        ones = torch.ones(size, size, dtype=getattr(torch, dtype))
        a = (ones.view(torch.uint16) if dtype == "bfloat16" else ones).numpy()
        return _gemm_rate(lambda: gemm(a, a), size)

    def _settings(self, point: Point, module: torch.nn.Module, x: Tensor) -> str:
        example = x[0] if point.form == "cells" else x
        return str(fastseq.explain(module, example)).partition(": ")[0]


class TorchNN(_Modules):
    """torch.nn and its functions, eager; rows of any length as a packed sequence, packing and padding included."""

    name = "torch.nn"
    library = torch.nn
    attention = staticmethod(torch_attention.of_torch)
    distributions = ("torch",)

    def _layer(self, layer: torch.nn.Module, point: Point) -> Callable[[Tensor], Tensor]:
        lengths = point.lengths()
        if lengths is None:
            return super()._layer(layer, point)

        def run(x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            output: PackedSequence = layer(packed)[0]
            return pad_packed_sequence(output, total_length=point.T)[0]

        return run

    def gemm_rate(self, dtype: str, size: int, threads: int) -> float:
        """Of torch.mm."""
        torch.set_num_threads(threads)
        a = torch.ones(size, size, dtype=getattr(torch, dtype))
        return _gemm_rate(lambda: torch.mm(a, a), size)


class TorchCells(_Modules):
    """torch.nn's cells, called once a step from Python, against our layer."""

    name = "torch cells"
    library = torch.nn
    distributions = ("torch",)

    def unsupported(self, point: AnyPoint) -> str | None:
        """Loops over many steps are far behind whatever the size: they are measured up to T = 100, one layer."""
        if isinstance(point, AttentionPoint):
            return "attention has no cells"
        if point.form != "layer":
            return "measured against our cells or layers by torch.nn itself"
        if point.layers > 1 or point.directions > 1 or point.T > 100:
            return "a loop over cells is measured for one layer in one direction, up to T = 100"
        return None

    def prepare(self, point: AnyPoint, threads: int) -> Prepared:
        """The point as its cells."""
        return super().prepare(Point(**point.as_dict() | {"form": "cells"}), threads)


class TorchMatmul(_Modules):
    """Attention as two products of torch with a softmax between them, the scores in memory."""

    name = "torch matmul"
    attention = staticmethod(torch_attention.plain)
    distributions = ("torch",)

    def unsupported(self, point: AnyPoint) -> str | None:
        """Attention."""
        return None if isinstance(point, AttentionPoint) else "measured for attention"


def _gemm_rate(product: Callable[[], Any], size: int) -> float:
    product()
    calls = 3
    begin = time.perf_counter()
    for _ in range(calls):
        product()
    return 2.0 * size**3 * calls / (time.perf_counter() - begin)


def _array(t: Tensor | None) -> np.ndarray:
    assert t is not None
    return t.detach().float().numpy().copy()
