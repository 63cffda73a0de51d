"""The crash keeper: writes and reads crash records in a thread of its own, so that no disk ever holds up a call.

Crashes and questions wait in one queue, in the order in which they came: who was told of a crash and asks for it finds
it. A crash whose worker is still to die waits in its place for that, for the end of what it wrote to stderr. What is
more than the queue holds is dropped, counted and told.
"""

from __future__ import annotations

import logging
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from luacell.broker.crash_files import CrashedCall, kept_size
from luacell.broker.crash_store import CrashStore, CrashStoreError
from luacell.broker.model import Call, RecordCrash
from luacell.protocol.limits import CRASH_ARGS_MAX
from luacell.protocol.messages import CRASH_ID_LENGTH

log = logging.getLogger("luacell.broker")

WAITING_MAX: Final = 256  # crashes that wait to be written
WAITING_BYTES_MAX: Final = 4 * CRASH_ARGS_MAX  # of their arguments
QUESTIONS_MAX: Final = 16  # that wait for their answers, each of a message's size at most
LAST_WORDS_WAIT_S: Final = (
    0.25  # for the death of a worker that is killed already, a millisecond or two, and its report
)
STOP_LIMIT_S: Final = 0.5  # for what waits to be written, at the end of the broker

Body = Mapping[str, Any]
Report = Callable[[Body | None, str], None]


@dataclass(slots=True, eq=False)
class _Entry:
    """A crash that is to be written.

    Attributes:
        crashed: it; the stderr of its worker is None until that is dead.
        worker: number of that worker, or 0.
        until: when it is written in any case, in seconds, monotonic.
    """

    crashed: CrashedCall
    worker: int
    until: float

    @property
    def lacks_last_words(self) -> bool:
        """Whether its worker was alive when it was last heard of."""
        return self.crashed.crash.stderr is None

    def complete(self, last_words: str) -> None:
        """Its worker is dead."""
        self.crashed = self.crashed._replace(crash=self.crashed.crash._replace(stderr=last_words))


class CrashKeeper:
    """The thread that owns the store from `start` to `stop`.

    Args:
        store: not open yet.
        read_args: copies the first bytes of a call's arguments, whose slot is its own.
        deliver: hands a function to the loop, which calls it; called in the keeper's thread.
    """

    def __init__(
        self,
        store: CrashStore,
        read_args: Callable[[Call, int], bytes],
        deliver: Callable[[Callable[[], None]], None],
    ) -> None:
        self._store = store
        self._read_args = read_args
        self._deliver = deliver
        self._steps: deque[_Entry | Callable[[], None]] = deque()
        self._came = threading.Condition()
        self._waiting = self._waiting_bytes = self._questions = self._dropped = 0
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="luacell-crashes", daemon=True)

    def start(self) -> None:
        """Start the thread, which reads what is there."""
        self._thread.start()

    def record(self, crash: RecordCrash) -> None:
        """Have a crash written. Called by the loop, before the call's slot may be used again."""
        if not self._store.is_recording:
            return
        size = kept_size(crash)
        with self._came:
            is_full = self._waiting >= WAITING_MAX or self._waiting_bytes + (size or 0) > WAITING_BYTES_MAX
            if is_full:
                self._dropped += 1
                return
            args = None if size is None else self._read_args(crash.call, size)
            crash_id = secrets.token_hex(CRASH_ID_LENGTH // 2)
            crashed = CrashedCall(crash_id, time.time(), crash, crash.call.contract.record, args)
            self._waiting += 1
            self._waiting_bytes += size or 0
            worker = crash.call.worker
            until = time.monotonic() + LAST_WORDS_WAIT_S
            self._steps.append(_Entry(crashed, worker.id if worker is not None else 0, until))
            self._came.notify()

    def worker_ended(self, worker: int, last_words: str) -> None:
        """A worker is dead: crashes that lack the end of its stderr have it now. Called by the loop.

        Args:
            worker: its number.
            last_words: the end of its stderr.
        """
        with self._came:
            for entry in self._steps:
                if isinstance(entry, _Entry) and entry.worker == worker and entry.lacks_last_words:
                    entry.complete(last_words)
                    self._came.notify()

    def list(self, first: int, report: Report) -> bool:
        """Have a page of the list read. Called by the loop.

        Args:
            first: how many to skip.
            report: called by the loop with the answer's body, None where there is nothing of the kind, and "" or why
                there is no answer.

        Returns:
            Whether it will be; not where too many questions wait.
        """
        return self._ask(partial(self._store.page, first), report)

    def read(self, crash_id: str, part: str, report: Report) -> bool:
        """Have a part of a crash read; as `list`."""
        return self._ask(partial(self._store.part, crash_id, part), report)

    def stop(self) -> None:
        """End the thread when it has written what waits; questions are not answered any more."""
        with self._came:
            self._is_stopping = True
            self._came.notify()
        if self._thread.ident is not None:
            self._thread.join(STOP_LIMIT_S)

    def _ask(self, look: Callable[[], Body | None], report: Report) -> bool:
        with self._came:
            if self._questions >= QUESTIONS_MAX:
                return False
            self._questions += 1
            self._steps.append(partial(self._answer, look, report))
            self._came.notify()
        return True

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._store.open()
        except CrashStoreError as error:
            log.error("crash records are off", extra={"fields": {"reason": str(error)}})
        while (step := self._next()) is not None:
            if isinstance(step, _Entry):
                self._write(step.crashed)
            else:
                step()

    def _next(self) -> _Entry | Callable[[], None] | None:
        """Wait for the next step and return it; None at the end."""
        with self._came:
            while True:
                wait_s = None
                if self._steps:
                    wait_s = 0.0 if self._is_stopping else _wait_s(self._steps[0])
                    if wait_s <= 0:
                        return self._steps.popleft()
                elif self._is_stopping:
                    return None
                self._came.wait(wait_s)

    def _write(self, crashed: CrashedCall) -> None:
        try:
            self._store.add(crashed)
        except CrashStoreError as error:
            fields = {"contract": crashed.record.title, "reason": str(error)}
            log.error("crash was not recorded", extra={"fields": fields})
        with self._came:
            self._waiting -= 1
            self._waiting_bytes -= len(crashed.args or b"")
            dropped, self._dropped = self._dropped, 0
        if dropped:
            log.warning("crashes were not recorded", extra={"fields": {"count": dropped, "reason": "too many at once"}})

    def _answer(self, look: Callable[[], Body | None], report: Report) -> None:
        body: Body | None = None
        problem = ""
        try:
            body = look()
        except CrashStoreError as error:
            problem = str(error)
        with self._came:
            if not self._is_stopping:
                self._deliver(partial(self._told, report, body, problem))

    def _told(self, report: Report, body: Body | None, problem: str) -> None:
        """Report in the loop: the answer has left the queue."""
        with self._came:
            self._questions -= 1
        report(body, problem)


def _wait_s(step: _Entry | Callable[[], None]) -> float:
    """Return for how long a step is to wait in its place yet, in seconds."""
    return step.until - time.monotonic() if isinstance(step, _Entry) and step.lacks_last_words else 0.0
