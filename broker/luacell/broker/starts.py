"""How many workers may be started, over all contracts: a token bucket, so that a storm of crashes has a pace.

A start takes a token; a bucket holds BURST of them and gets RATE a second. It starts nothing and has no clock.
"""

from __future__ import annotations

from typing import Final

from luacell.protocol.limits import NS_PER_S

RATE: Final = 50  # a second; a fork takes ~7 ms, so that crashing contracts cost a third of a CPU at most
BURST: Final = 100  # at once, such as after a start of the service
COST_NS: Final = NS_PER_S // RATE


class StartBudget:
    """The tokens of one broker; it begins with all of them."""

    def __init__(self) -> None:
        self._full_ns = 0  # when all tokens that were taken are there again

    def available(self, now_ns: int) -> int:
        """Return how many starts may be ordered now."""
        return BURST - -(-max(0, self._full_ns - now_ns) // COST_NS)

    def take(self, now_ns: int) -> None:
        """Note a start."""
        assert self.available(now_ns) > 0, "it was asked for before"
        self._full_ns = max(self._full_ns, now_ns) + COST_NS

    def next_ns(self, now_ns: int) -> int:
        """Return when a start may be ordered."""
        return max(now_ns, self._full_ns - (BURST - 1) * COST_NS)
