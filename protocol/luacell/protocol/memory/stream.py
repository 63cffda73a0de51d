"""A DEALER's end of a ZeroMQ connection over a Unix socket, without libzmq: no thread, no queue, one socket.

This module connects and says who it is; from then on whole frames of `zmtp` go both ways, read and written by whoever
has the socket.
"""

from __future__ import annotations

import os
import select
import socket
import time
from pathlib import Path
from typing import Final

from luacell.protocol import zmtp
from luacell.protocol.memory.channel import ChannelClosed, set_timeouts

_MS: Final = 1000


def connect_stream(path: Path, routing_id: bytes, timeout_s: float) -> socket.socket:
    """Connect to a ROUTER and introduce ourselves.

    Args:
        path: of its socket.
        routing_id: what it is to know us by.
        timeout_s: seconds for all of it.

    Returns:
        A blocking socket without timeouts; nothing of the first message has been read.

    Raises:
        OSError: nobody listens there, it does not accept or does not answer in time, or the path is too long.
        ChannelClosed: it has hung up.
        ProtocolError: it speaks something else.
    """
    until_s = time.monotonic() + timeout_s
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        set_timeouts(stream, timeout_s)
        stream.connect(os.fspath(path))
        stream.sendall(zmtp.GREETING, socket.MSG_NOSIGNAL)
        zmtp.check_greeting(_read(stream, zmtp.GREETING_SIZE, until_s))
        stream.sendall(zmtp.ready(routing_id), socket.MSG_NOSIGNAL)
        size = zmtp.ready_size(_read(stream, zmtp.COMMAND_HEADER_SIZE, until_s))
        zmtp.check_ready(_read(stream, size, until_s))
        set_timeouts(stream, 0.0)
    except BlockingIOError:
        stream.close()
        raise TimeoutError(f"nobody answered within {timeout_s:g} s at {path}") from None
    except BaseException:
        stream.close()
        raise
    return stream


def _read(stream: socket.socket, size: int, until_s: float) -> bytes:
    """Read exactly so many bytes.

    Raises:
        BlockingIOError: they have not come by then, monotonic seconds.
        ChannelClosed: they will not.
    """
    received = b""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    while len(received) < size:
        if not poll.poll(max(0.0, until_s - time.monotonic()) * _MS):
            raise BlockingIOError
        more = stream.recv(size - len(received))
        if not more:
            raise ChannelClosed("the connection ended in the greeting")
        received += more
    return received
