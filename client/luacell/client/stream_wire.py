"""The wire of a host that shares memory: ZMTP frames on a Unix socket, without libzmq and its threads.

Nothing that was received is kept here: what has not been acted upon stays in the socket, where it is looked at
(MSG_PEEK), and is removed when that is done. So there is nothing that an interrupt could leave half done: it is looked
at, and acted upon, again. Only of a message that has not come whole, what has come is kept.

Removing must not remove what a signal handler's call, in between, has removed already. Whoever removes holds a ticket
from before it looked; the next one to look tears it up. A ticket is used, and what was received is kept, by functions
written in C, between whose steps no signal handler runs.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections import deque
from struct import Struct
from typing import Any, Final

from luacell.client.ledger import RESULT_HEAD
from luacell.client.pending import Pending
from luacell.client.wire import HIGH_WATER_MARK, Take, WireFull
from luacell.protocol import headers, zmtp
from luacell.protocol.errors import ProtocolError
from luacell.protocol.headers import SLOT_FREE
from luacell.protocol.limits import MESSAGE_MAX

LOOK_SIZE: Final = 64 << 10  # bytes
GLANCE_SIZE: Final = 256  # bytes; more than one result
FAREWELL_MS: Final = 100  # for what is still to be sent when a session is closed
ATOMIC_SIZE: Final = 16 << 10  # bytes that the kernel takes whole or not at all: they fit one buffer of its own
UNSENT_MAX: Final = HIGH_WATER_MARK * ATOMIC_SIZE  # bytes that wait for a larger one to be added: 64 MiB

_FRAME: Final = zmtp.frame(bytes(headers.PREAMBLE_SIZE + headers.RESULT.size))[: zmtp.SHORT_HEADER_SIZE]
_RESULT_HEAD: Final = _FRAME + RESULT_HEAD
_RESULT: Final = Struct(f"<{len(_RESULT_HEAD)}s" + headers.RESULT.format.removeprefix("<"))
_RESULT_SIZE: Final = _RESULT.size
_unpack_result: Final = _RESULT.unpack_from
_SHORT_HEADS: Final = tuple(bytes((0, size)) for size in range(zmtp.SHORT_MAX + 1))
_SEND: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_LOOK_NOW: Final = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_NOW: Final = int(socket.MSG_DONTWAIT)
_Kept = list[bytes] | deque[bytes]


class _Part:
    """A frame that had not come whole when it was looked at, as far as it has come since."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []  # the first ones are the header's

    def missing(self) -> int:
        """Return how many bytes are known to be missing; 0 where it is whole.

        Raises:
            ProtocolError: it is none that a broker sends.
        """
        begin = b"".join([piece[: zmtp.LONG_HEADER_SIZE] for piece in self.pieces[: zmtp.LONG_HEADER_SIZE]])
        head = zmtp.LONG_HEADER_SIZE if begin and begin[0] & zmtp.LONG else zmtp.SHORT_HEADER_SIZE
        if len(begin) < head:
            return head - len(begin)
        size = int.from_bytes(begin[1:head], "big")
        _check(begin[0], size)
        return head + size - sum(map(len, self.pieces))

    def message(self) -> bytes | None:
        """Return the message, once it is whole; None where it is a command."""
        data = b"".join(self.pieces)
        if data[0] & zmtp.COMMAND:
            return None
        return data[zmtp.LONG_HEADER_SIZE if data[0] & zmtp.LONG else zmtp.SHORT_HEADER_SIZE :]


