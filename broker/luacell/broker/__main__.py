"""The broker process: `python -m luacell.broker --run-dir DIR`.

Takes the run directory, serves until SIGTERM or SIGINT, and cleans up. With `--parent` it also ends when that process
does. It reports on the descriptor `--ready-fd` when its sockets are bound.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import resource
import select
import signal
import sys
import threading
from pathlib import Path
from typing import Final

from luacell.broker.rundir import RunDirectory, RunDirectoryError
from luacell.broker.server import Server
from luacell.broker.signals import SignalPipe
from luacell.protocol.endpoints import TcpEndpoint, parse_tcp
from luacell.protocol.limits import SPARES_MAX
from luacell.protocol.logs import configure_logging

# A call leaves no cycles behind; looking for some every few calls costs more than the calls' own objects.
GC_THRESHOLDS: Final = (50_000, 20, 50)


def main(arguments: list[str] | None = None) -> int:
    """Run a broker; return its exit code."""
    options = _parse(arguments)
    configure_logging(options.log_level)
    _raise_descriptor_limit()
    try:
        run_directory = RunDirectory(options.run_dir)
    except RunDirectoryError as error:
        print(f"luacell broker: {error}", file=sys.stderr)
        return 1
    if options.parent:
        _end_with(options.parent, run_directory, options.ephemeral)
    signals = SignalPipe((signal.SIGTERM, signal.SIGINT))
    try:
        server = Server(run_directory, options.spares, options.tcp)
    except OSError as error:
        print(f"luacell broker: {error.strerror}", file=sys.stderr)
        run_directory.close(remove=options.ephemeral)
        return 1
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    if options.ready_fd is not None:
        os.write(options.ready_fd, b"1")
        os.close(options.ready_fd)
    try:
        server.run(signals)
    finally:
        try:
            server.close()
        finally:
            run_directory.close(remove=options.ephemeral)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="luacell broker", description="Run a broker.")
    parser.add_argument("--run-dir", type=Path, required=True, help="directory of its sockets, mode 0700")
    parser.add_argument("--spares", type=_spares, default=1, help="blank workers to keep warm")
    parser.add_argument("--tcp", type=_tcp, help="tcp://HOST:PORT on loopback for hosts without shared memory")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--parent", type=int, help="pid to end with")
    parser.add_argument("--ephemeral", action="store_true", help="remove the run directory at the end")
    parser.add_argument("--ready-fd", type=int, help="descriptor to write a byte to when serving")
    return parser.parse_args(arguments)


def _spares(text: str) -> int:
    value = int(text)
    if not 0 <= value <= SPARES_MAX:
        raise argparse.ArgumentTypeError(f"{value} is outside 0..{SPARES_MAX}")
    return value


def _tcp(text: str) -> TcpEndpoint:
    try:
        return parse_tcp(text, may_choose=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _raise_descriptor_limit() -> None:
    """Take the hard limit: libzmq aborts when its listener runs out of descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _end_with(parent: int, run_directory: RunDirectory, ephemeral: bool) -> None:
    """End this process as soon as `parent` is dead, whatever the loop is doing; leave no files."""

    def wait(pidfd: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
        run_directory.close(remove=ephemeral)
        os._exit(1)

    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=wait, args=(pidfd,), name="luacell-parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
