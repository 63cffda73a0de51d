"""The path of a call on the host's side: slot, message, answer, value or exception, and the slot's way back.

This is the client's hot path. It takes checked arguments; names, timeouts and the state of the bridge are the
bridge's. A slot whose call nobody waits for any more stays out of use until the broker says that it is free.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from struct import Struct
from threading import get_ident
from typing import Final

from luacell.client.arena import GRACE_S, Arena, Slot
from luacell.client.interrupts import uninterrupted
from luacell.client.memory import LEASES_MAX, HostMemory, all_taken, is_busy, open_pair, too_late
from luacell.client.pending import Pending
from luacell.client.replies import value_size
from luacell.client.session import Session
from luacell.protocol import headers, messages
from luacell.protocol.errors import Unavailable
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, SLOT_FREE, Op
from luacell.protocol.limits import US_PER_S
from luacell.protocol.messages import Message

_pack: Final = Struct(f"<{headers.PREAMBLE_SIZE}s" + headers.CALL.format.removeprefix("<")).pack
_HEAD: Final = headers.head(Op.CALL)


class Calls:
    """Makes the calls of one session.

    Args:
        session: its connection.
        deadlines_us: of contracts, as last heard of; outlives the session.
    """

    def __init__(self, session: Session, deadlines_us: dict[int, int]) -> None:
        self.session = session
        self._memory = HostMemory(session.tell, deadlines_us)
        self._arenas = self._memory.arenas
        self._session = session
        self._ledger = session.ledger
        self._growing = threading.Lock()
        self._ids = count(1)
        session.drain = self._drain

    def call(
        self,
        contract_id: int,
        fn_id: int,
        args: bytes | memoryview | None,
        out: memoryview | None,
        out_size: int,
        timeout_us: int,
    ) -> bytes:
        """Make a call and wait for its answer.

        Args:
            contract_id: u64.
            fn_id: u32.
            args: at most PAYLOAD_MAX bytes, or None (NULL).
            out: where the result goes, or None to have it returned.
            out_size: bytes the function may write, at most PAYLOAD_MAX; 0 without `out` is NULL.
            timeout_us: microseconds; 0 is the contract's deadline, and the smaller of both holds.

        Raises:
            CallError: there is no value.
        """
        args_size = 0 if args is None else len(args)
        session = self._session
        with session.lock:
            home = self._arenas.get(contract_id)
            slot = home.take(args_size, out_size) if home is not None else None
        if slot is None:
            slot = self._take_new(contract_id, args_size, out_size, self._memory.limit_s(contract_id, timeout_us))
            home = slot.home
        assert home is not None
        budget_us, limit_s = home.deadline_us, home.limit_s
        if 0 < timeout_us < budget_us:
            budget_us, limit_s = timeout_us, timeout_us / US_PER_S + GRACE_S
        pending = Pending()
        pending.slot = slot
        call_id = pending.call_id = next(self._ids)
        try:
            slot.put_args(args, args_size)
            flags = (HAS_ARGS if args is not None else 0) | (HAS_OUT if out_size or out is not None else 0)
            message = _pack(
                _HEAD, call_id, contract_id, fn_id, budget_us, *slot.name, slot.generation, flags, args_size, out_size
            )
            session.call(pending, message, limit_s)
        except BaseException:
            self._give_up(pending)
            raise
        answer = pending.answer
        if type(answer) is tuple and out is None:
            _, code, size, _, free = answer
            if code == 0 and free == SLOT_FREE:
                result = slot.read(size)
                slot.give_back()
                if home.is_retired:
                    self._drain(home)
                return result
        try:
            size = value_size(slot, contract_id, fn_id, answer)
            if out is None:
                return slot.read(size)
            slot.copy_out(out)
            return b""
        finally:
            with session.lock:
                self._ledger.settle(pending)

    def post(self, contract_id: int, fn_id: int, args: bytes) -> bool:
        """Make a call whose answer nobody waits for: its slot comes back with what is read next.

        Args:
            contract_id: u64.
            fn_id: u32; it writes nothing.
            args: as many bytes as fit into a slot.

        Returns:
            False where no slot is free now. A contract of which nothing is left here is sent nothing.

        Raises:
            Unavailable: the broker is gone, or takes no messages.
        """
        with self._session.lock:
            home = self._arenas.get(contract_id)
            slot = home.take(len(args), 0) if home is not None else None
            if home is None:
                return True
            if slot is None:
                return False
            pending = Pending()
            pending.slot = slot
            pending.is_left = True
            call_id = pending.call_id = next(self._ids)
            slot.put_args(args, len(args))
            self._ledger.resting[call_id] = pending  # as a call that was given up
            message = _pack(
                _HEAD, call_id, contract_id, fn_id, home.deadline_us, *slot.name, slot.generation, HAS_ARGS,
                len(args), 0,
            )  # fmt: skip
            try:
                self._session.post(message)
            except Unavailable:
                self._ledger.resting.pop(call_id, None)
                self._ledger.free(pending)
                raise
        return True

    def _give_up(self, pending: Pending) -> None:
        with self._session.lock:
            self._session.give_up(pending)

    # -- memory ---------------------------------------------------------------------------------------------------
    def _take_new(self, contract_id: int, args_size: int, out_size: int, limit_s: float) -> Slot:
        """Take a slot where none was free or large enough, getting more memory from the broker.

        Raises:
            HostContractNotFound: there is no such contract.
            Busy: a bound on memory was hit.
            Unavailable: the broker is gone, or silent for `limit_s` seconds.
        """
        thread, until_s = get_ident(), time.monotonic() + limit_s
        for _ in range(LEASES_MAX):
            arena = uninterrupted(
                lambda: self._make_room(contract_id, args_size, out_size, thread, until_s),
                is_within=self._session.is_within(),
            )
            with self._session.lock:
                slot = arena.take(args_size, out_size)
            if slot is not None:
                return slot
        raise all_taken()

    def _make_room(self, contract_id: int, args_size: int, out_size: int, thread: int, until_s: float) -> Arena:
        """Return the arena of a contract, in which there was a slot for a moment."""
        if not self._growing.acquire(timeout=max(0.0, until_s - time.monotonic())):
            raise too_late()
        try:
            session, memory = self._session, self._memory
            with session.lock:
                arena = memory.arena_of(contract_id)
                lease = memory.plan(arena, args_size, out_size)
            if lease is not None:
                pending = self._ask(lease, thread, until_s)
                if is_busy(pending):
                    with session.lock:
                        memory.shrink()
                    pending = self._ask(lease, thread, until_s)
                self._take_in(arena, pending)
            return arena
        finally:
            self._growing.release()

    def _ask(self, lease: Callable[[int], Message], thread: int, until_s: float) -> Pending:
        try:
            return self._session.request(lease, max(0.0, until_s - time.monotonic()), thread)
        except Unavailable as error:
            error.began = "no"
            raise

    def _take_in(self, arena: Arena, pending: Pending) -> None:
        """Take into use what a lease was granted, or raise why it was not."""
        pair = open_pair(arena, pending)
        answer = pending.answer
        with self._session.lock:
            if pair is not None and isinstance(answer, messages.Segment):
                self._memory.add(arena, pair, answer.deadline_us)
            else:
                assert isinstance(answer, messages.Reply)
                self._memory.refused(arena, answer)

    def _drain(self, home: Arena) -> None:
        """The contract is gone: give back the memory of its last calls."""
        with self._session.lock, suppress(Unavailable):
            self._memory.give_back_drained(home)

    def forget(self, contract_id: int) -> None:
        """Give back the memory for a contract that is gone."""

        def forget() -> None:
            with self._session.lock, suppress(Unavailable):
                self._memory.forget(contract_id)

        uninterrupted(forget, is_within=self._session.is_within())

    # -- the end --------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Leave the broker and give all memory back; slots of calls that are just ending follow. Idempotent."""
        self._session.close()
        with self._session.lock:
            self._ledger.let_go()
            self._memory.close()

    def leave_in_child(self) -> None:
        """Let go, in a forked child, of what would hide the parent's death from the broker."""
        self._session.leave_in_child()
        self._memory.leave_in_child()
