"""Hosts without shared memory, on the host's side: a session over ZeroMQ alone, and calls whose bytes go in pieces.

It is the counterpart of `session` and `calls` for such hosts; what a caller sees is the same. Whoever reads for all
sends the pieces that have become due, and puts those that came where they belong.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from itertools import count
from typing import Any, Final, cast

import zmq
from zmq.utils.monitor import parse_monitor_message

from luacell.client.arena import GRACE_S
from luacell.client.connection import CONNECT_LIMIT_S, Connection
from luacell.client.dealer_wire import DealerWire
from luacell.client.ledger import Ledger
from luacell.client.pending import Answer, Pending
from luacell.client.replies import raise_for, raise_from_slot
from luacell.client.session import FULL, Session
from luacell.client.wire import HIGH_WATER_MARK, WireFull
from luacell.protocol import headers, messages
from luacell.protocol.errors import ProtocolError, Unavailable
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, Op
from luacell.protocol.limits import (
    CALLS_IN_FLIGHT_MAX,
    DEADLINE_MAX_US,
    ERROR_TEXT_MAX,
    INLINE_PIECE,
    INLINE_SMALL_MAX,
    INLINE_STALL_NS,
    INLINE_WINDOW,
    MESSAGE_MAX,
    NS_PER_S,
    US_PER_S,
)
from luacell.protocol.messages import ROUTING_ID_SIZE, decode, encode

HELLO_STEP_S: Final = 1.0  # a greeting that was not answered is said again
SENT_MAX: Final = CALLS_IN_FLIGHT_MAX * (INLINE_WINDOW + 1) + HIGH_WATER_MARK  # messages: every window full, and room
TRANSFER_GRACE_S: Final = 2.0  # for the first piece, on its way behind those of others
STALL_S: Final = INLINE_STALL_NS / NS_PER_S  # between two pieces of a result
_MS: Final = 1000
_POLLIN: Final = int(zmq.POLLIN)
_ENDS: Final = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_EVENTS: Final = _ENDS | zmq.EVENT_CONNECTED


class Line:
    """What libzmq tells of a connection; it stands where a local host has its descriptor channel.

    Attributes:
        end: what ended the connection, or "".
    """

    def __init__(self, dealer: zmq.Socket[bytes]) -> None:
        self._monitor = dealer.get_monitor_socket(_EVENTS)
        self._fd = int(self._monitor.getsockopt(zmq.FD))
        self._connection_fd = -1
        self.end = ""

    def fileno(self) -> int:
        """Return what becomes readable when there is something to `look` at."""
        return self._fd

    def look(self) -> None:
        """Take note of everything that has happened."""
        while int(self._monitor.getsockopt(zmq.EVENTS)) & _POLLIN:
            happened = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            if happened["event"] == zmq.EVENT_CONNECTED:
                self._connection_fd = happened["value"]
            elif happened["event"] & _ENDS:
                self._connection_fd = -1
                self.end = "connection closed"

    def setblocking(self, flag: bool) -> None:
        """Do nothing: `look` never waits."""

    def close(self) -> None:
        """Stop listening; the connection itself is the DEALER's."""
        self._monitor.close(0)

    def detach(self) -> int:
        """Return the descriptor of the connection, for a forked child to close; -1 where there is none."""
        return self._connection_fd


class InlinePending(Pending):
    """A call that waits for its answer while its bytes go in pieces.

    Attributes:
        args: all of its arguments.
        out_size: bytes of results that were asked for.
        sent: how many bytes of them were sent.
        record: of its RESULT_INLINE, or None so far.
        total: bytes of its results, or of the error's text.
        pieces: of these, by offset, in order; all of them in the end.
        received: bytes that came.
    """

    def __init__(self, args: memoryview, out_size: int) -> None:
        self.args = args
        self.out_size = out_size
        self.sent = min(len(args), INLINE_PIECE)
        self.record: tuple[int, ...] | None = None
        self.total = 0
        self.pieces: dict[int, bytes] = {}
        self.received = 0

    @property
    def result(self) -> bytes:
        """The bytes that came, as one."""
        return self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces.values())


