"""A service in a directory of the test's own, as `luacell serve` runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.waiting import LIMIT_S, readable

PYTHON = (sys.executable, "-P")


class Serving:
    """`serve` on a run directory, ready to be connected to; stopped at the end of the block."""

    def __init__(self, run_directory: Path, *options: str) -> None:
        self.run_directory = run_directory
        # A file: a pipe that nobody reads would stop it one day.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        ready, report = os.pipe()
        command = [
            *PYTHON,
            "-m",
            "luacell.cli.serve",
            "--run-dir",
            str(run_directory),
            "--log-level",
            "error",
            *options,
        ]
        try:
            self.process = subprocess.Popen(
                [*command, "--ready-fd", str(report)],
                stdin=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=[report],
                start_new_session=True,
            )
            os.close(report)
            is_ready = readable(ready) and os.read(ready, 1) == b"1"
        finally:
            os.close(ready)
        if not is_ready:
            self.stop()
            raise AssertionError(f"serve did not start: {self.errors}")

    def stop(self) -> None:
        """End it, by force where asking is not enough."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if not self._errors.closed:
            self._errors.seek(0)
            self.errors = self._errors.read().decode(errors="replace")
            self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def run_broker(run_directory: Path | str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a broker that must refuse to start; return how it ended."""
    command = [*PYTHON, "-m", "luacell.broker", "--run-dir", str(run_directory), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
