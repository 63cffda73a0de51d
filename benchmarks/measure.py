"""How figures are taken: interleaved batches, so that a noisy neighbour hits all of them alike, and their medians.

A *way* is one manner to get something done, and knows how to take a batch of samples: latencies of single round trips
in microseconds, or the calls per second of a whole run. A *figure* sets one way beside another of the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

NS_PER_US = 1000
GB_PER_S_FROM = 4096  # bytes; for less it tells nothing
Batch = Callable[[], list[float]]


@dataclass(frozen=True)
class Series:
    """What one way took: the median of each batch, and over all samples the 99th percentile."""

    batches: tuple[float, ...]
    p99: float

    @property
    def median(self) -> float:
        return statistics.median(self.batches)


@dataclass(frozen=True)
class Target:
    """Bounds of a ratio; `at_least` where more is better."""

    must: float
    goal: float
    at_least: bool = False

    def verdict(self, ratio: float) -> str:
        for word, bound in (("goal", self.goal), ("must", self.must)):
            if ratio >= bound if self.at_least else ratio <= bound:
                return word
        return "MISSED"


@dataclass(frozen=True)
class Figure:
    """One line of the report.

    Attributes:
        unit: "us" (the p50 of a round trip) or "calls/s".
        beside: what it is compared with; its value has the same unit.
        gb_per_s: payload, counted once, over the p50; 0 where that tells nothing.
    """

    group: str
    name: str
    unit: str
    value: float
    p99: float
    batches: tuple[float, ...]
    beside: str
    beside_value: float
    beside_batches: tuple[float, ...]
    target: Target | None = None
    gb_per_s: float = 0.0

    @property
    def ratios(self) -> tuple[float, ...]:
        """Those of batches taken one after the other."""
        return tuple(value / other for value, other in zip(self.batches, self.beside_batches, strict=True))

    @property
    def ratio(self) -> float:
        """Their median: what disturbs the machine for a while disturbs both sides of a ratio."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Half of the ratios are between these."""
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    @property
    def verdict(self) -> str:
        return self.target.verdict(self.ratio) if self.target else ""


def interleave(ways: Mapping[str, Batch], batches: int) -> dict[str, Series]:
    """Take `batches` batches of each way in turn, after one that does not count."""
    samples: dict[str, list[list[float]]] = {name: [] for name in ways}
    for warm_up in ways.values():
        warm_up()
    for _ in range(batches):
        for name, batch in ways.items():
            samples[name].append(batch())
    return {name: _series(taken) for name, taken in samples.items()}


def _series(batches: list[list[float]]) -> Series:
    every = sorted(sample for batch in batches for sample in batch)
    return Series(tuple(statistics.median(batch) for batch in batches), every[int(len(every) * 0.99)])


def latency(round_trip: Callable[[], object], calls: int) -> Batch:
    """Return the way that times each of `calls` round trips."""

    def batch() -> list[float]:
        clock = time.perf_counter_ns
        taken = []
        for _ in range(calls):
            start = clock()
            round_trip()
            taken.append((clock() - start) / NS_PER_US)
        return taken

    return batch


def rate(run: Callable[[], float]) -> Batch:
    """Return the way whose batch is one run; `run` returns its calls per second."""
    return lambda: [run()]


def plus(*parts: Series) -> Series:
    """Return what several ways take one after the other."""
    return Series(tuple(map(sum, zip(*(part.batches for part in parts), strict=True))), sum(part.p99 for part in parts))


def compare(
    group: str,
    name: str,
    unit: str,
    taken: Series,
    beside: str,
    other: Series,
    target: Target | None = None,
    size: int = 0,
) -> Figure:
    """Set one series beside another; `size` in bytes gives GB/s."""
    gb_per_s = size / taken.median / NS_PER_US if size >= GB_PER_S_FROM else 0.0
    return Figure(
        group, name, unit, taken.median, taken.p99, taken.batches,
        beside, other.median, other.batches, target, gb_per_s,
    )  # fmt: skip
