"""The bars that fastseq holds itself to: as data, and how a run's document is measured against them.

They are meant for two threads on a machine of two cores with AVX-512; elsewhere they are read as a comparison.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from fastseq.bench import results, roofline, scenarios
from fastseq.bench.grid import BATCH_SERIES, DTYPES, LENGTH_SERIES, MODES, STEPS_SERIES, AttentionPoint, Point
from fastseq.bench.peers import OURS
from fastseq.bench.results import Document, Row

LIBRARIES = ("torch.nn", "torch cells", "onnxruntime", "openvino", "jax")
TRAINERS = ("torch.nn", "torch cells", "jax")


class Value(NamedTuple):
    """Of a point or a series, by its key; at_limit: what it would be if our time was the row's limit."""

    key: str
    reached: float
    at_limit: float | None = None


@dataclass(frozen=True)
class Bar:
    """One thing that has to hold.

    Attributes:
        what: in words. required: the bound of the values.
        how: "at least": of every value; "at most": likewise; "geomean": the geometric mean is at least that.
        values: what a document has to say about it.
        unit: of the numbers.
    """

    what: str
    required: float
    how: Literal["at least", "at most", "geomean"]
    values: Callable[[Document], Iterable[Value]]
    unit: str = ""

    def evaluate(self, document: Document) -> Outcome:
        """What the document reaches."""
        values = sorted(self.values(document), key=lambda value: value.reached, reverse=self.how == "at most")
        if not values:
            return Outcome(self, None, None, 0)
        if self.how == "geomean":
            mean = statistics.geometric_mean([value.reached for value in values])
            return Outcome(self, mean, values[0], len(values))
        misses = tuple(value for value in values if not self.holds(value.reached))
        return Outcome(self, values[0].reached, values[0], len(values), misses)

    def holds(self, reached: float) -> bool:
        """Whether that is enough."""
        return reached <= self.required if self.how == "at most" else reached >= self.required

    @property
    def bound(self) -> str:
        """What is required, as a text."""
        sign = {"at least": "≥", "at most": "≤", "geomean": "geomean ≥"}[self.how]
        return f"{sign} {self.required:g}{self.unit}"


@dataclass(frozen=True)
class Outcome:
    """What became of a bar; `reached` and `worst` are None where nothing of it was measured. `misses`: the points below
    the bar, the worst first; of a geometric mean none.
    """

    bar: Bar
    reached: float | None
    worst: Value | None
    points: int
    misses: tuple[Value, ...] = ()

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        return None if self.reached is None else self.bar.holds(self.reached)

    def cells(self) -> tuple[str, str, str, str, str]:
        """Bar, required, reached, worst point and whether it is met, as texts for a table."""
        if self.reached is None or self.worst is None:
            return self.bar.what, self.bar.bound, "–", "–", "not measured"
        reached = f"{self.reached:.3g}{self.bar.unit} ({self.points} point{'s' * (self.points > 1)})"
        worst = f"{self.worst.key}: {self.worst.reached:.3g}{self.bar.unit}"
        return self.bar.what, self.bar.bound, reached, worst, "yes" if self.met else "NO"


def outcomes(document: Document) -> list[Outcome]:
    """Of all bars."""
    return [bar.evaluate(document) for bar in BARS]


# ---- What values are made of ----------------------------------------------------------------------------------------


def _rows(document: Document, fits: Callable[[Point], bool], form: str = "layer", dtype: str = "float32") -> list[Row]:
    return [
        row
        for row in results.rows(document)
        if row.ours
        and isinstance(row.point, Point)
        and row.point.form == form
        and row.point.dtype == dtype
        and fits(row.point)
    ]


def _of(row: Row, reached: float) -> Value:
    """A number that grows as our time shrinks."""
    assert row.ours
    return Value(row.point.key, reached, reached * row.ours.median / row.limit if row.limit else None)


def _against(
    peers: tuple[str, ...], fits: Callable[[Point], bool], form: str = "layer", dtype: str = "float32"
) -> Callable[[Document], Iterable[Value]]:
    """Ratios to the fastest of some peers."""

    def values(document: Document) -> Iterable[Value]:
        for row in _rows(document, fits, form, dtype):
            if best := row.best_peer(peers):
                yield _of(row, row.ratio(best) or 0.0)

    return values


def _microseconds(fits: Callable[[Point], bool]) -> Callable[[Document], Iterable[Value]]:
    def values(document: Document) -> Iterable[Value]:
        for row in _rows(document, fits):
            assert row.ours
            yield Value(row.point.key, row.ours.median * 1e6, row.limit and row.limit * 1e6)

    return values


