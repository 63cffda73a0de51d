"""Latencies of any number of calls in bounded memory, and the percentiles of them.

A histogram whose buckets are 1/1024 of their value wide: below 2048 ns it is exact, above a percentile is at most
0.1 % too large. The largest value is kept as it is.
"""

from __future__ import annotations

from collections import Counter
from math import ceil
from typing import Final

_BITS: Final = 11  # of a value that are kept


class Latencies:
    """A histogram of durations in nanoseconds; not for several threads at once."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self.count = 0
        self.max_ns = 0

    def add(self, value_ns: int) -> None:
        """Count one duration."""
        shift = max(0, value_ns.bit_length() - _BITS)
        self._buckets[(shift << _BITS) | (value_ns >> shift)] += 1
        self.count += 1
        if value_ns > self.max_ns:
            self.max_ns = value_ns

    def merge(self, other: Latencies) -> None:
        """Count what another one has counted."""
        self._buckets.update(other._buckets)
        self.count += other.count
        self.max_ns = max(self.max_ns, other.max_ns)

    def percentile(self, percent: float) -> int:
        """Return the smallest duration that `percent` of all did not exceed (nearest rank), in nanoseconds.

        Args:
            percent: over 0, at most 100.

        Raises:
            ValueError: nothing was counted, or `percent` is out of range.
        """
        if not self.count or not 0 < percent <= 100:
            raise ValueError(f"there is no percentile {percent:g} of {self.count} values")
        rank = ceil(self.count * percent / 100)
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                return min(_upper_end(bucket), self.max_ns)
        raise AssertionError("the buckets hold fewer values than were counted")


def _upper_end(bucket: int) -> int:
    """Return the largest value that falls into a bucket."""
    shift, top = bucket >> _BITS, bucket & ((1 << _BITS) - 1)
    return ((top + 1) << shift) - 1
