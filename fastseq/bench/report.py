"""A document as tables of text: what the terminal shows, Markdown, and what the HTML page puts beside its plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastseq.bench import bars, results, scenarios
from fastseq.bench.compare import Change
from fastseq.bench.harness import LEAST_PROBE
from fastseq.bench.peers import OURS, PEERS
from fastseq.bench.results import Document, Row, register_rate

LOST = "◀ lost"


@dataclass
class Table:
    """Texts in lines and columns.

    Attributes:
        title, columns, lines: what it says.
        marked: the numbers of the lines to be looked at first.
        note: below the table.
    """

    title: str
    columns: list[str]
    lines: list[list[str]]
    marked: set[int] = field(default_factory=set)
    note: str = ""

    def markdown(self) -> str:
        """As Markdown; marked lines are bold in their first column."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        for number, (first, *others) in enumerate(self.lines):
            lines.append("| " + " | ".join([f"**{first}**" if number in self.marked else first, *others]) + " |")
        return "\n".join(lines + (["", self.note] if self.note else [])) + "\n"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def headline(document: Document) -> list[str]:
    """Whether the document is complete, how much was noise, and how we stand; what is INCOMPLETE comes first."""
    problems = results.problems(document)
    lines = [f"INCOMPLETE: {problem}" for problem in problems]
    kept, discarded = results.sample_counts(document)
    rows = [row for row in results.rows(document) if row.ours]
    lost = [row for row in rows if row.lost_to]
    lines.append(
        f"{len(rows)} rows; a peer is faster in {len(lost)} of them. {kept} samples count; {discarded} were discarded, "
        f"as the machine gave less than {LEAST_PROBE:.0%} of its best around them."
    )
    for peer in PEERS:
        ratios = [ratio for row in rows if (ratio := row.ratio(peer))]
        if ratios:
            lines.append(
                f"{peer}'s time over ours: geometric mean {statistics.geometric_mean(ratios):.2f}, "
                f"lowest {min(ratios):.2f}, {len(ratios)} rows"
            )
    return lines


def tables(document: Document) -> list[Table]:
    """All of them; a part that was not measured has none."""
    made = [rows_table(document), bars_table(document), misses_table(document)]
    made += [machine_table(document), peers_table(document)]
    made += [streams_table(document), busy_table(document), memory_table(document)]
    return [table for table in made if table.lines]


def rows_table(document: Document) -> Table:
    """Rows where a peer wins first, marked."""
    rows = results.lost_first(document)
    peers = [peer for peer in PEERS if any(peer in row.peers for row in rows)]
    lines = [_line(row, peers) for row in rows]
    marked = {number for number, row in enumerate(rows) if row.lost_to or row.ours is None}
    note = (
        "A peer's column: its median over ours (the quartiles of single rounds' ratios) @threads; above 1 we are "
        "faster. – it does not do this; ? not installed; ! it failed. Floor: the fraction of it that we reach."
    )
    return Table("Rows", ["row", "", "fastseq", "floor", *peers], lines, marked, note)


def _line(row: Row, peers: Sequence[str]) -> list[str]:
    if row.ours is None:
        why = row.contenders.get(OURS, {}).get("failed", "no sample counts")
        return [row.point.key, f"! {why}", "–", "–", *("–" for _ in peers)]
    mark = f"{LOST} to {row.lost_to[0]}" if row.lost_to else ""
    fraction = f"{row.fraction:.2f}" if row.fraction else "–"
    ours = f"{duration(row.ours.median)} @{row.contenders[OURS]['threads']}"
    return [row.point.key, mark, ours, fraction, *(_ratio(row, peer) for peer in peers)]


def _ratio(row: Row, peer: str) -> str:
    ratio = row.ratio(peer)
    if ratio is None:
        contender = row.contenders.get(peer, {"missing": ""})
        return "?" if "missing" in contender else "!" if "failed" in contender or "samples" in contender else "–"
    low, high = row.quartiles(peer)
    return f"{ratio:.2f} ({low:.2f}–{high:.2f}) @{row.contenders[peer]['threads']}"


def bars_table(document: Document) -> Table:
    """What fastseq holds itself to."""
    found = bars.outcomes(document)
    marked = {number for number, outcome in enumerate(found) if outcome.met is False}
    columns = ["bar", "required", "reached", "worst point", "met"]
    note = "Meant for two threads on a machine of two cores with AVX-512; float32 unless it says otherwise."
    return Table("Bars", columns, [list(outcome.cells()) for outcome in found], marked, note)


def misses_table(document: Document) -> Table:
    """Every point that is below a bar; those are marked that would reach it at the limit."""
    lines, marked = [], set()
    for outcome in bars.outcomes(document):
        bar = outcome.bar
        for miss in outcome.misses:
            at_limit = "–"
            if miss.at_limit is not None:
                at_limit = f"{miss.at_limit:.3g}{bar.unit}"
                if bar.holds(miss.at_limit):
                    marked.add(len(lines))
            lines.append([miss.key, bar.what, bar.bound, f"{miss.reached:.3g}{bar.unit}", at_limit])
    note = (
        "At the limit: what the point would reach if our time was its products' alone, at this machine's best, with "
        "the meetings of threads that share a single row's steps and, in training, torch's engine. Unmarked ones miss "
        "the bar even so: only what beats that, such as weights that partly stay in a nearer cache, would reach it."
    )
    return Table("Points below a bar", ["point", "bar", "required", "reached", "at the limit"], lines, marked, note)


