"""The threads of the demo's host: each has file after file counted, and insists where that may well succeed."""

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from luacell.cli.demo.books import Books
from luacell.cli.demo.counting import CONTRACT, COUNT, RESULT, Statistics, encode_args
from luacell.cli.demo.faults import (
    INJECTIONS,
    Bridge,
    Fault,
    FaultPlan,
    has_blamed,
    is_passing,
    is_refusal,
    kill_worker,
    was_killed_from_outside,
)
from luacell.client import CallError

FILES_PER_CHECK = 20
ATTEMPTS_MAX = 20  # per file; with the pauses of REFUSED_PAUSE_S ~10 s
REFUSED_PAUSE_S = 0.5


class Caller:
    """One thread of the host: takes file after file, has it counted, and causes the faults that are due."""

    def __init__(
        self,
        bridge: Bridge,
        files: "queue.SimpleQueue[tuple[int, Path]]",
        plan: FaultPlan,
        books: Books,
        stop: threading.Event,
    ) -> None:
        self._bridge = bridge
        self._files = files
        self._plan = plan
        self._books = books
        self._stop = stop
        self._failed_at: float | None = None

    def run(self) -> None:
        """Work until no file is left; what should not happen ends this caller and stands in the books."""
        try:
            while not self._stop.is_set():
                index, path = self._files.get_nowait()
                source = path.read_bytes()
                if fault := self._plan.due(index, time.monotonic()):
                    self._cause(fault)
                self._count(index, path, source)
        except queue.Empty:
            return
        except Exception as error:
            self._books.went_wrong(f"a caller ended: {error!r}")

    def _cause(self, fault: Fault) -> None:
        if fault is Fault.KILL:
            if kill_worker(self._bridge):
                self._books.died(fault)
            return
        fn_id, timeout = INJECTIONS[fault]
        answer = self._insist(was_killed_from_outside, fn_id, timeout=timeout)
        if isinstance(answer, bytes):
            self._books.went_wrong(f"{fault.value}: answered as if nothing had happened")
        elif has_blamed(fault, answer):
            self._books.died(fault)
        elif not is_passing(answer):
            self._books.went_wrong(f"{fault.value}: answered {answer!r}")

    def _count(self, index: int, path: Path, source: bytes) -> None:
        answer = self._insist(is_passing, COUNT, encode_args(source), RESULT.size)
        now = time.monotonic()
        if isinstance(answer, CallError):
            self._books.went_wrong(f"{path}: answered {answer!r}")
            return
        check = index % FILES_PER_CHECK == 0
        if self._failed_at is not None:
            self._books.recovered(now - self._failed_at)
            self._failed_at = None
            check = True  # when something has just died a wrong answer is most likely
        self._books.counted(path, source, Statistics.from_bytes(answer), check=check)

    def _insist(
        self,
        again: Callable[[CallError], bool],
        fn_id: int,
        args: bytes = b"",
        out_size: int = 0,
        timeout: float | None = None,
    ) -> bytes | CallError:
        for _ in range(ATTEMPTS_MAX):
            answer = self._call(fn_id, args, out_size, timeout)
            if isinstance(answer, bytes) or not again(answer):
                break
            self._books.called_again()
            if is_refusal(answer):
                self._stop.wait(REFUSED_PAUSE_S)
        return answer

    def _call(self, fn_id: int, args: bytes, out_size: int, timeout: float | None) -> bytes | CallError:
        with self._books.call():
            try:
                return self._bridge.call(CONTRACT, fn_id, args, out_size, timeout=timeout)
            except CallError as error:
                if fn_id != COUNT or self._failed_at is None:  # a fault of our own making starts a new outage
                    self._failed_at = time.monotonic()
                return error
