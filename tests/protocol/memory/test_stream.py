"""Connecting to a ROUTER without libzmq."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from luacell.protocol import zmtp
from luacell.protocol.errors import ProtocolError
from luacell.protocol.memory.channel import ChannelClosed
from luacell.protocol.memory.stream import connect_stream
from tests.support.waiting import LIMIT_S

SHORT_S = 0.05  # for what must not come


@pytest.fixture
def path() -> Iterator[Path]:
    directory = tempfile.mkdtemp(prefix="zmtp-")  # pytest's own may be too long for a socket
    yield Path(directory) / "router.sock"
    shutil.rmtree(directory)


@contextmanager
def router(path: Path) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket_:
        socket_.linger = 0
        socket_.rcvtimeo = int(LIMIT_S * 1000)
        socket_.router_mandatory = True
        socket_.bind(f"ipc://{path}")
        yield socket_


@contextmanager
def server(path: Path, serve: Callable[[socket.socket], object]) -> Iterator[None]:
    """Something else that listens there, for one connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        listener.settimeout(LIMIT_S)

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                serve(connection)

        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize("size", [0, 1, 255, 256, 1 << 20])
def test_messages_go_both_ways(path: Path, size: int) -> None:
    message = os.urandom(size)
    with router(path) as socket_, connect_stream(path, b"somebody", LIMIT_S) as stream:
        sender = threading.Thread(target=stream.sendall, args=[zmtp.frame(message)])
        sender.start()
        assert socket_.recv_multipart() == [b"somebody", message]
        sender.join()
        socket_.send_multipart([b"somebody", message])
        expected = zmtp.frame(message)
        assert stream.recv(len(expected), socket.MSG_WAITALL) == expected


def test_the_end_of_the_other_side_is_seen(path: Path) -> None:
    with router(path) as socket_, connect_stream(path, b"a", LIMIT_S) as stream:
        stream.sendall(zmtp.frame(b"x"))
        assert socket_.recv_multipart() == [b"a", b"x"]
        socket_.close()
        assert stream.recv(1) == b""


def test_nobody_listens_there(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect_stream(path, b"id", SHORT_S)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(os.fspath(path))
    with pytest.raises(ConnectionRefusedError):
        connect_stream(path, b"id", SHORT_S)


def test_silence_ends(path: Path) -> None:
    over = threading.Event()
    with server(path, lambda _: over.wait(LIMIT_S)):
        try:
            with pytest.raises(TimeoutError, match=r"nobody answered within 0\.05 s at .*router\.sock"):
                connect_stream(path, b"id", SHORT_S)
        finally:
            over.set()


def test_a_greeting_that_drips_ends_in_time_as_well(path: Path) -> None:
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        for byte in zmtp.GREETING:
            if over.wait(SHORT_S / 5):
                return
            connection.send(bytes([byte]), socket.MSG_NOSIGNAL)

    with server(path, drip):
        try:
            with pytest.raises(TimeoutError):
                connect_stream(path, b"id", SHORT_S)
        finally:
            over.set()


def test_who_hangs_up_in_the_greeting_is_gone(path: Path) -> None:
    def hang_up(connection: socket.socket) -> None:
        connection.sendall(zmtp.GREETING[:20])
        connection.recv(zmtp.GREETING_SIZE, socket.MSG_WAITALL)

    with server(path, hang_up), pytest.raises(ChannelClosed, match="ended in the greeting"):
        connect_stream(path, b"id", LIMIT_S)


def test_who_hangs_up_in_the_greeting_costs_no_sigpipe(path: Path) -> None:
    """Programs that want to die of it, as command lines do, mean their own output."""

    def stop_reading(connection: socket.socket) -> None:
        connection.recv(zmtp.GREETING_SIZE, socket.MSG_WAITALL)
        connection.shutdown(socket.SHUT_RD)
        connection.sendall(zmtp.GREETING)

    seen: list[int] = []
    before = signal.signal(signal.SIGPIPE, lambda number, _: seen.append(number))
    try:
        with server(path, stop_reading), pytest.raises(BrokenPipeError):
            connect_stream(path, b"id", LIMIT_S)
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert seen == []


def test_what_speaks_something_else_is_refused(path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n".ljust(zmtp.GREETING_SIZE))
        connection.recv(1 << 16, socket.MSG_WAITALL)

    with server(path, answer), pytest.raises(ProtocolError, match="no ZMTP greeting"):
        connect_stream(path, b"id", LIMIT_S)
