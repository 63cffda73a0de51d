"""The rest of messages that have more frames than one: dropped, and the connection of whoever sends floods of them cut.

libzmq bounds the size of a frame and the number of messages, not the frames of a message, and a ROUTER gives nothing
else before the message's end: a million empty frames take the loop half a second. So that stays the only one.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import Final

import zmq

from luacell.protocol.memory.channel import peer_ids

FLOOD_FRAMES: Final = 1024  # of one message, and more: half a millisecond of the loop, at 0.5 us each


def drop_rest(router: zmq.Socket[bytes]) -> zmq.Frame | None:
    """Read the rest of the message whose first frames were read; return its last frame if there were too many."""
    if not router.getsockopt(zmq.RCVMORE):
        return None
    count = 1
    while (frame := router.recv(copy=False)).more:
        count += 1
    return frame if count > FLOOD_FRAMES else None


def cut(frame: zmq.Frame) -> int:
    """End the connection that a frame came over.

    Its descriptor may be another connection's by now, where the peer has closed it meanwhile: it is left alone unless
    the same process is at the other end.

    Returns:
        The process at the other end; 0 where it is not known, or the connection is gone already.
    """
    descriptor = int(frame.get(zmq.SRCFD))
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return 0
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            pid, uid = _ids(connection)
            if _is_from(connection, str(frame.get("Peer-Address")), pid, uid):
                connection.shutdown(socket.SHUT_RDWR)
                return pid
    except OSError:  # it is gone in this very moment
        pass
    return 0


def _ids(connection: socket.socket) -> tuple[int, int]:
    return peer_ids(connection) if connection.family == socket.AF_UNIX else (0, 0)


def _is_from(connection: socket.socket, address: str, pid: int, uid: int) -> bool:
    """Tell whether a connection's other end is the one that libzmq names as `localhost:uid:gid:pid`, or by its IP."""
    if connection.family == socket.AF_UNIX:
        words = address.split(":")
        return words[-3:-2] == [str(uid)] and words[-1:] == [str(pid)]
    return str(connection.getpeername()[0]) == address
