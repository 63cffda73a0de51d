"""A bridge that runs the contract in this process and fails as the real one does, and the demo run with it."""

import io
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from rich.console import Console

from luacell.cli.demo import counting, faults, show
from luacell.cli.demo.books import Books
from luacell.client import DeadlineExceeded, WorkerCrashed
from tests.cli.demo.test_contract import load_contract


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
                {"pid": 2**22 + 1, "contract": counting.CONTRACT, "state": "idle"},
                {"pid": self.worker.pid, "contract": counting.CONTRACT, "state": "busy"},
            ]
        }

    def call(
        self, contract: str, fn_id: int, args: bytes = b"", out_size: int = 0, *, timeout: float | None = None
    ) -> bytes:
        assert contract == counting.CONTRACT
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
            if fn_id == counting.COUNT:
                return self._contract(fn_id, args, out_size)
        if fn_id == counting.DEREFERENCE_NULL:
            raise crash(signal=signal.SIGSEGV)
        if fn_id == counting.EXIT:
            raise crash(exit_code=0)
        assert timeout == faults.LOOP_TIMEOUT_S
        raise DeadlineExceeded("too late", began="yes")

    @staticmethod
    def _start_worker() -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])


def run(bridge: FakeBridge, files: list[Path]) -> Books:
    books, _ = show.count_files(bridge, files, Console(file=io.StringIO()))
    books.check_answers()
    return books
