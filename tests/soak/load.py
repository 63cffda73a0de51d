"""Callers that note everything: several hosts of several threads each, at a pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from luacell.client import LuaHostBridge
from tests.soak.history import VALUE, WRONG, Entry, History
from tests.support.contracts import function
from tests.support.waiting import LIMIT_S

TIMEOUT_S = 2.0
NUMBER_SIZE = 4
I32_COUNT = 1 << 31


def double_after(spins: int) -> str:
    """Return DOUBLE that works for a while first, some nanoseconds a spin, so that kills meet it."""
    return function(f"""
      local sum = 0
      for number = 1, {spins} do sum = sum + number % 7 end
      ffi.cast("int32_t *", out)[0] = 2 * ffi.cast("int32_t *", args)[0] + (sum < 0 and 1 or 0)
    """)


def arguments(entry: Entry) -> bytes:
    """Return the arguments by which a contract with DOUBLE tells calls apart."""
    return (entry.number % I32_COUNT).to_bytes(NUMBER_SIZE, "little")


def judge(entry: Entry, reply: bytes) -> str:
    """Tell whether a reply is the call's own."""
    wanted = 2 * (entry.number % I32_COUNT) % (2 * I32_COUNT)
    return VALUE if reply == wanted.to_bytes(NUMBER_SIZE, "little") else WRONG


def call(bridge: LuaHostBridge, history: History, contract: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Make one call and note it; tell whether it gave its value. Whatever it raises is its outcome."""
    entry = history.sent(contract, timeout_s)
    try:
        outcome = judge(entry, bridge.call(contract, 0, arguments(entry), NUMBER_SIZE, timeout=timeout_s))
    except Exception as error:
        outcome = type(error).__name__
    history.ended(entry, outcome)
    return outcome == VALUE


class Load:
    """Hosts that call in turn, for the length of a block; each has a bridge of its own, and threads.

    Args:
        run_directory: of the service.
        history: notes all their calls.
        contracts: with DOUBLE; each thread calls them in turn.
        hosts, threads: how many, and how many in each.
        rate: calls per second, of all together.
        timeout_s: of each call.
    """

    def __init__(
        self,
        run_directory: Path,
        history: History,
        contracts: Sequence[str],
        *,
        hosts: int,
        threads: int,
        rate: float,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._timeout_s = timeout_s
        self._history = history
        self._contracts = contracts
        self._pause_s = hosts * threads / rate
        self._is_over = threading.Event()
        self._stack = ExitStack()
        self._threads: list[threading.Thread] = []
        for _ in range(hosts):
            bridge = self._stack.enter_context(LuaHostBridge.connect(run_directory))
            for _ in range(threads):
                place = len(self._threads)
                self._threads.append(threading.Thread(target=self._run, args=(bridge, place), name=f"caller {place}"))

    def _run(self, bridge: LuaHostBridge, place: int) -> None:
        due_s = time.monotonic() + self._pause_s * place / len(self._threads)
        number = place
        while not self._is_over.wait(max(0.0, due_s - time.monotonic())):
            call(bridge, self._history, self._contracts[number % len(self._contracts)], self._timeout_s)
            number += 1
            due_s = max(due_s + self._pause_s, time.monotonic() - 1.0)  # what was missed is made up for, within reason

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
        self._stack.close()
        if error is None:
            assert [thread.name for thread in self._threads if thread.is_alive()] == [], "callers hang"
