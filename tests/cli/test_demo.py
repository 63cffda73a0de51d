"""The demo against a bridge that runs the contract in this process and fails as the real one does."""

import io
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from luacell.cli import demo
from luacell.cli.demo import Books, Fault, FaultPlan, Statistics
from luacell.client import DeadlineExceeded, Quarantined, WorkerCrashed
from tests.cli.test_demo_contract import load_contract

pytestmark = pytest.mark.timeout(120)


def crash(*, signal: int | None = None, exit_code: int | None = None) -> WorkerCrashed:
    return WorkerCrashed("the worker died", began="yes", signal=signal, exit_code=exit_code)


class FakeBridge:
    """One Lua VM, and a child process that stands for its worker: kill it, and the next call dies of it."""

    def __init__(self) -> None:
        self._contract = load_contract()
        self._lock = threading.Lock()
        self.worker = self._start_worker()
        self.stranger = self._start_worker()
        self.deployed: Path | None = None
        self.calls_count = 0
        self.kills_count = 0
        self.spoil: dict[int, bytes | Exception] = {}  # by number of the call: what it answers instead

    @classmethod
    def with_capacity(cls, _count: int) -> "FakeBridge":
        return cls()

    def __enter__(self) -> "FakeBridge":
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.worker, self.stranger):
            process.kill()
            process.wait()

    def deploy(self, directory: Path) -> None:
        self.deployed = directory

    def health(self) -> dict[str, Any]:
        return {
            "workers": [
                {"pid": self.stranger.pid, "contract": "host.other@1", "state": "busy"},
                {"pid": 2**22 + 1, "contract": demo.CONTRACT, "state": "idle"},
                {"pid": self.worker.pid, "contract": demo.CONTRACT, "state": "busy"},
            ]
        }

    def call(
        self, contract: str, fn_id: int, args: bytes = b"", out_size: int = 0, *, timeout: float | None = None
    ) -> bytes:
        assert contract == demo.CONTRACT
        with self._lock:
            self.calls_count += 1
            spoilt = self.spoil.get(self.calls_count)
            if self.worker.poll() is not None:
                self.kills_count += 1
                self.worker = self._start_worker()
                raise crash(signal=signal.SIGKILL)
            if isinstance(spoilt, Exception):
                raise spoilt
            if spoilt is not None:
                return spoilt
            if fn_id == demo.COUNT:
                return self._contract(fn_id, args, out_size)
        if fn_id == demo.DEREFERENCE_NULL:
            raise crash(signal=signal.SIGSEGV)
        if fn_id == demo.EXIT:
            raise crash(exit_code=0)
        assert timeout == demo.LOOP_TIMEOUT_S
        raise DeadlineExceeded("too late", began="yes")

    @staticmethod
    def _start_worker() -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])


@pytest.fixture
def bridge() -> Iterator[FakeBridge]:
    with FakeBridge() as made:
        yield made


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"f{index}.py" for index in range(60)]
    for index, path in enumerate(paths):
        path.write_bytes(b"self.name = self.other\n" * index)
    return paths


def run(bridge: FakeBridge, files: list[Path]) -> Books:
    books, _ = demo.count_files(bridge, files, Console(file=io.StringIO()))
    books.check_answers()
    return books


