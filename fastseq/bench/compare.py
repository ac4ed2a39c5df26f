"""One point of the benchmark: a layer or cell of torch.nn and ours with the same weights, timed in turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

import fastseq

LAYERS = ("RNN", "GRU", "LSTM")
CELLS = ("RNNCell", "GRUCell", "LSTMCell")  # called once a step, in a Python loop
MODES = ("inference", "training")  # training: forward and backward
BURST = 0.02  # seconds one side computes before it is the other's turn


@dataclass(frozen=True)
class Point:
    """What is timed: one layer, or a cell in a loop; I = H, float32."""

    name: str  # of the class, in fastseq and in torch.nn
    T: int
    B: int
    H: int
    mode: str


@dataclass(frozen=True)
class Row:
    """What was measured at a point: medians in milliseconds, their quartiles, and the ratio torch / fastseq."""

    point: Point
    torch_ms: float
    fastseq_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    error: float

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def quick_grid(names: tuple[str, ...] = LAYERS + CELLS) -> list[Point]:
    """Under two minutes: a single row, a few, many; cells in a loop."""
    return _grid(names, [(1, 1, 256), (100, 1, 128), (100, 16, 256), (50, 64, 256)])


def full_grid(names: tuple[str, ...] = LAYERS + CELLS) -> list[Point]:
    """T in 1, 100, 512; B in 1, 16, 64; H in 64, 128, 256, 512; cells in a loop."""
    return _grid(names, list(itertools.product((1, 100, 512), (1, 16, 64), (64, 128, 256, 512))))


def _grid(names: tuple[str, ...], layer_sizes: list[tuple[int, int, int]]) -> list[Point]:
    sizes = {name: [(50, 1, 256), (50, 64, 256)] if name in CELLS else layer_sizes for name in names}
    return [Point(name, *size, mode) for name in names for size in sizes[name] for mode in MODES]


def compare(point: Point, rounds: int = 11, seconds: float = 30.0) -> Row:
    """Times a point.

    Args:
        point: what to time.
        rounds: bursts of each side; fewer (at least three) where they would take longer than `seconds` in all.
        seconds: see rounds.

    Raises:
        ArithmeticError: the two sides do not compute the same; nothing is timed then.
    """
    torch.manual_seed(0)
    theirs = getattr(torch.nn, point.name)(point.H, point.H)
    ours = getattr(fastseq, point.name)(point.H, point.H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(point.T, point.B, point.H, requires_grad=point.mode == "training")
    d_output = torch.randn(point.T, point.B, point.H)

    def output_of(module: torch.nn.Module) -> torch.Tensor:
        if point.name in LAYERS:
            return module(x)[0]
        state, outputs = None, []
        for x_t in x:
            state = module(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)

    def run(module: torch.nn.Module) -> torch.Tensor:
        if point.mode == "inference":
            with torch.no_grad():
                return output_of(module)
        output = output_of(module)
        x.grad = None
        module.zero_grad()
        output.backward(d_output)
        return x.grad

    difference = (run(ours) - run(theirs)).abs().max().item()
    if not difference <= 1e-3:
        raise ArithmeticError(f"fastseq and torch.nn differ by {difference:.1e} at {point}: nothing was timed")
    once = min(_seconds(run, theirs, 1) for _ in range(2)) + min(_seconds(run, ours, 1) for _ in range(2))
    repeats = max(1, round(2 * BURST / once))
    rounds = max(3, min(rounds, int(seconds / (once * repeats))))
    samples: dict[str, list[float]] = {"torch": [], "fastseq": []}
    for i in range(rounds):
        sides = [("torch", theirs), ("fastseq", ours)]
        for name, module in sides if i % 2 == 0 else reversed(sides):
            samples[name].append(_seconds(run, module, repeats) / repeats * 1e3)
    ratios = [a / b for a, b in zip(samples["torch"], samples["fastseq"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    torch_ms, fastseq_ms = (statistics.median(samples[name]) for name in ("torch", "fastseq"))
    return Row(point, torch_ms, fastseq_ms, torch_ms / fastseq_ms, low, high, difference)


def _seconds(run: Callable[[torch.nn.Module], object], module: torch.nn.Module, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run(module)
    return time.perf_counter() - begin
