"""What contracts print: how much of it becomes records, and how much is only counted.

It decides by numbers and keeps them; it reads no pipe and writes no record. The worker host bounds the rate, it cannot
tell one call from the next; here each call of a worker has its budget. Channels are not ordered, so the last lines of a
call may count as the next one's: the bound over any number of calls is exact, the line between two of them is not.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from luacell.protocol.limits import NS_PER_S, OUTPUT_PER_CALL_MAX

CUT_EVERY_NS: Final = NS_PER_S  # between records of one worker that only tell what was cut


class Kept(NamedTuple):
    """What is to be written of one piece of output.

    Attributes:
        size: bytes from its start; 0 for none.
        cut: bytes that were thrown away and that no record has told of yet, to be told now; 0 for none.
    """

    size: int
    cut: int

    @property
    def is_worth_a_record(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.size or self.cut)


class RecordRate:
    """How many records of one contract there may be: so many in a second, and as many at once.

    Args:
        rate: records a second.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._level_ns = NS_PER_S
        self._at_ns = 0

    def take(self, now_ns: int) -> bool:
        """Tell whether there may be one more, and count it."""
        self._level_ns = min(NS_PER_S, self._level_ns + now_ns - self._at_ns)
        self._at_ns = now_ns
        cost_ns = NS_PER_S // self._rate
        if self._level_ns < cost_ns:
            return False
        self._level_ns -= cost_ns
        return True


class OutputBudget:
    """The output of one worker."""

    def __init__(self) -> None:
        self._call = -1  # calls that the worker had served when its last output came
        self._left = 0
        self._cut = 0
        self._told_ns = -CUT_EVERY_NS

    def take(self, served: int, size: int, cut: int, now_ns: int, size_max: int = OUTPUT_PER_CALL_MAX) -> Kept:
        """Account for a piece of output.

        Args:
            served: calls that the worker has finished.
            size: bytes of the piece.
            cut: bytes that the worker host threw away before it.
            now_ns: the time.
            size_max: bytes of a call that become records.
        """
        if served != self._call:
            self._call = served
            self._left = size_max
        kept = min(size, self._left)
        self._left -= kept
        self._cut += cut + size - kept
        return Kept(kept, self.tell(now_ns) if kept or self.is_due(now_ns) else 0)

    @property
    def has_untold(self) -> bool:
        """Whether something was cut that no record has told of."""
        return self._cut > 0

    def is_due(self, now_ns: int) -> bool:
        """Whether a record may tell of cuts alone."""
        return now_ns - self._told_ns >= CUT_EVERY_NS

    def tell(self, now_ns: int) -> int:
        """Return what was cut and not told yet, to be told now."""
        cut, self._cut = self._cut, 0
        if cut:
            self._told_ns = now_ns
        return cut
