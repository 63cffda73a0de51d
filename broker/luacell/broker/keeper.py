"""The keeper: writes changes to the registry's file in a thread of its own, so that no disk ever holds up a call.

Changes are written one after the other in the order they were asked for, and reported in that order. It decides
nothing: what a change means, and what its failure does, is its owner's business.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from luacell.broker.registry import ContractRecord
from luacell.broker.registry_store import RegistryStore, StoreError

log = logging.getLogger("luacell.broker")

CHANGES_MAX: Final = 256  # that wait to be written; at 20 ms for the largest about 5 s, below a request's limit
STOP_LIMIT_S: Final = 2.0  # a disk that hangs must not hold up the end of the broker

Report = Callable[[str], None]


class Keeper:
    """The thread that owns the store from `start` to `stop`.

    Args:
        store: open; the keeper closes it.
        deliver: hands a function to the loop, which calls it; called in the keeper's thread.
    """

    def __init__(self, store: RegistryStore, deliver: Callable[[Callable[[], None]], None]) -> None:
        self._store = store
        self._deliver = deliver
        self._changes: deque[tuple[Callable[[], None], Report]] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="luacell-keeper", daemon=True)

    @property
    def is_full(self) -> bool:
        """Whether another change would exceed the bound on those that wait."""
        return len(self._changes) >= CHANGES_MAX

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, record: ContractRecord, report: Report) -> None:
        """Write a contract. Called by the loop.

        Args:
            record: not a private one.
            report: called by the loop when it is written, with "" or why it is not.
        """
        self._ask(partial(self._store.put, record), report)

    def put_all(self, records: Sequence[ContractRecord], report: Report) -> None:
        """Write several contracts, all or none; as `put`."""
        self._ask(partial(self._store.put, *records), report)

    def remove(self, contract_ids: Sequence[int], report: Report) -> None:
        """Remove contracts, all or none; as `put`."""
        self._ask(partial(self._store.remove, *contract_ids), report)

    def stop(self) -> None:
        """End the thread and close the store; changes that are not written yet are not, and nobody was told so."""
        with self._changed:
            self._is_stopping = True
            self._changes.clear()
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(STOP_LIMIT_S)
        if self._thread.is_alive():
            log.error("registry is not closed: its disk does not answer", extra={"fields": {"path": self._store.path}})
        else:
            self._store.close()

    def _ask(self, change: Callable[[], None], report: Report) -> None:
        with self._changed:
            self._changes.append((change, report))
            self._changed.notify()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            with self._changed:
                while not self._changes and not self._is_stopping:
                    self._changed.wait()
                if self._is_stopping:
                    return
                change, report = self._changes.popleft()
            problem = _done(change)
            with self._changed:
                if not self._is_stopping:
                    self._deliver(partial(report, problem))


def _done(change: Callable[[], None]) -> str:
    """Make a change; return "" or why it failed."""
    try:
        change()
    except StoreError as error:
        log.error("registry was not written", extra={"fields": {"reason": str(error)}})
        return str(error)
    return ""
