"""fastseq on a GPU next to cuDNN (torch.nn's layers) and to attention of torch and flash-attn.

What all compute is compared before anything is timed. Times are of CUDA's events around a burst of calls, in turns, so
that what the GPU's clock does happens to all; a peer's ratio is that of medians, with the quartiles of the ratios of
single rounds. Work that the host does between launches is part of it, as it is for whoever calls.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastseq
from fastseq import _load
from fastseq.bench.report import Table, duration

OURS = "fastseq"
ROUNDS, BURST = 11, 0.02  # seconds
# Of |a - b| / |b|, whole tensors; of float32 whose factors may be rounded to TF32, another.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}
TF32_TOLERANCE = 3e-3

Step = Callable[[], list[Tensor]]
"""One call of a contender; returns its results: outputs, or the gradients of inputs and weights."""


@dataclass(frozen=True)
class RecurrentPoint:
    """A layer: its class in torch.nn and fastseq, sizes, directions D, number type, and whether TF32 is allowed."""

    layer: str
    T: int
    B: int
    I: int
    H: int
    D: int = 1
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False

    def __str__(self) -> str:
        directions = " bidirectional" if self.D == 2 else ""
        number = "TF32" if self.tf32 else _name(self.dtype)
        return f"{self.layer} {number} T{self.T} B{self.B} I{self.I} H{self.H}{directions}"

    def contenders(self, training: bool, device: str) -> dict[str, Step]:
        """By name, those that compute this, on the same weights and numbers."""
        theirs = getattr(torch.nn, self.layer)(self.I, self.H, bidirectional=self.D == 2, device=device)
        theirs = theirs.to(self.dtype)
        ours = fastseq.convert(copy.deepcopy(theirs))
        theirs.flatten_parameters()
        x = torch.randn(self.T, self.B, self.I, device=device, dtype=self.dtype)
        d = torch.randn(self.T, self.B, self.D * self.H, device=device, dtype=self.dtype) / self.H

        def step(layer: torch.nn.Module) -> Step:
            if not training:
                return torch.no_grad()(lambda: [layer(x)[0]])
            inputs = [x.detach().clone().requires_grad_(), *layer.parameters()]
            return lambda: list(torch.autograd.grad(layer(inputs[0])[0], inputs, d))

        return {OURS: step(ours), "torch.nn (cuDNN)": step(theirs)}

    def work(self, training: bool) -> float:
        """Floating-point operations."""
        gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[self.layer]
        return 2.0 * self.T * self.B * self.D * gates * self.H * (self.I + self.H) * (3 if training else 1)


@dataclass(frozen=True)
class AttentionPoint:
    """Scaled dot-product attention: batch, heads, heads of keys, lengths of queries and keys, head size."""

    B: int
    N: int
    N_kv: int
    L: int
    S: int
    size: int
    causal: bool = False
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False

    def __str__(self) -> str:
        heads = f"N{self.N}" if self.N == self.N_kv else f"N{self.N}/{self.N_kv}"
        causal = " causal" if self.causal else ""
        return f"attention {_name(self.dtype)} B{self.B} {heads} L{self.L} S{self.S} D{self.size}{causal}"

    def contenders(self, training: bool, device: str) -> dict[str, Step]:
        """By name, those that compute this, on the same numbers."""

        def heads(n: int, rows: int) -> Tensor:
            t = torch.randn(self.B, n, rows, self.size, device=device, dtype=self.dtype)
            return t.requires_grad_(training)

        q, k, v = heads(self.N, self.L), heads(self.N_kv, self.S), heads(self.N_kv, self.S)
        d = torch.randn_like(q)
        options = {"is_causal": self.causal, "enable_gqa": self.N != self.N_kv}

        def step(function: Callable[[], Tensor]) -> Step:
            if not training:
                return torch.no_grad()(lambda: [function()])
            return lambda: list(torch.autograd.grad(function(), (q, k, v), d))

        def of_torch(backend: SDPBackend) -> Callable[[], Tensor]:
            def function() -> Tensor:
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

            return function

        found = {OURS: step(lambda: fastseq.scaled_dot_product_attention(q, k, v, **options))}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            found[f"torch {backend.name.removesuffix('_ATTENTION').lower()}"] = step(of_torch(backend))
        try:
            from flash_attn import flash_attn_func
        except ImportError:
            return found
        found["flash-attn"] = step(
            lambda: flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=self.causal).transpose(1, 2)
        )
        return found

    def work(self, training: bool) -> float:
        """Floating-point operations, of backward without those of computing the scores again."""
        seen = self.L * self.S * (0.5 if self.causal else 1.0)
        return 4.0 * self.B * self.N * seen * self.size * (3 if training else 1)


AnyPoint = RecurrentPoint | AttentionPoint


def points(quick: bool) -> Iterator[AnyPoint]:
    """What is measured; `quick` is a part of it."""
    half, single = torch.bfloat16, torch.float32
    sizes = [(100, 64, 512, 512, 1), (100, 64, 1024, 1024, 1), (100, 16, 256, 256, 2), (100, 1, 512, 512, 1)]
    sizes += [] if quick else [(100, 128, 256, 256, 1), (100, 64, 1536, 1536, 1), (400, 32, 80, 320, 2)]
    for layer in ("LSTM",) if quick else ("LSTM", "GRU", "RNN"):
        for size in sizes:
            for dtype in (half, single) if quick else (half, torch.float16, single):
                yield RecurrentPoint(layer, *size, dtype)
            yield RecurrentPoint(layer, *size, single, tf32=True)
    for size in (64, 128):
        for causal in (False, True):
            yield AttentionPoint(4, 16, 16, 4096, 4096, size, causal)
    yield AttentionPoint(8, 32, 8, 1, 8192, 128)
    if quick:
        return
    yield AttentionPoint(4, 32, 8, 4096, 4096, 128, True)
    yield AttentionPoint(4, 8, 8, 4096, 4096, 256, True)
    yield AttentionPoint(16, 16, 16, 1024, 1024, 64)
    yield AttentionPoint(32, 16, 16, 512, 512, 128)
    yield AttentionPoint(64, 32, 8, 1, 4096, 128)
    yield AttentionPoint(16, 16, 16, 1024, 1024, 64, dtype=single)
    yield AttentionPoint(32, 16, 16, 512, 512, 128, dtype=single)
    for size in (64, 128, 256):
        yield AttentionPoint(4, 8, 8, 4096, 4096, size, True, single)
    yield AttentionPoint(8, 32, 8, 1, 8192, 128, dtype=single)


def dry_points() -> Iterator[AnyPoint]:
    """So small that a CPU computes them at once: that the measurement itself works."""
    for layer in ("LSTM", "GRU", "RNN"):
        yield RecurrentPoint(layer, 5, 3, 8, 16, 2, torch.float32)
    yield AttentionPoint(2, 4, 2, 9, 9, 16, True, torch.float32)


def machine(device: str) -> dict[str, str]:
    """What a report says of where it was measured."""
    facts = {"torch": torch.__version__, "fastseq": _load._C.build_info()["version"]}
    if device == "cuda":
        facts |= {
            "GPU": torch.cuda.get_device_name(),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "kernels for": _load._C.cuda()["archs"],
        }
    return facts


def measure(point: AnyPoint, training: bool, device: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """The seconds of a call, of every round, by contender; or why there are none."""
    with _tf32(point.tf32):
        return _measure(point, training, device, rounds)


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Of cuDNN, which allows it unless told otherwise, and of products, which do not and which fastseq goes by."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def _measure(point: AnyPoint, training: bool, device: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    steps = point.contenders(training, device)
    tolerance = TF32_TOLERANCE if point.tf32 else TOLERANCE[point.dtype]
    row: dict[str, Any] = {"point": str(point), "training": training, "work": point.work(training), "seconds": {}}
    row["failed"], row["difference"] = {}, {}
    wanted = [t.detach() for t in steps[OURS]()]
    calls: dict[str, int] = {}
    for name, step in steps.items():
        try:
            found = step()
            worst = max(_difference(a, b) for a, b in zip(found, wanted, strict=True))
            once = _time(step, 1, device)
        except RuntimeError as error:  # torch's for what a backend does not do
            row["failed"][name] = str(error).splitlines()[0]
            continue
        row["difference"][name] = worst
        if not worst <= tolerance:
            row["failed"][name] = f"differs from fastseq's by {worst:.1e} of its size"
            continue
        calls[name] = max(1, min(200, int(BURST / max(once, 1e-6))))
    row["seconds"] = {name: [] for name in calls}
    for turn in range(rounds):
        order = list(calls)[turn % len(calls) :] + list(calls)[: turn % len(calls)]
        for name in order:
            row["seconds"][name].append(_time(steps[name], calls[name], device))
    return row


def report(document: dict[str, Any]) -> str:
    """The page: where it was measured, and the rows."""
    warning = ["A dry run on the CPU: its times mean nothing.", ""] if document["dry run"] else []
    facts = [f"- {name}: {value}" for name, value in document["machine"].items()]
    return "\n".join(["# fastseq on a GPU", "", *warning, *facts, "", table(document["rows"]).markdown()])


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each row: our median, FLOP/s, and each peer's time over ours."""
    peers = list(dict.fromkeys(name for row in rows for name in [*row["seconds"], *row["failed"]] if name != OURS))
    lines, marked = [], set()
    for number, row in enumerate(rows):
        if OURS not in row["seconds"]:
            lines.append([row["point"], "! " + row["failed"].get(OURS, ""), "–", *("–" for _ in peers)])
            marked.add(number)
            continue
        ours = row["seconds"][OURS]
        rate = row["work"] / statistics.median(ours) / 1e12
        cells = [_ratio(row["seconds"].get(peer), ours, row["failed"].get(peer)) for peer in peers]
        if any(peer in row["seconds"] and _median_ratio(row["seconds"][peer], ours) < 1 for peer in peers):
            marked.add(number)
        what = "forward and backward" if row["training"] else "forward"
        lines.append([f"{row['point']}, {what}", duration(statistics.median(ours)), f"{rate:.3g}", *cells])
    note = (
        "A peer's column: its median over ours (the quartiles of single rounds' ratios); above 1 we are faster, and a "
        "row in bold has a peer that is. – it does not do this."
    )
    return Table("Rows", ["row", "fastseq", "TFLOP/s", *peers], lines, marked, note)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not torch.isfinite(a).all() or not torch.isfinite(b).all():
        return float("inf")
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def _time(step: Step, calls: int, device: str) -> float:
    """Seconds a call of a burst."""
    if device != "cuda":
        import time

        begin = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - begin) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def _median_ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(theirs) / statistics.median(ours)


def _ratio(theirs: list[float] | None, ours: list[float], failed: str | None) -> str:
    if not theirs:
        cannot = failed is None or "No available kernel" in failed or "No viable backend" in failed
        return "–" if cannot else f"! {failed}"
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return f"{_median_ratio(theirs, ours):.2f} ({low:.2f}–{high:.2f})"
