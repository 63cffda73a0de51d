"""The wire of a host without shared memory: a DEALER of libzmq, whose descriptor reports what came since a look."""

from __future__ import annotations

import mmap
from typing import Final

import zmq

from luacell.client.pending import Pending
from luacell.client.wire import Take, WireFull
from luacell.protocol.errors import ProtocolError
from luacell.protocol.limits import MESSAGE_MAX
from luacell.protocol.messages import size_of

_NOBLOCK: Final = int(zmq.NOBLOCK)  # plain integers: pyzmq's enums cost microseconds
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_POLLOUT: Final = int(zmq.POLLOUT)
_send: Final = zmq.backend.Socket.send  # without the wrapper's handling of options that we do not use
_LINGER_MS: Final = 100  # for the farewell


class DealerWire:
    """One connection.

    Args:
        context: of the socket; the wire's from here on.
        dealer: connected, with the timeouts that it is to have; the wire's from here on.
    """

    forgets: Final = True
    is_at_end: Final = False  # somebody else watches that
    has_unsent: Final = False

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], dealer: zmq.Socket[bytes]) -> None:
        self._context = context
        self._dealer = dealer
        self._receive = dealer.recv_into
        self._inbox = mmap.mmap(-1, MESSAGE_MAX)  # the message at hand; its first byte is 0 when it was acted upon

    def fileno(self) -> int:
        """Return what the DEALER reports messages by."""
        return int(self._dealer.getsockopt(zmq.FD))

    def send(self, message: bytes) -> None:
        """Queue a message; see `Wire`."""
        try:
            _send(self._dealer, message, _NOBLOCK)
        except zmq.ZMQError:
            raise WireFull from None

    def flush(self) -> None:
        """Do nothing: libzmq sends by itself."""

    def read_result(self, pending: Pending, calls: dict[int, Pending], take: Take) -> bool:
        """Take the next message, which is never just a result, so that it has not to be waited for again."""
        if self._inbox[0]:
            return False
        try:
            size = self._receive(self._inbox, flags=_NOBLOCK)
        except zmq.Again:
            return False
        self._take(size, take)
        return False

    def read(self, take: Take, most: int | None = None) -> bool:
        """Take what has come; see `Wire`."""
        inbox = self._inbox
        if inbox[0]:
            self._resume(take)
        left = -1 if most is None else most
        while left and int(self._dealer.getsockopt(_EVENTS)) & _POLLIN:
            self._take(self._receive(inbox, flags=_NOBLOCK), take)
            left -= 1
        return not left

    def _resume(self, take: Take) -> None:
        """Act on a message whose reader was interrupted: pyzmq may raise when it has received it already."""
        try:
            size = size_of(memoryview(self._inbox))
        except ProtocolError:
            self._inbox[0] = 0
            raise
        self._take(size, take)

    def _take(self, size: int, take: Take) -> None:
        """Act on the message in the inbox; where an interrupt breaks that off, doing it again is no harm."""
        inbox = self._inbox
        if not inbox[0]:  # a call of a signal handler has done it
            return
        take(inbox[:size])
        inbox[0] = 0

    def may_speak(self) -> bool:
        """Whether libzmq is still connected, or has not noticed."""
        return bool(int(self._dealer.getsockopt(_EVENTS)) & _POLLOUT)

    def close(self, *, is_lost: bool) -> None:
        """Close the socket; see `Wire`."""
        self._dealer.close(linger=0 if is_lost else _LINGER_MS)

    def end(self) -> None:
        """Wait until libzmq has sent the farewell."""
        self._context.term()

    def leave_in_child(self) -> None:
        """Do nothing: the connection is closed by who watches it."""
