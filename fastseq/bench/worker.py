"""A process for each library: what runs in it, and the handle by which the benchmark asks for bursts.

`python -m fastseq.bench.worker NAME THREADS FD` serves one peer over a socket. Only the burst itself is timed, in the
process that computes; the socket is outside.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import fastseq
from fastseq import _load
from fastseq.bench import memory, peers
from fastseq.bench.grid import AnyPoint, point_of

ANSWER_SECONDS = 600.0  # a peer that takes longer to prepare a point or to compute a burst is given up


class Failed(Exception):
    """A peer raised an error, or its process ended; the message is a line of it."""


class Service:
    """What a worker does when it is asked. Times are seconds."""

    def __init__(self, name: str) -> None:
        self.peer = peers.load(name)
        self._point: AnyPoint | None = None
        self._prepared: dict[int, peers.Prepared] = {}

    def prepare(self, point: dict[str, Any], threads: int) -> tuple[dict[str, Any], str, list[int]]:
        """Results of the first call, settings, and the processes that compute."""
        if self._point != point_of(point):
            self._prepared.clear()
            self._point = point_of(point)
        prepared = self._prepared[threads] = self.peer.prepare(self._point, threads)
        return prepared.results, prepared.settings, prepared.pids

    def burst(self, threads: int, calls: int, warm: int = 0) -> float:
        """Of so many calls in a row, after `warm` calls that do not count."""
        prepared = self._switch(threads)
        if warm:
            prepared.seconds(warm)
        return prepared.seconds(calls)

    def each(self, threads: int, calls: int, limit: float) -> list[float]:
        """Of each of so many calls; of fewer, but five, where they would take longer than `limit` in all."""
        prepared = self._switch(threads)
        taken: list[float] = []
        end = time.monotonic() + limit
        while len(taken) < calls and (len(taken) < 5 or time.monotonic() < end):
            taken.append(prepared.seconds(1))
        return taken

    def streams(self, threads: int, streams: int, seconds: float) -> list[float]:
        """Of each call that so many Python threads make side by side, each its own one after another."""
        call = self._switch(threads).call
        taken: list[list[float]] = [[] for _ in range(streams)]
        start = threading.Barrier(streams)

        def run(mine: list[float]) -> None:
            call()
            start.wait()
            end = time.perf_counter() + seconds
            before = time.perf_counter()
            while before < end:
                call()
                now = time.perf_counter()
                mine.append(now - before)
                before = now

        workers = [threading.Thread(target=run, args=(mine,)) for mine in taken]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return [second for mine in taken for second in mine]

    def peak_memory(self, threads: int) -> int:
        """Bytes beyond what there was before that one call needs at its peak."""
        return memory.peak(self._switch(threads).call)

    def fma_rate(self, iterations: int, threads: int, dtype: str = "float32") -> float:
        """FLOP/s in registers."""
        return _load._C.fma_rate(iterations, threads, dtype)

    def probe(self, iterations: int, threads: int) -> float:
        """The best of three short readings of `fma_rate`: a processor that slept comes to speed during the first."""
        return max(_load._C.fma_rate(iterations, threads) for _ in range(3))

    def read_rate(self, size: int, repeats: int, threads: int) -> float:
        """Bytes/s from wherever so many bytes a thread fit."""
        return _load._C.read_rate(size, repeats, threads)

    def meeting_seconds(self, times: int, threads: int) -> float:
        """In which threads meet once."""
        return _load._C.meeting_seconds(times, threads)

    def engine_seconds(self) -> float:
        """Of torch's engine for the backward of one multiplication of two numbers."""
        factor, taken = torch.ones(1, requires_grad=True), []
        for _ in range(300):
            product = factor * 2
            begin = time.perf_counter()
            product.backward()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    def gemm_rate(self, dtype: str, size: int, threads: int) -> float | None:
        """FLOP/s of the peer's product of square matrices; None where it has none."""
        return self.peer.gemm_rate(dtype, size, threads)

    def _switch(self, threads: int) -> peers.Prepared:
        self.peer.use_threads(threads)
        return self._prepared[threads]


def serve(name: str, threads: int, connection: Connection) -> None:
    """Answers until the other end closes."""
    service = Service(name)
    service.peer.start(threads)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("ok", getattr(service, method)(*arguments)))
        except peers.Unsupported as reason:
            connection.send(("unsupported", str(reason)))
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            connection.send(("failed", f"{type(error).__name__}: {lines[0]}"[:300]))


class Worker:
    """The handle of one such process: the methods of `Service` by name.

    Args:
        name: of the peer. threads: for peers that fix them at the start.
        environment: variables for this process beside the present ones.

    What the libraries print is dropped unless FASTSEQ_BENCH_VERBOSE is set.
    """

    def __init__(self, name: str, threads: int = 0, environment: dict[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair()
        quiet = None if os.environ.get("FASTSEQ_BENCH_VERBOSE") else subprocess.DEVNULL
        command = [sys.executable, "-m", "fastseq.bench.worker", name, str(threads), str(theirs.fileno())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=quiet,
            stderr=quiet,
            pass_fds=[theirs.fileno()],
            cwd=Path(fastseq.__file__).parents[1],  # `-m` looks there first: the very package that asks
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C is for the benchmark, which then ends its workers
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self.name = name
        self.pids = [self._process.pid]

    def ask(self, method: str, *arguments: Any) -> Any:
        """The answer of `Service.method(*arguments)`.

        Raises:
            Unsupported: the peer does not do this.
            Failed: it raised something else, or is no more.
        """
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(ANSWER_SECONDS):
                self.close()
                raise Failed(f"no answer within {ANSWER_SECONDS:.0f} s")
            status, value = self._connection.recv()
        except (EOFError, OSError):
            self.close()
            raise Failed(f"its process ended with code {self._process.returncode}") from None
        if status == "unsupported":
            raise peers.Unsupported(value)
        if status == "failed":
            raise Failed(value)
        return value

    def prepare(self, point: AnyPoint, threads: int) -> tuple[dict[str, Any], str]:
        """Results of the first call by name, and the settings."""
        results, settings, pids = self.ask("prepare", point.as_dict(), threads)
        self.pids = sorted({self._process.pid, *pids})
        return results, settings

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return not self._connection.closed and self._process.poll() is None

    def close(self) -> None:
        """Ends the process; its own children end with their pipes."""
        if not self._connection.closed:
            self._connection.close()
        self._process.kill()
        self._process.wait()

    def settle(self, limit: float = 0.5) -> bool:
        """Waits until its thread pools have stopped spinning: all threads asleep at two looks. False if never."""
        end, asleep = time.monotonic() + limit, 0
        while time.monotonic() < end:
            time.sleep(_LOOK)
            asleep = 0 if any(map(_runs, self.pids)) else asleep + 1
            if asleep == 2:
                return True
        return False


_LOOK = 0.001  # seconds between two looks


def _runs(pid: int) -> bool:
    """Whether a thread of the process is running or ready to."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            if stat.read_text().rpartition(") ")[2].startswith("R"):
                return True
        except OSError:  # the thread has just ended
            continue
    return False


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), Connection(int(sys.argv[3])))
