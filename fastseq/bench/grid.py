"""What is measured: the points of the grid as data, and the two choices of them, quick and full.

Letters: T time steps, B batch, I input size, H hidden size, L layers, D directions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastseq import _load
from fastseq.testing import Case

CELLS = ("RNN", "GRU", "LSTM")
MODES = ("inference", "training")  # a call under no_grad; forward and backward, of x and of every parameter
DTYPES = ("float32", "bfloat16")
FORMS = ("layer", "cells", "lengths")  # a layer; a cell called once a step from Python; a layer over rows of any length

SIZES = (
    (1, 1, 64),
    (1, 1, 256),
    (1, 16, 256),
    (16, 256, 64),
    (100, 1, 64),
    (100, 1, 128),
    (100, 1, 512),
    (100, 4, 128),
    (100, 16, 256),
    (100, 64, 256),
    (100, 64, 512),
    (50, 128, 1024),
    (512, 32, 128),
    (2000, 1, 128),
)
"""(T, B, H), with I = H."""
INPUT_SIZES = ((1, 20), (80, 300), (400, 650), (400, 1150))
"""(I, H), with T = 100 and B = 1 and 16: I and H differ, and H is no power of two."""
QUICK_SIZES = ((1, 1, 256), (100, 1, 128), (100, 16, 256))
QUICK_SERIES = tuple((T, 1, 128) for T in (25, 50, 100))
CELL_SIZES = ((50, 1, 256), (50, 64, 256))
LENGTHS_SIZE = (100, 16, 256)
STEPS_SERIES = tuple((T, 4, 128) for T in (25, 50, 100, 200, 400, 800))
BATCH_SERIES = tuple((50, B, 256) for B in (16, 32, 64, 128, 256))
"""Time against T, and against B beyond 16: both have to grow in proportion."""


@dataclass(frozen=True)
class Point:
    """One row of the benchmark: one call, of a size, in a mode.

    Attributes:
        cell: RNN (tanh), GRU or LSTM, the name of the class in fastseq and in torch.nn.
        mode: one of MODES. dtype: one of DTYPES. form: one of FORMS.
        T, B, I, H, layers, directions: the sizes. In the form "lengths" rows have uniform lengths in [T/4, T].
    """

    cell: str
    mode: str
    dtype: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    directions: int = 1
    form: str = "layer"

    @property
    def key(self) -> str:
        """The name of the row, by which runs are compared."""
        words = [self.cell, self.mode, self.dtype, f"T{self.T} B{self.B} I{self.I} H{self.H}"]
        words += [f"L{self.layers}"] if self.layers > 1 else []
        words += ["bidirectional"] if self.directions == 2 else []
        words += [self.form] if self.form != "layer" else []
        return " ".join(words)

    @property
    def gates(self) -> int:
        """G."""
        return _load._C.cells()[self.case().cell]["gates"]

    def case(self) -> Case:
        """The point as a case of `fastseq.testing`, which draws its numbers; dense, in float32."""
        return Case(
            cell="rnn_tanh" if self.cell == "RNN" else self.cell.lower(),
            T=self.T,
            B=self.B,
            I=self.I,
            H=self.H,
            layers=self.layers,
            bidirectional=self.directions == 2,
            state=False,
            dtype=torch.float32,
        )

    def lengths(self) -> torch.Tensor | None:
        """(B,) of int64, the first of them T; None unless the form is "lengths"."""
        if self.form != "lengths":
            return None
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(max(1, self.T // 4), self.T + 1, (self.B,), generator=generator)
        lengths[0] = self.T
        return lengths

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `Point(**data)` undoes it."""
        return asdict(self)


def full() -> list[Point]:
    """Every point: some two hours with all peers."""
    sizes = [(T, B, H, H) for T, B, H in SIZES] + [(100, B, I, H) for B in (1, 16) for I, H in INPUT_SIZES]
    stacks = ((1, 1), (2, 1), (1, 2), (2, 2))
    layers = [
        Point(cell, mode, dtype, T, B, I, H, *stack)
        for stack, dtype, cell, mode, (T, B, I, H) in itertools.product(stacks, DTYPES, CELLS, MODES, sizes)
    ]
    return _once([*layers, *_forms(CELL_SIZES, MODES), *scaling()])


def quick() -> list[Point]:
    """Under two minutes with all peers: one step, one row, some rows; a little of bfloat16, each form, and growth."""
    layers = [
        Point(cell, mode, "float32", T, B, H, H)
        for cell, mode, (T, B, H) in itertools.product(CELLS, MODES, QUICK_SIZES)
    ]
    small = Point("GRU", "inference", "bfloat16", 100, 4, 128, 128)
    series = [Point("GRU", "inference", "float32", T, B, H, H) for T, B, H in QUICK_SERIES]
    return _once([*layers, small, *series, *_forms(CELL_SIZES[:1], MODES[:1])])


def scaling() -> list[Point]:
    """The series in T and in B."""
    return [
        Point(cell, mode, "float32", T, B, H, H)
        for cell, mode, (T, B, H) in itertools.product(CELLS, MODES, STEPS_SERIES + BATCH_SERIES)
    ]


def _forms(cell_sizes: Sequence[tuple[int, int, int]], modes: Sequence[str]) -> Iterable[Point]:
    for cell, mode in itertools.product(CELLS, modes):
        for T, B, H in cell_sizes:
            yield Point(cell, mode, "float32", T, B, H, H, form="cells")
    T, B, H = LENGTHS_SIZE
    for cell in CELLS:
        yield Point(cell, "training", "float32", T, B, H, H, form="lengths")


def _once(points: Iterable[Point]) -> list[Point]:
    return list(dict.fromkeys(points))


def choose(
    points: Iterable[Point],
    *,
    cells: Sequence[str] = (),
    modes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    forms: Sequence[str] = (),
    layers: Sequence[int] = (),
    directions: Sequence[int] = (),
    sizes: Sequence[str] = (),
) -> list[Point]:
    """The points that fit; an empty choice takes all.

    Args:
        sizes: conditions that must all hold, as "T>=16", "B=1", "H!=256", on T, B, I and H.

    Raises:
        ValueError: a condition cannot be read.
    """
    wanted = {"cell": cells, "mode": modes, "dtype": dtypes, "form": forms, "layers": layers, "directions": directions}
    conditions = [_condition(text) for text in sizes]
    return [
        point
        for point in points
        if all(not values or getattr(point, name) in values for name, values in wanted.items())
        and all(_holds(getattr(point, letter), sign, number) for letter, sign, number in conditions)
    ]


_SIGNS = ("<=", ">=", "!=", "=", "<", ">")


def _condition(text: str) -> tuple[str, str, int]:
    letter, rest = text.strip()[:1], text.strip()[1:].strip()
    sign = next((sign for sign in _SIGNS if rest.startswith(sign)), None)
    if letter not in "TBIH" or not letter or sign is None or not rest.removeprefix(sign).strip().isdecimal():
        raise ValueError(f"a size is chosen as T>=16, B=1 or H!=256, on T, B, I or H; got {text!r}")
    return letter, sign, int(rest.removeprefix(sign))


def _holds(value: int, sign: str, number: int) -> bool:
    outcomes = {"<": value < number, ">": value > number, "=": value == number}
    outcomes |= {"<=": value <= number, ">=": value >= number, "!=": value != number}
    return outcomes[sign]
