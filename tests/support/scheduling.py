"""How late this machine runs what is ready to run, so that its lateness is not blamed on luacell."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Final, Self

from luacell.protocol.limits import NS_PER_S

STEP_S: Final = 0.005
HOPS: Final = 4  # processes that an answer passes through at most: worker, worker host, broker, host


class Scheduling:
    """A thread that only sleeps, for the length of a block.

    Args:
        pids: other processes that are to come on time.

    Attributes:
        latest_s: by how much the thread was woken too late at most, seconds.
        waited_s: for how long those processes were ready to run and had no CPU, together.
    """

    def __init__(self, *pids: int) -> None:
        self.latest_s = self.waited_s = 0.0
        self._pids = pids
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scheduling")

    @property
    def slack_s(self) -> float:
        """What an answer may be late because of the machine: every process on its way as late as was seen here."""
        return HOPS * self.latest_s

    def _run(self) -> None:
        before_s = time.monotonic()
        while not self._is_over.wait(STEP_S):
            now_s = time.monotonic()
            self.latest_s = max(self.latest_s, now_s - before_s - STEP_S)
            before_s = now_s

    def __enter__(self) -> Self:
        self.waited_s -= sum(map(_waited_s, self._pids))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.waited_s += sum(map(_waited_s, self._pids))


def _waited_s(pid: int) -> float:
    """Return for how long a process's main thread has waited for a CPU so far; 0 where the kernel does not count."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / NS_PER_S
    except (OSError, IndexError):
        return 0.0
