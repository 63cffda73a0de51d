"""The host's arenas: where slots come from, and how memory is got from the broker and given back.

It plans what to ask for and keeps what was granted; asking and waiting are its callers'. Everything runs under the
session's lock but `open_pair`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final, NoReturn

from luacell.client.arena import GRACE_S, IDLE_PAIR_BYTES_MIN, IDLE_PAIR_S, Arena, HostPair
from luacell.client.pending import Pending
from luacell.client.replies import raise_not_found
from luacell.protocol import messages
from luacell.protocol.errors import AbiErrorCode, Busy, Unavailable, call_error_class
from luacell.protocol.limits import DEADLINE_DEFAULT_US, US_PER_S
from luacell.protocol.messages import Message, id_bytes

LEASES_MAX: Final = 8  # attempts to get a slot that other callers take first


class HostMemory:
    """All arenas of one session.

    Args:
        tell: sends a message that has no answer; raises Unavailable where the broker is gone.
        deadlines_us: what contracts' deadlines were when last heard of; outlives the session.

    Attributes:
        arenas: by contract id.
    """

    def __init__(self, tell: Callable[[Message], None], deadlines_us: dict[int, int]) -> None:
        self._tell = tell
        self._deadlines_us = deadlines_us
        self.arenas: dict[int, Arena] = {}
        self._retired: list[Arena] = []  # those whose last slots are in use

    def arena_of(self, contract_id: int) -> Arena:
        """Return the arena of a contract; a new one has nothing in it."""
        return self.arenas.setdefault(contract_id, Arena(contract_id))

    def limit_s(self, contract_id: int, timeout_us: int) -> float:
        """Return how many seconds a call of a contract may take as far as is known, grace included."""
        deadline_us = self._deadlines_us.get(contract_id, DEADLINE_DEFAULT_US)
        return min(timeout_us or deadline_us, deadline_us) / US_PER_S + GRACE_S

    # -- getting more ---------------------------------------------------------------------------------------------
    def plan(self, arena: Arena, args_size: int, out_size: int) -> Callable[[int], Message] | None:
        """Return what to ask the broker for, or None where a slot has become free meanwhile.

        Idle pairs are given back first, all of them by `shrink` when the budget turns out to be used up.
        """
        if arena.has_room(args_size, out_size):
            return None
        self._give_back_idle(before_s=time.monotonic() - IDLE_PAIR_S, size_min=IDLE_PAIR_BYTES_MIN)
        count = arena.slots_wanted(args_size, out_size)
        return lambda number: messages.Lease(
            request_id=number,
            contract=id_bytes(arena.contract_id),
            args_size=args_size,
            out_size=out_size,
            count=count,
        )

    def shrink(self) -> None:
        """Give back every pair that is idle."""
        self._give_back_idle(before_s=time.monotonic(), size_min=0)

    def add(self, arena: Arena, pair: HostPair, deadline_us: int) -> None:
        """Take a pair into use, and tell the broker.

        Raises:
            Unavailable: the broker is gone; the pair is unmapped.
        """
        try:
            self._tell(messages.Mapped(arena=pair.number, index=pair.index))
        except BaseException:
            pair.close()
            raise
        arena.add(pair, deadline_us)
        self._deadlines_us[arena.contract_id] = deadline_us

    def refused(self, arena: Arena, reply: messages.Reply) -> NoReturn:
        """Raise why there is no more memory.

        Raises:
            HostContractNotFound: there is no such contract.
            Busy: a bound on memory was hit.
        """
        if not arena.pairs and self.arenas.get(arena.contract_id) is arena:
            del self.arenas[arena.contract_id]
        if reply.code == AbiErrorCode.HOST_CONTRACT_NOT_FOUND:
            raise_not_found(arena.contract_id)
        code = AbiErrorCode(reply.code)
        raise call_error_class(code)(reply.reason, code=code, began="no", limit=reply.reason)

    # -- giving back ----------------------------------------------------------------------------------------------
    def forget(self, contract_id: int) -> None:
        """Give back what a contract that is gone has left; what comes in its place may have another deadline."""
        self._deadlines_us.pop(contract_id, None)
        arena = self.arenas.pop(contract_id, None)
        if arena is not None:
            idle = arena.retire()
            self._retired = [each for each in (*self._retired, arena) if each.pairs]
            self._give_back(idle)

    def give_back_drained(self, arena: Arena) -> None:
        """Give back what a retired arena had still in use."""
        drained = [pair for pair in arena.drained if pair in arena.pairs]  # the rest went with the session
        arena.drained = []
        for pair in drained:
            arena.pairs.remove(pair)
        self._give_back(drained)

    def _give_back_idle(self, before_s: float, size_min: int) -> None:
        for arena in self.arenas.values():
            self._give_back(arena.remove_idle(before_s, size_min))

    def _give_back(self, pairs: list[HostPair]) -> None:
        for pair in pairs:
            pair.close()
        for pair in pairs:
            self._tell(messages.GiveBack(arena=pair.number, index=pair.index))

    # -- the end --------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Unmap what is idle; the rest goes with the last slot that is given back."""
        for arena in (*self.arenas.values(), *self._retired):
            arena.close()
        self.arenas.clear()

    def leave_in_child(self) -> None:
        """Unmap everything in a forked child, where nobody is in the middle of a call."""
        for arena in (*self.arenas.values(), *self._retired):
            arena.leave_in_child()


def is_busy(pending: Pending) -> bool:
    """Whether a lease was refused for want of memory, so that giving some back may help."""
    return isinstance(pending.answer, messages.Reply) and pending.answer.code == AbiErrorCode.BUSY


def open_pair(arena: Arena, pending: Pending) -> HostPair | None:
    """Map what a lease was granted and close its descriptors; None where it was refused. Takes time; needs no lock.

    Raises:
        OSError: it cannot be mapped.
    """
    if not isinstance(pending.answer, messages.Segment):
        return None
    try:
        return HostPair(arena, pending.answer, *pending.descriptors)
    finally:
        for descriptor in pending.descriptors:
            os.close(descriptor)


def all_taken() -> Busy:
    """Return the error for a caller whom others were faster than, each time."""
    return Busy("every slot is taken by other callers; retry later", began="no", limit="slots")


def too_late() -> Unavailable:
    """Return the error for a caller whose time ended while others were getting memory."""
    return Unavailable("the broker does not grant memory in time", began="no")
