"""The worker host: a single-threaded zygote that forks workers, watches them, and kills them on the broker's order.

Everything a worker needs is imported here before the first fork, so that a start costs a few milliseconds. It has no
ZeroMQ context (threads do not survive a fork) and runs no Lua. When the broker is gone it kills its workers and ends;
when it is told to end itself, it leaves: the broker lets its workers finish what they run, within a limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import select
import signal
import socket
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from luacell.protocol import headers, messages
from luacell.protocol.confinement import DEFAULT, SANDBOX_LEVELS, Confinement
from luacell.protocol.errors import ProtocolError
from luacell.protocol.headers import Op
from luacell.protocol.limits import KIB, NS_PER_S, US_PER_S
from luacell.protocol.memory.channel import (
    ChannelClosed,
    close_all,
    connect_channel,
    receive_message,
    send_message,
)
from luacell.protocol.messages import decode, encode
from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET
from luacell.worker.output import Outputs
from luacell.worker.process import run_worker, unbuffer_stdio
from luacell.worker.sandbox.levels import Preparation
from luacell.worker.vitals import Vitals, read_vitals

log = logging.getLogger("luacell.worker-host")

CONNECT_RETRY_S: Final = 0.01
SEND_LIMIT_S: Final = 5.0  # the broker reads within this, or is as good as gone
LEAVE_LIMIT_NS: Final = 25 * NS_PER_S  # for calls that run when this host is told to end
SIGNALS_MAX: Final = 64  # read at once
OUTPUT_WAITING_MAX: Final = 32 * KIB  # bytes in the channel beyond which output waits; from 52 on reports would, too
LAST_ORDERS_MAX: Final = 64  # that a closed channel may still hold
HOST_LEAVES: Final = "the worker host is to end"


@dataclass(slots=True, eq=False)
class Child:
    """A worker as its parent sees it.

    Attributes:
        vitals: what it was doing when it was killed by order, for the report of its death.
    """

    worker: int
    pid: int
    pidfd: int
    vitals: Vitals | None = None


class WorkerHost:
    """One worker host.

    Args:
        run_dir: of the broker.
        connect_limit_s: seconds to wait for the broker to listen.
        end: a descriptor with a byte for each signal that asks this host to end; stays the caller's.
        floor: the least strict level of the sandbox that a worker gets, whatever it is ordered as.
        forbidden: directories that no contract may be granted; the run directory is one in any case.
        c_modules: paths of C modules that are loaded already, for contracts that can load none.

    Raises:
        InterruptedError: it is to end before it has found a broker.
        OSError: there is no broker within the limit.
    """

    def __init__(
        self,
        run_dir: Path,
        connect_limit_s: float,
        end: int,
        floor: str = DEFAULT,
        forbidden: Sequence[Path] = (),
        c_modules: Sequence[str] = (),
    ) -> None:
        self._floor = floor
        self._forbidden = tuple(map(str, (run_dir, *forbidden)))
        self._c_modules = c_modules
        self._prepared: dict[Confinement, Preparation] = {}  # those without grants, of which there are few
        self._broker_socket = run_dir / BROKER_SOCKET
        self._channel = _connect(run_dir / DESCRIPTOR_SOCKET, connect_limit_s, end)
        self._children: dict[int, Child] = {}
        self._by_worker: dict[int, Child] = {}
        self._end = end
        self._epoll = select.epoll()
        self._outputs = Outputs(self._pass_on)
        self._signal_count = 0
        self._leave_ns: int | None = None  # when to end in any case, once it leaves
        self._broker_ends = False

    def run(self) -> None:
        """Serve until the broker ends, or until this host has left.

        Raises:
            ChannelClosed: the broker is gone without having said so.
        """
        send_message(self._channel, encode(messages.Hello(role="worker-host")))
        message, _ = receive_message(self._channel)
        headers.parse_preamble(message)
        decode(messages.Welcome, message)
        self._epoll.register(self._channel, select.EPOLLIN)
        self._epoll.register(self._end, select.EPOLLIN)
        self._epoll.register(self._outputs.descriptor, select.EPOLLIN)
        unbuffer_stdio()
        with contextlib.suppress(OSError):  # then the start of a worker tells
            for level in SANDBOX_LEVELS:
                self._prepare(Confinement(level))
        gc.collect()
        gc.freeze()  # the pages of what exists now stay shared with every worker
        try:
            while not self._is_over():
                for descriptor, _ in self._epoll.poll(self._timeout_s()):
                    if descriptor == self._channel.fileno():
                        self._on_order()
                    elif descriptor == self._end:
                        self._on_signals()
                    elif descriptor in self._children:
                        self._on_end(self._children[descriptor])
                self._outputs.turn(time.monotonic_ns())
        except ChannelClosed:
            self._hear_last_orders()
            if not self._broker_ends:
                raise
            log.info("broker has ended")

    def _is_over(self) -> bool:
        if self._leave_ns is None:
            return False
        return not self._children or self._signal_count > 1 or time.monotonic_ns() >= self._leave_ns

    def _timeout_s(self) -> float | None:
        """Return how long to wait for an event at most, or None."""
        times = [when_ns for when_ns in (self._outputs.next_ns(), self._leave_ns) if when_ns is not None]
        return max(0, min(times) - time.monotonic_ns()) / NS_PER_S if times else None

    def close(self) -> None:
        """Kill and reap every worker."""
        for child in list(self._children.values()):
            _kill(child)
        for child in list(self._children.values()):
            with contextlib.suppress(ChildProcessError):  # reaped in the moment the signal came
                os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
            self._forget(child)
        for preparation in self._prepared.values():
            preparation.close()
        self._outputs.close()
        self._channel.close()

    def _on_signals(self) -> None:
        """Begin to leave, or at a second signal do so at once."""
        self._signal_count += len(os.read(self._end, SIGNALS_MAX))
        if self._leave_ns is None:
            self._leave_ns = time.monotonic_ns() + LEAVE_LIMIT_NS
            log.info("worker host leaves", extra={"fields": {"workers": len(self._children)}})
            self._tell(messages.Leaving())

    def _on_order(self) -> None:
        message, descriptors = receive_message(self._channel)
        close_all(descriptors)
        op, _ = headers.parse_preamble(message)
        if op is Op.START:
            self._start(decode(messages.Start, message))
        elif op is Op.KILL:
            child = self._by_worker.get(decode(messages.Kill, message).worker)
            if child is not None:
                child.vitals = read_vitals(child.pid)
                _kill(child)
        elif op is Op.INSPECT:
            self._inspect(decode(messages.Inspect, message))
        elif op is Op.END:
            decode(messages.End, message)
            self._broker_ends = True
        else:
            raise ProtocolError(f"operation {op.name} is not for worker hosts")

    def _hear_last_orders(self) -> None:
        """Read what lies behind a reset, which a broker causes that closes before it has read everything."""
        with contextlib.suppress(ChannelClosed, ProtocolError, OSError):
            for _ in range(LAST_ORDERS_MAX):
                message, descriptors = receive_message(self._channel)
                close_all(descriptors)
                if headers.parse_preamble(message)[0] is Op.END:
                    self._broker_ends = True

    def _start(self, start: messages.Start) -> None:
        if self._leave_ns is not None:  # the order and the news that this host leaves have crossed
            self._tell(messages.Exited(worker=start.worker, problem=HOST_LEAVES))
            return
        try:
            self._fork(start)
        except OSError as error:
            problem = f"a worker could not be started: {error.strerror}"
            log.error(problem)
            self._tell(messages.Exited(worker=start.worker, problem=problem))

    def _prepare(self, wanted: Confinement) -> contextlib.AbstractContextManager[Preparation]:
        """Return what a worker's sandbox needs; it is kept where others will need the same."""
        confinement = wanted.at_least(self._floor)
        if confinement.has_grants:
            return Preparation(confinement, self._forbidden)
        if confinement not in self._prepared:
            self._prepared[confinement] = Preparation(confinement, self._forbidden)
        return contextlib.nullcontext(self._prepared[confinement])

    def _fork(self, start: messages.Start) -> None:
        wanted = Confinement(start.sandbox, start.read, start.write, start.network)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, _Pipes() as pipes, self._prepare(wanted) as preparation:
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                run_worker(
                    parent,
                    self._broker_socket,
                    start.routing_id,
                    theirs,
                    pipes.write_ends,
                    preparation,
                    self._c_modules,
                )
            child = Child(start.worker, pid, _pidfd_of_child(pid))
            self._children[child.pidfd] = self._by_worker[child.worker] = child
            try:
                self._outputs.add(child.worker, *pipes.give_read_ends())
                self._epoll.register(child.pidfd, select.EPOLLIN)
                started = messages.Started(worker=start.worker, pid=pid)
                send_message(self._channel, encode(started), [child.pidfd, ours.fileno()])
            except OSError:  # nobody would hear of its end
                _kill(child)
                os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
                self._forget(child)
                raise

    def _inspect(self, asked: messages.Inspect) -> None:
        """Say what a worker is doing; the report of its death is the answer where it is dead."""
        child = self._by_worker.get(asked.worker)
        if child is not None:
            vitals = read_vitals(child.pid)
            self._tell(messages.Inspected(worker=asked.worker, sequence=asked.sequence, **vitals._asdict()))

    def _on_end(self, child: Child) -> None:
        if os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return
        _, status, usage = os.wait4(child.pid, 0)  # a zombie's pid is its own until this
        tail = self._forget(child)
        if tail:
            self._tell(messages.Output(worker=child.worker, stream="tail", data=tail))
        self._tell(
            messages.Exited(
                worker=child.worker,
                signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
                exit_code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                cpu_us=int((usage.ru_utime + usage.ru_stime) * US_PER_S),
                memory=usage.ru_maxrss * KIB,
                state=child.vitals.state if child.vitals else "",
                wchan=child.vitals.wchan if child.vitals else "",
            )
        )

    def _forget(self, child: Child) -> bytes:
        """Forget a dead worker; return the end of its stderr."""
        del self._children[child.pidfd], self._by_worker[child.worker]
        with contextlib.suppress(OSError):
            self._epoll.unregister(child.pidfd)
        os.close(child.pidfd)
        return self._outputs.end(child.worker, time.monotonic_ns())

    def _tell(self, message: messages.Message) -> None:
        send_message(self._channel, encode(message))

    def _pass_on(self, output: messages.Output) -> bool:
        """Tell the broker what a contract printed, where that needs no waiting and leaves room for reports."""
        channel = self._channel.fileno()  # bare, and non-blocking: a socket with a timeout would wait for room
        try:
            waiting = fcntl.ioctl(channel, termios.TIOCOUTQ, bytes(4))
            if int.from_bytes(waiting, sys.byteorder) > OUTPUT_WAITING_MAX:
                return False
            os.write(channel, encode(output))
        except OSError:  # the broker is gone; whoever waits for the channel hears of it
            return False
        return True


