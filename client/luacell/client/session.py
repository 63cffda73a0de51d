"""A host's connection to a broker: one DEALER, one descriptor channel, any number of calling threads, no thread of its own.

Callers send for themselves; of those that wait, one reads for all. Whoever touches the socket holds the lock, and
leaves no message unread behind it: libzmq's descriptor reports only what came after the last look. The reader waits
outside the lock, on the socket's descriptor, the channel (grants, and the end of the broker) and a wake-up.

It moves messages and wakes their owners; slots, contracts and exceptions are the bridge's.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import zmq

from luacell.protocol import headers, messages
from luacell.protocol.errors import ProtocolError, Unavailable
from luacell.protocol.headers import Op
from luacell.protocol.limits import MESSAGE_MAX, NS_PER_S, REQUEST_LIMIT_NS
from luacell.protocol.memory.channel import ChannelClosed, close_all, connect_channel, receive_message, send_message
from luacell.protocol.messages import Message, decode, encode
from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET

CONNECT_LIMIT_S: Final = 5.0
REQUEST_LIMIT_S: Final = REQUEST_LIMIT_NS / NS_PER_S
HIGH_WATER_MARK: Final = 4096
_MS: Final = 1000
_LINGER_MS: Final = 100  # for the farewell

Answer = headers.Result | messages.Failure


class Pending:
    """Something that waits for its answer: a call or a request."""

    __slots__ = ("answer", "descriptors", "event", "failure", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        self.answer: Answer | messages.Reply | messages.Segment | messages.Welcome | None = None
        self.descriptors: list[int] = []
        self.failure: Unavailable | None = None
        self.event: threading.Event | None = None  # made when its owner waits for another to read


class Session:
    """One connection; made by `Session.connect`.

    Attributes:
        on_stray: called under the lock with answers to calls nobody waits for any more, and with RELEASED.
    """

    def __init__(self, channel: socket.socket, context: zmq.Context[zmq.Socket[bytes]], dealer: zmq.Socket[bytes]) -> None:
        self.lock = threading.Lock()
        self.on_stray: Callable[[int, Answer | None], None] = lambda call_id, answer: None
        self.epoch = b""
        self.broker_pid = 0
        self._channel = channel
        self._context = context
        self._dealer = dealer
        self._calls: dict[int, Pending] = {}
        self._requests: dict[int, Pending] = {}
        self._welcome: Pending | None = None
        self._last_id = 0
        self._reader: Pending | None = None
        self._lost: str = ""
        self._is_closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        for descriptor in (int(dealer.getsockopt(zmq.FD)), channel.fileno(), self._wake):
            self._poll.register(descriptor, select.POLLIN)
        self._channel_fd = channel.fileno()

    @classmethod
    def connect(cls, run_directory: Path) -> Session:
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
        dealer.connect(f"ipc://{run_directory / BROKER_SOCKET}")
        channel.setblocking(False)
        session = cls(channel, context, dealer)
        try:
            if not dealer.poll(int(CONNECT_LIMIT_S * _MS), zmq.POLLOUT):
                raise Unavailable(f"the broker at {run_directory} does not answer within {CONNECT_LIMIT_S} s", began="no")
            session._greet()
        except BaseException:
            session.close()
            raise
        return session

    def _greet(self) -> None:
        pending = self._welcome = Pending()
        with self.lock:
            self._send(encode(messages.Hello(role="host")))
        self.wait(pending, time.monotonic() + CONNECT_LIMIT_S, f"a greeting within {CONNECT_LIMIT_S} s")
        if isinstance(pending.answer, messages.Welcome):
            self.epoch, self.broker_pid = pending.answer.epoch, pending.answer.broker_pid

    # -- sending --------------------------------------------------------------------------------------------------
    def next_id(self) -> int:
        """Return a number for a call or request. Under the lock."""
        self._last_id += 1
        return self._last_id

    def start_call(self, call_id: int, message: bytes) -> Pending:
        """Send a call. Under the lock.

        Raises:
            Unavailable: the broker is gone, or does not take messages.
        """
        self.check()
        pending = Pending()
        self._calls[call_id] = pending
        try:
            self._send(message)
        except BaseException:
            self._calls.pop(call_id, None)
            raise
        return pending

    def abandon_call(self, call_id: int) -> None:
        """Forget that somebody waits for a call, and tell the broker; its answer will be a stray. Under the lock."""
        if self._calls.pop(call_id, None) is not None and not self._lost and not self._is_closed:
            with contextlib.suppress(Unavailable):
                self._send(headers.encode_records(Op.CANCEL, [(call_id,)]))

    def forget_call(self, call_id: int) -> None:
        """Forget that somebody waits for a call, without a word to the broker. Under the lock."""
        self._calls.pop(call_id, None)

    def request(self, make: Callable[[int], Message]) -> Pending:
        """Send a control request and wait for its Reply or Segment.

        Args:
            make: makes the message from its request id.

        Returns:
            The answered request; descriptors in it are the caller's.

        Raises:
            Unavailable: the broker is gone or silent.
        """
        with self.lock:
            self.check()
            request_id = self.next_id()
            pending = self._requests[request_id] = Pending()
            self._send(encode(make(request_id)))
        try:
            self.wait(pending, time.monotonic() + REQUEST_LIMIT_S, f"an answer within {REQUEST_LIMIT_S:g} s")
        finally:
            with self.lock:
                self._requests.pop(request_id, None)
        return pending

    def tell(self, message: Message) -> None:
        """Send a control message that has no answer. Under the lock."""
        self._send(encode(message))

    def check(self) -> None:
        """Raise Unavailable when the broker is known to be gone. Under the lock."""
        if self._lost:
            raise Unavailable(self._lost, began="no")

    def _send(self, message: bytes) -> None:
        try:
            self._dealer.send(message, zmq.NOBLOCK)
        except zmq.Again:
            raise Unavailable("the broker takes no messages: it is gone or overloaded", began="no") from None
        self._read_all()

    # -- waiting --------------------------------------------------------------------------------------------------
    def wait(self, pending: Pending, until_s: float, expected: str) -> None:
        """Wait until `pending` is answered, reading for everybody where nobody else does.

        Args:
            until_s: monotonic seconds.
            expected: what was awaited, for the error.

        Raises:
            Unavailable: the broker is gone, or did not answer by `until_s`.
        """
        try:
            self._take_turns(pending, until_s)
        finally:
            if pending.event is not None:  # we may have been appointed reader in the moment we left
                with self.lock:
                    if self._reader is None:
                        self._appoint_reader()
        if not pending.is_done:
            raise Unavailable(f"the broker did not give {expected}")
        if pending.failure is not None:
            raise pending.failure

    def _take_turns(self, pending: Pending, until_s: float) -> None:
        while not pending.is_done:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return
            with self.lock:
                if pending.is_done:
                    break
                if self._reader is None:
                    self._reader = pending
                elif pending.event is None:
                    pending.event = threading.Event()
                is_reader = self._reader is pending
                event = pending.event
            if is_reader:
                self._read_for_all(pending, until_s)
            else:
                assert event is not None
                event.wait(left_s)
                event.clear()

    def _read_for_all(self, pending: Pending, until_s: float) -> None:
        try:
            while not pending.is_done:
                left_ms = (until_s - time.monotonic()) * _MS
                if left_ms <= 0:
                    return
                ready = self._poll.poll(left_ms + 1)
                with self.lock:
                    self._read_ready(ready)
        finally:
            with self.lock:
                self._reader = None
                self._appoint_reader()

    def _appoint_reader(self) -> None:
        """Wake one of those that wait for another to read: it will find that nobody does."""
        for table in (self._calls, self._requests):
            for waiting in table.values():
                if waiting.event is not None and not waiting.is_done:
                    waiting.event.set()
                    return

    def _read_ready(self, ready: list[tuple[int, int]]) -> None:
        for descriptor, _ in ready:
            if descriptor == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            elif descriptor == self._channel_fd:
                self._read_channel()
        self._read_all()

    def _read_all(self) -> None:
        """Read every message there is."""
        dealer = self._dealer
        while not self._is_closed and int(dealer.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            message = dealer.recv(zmq.NOBLOCK)
            try:
                self._on_message(message)
            except ProtocolError as error:
                self._lose(f"the broker sent something that is not of this protocol: {error}")
                return

    def _on_message(self, message: bytes) -> None:
        op, count = headers.parse_preamble(message)
        if op is Op.RESULT:
            for record in headers.parse_records(op, count, message):
                self._on_answer(record[0], headers.Result._make(record))
        elif op is Op.FAILURE:
            failure = decode(messages.Failure, message)
            if failure.call_id == 0:
                raise ProtocolError(f"it refused a message of ours: {failure.message}")
            self._on_answer(failure.call_id, failure)
        elif op is Op.RELEASED:
            for (call_id,) in headers.parse_records(op, count, message):
                self.on_stray(call_id, None)
        elif op is Op.REPLY:
            reply = decode(messages.Reply, message)
            self._complete(self._requests.get(reply.request_id), reply)
        elif op is Op.WELCOME:
            self._complete(self._welcome, decode(messages.Welcome, message))
        else:
            raise ProtocolError(f"operation {op.name} is not for hosts")

    def _on_answer(self, call_id: int, answer: Answer) -> None:
        pending = self._calls.pop(call_id, None)
        if pending is None:
            self.on_stray(call_id, answer)
        else:
            self._complete(pending, answer)

    def _complete(
        self, pending: Pending | None, answer: Answer | messages.Reply | messages.Segment | messages.Welcome
    ) -> None:
        if pending is not None and not pending.is_done:
            pending.answer = answer
            self._wake_up(pending)

    def _wake_up(self, pending: Pending) -> None:
        pending.is_done = True
        if pending.event is not None:
            pending.event.set()
        if pending is self._reader:
            os.eventfd_write(self._wake, 1)

    def _read_channel(self) -> None:
        while True:
            try:
                message, descriptors = receive_message(self._channel)
            except BlockingIOError:
                return
            except (ChannelClosed, OSError) as error:
                self._poll.unregister(self._channel_fd)
                self._read_all()  # what it had answered before it went
                self._lose(f"the broker is gone ({error})")
                return
            self._on_grant(message, descriptors)

    def _on_grant(self, message: bytes, descriptors: list[int]) -> None:
        op, _ = headers.parse_preamble(message)
        if op is not Op.SEGMENT or len(descriptors) != 2:
            close_all(descriptors)
            return
        segment = decode(messages.Segment, message)
        pending = self._requests.get(segment.request_id)
        if pending is None or pending.is_done:
            close_all(descriptors)
            return
        pending.descriptors = descriptors
        self._complete(pending, segment)

    # -- ends -----------------------------------------------------------------------------------------------------
    def _lose(self, reason: str) -> None:
        """Fail everything that waits, and whatever comes later."""
        if self._lost:
            return
        self._lost = reason
        waiting = [*self._calls.values(), *self._requests.values(), *([self._welcome] if self._welcome else [])]
        for pending in waiting:
            if not pending.is_done:
                pending.failure = Unavailable(reason)
                self._wake_up(pending)
        self._calls.clear()
        self._requests.clear()

    def close(self) -> None:
        """Leave the broker and close everything; those who wait get Unavailable. Idempotent."""
        with self.lock:
            if self._is_closed:
                return
            if not self._lost:
                with contextlib.suppress(Unavailable, zmq.ZMQError):
                    self._dealer.send(encode(messages.Bye()), zmq.NOBLOCK)
            self._lose("the bridge was closed")
            self._is_closed = True
            self._dealer.close(linger=_LINGER_MS)
            self._channel.close()
        self._context.term()
        self._close_wake()

    def _close_wake(self) -> None:
        """Close the wake-up when its last reader has left it, which it was told to."""
        give_up_s = time.monotonic() + 1.0
        while time.monotonic() < give_up_s:
            with self.lock:
                if self._reader is None:
                    os.close(self._wake)
                    return
            time.sleep(0.001)

    def leave_in_child(self) -> None:
        """Close, in a forked child, what would hide the parent's death from the broker."""
        with contextlib.suppress(OSError):
            os.close(self._channel.detach())


def _introduce(channel: socket.socket) -> bytes:
    """Say hello on the descriptor channel and return the routing id that the broker gave us."""
    send_message(channel, encode(messages.Hello(role="host")))
    message, descriptors = receive_message(channel)
    close_all(descriptors)
    op, _ = headers.parse_preamble(message)
    if op is not Op.WELCOME:
        raise ProtocolError(f"operation {op.name} in place of WELCOME")
    return decode(messages.Welcome, message).routing_id
