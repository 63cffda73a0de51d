"""How a host gets to a broker: the descriptor channel first, which gives it a name, then a DEALER of that name."""

from __future__ import annotations

import contextlib
import os
import socket
import time
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
_LEAST_S: Final = 0.001  # a timeout of 0 would mean something else
_MS: Final = 1000
_LINGER_MS: Final = 100  # for the farewell


class Connection(NamedTuple):
    """Both ways to a broker, which has greeted us on both; whoever made it closes it.

    Attributes:
        welcome: the broker's greeting: its epoch and pid.
    """

    channel: socket.socket
    context: zmq.Context[zmq.Socket[bytes]]
    dealer: zmq.Socket[bytes]
    welcome: Welcome

    def close(self, *, is_lost: bool = False) -> None:
        """Close both ends; what was sent last still leaves, unless the broker is gone. `end` follows."""
        self.dealer.close(linger=0 if is_lost else _LINGER_MS)
        self.channel.close()

    def end(self) -> None:
        """Wait until it has left."""
        self.context.term()

    def leave_in_child(self) -> None:
        """Close, in a forked child, what would hide the parent's death from the broker."""
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
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    except (OSError, ChannelClosed, ProtocolError) as error:
        channel.close()
        raise Unavailable(f"the broker at {path} does not answer: {error}", began="no") from None
    except BaseException:
        channel.close()
        raise
    dealer = context.socket(zmq.DEALER)
    try:
        welcome = _greet(dealer, routing_id, run_directory, give_up_s)
    except BaseException as error:
        dealer.close(linger=0)
        channel.close()
        context.term()
        if isinstance(error, zmq.ZMQError | ProtocolError):
            raise Unavailable(f"the broker at {run_directory} does not answer: {error}", began="no") from None
        raise
    channel.setblocking(False)
    return Connection(channel, context, dealer, welcome)


def _introduce(channel: socket.socket) -> bytes:
    """Say hello on the descriptor channel and return the routing id that the broker gave us."""
    send_message(channel, encode(Hello(role="host")))
    message, descriptors = receive_message(channel)
    close_all(descriptors)
    return _welcome(message).routing_id


def _greet(dealer: zmq.Socket[bytes], routing_id: bytes, run_directory: Path, give_up_s: float) -> Welcome:
    """Connect under the name that the broker gave us, say hello and return its answer."""
    dealer.setsockopt(zmq.ROUTING_ID, routing_id)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    dealer.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    dealer.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    dealer.setsockopt(zmq.MAXMSGSIZE, MESSAGE_MAX)
    dealer.setsockopt(zmq.RECONNECT_IVL, -1)
    dealer.setsockopt(zmq.RCVTIMEO, ALONE_MS)
    dealer.connect(f"ipc://{run_directory / BROKER_SOCKET}")
    _await(dealer, zmq.POLLOUT, run_directory, give_up_s)
    dealer.send(encode(Hello(role="host")), zmq.NOBLOCK)
    _await(dealer, zmq.POLLIN, run_directory, give_up_s)
    return _welcome(dealer.recv(zmq.NOBLOCK))


def _await(dealer: zmq.Socket[bytes], event: int, run_directory: Path, give_up_s: float) -> None:
    left_s = max(give_up_s - time.monotonic(), _LEAST_S)
    if not dealer.poll(int(left_s * _MS), event):
        raise Unavailable(f"the broker at {run_directory} does not answer in time", began="no")


def _welcome(message: bytes) -> Welcome:
    op, _ = headers.parse_preamble(message)
    if op is not Op.WELCOME:
        raise ProtocolError(f"operation {op.name} in place of WELCOME")
    return decode(Welcome, message)