class _Pipes:
    """The pipes for a worker's stdout and stderr; what was not given away is closed at the end of the block."""

    def __init__(self) -> None:
        self._open: list[int] = []

    def __enter__(self) -> Self:
        try:
            for _ in range(2):
                self._open += os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            close_all(self._open)
            raise
        return self

    @property
    def write_ends(self) -> tuple[int, int]:
        return self._open[1], self._open[3]

    def give_read_ends(self) -> tuple[int, int]:
        stdout, stderr = self._open[0], self._open[2]
        self._open = list(self.write_ends)
        return stdout, stderr

    def __exit__(self, *_: object) -> None:
        close_all(self._open)


def _pidfd_of_child(pid: int) -> int:
    """Return a pidfd of a child; one that there is none for is ended.

    Raises:
        OSError: no descriptor or no memory.
    """
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)  # the number is its own until it is waited for
        os.waitpid(pid, 0)
        raise


def _kill(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)


def _connect(path: Path, limit_s: float, end: int) -> socket.socket:
    """Connect to a broker that may still be starting."""
    give_up_s = time.monotonic() + limit_s
    poll = select.poll()
    poll.register(end, select.POLLIN)
    while True:
        try:
            return connect_channel(path, SEND_LIMIT_S)
        except OSError:
            if time.monotonic() >= give_up_s:
                raise
        if poll.poll(CONNECT_RETRY_S * 1000):
            raise InterruptedError("told to end")
