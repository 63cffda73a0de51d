"""The broker process: `python -m luacell.broker --run-dir DIR [--state-dir DIR]`.

Takes the run directory and the state directory, serves what is registered there until SIGTERM or SIGINT, and cleans
up. With `--parent` it also ends when that process does. It reports on the descriptor `--ready-fd` when its sockets
are bound. Exit codes: 0 ended as told, 70 (EX_SOFTWARE) failed in a way that nobody expected (`fatal`), 78 (EX_CONFIG)
refused to start, which another attempt would not change.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import fcntl
import gc
import logging
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from luacell.broker import fatal
from luacell.broker.directories import DirectoryError
from luacell.broker.records import make_formatter
from luacell.broker.registry_store import RegistryStore, StoreError
from luacell.broker.rundir import RunDirectory
from luacell.broker.server import BindError, Server
from luacell.broker.signals import SignalPipe
from luacell.broker.statedir import StateDirectory
from luacell.protocol.endpoints import TcpEndpoint, parse_tcp
from luacell.protocol.limits import SPARES_MAX
from luacell.protocol.logs import LEVELS, QueuedHandler, configure_queued_logging
from luacell.protocol.paths import STATE_DIRECTORY
from luacell.protocol.startup import hide_memory, put_right

# A call leaves no cycles behind; looking for some every few calls costs more than the calls' own objects.
GC_THRESHOLDS: Final = (50_000, 20, 50)
EXIT_REFUSED: Final = 78
STDERR: Final = 2
DESCRIPTORS_PREPARED: Final = 1 << 14  # 8 bytes each
LOCK_WAIT_S: Final = 0.5  # a broker that was killed, or whose parent was, gives its lock back within this
CLOSE_LIMIT_S: Final = 1.0
TRACEBACK_AT_S: Final = 0.8  # before that limit, if somebody reads stderr

log = logging.getLogger("luacell.broker")


def main(arguments: list[str] | None = None) -> int:
    """Run a broker; return its exit code."""
    put_right()
    hide_memory()
    options = _parse(arguments)
    faulthandler.enable()
    records = configure_queued_logging(options.log_level, make_formatter)
    fatal.end_with_threads(records)
    try:
        return _serve(options, records)
    except Exception as error:
        fatal.end(error, records)


def _serve(options: argparse.Namespace, records: QueuedHandler) -> int:
    """Run a broker until it is told to end; return its exit code."""
    _prepare_descriptors()
    try:
        run_directory = RunDirectory(options.run_dir, LOCK_WAIT_S)
        if options.parent:
            _end_with(options.parent, run_directory, options.ephemeral)
        state_directory = StateDirectory(options.state_dir or options.run_dir / STATE_DIRECTORY, LOCK_WAIT_S)
        registry_store = RegistryStore(state_directory.registry, durable=not options.ephemeral)
        server = Server(
            run_directory,
            options.spares,
            registry_store,
            options.tcp,
            options.parent,
            records_crashes=options.crash_records,
        )
    except (DirectoryError, StoreError, BindError) as error:
        print(f"luacell broker: {error}", file=sys.stderr)
        return EXIT_REFUSED
    signals = SignalPipe((signal.SIGTERM, signal.SIGINT))
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    if options.ready_fd is not None:
        os.write(options.ready_fd, b"1")
        os.close(options.ready_fd)
    log.info("broker started", extra={"fields": {"pid": os.getpid(), "run_dir": str(options.run_dir)}})
    server.run(signals)
    log.info("broker stopping")
    with _closing_limit():
        server.close()
        state_directory.close()
        run_directory.close(remove=options.ephemeral)
        records.close()
    return 0


@contextlib.contextmanager
def _closing_limit() -> Iterator[None]:
    """End this process if closing hangs, with a traceback where that can be written.

    The kernel's timer has the last word: a traceback may wait for ever for somebody to read it.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, CLOSE_LIMIT_S)
    faulthandler.dump_traceback_later(TRACEBACK_AT_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_REAL, 0)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="luacell broker", description="Run a broker.")
    parser.add_argument("--run-dir", type=_directory, required=True, help="directory of its sockets, mode 0700")
    parser.add_argument(
        "--state-dir", type=_directory, help="directory of its registry, mode 0700; RUN_DIR/state if not given"
    )
    parser.add_argument("--spares", type=_spares, default=1, help="blank workers to keep warm")
    parser.add_argument("--tcp", type=_tcp, help="tcp://HOST:PORT on loopback for hosts without shared memory")
    parser.add_argument(
        "--no-crash-records",
        dest="crash_records",
        action="store_false",
        help="do not keep the arguments of calls that crash their workers",
    )
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    parser.add_argument("--parent", type=int, help="pid to end with")
    parser.add_argument("--ephemeral", action="store_true", help="remove the run directory at the end")
    parser.add_argument("--ready-fd", type=int, help="descriptor to write a byte to when serving")
    return parser.parse_args(arguments)


def _directory(text: str) -> Path:
    return Path(text).absolute()  # what others are told must not depend on where they are


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


def _prepare_descriptors() -> None:
    """Take the hard limit, for libzmq aborts when its listener runs out of descriptors; and have the table made now.

    The kernel makes a process's table of descriptors larger as it fills, and where there are threads by then it waits
    for every processor first (`synchronize_rcu`): whoever opened the 513th stood still for 12 to 25 ms.
    Source: `expand_fdtable` in Linux's fs/file.c.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(OSError):
        os.close(fcntl.fcntl(STDERR, fcntl.F_DUPFD_CLOEXEC, min(hard, DESCRIPTORS_PREPARED) - 1))


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
