"""One point of the benchmark: a layer of torch.nn and ours with the same weights, timed in turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

import fastseq

CELLS = ("RNN", "GRU", "LSTM")
MODES = ("inference", "training")  # training: forward and backward
BURST = 0.02  # seconds one side computes before it is the other's turn


@dataclass(frozen=True)
class Point:
    """What is timed: one layer, I = H, float32."""

    cell: str
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


def quick_grid(cells: tuple[str, ...] = CELLS) -> list[Point]:
    """Under two minutes: a single row, a few, many."""
    sizes = [(1, 1, 256), (100, 1, 128), (100, 16, 256), (50, 64, 256)]
    return [Point(cell, *size, mode) for cell, size, mode in itertools.product(cells, sizes, MODES)]


def full_grid(cells: tuple[str, ...] = CELLS) -> list[Point]:
    """T in 1, 100, 512; B in 1, 16, 64; H in 64, 128, 256, 512."""
    sizes = itertools.product((1, 100, 512), (1, 16, 64), (64, 128, 256, 512))
    return [Point(cell, *size, mode) for cell, size, mode in itertools.product(cells, sizes, MODES)]


def compare(point: Point, rounds: int = 7, seconds: float = 30.0) -> Row:
    """Times a point.

    Args:
        point: what to time.
        rounds: bursts of each side; fewer (at least three) where they would take longer than `seconds` in all.
        seconds: see rounds.

    Raises:
        ArithmeticError: the two sides do not compute the same; nothing is timed then.
    """
    torch.manual_seed(0)
    theirs = getattr(torch.nn, point.cell)(point.H, point.H)
    ours = getattr(fastseq, point.cell)(point.H, point.H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(point.T, point.B, point.H, requires_grad=point.mode == "training")
    d_output = torch.randn(point.T, point.B, point.H)

    def run(layer: torch.nn.Module) -> torch.Tensor:
        if point.mode == "inference":
            with torch.no_grad():
                return layer(x)[0]
        output = layer(x)[0]
        x.grad = None
        layer.zero_grad()
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
        for name, layer in sides if i % 2 == 0 else reversed(sides):
            samples[name].append(_seconds(run, layer, repeats) / repeats * 1e3)
    ratios = [a / b for a, b in zip(samples["torch"], samples["fastseq"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    torch_ms, fastseq_ms = (statistics.median(samples[name]) for name in ("torch", "fastseq"))
    return Row(point, torch_ms, fastseq_ms, torch_ms / fastseq_ms, low, high, difference)


def _seconds(run: Callable[[torch.nn.Module], object], layer: torch.nn.Module, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run(layer)
    return time.perf_counter() - begin
