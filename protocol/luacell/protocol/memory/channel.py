"""The descriptor channel: SEQPACKET Unix sockets that carry small messages with file descriptors.

ZeroMQ cannot pass descriptors; these sockets stand beside it. A message is the same as over ZeroMQ (preamble
and map). This module moves bytes and descriptors; it does not know what messages mean.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from luacell.protocol.errors import ProtocolError
from luacell.protocol.limits import DESCRIPTOR_MESSAGE_MAX

DESCRIPTORS_MAX: Final = 2  # in one message: args and out, or pidfd and socketpair
SOCKET_PATH_MAX: Final = 107  # bytes: sun_path less its NUL (unix(7))
_SO_PEERPIDFD: Final = 77
_CREDENTIALS_SIZE: Final = 12
_TIMEVAL: Final = struct.Struct("@ll")

Received = tuple[bytes, list[int]]


class ChannelClosed(Exception):
    """The peer is gone."""


def connect_channel(path: Path, timeout_s: float) -> socket.socket:
    """Connect to a descriptor socket, waiting for a place in its queue where many connect at once.

    Args:
        path: of the socket.
        timeout_s: seconds; also the timeout of later blocking operations.

    Raises:
        TimeoutError: whoever listens there does not accept.
        OSError: nobody listens there, it is not ours, or the path is too long.
    """
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        set_timeouts(channel, timeout_s)
        channel.connect(os.fspath(path))
        channel.settimeout(timeout_s)
    except BaseException as error:
        channel.close()
        if not isinstance(error, BlockingIOError):
            raise
        raise TimeoutError(errno.ETIMEDOUT, f"nobody accepted within {timeout_s:g} s", os.fspath(path)) from None
    return channel


def set_timeouts(blocking: socket.socket, timeout_s: float) -> None:
    """Have a socket give up with BlockingIOError after `timeout_s` seconds of waiting; 0 means never.

    It stays a blocking one: Python's own timeouts make it non-blocking, and then a full queue of `connect` is an error
    at once, and every receive is two system calls.
    """
    seconds = int(timeout_s)
    timeval = _TIMEVAL.pack(seconds, int((timeout_s - seconds) * 1e6))
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        blocking.setsockopt(socket.SOL_SOCKET, option, timeval)


def send_message(channel: socket.socket, message: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send one message; the descriptors stay the caller's.

    Raises:
        ChannelClosed: the peer is gone.
        BlockingIOError: the peer does not read (non-blocking sockets).
        TimeoutError: the peer did not read in time (sockets with a timeout).
        OSError: a descriptor is bad, or too many are under way.
    """
    assert len(message) <= DESCRIPTOR_MESSAGE_MAX, len(message)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    try:
        channel.sendmsg([message], ancillary, socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionError) as error:
        raise ChannelClosed(str(error)) from None


def receive_message(channel: socket.socket) -> Received:
    """Receive one message with its descriptors, which become the caller's and are close-on-exec.

    Raises:
        ChannelClosed: the peer is gone.
        ProtocolError: too long, or with more descriptors than any message has or this process may open; those
            received are closed.
        BlockingIOError: nothing there (non-blocking sockets).
        TimeoutError: nothing came in time (sockets with a timeout).
    """
    space = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)
    try:
        message, ancillary, flags, _ = channel.recvmsg(DESCRIPTOR_MESSAGE_MAX, space, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError as error:
        raise ChannelClosed(str(error)) from None
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if not message and not descriptors:
        raise ChannelClosed("end of file")
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(list(descriptors))
        bounds = f"{DESCRIPTOR_MESSAGE_MAX} bytes or {DESCRIPTORS_MAX} descriptors"
        raise ProtocolError(f"descriptor message is over {bounds}, or this process has no descriptors left")
    return message, list(descriptors)


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that nobody wants."""
    for descriptor in descriptors:
        os.close(descriptor)


def peer_pidfd(channel: socket.socket) -> int:
    """Return a pidfd of the process at the other end, close-on-exec and owned by the caller.

    Only a kernel that lacks SO_PEERPIDFD is asked by pid: where it says that the peer is gone, its pid may be
    another's.

    Raises:
        OSError: ESRCH when it is gone; other errors when the kernel can tell nothing of it.
    """
    try:
        return channel.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
    return os.pidfd_open(peer_pid(channel))


def peer_pid(channel: socket.socket) -> int:
    """Return the pid at the other end, 0 when it is in a pid namespace that is not visible from here."""
    return peer_ids(channel)[0]


def peer_ids(channel: socket.socket) -> tuple[int, int]:
    """Return pid and uid at the other end; the pid is 0 when it is in a namespace that is not visible from here."""
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS_SIZE)
    return int.from_bytes(credentials[:4], "little", signed=True), int.from_bytes(credentials[4:8], "little")
