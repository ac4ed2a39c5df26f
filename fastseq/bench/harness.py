"""How times are taken: in turns, in short bursts, while the machine gives all that it has.

A sample is the mean time of the calls of one burst, and the lower of two readings of a short probe, one before the
burst and one after it: multiply-adds in registers on all processors. At times a host gives a virtual machine less than
its processors, and everything takes twice as long; the probe sees that. A sample whose probe is far below the best of
the run does not count; the best is what one reading in twenty is above, as a single one can be far off. All samples are
kept, so that this can be looked at again.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

BURST = 0.02  # seconds that one side computes before it is another's turn
LEAST_PROBE = 0.85  # of the best probe of the run, below which a sample does not count
ROUNDS = 11
FEWEST_ROUNDS = 3

Sample = tuple[float, float]
"""(seconds a call, the lower probe in FLOP/s)."""


@dataclass
class Noise:
    """The readings of a run's probe so far, FLOP/s, in order, and what they say about samples."""

    readings: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, samples: Iterable[Sequence[float]]) -> Noise:
        """As these samples have seen it."""
        return cls(sorted(sample[1] for sample in samples))

    def see(self, rate: float) -> float:
        """Takes note of a reading."""
        bisect.insort(self.readings, rate)
        return rate

    @property
    def best(self) -> float:
        """What one reading in twenty is above; of a few the highest."""
        return self.readings[_rank(len(self.readings), 95)] if self.readings else 0.0

    def quiet(self, sample: Sequence[float]) -> bool:
        """Whether the machine was all there during a sample."""
        return sample[1] >= LEAST_PROBE * self.best

    def kept(self, samples: Iterable[Sequence[float]]) -> list[float]:
        """Seconds of the samples that count."""
        return [sample[0] for sample in samples if self.quiet(sample)]


def interleave(
    bursts: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    probe: Callable[[], float],
    settle: Callable[[str], object],
    noise: Noise,
) -> dict[str, list[Sample]]:
    """Samples of each side, taken in turns; who begins changes from round to round, and so does who comes after whom.

    Args:
        bursts: by name, a function that computes a burst and returns seconds a call.
        rounds: of all sides; up to as many again while one of them has fewer samples that count.
        probe: reads the machine's speed, in FLOP/s.
        settle: waits until that side's threads sleep; called after its burst, before the next probe.
        noise: of the run.
    """
    names = list(bursts)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    before = noise.see(probe())
    for turn in range(2 * rounds):
        if turn >= rounds and all(len(noise.kept(taken)) >= rounds for taken in samples.values()):
            break
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order if turn % 2 == 0 else reversed(order):
            seconds = bursts[name]()
            settle(name)
            after = noise.see(probe())
            samples[name].append((seconds, min(before, after)))
            before = after
    return samples


def percentile(values: Iterable[float], percent: int) -> float:
    """The value that so many percent are not above."""
    ordered = sorted(values)
    return ordered[_rank(len(ordered), percent)]


def _rank(count: int, percent: int) -> int:
    return -(-count * percent // 100) - 1


@dataclass(frozen=True)
class Summary:
    """Of the samples that count: median and quartiles in seconds, how many, and how many did not."""

    median: float
    low: float
    high: float
    kept: int
    discarded: int


def summarise(samples: Sequence[Sequence[float]], noise: Noise) -> Summary | None:
    """None where no sample counts."""
    kept = noise.kept(samples)
    if not kept:
        return None
    low, median, high = statistics.quantiles(kept, n=4, method="inclusive") if len(kept) > 1 else kept * 3
    return Summary(median, low, high, len(kept), len(samples) - len(kept))


def rounds_within(seconds: float, round_seconds: float, most: int = ROUNDS) -> int:
    """How many rounds of so many seconds fit: `most` at best, and FEWEST_ROUNDS of these whatever they take."""
    return max(min(FEWEST_ROUNDS, most), min(most, int(seconds / max(round_seconds, 1e-9))))
