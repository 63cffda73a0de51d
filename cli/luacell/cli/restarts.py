"""When a child that has ended is started again, and when that is given up.

Erlang's rule: a child may be restarted `intensity` times within any `period`; one more ending is not a mishap but a
fault that restarting does not mend. Between restarts it backs off, and an ending after a healthy time counts as the
first again. It starts nothing and has no clock.

    running ──ended──> waits for its back-off ──started──> running
       └──ended once more than the intensity allows──> given up
"""

from __future__ import annotations

from collections import deque
from typing import Final

INTENSITY: Final = 5  # restarts
PERIOD_S: Final = 60.0
BACKOFF_FIRST_S: Final = 0.01
BACKOFF_MAX_S: Final = 5.0
HEALTHY_S: Final = 10.0  # a child that has run for this long had started well


class Restarts:
    """The restarts of one child.

    Args:
        intensity: restarts that are allowed within the period.
        period_s: seconds.
    """

    def __init__(self, intensity: int = INTENSITY, period_s: float = PERIOD_S) -> None:
        self._intensity = intensity
        self._period_s = period_s
        self._ended_s: deque[float] = deque()
        self._started_s = 0.0
        self._in_a_row = 0

    def started(self, now_s: float) -> None:
        """The child was started.

        Args:
            now_s: the time, monotonic seconds.
        """
        self._started_s = now_s

    def ended(self, now_s: float) -> float | None:
        """The child has ended, unasked; return how many seconds to wait before it is started again, None for never."""
        while self._ended_s and now_s - self._ended_s[0] >= self._period_s:
            self._ended_s.popleft()
        self._ended_s.append(now_s)
        if len(self._ended_s) > self._intensity:
            return None
        if now_s - self._started_s >= HEALTHY_S:
            self._in_a_row = 0
        self._in_a_row += 1
        return min(BACKOFF_FIRST_S * float(2 ** (self._in_a_row - 1)), BACKOFF_MAX_S)

    def describe(self) -> str:
        """Say how often it has ended of late, as messages put it."""
        count = len(self._ended_s)
        return f"{count} {'time' if count == 1 else 'times'} within {self._period_s:g} s"