class InlineLedger(Ledger):
    """The books of a session without shared memory: no slots, but pieces.

    Args:
        wake: called with whatever has just been answered or has failed.
        say: sends a message, in the middle of reading.
    """

    def __init__(self, wake: Callable[[Pending], None], say: Callable[[bytes], None]) -> None:
        super().__init__(wake, lambda arena: None)
        self._say = say

    def _on_message(self, message: bytes) -> None:
        op, number = headers.parse_preamble(message)
        if op is Op.MORE:
            for record in headers.parse_records(op, number, message):
                self._on_more(headers.More._make(record))
        elif op is Op.RESULT_INLINE:
            self._on_result(*headers.parse_inline(op, number, message))
        elif op is Op.PIECE:
            self._on_piece(*headers.parse_inline(op, number, message))
        elif op is Op.PROBE:
            decode(messages.Probe, message)
        elif op is not Op.WELCOME:  # a greeting that was said twice is answered twice
            super()._on_message(message)

    def _on_answer(self, call_id: int, answer: Answer) -> None:
        pending = self.calls.get(call_id)
        if pending is not None:
            self._complete(pending, answer)
            self.calls.pop(call_id, None)

    def give_up(self, pending: Pending) -> bool:
        """Nobody waits any more. Return whether the broker is to be told by CANCEL."""
        was_waiting = self.calls.pop(pending.call_id, None) is not None
        return was_waiting and pending.is_sent and not self.lost

    def _find(self, call_id: int) -> InlinePending | None:
        """Return a call, unless nobody waits for it any more."""
        pending = self.calls.get(call_id)
        return pending if isinstance(pending, InlinePending) else None

    def _on_more(self, more: headers.More) -> None:
        """Send the pieces of arguments that are due. Doing it again is no harm: the broker ignores what it has."""
        pending = self._find(more.call_id)
        if pending is None:
            return
        total, limit = len(pending.args), more.offset + INLINE_WINDOW * INLINE_PIECE
        if more.offset > pending.sent:
            raise ProtocolError(f"MORE of call {more.call_id} says {more.offset} of {pending.sent} bytes sent")
        while pending.sent < min(total, limit):
            size = min(INLINE_PIECE, total - pending.sent)
            piece = pending.args[pending.sent : pending.sent + size]
            self._say(headers.encode_inline(Op.PIECE, (more.call_id, pending.sent, size), piece))
            pending.sent += size

    def _on_result(self, record: tuple[int, ...], piece: memoryview) -> None:
        result = headers.Result._make(record)
        pending = self._find(result.call_id)
        if pending is None:
            return
        if result.out_size > pending.out_size or result.error_size > ERROR_TEXT_MAX:
            sizes = f"{result.out_size} bytes of results and {result.error_size} of an error's text"
            raise ProtocolError(f"RESULT_INLINE of call {result.call_id} has {sizes}")
        pending.total = result.out_size + result.error_size
        pending.record = record
        self._keep(pending, 0, piece)

    def _on_piece(self, record: tuple[int, ...], data: memoryview) -> None:
        piece = headers.Piece._make(record)
        pending = self._find(piece.call_id)
        if pending is None:
            return
        end = piece.offset + piece.size
        if pending.record is None or piece.offset > pending.received or end > pending.total:
            text = f"{piece.size} bytes at {piece.offset}, with {pending.received} of {pending.total} received"
            raise ProtocolError(f"PIECE of call {piece.call_id} has {text}")
        self._keep(pending, piece.offset, data)

    def _keep(self, pending: InlinePending, offset: int, piece: memoryview) -> None:
        """Store a piece of a result, acknowledge it, and end the wait when it is the last one.

        Where an interrupt breaks that off, doing it again is no harm.
        """
        assert pending.record is not None
        pending.pieces[offset] = bytes(piece)
        pending.received = max(pending.received, offset + len(piece))
        call_id, total = pending.record[0], pending.total
        if total > INLINE_SMALL_MAX:
            self._say(headers.encode_records(Op.MORE, [(call_id, pending.received, 0)]))
        if pending.received == total:
            self._complete(pending, pending.record)
            self.calls.pop(call_id, None)


class InlineSession(Session):
    """One connection without shared memory; made by `InlineSession.reach`."""

    @classmethod
    def reach(cls, address: str, limit_s: float = CONNECT_LIMIT_S) -> InlineSession:
        """Connect to a broker.

        Args:
            address: of its ROUTER, as libzmq takes it.
            limit_s: seconds.

        Raises:
            Unavailable: nobody serves there, or it does not answer.
        """
        connection = _connect(address, limit_s)
        try:
            return cls(connection)
        except BaseException:
            connection.close(is_lost=True)
            connection.end()
            raise

    def _make_ledger(self) -> Ledger:
        return InlineLedger(self._wake_up, self._say)

    def await_rest(self, pending: InlinePending) -> None:
        """Wait for what is left of a result that has begun to come.

        Raises:
            Unavailable: the broker is gone, or nothing came for STALL_S.
        """
        while not pending.is_done:
            before = pending.received
            try:
                self.wait(pending, STALL_S, f"another piece of a result within {STALL_S:g} s")
            except Unavailable:
                if not self.is_open or pending.received == before:
                    raise

    def _read_grants(self) -> None:
        """Look whether the connection is at its end; that is all there is beside the DEALER. Under the lock."""
        line = cast(Line, self._channel)
        line.look()
        if line.end:
            self._hear_last_words()
            self._lose(f"the broker is gone ({line.end})")

    def _say(self, message: bytes) -> None:
        """Send, in the middle of reading; where the queue is full, the broker is as good as gone."""
        try:
            self._wire.send(message)
        except WireFull:
            self.ledger.lose(FULL)


