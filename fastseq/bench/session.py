"""A run: the workers of all contenders, and one point after another, checked, timed and written down."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastseq.bench import roofline, scenarios
from fastseq.bench.grid import AnyPoint, Point
from fastseq.bench.harness import BURST, ROUNDS, Noise, interleave, rounds_within
from fastseq.bench.peers import OURS, PEERS, Peer, Unsupported, load
from fastseq.bench.problem import disagreement
from fastseq.bench.results import Document, all_samples
from fastseq.bench.worker import Failed, Worker

PROBE_SECONDS = 0.005
ROW_SECONDS = 20.0  # of bursts; a row whose calls are long gets fewer rounds
_GAP = 0.012  # seconds about, between two bursts: pools fall asleep, and the probe
_FOR_FEWER = 0.1  # of its time, by which fewer threads have to be faster: half a machine makes all of them look equal
_WARM_BELOW = 0.1  # seconds a call, from which on a burst has no call that does not count


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


class Session:
    """Measures into a document.

    Args:
        document: see `results`; rows that it has are not measured again.
        peers: the names of those to measure.
        thread_counts: that every contender is tried with; the better one is timed.
        rounds: of bursts for each row.
        row_seconds: see ROW_SECONDS.
        start: makes a worker; another in tests.
    """

    def __init__(
        self,
        document: Document,
        peers: Sequence[str] = PEERS,
        thread_counts: Sequence[int] = (),
        rounds: int = ROUNDS,
        row_seconds: float = ROW_SECONDS,
        start: Callable[..., Any] = Worker,
    ) -> None:
        self.document = document
        self.thread_counts = sorted(set(thread_counts or (1, processors())))
        self.rounds = rounds
        self.row_seconds = row_seconds
        self.noise = Noise.of(all_samples(document))
        self._start = start
        self._peers: dict[str, Peer] = {name: load(name) for name in (OURS, *peers)}
        self._workers: dict[tuple[str, int], Any] = {}
        self._probe_worker: Any = None
        self._probe_iterations = 0
        for name in PEERS:
            if name not in self._peers:
                document["peers"].setdefault(name, {"missing": "it was not asked for"})
                continue
            reason = self._peers[name].missing()
            document["peers"][name] = {"missing": reason} if reason else {"version": self._peers[name].version()}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self._workers.values(), self._probe_worker]:
            if worker is not None:
                worker.close()

    # ---- Workers ----------------------------------------------------------------------------------------------------

    def worker(self, name: str, threads: int) -> Any:
        """The process of a contender; one for each number of threads where that is fixed at the start."""
        key = (name, threads if self._peers[name].threads_at_start else 0)
        if key not in self._workers or not self._workers[key].alive:
            self._workers[key] = self._start(name, threads)
        return self._workers[key]

    def probe(self) -> float:
        """FLOP/s of multiply-adds on all processors, for about PROBE_SECONDS."""
        if self._probe_worker is None:
            # Its threads sleep at once when they are done, so as not to disturb the next burst.
            self._probe_worker = self._start(OURS, 0, {"OMP_WAIT_POLICY": "passive"})
            trial = 100_000
            taken = min(_seconds(lambda: self._probe_worker.ask("probe", trial, processors())) for _ in range(5))
            self._probe_iterations = max(1, int(trial * PROBE_SECONDS / taken))
        return self._probe_worker.ask("probe", self._probe_iterations, processors())

    # ---- The machine ------------------------------------------------------------------------------------------------

    def measure_machine(self) -> None:
        """Its peaks and bandwidths; the better of those in the document and of those found now."""
        self.probe()
        threads = processors()

        def gemm(name: str) -> Callable[[str, int], float | None]:
            def rate(dtype: str, size: int) -> float | None:
                try:
                    return max(
                        (
                            r
                            for _ in range(2)
                            if (r := self.worker(name, threads).ask("gemm_rate", dtype, size, threads))
                        ),
                        default=None,
                    )
                except (Unsupported, Failed):
                    return None

            return rate

        ask = self._probe_worker.ask
        found = roofline.measure(
            threads,
            lambda iterations, n: ask("fma_rate", iterations, n),
            lambda size, repeats, n: ask("read_rate", size, repeats, n),
            lambda times, n: ask("meeting_seconds", times, n),
            lambda: ask("engine_seconds"),
            {name: gemm(name) for name in (OURS, "torch.nn", "onednn") if self._available(name)},
        )
        self.document["machine"] = roofline.better(found, self.document["machine"])

    # ---- Rows -------------------------------------------------------------------------------------------------------

    def done(self, point: AnyPoint) -> bool:
        """Whether the document has the point with every peer that can be had here."""
        row = self.document["rows"].get(point.key)
        return row is not None and all(
            name in row["contenders"] and not ("missing" in row["contenders"][name] and self._available(name))
            for name in self._peers
        )

    def measure(self, point: AnyPoint) -> None:
        """Prepares every contender, compares its results with ours, and times those that agree, in turns."""
        contenders: dict[str, dict[str, Any]] = {}
        ours: dict[str, Any] | None = None
        for name in self._peers:
            contenders[name] = self._prepare(name, point, ours)
            if name == OURS:
                ours = contenders[name].pop("results", None)
        timed = [name for name, contender in contenders.items() if "threads" in contender]
        if OURS in timed:
            self._time(timed, contenders)
        self.document["rows"][point.key] = {"point": point.as_dict(), "contenders": contenders}

    def _available(self, name: str) -> bool:
        return name == OURS or (name in self._peers and not self.document["peers"][name].get("missing"))

    def _prepare(self, name: str, point: AnyPoint, ours: dict[str, Any] | None) -> dict[str, Any]:
        """Ready with its better number of threads, or the word why not."""
        if not self._available(name):
            return {"missing": self.document["peers"][name]["missing"]}
        if reason := self._peers[name].unsupported(point):
            return {"absent": reason}
        if name != OURS and ours is None:
            return {"absent": "there is no result of ours to compare with"}
        seconds: dict[int, float] = {}
        contender: dict[str, Any] = {}
        reference = ours
        try:
            for threads in self.thread_counts:
                results, settings = self.worker(name, threads).prepare(point, threads)
                reference = results if reference is None else reference
                error, wrong = disagreement(point.dtype, reference, results)
                if wrong:
                    return {"failed": f"{wrong}; it was not timed"}
                contender |= {"settings": settings, "error": max(error, contender.get("error", 0.0))}
                seconds[threads] = self._trial(name, threads)
        except Unsupported as reason:
            return {"absent": str(reason)}
        except Failed as reason:
            return {"failed": str(reason)}
        threads = min(seconds, key=lambda threads: seconds[threads] * (1 + _FOR_FEWER * (threads < max(seconds))))
        contender |= {"threads": threads, "tried": seconds}
        return contender | ({"results": reference} if name == OURS else {})

    def _trial(self, name: str, threads: int) -> float:
        """Seconds a call, roughly: the best of a few short bursts."""
        worker = self.worker(name, threads)
        once = min(worker.ask("burst", threads, 1) for _ in range(2))
        calls = _calls(once, BURST / 4)
        if once < BURST:
            once = min(worker.ask("burst", threads, calls) / calls for _ in range(3))
        worker.settle()
        return once

    def _time(self, timed: Sequence[str], contenders: dict[str, dict[str, Any]]) -> None:
        bursts, round_seconds = {}, 0.0
        for name in timed:
            threads = contenders[name]["threads"]
            once = contenders[name]["tried"][threads]
            calls, warm = _calls(once, BURST), _calls(once, BURST / 10) if once < _WARM_BELOW else 0
            bursts[name] = self._burst(name, threads, calls, warm)
            round_seconds += once * (calls + warm) + _GAP
        while OURS in bursts:
            try:
                samples = interleave(
                    bursts,
                    rounds=rounds_within(self.row_seconds, round_seconds, self.rounds),
                    probe=self.probe,
                    settle=lambda name: self.worker(name, contenders[name]["threads"]).settle(),
                    noise=self.noise,
                )
            except _BurstFailed as failure:
                contenders[failure.name] = {"failed": f"while it was timed: {failure}"}
                del bursts[failure.name]
                continue
            for name, taken in samples.items():
                contenders[name]["samples"] = taken
            return

    def _burst(self, name: str, threads: int, calls: int, warm: int) -> Callable[[], float]:
        def burst() -> float:
            try:
                return self.worker(name, threads).ask("burst", threads, calls, warm) / calls
            except Failed as reason:
                raise _BurstFailed(name, str(reason)) from None

        return burst

    # ---- The other measures -----------------------------------------------------------------------------------------

    def measure_streams(self, point: Point, rounds: int, seconds: float) -> None:
        """See `scenarios.streams`."""
        sides = [name for name in (OURS, "onnxruntime") if self._available(name)]
        self._scenario("streams", point, lambda: scenarios.streams(self, point, sides, rounds, seconds))

    def measure_busy(self, point: Point, seconds: float) -> None:
        """See `scenarios.busy`."""
        self._scenario("busy", point, lambda: scenarios.busy(self, point, seconds))

    def measure_memory(self, point: Point) -> None:
        """See `scenarios.memory_of_a_call`."""
        self._scenario("memory", point, lambda: scenarios.memory_of_a_call(self._start, point, processors()))

    def _scenario(self, part: str, point: Point, measure: Callable[[], dict[str, Any]]) -> None:
        try:
            found = measure()
        except (Unsupported, Failed) as reason:
            found = {"failed": str(reason)}
        self.document[part][point.key] = {"point": point.as_dict(), **found}


class _BurstFailed(Exception):
    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


def _calls(once: float, seconds: float) -> int:
    return max(1, round(seconds / max(once, 1e-7)))


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
