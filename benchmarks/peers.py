"""The floors that luacell is compared with: in-process Lua, a pipe ping-pong, a bare ZeroMQ relay, plain copies.

Each peer is a context manager that yields a function for one round trip, or an object that has one. Their processes
inherit the CPU placement of the benchmark, and end with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import zmq

RoundTrip = Callable[[], object]

MESSAGE = bytes(56)  # as long as a CALL with its preamble


@contextmanager
def in_process_lua(payload: bytes) -> Iterator[RoundTrip]:
    """The same echo, in this process, with the same copies: no isolation at all."""
    import ctypes

    from lupa import luajit21

    lua = luajit21.LuaRuntime(encoding="latin-1")
    echo = lua.execute(
        "local ffi = require('ffi') local cast, copy = ffi.cast, ffi.copy "
        "return function(args, out, size) copy(cast('void *', cast('uintptr_t', out)), "
        "cast('void *', cast('uintptr_t', args)), size) end"
    )
    size = len(payload)
    args, out = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
    args_address, out_address = ctypes.addressof(args), ctypes.addressof(out)
    view, result = memoryview(args).cast("B"), memoryview(out).cast("B")

    def round_trip() -> bytes:
        view[:] = payload
        echo(args_address, out_address, size)
        return bytes(result)

    yield round_trip


@contextmanager
def pipe_ping_pong(payload: bytes) -> Iterator[RoundTrip]:
    """Two pipes, Python at both ends: the cheapest way there and back that blocks."""
    to_child, from_child = os.pipe(), os.pipe()
    pid = os.fork()
    size = len(payload)
    if pid == 0:
        os.close(to_child[1])
        with suppress(OSError):
            while data := os.read(to_child[0], size):
                os.write(from_child[1], data)
        os._exit(0)
    os.close(to_child[0])
    os.close(from_child[1])

    def round_trip() -> bytes:
        os.write(to_child[1], payload)
        return os.read(from_child[0], size)

    try:
        yield round_trip
    finally:
        os.close(to_child[1])
        os.close(from_child[0])
        os.waitpid(pid, 0)


def plain_copies(size: int, count: int) -> RoundTrip:
    """`count` memcpys of `size` bytes, each from where the last one has put them."""
    import ctypes

    buffers = [ctypes.create_string_buffer(size) for _ in range(count + 1)]
    for buffer in buffers:
        ctypes.memset(buffer, 1, size)
    steps = list(pairwise(buffers))
    copy = ctypes.memmove

    def round_trip() -> None:
        for source, target in steps:
            copy(target, source, size)

    return round_trip


class Relay:
    """The host's end of a bare relay.

    Attributes:
        pids: of the other two processes.
    """

    def __init__(self, host: zmq.Socket[bytes], pids: dict[str, int]) -> None:
        self._host = host
        self.pids = pids

    def round_trip(self) -> bytes:
        self._host.send(MESSAGE)
        return self._host.recv()

    def run(self, calls: int, in_flight: int) -> float:
        """Send `calls` messages, `in_flight` ahead of their answers; return how many came back per second."""
        send, receive = self._host.send, self._host.recv
        start_s = time.perf_counter()
        for _ in range(in_flight):
            send(MESSAGE)
        for _ in range(calls - in_flight):
            receive()
            send(MESSAGE)
        for _ in range(in_flight):
            receive()
        return calls / (time.perf_counter() - start_s)


@contextmanager
def bare_relay() -> Iterator[Relay]:
    """A ROUTER between two DEALERs, each in a process: the broker's sockets and frames without its work."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "relay.sock")
        processes = {
            role: subprocess.Popen([sys.executable, "-m", "benchmarks.peers", role, path])
            for role in ("relay", "worker")
        }
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        host = context.socket(zmq.DEALER)
        host.setsockopt(zmq.ROUTING_ID, b"h" * 16)
        host.setsockopt(zmq.LINGER, 0)
        host.connect(f"ipc://{path}")
        try:
            yield Relay(host, {role: process.pid for role, process in processes.items()})
        finally:
            host.close()
            context.term()
            for process in processes.values():
                process.send_signal(signal.SIGKILL)
                process.wait()


def _relay(path: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.bind(f"ipc://{path}")
    host, worker = b"h" * 16, b"w" * 16
    receive, send, more = router.recv, router.send, zmq.SNDMORE | zmq.NOBLOCK
    waiting: list[bytes] = []
    is_worker_there = False
    while True:
        peer, message = receive(), receive()
        if peer == worker and not is_worker_there:  # its first message says that it is there
            is_worker_there = True
            for early in waiting:
                send(worker, more)
                send(early, zmq.NOBLOCK)
        elif peer == worker:
            send(host, more)
            send(message, zmq.NOBLOCK)
        elif is_worker_there:
            send(worker, more)
            send(message, zmq.NOBLOCK)
        else:
            waiting.append(message)


def _worker(path: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.ROUTING_ID, b"w" * 16)
    dealer.connect(f"ipc://{path}")
    dealer.send(MESSAGE)
    while True:
        dealer.send(dealer.recv())


if __name__ == "__main__":
    {"relay": _relay, "worker": _worker}[sys.argv[1]](sys.argv[2])
