"""What is measured: the points of the grid as data, and the two choices of them, quick and full.

Letters: T time steps, B batch, I input size, H hidden size, L layers, D directions; of attention, B batch, N heads, L
queries, S keys, D head size.
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
ATTENTION = "attention"  # in the place of a cell
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
ATTENTION_FORMS = ("full", "causal", "mask", "bias", "window")
"""Every pair; causal; a bool mask, one of ten hidden; an additive bias; causal within WINDOW keys before the query."""
WINDOW = 256
ATTENTION_HEADS = ((1, 1), (1, 12), (8, 12))
ATTENTION_LENGTHS = (1, 64, 512, 2048)
ATTENTION_SIZES = (32, 64, 128)
QUICK_ATTENTION = (("full", 8, 8, 128, 128, 32), ("causal", 1, 12, 512, 512, 64), ("full", 1, 12, 1, 1024, 64))
NAMED_ATTENTION = (
    ("causal", 1, 12, 1024, 1024, 64),
    ("causal", 1, 16, 1024, 1024, 128),
    ("full", 1, 8, 2048, 2048, 64),
    ("full", 32, 4, 64, 64, 64),
    ("window", 1, 12, 4096, 4096, 64),
    *QUICK_ATTENTION,
)
"""(form, B, N, L, S, D) that the bars name."""
LENGTH_SERIES = tuple(
    (form, 1, 4, L, L, 64)
    for form, lengths in (("full", (512, 1024, 2048, 4096)), ("window", (1024, 2048, 4096, 8192)))
    for L in lengths
)
"""Time against L: as L² and, within a window, in proportion."""
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
    def label(self) -> str:
        """The row's name within a table of its mode and dtype."""
        size = f"T{self.T} B{self.B} " + (f"H{self.H}" if self.I == self.H else f"I{self.I} H{self.H}")
        stack = (f" L{self.layers}" if self.layers > 1 else "") + (" bi" if self.directions == 2 else "")
        return f"{self.cell} {size}{stack}" + (f" {self.form}" if self.form != "layer" else "")

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


