"""Who waits for what in one session: calls, requests, and what each message of the broker means for them.

It waits for nothing, sends nothing and holds no lock: a session of threads asks it under its own, a session of an event
loop from that. Where an interrupt breaks a method off, doing it again is no harm.

    sent ──▶ calls ──answer──▶ settled ──▶ slot given back
               │                  └─ slot kept ──▶ resting ──RELEASED──▶ slot given back
               └─ given up ───────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from luacell.client.arena import Arena
from luacell.client.pending import Answer, Pending, keeps_slot
from luacell.protocol import headers, messages
from luacell.protocol.errors import Began, ProtocolError, Unavailable
from luacell.protocol.headers import Op
from luacell.protocol.messages import decode

RESULT_HEAD: Final = headers.head(Op.RESULT)
RESULT_SIZE: Final = headers.PREAMBLE_SIZE + headers.RESULT.size
_NOT_OURS: Final = "the broker sent something that is not of this protocol"


class Ledger:
    """The books of one session.

    Args:
        wake: called with whatever has just been answered or has failed.
        drain: called with an arena whose contract is gone and of which a slot came back.

    Attributes:
        calls: those that wait for their answer, by call id.
        requests: those that wait for their Reply or Segment, by request id.
        resting: calls that were answered or given up before their slot is free.
        lost: why the session is at its end; empty before.
    """

    def __init__(self, wake: Callable[[Pending], None], drain: Callable[[Arena], None]) -> None:
        self.calls: dict[int, Pending] = {}
        self.requests: dict[int, Pending] = {}
        self.resting: dict[int, Pending] = {}
        self.lost = ""
        self._wake = wake
        self._drain = drain

    def check(self) -> None:
        """Return while the broker is there, as far as we know.

        Raises:
            Unavailable: it is not.
        """
        if self.lost:
            raise Unavailable(self.lost, began="no")

    # -- what the broker says -------------------------------------------------------------------------------------
    def take(self, message: bytes) -> None:
        """Act on a message of the broker; one that is not of this protocol is the end."""
        try:
            if len(message) == RESULT_SIZE and message[: headers.PREAMBLE_SIZE] == RESULT_HEAD:
                record = headers.RESULT.unpack_from(message, headers.PREAMBLE_SIZE)
                self._on_answer(record[0], record)
            else:
                self._on_message(message)
        except ProtocolError as error:
            self.lose(f"{_NOT_OURS}: {error}")

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
                self._on_stray(call_id, None)
        elif op is Op.REPLY:
            reply = decode(messages.Reply, message)
            pending = self.requests.get(reply.request_id)
            if pending is not None:
                self._complete(pending, reply)
        else:
            raise ProtocolError(f"operation {op.name} is not for hosts")

    def _on_answer(self, call_id: int, answer: Answer) -> None:
        pending = self.calls.get(call_id)
        if pending is None:
            self._on_stray(call_id, answer)
            return
        if keeps_slot(answer):
            self.resting[call_id] = pending
        self._complete(pending, answer)
        self.calls.pop(call_id, None)

    def _on_stray(self, call_id: int, answer: Answer | None) -> None:
        """An answer that nobody waits for any more, or RELEASED (None)."""
        pending = self.resting.get(call_id)
        if pending is None or (answer is not None and keeps_slot(answer)):
            return
        pending.is_released = True
        if pending.is_left:
            self.free(pending)
        self.resting.pop(call_id, None)

    def grant(self, message: bytes, descriptors: Sequence[int]) -> messages.GiveBack | None:
        """Act on a message of the descriptor channel.

        Args:
            message: a SEGMENT.
            descriptors: that came with it; those of a request that waits become its own.

        Returns:
            What to send where nobody wants the memory any more; the descriptors are then still the caller's.

        Raises:
            ProtocolError: it is no grant; the descriptors are still the caller's.
        """
        segment = decode(messages.Segment, message)
        if len(descriptors) != 2:
            raise ProtocolError(f"SEGMENT came with {len(descriptors)} descriptors, not 2")
        pending = self.requests.get(segment.request_id)
        if pending is None or pending.is_done:
            return messages.GiveBack(arena=segment.arena, index=segment.index)
        pending.descriptors = descriptors
        self._complete(pending, segment)
        return None

    def _complete(self, pending: Pending, answer: Answer | messages.Reply | messages.Segment) -> None:
        if not pending.is_done:
            pending.answer = answer
            pending.is_done = True
        self._wake(pending)

    # -- slots ----------------------------------------------------------------------------------------------------
    def settle(self, pending: Pending) -> None:
        """Let go of the slot of an answered call; where it is kept, RELEASED gives it back."""
        pending.is_left = True
        if pending.is_released or not keeps_slot(pending.answer) or self.lost:
            self.free(pending)

    def give_up(self, pending: Pending) -> bool:
        """Nobody waits any more: the slot rests until nobody can touch it.

        Returns:
            Whether the broker is to be told by CANCEL.
        """
        pending.is_left = True
        if not pending.is_sent:
            self.calls.pop(pending.call_id, None)
            self.free(pending)
        elif pending.answer is not None or self.lost:
            self.settle(pending)
        else:
            self.resting[pending.call_id] = pending
            return self.calls.pop(pending.call_id, None) is not None
        return False

    def free(self, pending: Pending) -> None:
        """Give back the slot of a call, once."""
        slot, pending.slot = pending.slot, None
        if slot is not None:
            slot.give_back()
            if slot.home.is_retired:
                self._drain(slot.home)

    # -- the end --------------------------------------------------------------------------------------------------
    def lose(self, reason: str) -> None:
        """Fail everything that waits, and whatever comes later. Idempotent: the first reason stays."""
        if self.lost:
            return
        self.lost = reason
        for pending in (*self.calls.values(), *self.requests.values()):
            if not pending.is_done:
                pending.failure = Unavailable(reason, began=_began(pending))
                pending.is_done = True
                self._wake(pending)
        self.calls.clear()
        self.requests.clear()

    def let_go(self) -> None:
        """After the end: give back the slots that rest; nobody can touch them any more."""
        for pending in self.resting.values():
            if pending.is_left:
                self.free(pending)
        self.resting.clear()


def _began(pending: Pending) -> Began:
    """Say what is known of something whose broker is gone; workers that have not begun a call may do so yet."""
    if not pending.is_sent:
        return "no"
    return "yes" if pending.slot is not None and pending.slot.has_begun else "unknown"
