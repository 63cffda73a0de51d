"""The host's arenas: where slots come from, and how memory is got from the broker and given back.

It leases pairs of segments and hands out their slots; calls are made elsewhere. Everything that says so runs under the
session's lock.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from threading import get_ident
from typing import Final

from luacell.client.arena import IDLE_PAIR_BYTES_MIN, IDLE_PAIR_S, Arena, HostPair, Slot
from luacell.client.interrupts import uninterrupted
from luacell.client.pending import Pending
from luacell.client.replies import raise_not_found
from luacell.client.session import Session
from luacell.protocol import messages
from luacell.protocol.errors import AbiErrorCode, Busy, call_error_class
from luacell.protocol.messages import id_bytes

LEASES_MAX: Final = 8  # attempts to get a slot that other threads take first


class HostMemory:
    """All arenas of one session.

    Attributes:
        arenas: by contract id; used under the session's lock.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.arenas: dict[int, Arena] = {}
        self._retired: list[Arena] = []  # those whose last slots are in use
        self._growing = threading.Lock()

    def take_new(self, contract_id: int, args_size: int, out_size: int) -> Slot:
        """Take a slot where none was free or large enough, getting more memory from the broker.

        Raises:
            HostContractNotFound: there is no such contract.
            Busy: a bound on memory was hit.
            Unavailable: the broker is gone.
        """
        thread = get_ident()
        for _ in range(LEASES_MAX):
            arena = uninterrupted(lambda: self._make_room(contract_id, args_size, out_size, thread))
            with self._session.lock:
                slot = arena.take(args_size, out_size)
            if slot is not None:
                return slot
        raise Busy("every slot is taken by other threads; retry later", began="no", limit="slots")

    def _make_room(self, contract_id: int, args_size: int, out_size: int, thread: int) -> Arena:
        """Return the arena of a contract, in which there was a slot for a moment."""
        with self._growing:
            with self._session.lock:
                arena = self.arenas.setdefault(contract_id, Arena(contract_id))
                has_room = arena.has_room(args_size, out_size)
            if not has_room:
                self._grow(arena, args_size, out_size, thread)
        return arena

    def _grow(self, arena: Arena, args_size: int, out_size: int, thread: int) -> None:
        """Get another pair of segments; idle ones go back first, all of them when the budget is used up."""
        now_s = time.monotonic()
        self._give_back_idle(before_s=now_s - IDLE_PAIR_S, size_min=IDLE_PAIR_BYTES_MIN)
        pending = self._ask(arena, args_size, out_size, thread)
        answer = pending.answer
        if isinstance(answer, messages.Reply) and answer.code == AbiErrorCode.BUSY:
            self._give_back_idle(before_s=now_s, size_min=0)
            pending = self._ask(arena, args_size, out_size, thread)
            answer = pending.answer
        if isinstance(answer, messages.Segment):
            self._add(arena, answer, pending.descriptors)
            return
        assert isinstance(answer, messages.Reply)
        if not arena.pairs:
            with self._session.lock:
                self.arenas.pop(arena.contract_id, None)
        if answer.code == AbiErrorCode.HOST_CONTRACT_NOT_FOUND:
            raise_not_found(arena.contract_id)
        code = AbiErrorCode(answer.code)
        raise call_error_class(code)(answer.reason, code=code, began="no", limit=answer.reason)

    def _ask(self, arena: Arena, args_size: int, out_size: int, thread: int) -> Pending:
        count = arena.slots_wanted(args_size, out_size)
        return self._session.request(
            lambda number: messages.Lease(
                request_id=number,
                contract=id_bytes(arena.contract_id),
                args_size=args_size,
                out_size=out_size,
                count=count,
            ),
            thread,
        )

    def _add(self, arena: Arena, segment: messages.Segment, descriptors: Sequence[int]) -> None:
        try:
            pair = HostPair(arena, segment, *descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        with self._session.lock:
            try:
                self._session.tell(messages.Mapped(arena=segment.arena, index=segment.index))
            except BaseException:
                pair.close()
                raise
            arena.add(pair, segment.deadline_us)

    def forget(self, contract_id: int) -> None:
        """Give back what a contract that is gone has left; what comes in its place may have another deadline."""
        uninterrupted(lambda: self._retire(contract_id))

    def _retire(self, contract_id: int) -> None:
        with self._session.lock:
            arena = self.arenas.pop(contract_id, None)
            if arena is not None:
                self._give_back(arena.retire())
                self._retired = [each for each in (*self._retired, arena) if each.pairs]

    def give_back_drained(self, arena: Arena) -> None:
        """Give back what a retired arena had still in use. Under the lock."""
        drained, arena.drained = arena.drained, []
        for pair in drained:
            arena.pairs.remove(pair)
        self._give_back(drained)

    def _give_back_idle(self, before_s: float, size_min: int) -> None:
        with self._session.lock:
            for arena in self.arenas.values():
                self._give_back(arena.remove_idle(before_s, size_min))

    def _give_back(self, pairs: list[HostPair]) -> None:
        for pair in pairs:
            self._session.tell(messages.GiveBack(arena=pair.number, index=pair.index))
            pair.close()

    def close(self) -> None:
        """Unmap what is idle; the rest goes with the last slot that is given back. Under the lock."""
        for arena in (*self.arenas.values(), *self._retired):
            arena.close()
        self.arenas.clear()

    def leave_in_child(self) -> None:
        """Unmap everything in a forked child, where nobody is in the middle of a call."""
        for arena in (*self.arenas.values(), *self._retired):
            arena.leave_in_child()