@dataclass(frozen=True)
class AttentionPoint:
    """One row of attention: one call, of a size, in a mode.

    Attributes:
        form: one of ATTENTION_FORMS. mode: one of MODES. dtype: one of DTYPES.
        B, N, L, S, D: the sizes; values are of size D too.
        rotating: keys and values come from memory, as those of many layers do: each call has others.
    """

    form: str
    mode: str
    dtype: str
    B: int
    N: int
    L: int
    S: int
    D: int
    rotating: bool = False

    @property
    def cell(self) -> str:
        """ATTENTION."""
        return ATTENTION

    @property
    def key(self) -> str:
        """The name of the row, by which runs are compared."""
        sizes = f"B{self.B} N{self.N} L{self.L} S{self.S} D{self.D}"
        return f"{ATTENTION} {self.mode} {self.dtype} {sizes} {self.form}" + (" rotating" if self.rotating else "")

    @property
    def label(self) -> str:
        """The row's name within a table of its mode and dtype."""
        sizes = f"B{self.B} N{self.N} L{self.L}" + (f" S{self.S}" if self.S != self.L else "") + f" D{self.D}"
        return f"{self.form} {sizes}" + (" rotating" if self.rotating else "")

    @property
    def pairs(self) -> int:
        """Of a query and a key that it may see, in each head."""
        if self.form not in ("causal", "window"):
            return self.L * self.S
        reach = WINDOW + 1 if self.form == "window" else self.S
        return sum(min(i + 1, self.S, reach) for i in range(self.L))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `point_of` undoes it."""
        return asdict(self)


AnyPoint = Point | AttentionPoint


def point_of(data: dict[str, Any]) -> AnyPoint:
    """The point whose `as_dict` the data are."""
    return Point(**data) if "cell" in data else AttentionPoint(**data)


def attention(quick: bool = False) -> list[AttentionPoint]:
    """The points of attention: the product of sizes, those that the bars name, decoding, and growth."""
    if quick:
        rows = [AttentionPoint(form, mode, "float32", *sizes) for mode in MODES for form, *sizes in QUICK_ATTENTION]
        return [row for row in rows if row.L > 1 or row.mode == "inference"]
    product = itertools.product(ATTENTION_HEADS, ATTENTION_LENGTHS, ATTENTION_SIZES, ATTENTION_FORMS[:4], DTYPES, MODES)
    rows = [
        AttentionPoint(form, mode, dtype, *sizes)
        for dtype, mode, (form, *sizes) in itertools.product(DTYPES, MODES, NAMED_ATTENTION)
        if sizes[2] > 1 or mode == "inference"
    ]
    rows += [AttentionPoint("full", "inference", dtype, 1, 12, 1, 1024, 64, rotating=True) for dtype in DTYPES]
    rows += [AttentionPoint(form, mode, "float32", *sizes) for mode in MODES for form, *sizes in LENGTH_SERIES]
    rows += [AttentionPoint(form, mode, dtype, *heads, L, L, D) for heads, L, D, form, dtype, mode in product]
    return list(dict.fromkeys(rows))


def full() -> list[AnyPoint]:
    """Every point: some three hours with all peers."""
    sizes = [(T, B, H, H) for T, B, H in SIZES] + [(100, B, I, H) for B in (1, 16) for I, H in INPUT_SIZES]
    stacks = ((1, 1), (2, 1), (1, 2), (2, 2))
    layers = [
        Point(cell, mode, dtype, T, B, I, H, *stack)
        for stack, dtype, cell, mode, (T, B, I, H) in itertools.product(stacks, DTYPES, CELLS, MODES, sizes)
    ]
    return _once([*layers, *_forms(CELL_SIZES, MODES), *scaling(), *attention()])


def quick() -> list[AnyPoint]:
    """Under two minutes with all peers: one step, one row, some rows; a little of bfloat16, each form, and growth."""
    layers = [
        Point(cell, mode, "float32", T, B, H, H)
        for cell, mode, (T, B, H) in itertools.product(CELLS, MODES, QUICK_SIZES)
    ]
    small = Point("GRU", "inference", "bfloat16", 100, 4, 128, 128)
    series = [Point("GRU", "inference", "float32", T, B, H, H) for T, B, H in QUICK_SERIES]
    return _once([*layers, small, *series, *_forms(CELL_SIZES[:1], MODES[:1]), *attention(quick=True)])


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


def _once(points: Iterable[AnyPoint]) -> list[AnyPoint]:
    return list(dict.fromkeys(points))


def choose(
    points: Iterable[AnyPoint],
    *,
    cells: Sequence[str] = (),
    modes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    forms: Sequence[str] = (),
    layers: Sequence[int] = (),
    directions: Sequence[int] = (),
    sizes: Sequence[str] = (),
) -> list[AnyPoint]:
    """The points that fit; an empty choice takes all. What a point does not have fits no choice.

    Args:
        sizes: conditions that must all hold, as "T>=16", "B=1", "H!=256", on T, B, I and H; of attention on B, N, L, S
            and D.

    Raises:
        ValueError: a condition cannot be read.
    """
    wanted = {"cell": cells, "mode": modes, "dtype": dtypes, "form": forms, "layers": layers, "directions": directions}
    conditions = [_condition(text) for text in sizes]
    return [
        point
        for point in points
        if all(not values or getattr(point, name, None) in values for name, values in wanted.items())
        and all(hasattr(point, letter) and _holds(getattr(point, letter), *rest) for letter, *rest in conditions)
    ]


_SIGNS = ("<=", ">=", "!=", "=", "<", ">")


def _condition(text: str) -> tuple[str, str, int]:
    letter, rest = text.strip()[:1], text.strip()[1:].strip()
    sign = next((sign for sign in _SIGNS if rest.startswith(sign)), None)
    if letter not in "TBIHNLSD" or not letter or sign is None or not rest.removeprefix(sign).strip().isdecimal():
        raise ValueError(f"a size is chosen as T>=16, B=1 or H!=256, on T, B, I, H, N, L, S or D; got {text!r}")
    return letter, sign, int(rest.removeprefix(sign))


def _holds(value: int, sign: str, number: int) -> bool:
    outcomes = {"<": value < number, ">": value > number, "=": value == number}
    outcomes |= {"<=": value <= number, ">=": value >= number, "!=": value != number}
    return outcomes[sign]