def printed(books: Books) -> str:
    console = Console(file=io.StringIO(), width=200)
    demo.report(books, 1.0, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_run_demo_ends_with_the_table_and_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LuaHostBridge", FakeBridge)
    console = Console(file=io.StringIO(), width=200)
    assert demo.run_demo(console, limit=80) == 0
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for row in (
        "files +│ +80 ",
        "bytes +│ +[0-9,]+ ",
        "calls +│",
        "calls/s",
        "slowest recovery +│ +[0-9.]+ ms",
    ):
        assert re.search(row, text), row
    assert re.search(r"crashes survived +│ +8 .*null dereference.*os.exit.*endless loop.*kill -9", text)
    assert re.search(r"answers lost +│ +0 ", text)
    assert re.search(r"answers wrong +│ +0 ", text)


def test_each_call_and_each_death_is_in_the_books(bridge: FakeBridge, files: list[Path]) -> None:
    books = run(bridge, files)
    assert books.problems == []
    assert books.calls_issued == books.calls_answered == bridge.calls_count
    assert books.calls_issued == len(files) + 6 + books.calls_again
    assert books.survived == dict.fromkeys(Fault, 2)
    assert books.files_count == len(files)
    assert books.size == sum(path.stat().st_size for path in files)
    assert books.top_names.most_common(1) == [(b"self", 2 * books.lines)]
    assert books.slowest_recovery_s > 0


def test_a_call_hit_by_a_kill_from_outside_is_made_again(bridge: FakeBridge, files: list[Path]) -> None:
    bridge.worker.kill()
    bridge.worker.wait()
    books = run(bridge, files[:1])
    assert (books.calls_issued, books.calls_again, books.files_count, books.problems) == (2, 1, 1, [])
    assert len(books.to_check) == 1


def test_only_a_worker_of_the_demo_is_killed(bridge: FakeBridge) -> None:
    assert demo.kill_worker(bridge)
    assert bridge.worker.wait() == -signal.SIGKILL
    assert bridge.stranger.poll() is None


def test_a_dead_worker_is_not_killed_again(bridge: FakeBridge) -> None:
    bridge.worker.kill()
    os.waitid(os.P_PID, bridge.worker.pid, os.WEXITED | os.WNOWAIT)
    assert not demo.kill_worker(bridge)


def test_a_process_that_is_no_longer_listed_is_not_killed(bridge: FakeBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    listings = iter([[bridge.worker.pid]])
    monkeypatch.setattr(demo, "worker_pids", lambda _bridge: next(listings, []))
    descriptors_count = len(os.listdir("/proc/self/fd"))
    assert not demo.kill_worker(bridge)
    assert bridge.worker.poll() is None
    assert len(os.listdir("/proc/self/fd")) == descriptors_count


def test_a_wrong_answer_is_found(bridge: FakeBridge, files: list[Path]) -> None:
    bridge.spoil[1] = demo.RESULT.pack(1, 2, 3, 4, 5, 6, 7, b"x")
    books = run(bridge, files[:1])
    assert len(books.problems) == 1
    assert "answers wrong" in printed(books)
    assert "promise is broken" in printed(books)


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
    monkeypatch.setattr(demo, "REFUSED_PAUSE_S", 0.01)
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


def test_a_call_that_never_returns_is_lost_and_reported(
    bridge: FakeBridge, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LOST_AFTER_S", 0.2)
    monkeypatch.setattr(demo, "LAST_CALLS_S", 0.2)
    ended = threading.Event()
    monkeypatch.setattr(bridge, "call", lambda *_args, **_kwargs: ended.wait(60) and b"")
    books, _ = demo.count_files(bridge, files[:1], Console(file=io.StringIO()))
    try:
        assert books.calls_lost == 1
        assert re.search(r"answers lost +│ +1 ", printed(books))
    finally:
        ended.set()


def test_a_fault_with_the_wrong_answer_is_a_problem(bridge: FakeBridge) -> None:
    books = Books()
    caller = demo.Caller(bridge, queue.SimpleQueue(), FaultPlan(1), books, threading.Event())
    bridge.spoil = {1: b"", 2: crash(signal=signal.SIGSEGV)}
    caller._cause(Fault.NULL)
    caller._cause(Fault.EXIT)
    assert len(books.problems) == 2
    bridge.spoil = {3: DeadlineExceeded("too late", began="no")}
    caller._cause(Fault.LOOP)
    assert len(books.problems) == 2
    assert books.crashes_survived == 0


def test_own_crashes_stay_below_quarantine() -> None:
    plan = FaultPlan(2_000)
    faults = [fault for index in range(2_000) if (fault := plan.due(index, now=0.0))]
    assert len(faults) == 2_000 // demo.FILES_PER_FAULT
    assert faults[:4] == list(Fault)
    assert sum(fault in (Fault.NULL, Fault.EXIT) for fault in faults) == demo.OWN_CRASHES_MAX
    later = [plan.due(index, now=demo.OWN_CRASHES_WINDOW_S) for index in range(2_000)]
    assert later.count(Fault.NULL) + later.count(Fault.EXIT) == demo.OWN_CRASHES_MAX


def test_source_files_leaves_out_packages_and_large_files(tmp_path: Path) -> None:
    for name in ("b.py", "a/c.py", "site-packages/d.py", "a/dist-packages/e.py", "f.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    with (tmp_path / "huge.py").open("wb") as file:
        file.truncate(demo.FILE_SIZE_MAX + 1)
    assert demo.source_files(tmp_path) == [tmp_path / "a/c.py", tmp_path / "b.py"]
    assert demo.source_files(tmp_path, limit=1) == [tmp_path / "a/c.py"]


def test_the_oldest_waiting_call_is_known() -> None:
    books = Books()
    assert books.longest_wait_s(time.monotonic()) == 0
    with books.call():
        assert books.longest_wait_s(time.monotonic() + 5) >= 5
    assert books.longest_wait_s(time.monotonic()) == 0


def test_a_name_without_its_padding_is_read_from_out() -> None:
    out = demo.RESULT.pack(1, 2, 3, 4, 5, 6, 7, b"name")
    assert Statistics.from_bytes(out) == Statistics(1, 2, 3, 4, 5, 6, 7, b"name")