class StreamWire:
    """One connection.

    Args:
        stream: from `connect_stream`; the wire's from here on.
    """

    forgets: Final = False

    def __init__(self, stream: socket.socket) -> None:
        self.is_at_end = False
        self._stream = stream
        self._receive = stream.recv
        self._send = stream.send
        self._ticket: list[Any] = []
        self._sending: list[Any] = []
        self._removed: deque[bytes] = deque(maxlen=0)
        self._parts: list[_Part] = []  # one at most
        self._unsent: deque[tuple[bytes, list[int]]] = deque()  # frames, and how much of each has been sent

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._stream.fileno()

    # -- sending --------------------------------------------------------------------------------------------------
    def send(self, message: bytes) -> None:
        """Send a message, or keep it until there is room; see `Wire`."""
        size = len(message)
        frame = _SHORT_HEADS[size] + message if size <= zmtp.SHORT_MAX else zmtp.frame(message)
        if size > ATOMIC_SIZE or self._unsent:  # a signal handler's call cannot come between this and sending
            self._send_later(frame)
            return
        try:
            sent = self._send(frame, _SEND)
        except BlockingIOError:
            self._send_later(frame)
        except OSError:
            raise WireFull from None
        else:
            if sent < len(frame):
                self._unsent.append((frame, [sent]))

    def _send_later(self, frame: bytes) -> None:
        if len(self._unsent) >= HIGH_WATER_MARK or self.is_at_end:
            raise WireFull(is_slow=not self.is_at_end)
        if len(frame) > ATOMIC_SIZE and sum(len(other) for other, _ in self._unsent) + len(frame) > UNSENT_MAX:
            raise WireFull(is_slow=True)
        self._unsent.append((frame, []))
        self.flush()

    @property
    def has_unsent(self) -> bool:
        """Whether something is kept."""
        return bool(self._unsent)

    def flush(self) -> None:
        """Send what is kept. Where an interrupt breaks that off, it goes on the next time."""
        while True:
            self._sending.clear()  # as a ticket: a signal handler's call may send the same bytes
            sending = self._sending = [None]
            try:
                entry = frame, sent = self._unsent[0]
            except IndexError:
                return
            begin = sum(sent)
            if begin == len(frame):
                with contextlib.suppress(ValueError):  # a signal handler's call may have done it
                    self._unsent.remove(entry)
                continue
            _mark(sending, memoryview(frame)[begin:])
            try:
                sent.extend(map(self._send, sending, (_SEND,)))
            except BlockingIOError:
                return
            except OSError:  # reading finds out
                self._unsent.clear()

    # -- receiving ------------------------------------------------------------------------------------------------
    def read_result(self, pending: Pending, calls: dict[int, Pending], take: Take) -> bool:
        """Look at what has come, and take it where it is this result alone; see `Wire`."""
        if self._parts or self._unsent:
            return False
        ticket = self._new_ticket()
        try:
            seen = self._receive(GLANCE_SIZE, _LOOK_NOW)
        except OSError:
            return False
        if len(seen) != _RESULT_SIZE:
            return False
        head = _unpack_result(seen)
        if head[0] != _RESULT_HEAD or head[1] != pending.call_id or head[-1] != SLOT_FREE:
            return False
        pending.answer = head[1:]
        pending.is_done = True
        calls.pop(pending.call_id, None)
        self._remove(ticket, _RESULT_SIZE, self._removed)
        return True

    def read(self, take: Take, most: int | None = None) -> bool:
        """Take what has come; see `Wire`."""
        left = -1 if most is None else most
        try:
            while left:
                ticket = self._new_ticket()
                part = next(iter(self._parts), None)
                if part is not None:
                    self._complete(part, take)
                    left -= 1
                    continue
                seen = self._receive(LOOK_SIZE, _LOOK_NOW)
                if not seen:
                    self.is_at_end = True
                    return False
                end, left = _take_all(seen, take, left)
                if end:
                    self._remove(ticket, end, self._removed)
                else:  # what is there of it is kept, so that the descriptor tells when there is more
                    _mark(ticket, _Part())
                    self._parts.extend(ticket)
        except BlockingIOError:
            return False
        except OSError:
            self.is_at_end = True
            return False
        return True

    def _complete(self, part: _Part, take: Take) -> None:
        """Take a message that has begun to come, once it is whole.

        Raises:
            BlockingIOError: more of it has not come.
            ConnectionError: it will not.
        """
        while True:
            ticket = self._new_ticket()
            missing = part.missing()
            if not missing:
                break
            self._remove(ticket, missing, part.pieces)
            if part.pieces and not part.pieces[-1]:
                raise ConnectionResetError
        message = part.message()
        if message is not None:
            take(message)
        with contextlib.suppress(ValueError):
            self._parts.remove(part)

    def _new_ticket(self) -> list[Any]:
        self._ticket.clear()
        ticket = self._ticket = [None]
        return ticket

    def _remove(self, ticket: list[Any], size: int, kept: _Kept) -> None:
        """Remove up to `size` bytes from the socket, unless the ticket has been torn up."""
        _mark(ticket, size)
        kept.extend(map(self._receive, ticket, (_NOW,)))

    # -- ends -----------------------------------------------------------------------------------------------------
    def may_speak(self) -> bool:
        """Whether the socket is not at its end."""
        return not self.is_at_end

    def close(self, *, is_lost: bool) -> None:
        """Close the socket, once what is kept has left; see `Wire`."""
        if self._unsent and not is_lost:
            room = select.poll()
            room.register(self._stream, select.POLLOUT)
            self.flush()
            while self._unsent and room.poll(FAREWELL_MS):
                self.flush()
        self._stream.close()

    def end(self) -> None:
        """Do nothing: what was sent is the kernel's."""

    def leave_in_child(self) -> None:
        """Close the child's descriptor of the socket."""
        with contextlib.suppress(OSError):
            os.close(self._stream.detach())


def _mark(ticket: list[Any], what: object) -> None:
    try:  # noqa: SIM105  contextlib.suppress costs 0.3 us, for each call
        ticket[0] = what
    except IndexError:
        pass


def _take_all(seen: bytes, take: Take, left: int) -> tuple[int, int]:
    """Take the whole messages of what was seen; return where they end, and how many more may be taken."""
    end = 0
    while left and len(seen) - end >= zmtp.SHORT_HEADER_SIZE:
        flags, begin, size = seen[end], end + zmtp.SHORT_HEADER_SIZE, seen[end + 1]
        if flags & zmtp.LONG:
            begin = end + zmtp.LONG_HEADER_SIZE
            size = int.from_bytes(seen[end + 1 : begin], "big")
        if begin + size > len(seen):
            break
        _check(flags, size)
        if not flags & zmtp.COMMAND:
            take(seen[begin : begin + size])
            left -= 1
        end = begin + size
    return end, left


def _check(flags: int, size: int) -> None:
    if flags & zmtp.MORE:
        raise ProtocolError("a message of several frames")
    if size > MESSAGE_MAX:
        raise ProtocolError(f"a message of {size} bytes, {MESSAGE_MAX} is the limit")
