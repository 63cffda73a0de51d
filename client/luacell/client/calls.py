"""The path of a call on the host's side: slot, message, answer, value or exception, and the slot's way back.

This is the client's hot path. It takes checked arguments; names, timeouts and the state of the bridge are the
bridge's. A slot whose call nobody waits for any more stays out of use until the broker says that it is free.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from struct import Struct
from typing import Final

from luacell.client.arena import GRACE_S, Arena, Slot
from luacell.client.memory import HostMemory
from luacell.client.pending import Answer, Pending, keeps_slot
from luacell.client.replies import raise_for, raise_from_slot
from luacell.client.session import Session
from luacell.protocol import headers, messages
from luacell.protocol.errors import Unavailable
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, SLOT_FREE, Op
from luacell.protocol.limits import US_PER_S

_pack: Final = Struct(f"<{headers.PREAMBLE_SIZE}s" + headers.CALL.format.removeprefix("<")).pack
_HEAD: Final = headers.head(Op.CALL)


class Calls:
    """Makes the calls of one session."""

    def __init__(self, session: Session) -> None:
        self.memory = HostMemory(session)
        self._arenas = self.memory.arenas
        self._session = session
        self._resting: dict[int, Pending] = {}  # calls that were answered or given up before their slot is free
        self._ids = count(1)
        session.on_kept = self._on_kept
        session.on_stray = self._on_stray

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
            slot = self.memory.take_new(contract_id, args_size, out_size)
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
            return _value(slot, contract_id, fn_id, answer, out)
        finally:
            with session.lock:
                self._settle(pending)

    def _settle(self, pending: Pending) -> None:
        """Let go of the slot of an answered call; where it is kept, RELEASED gives it back. Under the lock."""
        pending.is_left = True
        if pending.is_released or not keeps_slot(pending.answer) or not self._session.is_open:
            self._free(pending)

    def _free(self, pending: Pending) -> None:
        """Give back the slot of a call, once. Under the lock."""
        slot, pending.slot = pending.slot, None
        if slot is not None:
            slot.give_back()
            if slot.home.is_retired:
                self._drain(slot.home)

    def _drain(self, home: Arena) -> None:
        """The contract is gone: give back the memory of its last calls."""
        with self._session.lock, suppress(Unavailable):
            self.memory.give_back_drained(home)

    def _give_up(self, pending: Pending) -> None:
        """Nobody waits any more: cancel the call; its slot rests until nobody can touch it."""
        with self._session.lock:
            pending.is_left = True
            self._session.leave(pending)
            if not pending.is_sent:
                self._free(pending)
            elif pending.answer is not None or not self._session.is_open:
                self._settle(pending)
            else:
                self._resting[pending.call_id] = pending
                self._session.abandon_call(pending.call_id)

    def _on_kept(self, pending: Pending) -> None:
        """The answer of a call does not free its slot. Under the lock."""
        self._resting[pending.call_id] = pending

    def _on_stray(self, call_id: int, answer: Answer | None) -> None:
        """An answer that nobody waits for, or RELEASED. Under the lock; twice is no harm."""
        pending = self._resting.get(call_id)
        if pending is None or (answer is not None and keeps_slot(answer)):
            return
        pending.is_released = True
        if pending.is_left:
            self._free(pending)
        self._resting.pop(call_id, None)

    def close(self) -> None:
        """Give all memory back; slots of calls that are just ending follow. Under the lock."""
        for pending in self._resting.values():
            if pending.is_left:
                self._free(pending)
        self._resting.clear()
        self.memory.close()


def _value(slot: Slot, contract_id: int, fn_id: int, answer: object, out: memoryview | None) -> bytes:
    """Turn an answer into a value.

    Raises:
        CallError: it is none.
    """
    if isinstance(answer, messages.Failure):
        raise_for(answer, contract_id, fn_id)
    assert isinstance(answer, tuple)
    _, code, out_size, error_size, _ = answer
    if code != 0:
        raise_from_slot(code, slot.read(error_size))
    if out is None:
        return slot.read(out_size)
    slot.copy_out(out)
    return b""
