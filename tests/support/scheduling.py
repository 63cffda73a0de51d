"""How much of a delay is the machine's own."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from luacell.protocol.limits import NS_PER_S

_STEP_S = 0.005


class Delays:
    """Measures, for the length of a block, how late a thread comes that has nothing to do but to come on time.

    Args:
        pids: other processes that are to come on time.

    Attributes:
        longest_s: by which it was late at most, seconds.
        waited_s: for which those processes were ready to run and had no CPU, together.
    """

    def __init__(self, *pids: int) -> None:
        self.longest_s = self.waited_s = 0.0
        self._pids = pids
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="delays")

    def _run(self) -> None:
        due_s = time.monotonic() + _STEP_S
        while not self._is_over.wait(_STEP_S):
            now_s = time.monotonic()
            self.longest_s = max(self.longest_s, now_s - due_s)
            due_s = now_s + _STEP_S

    def __enter__(self) -> Delays:
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
