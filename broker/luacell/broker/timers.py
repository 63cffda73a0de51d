"""A coarse timer wheel: cheap to set and to cancel, never early, late by one bucket at most.

It decides nothing and reads no clock: `expired(now_ns)` yields what is due. Almost every timer of a broker
is cancelled (its call was answered), so cancelling removes the entry at once and nothing piles up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from luacell.protocol.limits import NS_PER_MS

BUCKET_NS: Final = 4 * NS_PER_MS  # resolution; the promise on answers is 250 ms

T = TypeVar("T")


class TimerWheel(Generic[T]):
    """Timers by bucket of time; bounded by the timers pending and the buckets of the longest one.

    A timer is named by its subject and the bucket that `set` returned.

    Attributes:
        buckets: subjects by number of bucket, which is `when_ns // BUCKET_NS + 1`; the broker's hot path adds to those
            that exist and removes from them without a call.
    """

    def __init__(self) -> None:
        self.buckets: dict[int, dict[T, None]] = {}
        self._order: list[int] = []  # heap of the keys of buckets, each once

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self.buckets.values())

    def set(self, when_ns: int, subject: T) -> int:
        """Ask for `subject` at `when_ns` or up to BUCKET_NS later; return the bucket, for `cancel`."""
        number = when_ns // BUCKET_NS + 1
        bucket = self.buckets.get(number)
        if bucket is None:
            bucket = self.buckets[number] = {}
            heapq.heappush(self._order, number)
        bucket[subject] = None
        return number

    def cancel(self, number: int, subject: T) -> None:
        """Forget a timer; one that has expired is ignored."""
        bucket = self.buckets.get(number)
        if bucket is not None:
            bucket.pop(subject, None)

    def next_ns(self) -> int | None:
        """Return when `expired` has something next, or None."""
        while self._order:
            number = self._order[0]
            if self.buckets[number]:
                return number * BUCKET_NS
            del self.buckets[heapq.heappop(self._order)]
        return None

    def expired(self, now_ns: int) -> Iterator[T]:
        """Remove and yield the subjects that are due, earliest bucket first.

        One at a time: acting on a subject may cancel the timer of another that is due as well.
        """
        while self._order and self._order[0] * BUCKET_NS <= now_ns:
            bucket = self.buckets[self._order[0]]
            if bucket:
                yield bucket.popitem()[0]
            else:
                del self.buckets[heapq.heappop(self._order)]