def _fraction(fits: Callable[[Point], bool]) -> Callable[[Document], Iterable[Value]]:
    def values(document: Document) -> Iterable[Value]:
        for row in _rows(document, fits):
            if row.fraction is not None:
                yield _of(row, row.fraction)

    return values


def _bfloat16_against_float32(mode: str) -> Callable[[Document], Iterable[Value]]:
    def fits(p: Point) -> bool:
        return p.mode == mode and (p.T, p.B, p.H) in ((100, 64, 512), (50, 128, 1024))

    def values(document: Document) -> Iterable[Value]:
        single = {row.point: row for row in _rows(document, fits)}
        for row in _rows(document, fits, dtype="bfloat16"):
            other = single.get(Point(**row.point.as_dict() | {"dtype": "float32"}))
            if other and other.ours and row.ours:
                yield _of(row, other.ours.median / row.ours.median)

    return values


def _linearity(sizes: tuple[tuple[int, int, int], ...], letter: str) -> Callable[[Document], Iterable[Value]]:
    """The largest relative distance of a series' times from the straight line, with an offset, that fits them best."""

    def values(document: Document) -> Iterable[Value]:
        series: dict[str, list[tuple[int, float]]] = {}
        for row in _rows(document, lambda p: (p.T, p.B, p.H) in sizes and p.I == p.H and p.layers * p.directions == 1):
            assert row.ours
            name = f"{row.point.cell} {row.point.mode}, time against {letter}"
            series.setdefault(name, []).append((getattr(row.point, letter), row.ours.median))
        for name, points in series.items():
            if len(points) > 2:
                yield Value(name, distance_from_a_line(points))

    return values


def distance_from_a_line(points: Iterable[tuple[int, float]]) -> float:
    """Of (size, time): the largest |a + b size - time| / time, with a and b that minimise their squares."""
    size, time = np.array(sorted(points), dtype=float).T
    design = np.stack((1 / time, size / time), axis=1)
    line = np.linalg.lstsq(design, np.ones_like(time), rcond=None)[0]
    return float(np.abs(design @ line - 1).max())


def _busy(document: Document) -> Iterable[Value]:
    for key, found in document["busy"].items():
        if "failed" not in found:
            for name, ratio in zip(("mean", "median"), scenarios.busy_ratios(found), strict=True):
                yield Value(f"{key}, {name}", ratio)


def _streams(measure: str, ours_over_theirs: bool) -> Callable[[Document], Iterable[Value]]:
    def values(document: Document) -> Iterable[Value]:
        for key, found in document["streams"].items():
            sides = found.get("sides", {})
            if len(sides) == 2:
                ours, theirs = (statistics.median(sides[name][measure]) for name in (OURS, "onnxruntime"))
                yield Value(key, ours / theirs if ours_over_theirs else theirs / ours)

    return values


def _size(mode: str, cell: str, *size: int) -> Callable[[Point], bool]:
    """One layer in one direction, with I = H."""

    def fits(p: Point) -> bool:
        return (p.cell, p.mode, p.T, p.B, p.H, p.I) == (cell, mode, *size, size[2]) and p.layers * p.directions == 1

    return fits


def _attention(document: Document, fits: Callable[[AttentionPoint], bool]) -> list[Row]:
    return [
        row for row in results.rows(document) if row.ours and isinstance(row.point, AttentionPoint) and fits(row.point)
    ]


def _attention_against(
    peers: tuple[str, ...], fits: Callable[[AttentionPoint], bool]
) -> Callable[[Document], Iterable[Value]]:
    def values(document: Document) -> Iterable[Value]:
        for row in _attention(document, fits):
            if best := row.best_peer(peers):
                yield _of(row, row.ratio(best) or 0.0)

    return values


def _attention_size(
    form: str, mode: str, dtype: str, *size: int, rotating: bool = False
) -> Callable[[AttentionPoint], bool]:
    wanted = AttentionPoint(form, mode, dtype, *size, rotating=rotating)
    return lambda p: p == wanted


def _of_register_peak(fits: Callable[[AttentionPoint], bool]) -> Callable[[Document], Iterable[Value]]:
    """Operations over what multiply-adds in registers would do in the time."""

    def values(document: Document) -> Iterable[Value]:
        peak = results.register_rate(document)
        for row in _attention(document, fits):
            assert row.ours
            if peak:
                operations = sum(product.operations for product in roofline.products(row.point))
                yield _of(row, operations / row.ours.median / peak)

    return values