def _connect(address: str, limit_s: float) -> Connection:
    """Connect a DEALER and wait until the broker has greeted us.

    Raises:
        Unavailable: nobody serves there, or it does not answer.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.ROUTING_ID, b"\x01" + secrets.token_bytes(ROUTING_ID_SIZE - 1))
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    dealer.setsockopt(zmq.SNDHWM, SENT_MAX)
    dealer.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    dealer.setsockopt(zmq.MAXMSGSIZE, MESSAGE_MAX)
    dealer.setsockopt(zmq.RECONNECT_IVL, -1)
    dealer.setsockopt(zmq.IPV6, int("[" in address))
    line = Line(dealer)
    try:
        dealer.connect(address)
        welcome = _greet(address, line, dealer, time.monotonic() + limit_s)
    except BaseException as error:
        dealer.close(linger=0)
        line.close()
        context.term()
        if isinstance(error, zmq.ZMQError | ProtocolError):
            raise Unavailable(f"the broker at {address} does not answer: {error}", began="no") from None
        raise
    return Connection(cast(socket.socket, line), DealerWire(context, dealer), welcome)


def _greet(address: str, line: Line, dealer: zmq.Socket[bytes], give_up_s: float) -> messages.Welcome:
    """Say hello until it is answered: a greeting may be lost to another peer's malformed message."""
    _await(address, line, dealer, zmq.POLLOUT, give_up_s)
    while True:
        dealer.send(encode(messages.Hello(role=messages.INLINE)), zmq.NOBLOCK)
        step_s = time.monotonic() + HELLO_STEP_S
        try:
            _await(address, line, dealer, zmq.POLLIN, min(step_s, give_up_s))
        except Unavailable:
            if line.end or time.monotonic() >= give_up_s:
                raise
            continue
        message = dealer.recv(zmq.NOBLOCK)
        if headers.parse_preamble(message)[0] is Op.WELCOME:
            return decode(messages.Welcome, message)


def _await(address: str, line: Line, dealer: zmq.Socket[bytes], event: int, until_s: float) -> None:
    poller = zmq.Poller()
    poller.register(dealer, event)
    poller.register(line.fileno(), zmq.POLLIN)
    while True:
        line.look()
        if line.end:
            raise Unavailable(f"no broker at {address}; start one with `luacell serve`", began="no")
        if int(dealer.getsockopt(zmq.EVENTS)) & event:
            return
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise Unavailable(f"the broker at {address} does not answer in time", began="no")
        poller.poll(int(left_s * _MS) + 1)


class InlineCalls:
    """Makes the calls of one session without shared memory."""

    def __init__(self, session: InlineSession) -> None:
        self.session = session
        self._session = session
        self._ids = count(1)

    def call(
        self,
        contract_id: int,
        fn_id: int,
        args: bytes | memoryview | None,
        out: memoryview | None,
        out_size: int,
        timeout_us: int,
    ) -> bytes:
        """Make a call and wait for its answer; as `Calls.call`."""
        session = self._session
        pending = InlinePending(memoryview(args if args is not None else b""), out_size)
        call_id = pending.call_id = next(self._ids)
        flags = (HAS_ARGS if args is not None else 0) | (HAS_OUT if out_size or out is not None else 0)
        size = len(pending.args)
        record = (call_id, contract_id, fn_id, timeout_us, flags, size, out_size, 0)
        message = headers.encode_inline(Op.CALL_INLINE, record, pending.args[: pending.sent])
        limit_s = (timeout_us or DEADLINE_MAX_US) / US_PER_S + GRACE_S + TRANSFER_GRACE_S
        try:
            self._make(session, pending, message, limit_s)
        except BaseException:
            self._give_up(pending)
            raise
        return _value(pending, contract_id, fn_id, out)

    def _make(self, session: InlineSession, pending: InlinePending, message: bytes, limit_s: float) -> None:
        try:
            session.call(pending, message, limit_s)
        except Unavailable:
            if pending.record is None or not session.is_open:
                raise
        session.await_rest(pending)

    def post(self, contract_id: int, fn_id: int, args: bytes) -> bool:
        """Make a call whose answer nobody waits for; as `Calls.post`."""
        record = (next(self._ids), contract_id, fn_id, 0, HAS_ARGS, len(args), 0, 0)
        with self._session.lock:
            self._session.post(headers.encode_inline(Op.CALL_INLINE, record, args))
        return True

    def _give_up(self, pending: InlinePending) -> None:
        """Nobody waits any more: cancel the call."""
        with self._session.lock:
            self._session.give_up(pending)

    def forget(self, contract_id: int) -> None:
        """Do nothing: the broker keeps the memory of this host."""

    def close(self) -> None:
        """Leave the broker. Idempotent."""
        self._session.close()

    def leave_in_child(self) -> None:
        """Let go, in a forked child, of what would hide the parent's death from the broker."""
        self._session.leave_in_child()


def _value(pending: InlinePending, contract_id: int, fn_id: int, out: memoryview | None) -> bytes:
    """Turn an answer into a value.

    Raises:
        CallError: it is none.
    """
    answer: Any = pending.answer
    if isinstance(answer, messages.Failure):
        raise_for(answer, contract_id, fn_id)
    code = answer[1]
    if code != 0:
        raise_from_slot(code, pending.result)
    if out is None:
        return pending.result
    for offset, piece in pending.pieces.items():
        out[offset : offset + len(piece)] = piece
    return b""
