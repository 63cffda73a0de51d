"""A broker and a worker host that a test starts, kills and starts again, without a parent that would do it for them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.processes import Process
from tests.support.serving import PYTHON
from tests.support.waiting import LIMIT_S, readable


class Parts:
    """A broker and its worker host at a run directory; both are killed at the end of the block."""

    def __init__(self, run_directory: Path) -> None:
        self.run_directory = run_directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self._broker: Process | None = None

    @property
    def broker(self) -> Process:
        assert self._broker is not None
        return self._broker

    def start(self) -> None:
        """Start both, and wait until the broker serves."""
        ready, report = os.pipe()
        try:
            broker = self._run("luacell.broker", "--ready-fd", str(report), pass_fds=[report])
            os.close(report)
            assert readable(ready) and os.read(ready, 1) == b"1", "the broker serves"
        finally:
            os.close(ready)
        self._broker = Process(broker.pid)
        self._run("luacell.worker")

    def _run(self, module: str, *options: str, pass_fds: list[int] | None = None) -> subprocess.Popen[bytes]:
        command = [*PYTHON, "-m", module, "--run-dir", str(self.run_directory), "--log-level", "critical", *options]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=pass_fds or ())
        self._processes.append(process)
        return process

    def kill_broker(self) -> None:
        """Kill the broker; its worker host ends by itself, and its workers with it."""
        self.broker.kill()
        for process in self._processes:
            process.wait(LIMIT_S)
        self._processes.clear()
        self.broker.close()
        self._broker = None

    def restart(self) -> None:
        """Kill the broker and start another one at the same place."""
        self.kill_broker()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        if self._broker is not None:
            self._broker.close()
