"""A host's connection to a broker: one DEALER, one descriptor channel, any number of threads, none of its own.

Callers send for themselves; of those that wait, one reads for all. Whoever touches the socket holds the lock, and
leaves no message unread behind it: libzmq's descriptor reports only what came after the last look. The reader waits
outside the lock, on the socket's descriptor, the channel (grants, and the end of the broker) and a wake-up.

It moves messages and wakes their owners; slots, contracts and exceptions are the bridge's.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from struct import Struct
from threading import get_ident
from typing import Final

import zmq

from luacell.client.connection import CONNECT_LIMIT_S, Connection, connect
from luacell.client.interrupts import uninterrupted
from luacell.client.pending import Answer, Bell, Pending, keeps_slot
from luacell.protocol import headers, messages
from luacell.protocol.errors import ProtocolError, Unavailable
from luacell.protocol.headers import SLOT_FREE, Op
from luacell.protocol.limits import MESSAGE_MAX, NS_PER_S, REQUEST_LIMIT_NS
from luacell.protocol.memory.channel import ChannelClosed, close_all, receive_message
from luacell.protocol.messages import Message, decode, encode, size_of

REQUEST_LIMIT_S: Final = REQUEST_LIMIT_NS / NS_PER_S
_MS: Final = 1000

_NOBLOCK: Final = int(zmq.NOBLOCK)  # plain integers: pyzmq's enums cost microseconds
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_send: Final = zmq.backend.Socket.send  # without the wrapper's handling of options that we do not use
_FULL: Final = "the broker takes no messages: it is gone or overloaded"
_RESULT_HEAD: Final = headers.head(Op.RESULT)
_RESULT: Final = Struct(f"<{headers.PREAMBLE_SIZE}s" + headers.RESULT.format.removeprefix("<"))
_RESULT_SIZE: Final = _RESULT.size


class Session:
    """One connection; made by `Session.connect`.

    Attributes:
        on_kept: called under the lock with a call whose answer does not free its slot, before its owner has it.
        on_stray: called under the lock with answers to calls nobody waits for any more, and with RELEASED (None).
    """

    def __init__(self, connection: Connection) -> None:
        self.lock = threading.RLock()  # a signal handler may make a call in the middle of one
        self.on_kept: Callable[[Pending], None] = lambda pending: None
        self.on_stray: Callable[[int, Answer | None], None] = lambda call_id, answer: None
        self.epoch = b""
        self.broker_pid = 0
        self._connection = connection
        self._channel = connection.channel
        self._dealer = connection.dealer
        self._receive = connection.dealer.recv_into
        self._inbox = mmap.mmap(-1, MESSAGE_MAX)  # the message at hand; its first byte is 0 when it was acted upon
        self._calls: dict[int, Pending] = {}
        self._requests: dict[int, Pending] = {}
        self._welcome: Pending | None = None
        self._request_ids = count(1)
        self._reader: Pending | None = None
        self._reader_thread = 0
        self._only_thread: int | None = None  # the one thread that has made calls; 0: there were others
        self._lost: str = ""
        self._is_closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._dealer_fd = int(self._dealer.getsockopt(zmq.FD))
        self._channel_fd = self._channel.fileno()
        for descriptor in (self._dealer_fd, self._channel_fd, self._wake):
            self._poll.register(descriptor, select.POLLIN)

    @classmethod
    def connect(cls, run_directory: Path) -> Session:
        """Connect to the broker of a run directory.

        Raises:
            Unavailable: nobody serves there, or it does not answer.
        """
        session = cls(connect(run_directory))
        try:
            session._greet()
        except BaseException:
            session.close()
            raise
        return session

    def _greet(self) -> None:
        pending = self._welcome = Pending()
        with self.lock:
            self._send(encode(messages.Hello(role="host")))
        self.wait(pending, CONNECT_LIMIT_S, f"a greeting within {CONNECT_LIMIT_S} s")
        if isinstance(pending.answer, messages.Welcome):
            self.epoch, self.broker_pid = pending.answer.epoch, pending.answer.broker_pid

    # -- sending --------------------------------------------------------------------------------------------------
    def call(self, pending: Pending, message: bytes, limit_s: float) -> None:
        """Send a call and wait until it is answered.

        Args:
            pending: new, with the id of the call; where this raises with `is_sent`, the call is under way.
            message: CALL with one record of that id.
            limit_s: seconds to wait.

        Raises:
            Unavailable: the broker is gone, takes no messages, or did not answer in time.
        """
        call_id, thread = pending.call_id, get_ident()
        if thread != self._only_thread:
            self._note_thread(thread)
        with self.lock:
            if self._lost:
                self.check()
            self._calls[call_id] = pending
            pending.is_sent = True  # before it is: an interrupt may come out of `send` when the message has left
            try:
                _send(self._dealer, message, _NOBLOCK)
            except zmq.Again:
                del self._calls[call_id]
                pending.is_sent = False
                raise Unavailable(_FULL, began="no") from None
            is_reader = self._reader is None
            if is_reader:
                self._reader = pending
                self._reader_thread = thread
                if thread == self._only_thread and self._receive_alone(pending, call_id):
                    return
            # For our own wait; or because sending may have consumed the signal that the reader waits for.
            if int(self._dealer.getsockopt(_EVENTS)) & _POLLIN:
                self._read_all()
        if not is_reader or not self._read_own(pending, call_id, limit_s * _MS):
            self.wait(pending, limit_s, "an answer by its deadline")

    def _note_thread(self, thread: int) -> None:
        """Notice that more than one thread uses the session."""
        self._only_thread = thread if self._only_thread is None else 0

    def _receive_alone(self, pending: Pending, call_id: int) -> bool:
        """Wait inside libzmq, for a moment, where no other thread has ever used the session. Under the lock.

        The lock is held meanwhile: a second thread that comes along waits for it once, for ALONE_MS at most. Waiting
        here is cheaper than on libzmq's descriptor.

        Returns:
            Whether our answer came; else nothing is lost, and the usual way goes on from here.
        """
        inbox = self._inbox
        if inbox[0]:
            self._resume()
        try:
            size = self._receive(inbox)
        except zmq.Again:
            return False
        if size != _RESULT_SIZE:
            self._take(size)
            return False
        head = _RESULT.unpack_from(inbox)
        if head[:2] != (_RESULT_HEAD, call_id) or head[-1] != SLOT_FREE:
            self._take(size)
            return False
        pending.answer = head[1:]
        pending.is_done = True
        del self._calls[call_id]
        self._reader = None
        inbox[0] = 0
        return True

    def leave(self, pending: Pending) -> None:
        """Stop being the reader, where `pending` is, with nothing left half read. Under the lock."""
        if self._inbox[0] and not self._is_closed:
            self._resume()
        if self._reader is pending:
            self._reader = None
            self._appoint_reader()

    def abandon_call(self, call_id: int) -> None:
        """Forget that somebody waits for a call, and tell the broker; its answer will be a stray. Under the lock."""
        if self._calls.pop(call_id, None) is not None and not self._lost and not self._is_closed:
            with contextlib.suppress(Unavailable):
                self._send(headers.encode_records(Op.CANCEL, [(call_id,)]))

    def request(self, make: Callable[[int], Message], thread: int = 0) -> Pending:
        """Send a control request and wait for its Reply or Segment.

        Args:
            make: makes the message from its request id.
            thread: that waits meanwhile for the one that asks; 0: none does.

        Returns:
            The answered request; descriptors in it are the caller's.

        Raises:
            Unavailable: the broker is gone or silent.
        """
        request_id = next(self._request_ids)
        thread = thread or get_ident()
        if thread != self._only_thread:
            self._note_thread(thread)
        message = encode(make(request_id))
        pending = Pending()
        try:
            with self.lock:
                self.check()
                self._requests[request_id] = pending
                self._send(message)
            self.wait(pending, REQUEST_LIMIT_S, f"an answer within {REQUEST_LIMIT_S:g} s")
        finally:
            with self.lock:
                self._requests.pop(request_id, None)
        return pending

    def tell(self, message: Message) -> None:
        """Send a control message that has no answer. Under the lock.

        Raises:
            Unavailable: the broker is gone, or the session was closed.
        """
        self.check()
        self._send(encode(message))

    @property
    def is_open(self) -> bool:
        """Whether the broker is there, as far as we know."""
        return not self._lost

    def check(self) -> None:
        """Raise Unavailable when the broker is known to be gone. Under the lock."""
        if self._lost:
            raise Unavailable(self._lost, began="no")

    def _send(self, message: bytes) -> None:
        try:
            _send(self._dealer, message, _NOBLOCK)
        except zmq.Again:
            raise Unavailable(_FULL, began="no") from None
        if self._reader is not None:  # sending may have consumed the signal that it waits for
            self._read_all()

    # -- waiting --------------------------------------------------------------------------------------------------
    def wait(self, pending: Pending, limit_s: float, expected: str) -> None:
        """Wait until `pending` is answered, reading for everybody where nobody else does.

        Args:
            pending: what was sent.
            limit_s: seconds from now.
            expected: what was awaited, for the error.

        Raises:
            Unavailable: the broker is gone, or did not answer in time.
        """
        until_s = time.monotonic() + limit_s
        try:
            while not pending.is_done and (left_s := until_s - time.monotonic()) > 0:
                if self._reader is pending or (self._reader is None and self._become_reader(pending)):
                    self._read_until(pending, until_s)
                else:
                    self._follow(pending, left_s)
        finally:
            if self._reader is pending or pending.bell is not None:
                with self.lock:  # we may have been appointed in the moment we left
                    self.leave(pending)
                    self._appoint_reader()
        if pending.failure is not None:
            raise pending.failure
        if not pending.is_done:
            raise Unavailable(f"the broker did not give {expected}")

    def _read_own(self, pending: Pending, call_id: int, limit_ms: float) -> bool:
        """Read once, for what happens most: the next message is our own answer and nobody else waits.

        Returns:
            Whether it was so; else nothing is lost, and the usual way goes on from here.
        """
        if pending.is_done or len(self._calls) != 1:
            return False
        ready = self._poll.poll(limit_ms)
        if len(ready) != 1 or ready[0][0] != self._dealer_fd:
            return False
        with self.lock:
            if self._is_closed:
                return False
            inbox = self._inbox
            if inbox[0]:
                self._resume()
            try:
                size = self._receive(inbox, flags=_NOBLOCK)
            except zmq.Again:
                return False
            head = _RESULT.unpack_from(inbox)
            if size != _RESULT_SIZE or head[:2] != (_RESULT_HEAD, call_id) or head[-1] != SLOT_FREE:
                self._take(size)
                self._read_all()  # libzmq's descriptor does not report what came before this look
                return False
            pending.answer = head[1:]
            pending.is_done = True
            del self._calls[call_id]
            self._reader = None
            inbox[0] = 0
            if self._calls or self._requests:
                self._appoint_reader()
            return True

    def _become_reader(self, pending: Pending) -> bool:
        with self.lock:
            if self._reader is not None or pending.is_done:
                return False
            self._reader = pending
            self._reader_thread = get_ident()
            self._read_all()  # before we wait for the signal that there is more
            return True

    def _follow(self, pending: Pending, left_s: float) -> None:
        """Let another read; wake up when it has our answer, or leaves."""
        with self.lock:
            if pending.is_done or self._reader is None:
                return
            bell = pending.bell
            if bell is None:
                bell = pending.bell = Bell()
        bell.wait(left_s)

    def _read_until(self, pending: Pending, until_s: float) -> None:
        """Read for all until `pending` is answered or time is up, then leave the reading to another."""
        while not pending.is_done and (left_s := until_s - time.monotonic()) > 0:
            ready = self._poll.poll(left_s * _MS + 1)
            if any(descriptor == self._channel_fd for descriptor, _ in ready):
                uninterrupted(self._read_channel)
            with self.lock:
                self._read_ready(ready)
        with self.lock:
            self.leave(pending)

    def _appoint_reader(self) -> None:
        """Where nobody reads, wake one of those that wait for another to do it. Under the lock."""
        if self._reader is not None:
            return
        for table in (self._calls, self._requests):
            for waiting in table.values():
                if waiting.bell is not None and not waiting.is_done:
                    waiting.bell.set()
                    return

    def _read_ready(self, ready: list[tuple[int, int]]) -> None:
        """Act on what the reader's poll has reported. Under the lock."""
        for descriptor, _ in ready:
            if descriptor == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
        self._read_all()

    def _read_all(self) -> None:
        """Read every message there is; libzmq's descriptor then reports the next one."""
        if self._is_closed:
            return
        dealer, inbox = self._dealer, self._inbox
        if inbox[0]:
            self._resume()
        while int(dealer.getsockopt(_EVENTS)) & _POLLIN:
            self._take(self._receive(inbox, flags=_NOBLOCK))

    def _resume(self) -> None:
        """Act on a message whose reader was interrupted: pyzmq may raise when it has received it already."""
        try:
            size = size_of(memoryview(self._inbox))
        except ProtocolError as error:
            self._lose(f"the broker sent something that is not of this protocol: {error}")
            self._inbox[0] = 0
        else:
            self._take(size)

    def _take(self, size: int) -> None:
        """Act on the message in the inbox; where an interrupt breaks that off, doing it again is no harm."""
        inbox = self._inbox
        if not inbox[0]:  # a call of a signal handler has done it
            return
        message = inbox[:size]
        try:
            if size == _RESULT_SIZE and message[: headers.PREAMBLE_SIZE] == _RESULT_HEAD:
                record = headers.RESULT.unpack_from(message, headers.PREAMBLE_SIZE)
                self._on_answer(record[0], record)
            else:
                self._on_message(message)
        except ProtocolError as error:
            self._lose(f"the broker sent something that is not of this protocol: {error}")
        inbox[0] = 0

    def _on_message(self, message: bytes) -> None:
        op, count = headers.parse_preamble(message)
        if op is Op.RESULT:
            for record in headers.parse_records(op, count, message):
                self._on_answer(record[0], record)
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
        pending = self._calls.get(call_id)
        if pending is None:
            self.on_stray(call_id, answer)
            return
        if keeps_slot(answer):
            self.on_kept(pending)
        self._complete(pending, answer)
        self._calls.pop(call_id, None)

    def _complete(
        self, pending: Pending | None, answer: Answer | messages.Reply | messages.Segment | messages.Welcome
    ) -> None:
        if pending is not None:
            if not pending.is_done:
                pending.answer = answer
            self._wake_up(pending)

    def _wake_up(self, pending: Pending) -> None:
        pending.is_done = True
        if pending.bell is not None:
            pending.bell.set()
        if pending is self._reader and get_ident() != self._reader_thread:
            os.eventfd_write(self._wake, 1)

    def _read_channel(self) -> None:
        with self.lock:
            if not self._is_closed:
                self._read_grants()

    def _read_grants(self) -> None:
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
            try:
                self._on_grant(message, descriptors)
            except ProtocolError as error:
                close_all(descriptors)
                self._lose(f"the broker sent something that is not of this protocol: {error}")
                return

    def _on_grant(self, message: bytes, descriptors: list[int]) -> None:
        segment = decode(messages.Segment, message)
        if len(descriptors) != 2:
            raise ProtocolError(f"SEGMENT came with {len(descriptors)} descriptors, not 2")
        pending = self._requests.get(segment.request_id)
        if pending is None or pending.is_done:  # its owner has given up: let the broker have the memory back
            close_all(descriptors)
            self._send(encode(messages.GiveBack(arena=segment.arena, index=segment.index)))
            return
        pending.descriptors = descriptors
        self._complete(pending, segment)

    # -- ends -----------------------------------------------------------------------------------------------------
    def _lose(self, reason: str) -> None:
        """Fail everything that waits, and whatever comes later."""
        if self._lost:
            return
        self._lost = reason
        waiting = [
            *self._calls.values(),
            *self._requests.values(),
            *([self._welcome] if self._welcome else []),
        ]
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
                    _send(self._dealer, encode(messages.Bye()), _NOBLOCK)
            self._lose("the bridge was closed")
            self._is_closed = True
            self._connection.close()
        self._connection.end()
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
