"""What the machine can do at best, measured once a run, and the time below which a row cannot come.

The floor of a row is the sum over its products of

    max(operations / GEMM peak, weight bytes / bandwidth of the level that they fit in)

For each layer and direction of N rows in all (T B, or fewer with lengths) the products are

    projection   gx = x W_ihᵀ    2 N I G H operations   G H I numbers, read once
    recurrence   gh = h W_hhᵀ    2 N H G H operations   G H² numbers, read once a step, T times

and in training also dx = dgx W_ih and dW_ih = dgxᵀ x, each like the projection, dh = dgh W_hh like the recurrence,
and dW_hh = dghᵀ h, 2 N H G H operations and G H² numbers once. In the layers above the first, I is D H. The GEMM peak
is the best of torch, oneDNN and ours in the row's dtype on all processors (float32's where bfloat16's is slower). The
threads share the weights: a level holds them if all of its caches together do, and gives the bandwidth of all threads
together.

The limit of a row is the floor and what comes on top of it whatever the kernels are:

    a single row    threads that share a step's units meet at its end; or one thread does all of the products of the
                    steps alone, of one layer or direction while others do theirs. The sooner of the two
    training        torch's engine, once a call; peers that are not torch's layers do without it

Attention's products take 2 P D operations in each of B N heads, P the pairs of a query and a key that it may see: the
scores and the sum of values, and in training the scores once more, dP, dV, dK and dQ. Their bytes are those of keys and
values, which are read once, of rotating ones from memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastseq.bench.grid import AnyPoint, AttentionPoint

LEVELS = ("L1", "L2", "L3", "memory")
BYTES = {"float32": 4, "bfloat16": 2}
GEMM_SIZES = (512, 1024, 2048)
_READ_SECONDS = 0.03  # of one reading of a level's bandwidth
_SLOW_GEMM = 30e9  # FLOP/s below which larger matrices are not tried: they would take seconds


@dataclass(frozen=True)
class Product:
    """One of a row's products: operations, bytes of the weights, and how often these are read."""

    name: str
    operations: float
    weight_bytes: int
    reads: int


def products(point: AnyPoint) -> Iterator[Product]:
    """Those that the floor adds up."""
    if isinstance(point, AttentionPoint):
        operations = 2.0 * point.B * point.N * point.pairs * point.D
        read = point.B * point.N * point.S * point.D * BYTES[point.dtype]
        names = ("scores", "out") + (("scores again", "dP", "dV", "dK", "dQ") if point.mode == "training" else ())
        yield from (Product(name, operations, read, 1) for name in names)
        return
    lengths = point.lengths()
    rows = point.T * point.B if lengths is None else int(lengths.sum())
    G, H, size = point.gates, point.H, BYTES[point.dtype]
    for layer in range(point.layers):
        inputs = point.I if layer == 0 else point.directions * H
        for _ in range(point.directions):
            projection = (2.0 * rows * inputs * G * H, G * H * inputs * size)
            recurrence = (2.0 * rows * H * G * H, G * H * H * size)
            yield Product("projection", *projection, 1)
            yield Product("recurrence", *recurrence, point.T)
            if point.mode == "training":
                yield Product("dx", *projection, 1)
                yield Product("dW_ih", *projection, 1)
                yield Product("dh", *recurrence, point.T)
                yield Product("dW_hh", *recurrence, 1)


def floor(point: AnyPoint, machine: dict[str, Any]) -> float:
    """Seconds below which the point cannot come on a machine as `measure` describes it."""
    rotating = isinstance(point, AttentionPoint) and point.rotating
    peak, bandwidth = _peak(point, machine), machine["bandwidth"]
    return sum(
        _seconds(p, peak, bandwidth, "memory" if rotating else level_of(p.weight_bytes, machine["caches"]))
        for p in products(point)
    )


def _seconds(product: Product, peak: float, bandwidth: dict[str, float], level: str) -> float:
    return max(product.operations / peak, product.reads * product.weight_bytes / bandwidth[level])


def _peak(point: AnyPoint, machine: dict[str, Any]) -> float:
    return max(machine["gemm"][dtype]["rate"] for dtype in {"float32", point.dtype})


