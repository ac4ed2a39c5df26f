"""How much memory a call needs beyond what was there before, measured, and what the formula says of ours."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastseq import _load
from fastseq.bench.grid import CELLS, MODES, Point

SIZES = ((100, 16, 256), (500, 16, 128), (100, 64, 512))
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Of a process that measures: what is freed goes back to the system, so that its peak is that of one call."""


def points() -> list[Point]:
    """What is measured."""
    return [Point(cell, mode, "float32", T, B, H, H) for cell in CELLS for mode in MODES for T, B, H in SIZES]


def peak(call: Callable[[], Any]) -> int:
    """Bytes resident at the peak of one call beyond those before it; output and gradients included.

    Raises:
        OSError: the system does not let a process reset its peak (Linux does).
    """
    _load._C.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = call()
    after = _status("VmHWM")
    del kept
    return max(0, after - before)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return 1024 * int(found.group(1))


def formula(point: Point) -> int:
    """Bytes of what ours keeps for backward: each layer's output, the last one's too, and a direction's planes.

    4 L N D (H + kept H) with N = T B, of which 4 N D H are the caller's as well; kept is the number of planes,
    `_C.cells()[cell]["kept"]`. In inference nothing is kept, and this is zero: what is measured there is the output,
    4 N D H, one chunk and the packed weights.
    """
    if point.mode == "inference":
        return 0
    kept = _load._C.cells()[point.case().cell]["kept"]
    return 4 * point.layers * point.T * point.B * point.directions * (1 + kept) * point.H
