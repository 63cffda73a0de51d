"""Who kills workers from outside, while others call."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from luacell.client import LuacellError, LuaHostBridge
from tests.support.processes import Process, workers_of
from tests.support.waiting import LIMIT_S


class Killer:
    """Kills busy workers of a contract from outside at random moments, for the length of a block.

    Args:
        run_directory: of the service.
        contract: whose workers.
        rng: chooses worker and moment.
        pauses_s: between finding a worker and killing it, at least and at most.
    """

    def __init__(self, run_directory: Path, contract: str, rng: random.Random, pauses_s: tuple[float, float]) -> None:
        self.kills = 0
        self._contract = contract
        self._rng = rng
        self._pauses_s = pauses_s
        self._is_over = threading.Event()
        self._bridge = LuaHostBridge.connect(run_directory)
        self._thread = threading.Thread(target=self._run, name="killer")

    def _run(self) -> None:
        while not self._is_over.is_set():
            pids: list[int] = []
            with suppress(LuacellError):
                pids = workers_of(self._bridge, self._contract)
            if not pids:
                self._is_over.wait(0.001)
                continue
            with ExitStack() as stack, suppress(AssertionError, ProcessLookupError):
                victim = Process(self._rng.choice(pids))
                stack.callback(victim.close)
                self._is_over.wait(self._rng.uniform(*self._pauses_s))
                if victim.is_alive:
                    victim.kill()
                    self.kills += 1
                    victim.ends_within()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(LIMIT_S)
        self._bridge.close()
