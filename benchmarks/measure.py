"""How figures are taken: interleaved batches, so that a noisy neighbour hits all of them alike, and their medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

NS_PER_US = 1000


@dataclass(frozen=True)
class Figure:
    """Latencies of one way to call, in microseconds: median and 99th percentile over all batches."""

    name: str
    p50_us: float
    p99_us: float
    batches_us: tuple[float, ...]  # the median of each batch


def interleave(ways: Mapping[str, Callable[[], object]], batches: int, calls: int) -> dict[str, Figure]:
    """Time each way in turn, `batches` times `calls` round trips each."""
    samples: dict[str, list[list[int]]] = {name: [] for name in ways}
    for round_trip in ways.values():
        for _ in range(calls // 4):
            round_trip()
    for _ in range(batches):
        for name, round_trip in ways.items():
            samples[name].append(_batch(round_trip, calls))
    return {name: _figure(name, taken) for name, taken in samples.items()}


def _batch(round_trip: Callable[[], object], calls: int) -> list[int]:
    clock = time.perf_counter_ns
    taken = []
    for _ in range(calls):
        start = clock()
        round_trip()
        taken.append(clock() - start)
    return taken


def _figure(name: str, batches: list[list[int]]) -> Figure:
    medians = tuple(statistics.median(batch) / NS_PER_US for batch in batches)
    every = sorted(sample for batch in batches for sample in batch)
    return Figure(name, statistics.median(medians), every[int(len(every) * 0.99)] / NS_PER_US, medians)
