"""The path of a call in an event loop: as `calls`, with tasks in place of threads.

A slot whose task was cancelled stays out of use until the broker says that it is free.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Final

from luacell.client.arena import GRACE_S, Arena, Slot
from luacell.client.async_session import AsyncSession, Awaited
from luacell.client.memory import LEASES_MAX, HostMemory, all_taken, is_busy, open_pair, too_late
from luacell.client.pending import Pending
from luacell.client.replies import value_size
from luacell.client.threads import done_in_thread, uncancelled
from luacell.protocol import headers, messages
from luacell.protocol.errors import Unavailable
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, SLOT_FREE
from luacell.protocol.limits import MIB, US_PER_S
from luacell.protocol.messages import Message

COPY_IN_THREAD_MIN: Final = MIB  # bytes; a copy of this size takes as long as a few calls

_pack: Final = headers.CALL.pack


class AsyncCalls:
    """Makes the calls of one session.

    Args:
        session: its connection.
        deadlines_us: of contracts, as last heard of; outlives the session.
    """

    def __init__(self, session: AsyncSession, deadlines_us: dict[int, int]) -> None:
        self.session = session
        self._memory = HostMemory(session.tell, deadlines_us)
        self._arenas = self._memory.arenas
        self._ledger = session.ledger
        self._growing = asyncio.Lock()
        self._ids = count(1)
        session.drain = self._drain

    async def call(
        self,
        contract_id: int,
        fn_id: int,
        args: bytes | memoryview | None,
        out: memoryview | None,
        out_size: int,
        timeout_us: int,
    ) -> bytes:
        """Make a call and wait for its answer; arguments and errors are those of `Calls.call`.

        Raises:
            CallError: there is no value.
        """
        args_size = 0 if args is None else len(args)
        home = self._arenas.get(contract_id)
        slot = home.take(args_size, out_size) if home is not None else None
        if slot is None:
            slot = await self._take_new(contract_id, args_size, out_size, self._memory.limit_s(contract_id, timeout_us))
        home = slot.home
        budget_us, limit_s = home.deadline_us, home.limit_s
        if 0 < timeout_us < budget_us:
            budget_us, limit_s = timeout_us, timeout_us / US_PER_S + GRACE_S
        session = self.session
        pending = Awaited(session.loop)
        pending.slot = slot
        call_id = pending.call_id = next(self._ids)
        try:
            if args_size < COPY_IN_THREAD_MIN:
                slot.put_args(args, args_size)
            else:
                await done_in_thread(lambda: slot.put_args(args, args_size))
            flags = (HAS_ARGS if args is not None else 0) | (HAS_OUT if out_size or out is not None else 0)
            session.put(
                pending,
                _pack(call_id, contract_id, fn_id, budget_us, *slot.name, slot.generation, flags, args_size, out_size),
            )
            await session.wait(pending, limit_s, "an answer by its deadline")
        except BaseException:
            session.give_up(pending)
            raise
        answer = pending.answer
        if type(answer) is tuple and out is None:
            _, code, size, _, free = answer
            if code == 0 and free == SLOT_FREE and size < COPY_IN_THREAD_MIN:
                result = slot.read(size)
                slot.give_back()
                if home.is_retired:
                    self._drain(home)
                return result
        try:
            return await _value(slot, value_size(slot, contract_id, fn_id, answer), out)
        finally:
            self._ledger.settle(pending)

    # -- memory ---------------------------------------------------------------------------------------------------
    async def _take_new(self, contract_id: int, args_size: int, out_size: int, limit_s: float) -> Slot:
        """Take a slot where none was free or large enough, getting more memory from the broker.

        Raises:
            HostContractNotFound: there is no such contract.
            Busy: a bound on memory was hit.
            Unavailable: the broker is gone, or silent for `limit_s` seconds.
        """
        until_s = time.monotonic() + limit_s
        for _ in range(LEASES_MAX):
            arena = await uncancelled(self._make_room(contract_id, args_size, out_size, until_s))
            slot = arena.take(args_size, out_size)
            if slot is not None:
                return slot
        raise all_taken()

    async def _make_room(self, contract_id: int, args_size: int, out_size: int, until_s: float) -> Arena:
        """Return the arena of a contract, in which there was a slot for a moment."""
        try:
            async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                await self._growing.acquire()
        except TimeoutError:
            raise too_late() from None
        try:
            arena = self._memory.arena_of(contract_id)
            lease = self._memory.plan(arena, args_size, out_size)
            if lease is not None:
                pending = await self._ask(lease, until_s)
                if is_busy(pending):
                    self._memory.shrink()
                    pending = await self._ask(lease, until_s)
                await self._take_in(arena, pending)
            return arena
        finally:
            self._growing.release()

    async def _ask(self, lease: Callable[[int], Message], until_s: float) -> Pending:
        try:
            return await self.session.request(lease, max(0.0, until_s - time.monotonic()))
        except Unavailable as error:
            error.began = "no"
            raise

    async def _take_in(self, arena: Arena, pending: Pending) -> None:
        """Take into use what a lease was granted, or raise why it was not."""
        answer = pending.answer
        if isinstance(answer, messages.Reply):
            self._memory.refused(arena, answer)
        assert isinstance(answer, messages.Segment)
        if answer.count * max(answer.args_stride, answer.out_stride) < COPY_IN_THREAD_MIN:
            pair = open_pair(arena, pending)
        else:
            pair = await done_in_thread(lambda: open_pair(arena, pending))
        assert pair is not None
        self._memory.add(arena, pair, answer.deadline_us)

    def _drain(self, home: Arena) -> None:
        """The contract is gone: give back the memory of its last calls."""
        with suppress(Unavailable):
            self._memory.give_back_drained(home)

    def forget(self, contract_id: int) -> None:
        """Give back the memory for a contract that is gone."""
        with suppress(Unavailable):
            self._memory.forget(contract_id)

    # -- the end --------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Leave the broker and give all memory back; slots of calls that are just ending follow. Idempotent."""
        self.session.close()
        self._ledger.let_go()
        self._memory.close()

    def leave_in_child(self) -> None:
        """Let go, in a forked child, of what would hide the parent's death from the broker."""
        self.session.leave_in_child()
        self._memory.leave_in_child()


async def _value(slot: Slot, size: int, out: memoryview | None) -> bytes:
    """Return the result, or copy it out; large ones in a thread."""
    if out is None:
        return slot.read(size) if size < COPY_IN_THREAD_MIN else await done_in_thread(lambda: slot.read(size))
    if out.nbytes < COPY_IN_THREAD_MIN:
        slot.copy_out(out)
    else:
        await done_in_thread(lambda: slot.copy_out(out))
    return b""
