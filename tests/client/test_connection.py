"""How connecting ends where a broker goes in the middle of it."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from luacell.client.connection import connect
from luacell.protocol import zmtp
from luacell.protocol.errors import Unavailable
from luacell.protocol.memory.channel import receive_message, send_message
from luacell.protocol.messages import Welcome, encode
from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET
from tests.support.waiting import LIMIT_S

ROUTING_ID = b"r" * 16
READY = zmtp.ready(ROUTING_ID)
HELLO_MAX = 4096  # bytes


def accepting(path: Path, kind: socket.SocketKind) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind(os.fspath(path))
    listener.listen()
    listener.settimeout(LIMIT_S)
    return listener


@contextmanager
def broker(end: Callable[[socket.socket], object]) -> Iterator[Path]:
    """A broker that greets one host on its descriptor socket, and ends as told in the greetings of the other one."""
    with (
        tempfile.TemporaryDirectory(prefix="going-") as directory,
        accepting(Path(directory) / DESCRIPTOR_SOCKET, socket.SOCK_SEQPACKET) as channels,
        accepting(Path(directory) / BROKER_SOCKET, socket.SOCK_STREAM) as streams,
    ):

        def serve() -> None:
            channel, _ = channels.accept()
            with channel:
                receive_message(channel)
                send_message(channel, encode(Welcome(routing_id=ROUTING_ID, epoch=bytes(8), broker_pid=1)))
                stream, _ = streams.accept()
                with stream:
                    stream.recv(zmtp.GREETING_SIZE, socket.MSG_WAITALL)
                    stream.sendall(zmtp.GREETING)
                    stream.recv(len(READY), socket.MSG_WAITALL)
                    end(stream)

        thread = threading.Thread(target=serve)
        thread.start()
        yield Path(directory)
        thread.join()


def go_before_hello(stream: socket.socket) -> None:
    stream.shutdown(socket.SHUT_RD)
    stream.sendall(READY)


def go_before_welcome(stream: socket.socket) -> None:
    stream.sendall(READY)
    stream.recv(HELLO_MAX)


def go_within_welcome(stream: socket.socket) -> None:
    go_before_welcome(stream)
    stream.sendall(zmtp.frame(encode(Welcome(routing_id=b"", epoch=bytes(8), broker_pid=1)))[:-1])


@pytest.mark.parametrize("end", [go_before_hello, go_before_welcome, go_within_welcome])
def test_broker_that_goes_while_a_host_connects_is_unavailable(end: Callable[[socket.socket], object]) -> None:
    with broker(end) as directory, pytest.raises(Unavailable) as caught:
        connect(directory, LIMIT_S)
    assert caught.value.began == "no"


def test_broker_that_answers_something_else_is_unavailable() -> None:
    def answer(stream: socket.socket) -> None:
        go_before_welcome(stream)
        stream.sendall(zmtp.frame(b"HTTP/1.1 400"))

    with broker(answer) as directory, pytest.raises(Unavailable, match="does not answer"):
        connect(directory, LIMIT_S)