def limit(point: AnyPoint, machine: dict[str, Any]) -> float:
    """Seconds below which the point cannot come either: the floor, threads that have to meet, and torch's engine."""
    seconds = floor(point, machine)
    if point.mode == "training":
        seconds += machine["engine"]
    if isinstance(point, AttentionPoint) or point.B > 1:
        return seconds  # threads have rows of their own
    threads = machine["threads"]
    caches_of_one = {level: size // threads for level, size in machine["caches"].items()}
    peak = _peak(point, machine)
    # Directions do not wait for each other, and layers of one direction need be no more than a few steps apart.
    at_once = min(point.directions if point.directions > 1 else point.layers, threads)
    for p in products(point):
        if p.reads > 1:
            size = p.weight_bytes
            shared = _seconds(p, peak, machine["bandwidth"], level_of(size, machine["caches"]))
            alone = _seconds(p, peak / threads, machine["bandwidth of one"], level_of(size, caches_of_one)) / at_once
            seconds += max(0.0, min(alone - shared, p.reads * machine["meeting"] / at_once))
    return seconds


def level_of(size: int, caches: dict[str, int]) -> str:
    """The nearest level that holds so many bytes."""
    return next((level for level in LEVELS[:-1] if size <= caches.get(level, 0)), "memory")


def caches(threads: int, root: str = "/sys/devices/system/cpu/cpu0/cache") -> dict[str, int]:
    """Bytes of each level that so many threads have together: L1 and L2 one a core, L3 one for all that share it."""
    found = {}
    for folder in sorted(Path(root).glob("index*")):
        kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        if kind == "Instruction":
            continue
        sharers = _count((folder / "shared_cpu_list").read_text())
        instances = -(-threads // sharers)
        found[f"L{level}"] = int(size.removesuffix("K")) * 1024 * instances
    return found


def _count(cpus: str) -> int:
    ranges = [part.partition("-") for part in cpus.strip().split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


def measure(
    threads: int,
    fma_rate: Callable[[int, int], float],
    read_rate: Callable[[int, int, int], float],
    meeting_seconds: Callable[[int, int], float],
    engine_seconds: Callable[[], float],
    gemm_rates: dict[str, Callable[[str, int], float | None]],
) -> dict[str, Any]:
    """The machine as plain data: "threads", "caches", "fma", "gemm", "bandwidth", "bandwidth of one", and, in seconds,
    "meeting" and "engine".

    Args:
        threads: all of them.
        fma_rate: (iterations, threads) -> FLOP/s in registers.
        read_rate: (bytes a thread, repeats, threads) -> bytes/s.
        meeting_seconds: (times, threads) -> seconds in which the threads meet once; NaN where not all of them came.
        engine_seconds: of torch's engine for the smallest backward.
        gemm_rates: by peer, (dtype, size) -> FLOP/s on all threads, None or an error where it has no such product.
    """
    sizes = caches(threads)
    nearest = 1 << 15
    bandwidth, alone = {}, {}
    for level in LEVELS:
        # Half of what a thread has of the level, and out of reach of the level before it.
        each = sizes.get(level, 0) // threads // 2
        if level == "memory":
            each = min(4 * max(sizes.values(), default=1 << 25), 1 << 28)
        elif not each:
            continue
        each = max(each, nearest)
        bandwidth[level] = _best_read(read_rate, each, threads)
        alone[level] = _best_read(read_rate, each, 1)
        nearest = 2 * each
    return {
        "threads": threads,
        "caches": sizes,
        "fma": {str(n): _best_but_one(fma_rate, n) for n in sorted({1, threads})},
        "gemm": {dtype: _best_gemm(gemm_rates, dtype) for dtype in BYTES},
        "bandwidth": bandwidth,
        "bandwidth of one": alone,
        "meeting": _meeting(meeting_seconds, threads),
        "engine": min(engine_seconds() for _ in range(3)),
    }


def _best_but_one(fma_rate: Callable[[int, int], float], threads: int) -> float:
    """Of nine readings: during most the machine may be short of a processor, and a single one can be far off."""
    return sorted(fma_rate(2_000_000, threads) for _ in range(9))[-2]


def _meeting(meeting_seconds: Callable[[int, int], float], threads: int) -> float:
    """The best of nine readings: fewer where threads did not come, and 0, which excuses nobody, if they never did."""
    best, readings = math.inf, 0
    deadline = time.monotonic() + 5
    while threads > 1 and readings < 9 and time.monotonic() < deadline:
        seconds = meeting_seconds(10_000, threads)
        if math.isnan(seconds):
            time.sleep(0.05)
        else:
            best, readings = min(best, seconds), readings + 1
    return best if readings else 0.0


def better(found: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """The higher of two measurements of one machine, which may have been short of a processor during either."""
    if before is None:
        return found
    merged = dict(found)
    for part in ("fma", "bandwidth", "bandwidth of one"):
        merged[part] = {name: max(rate, before[part].get(name, 0.0)) for name, rate in found[part].items()}
    merged["meeting"] = min((m for m in (found["meeting"], before["meeting"]) if m), default=0.0)
    merged["engine"] = min(found["engine"], before["engine"])
    merged["gemm"] = {
        dtype: max(gemm, before["gemm"][dtype], key=lambda gemm: gemm["rate"]) for dtype, gemm in found["gemm"].items()
    }
    return merged


def _best_read(read_rate: Callable[[int, int, int], float], size: int, threads: int) -> float:
    once = read_rate(size, 1, threads)
    repeats = max(1, int(_READ_SECONDS * once / (size * threads)))
    return max(read_rate(size, repeats, threads) for _ in range(3))


def _best_gemm(gemm_rates: dict[str, Callable[[str, int], float | None]], dtype: str) -> dict[str, Any]:
    best: dict[str, Any] = {"rate": 0.0, "by": "nobody"}
    for name, gemm_rate in gemm_rates.items():
        for size in GEMM_SIZES:
            rate = gemm_rate(dtype, size)
            if rate is not None and rate > best["rate"]:
                best = {"rate": rate, "by": f"{name}, {size}"}
            if rate is None or rate < _SLOW_GEMM:
                break
    return best
