"""An event loop's connection to a broker: the loop watches the wire's descriptor and the descriptor channel.

Calls of one iteration of the loop leave together, in one message. What a message means is the ledger's business, as it
is for threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from itertools import count
from typing import Final

from luacell.client.arena import Arena
from luacell.client.connection import Connection
from luacell.client.ledger import Ledger
from luacell.client.pending import Pending
from luacell.client.session import FULL, LAST_WORDS_S, REQUEST_LIMIT_S, refuse_grant
from luacell.client.wire import WireFull
from luacell.protocol import errors, headers, messages
from luacell.protocol.errors import ProtocolError, Unavailable
from luacell.protocol.headers import Op
from luacell.protocol.limits import CALLS_PER_MESSAGE_MAX
from luacell.protocol.memory.channel import ChannelClosed, close_all, receive_message
from luacell.protocol.messages import Message, encode

READ_MAX: Final = 256  # messages that are read before the loop does something else


class Awaited(Pending):
    """Something that a task waits for.

    Attributes:
        future: done when there is an answer, a failure, or no time left.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[None] = loop.create_future()


class AsyncSession:
    """One connection of one event loop; every method runs in that loop.

    Args:
        connection: the session's from here on.
        loop: that is running.

    Attributes:
        ledger: who waits for what.
        drain: called with an arena whose contract is gone and of which a slot came back.
    """

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.drain: Callable[[Arena], None] = lambda arena: None
        self.ledger = Ledger(_wake_up, lambda arena: self.drain(arena))
        self.broker_pid = connection.welcome.broker_pid
        self.loop = loop
        self._connection = connection
        self._channel = connection.channel
        self._wire = connection.wire
        self._unsent: list[tuple[Pending, bytes]] = []
        self._request_ids = count(1)
        self._is_closed = False
        self._ending: asyncio.TimerHandle | None = None  # the channel is at its end; a moment for the wire to be, too
        self._wire_fd = self._wire.fileno()
        self._wants_room = False  # whether the loop is to tell when the wire can be written
        self._channel_fd = self._channel.fileno()
        loop.add_reader(self._wire_fd, self._read_all)
        loop.add_reader(self._channel_fd, self._read_channel)

    @property
    def is_open(self) -> bool:
        """Whether the broker is there, as far as we know."""
        return not self.ledger.lost

    # -- sending --------------------------------------------------------------------------------------------------
    def put(self, pending: Pending, record: bytes) -> None:
        """Send a call, together with all others of this iteration of the loop.

        Args:
            pending: new, with the id of the call.
            record: of CALL.

        Raises:
            Unavailable: the broker is gone.
        """
        self.ledger.check()
        self.ledger.calls[pending.call_id] = pending
        if not self._unsent:
            self.loop.call_soon(self._flush)
        self._unsent.append((pending, record))

    def _flush(self, *, is_last: bool = False) -> None:
        """Send the calls that wait for it. Where the wire takes none, try once more when we know why."""
        unsent = [(pending, record) for pending, record in self._unsent if not (pending.is_left or pending.is_done)]
        self._unsent = []
        if self._is_closed:
            return
        for start in range(0, len(unsent), CALLS_PER_MESSAGE_MAX):
            batch = unsent[start : start + CALLS_PER_MESSAGE_MAX]
            try:
                self._send(headers.head(Op.CALL, len(batch)) + b"".join([record for _, record in batch]))
            except Unavailable:
                if is_last:
                    self._refuse(unsent[start:])
                else:
                    self._unsent = unsent[start:]
                    self.loop.call_later(LAST_WORDS_S, lambda: self._flush(is_last=True))
                break
            for pending, _ in batch:
                pending.is_sent = True

    def _refuse(self, unsent: list[tuple[Pending, bytes]]) -> None:
        for pending, _ in unsent:
            self.ledger.calls.pop(pending.call_id, None)
            pending.failure = Unavailable(FULL, began="no")
            pending.is_done = True
            _wake_up(pending)

    def _send(self, message: bytes) -> None:
        try:
            self._wire.send(message)
        except WireFull:
            raise Unavailable(FULL, began="no") from None
        if self._wire.has_unsent and not self._wants_room:
            self._wants_room = True
            self.loop.add_writer(self._wire_fd, self._use_room)

    def _use_room(self) -> None:
        """Send what waits."""
        self._wire.flush()
        if not self._wire.has_unsent:
            self._wants_room = False
            self.loop.remove_writer(self._wire_fd)

    def tell(self, message: Message) -> None:
        """Send a control message that has no answer.

        Raises:
            Unavailable: the broker is gone, or the session was closed.
        """
        self.ledger.check()
        self._send(encode(message))

    def give_up(self, pending: Pending) -> None:
        """Nobody waits for a call any more: cancel it; its slot rests until nobody can touch it."""
        if self.ledger.give_up(pending) and not self._is_closed:
            with contextlib.suppress(Unavailable):
                self._send(headers.encode_records(Op.CANCEL, [(pending.call_id,)]))

    async def request(self, make: Callable[[int], Message], limit_s: float = REQUEST_LIMIT_S) -> Pending:
        """Send a control request and wait for its Reply or Segment.

        Args:
            make: makes the message from its request id.
            limit_s: seconds to wait.

        Returns:
            The answered request; descriptors in it are the caller's.

        Raises:
            Unavailable: the broker is gone or silent.
        """
        request_id = next(self._request_ids)
        message = encode(make(request_id))
        pending = Awaited(self.loop)
        self.ledger.check()
        self.ledger.requests[request_id] = pending
        try:
            await self._send_request(message)
            pending.is_sent = True
            await self.wait(pending, limit_s, f"an answer within {limit_s:g} s")
        except BaseException:
            unwanted = refuse_grant(pending)
            if unwanted is not None:
                with contextlib.suppress(Unavailable):
                    self.tell(unwanted)
            raise
        finally:
            self.ledger.requests.pop(request_id, None)
        return pending

    async def _send_request(self, message: bytes) -> None:
        try:
            self._send(message)
        except Unavailable:
            await asyncio.sleep(LAST_WORDS_S)  # where the broker is gone, the channel tells in a moment
            self.ledger.check()
            raise

    # -- waiting --------------------------------------------------------------------------------------------------
    async def wait(self, pending: Awaited, limit_s: float, expected: str) -> None:
        """Wait until `pending` is answered.

        Args:
            pending: what was sent, or will be in this iteration of the loop.
            limit_s: seconds from now.
            expected: what was awaited, for the error.

        Raises:
            Unavailable: the broker is gone, or did not answer in time.
        """
        timer = self.loop.call_later(limit_s, _wake_up, pending)
        try:
            await pending.future
        finally:
            timer.cancel()
        if pending.failure is not None:
            raise pending.failure
        if not pending.is_done:
            began: errors.Began = "unknown" if pending.is_sent else "no"
            raise Unavailable(f"the broker did not give {expected}", began=began)

    def _read_all(self) -> None:
        """Read every message there is, but READ_MAX at once, and notice the end of the wire."""
        if self._is_closed:
            return
        try:
            if self._wire.read(self.ledger.take, READ_MAX):
                return  # the descriptor still tells
        except ProtocolError as error:
            self._lose(f"the broker sent something that is not of this protocol: {error}")
        if self._wire.is_at_end and self._ending is None and not self.ledger.lost:
            self._stop_watching_wire()
            self._ending = self.loop.call_later(LAST_WORDS_S, self._lose, "the broker is gone (it hung up)")
        elif self._wire.is_at_end:
            self._lose("the broker is gone")
        elif self.ledger.lost:
            self._leave_loop()

    def _read_channel(self) -> None:
        """Read every grant there is, and notice the end of the broker."""
        while not self._is_closed:
            try:
                message, descriptors = receive_message(self._channel)
            except BlockingIOError:
                return
            except (ChannelClosed, OSError) as error:
                self.loop.remove_reader(self._channel_fd)
                reason = f"the broker is gone ({error})"
                if self._ending is None:
                    self._ending = self.loop.call_later(LAST_WORDS_S, self._lose, reason)
                self._read_all()  # what it had answered before it went
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
                    self.tell(unwanted)

    # -- ends -----------------------------------------------------------------------------------------------------
    def _lose(self, reason: str) -> None:
        self._leave_loop()
        self.ledger.lose(reason)

    def _leave_loop(self) -> None:
        """Have the loop watch nothing any more. Idempotent; the loop may be closed."""
        if self._ending is not None:
            self._ending.cancel()
        if not self.loop.is_closed() and not self._is_closed:
            self._stop_watching_wire()
            self.loop.remove_reader(self._channel_fd)

    def _stop_watching_wire(self) -> None:
        self.loop.remove_reader(self._wire_fd)
        if self._wants_room:
            self._wants_room = False
            self.loop.remove_writer(self._wire_fd)

    def close(self) -> None:
        """Leave the broker; those who wait get Unavailable. Idempotent; `end` follows."""
        if self._is_closed:
            return
        is_lost = bool(self.ledger.lost)
        if not is_lost:
            with contextlib.suppress(Unavailable):
                self._send(encode(messages.Bye()))
        self._leave_loop()
        self._is_closed = True
        self.ledger.lose("the bridge was closed")
        self._connection.close(is_lost=is_lost)

    def end(self) -> None:
        """Wait, outside the loop, until the farewell has left."""
        self._connection.end()

    def leave_in_child(self) -> None:
        """Close, in a forked child, what would hide the parent's death from the broker."""
        self._connection.leave_in_child()


def _wake_up(pending: Pending) -> None:
    assert isinstance(pending, Awaited)
    if not pending.future.done():
        pending.future.set_result(None)
