"""Connections to the broker's socket that never say who they are, as many as are asked for.

python -m tests.support.strangers KIND DIRECTORY NUMBER    joins as a host, sends one message of so many frames, which
                                                           are empty or pairs of a message and an id; tells of its end
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from luacell.protocol import messages
from luacell.protocol.messages import encode
from luacell.protocol.paths import BROKER_SOCKET
from tests.support.peers import Peer, is_closed_by_peer
from tests.support.waiting import LIMIT_S

_LIMIT = struct.pack("ll", int(LIMIT_S), 0)


class Strangers:
    """Silent connections, below ZeroMQ; closed at the end of the block."""

    def __init__(self, run_directory: str | Path) -> None:
        self._path = os.fspath(Path(run_directory) / BROKER_SOCKET)
        self._sockets: list[socket.socket] = []

    def connect(self, number: int) -> int:
        """Open so many connections, or as many as are let in; return how many there are now."""
        with suppress(FileNotFoundError):
            for _ in range(number):
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._sockets.append(connection)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _LIMIT)  # for where the backlog is full
                connection.connect(self._path)
        return len(self._sockets)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._sockets:
            connection.close()


def send_frames(kind: str, run_directory: str, number: int) -> None:
    """Join as a host, send one message of so many frames, and wait for the end of its session."""
    with Peer(run_directory) as peer:
        health = encode(messages.Health(request_id=1))
        first, second = {"empty": (b"", b""), "paired": (health, peer.routing_id)}[kind]
        for _ in range(number // 2):
            peer.dealer.send(first, zmq.SNDMORE)
            peer.dealer.send(second, zmq.SNDMORE)
        print("ready", flush=True)
        sys.stdin.readline()
        peer.dealer.send(b"")
        print("dropped" if is_closed_by_peer(peer.channel) else "kept", flush=True)


if __name__ == "__main__":
    send_frames(sys.argv[1], sys.argv[2], int(sys.argv[3]))
