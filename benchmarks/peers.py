"""The floors that luacell is compared with: in-process Lua, a pipe ping-pong, a bare ZeroMQ relay.

Each peer is a context manager that yields a function for one round trip. Their processes inherit the CPU placement of
the benchmark, and end with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def bare_relay() -> Iterator[RoundTrip]:
    """A ROUTER between two DEALERs, each in a process: the broker's sockets and frames without its work."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "relay.sock")
        processes = [
            subprocess.Popen([sys.executable, "-m", "benchmarks.peers", role, path]) for role in ("relay", "worker")
        ]
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        host = context.socket(zmq.DEALER)
        host.setsockopt(zmq.ROUTING_ID, b"h" * 16)
        host.setsockopt(zmq.LINGER, 0)
        host.connect(f"ipc://{path}")

        def round_trip() -> bytes:
            host.send(MESSAGE)
            return host.recv()

        try:
            yield round_trip
        finally:
            host.close()
            context.term()
            for process in processes:
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
