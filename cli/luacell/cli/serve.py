"""`serve`, the parent process: starts a broker and a worker host, and ends what belongs together.

It has no ZeroMQ, no Lua and one thread, and imports little but the standard library, so that it is up in milliseconds
and hard to kill by accident. When one of the two ends, so does the other, and serve reports it with its exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from luacell.broker.rundir import remove_run_directory
from luacell.broker.signals import SignalPipe

STOP_LIMIT_S: Final = 1.5  # below the two seconds in which everything must be gone
READY_LIMIT_S: Final = 10.0


class Child:
    """A process that serve has started."""

    def __init__(self, name: str, command: list[str], pass_fds: list[int]) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=pass_fds)
        self.pidfd = os.pidfd_open(self._process.pid)

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def wait_or_kill(self, until_s: float) -> None:
        """Wait for its end, and force it at `until_s` (monotonic seconds)."""
        try:
            self._process.wait(max(0.0, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def ending(self) -> str:
        """How it ended, in words; after its end only."""
        code = self._process.wait()
        return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"


class Parent:
    """The parent of one broker and one worker host."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._children: list[Child] = []
        self._poll = select.poll()
        self._signals = SignalPipe((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        self._poll.register(self._signals.descriptor, select.POLLIN)

    def run(self) -> int:
        """Start, serve until something ends, stop; return the exit code."""
        host_pidfd = self._watch_host()
        ready, report = os.pipe2(os.O_CLOEXEC)
        try:
            self._start(report)
            os.close(report)
            self._poll.register(ready, select.POLLIN)
            return self._serve(host_pidfd, ready)
        finally:
            self._stop()

    def _watch_host(self) -> int:
        if self._options.host is None:
            return -1
        try:
            pidfd = os.pidfd_open(self._options.host)
        except ProcessLookupError:
            sys.exit(0)
        if os.getppid() != self._options.host:  # it died, and its number may be another's by now
            sys.exit(0)
        self._poll.register(pidfd, select.POLLIN)
        return pidfd

    def _start(self, report: int) -> None:
        options = self._options
        common = [
            "--run-dir",
            str(options.run_dir),
            "--log-level",
            options.log_level,
            "--parent",
            str(os.getpid()),
        ]
        broker = [sys.executable, "-P", "-m", "luacell.broker", *common, "--spares", str(options.spares)]
        broker += ["--tcp", options.tcp] if options.tcp is not None else []
        broker += ["--ready-fd", str(report), *(["--ephemeral"] if options.ephemeral else [])]
        worker_host = [sys.executable, "-P", "-m", "luacell.worker", *common]
        for name, command, pass_fds in (("broker", broker, [report]), ("worker host", worker_host, [])):
            child = Child(name, command, pass_fds)
            self._children.append(child)
            self._poll.register(child.pidfd, select.POLLIN)

    def _serve(self, host_pidfd: int, ready: int) -> int:
        by_pidfd = {child.pidfd: child for child in self._children}
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == ready:
                    self._poll.unregister(ready)
                    if os.read(ready, 1):
                        self._report_ready()
                    os.close(ready)
                elif descriptor in (self._signals.descriptor, host_pidfd):
                    return 0
                else:
                    child = by_pidfd[descriptor]
                    print(
                        f"luacell serve: the {child.name} ended with {child.ending}; stopping",
                        file=sys.stderr,
                    )
                    return 1

    def _report_ready(self) -> None:
        if self._options.ready_fd is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._options.ready_fd, b"1")
            os.close(self._options.ready_fd)
        else:
            print(f"luacell serve: serving at {self._options.run_dir}", file=sys.stderr, flush=True)

    def _stop(self) -> None:
        """End the children, broker first: with it gone nobody is called any more."""
        until_s = time.monotonic() + STOP_LIMIT_S
        for child in self._children:
            child.terminate()
        for child in self._children:
            child.wait_or_kill(until_s)
        if self._options.ephemeral:  # the broker has done it, unless it was killed
            remove_run_directory(self._options.run_dir)


def run(run_dir: Path, spares: int, log_level: str, tcp: str | None = None) -> int:
    """Serve in the foreground, as `luacell serve` does; return the exit code."""
    return Parent(
        argparse.Namespace(
            run_dir=run_dir, spares=spares, log_level=log_level, tcp=tcp, host=None, ready_fd=None, ephemeral=False
        )
    ).run()


def main(arguments: list[str] | None = None) -> int:
    """Serve as the embedded default; return the exit code."""
    parser = argparse.ArgumentParser(prog="luacell.cli.serve")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--spares", type=int, default=1)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--tcp", help="tcp://HOST:PORT on loopback for hosts without shared memory")
    parser.add_argument("--host", type=int, help="pid of the host to end with")
    parser.add_argument("--ready-fd", type=int, help="descriptor to write a byte to when serving")
    parser.add_argument("--ephemeral", action="store_true", help="remove the run directory at the end")
    return Parent(parser.parse_args(arguments)).run()


if __name__ == "__main__":
    sys.exit(main())
