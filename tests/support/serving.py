"""A service in a directory of the test's own, as `luacell serve` runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from luacell.client import LuaHostBridge, Unavailable
from tests.support.processes import Processes
from tests.support.waiting import LIMIT_S, eventually, readable

PYTHON = (sys.executable, "-P")
# Runs a command without what lets root read and write everything (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH); prctl(24)
# is PR_CAPBSET_DROP. Other users have neither, and may not drop them: for them this does nothing.
AS_THE_FILES_SAY = (
    *(sys.executable, "-c"),
    "import ctypes, os, sys; [ctypes.CDLL(None).prctl(24, each, 0, 0, 0) for each in (1, 2)];"
    "os.execv(sys.argv[1], sys.argv[1:])",
)
# Runs a command where landlock_create_ruleset is a call that the kernel does not know.
WITHOUT_LANDLOCK = (
    *(sys.executable, "-c"),
    "import os, sys; from luacell.worker.sandbox import attributes, bpf, seccomp; attributes.forgo_privileges();"
    "seccomp.install(bpf.assemble([bpf.Rule('landlock', 444, bpf.UNKNOWN)], otherwise=bpf.ALLOW));"
    "os.execv(sys.argv[1], sys.argv[1:])",
)
# As if the kernel had no seccomp.
WITHOUT_SECCOMP = (
    *(sys.executable, "-c"),
    "import os, sys; from luacell.worker.sandbox import attributes, bpf, seccomp; attributes.forgo_privileges();"
    "prctl = bpf.Rule('prctl', 157, bpf.ALLOW, condition=bpf.Condition(0, (22,)), met=bpf.REFUSED);"
    "rules = [bpf.Rule('seccomp', 317, bpf.UNKNOWN), prctl];"
    "seccomp.install(bpf.assemble(rules, otherwise=bpf.ALLOW));"
    "os.execv(sys.argv[1], sys.argv[1:])",
)
# As a user without rights, but for reading the interpreter, which root may keep at home.
NOBODY = 65534
AS_NOBODY = (
    "setpriv",
    *(f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)


class Serving:
    """`serve` on a run directory, ready to be connected to; stopped at the end of the block.

    Attributes:
        start_s: how long it took until it was ready: the starts of the parent and of the broker, seconds.
    """

    def __init__(
        self,
        run_directory: Path,
        *options: str,
        state_directory: Path | None = None,
        log_level: str = "error",
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        program: Sequence[str] = ("-m", "luacell.cli.serve"),
        stderr: int | None = None,
    ) -> None:
        self.run_directory = run_directory
        # A file: a pipe that nobody reads would stop it one day.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        ready, report = os.pipe()
        command = [
            *prefix,
            *PYTHON,
            *program,
            "--run-dir",
            str(run_directory),
            "--log-level",
            log_level,
            *([] if state_directory is None else ["--state-dir", str(state_directory)]),
            *options,
        ]
        started_s = time.monotonic()
        try:
            self.process = subprocess.Popen(
                [*command, "--ready-fd", str(report)],
                stdin=subprocess.DEVNULL,
                stderr=self._errors if stderr is None else stderr,
                env={**os.environ, **(environment or {})},
                pass_fds=[report],
                start_new_session=True,
            )
            os.close(report)
            is_ready = readable(ready) and os.read(ready, 1) == b"1"
            self.start_s = time.monotonic() - started_s
        finally:
            os.close(ready)
        if not is_ready:
            self.stop()
            raise AssertionError(f"serve did not start: {self.errors}")

    def records(self, event: str | None = None, **fields: object) -> list[dict[str, Any]]:
        """Return the log records there are, of one event or all, that have these fields."""
        size = os.fstat(self._errors.fileno()).st_size
        lines = os.pread(self._errors.fileno(), size, 0).decode(errors="replace").split("\n")[:-1]
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [
            record
            for record in found
            if event in (None, record["event"]) and all(record.get(key) == value for key, value in fields.items())
        ]

    def record(self, event: str, **fields: object) -> dict[str, Any]:
        """Wait for a record."""

        def look() -> dict[str, Any] | None:
            return next(iter(self.records(event, **fields)), None)

        return eventually(look, f"there is a record {event!r} with {fields}")

    def processes(self) -> Processes:
        """Find the processes of the service as they are now."""
        with LuaHostBridge.connect(self.run_directory) as bridge:
            return eventually(lambda: _complete(bridge), "the service is complete")

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
            self.history = self.records()
            self._errors.seek(0)
            self.errors = self._errors.read().decode(errors="replace")
            self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _complete(bridge: LuaHostBridge) -> Processes | None:
    with suppress(ValueError, AssertionError, ProcessLookupError):  # one of them is being started
        return Processes.of(bridge)
    return None


def listens(run_directory: Path) -> bool:
    """Tell whether a broker takes connections there, which its socket's being there does not say yet."""
    with suppress(Unavailable), LuaHostBridge.connect(run_directory):
        return True
    return False


def run_broker(
    run_directory: Path | str, *options: str, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a broker that must refuse to start; return how it ended."""
    command = [*prefix, *PYTHON, "-m", "luacell.broker", "--run-dir", str(run_directory), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
