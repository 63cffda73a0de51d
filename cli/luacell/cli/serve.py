"""`serve`, the parent process: starts a broker and a worker host, starts them again when they end, and ends them.

It has no ZeroMQ, no Lua and one thread, and imports little but the standard library, so that it is up in milliseconds
and hard to kill by accident. Fit to be PID 1: it reaps what falls to it. When to restart and when to give up is decided
by `luacell.cli.restarts`.

    serving ──SIGTERM, SIGINT, SIGHUP──> draining ──the same again──> ending
       ├──its host is gone, or ephemeral and told to end──────────────^
       └──a child ended too often, or refused to start────────────────^
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Final

from luacell.broker.rundir import remove_run_directory
from luacell.broker.signals import SignalPipe
from luacell.cli.children import Child, become_subreaper, reap_orphans
from luacell.cli.notify import Notifier
from luacell.cli.restarts import INTENSITY, PERIOD_S, Restarts
from luacell.protocol.confinement import DEFAULT, SANDBOX_LEVELS
from luacell.protocol.logs import LEVELS, configure_logging
from luacell.protocol.startup import hide_memory, put_right, without_secrets

DRAIN_LIMIT_S: Final = 25.0  # what the broker takes for calls in flight
DRAIN_GRACE_S: Final = 3.0  # what it may take on top, to close
READY_LIMIT_S: Final = 30.0  # for a broker to have bound its sockets
STOP_LIMIT_S: Final = 0.6  # a bridge that closes waits a little longer, and promises a second
SECOND_SIGNAL_LIMIT_S: Final = 1.0
ORPHANED_LIMIT_S: Final = 1.0  # for a worker host whose broker is gone
BROKER_GONE_LOOK_S: Final = 0.1  # a worker host may end a moment before the broker whose death it saw
EXIT_FAILED: Final = 1
REFUSALS: Final = (2, 78)  # usage and configuration; a child's, and then that of serve: a retry would not help

BROKER: Final = "broker"
WORKER_HOST: Final = "worker host"
_AT_ONCE: Final = (signal.SIGTERM, signal.SIGINT)  # two signals, which do not merge: the second means at once

log = logging.getLogger("luacell.serve")


class Parent:
    """The parent of one broker and one worker host."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._status = f"serving at {options.run_dir}"
        self._notifier = Notifier(os.environ)
        self._children: dict[str, Child] = {}
        self._restarts = {
            name: Restarts(options.max_restarts, options.restart_period) for name in (BROKER, WORKER_HOST)
        }
        self._starts: dict[str, float] = {}  # when to start which child
        self._kills: dict[str, float] = {}  # when to kill which child, should it not end by itself
        self._ready = -1  # the broker reports on it
        self._was_ready = False
        self._is_draining = False
        self._has_orphans = False  # perhaps
        self._exit_code: int | None = None  # set when everything is to end
        self._expected: set[str] = set()  # children whose end follows from another's, and does not count
        self._poll = select.poll()
        self._signals = SignalPipe((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD))
        self._poll.register(self._signals.descriptor, select.POLLIN)
        become_subreaper()

    def run(self) -> int:
        """Start, serve until told to end or nothing helps, stop; return the exit code."""
        host_pidfd = self._watch_host()
        now_s = time.monotonic()
        self._starts = {BROKER: now_s, WORKER_HOST: now_s}
        try:
            while not self._is_over():
                self._turn(host_pidfd)
            return self._exit_code or 0
        finally:
            self._clean_up()

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

    def _is_over(self) -> bool:
        return self._exit_code is not None and not self._children

    def _turn(self, host_pidfd: int) -> None:
        """Wait for what happens next and act on it."""
        self._act_on_time(time.monotonic())
        by_pidfd = {child.pidfd: child for child in self._children.values()}
        ended = []
        for descriptor, _ in self._poll.poll(self._timeout_ms()):
            if descriptor == self._signals.descriptor:
                self._on_signals()
            elif descriptor == host_pidfd:
                self._poll.unregister(host_pidfd)
                self._end(0)
            elif descriptor == self._ready:
                self._on_ready()
            elif descriptor in by_pidfd:
                ended.append(by_pidfd[descriptor])
        self._on_ends(ended)
        if self._has_orphans:
            self._has_orphans = reap_orphans(self._children.values())

    # -- time -----------------------------------------------------------------------------------------------------
    def _timeout_ms(self) -> int | None:
        if self._has_orphans:
            return 0
        times = [*self._starts.values(), *self._kills.values()]
        return max(0, int((min(times) - time.monotonic()) * 1000) + 1) if times else None

    def _act_on_time(self, now_s: float) -> None:
        for name in [name for name, when_s in self._starts.items() if when_s <= now_s]:
            del self._starts[name]
            try:
                self._start(name)
            except OSError as error:  # no memory, or too many processes
                self._restart(name, f"a start that failed: {error.strerror}", now_s)
        for name in [name for name, when_s in self._kills.items() if when_s <= now_s]:
            del self._kills[name]
            log.warning(f"the {name} did not end in time; killing it")
            self._children[name].send(signal.SIGKILL)

    def _kill_at(self, name: str, when_s: float) -> None:
        """Have a child killed if it still lives then; an earlier time that was set before holds."""
        if name in self._children:
            self._kills[name] = min(when_s, self._kills.get(name, when_s))

    # -- children -------------------------------------------------------------------------------------------------
    def _start(self, name: str) -> None:
        if name == BROKER:
            self._close_ready()
            self._ready, report = os.pipe2(os.O_CLOEXEC)
            self._poll.register(self._ready, select.POLLIN)
            try:
                child = Child(name, self._broker_command(report), [report])
            finally:
                os.close(report)
        else:
            child = Child(name, self._worker_host_command(), environment=without_secrets(os.environ))
            if self._was_ready and BROKER in self._children and BROKER not in self._kills:
                self._notifier.status(self._status)
        self._expected.discard(name)
        self._children[name] = child
        self._poll.register(child.pidfd, select.POLLIN)
        self._restarts[name].started(time.monotonic())
        if name == BROKER:
            self._kill_at(name, time.monotonic() + READY_LIMIT_S)

    def _command(self, module: str) -> list[str]:
        options = self._options
        common = ["--run-dir", str(options.run_dir), "--log-level", options.log_level, "--parent", str(os.getpid())]
        return [sys.executable, "-P", "-m", module, *common]

    def _broker_command(self, report: int) -> list[str]:
        options = self._options
        own = ["--spares", str(options.spares), "--ready-fd", str(report)]
        own += ["--state-dir", str(options.state_dir)] if options.state_dir else []
        own += ["--tcp", options.tcp] if options.tcp is not None else []
        own += [] if options.crash_records else ["--no-crash-records"]
        return [*self._command("luacell.broker"), *own, *(["--ephemeral"] if options.ephemeral else [])]

    def _worker_host_command(self) -> list[str]:
        options = self._options
        own = ["--sandbox", options.sandbox]
        own += ["--state-dir", str(options.state_dir)] if options.state_dir else []
        for path in options.c_module:
            own += ["--c-module", path]
        return [*self._command("luacell.worker"), *own]

    def _on_ready(self) -> None:
        is_ready = bool(os.read(self._ready, 1))
        self._close_ready()
        if not is_ready or self._exit_code is not None:
            return
        self._kills.pop(BROKER, None)
        log.info("serving", extra={"fields": {"run_dir": str(self._options.run_dir)}})
        if self._was_ready:
            if WORKER_HOST in self._children and WORKER_HOST not in self._expected:  # else its start will tell
                self._notifier.status(self._status)
            return
        self._was_ready = True
        self._notifier.ready(self._status)
        if self._options.ready_fd is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._options.ready_fd, b"1")
            os.close(self._options.ready_fd)

    def _close_ready(self) -> None:
        if self._ready >= 0:
            self._poll.unregister(self._ready)
            os.close(self._ready)
            self._ready = -1

    def _on_ends(self, ended: list[Child]) -> None:
        """Children have ended; the broker comes first, for the end of the worker host may follow from its."""
        broker = self._children.get(BROKER)
        if ended and broker is not None and broker not in ended and broker.ends_within(BROKER_GONE_LOOK_S):
            ended.append(broker)
        for child in sorted(ended, key=lambda child: child.name != BROKER):
            self._on_end(child)

    def _on_end(self, child: Child) -> None:
        """A child has ended: take it as asked for, start it again, or give up."""
        name, ending, code = child.name, child.ending, child.reap()
        self._forget(child)
        now_s = time.monotonic()
        if name == BROKER:
            self._orphan_worker_host(now_s)
        if self._exit_code is not None:
            return
        if code in REFUSALS:
            log.error(f"the {name} refused to start, for the reason that it gave; stopping")
            self._end(code)
        elif name in self._expected:
            self._starts[name] = now_s
        else:
            self._restart(name, ending, now_s)

    def _forget(self, child: Child) -> None:
        del self._children[child.name]
        self._kills.pop(child.name, None)
        self._poll.unregister(child.pidfd)
        child.close()

    def _orphan_worker_host(self, now_s: float) -> None:
        """The broker is gone: its worker host ends by itself, and soon."""
        self._expected.add(WORKER_HOST)
        self._kill_at(WORKER_HOST, now_s + ORPHANED_LIMIT_S)
        if self._exit_code is not None and WORKER_HOST in self._children:
            self._children[WORKER_HOST].send(*_AT_ONCE)

    def _restart(self, name: str, ending: str, now_s: float) -> None:
        delay_s = self._restarts[name].ended(now_s)
        often = self._restarts[name].describe()
        if delay_s is None:
            message = f"the {name} ended {often}, the last time with {ending}; giving up"
            log.error(message, extra={"fields": {"child": name}})
            self._end(EXIT_FAILED, message)
            return
        message = f"the {name} ended with {ending}; starting it again"
        log.error(message, extra={"fields": {"child": name, "ended": often, "delay_s": delay_s}})
        self._notifier.status(message)
        self._starts[name] = now_s + delay_s

    # -- the end --------------------------------------------------------------------------------------------------
    def _on_signals(self) -> None:
        for number in self._signals.take():
            if number == signal.SIGCHLD:
                self._has_orphans = True
            elif self._exit_code is None and not self._options.ephemeral:
                self._drain()
            elif self._is_draining:
                self._end_at_once()
            else:
                self._end(0)

    def _drain(self) -> None:
        """Let the broker finish what it has; the worker host is needed until then."""
        self._exit_code = 0
        self._is_draining = True
        self._starts.clear()
        log.info("stopping; a second signal ends at once")
        self._notifier.stopping("finishing the calls in flight")
        now_s = time.monotonic()
        if BROKER not in self._children:
            self._orphan_worker_host(now_s)
            return
        self._children[BROKER].send(signal.SIGTERM)
        for name in self._children:
            self._kill_at(name, now_s + DRAIN_LIMIT_S + DRAIN_GRACE_S)

    def _end_at_once(self) -> None:
        """A second signal came while the broker drains."""
        for name, child in self._children.items():
            child.send(*((signal.SIGTERM,) if name == BROKER else _AT_ONCE))
            self._kill_at(name, time.monotonic() + SECOND_SIGNAL_LIMIT_S)

    def _end(self, exit_code: int, why: str = "stopping") -> None:
        """End without finishing anything: nobody waits for it, or nobody could."""
        if self._exit_code is None:
            self._exit_code = exit_code
        self._starts.clear()
        self._notifier.stopping(why)
        for name, child in self._children.items():
            child.send(*_AT_ONCE)
            self._kill_at(name, time.monotonic() + STOP_LIMIT_S)

    def _clean_up(self) -> None:
        """Leave nothing, whatever happened."""
        for child in list(self._children.values()):
            child.send(signal.SIGKILL)
            self._forget(child)
        self._close_ready()
        if self._options.ephemeral:  # the broker has done it, unless it was killed
            remove_run_directory(self._options.run_dir)


def main(arguments: list[str] | None = None) -> int:
    """Serve, in the foreground or as the embedded default; return the exit code."""
    put_right()
    hide_memory()
    options = _parse(arguments)
    configure_logging(options.log_level)
    return Parent(options).run()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="luacell serve")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--state-dir", type=Path, help="RUN_DIR/state if not given")
    parser.add_argument("--spares", type=int, default=1)
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    parser.add_argument("--tcp", help="tcp://HOST:PORT on loopback for hosts without shared memory")
    parser.add_argument("--no-crash-records", dest="crash_records", action="store_false")
    parser.add_argument("--sandbox", choices=SANDBOX_LEVELS, default=DEFAULT, help="what every contract gets at least")
    parser.add_argument("--c-module", action="append", default=[], help="a C module for hardened contracts")
    parser.add_argument("--host", type=int, help="pid of the host to end with")
    parser.add_argument("--ready-fd", type=int, help="descriptor to write a byte to when serving")
    parser.add_argument("--ephemeral", action="store_true", help="remove the run directory at the end")
    parser.add_argument(
        "--max-restarts", type=int, default=INTENSITY, help="restarts of a child within the period before giving up"
    )
    parser.add_argument("--restart-period", type=float, default=PERIOD_S, help="seconds")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
