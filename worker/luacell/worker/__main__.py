"""The worker host process: `python -m luacell.worker --run-dir DIR`.

Serves the broker of that run directory until the broker is gone; its workers end with it. At SIGTERM or SIGINT it
leaves: its workers end their calls, within 25 s; at a second signal it ends at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Final

from luacell.protocol.confinement import DEFAULT, SANDBOX_LEVELS
from luacell.protocol.errors import ProtocolError
from luacell.protocol.logs import LEVELS, configure_logging
from luacell.protocol.memory.channel import ChannelClosed
from luacell.protocol.startup import hide_memory, put_right
from luacell.worker.host import WorkerHost
from luacell.worker.modules import ModuleUnavailable, load_c_modules
from luacell.worker.sandbox.attributes import die_with_parent, wipe_environment
from luacell.worker.sandbox.levels import trial

CONNECT_LIMIT_S: Final = 10.0
EXIT_REFUSED: Final = 78  # EX_CONFIG: what was asked for cannot be had here
EXIT_BROKER_GONE: Final = 75  # EX_TEMPFAIL: another one may come; whoever started this process starts it again

log = logging.getLogger("luacell.worker-host")


def main(arguments: list[str] | None = None) -> int:
    """Run a worker host; return its exit code."""
    put_right()
    options = _parse(arguments)
    configure_logging(options.log_level)
    if options.parent:
        die_with_parent(options.parent)
    hide_memory()
    wipe_environment()
    signals, speaker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(speaker, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)
    _separate_from_terminal()
    _raise_descriptor_limit()
    _, problem = trial(options.sandbox)
    if problem:
        print(f"luacell worker-host: sandbox level {options.sandbox!r} cannot be had: {problem}", file=sys.stderr)
        return EXIT_REFUSED
    try:
        c_modules = load_c_modules(options.c_module)
    except ModuleUnavailable as error:
        print(f"luacell worker-host: {error}", file=sys.stderr)
        return EXIT_REFUSED
    forbidden = [options.state_dir.absolute()] if options.state_dir else []
    try:
        host = WorkerHost(  # absolute paths: workers leave for "/"
            options.run_dir.absolute(), CONNECT_LIMIT_S, signals, options.sandbox, forbidden, c_modules
        )
    except InterruptedError:
        return 0
    except OSError as error:
        print(f"luacell worker-host: no broker serves {options.run_dir}: {error.strerror or error}", file=sys.stderr)
        return 1
    try:
        host.run()
    except (ChannelClosed, TimeoutError, ProtocolError) as error:
        log.error("broker is gone", extra={"fields": {"reason": str(error)}})
        return EXIT_BROKER_GONE
    finally:
        host.close()
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="luacell worker-host", description="Run a worker host.")
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory of the broker")
    parser.add_argument("--state-dir", type=Path, help="of the broker, which no contract may be granted")
    parser.add_argument(
        "--sandbox", choices=SANDBOX_LEVELS, default=DEFAULT, help="level that every contract gets at least"
    )
    parser.add_argument(
        "--c-module",
        action="append",
        default=[],
        metavar="PATH",
        help="a C module that hardened contracts may require; may be repeated",
    )
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    parser.add_argument("--parent", type=int, help="pid to end with")
    return parser.parse_args(arguments)


def _note(number: int, frame: FrameType | None) -> None:
    """Do nothing: the loop hears of it by the wake-up descriptor, between two orders."""


def _separate_from_terminal() -> None:
    """Give contracts no input; what they print goes into pipes, what this process prints to where errors go."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)


def _raise_descriptor_limit() -> None:
    """Take the hard limit: each worker costs three descriptors here. Workers get the usual one back."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
