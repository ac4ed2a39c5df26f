"""What a run has found, as the plain data of its JSON file, and what follows from it.

The file holds "host", "build", "threads", "peers", "machine" (see `roofline.measure`), "planned", and "rows" by
their keys. A row has its "point" and "contenders": by name, all samples with settings and the difference
from our result, or the reason why there are none, as "missing" (not installed), "absent" (the peer does not do this)
or "failed". "streams", "busy" and "memory" hold what `scenarios` measures.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastseq
from fastseq import _load
from fastseq.bench import roofline
from fastseq.bench.grid import AnyPoint, point_of
from fastseq.bench.harness import Noise, Summary, summarise
from fastseq.bench.peers import OURS, PEERS

FORMAT = 2
Document = dict[str, Any]


def build_id() -> str:
    """Names what is measured: a hash of the extension's libraries and of the package's own modules."""
    package = Path(fastseq.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([Path(_load._C.__file__), package / "libfastseq_ops.so", *package.glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def new(host: dict[str, str], threads: list[int]) -> Document:
    """A document without rows."""
    return {
        "format": FORMAT,
        "host": host,
        "build": build_id(),
        "threads": threads,
        "peers": {},
        "machine": None,
        "planned": [],
        "rows": {},
        "streams": {},
        "busy": {},
        "memory": {},
    }


def why_not_continue(document: Document, host: dict[str, str]) -> str | None:
    """Why rows cannot be added to a document of an earlier run; None if they can."""
    if document.get("format") != FORMAT:
        return "was written by another version of the benchmark"
    if document["build"] != build_id():
        return "was measured with another build of fastseq"
    for fact in ("processor", "torch"):
        if document["host"].get(fact) != host.get(fact):
            return f"was measured with another {fact} ({document['host'].get(fact)})"
    return None


@dataclass(frozen=True)
class Row:
    """A row with what follows from its samples.

    Attributes:
        point, contenders: as in the file.
        ours: None where no sample of ours counts, or it failed.
        peers: the summaries of those that were timed.
        floor, limit: seconds; None without a measured machine.
    """

    point: AnyPoint
    contenders: dict[str, dict[str, Any]]
    ours: Summary | None
    peers: dict[str, Summary]
    floor: float | None
    limit: float | None
    noise: Noise

    def ratio(self, peer: str) -> float | None:
        """That peer's median over ours: above 1 we are faster."""
        return self.peers[peer].median / self.ours.median if self.ours and peer in self.peers else None

    def ratios(self) -> dict[str, float]:
        """Of all peers that were timed."""
        return {peer: ratio for peer in self.peers if (ratio := self.ratio(peer)) is not None}

    def best_peer(self, among: Iterable[str] = PEERS) -> str | None:
        """The fastest of these that was timed."""
        timed = [peer for peer in among if peer in self.peers]
        return min(timed, key=lambda peer: self.peers[peer].median) if timed else None

    def quartiles(self, peer: str) -> tuple[float, float]:
        """Of the ratios of samples from the same round, both of which count."""
        rounds = zip(self.contenders[peer]["samples"], self.contenders[OURS]["samples"], strict=False)
        ratios = [a[0] / b[0] for a, b in rounds if self.noise.quiet(a) and self.noise.quiet(b)]
        if len(ratios) < 2:
            return self.ratio(peer) or 0.0, self.ratio(peer) or 0.0
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    @property
    def fraction(self) -> float | None:
        """Of the floor that we reach: floor / our time."""
        return self.floor / self.ours.median if self.floor and self.ours else None

    @property
    def lost_to(self) -> list[str]:
        """Peers that are faster than we are, the fastest first."""
        return sorted((peer for peer, ratio in self.ratios().items() if ratio < 1), key=lambda p: self.peers[p].median)


def all_samples(document: Document) -> list[Sequence[float]]:
    """All of them, of all sides."""
    return [
        sample
        for row in document["rows"].values()
        for contender in row["contenders"].values()
        for sample in contender.get("samples", ())
    ]


def register_rate(document: Document) -> float:
    """FLOP/s of multiply-adds in registers on all threads: as read at the start, or as the probes around the samples
    saw it, where the machine was short of a processor at the start."""
    machine = document["machine"]
    read = machine["fma"][str(machine["threads"])] if machine else 0.0
    return max(read, Noise.of(all_samples(document)).best)


def rows(document: Document) -> Iterator[Row]:
    """In the order in which they were measured."""
    noise = Noise.of(all_samples(document))
    for data in document["rows"].values():
        point = point_of(data["point"])
        summaries = {
            name: summary
            for name, contender in data["contenders"].items()
            if "samples" in contender and (summary := summarise(contender["samples"], noise))
        }
        ours = summaries.pop(OURS, None)
        machine = document["machine"]
        floor, limit = (roofline.floor(point, machine), roofline.limit(point, machine)) if machine else (None, None)
        yield Row(point, data["contenders"], ours, summaries, floor, limit, noise)


def lost_first(document: Document) -> list[Row]:
    """Rows where a peer wins, the worst first; then the others in their order."""
    found = list(rows(document))
    lost = sorted((row for row in found if row.lost_to), key=lambda row: min(row.ratios().values()))
    return lost + [row for row in found if not row.lost_to]


def problems(document: Document) -> list[str]:
    """Why the document is incomplete, in sentences; empty where it is complete."""
    found = [
        f"{name} was not measured: {facts['missing']}"
        for name, facts in document["peers"].items()
        if facts.get("missing")
    ]
    for key, row in document["rows"].items():
        found += [
            f"{name} failed at {key}: {contender['failed']}"
            for name, contender in row["contenders"].items()
            if "failed" in contender
        ]
    for row in rows(document):
        timed = [name for name, contender in row.contenders.items() if "samples" in contender]
        counted = set(row.peers) | ({OURS} if row.ours else set())
        found += [f"{name} at {row.point.key}: no sample counts" for name in timed if name not in counted]
    for part in ("streams", "busy", "memory"):
        found += [f"{part} {name}: {data['failed']}" for name, data in document[part].items() if "failed" in data]
    measured = {*document["rows"], *(f"{p} {key}" for p in ("streams", "busy", "memory") for key in document[p])}
    if unmeasured := [key for key in document["planned"] if key not in measured]:
        found.append(f"{len(unmeasured)} of {len(document['planned'])} planned rows were not measured yet")
    return found


def sample_counts(document: Document) -> tuple[int, int]:
    """(samples that count, samples discarded as the machine was not all there)."""
    found = all_samples(document)
    kept = len(Noise.of(found).kept(found))
    return kept, len(found) - kept
