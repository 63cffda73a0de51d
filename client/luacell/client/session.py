"""A host's connection to a broker: one wire, one descriptor channel, any number of threads, none of its own.

Callers send for themselves; of those that wait, one reads for all. Whoever touches the wire holds the lock, and leaves
no message unread behind it where the wire forgets. The reader waits outside the lock, on the wire's descriptor, the
channel (grants, and the end of the broker) and a wake-up.

A signal handler may make a call where its thread waits as the reader: that call reads in the reader's place.

It moves messages and wakes their owners; what a message means is the ledger's, slots, contracts and exceptions are
the bridge's.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from threading import get_ident
from typing import Final

from luacell.client.arena import Arena
from luacell.client.connection import CONNECT_LIMIT_S, Connection, connect
from luacell.client.interrupts import uninterrupted
from luacell.client.ledger import Ledger
from luacell.client.pending import Bell, Pending
from luacell.client.wire import WireFull
from luacell.protocol import headers, messages
from luacell.protocol.errors import ProtocolError, Unavailable
from luacell.protocol.headers import Op
from luacell.protocol.limits import NS_PER_S, REQUEST_LIMIT_NS
from luacell.protocol.memory.channel import ChannelClosed, close_all, receive_message
from luacell.protocol.messages import Message, encode

REQUEST_LIMIT_S: Final = REQUEST_LIMIT_NS / NS_PER_S
_MS: Final = 1000

ALONE_MS: Final = 20  # how long the only thread waits for its answer alone before it waits for everything
FULL: Final = "the broker takes no messages: it is gone or overloaded"
LAST_WORDS_S: Final = 0.05  # for what has been received of a broker that is gone, but not yet handed over


class Session:
    """One connection; made by `Session.connect`.

    Args:
        connection: the session's from here on.

    Attributes:
        ledger: who waits for what; used under the lock.
        drain: called under the lock with an arena whose contract is gone and of which a slot came back.
    """

    def __init__(self, connection: Connection) -> None:
        self.lock = threading.RLock()  # a signal handler may make a call in the middle of one
        self.drain: Callable[[Arena], None] = lambda arena: None
        self.ledger = self._make_ledger()
        self.broker_pid = connection.welcome.broker_pid
        self._connection = connection
        self._channel = connection.channel
        self._wire = connection.wire
        self._forgets = connection.wire.forgets
        self._calls = self.ledger.calls
        self._requests = self.ledger.requests
        self._request_ids = count(1)
        self._reader: Pending | None = None
        self._reader_thread = 0
        self._within: Pending | None = None  # of a signal handler, whose thread is the reader
        self._only_thread: int | None = None  # the one thread that has made calls; 0: there were others
        self._is_closed = False
        self._is_ending = False  # the channel or the wire is at its end
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll_wire = select.poll()
        self._wire_fd = self._wire.fileno()
        self._wants_room = False  # whether the poll is to tell when the wire can be written
        self._channel_fd = self._channel.fileno()
        self._aside_fd = -1
        self._read_aside: Callable[[], bool] = lambda: False
        for descriptor in (self._wire_fd, self._channel_fd, self._wake):
            self._poll.register(descriptor, select.POLLIN)
        self._poll_wire.register(self._wire_fd, select.POLLIN)

    @classmethod
    def connect(cls, run_directory: Path, limit_s: float = CONNECT_LIMIT_S) -> Session:
        """Connect to the broker of a run directory.

        Args:
            run_directory: of the broker.
            limit_s: seconds.

        Raises:
            Unavailable: nobody serves there, or it does not answer.
        """
        connection = connect(run_directory, limit_s)
        try:
            return cls(connection)
        except BaseException:
            connection.close(is_lost=True)
            connection.end()
            raise

    def _make_ledger(self) -> Ledger:
        return Ledger(self._wake_up, lambda arena: self.drain(arena))

    def watch_aside(self, descriptor: int, read: Callable[[], bool]) -> None:
        """Have whoever waits read something else by the way.

        Args:
            descriptor: readable when there is something; stays the caller's.
            read: reads it, without waiting, and tells whether more may come.
        """
        self._aside_fd, self._read_aside = descriptor, read
        self._poll.register(descriptor, select.POLLIN)

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
            if self.ledger.lost:
                self.check()
            self._calls[call_id] = pending
            pending.is_sent = True  # before it is: an interrupt may come out of `send` when the message has left
            try:
                self._wire.send(message)
            except WireFull as full:
                self._calls.pop(call_id, None)
                pending.is_sent = False
                raise self._not_sent(full) from None
            is_reader = self._reader is None
            if is_reader:
                self._reader_thread = thread  # first, for a signal handler's call
                self._reader = pending
            if self._forgets:
                self._read_all()
            elif self._wire.has_unsent:
                self._want_room()
        # Waiting for the wire alone is cheaper, and enough for a moment where no other thread may close the session.
        if is_reader and thread == self._only_thread and self._poll_wire.poll(ALONE_MS):
            with self.lock:
                if not self._is_closed and self._wire.read_result(pending, self._calls, self.ledger.take):
                    self._pass_on()
                    return
                self._read_all()
        until_s = time.monotonic() + limit_s
        if not is_reader or not self._read_own(pending, limit_s * _MS):
            self.wait(pending, until_s - time.monotonic(), "an answer by its deadline")

    def _note_thread(self, thread: int) -> None:
        """Notice that more than one thread uses the session."""
        self._only_thread = thread if self._only_thread is None else 0

    def post(self, message: bytes) -> None:
        """Send a call that nobody waits for. Under the lock.

        Raises:
            Unavailable: the broker is gone, takes no messages, or the session was closed.
        """
        self.check()
        self._send(message)

    def leave(self, pending: Pending) -> None:
        """Stop being the reader, where `pending` is. Under the lock."""
        if self._reader is pending:
            self._reader = None
            self._appoint_reader()

    def give_up(self, pending: Pending) -> None:
        """Nobody waits for a call any more: cancel it; its slot rests until nobody can touch it. Under the lock."""
        self.leave(pending)
        if self.ledger.give_up(pending) and not self._is_closed:
            with contextlib.suppress(Unavailable):
                self._send(headers.encode_records(Op.CANCEL, [(pending.call_id,)]))

    def request(self, make: Callable[[int], Message], limit_s: float = REQUEST_LIMIT_S, thread: int = 0) -> Pending:
        """Send a control request and wait for its Reply or Segment.

        Args:
            make: makes the message from its request id.
            limit_s: seconds to wait.
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
                pending.is_sent = True
            self.wait(pending, limit_s, f"an answer within {limit_s:g} s")
        except BaseException:
            with self.lock, contextlib.suppress(Unavailable):
                self._requests.pop(request_id, None)
                unwanted = refuse_grant(pending)
                if unwanted is not None:
                    self.tell(unwanted)
            raise
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
        return not self.ledger.lost

    def check(self) -> None:
        """Return while the broker is there, as far as we know. Under the lock.

        Raises:
            Unavailable: it is not.
        """
        self.ledger.check()

    def _send(self, message: bytes) -> None:
        try:
            self._wire.send(message)
        except WireFull as full:
            raise self._not_sent(full) from None
        if self._forgets:
            if self._reader is not None:
                self._read_all()
        elif self._wire.has_unsent:
            self._want_room()

    def _want_room(self) -> None:
        """Have whoever reads send what waits, as soon as there is room for it. Under the lock."""
        if not self._wants_room:
            self._wants_room = True
            self._poll.register(self._wire_fd, select.POLLIN | select.POLLOUT)
        if self._reader is not None and get_ident() != self._reader_thread:
            os.eventfd_write(self._wake, 1)

    def _use_room(self) -> None:
        """Send what waits. Under the lock."""
        self._wire.flush()
        if self._wants_room and not self._wire.has_unsent:
            self._wants_room = False
            self._poll.register(self._wire_fd, select.POLLIN)

    def _not_sent(self, full: WireFull) -> Unavailable:
        """Find out why nothing can be sent: where the broker is gone, the channel tells, now or in a moment."""
        if not full.is_slow and not self.ledger.lost and not self._is_closed:
            channel = select.poll()
            channel.register(self._channel_fd, select.POLLIN)
            channel.poll(LAST_WORDS_S * _MS)
            self._read_grants()
        return Unavailable(self.ledger.lost or FULL, began="no")

    def is_within(self) -> bool:
        """Whether this thread is in the middle of a call or request already: the next one is a signal handler's."""
        return _is_owned(self.lock) or (self._reader is not None and self._reader_thread == get_ident())

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
                    self._read_until(pending, until_s, self._poll)
                elif self._reader_thread == get_ident():
                    self._read_within(pending, until_s)
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

    def _read_own(self, pending: Pending, limit_ms: float) -> bool:
        """Read once, for what happens most: the next message is our own answer and nobody else waits.

        Returns:
            Whether it was so; else nothing is lost, and the usual way goes on from here.
        """
        if pending.is_done or len(self._calls) != 1:
            return False
        ready = self._poll.poll(limit_ms)
        if len(ready) != 1 or ready[0][0] != self._wire_fd:
            return False
        with self.lock:
            if self._is_closed:
                return False
            if not self._wire.read_result(pending, self._calls, self.ledger.take):
                self._read_all()
                return False
            self._pass_on()
            return True

    def _pass_on(self) -> None:
        """Stop being the reader, which we are. Under the lock."""
        self._reader = None
        if self._calls or self._requests:
            self._appoint_reader()

    def _become_reader(self, pending: Pending) -> bool:
        with self.lock:
            if self._reader is not None or pending.is_done:
                return False
            self._reader_thread = get_ident()  # first, for a signal handler's call
            self._reader = pending
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

    def _read_within(self, pending: Pending, until_s: float) -> None:
        """Read in a signal handler, which has interrupted this thread as the reader; that goes on afterwards."""
        poll = select.poll()  # the reader's is in use
        for descriptor in (self._wire_fd, self._channel_fd, self._wake):
            poll.register(descriptor, select.POLLIN)
        outer, self._within = self._within, pending
        try:
            if self._wire.has_unsent:
                poll.register(self._wire_fd, select.POLLIN | select.POLLOUT)
            self._read_until(pending, until_s, poll)
        finally:
            self._within = outer
            os.eventfd_write(self._wake, 1)  # its answer may have come

    def _read_until(self, pending: Pending, until_s: float, poll: select.poll) -> None:
        """Read for all until `pending` is answered or time is up, then leave the reading to another."""
        while not pending.is_done and (left_s := until_s - time.monotonic()) > 0:
            ready = poll.poll(left_s * _MS + 1)
            descriptors = [descriptor for descriptor, _ in ready]
            if self._channel_fd in descriptors:
                uninterrupted(self._read_channel, is_within=_is_owned(self.lock))
            if self._aside_fd in descriptors and not self._read_aside():
                self._poll.unregister(self._aside_fd)
                self._aside_fd = -1
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
        if self._wants_room and not self._is_closed:
            self._use_room()

    def _read_all(self) -> None:
        """Read every message there is, and notice the end of the wire. Under the lock."""
        if self._is_closed:
            return
        try:
            self._wire.read(self.ledger.take)
        except ProtocolError as error:
            self._lose(f"the broker sent something that is not of this protocol: {error}")
        if self._wire.is_at_end and not self._is_ending:
            self._is_ending = True
            self._read_grants()
            self._lose("the broker is gone (it has closed the connection)")

    def _wake_up(self, pending: Pending) -> None:
        if pending.bell is not None:
            pending.bell.set()
        if (pending is self._reader or pending is self._within) and get_ident() != self._reader_thread:
            os.eventfd_write(self._wake, 1)

    def _read_channel(self) -> None:
        with self.lock:
            if not self._is_closed:
                self._read_grants()

    def _read_grants(self) -> None:
        """Read everything on the channel, and notice its end. Under the lock."""
        while True:
            try:
                message, descriptors = receive_message(self._channel)
            except BlockingIOError:
                return
            except (ChannelClosed, OSError) as error:
                self._hear_last_words()
                self._lose(f"the broker is gone ({error})")
                return
            try:
                unwanted = self.ledger.grant(message, descriptors)
            except ProtocolError as error:
                close_all(descriptors)
                self._lose(f"the broker sent something that is not of this protocol: {error}")
                return
            if unwanted is not None:
                close_all(descriptors)
                with contextlib.suppress(Unavailable):
                    self._send(encode(unwanted))

    def _hear_last_words(self) -> None:
        """Take the answers that the broker gave before it went: all are there when the wire is at its end too."""
        self._is_ending = True
        until_s = time.monotonic() + LAST_WORDS_S
        wire = select.poll()
        wire.register(self._wire_fd, select.POLLIN)
        self._read_all()
        while self._wire.may_speak() and (left_s := until_s - time.monotonic()) > 0:
            wire.poll(left_s * _MS)
            self._read_all()

    # -- ends -----------------------------------------------------------------------------------------------------
    def _lose(self, reason: str) -> None:
        """Fail everything that waits, and whatever comes later. Under the lock."""
        with contextlib.suppress(KeyError):
            self._poll.unregister(self._channel_fd)
        self.ledger.lose(reason)

    def close(self) -> None:
        """Leave the broker and close everything; those who wait get Unavailable. Idempotent."""
        with self.lock:
            if self._is_closed:
                return
            is_lost = bool(self.ledger.lost)
            if not is_lost:
                with contextlib.suppress(WireFull):
                    self._wire.send(encode(messages.Bye()))
            self.ledger.lose("the bridge was closed")
            self._is_closed = True
            self._connection.close(is_lost=is_lost)
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
        self._connection.leave_in_child()


def _is_owned(lock: threading.RLock) -> bool:
    """Whether this thread holds a lock."""
    is_owned: bool = lock._is_owned()  # type: ignore[attr-defined]  # as threading.Condition asks
    return is_owned


def refuse_grant(pending: Pending) -> Message | None:
    """Close what a lease was granted in the moment that its owner gave up; return what to tell the broker."""
    if not isinstance(pending.answer, messages.Segment):
        return None
    close_all(pending.descriptors)
    return messages.GiveBack(arena=pending.answer.arena, index=pending.answer.index)
