"""What a peer has to be able to do."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastseq.bench.grid import AnyPoint
from fastseq.bench.problem import Array


class Unsupported(Exception):
    """The peer does not do what a point asks for; the message says why, in half a sentence."""


@dataclass
class Prepared:
    """A point ready to be timed.

    Attributes:
        call: runs it once, to the end, as a user's Python would.
        results: "output" (T, B, D*H), and in training "d_x" and "d_" of each parameter by torch.nn's names; of
            attention "output" (B, N, L, D), and in training "d_q", "d_k" and "d_v"; float32.
        settings: what was chosen besides the number of threads, for the report.
        pids: the processes that compute, whose thread pools must sleep before it is another's turn.
        burst: seconds of so many calls, where it is not Python that calls.
    """

    call: Callable[[], Any]
    results: dict[str, Array]
    settings: str = ""
    pids: list[int] = field(default_factory=lambda: [os.getpid()])
    burst: Callable[[int], float] | None = None

    def seconds(self, calls: int) -> float:
        """Of so many calls in a row."""
        if self.burst is not None:
            return self.burst(calls)
        call = self.call
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - begin


class Peer:
    """One library. A subclass states its distributions and prepares points.

    Attributes:
        name: in tables.
        distributions: what must be installed for it, by the names that pip knows.
        threads_at_start: whether the number of threads is fixed when the process starts, so that each number needs a
            process of its own.
    """

    name: str
    distributions: tuple[str, ...] = ()
    threads_at_start = False

    def missing(self) -> str | None:
        """Why it cannot run on this machine at all; None where it can."""
        for distribution in self.distributions:
            try:
                importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                return f"{distribution} is not installed (make bench, or pip install 'fastseq[bench]')"
        return None

    def version(self) -> str:
        """Of what is installed."""
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.distributions)

    def unsupported(self, point: AnyPoint) -> str | None:
        """Why it does not do this point, in half a sentence, as far as that is known beforehand; None where it does."""
        raise NotImplementedError

    def start(self, threads: int) -> None:
        """Called once in a process of its own, before anything is prepared."""

    def use_threads(self, threads: int) -> None:
        """Called before what was prepared for so many threads runs, where a library has one setting for all of it."""

    def gemm_rate(self, dtype: str, size: int, threads: int) -> float | None:
        """FLOP/s of its product of two matrices (size, size), for the peak of the machine; None where it has none."""
        return None

    def prepare(self, point: AnyPoint, threads: int) -> Prepared:
        """Builds the point from `Numbers.of(point)`, or `AttentionNumbers.of(point)`, and runs it once.

        Raises:
            Unsupported: it turns out here that the peer does not do this.
        """
        raise NotImplementedError