def _attention_growth(document: Document) -> Iterable[Value]:
    """The largest relative distance from the straight line through the times of a form against its pairs."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in _attention(document, lambda p: (p.form, p.B, p.N, p.L, p.S, p.D) in LENGTH_SERIES):
        assert row.ours and isinstance(row.point, AttentionPoint)
        name = f"{row.point.form} attention {row.point.mode}, time against L"
        series.setdefault(name, []).append((row.point.pairs, row.ours.median))
    for name, points in series.items():
        if len(points) > 2:
            yield Value(name, distance_from_a_line(points))


# ---- The bars -------------------------------------------------------------------------------------------------------

ATTENTION_BARS = (
    ("float32", "causal", (1, 12, 512, 512, 64), 2.4, 2.6),
    ("float32", "causal", (1, 12, 1024, 1024, 64), 1.8, 1.9),
    ("float32", "causal", (1, 16, 1024, 1024, 128), 1.6, 1.6),
    ("float32", "full", (1, 8, 2048, 2048, 64), 1.25, 1.3),
    ("float32", "full", (8, 8, 128, 128, 32), 1.9, 2.0),
    ("float32", "full", (32, 4, 64, 64, 64), 1.9, 2.1),
    ("float32", "window", (1, 12, 4096, 4096, 64), 6.0, 5.0),
    ("bfloat16", "causal", (1, 12, 512, 512, 64), 4.5, 2.5),
    ("bfloat16", "causal", (1, 12, 1024, 1024, 64), 3.2, 2.5),
    ("bfloat16", "full", (1, 8, 2048, 2048, 64), 2.2, 2.5),
    ("bfloat16", "full", (8, 8, 128, 128, 32), 3.5, 2.5),
)
"""dtype, form, (B, N, L, S, D), and the bounds of inference and training."""

BARS: tuple[Bar, ...] = (
    Bar(
        "inference, T ≥ 16, against the best library",
        1.0,
        "at least",
        _against(LIBRARIES, lambda p: p.mode == "inference" and p.T >= 16),
    ),
    Bar(
        "inference, T ≥ 16 and B ≤ 4, against the best library",
        1.2,
        "at least",
        _against(LIBRARIES, lambda p: p.mode == "inference" and p.T >= 16 and p.B <= 4),
    ),
    Bar(
        "the same over all of them",
        1.4,
        "geomean",
        _against(LIBRARIES, lambda p: p.mode == "inference" and p.T >= 16),
    ),
    Bar(
        "one step of one row, H = 256, GRU, against ONNX Runtime",
        1.0,
        "at least",
        _against(("onnxruntime",), _size("inference", "GRU", 1, 1, 256)),
    ),
    Bar(
        "one step of one row, H = 256, LSTM, against ONNX Runtime",
        1.0,
        "at least",
        _against(("onnxruntime",), _size("inference", "LSTM", 1, 1, 256)),
    ),
    Bar(
        "one step of one row, H = 256, GRU's time",
        25,
        "at most",
        _microseconds(_size("inference", "GRU", 1, 1, 256)),
        " µs",
    ),
    Bar(
        "one step of one row, H = 256, RNN's time",
        15,
        "at most",
        _microseconds(_size("inference", "RNN", 1, 1, 256)),
        " µs",
    ),
    Bar(
        "training, RNN and GRU, against the best of torch and jax",
        1.4,
        "at least",
        _against(TRAINERS, lambda p: p.mode == "training" and p.cell != "LSTM"),
    ),
    Bar(
        "training, LSTM, against the best of torch and jax",
        1.1,
        "at least",
        _against(TRAINERS, lambda p: p.mode == "training" and p.cell == "LSTM"),
    ),
    Bar(
        "training, over all of them",
        2.2,
        "geomean",
        _against(TRAINERS, lambda p: p.mode == "training"),
    ),
    Bar("both modes, T ≥ 50, against bare oneDNN", 0.97, "at least", _against(("onednn",), lambda p: p.T >= 50)),
    Bar("the same over all of them", 1.2, "geomean", _against(("onednn",), lambda p: p.T >= 50)),
    Bar(
        "training of single rows, T ≥ 50, against bare oneDNN",
        1.5,
        "at least",
        _against(("onednn",), lambda p: p.T >= 50 and p.B == 1 and p.mode == "training"),
    ),
    Bar(
        "inference, RNN and GRU, against torch.nn",
        3.5,
        "geomean",
        _against(("torch.nn",), lambda p: p.mode == "inference" and p.cell != "LSTM"),
    ),
    Bar(
        "training, RNN and GRU, against torch.nn",
        5.0,
        "geomean",
        _against(("torch.nn",), lambda p: p.mode == "training" and p.cell != "LSTM"),
    ),
    *(
        Bar(
            f"GRU training at {size}, against torch.nn",
            required,
            "at least",
            _against(("torch.nn",), _size("training", "GRU", *size)),
        )
        for size, required in (((100, 1, 128), 20.0), ((100, 1, 512), 5.0), ((100, 16, 256), 2.0))
    ),
    *(
        Bar(f"bfloat16 {mode} against our float32, large sizes", 1.8, "at least", _bfloat16_against_float32(mode))
        for mode in ("inference", "training")
    ),
    Bar(
        "bfloat16, T ≥ 16, against OpenVINO and torch",
        1.0,
        "at least",
        _against(("openvino", "torch.nn"), lambda p: p.T >= 16, dtype="bfloat16"),
    ),
    Bar(
        "the same over all of them",
        1.3,
        "geomean",
        _against(("openvino", "torch.nn"), lambda p: p.T >= 16, dtype="bfloat16"),
    ),
    Bar(
        "lengths in [T/4, T], training, RNN and GRU, against torch.nn packed",
        5.0,
        "at least",
        _against(("torch.nn",), lambda p: p.mode == "training" and p.cell != "LSTM", form="lengths"),
    ),
    Bar(
        "lengths in [T/4, T], training, LSTM, against torch.nn packed",
        3.0,
        "at least",
        _against(("torch.nn",), lambda p: p.mode == "training" and p.cell == "LSTM", form="lengths"),
    ),
    Bar(
        "fraction of the floor, B ≥ 64 and H ≥ 256, inference",
        0.85,
        "at least",
        _fraction(lambda p: p.mode == "inference" and p.B >= 64 and p.H >= 256),
    ),
    Bar(
        "fraction of the floor, B ≥ 64 and H ≥ 256, training",
        0.75,
        "at least",
        _fraction(lambda p: p.mode == "training" and p.B >= 64 and p.H >= 256),
    ),
    Bar(
        "fraction of the floor, B = 1, T ≥ 100, H of 128 and 512",
        0.6,
        "at least",
        _fraction(lambda p: p.B == 1 and p.T >= 100 and p.H in (128, 512)),
    ),
    Bar("time against T, distance from a line", 0.1, "at most", _linearity(STEPS_SERIES, "T")),
    Bar("time against B beyond 16, distance from a line", 0.1, "at most", _linearity(BATCH_SERIES, "B")),
    Bar("beside a busy process, over our one thread alone", 1.5, "at most", _busy),
    Bar(
        "eight streams of single rows, calls a second, against ONNX Runtime",
        1.0,
        "at least",
        _streams("calls_per_second", True),
    ),
    Bar(
        "eight streams of single rows, 99th percentile of a call, against ONNX Runtime",
        1.0,
        "at least",
        _streams("p99", False),
    ),
    *(
        Bar(
            f"attention, {form} ({', '.join(map(str, size))}), {dtype} {mode}, against torch",
            required,
            "at least",
            _attention_against(("torch.nn",), _attention_size(form, mode, dtype, *size)),
        )
        for dtype, form, size, *bounds in ATTENTION_BARS
        for mode, required in zip(MODES, bounds, strict=True)
    ),
    *(
        Bar(
            f"attention of one query to 1024 keys, {dtype}, {'from memory' if rotating else 'in cache'}, against torch",
            required,
            "at least",
            _attention_against(
                ("torch.nn",),
                _attention_size("full", "inference", dtype, 1, 12, 1, 1024, 64, rotating=rotating),
            ),
        )
        for dtype, rotating, required in (
            ("float32", False, 2.0),
            ("bfloat16", False, 20.0),
            ("float32", True, 1.35),
            ("bfloat16", True, 8.0),
        )
    ),
    Bar(
        "attention of small heads, against ONNX Runtime and plain products",
        1.0,
        "at least",
        _attention_against(
            ("onnxruntime", "torch matmul"),
            lambda p: p.dtype == "float32" and (p.B, p.N, p.L, p.D) in ((8, 8, 128, 32), (32, 4, 64, 64)),
        ),
    ),
    *(
        Bar(
            f"attention, {form} L = {size[2]}, {mode}, fraction of the multiply-adds in registers",
            required,
            "at least",
            _of_register_peak(_attention_size(form, mode, "float32", *size)),
        )
        for form, size, required in (("full", (1, 8, 2048, 2048, 64), 0.82), ("causal", (1, 12, 1024, 1024, 64), 0.75))
        for mode in MODES
    ),
    Bar("attention's time against its pairs, distance from a line", 0.1, "at most", _attention_growth),
    *(
        Bar(
            f"attention, {dtype}, all points, against {who}",
            1.0,
            "at least",
            _attention_against(peers, lambda p, dtype=dtype: p.dtype == dtype),
        )
        for dtype in DTYPES
        for who, peers in (
            ("torch", ("torch.nn", "torch matmul")),
            ("jax, ONNX Runtime and OpenVINO", ("jax", "onnxruntime", "openvino")),
        )
    ),
)
