"""Why a worker died, in the terms that callers are told; pure text and numbers."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Final, NamedTuple

SIGALRM = int(signal.SIGALRM)
SIGKILL = int(signal.SIGKILL)
HOST_LEAVES: Final = "its worker host is to end"
HOST_GONE: Final = "its worker host is gone"
FROM_OUTSIDE: Final = (HOST_LEAVES, HOST_GONE)  # verdicts that blame no contract


class Vitals(NamedTuple):
    """What a worker's process was doing, as far as its worker host could tell.

    Attributes:
        cpu_us: CPU time of its life, or None.
        memory: bytes of resident memory, at a death the most that it had; or None.
        state: while it lived, such as "R (running)", or "".
        wchan: the kernel's function in which it waited then, or "".
    """

    cpu_us: int | None = None
    memory: int | None = None
    state: str = ""
    wchan: str = ""


NO_VITALS: Final = Vitals()


@dataclass(frozen=True, slots=True)
class Cause:
    """How a worker ended, as the worker host saw it.

    Attributes:
        signal: number of the signal that ended it, or None.
        exit_code: its exit code where it exited, or None.
        problem: why it could not be started, or "".
        last_words: the end of its stderr, for the record of its death alone.
        vitals: what its process had been doing.
    """

    signal: int | None = None
    exit_code: int | None = None
    problem: str = ""
    last_words: str = ""
    vitals: Vitals = field(default=NO_VITALS, compare=False)

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        if self.signal is not None:
            return f"signal {self.signal} ({_signal_name(self.signal)})"
        if self.exit_code is not None:
            return f"exit code {self.exit_code}"
        return "an unknown cause"

    def is_own_doing(self, verdict: str) -> bool:
        """Whether a contract has caused this death itself, as far as can be seen.

        What was killed from outside or with its worker host was not, nor what nobody knows the end of.

        Args:
            verdict: why this broker has killed it, or "".
        """
        if self.problem or self == UNKNOWN or verdict in FROM_OUTSIDE:
            return False
        return bool(verdict) or self.signal != SIGKILL

    @property
    def label(self) -> str:
        """A short key for counting deaths."""
        if self.signal is not None:
            return _signal_name(self.signal)
        if self.exit_code is not None:
            return f"exit {self.exit_code}"
        return "start failed" if self.problem else "unknown"


UNKNOWN = Cause()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"
