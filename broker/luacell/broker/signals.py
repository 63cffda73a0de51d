"""Signals as data: what would interrupt a process anywhere becomes bytes on a descriptor that its loop waits for.

A handler that raises can strike between any two instructions, in the middle of a change or of the clean-up behind it.
Here handlers do nothing; the number of the signal is written to a pipe by the interpreter itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from types import FrameType
from typing import Final

_BYTES_MAX: Final = 64  # signals read at once; those that a full pipe drops are repetitions


class SignalPipe:
    """The signals of this process, one pipe for all of them; made in the main thread, once.

    Args:
        numbers: signals to be heard in place of what they do by default.

    Attributes:
        descriptor: readable when a signal has come.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self.descriptor, speaker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(speaker, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, _note)

    def take(self) -> list[int]:
        """Return the signals that came since the last time, oldest first."""
        with contextlib.suppress(BlockingIOError):
            return list(os.read(self.descriptor, _BYTES_MAX))
        return []


def _note(number: int, frame: FrameType | None) -> None:
    """Do nothing: the pipe has it."""
