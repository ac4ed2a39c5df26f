"""Measures that are no single call on a quiet machine: many streams, a busy neighbour, memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastseq.bench import memory
from fastseq.bench.grid import CELLS, Point
from fastseq.bench.harness import percentile
from fastseq.bench.peers import OURS

if TYPE_CHECKING:
    from fastseq.bench.session import Session

STREAMS = 8
STREAM_SIZES = ((1, 1, 256), (100, 1, 128))
BUSY_SIZES = ((100, 1, 128), (100, 16, 256))


def stream_points() -> list[Point]:
    """One model, eight Python threads, each with single rows of its own."""
    return [Point(cell, "inference", "float32", T, B, H, H) for cell in CELLS for T, B, H in STREAM_SIZES]


def busy_points() -> list[Point]:
    """A call while another process keeps one processor busy."""
    return [
        Point(cell, mode, "float32", T, B, H, H)
        for cell in CELLS
        for mode in ("inference", "training")
        for T, B, H in BUSY_SIZES
    ]


def streams(session: Session, point: Point, sides: Sequence[str], rounds: int, seconds: float) -> dict[str, Any]:
    """STREAMS Python threads that call without a pause: for each side "calls_per_second" and "p99" seconds, of rounds.

    Each side with the number of threads that gives more calls in a trial.
    """
    found: dict[str, Any] = {}
    for name in sides:
        rates = {}
        for threads in session.thread_counts:
            worker = session.worker(name, threads)
            worker.prepare(point, threads)
            rates[threads] = len(worker.ask("streams", threads, STREAMS, seconds / 2))
            worker.settle()
        found[name] = {"threads": max(rates, key=lambda threads: rates[threads]), "calls_per_second": [], "p99": []}
    for turn in range(rounds):
        for name in sides if turn % 2 == 0 else reversed(sides):
            threads = found[name]["threads"]
            worker = session.worker(name, threads)
            taken = worker.ask("streams", threads, STREAMS, seconds)
            worker.settle()
            # Until the last stream ends its last call; all together they were at work for the sum of their calls.
            found[name]["calls_per_second"].append(len(taken) * STREAMS / sum(taken))
            found[name]["p99"].append(percentile(taken, 99))
    return {"sides": found}


def busy(session: Session, point: Point, seconds: float) -> dict[str, Any]:
    """Our calls on all threads while a process keeps one processor busy, and on one thread before that, in peace.

    Returns "alone" (one thread, in peace) and "beside" (all threads, beside it): seconds of each call.
    """
    threads = max(session.thread_counts)
    for number in {1, threads}:
        session.worker(OURS, number).prepare(point, number)
    worker = session.worker(OURS, 1)
    once = min(worker.ask("burst", 1, 1) for _ in range(3))
    calls = max(5, int(seconds / once))
    alone = worker.ask("each", 1, calls, 2 * seconds)
    program = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"
    processor = max(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", program, str(processor)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout
            other.stdout.readline()
            beside = session.worker(OURS, threads).ask("each", threads, calls, 4 * seconds)
        finally:
            other.kill()
    return {"threads": threads, "alone": alone, "beside": beside}


def busy_ratios(found: dict[str, Any]) -> tuple[float, float]:
    """(mean, median) of the calls beside the busy process, over those of one thread alone."""
    return (
        statistics.mean(found["beside"]) / statistics.mean(found["alone"]),
        statistics.median(found["beside"]) / statistics.median(found["alone"]),
    )


def memory_of_a_call(start: Callable[..., Any], point: Point, threads: int) -> dict[str, Any]:
    """Bytes that one call needs at its peak: "fastseq" and "torch.nn", each in a process of its own, and "formula"."""
    found: dict[str, Any] = {"formula": memory.formula(point)}
    for name in (OURS, "torch.nn"):
        worker = start(name, 0, memory.ENVIRONMENT)
        try:
            worker.prepare(point, threads)
            found[name] = statistics.median_high([worker.ask("peak_memory", threads) for _ in range(3)])
        finally:
            worker.close()
    return found
