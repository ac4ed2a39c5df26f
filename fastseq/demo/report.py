"""What the demo found for each cell: the numbers, the verdicts, the picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT64_BOUND = 1e-9  # over the first steps, in float64
FLOAT32_BOUND = 1e-3  # over the whole run, in float32; or
DRIFTS = 5  # so often what a rounding error in its initial weights makes of torch.nn's own losses
RATIO_BARS = {"GRU": 1.3, "RNN": 1.2, "LSTM": 1.0}  # at the default size with two threads


@dataclass
class CellReport:
    """One cell's race."""

    cell: str
    losses: dict[str, list[float]]  # of fastseq and torch.nn, nats per character, one a step
    characters_per_second: dict[str, float]
    float32_difference: float
    float64_difference: float
    float64_steps: int
    float32_drift: float | None = None  # of torch.nn from itself, asked for where the difference is above the bound
    bits: dict[str, float] = field(default_factory=dict)  # validation bits per character
    sample: str = ""
    complete: bool = True

    @property
    def ratio(self) -> float:
        """fastseq's characters per second over torch.nn's."""
        return self.characters_per_second["fastseq"] / self.characters_per_second["torch.nn"]

    def verdicts(self) -> list[tuple[str, bool]]:
        """What has to hold whatever the machine: the two libraries compute the same."""
        bound, why = FLOAT32_BOUND, ""
        if self.float32_drift is not None and DRIFTS * self.float32_drift > bound:
            bound = DRIFTS * self.float32_drift
            why = f" ({DRIFTS} times how far torch.nn drifts from itself after a rounding error in its initial weights)"
        return [
            (
                f"float64 losses agree to {FLOAT64_BOUND:.0e} over {self.float64_steps} steps: "
                f"largest difference {self.float64_difference:.1e}",
                self.float64_difference <= FLOAT64_BOUND,
            ),
            (
                f"float32 losses agree to {bound:.0e}{why} over {len(self.losses['fastseq'])} steps: "
                f"largest difference {self.float32_difference:.1e}",
                self.float32_difference <= bound,
            ),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "ratio": self.ratio, "passed": all(passed for _, passed in self.verdicts())}


def loss_curves(reports: Sequence[CellReport], baseline_bits: float) -> bytes:
    """A PNG: for each cell the losses of both libraries, in bits per character, and the n-gram's validation bits."""
    figure, axes = axes_without_screen(len(reports), (5.2 * len(reports), 4.4))
    for axis, report in zip(axes[0], reports, strict=True):
        for name, style in (
            ("torch.nn", {"color": "#b0b0b0", "linewidth": 4}),
            ("fastseq", {"color": "#d1495b", "linewidth": 1.3}),
        ):
            label = f"{name}: {report.characters_per_second[name]:,.0f} characters/s"
            axis.plot(*smoothed(np.array(report.losses[name]) / math.log(2)), label=label, **style)
        axis.axhline(baseline_bits, color="#30638e", linestyle="--", linewidth=1, label="order-3 n-gram, validation")
        if report.bits:
            axis.plot(
                len(report.losses["fastseq"]), report.bits["fastseq"], "o", color="#d1495b", label="fastseq, validation"
            )
        axis.set_title(f"{report.cell}: {report.ratio:.2f} × torch.nn")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=9)
    axes[0][0].set_ylabel("loss, bits per character")
    low = min([baseline_bits, *(min(r.losses["fastseq"]) / math.log(2) for r in reports if r.losses["fastseq"])])
    axes[0][0].set_ylim(max(0.0, low - 0.5), 6.0)
    figure.suptitle("A character language model on Python's standard library, both libraries from the same weights")
    return png(figure)


def axes_without_screen(columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure with a row of axes (1, columns)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, columns, figsize=size, sharey=True, squeeze=False)


def smoothed(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the means over the sixtieth of the curve that ends at each."""
    width = max(1, len(curve) // 60)
    means = np.convolve(curve, np.full(width, 1 / width), mode="valid") if len(curve) else curve
    return np.arange(len(means)) + width, means


def png(figure: Figure) -> bytes:
    """The figure's file; the figure is closed."""
    from matplotlib import pyplot as plt

    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
