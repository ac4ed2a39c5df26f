"""Two runs side by side: which rows became slower, and by more than the noise explains."""

from __future__ import annotations

from dataclasses import dataclass

from fastseq.bench import results
from fastseq.bench.harness import Summary
from fastseq.bench.results import Document, Row

THRESHOLD = 0.05


@dataclass(frozen=True)
class Change:
    """A row that both runs have. The summaries are of seconds, or of times in units of a peer's."""

    key: str
    before: Summary
    after: Summary
    threshold: float

    @property
    def ratio(self) -> float:
        """After over before: above 1 it became slower."""
        return self.after.median / self.before.median

    @property
    def regression(self) -> bool:
        """Slower by more than the threshold, and the middle halves of the two runs do not overlap."""
        return self.ratio > 1 + self.threshold and self.after.low > self.before.high

    @property
    def improvement(self) -> bool:
        """The same the other way around."""
        return self.ratio < 1 / (1 + self.threshold) and self.after.high < self.before.low


def changes(
    before: Document, after: Document, threshold: float = THRESHOLD, relative_to: str | None = None
) -> list[Change]:
    """Of all rows of ours in both documents, the largest loss first.

    Args:
        threshold: how much slower a median may be, as a fraction.
        relative_to: a peer in whose times ours are expressed, each from the same round: then the machine may have been
            faster or slower in one of the runs, as long as that peer was too.
    """
    olds = {row.point.key: row for row in results.rows(before)}
    found = []
    for new in results.rows(after):
        old = olds.get(new.point.key)
        summaries = [_summary(row, relative_to) for row in (old, new) if row is not None]
        if len(summaries) == 2 and summaries[0] and summaries[1]:
            found.append(Change(new.point.key, summaries[0], summaries[1], threshold))
    return sorted(found, key=lambda change: -change.ratio)


def _summary(row: Row, relative_to: str | None) -> Summary | None:
    if relative_to is None or row.ours is None:
        return row.ours
    ratio = row.ratio(relative_to)
    if ratio is None:
        return None
    low, high = row.quartiles(relative_to)
    return Summary(1 / ratio, 1 / high, 1 / low, row.ours.kept, row.ours.discarded)


def why_not_comparable(before: Document, after: Document) -> str | None:
    """What makes times of the two documents no measure of each other; None where nothing does."""
    for fact in ("processor", "torch"):
        old, new = (document["host"].get(fact) for document in (before, after))
        if old != new:
            return f"the two runs were on another {fact}: {old} and {new}"
    return None