def machine_table(document: Document) -> Table:
    """What floors and limits are made of."""
    machine: dict[str, Any] | None = document["machine"]
    if machine is None:
        return Table("The machine", [], [])
    lines = [["processor", document["host"].get("processor", "")]]
    for threads, rate in (machine["fma"] | {str(machine["threads"]): register_rate(document)}).items():
        lines.append([f"multiply-adds in registers, threads: {threads}", f"{rate / 1e9:.0f} GFLOP/s"])
    for dtype, gemm in machine["gemm"].items():
        lines.append([f"matrix product, {dtype}", f"{gemm['rate'] / 1e9:.0f} GFLOP/s ({gemm['by']})"])
    for level, rate in machine["bandwidth"].items():
        size = machine["caches"].get(level)
        place = level if size is None else f"{level}, {size / 2**20:.3g} MiB"
        one = machine["bandwidth of one"][level] / 1e9
        lines.append([f"reading from {place}", f"{rate / 1e9:.0f} GB/s; one thread {one:.0f}"])
    lines.append([f"{machine['threads']} threads meet", duration(machine["meeting"])])
    lines.append(["torch's engine, backward of one multiplication", duration(machine["engine"])])
    return Table("The machine", ["what", "measured"], lines)


def peers_table(document: Document) -> Table:
    """Versions and settings; who was missing."""
    settings: dict[str, dict[str, None]] = {}
    for row in document["rows"].values():
        for name, contender in row["contenders"].items():
            if contender.get("settings"):
                settings.setdefault(name, {})[contender["settings"]] = None
    lines, marked = [], set()
    for name in (OURS, *PEERS):
        facts = document["peers"].get(name, {})
        if facts.get("missing"):
            marked.add(len(lines))
        version = document["host"].get("fastseq", "") if name == OURS else facts.get("version", "")
        used = "; ".join(settings.get(name, {}))
        lines.append([name, facts.get("missing") or version, used])
    counts = " or ".join(map(str, document["threads"]))
    note = f"Each with {counts} threads, whichever a short trial found the faster for that row."
    return Table("Peers", ["peer", "version", "settings"], lines, marked, note)


def streams_table(document: Document) -> Table:
    """Calls a second and the 99th percentile."""
    lines = []
    for key, found in document["streams"].items():
        for name, side in found.get("sides", {}).items():
            rate, p99 = (statistics.median(side[measure]) for measure in ("calls_per_second", "p99"))
            lines.append([key, name, str(side["threads"]), f"{rate:,.0f}", duration(p99)])
    title = f"{scenarios.STREAMS} Python threads, each with single rows of its own"
    return Table(title, ["row", "side", "threads", "calls a second", "99th percentile"], lines)


def busy_table(document: Document) -> Table:
    """Against one thread on a quiet machine."""
    lines, marked = [], set()
    for key, found in document["busy"].items():
        if "failed" in found:
            continue
        mean, median = scenarios.busy_ratios(found)
        if max(mean, median) > 1.5:
            marked.add(len(lines))
        alone = duration(statistics.median(found["alone"]))
        lines.append([key, alone, duration(statistics.median(found["beside"])), f"{mean:.2f}", f"{median:.2f}"])
    columns = ["row", "one thread, alone", "all threads, beside a busy process", "ratio of means", "of medians"]
    return Table("Beside a process that keeps one processor busy", columns, lines, marked)


def memory_table(document: Document) -> Table:
    """Peak beyond what there was before the call."""
    lines, marked = [], set()
    for key, found in document["memory"].items():
        if "failed" in found:
            continue
        ours, theirs = found[OURS], found["torch.nn"]
        if ours > theirs:
            marked.add(len(lines))
        reserve = f"{found['formula'] / 2**20:.1f}" if found["formula"] else "–"
        lines.append([key, f"{ours / 2**20:.1f}", f"{theirs / 2**20:.1f}", reserve])
    columns = ["row", "fastseq, MiB", "torch.nn, MiB", "kept for backward, by formula"]
    note = "Resident memory at the peak of one call beyond that before it, output and gradients included."
    return Table("Memory", columns, lines, marked, note)


def changes_table(changes: Sequence[Change]) -> Table:
    """Of `bench compare`: regressions first."""
    ordered = sorted(changes, key=lambda change: (not change.regression, -change.ratio))
    lines = [
        [
            change.key,
            f"{change.ratio:.2f}",
            "REGRESSION" if change.regression else "faster" if change.improvement else "",
            f"{change.before.median:.4g} ({change.before.low:.4g}–{change.before.high:.4g})",
            f"{change.after.median:.4g} ({change.after.low:.4g}–{change.after.high:.4g})",
        ]
        for change in ordered
    ]
    marked = {number for number, change in enumerate(ordered) if change.regression}
    return Table("After over before", ["row", "ratio", "", "before", "after"], lines, marked)


def markdown(document: Document) -> str:
    """The whole document."""
    title = f"# {document['host'].get('processor', 'An unknown processor')}"
    facts = [f"- {name}: {value}" for name, value in document["host"].items()]
    parts = [title, "\n".join(headline(document)), "\n".join(facts), *(t.markdown() for t in tables(document))]
    return "\n\n".join(parts)
