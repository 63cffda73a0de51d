"""The worker host: a single-threaded zygote that forks workers, watches them, and kills them on the broker's order.

Everything a worker needs is imported here before the first fork, so that a start costs a few milliseconds. It has no
ZeroMQ context (threads do not survive a fork) and runs no Lua. When the broker is gone it kills its workers and ends.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from luacell.protocol import headers, messages
from luacell.protocol.errors import ProtocolError
from luacell.protocol.headers import Op
from luacell.protocol.memory.channel import (
    close_all,
    connect_channel,
    receive_message,
    send_message,
)
from luacell.protocol.messages import decode, encode
from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET
from luacell.worker.process import run_worker

log = logging.getLogger("luacell.worker-host")

CONNECT_RETRY_S: Final = 0.01
SEND_LIMIT_S: Final = 5.0  # the broker reads within this, or is as good as gone


@dataclass(slots=True, eq=False)
class Child:
    """A worker as its parent sees it."""

    worker: int
    pid: int
    pidfd: int


class WorkerHost:
    """One worker host.

    Args:
        run_dir: of the broker.
        connect_limit_s: seconds to wait for the broker to listen.
        end: a descriptor that is readable when this host is to end; stays the caller's.
    """

    def __init__(self, run_dir: Path, connect_limit_s: float, end: int) -> None:
        self._broker_socket = run_dir / BROKER_SOCKET
        self._channel = _connect(run_dir / DESCRIPTOR_SOCKET, connect_limit_s)
        self._children: dict[int, Child] = {}
        self._by_worker: dict[int, Child] = {}
        self._end = end
        self._epoll = select.epoll()

    def run(self) -> None:
        """Serve until told to end.

        Raises:
            ChannelClosed: the broker is gone.
        """
        send_message(self._channel, encode(messages.Hello(role="worker-host")))
        message, _ = receive_message(self._channel)
        headers.parse_preamble(message)
        decode(messages.Welcome, message)
        self._epoll.register(self._channel, select.EPOLLIN)
        self._epoll.register(self._end, select.EPOLLIN)
        gc.collect()
        gc.freeze()  # the pages of what exists now stay shared with every worker
        while True:
            for descriptor, _ in self._epoll.poll():
                if descriptor == self._channel.fileno():
                    self._on_order()
                elif descriptor == self._end:
                    return
                elif descriptor in self._children:
                    self._on_end(self._children[descriptor])

    def close(self) -> None:
        """Kill and reap every worker."""
        for child in list(self._children.values()):
            _kill(child)
        for child in list(self._children.values()):
            with contextlib.suppress(ChildProcessError):  # reaped in the moment the signal came
                os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
            self._forget(child)
        self._channel.close()

    def _on_order(self) -> None:
        message, descriptors = receive_message(self._channel)
        close_all(descriptors)
        op, _ = headers.parse_preamble(message)
        if op is Op.START:
            self._start(decode(messages.Start, message))
        elif op is Op.KILL:
            child = self._by_worker.get(decode(messages.Kill, message).worker)
            if child is not None:
                _kill(child)
        else:
            raise ProtocolError(f"operation {op.name} is not for worker hosts")

    def _start(self, start: messages.Start) -> None:
        try:
            self._fork(start)
        except OSError as error:
            problem = f"a worker could not be started: {error.strerror}"
            log.error(problem)
            self._tell(messages.Exited(worker=start.worker, problem=problem))

    def _fork(self, start: messages.Start) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                run_worker(parent, self._broker_socket, start.routing_id, theirs)
            child = Child(start.worker, pid, os.pidfd_open(pid))
            self._children[child.pidfd] = self._by_worker[child.worker] = child
            self._epoll.register(child.pidfd, select.EPOLLIN)
            started = messages.Started(worker=start.worker, pid=pid)
            send_message(self._channel, encode(started), [child.pidfd, ours.fileno()])

    def _on_end(self, child: Child) -> None:
        result = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOHANG)
        if result is None:
            return
        self._forget(child)
        exited = result.si_code == os.CLD_EXITED
        self._tell(
            messages.Exited(
                worker=child.worker,
                signal=None if exited else result.si_status,
                exit_code=result.si_status if exited else None,
            )
        )

    def _forget(self, child: Child) -> None:
        del self._children[child.pidfd], self._by_worker[child.worker]
        with contextlib.suppress(OSError):
            self._epoll.unregister(child.pidfd)
        os.close(child.pidfd)

    def _tell(self, message: messages.Message) -> None:
        send_message(self._channel, encode(message))


def _kill(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)


def _connect(path: Path, limit_s: float) -> socket.socket:
    """Connect to a broker that may still be starting."""
    give_up_s = time.monotonic() + limit_s
    while True:
        try:
            return connect_channel(path, SEND_LIMIT_S)
        except OSError:
            if time.monotonic() >= give_up_s:
                raise
            time.sleep(CONNECT_RETRY_S)
