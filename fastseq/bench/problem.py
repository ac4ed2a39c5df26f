"""The numbers of a point, the same in every process, and how two results of them are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastseq.bench.grid import AttentionPoint, Point

Array = NDArray[np.float32]

OUTPUT_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-1}
"""How far a peer's result may be from ours, relative to the largest number of ours in the same array. A library that
rounds the gradient of a weight to bfloat16 at every one of 2000 steps is some 6% off; a wrong formula is farther."""


@dataclass(frozen=True)
class Numbers:
    """What a point is computed of; float32, rounded to bfloat16 where the point is in that.

    Attributes:
        x: (T, B, I).
        weights: by torch.nn's names, in its order.
        d_output: (T, B, D*H), the gradient of the output in training.
    """

    x: Array
    weights: dict[str, Array]
    d_output: Array

    @classmethod
    def of(cls, point: Point) -> Numbers:
        """Drawn from a fixed seed: every process that asks gets the same."""
        problem = point.case().problem()
        generator = torch.Generator().manual_seed(1)
        d_output = torch.randn(point.T, point.B, point.directions * point.H, generator=generator)

        def rounded(t: torch.Tensor) -> Array:
            return t.to(getattr(torch, point.dtype)).float().numpy()

        weights = dict(zip(problem.case.weight_shapes(), map(rounded, problem.weights), strict=True))
        return cls(rounded(problem.x), weights, rounded(d_output))

    def place(self, layer: int, direction: int) -> list[Array]:
        """W_ih (G*H, ·), W_hh (G*H, H), b_ih and b_hh (G*H,) of one layer and direction."""
        return [self.weights[name] for name in names_of(layer, direction)]


@dataclass(frozen=True)
class AttentionNumbers:
    """What a point of attention is computed of; float32, rounded to bfloat16 where the point is in that.

    Attributes:
        q, d_output: (B, N, L, D). k, v: (B, N, S, D).
        mask: (B, 1, L, S) of bool, True: is seen; or (N, L, S), added; or None.
    """

    q: Array
    k: Array
    v: Array
    d_output: Array
    mask: NDArray[np.generic] | None

    @classmethod
    def of(cls, point: AttentionPoint) -> AttentionNumbers:
        """Drawn from a fixed seed: every process that asks gets the same."""
        generator = torch.Generator().manual_seed(1)

        def drawn(*sizes: int) -> Array:
            t = torch.randn(sizes, generator=generator)
            return t.to(getattr(torch, point.dtype)).float().numpy()

        queries, keys = ((point.B, point.N, rows, point.D) for rows in (point.L, point.S))
        q, k, v, d_output = drawn(*queries), drawn(*keys), drawn(*keys), drawn(*queries)
        mask: NDArray[np.generic] | None = None
        if point.form == "bias":
            mask = drawn(point.N, point.L, point.S)
        elif point.form == "mask":
            seen = torch.rand(point.B, 1, point.L, point.S, generator=generator) < 0.9
            seen[..., 0] = True  # of a row that sees nothing libraries think differently
            mask = seen.numpy()
        return cls(q, k, v, d_output, mask)


def names_of(layer: int, direction: int) -> list[str]:
    """torch.nn's names of the parameters of one layer and direction."""
    suffix = f"l{layer}" + ("_reverse" if direction else "")
    return [f"{kind}_{suffix}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def disagreement(dtype: str, ours: dict[str, Array], theirs: dict[str, Array]) -> tuple[float, str | None]:
    """The largest difference, and what is wrong with a peer's results, in half a sentence; None where they agree."""
    worst = 0.0
    for is_output, tolerance in ((True, OUTPUT_TOLERANCE[dtype]), (False, GRADIENT_TOLERANCE[dtype])):
        parts = [{k: v for k, v in side.items() if (k == "output") == is_output} for side in (ours, theirs)]
        error, array = difference(*parts)
        if not error <= tolerance:
            return error, f"its {array} differs from ours by {error:.1e} of the largest number"
        worst = max(worst, error)
    return worst, None


def difference(ours: dict[str, Array], theirs: dict[str, Array]) -> tuple[float, str]:
    """The largest difference of any array, relative to the largest number of ours, and the name of that array.

    Of attention, d_q and d_k are measured by d_v, too, where it is larger: of a single key they are zero but for
    rounding. A number that is not finite, an array of another shape, one missing or one too many is a difference of
    infinity.
    """
    sizes = {name: float(np.abs(array).max(initial=0.0)) for name, array in ours.items()}
    for name in {"d_q", "d_k"} & sizes.keys():
        sizes[name] = max(sizes[name], sizes.get("d_v", 0.0))
    for name in ours.keys() ^ theirs.keys():
        return float("inf"), name
    worst = (0.0, "output")
    for name, reference in ours.items():
        array = theirs[name]
        if reference.shape != array.shape or not np.isfinite(array).all():
            return float("inf"), name
        worst = max(worst, (float(np.abs(array - reference).max(initial=0.0)) / (sizes[name] or 1.0), name))
    return worst
