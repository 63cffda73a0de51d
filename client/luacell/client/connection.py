"""How a host gets to a broker: the descriptor channel first, which gives it a name, then a connection of that name."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from pathlib import Path
from typing import Final, NamedTuple

from luacell.client.stream_wire import StreamWire
from luacell.client.wire import Wire, WireFull
from luacell.protocol import headers
from luacell.protocol.errors import ProtocolError, Unavailable
from luacell.protocol.headers import Op
from luacell.protocol.memory.channel import (
    ChannelClosed,
    close_all,
    connect_channel,
    receive_message,
    send_message,
)
from luacell.protocol.memory.stream import connect_stream
from luacell.protocol.messages import Hello, Welcome, decode, encode
from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET

CONNECT_LIMIT_S: Final = 5.0
_LEAST_S: Final = 0.001  # a timeout of 0 would mean something else
_MS: Final = 1000


class Connection(NamedTuple):
    """Both ways to a broker, which has greeted us on both; whoever made it closes it.

    Attributes:
        welcome: the broker's greeting: its epoch and pid.
    """

    channel: socket.socket
    wire: Wire
    welcome: Welcome

    def close(self, *, is_lost: bool = False) -> None:
        """Close both ends; what was sent last still leaves, unless the broker is gone. `end` follows."""
        self.wire.close(is_lost=is_lost)
        self.channel.close()

    def end(self) -> None:
        """Wait until it has left."""
        self.wire.end()

    def leave_in_child(self) -> None:
        """Close, in a forked child, what would hide the parent's death from the broker."""
        self.wire.leave_in_child()
        with contextlib.suppress(OSError):
            os.close(self.channel.detach())


def connect(run_directory: Path, limit_s: float = CONNECT_LIMIT_S) -> Connection:
    """Connect to the broker of a run directory, and wait until it has greeted us.

    Args:
        run_directory: of the broker.
        limit_s: seconds for all of it.

    Raises:
        Unavailable: nobody serves there, or it does not answer.
    """
    limit_s = max(limit_s, _LEAST_S)
    give_up_s = time.monotonic() + limit_s
    path = run_directory / DESCRIPTOR_SOCKET
    try:
        channel = connect_channel(path, limit_s)
    except OSError as error:
        raise Unavailable(
            f"no broker at {path}: {error.strerror or error}; start one with `luacell serve`", began="no"
        ) from None
    try:
        channel.settimeout(max(give_up_s - time.monotonic(), _LEAST_S))
        routing_id = _introduce(channel)
        left_s = max(give_up_s - time.monotonic(), _LEAST_S)
        wire = StreamWire(connect_stream(run_directory / BROKER_SOCKET, routing_id, left_s))
    except (OSError, ChannelClosed, ProtocolError) as error:
        channel.close()
        raise Unavailable(f"the broker at {path} does not answer: {error}", began="no") from None
    except BaseException:
        channel.close()
        raise
    try:
        welcome = _greet(wire, run_directory, give_up_s)
    except BaseException as error:
        wire.close(is_lost=True)
        channel.close()
        if isinstance(error, ProtocolError):
            raise Unavailable(f"the broker at {run_directory} does not answer: {error}", began="no") from None
        if isinstance(error, WireFull):
            raise Unavailable(f"the broker at {run_directory} hung up in the greeting", began="no") from None
        raise
    channel.setblocking(False)
    return Connection(channel, wire, welcome)


def _introduce(channel: socket.socket) -> bytes:
    """Say hello on the descriptor channel and return the routing id that the broker gave us."""
    send_message(channel, encode(Hello(role="host")))
    message, descriptors = receive_message(channel)
    close_all(descriptors)
    return _welcome(message).routing_id


def _greet(wire: StreamWire, run_directory: Path, give_up_s: float) -> Welcome:
    """Say hello and return the broker's answer."""
    wire.send(encode(Hello(role="host")))
    received: list[bytes] = []
    answer = select.poll()
    answer.register(wire.fileno(), select.POLLIN)
    while not received:
        left_s = max(give_up_s - time.monotonic(), _LEAST_S)
        if wire.is_at_end or not answer.poll(left_s * _MS):
            raise Unavailable(f"the broker at {run_directory} does not answer in time", began="no")
        wire.read(received.append, 1)
    return _welcome(received[0])


def _welcome(message: bytes) -> Welcome:
    op, _ = headers.parse_preamble(message)
    if op is not Op.WELCOME:
        raise ProtocolError(f"operation {op.name} in place of WELCOME")
    return decode(Welcome, message)
