"""How a host gets to a broker: the descriptor channel first, which gives it a name, then a DEALER of that name."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final, NamedTuple

import zmq

from luacell.protocol import headers
from luacell.protocol.errors import ProtocolError, Unavailable
from luacell.protocol.headers import Op
from luacell.protocol.limits import MESSAGE_MAX
from luacell.protocol.memory.channel import (
    ChannelClosed,
    close_all,
    connect_channel,
    receive_message,
    send_message,
)
from luacell.protocol.messages import Hello, Welcome, decode, encode
from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET

CONNECT_LIMIT_S: Final = 5.0
HIGH_WATER_MARK: Final = 4096
ALONE_MS: Final = 20  # how long the only thread waits inside libzmq before it waits for everything
_MS: Final = 1000
_LINGER_MS: Final = 100  # for the farewell


class Connection(NamedTuple):
    """Both ways to a broker; whoever made it closes it."""

    channel: socket.socket
    context: zmq.Context[zmq.Socket[bytes]]
    dealer: zmq.Socket[bytes]

    def close(self) -> None:
        """Close both ends; what was sent last still leaves. `end` follows."""
        self.dealer.close(linger=_LINGER_MS)
        self.channel.close()

    def end(self) -> None:
        """Wait until it has left."""
        self.context.term()


def connect(run_directory: Path) -> Connection:
    """Connect to the broker of a run directory.

    Raises:
        Unavailable: nobody serves there, or it does not answer.
    """
    path = run_directory / DESCRIPTOR_SOCKET
    try:
        channel = connect_channel(path, CONNECT_LIMIT_S)
    except OSError as error:
        raise Unavailable(
            f"no broker at {path}: {error.strerror or error}; start one with `luacell serve`", began="no"
        ) from None
    try:
        routing_id = _introduce(channel)
    except (OSError, ChannelClosed, ProtocolError) as error:
        channel.close()
        raise Unavailable(f"the broker at {path} does not answer: {error}", began="no") from None
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.ROUTING_ID, routing_id)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    dealer.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    dealer.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    dealer.setsockopt(zmq.MAXMSGSIZE, MESSAGE_MAX)
    dealer.setsockopt(zmq.RECONNECT_IVL, -1)
    dealer.setsockopt(zmq.RCVTIMEO, ALONE_MS)
    dealer.connect(f"ipc://{run_directory / BROKER_SOCKET}")
    channel.setblocking(False)
    connection = Connection(channel, context, dealer)
    try:
        if not dealer.poll(int(CONNECT_LIMIT_S * _MS), zmq.POLLOUT):
            text = f"the broker at {run_directory} does not answer within {CONNECT_LIMIT_S} s"
            raise Unavailable(text, began="no")
    except BaseException:
        connection.close()
        connection.end()
        raise
    return connection


def _introduce(channel: socket.socket) -> bytes:
    """Say hello on the descriptor channel and return the routing id that the broker gave us."""
    send_message(channel, encode(Hello(role="host")))
    message, descriptors = receive_message(channel)
    close_all(descriptors)
    op, _ = headers.parse_preamble(message)
    if op is not Op.WELCOME:
        raise ProtocolError(f"operation {op.name} in place of WELCOME")
    return decode(Welcome, message).routing_id
