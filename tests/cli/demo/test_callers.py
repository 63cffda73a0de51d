"""What a caller makes of each kind of answer."""

import queue
import signal
import threading
from pathlib import Path

import pytest

from luacell.cli.demo import callers
from luacell.cli.demo.books import Books
from luacell.cli.demo.faults import Fault, FaultPlan
from luacell.client import DeadlineExceeded, Quarantined
from tests.cli.demo.support import FakeBridge, crash, run


def test_a_call_hit_by_a_kill_from_outside_is_made_again(bridge: FakeBridge, files: list[Path]) -> None:
    bridge.worker.kill()
    bridge.worker.wait()
    books = run(bridge, files[:1])
    assert (books.calls_issued, books.calls_again, books.files_count, books.problems) == (2, 1, 1, [])
    assert len(books.to_check) == 1


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (crash(signal=signal.SIGSEGV), "answered"),
        (b"short", "a caller ended"),
    ],
)
def test_an_answer_that_cannot_be_a_file_s_is_a_problem(
    bridge: FakeBridge, files: list[Path], answer: bytes | Exception, problem: str
) -> None:
    bridge.spoil[1] = answer
    books = run(bridge, files[:1])
    assert len(books.problems) == 1
    assert problem in books.problems[0]
    assert books.calls_lost == 0


def test_a_refused_call_is_made_again_after_a_pause(
    bridge: FakeBridge, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers, "REFUSED_PAUSE_S", 0.01)
    bridge.spoil = dict.fromkeys(range(1, 4), Quarantined("rests", began="no"))
    books = run(bridge, files[:1])
    assert (books.calls_issued, books.calls_again, books.problems) == (4, 3, [])
    assert books.slowest_recovery_s >= 0.03


def test_a_call_that_raises_no_answer_is_lost(bridge: FakeBridge, files: list[Path]) -> None:
    bridge.spoil[1] = RuntimeError("nobody knows")
    books = run(bridge, files)
    assert books.calls_lost == 1
    assert len(books.problems) == 1
    assert books.files_count >= len(files) - 1


def test_a_fault_with_the_wrong_answer_is_a_problem(bridge: FakeBridge) -> None:
    books = Books()
    caller = callers.Caller(bridge, queue.SimpleQueue(), FaultPlan(1), books, threading.Event())
    bridge.spoil = {1: b"", 2: crash(signal=signal.SIGSEGV)}
    caller._cause(Fault.NULL)
    caller._cause(Fault.EXIT)
    assert len(books.problems) == 2
    bridge.spoil = {3: DeadlineExceeded("too late", began="no")}
    caller._cause(Fault.LOOP)
    assert len(books.problems) == 2
    assert books.crashes_survived == 0
