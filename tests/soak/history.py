"""What callers asked and were told, and whether the promises hold for it.

A call is noted before it is made and once more for each end that it comes to, so that a lost answer, a second one, a
late one and another call's are all seen. It knows nothing of luacell but the names of its errors.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import count
from typing import Final

GRACE_S: Final = 0.25  # promise 1: an answer comes this long after the deadline at most
SHOWN_MAX: Final = 20  # violations that are spelt out
VALUE: Final = "value"
WRONG: Final = "wrong value"


@dataclass(frozen=True, slots=True)
class End:
    """How a call ended: VALUE, WRONG, or the name of the exception."""

    outcome: str
    ended_s: float


@dataclass(slots=True)
class Entry:
    """One call; times are monotonic seconds."""

    number: int
    contract: str
    sent_s: float
    timeout_s: float
    ends: list[End] = field(default_factory=list)


class History:
    """All calls of a run, from any thread.

    Args:
        errors: names of the exceptions that a call of this run may end with.
    """

    def __init__(self, errors: Collection[str]) -> None:
        self._errors = frozenset(errors)
        self._numbers = count()
        self._lock = threading.Lock()
        self.entries: list[Entry] = []
        self.answered: list[Entry] = []  # with their value, in the order of their ends

    def sent(self, contract: str, timeout_s: float) -> Entry:
        """Note a call that is about to be made; its number is its own."""
        with self._lock:
            entry = Entry(next(self._numbers), contract, time.monotonic(), timeout_s)
            self.entries.append(entry)
        return entry

    def ended(self, entry: Entry, outcome: str) -> None:
        """Note an end."""
        end = End(outcome, time.monotonic())
        with self._lock:
            entry.ends.append(end)
            if outcome == VALUE:
                self.answered.append(entry)

    def outcomes(self) -> Counter[str]:
        return Counter(end.outcome for entry in self.entries for end in entry.ends)

    def violations(self, slack_s: float = 0.0) -> list[str]:
        """Say what is against the promises; to be asked when every caller has returned.

        Args:
            slack_s: what answers may be late because of the machine.
        """
        return [text for entry in self.entries for text in self._faults_of(entry, slack_s)]

    def _faults_of(self, entry: Entry, slack_s: float) -> list[str]:
        title = f"call {entry.number} to {entry.contract}"
        faults = []
        if len(entry.ends) != 1:
            faults.append(f"{title} was answered {len(entry.ends)} times")
        for end in entry.ends:
            if end.outcome != VALUE and end.outcome not in self._errors:
                faults.append(f"{title} ended with {end.outcome}")
            late_s = end.ended_s - entry.sent_s - entry.timeout_s
            if late_s > GRACE_S + slack_s:
                faults.append(f"{title} ended {late_s:.3f} s after its deadline")
        return faults


def shown(violations: list[str]) -> str:
    """Return violations as lines, the first of them."""
    more = [f"… and {len(violations) - SHOWN_MAX} more"] if len(violations) > SHOWN_MAX else []
    return "\n".join([*violations[:SHOWN_MAX], *more])


def percentiles(seconds: Collection[float]) -> str:
    """Return p50/p99/max in milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return "none"
    chosen = (ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], ordered[-1])
    return "/".join(f"{each * 1000:.0f}" for each in chosen) + " ms"
