"""How late this machine runs what is ready to run, so that its lateness is not blamed on luacell."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Final, Self

STEP_S: Final = 0.005
HOPS: Final = 4  # processes that an answer passes through at most: worker, worker host, broker, host


class Scheduling:
    """A thread that only sleeps, for the length of a block.

    Attributes:
        latest_s: by how much it was woken too late at most.
    """

    def __init__(self) -> None:
        self.latest_s = 0.0
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
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
