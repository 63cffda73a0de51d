"""How much of a delay is the machine's own."""

from __future__ import annotations

import threading
import time

_STEP_S = 0.005


class Delays:
    """Measures, for the length of a block, how late a thread comes that has nothing to do but to come on time.

    Attributes:
        longest_s: by which it was late at most, seconds.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="delays")

    def _run(self) -> None:
        due_s = time.monotonic() + _STEP_S
        while not self._is_over.wait(_STEP_S):
            now_s = time.monotonic()
            self.longest_s = max(self.longest_s, now_s - due_s)
            due_s = now_s + _STEP_S

    def __enter__(self) -> Delays:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
