"""A host's memory for one contract: pairs of segments and the slots in them.

It hands out slots and takes them back; it sends nothing. A slot is given back only when the broker has said that
nobody else can touch it. Methods that take from an arena run under the session's lock; giving back needs none.
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Final

from luacell.protocol.limits import ANSWER_GRACE_NS, MIB, NS_PER_S, US_PER_S
from luacell.protocol.memory.segments import Mapping
from luacell.protocol.messages import Segment
from luacell.protocol.slots import GENERATION_MASK, PAYLOAD_OFFSET, SLOT_SHIFT, WORD, SlotShape

GRACE_S: Final = ANSWER_GRACE_NS / NS_PER_S
SLOTS_FIRST: Final = 16
SLOTS_MAX: Final = 128
MIDDLE_PAYLOAD: Final = 16 * 1024  # bytes; beyond, a pair has few slots
LARGE_PAYLOAD: Final = 256 * 1024  # bytes; from here on it has one
COPY_UNLOCKED_MIN: Final = 256 * 1024  # bytes; from here on copies let other threads run
IDLE_PAIR_S: Final = 10.0
IDLE_PAIR_BYTES_MIN: Final = MIB  # smaller pairs are kept

_mark_of: Final = WORD.unpack_from
_stamp: Final = WORD.pack_into  # write_generation without its frame: this is the hot path


class Arena:
    """All pairs of one contract.

    Attributes:
        deadline_us: the contract's default deadline, as told with the last grant.
        limit_s: seconds after which its answer is overdue.
        is_closed: pairs are unmapped as soon as they are idle.
        is_retired: pairs are given back as soon as they are idle: its contract is gone.
    """

    def __init__(self, contract_id: int) -> None:
        self.contract_id = contract_id
        self.deadline_us = 0
        self.limit_s = 0.0
        self.pairs: list[HostPair] = []
        self.is_closed = False
        self.is_retired = False
        self.drained: list[HostPair] = []  # after `retire`: to be given back, now that their last slot is free

    def take(self, args_size: int, out_size: int) -> Slot | None:
        """Return a free slot that is large enough, or None."""
        for pair in self.pairs:
            if pair.free and args_size <= pair.args_capacity and out_size <= pair.out_capacity:
                if pair.is_large:
                    pair.used_s = time.monotonic()
                return pair.free.pop()
        return None

    def has_room(self, args_size: int, out_size: int) -> bool:
        """Whether a slot is free that is large enough."""
        return any(p.free and args_size <= p.args_capacity and out_size <= p.out_capacity for p in self.pairs)

    def add(self, pair: HostPair, deadline_us: int) -> None:
        """Add a pair; small ones are tried first."""
        self.deadline_us = deadline_us
        self.limit_s = deadline_us / US_PER_S + GRACE_S
        self.pairs.append(pair)
        self.pairs.sort(key=lambda each: (each.args_capacity + each.out_capacity, -each.shape.count))

    def remove_idle(self, before_s: float, size_min: int) -> list[HostPair]:
        """Remove and return idle pairs of at least `size_min` bytes that were last used before `before_s`."""
        idle = [
            pair
            for pair in self.pairs
            if pair.is_idle and pair.used_s <= before_s and pair.shape.total_bytes >= size_min
        ]
        for pair in idle:
            self.pairs.remove(pair)
        return idle

    def slots_wanted(self, args_size: int, out_size: int) -> int:
        """Return how many slots to ask for: more when many are in use, few when they are large."""
        size = max(args_size, out_size)
        if size >= LARGE_PAYLOAD:
            return 1
        if size > MIDDLE_PAYLOAD:
            return 4
        fitting = [p for p in self.pairs if args_size <= p.args_capacity and out_size <= p.out_capacity]
        return min(max(SLOTS_FIRST, 2 * max((p.shape.count for p in fitting), default=0)), SLOTS_MAX)

    def close(self) -> None:
        """Unmap what is idle now; the rest when its last slot is given back."""
        self.is_closed = True
        for pair in self.pairs:
            if pair.is_idle:
                pair.close()
        self.pairs.clear()

    def retire(self) -> list[HostPair]:
        """Return the idle pairs of a contract that is gone; the others will come to `drained`."""
        self.is_retired = True
        return self.remove_idle(time.monotonic(), size_min=0)

    def leave_in_child(self) -> None:
        """Unmap everything in a forked child, where nobody is in the middle of a call."""
        for pair in self.pairs:
            pair.close()
        self.pairs.clear()


class HostPair:
    """A pair of segments as its host sees it; made from the broker's grant.

    Args:
        home: the arena it will belong to.
        segment: the grant.
        args_fd: descriptor of args; stays the caller's.
        out_fd: descriptor of out; stays the caller's.

    Raises:
        OSError: it cannot be mapped.
    """

    def __init__(self, home: Arena, segment: Segment, args_fd: int, out_fd: int) -> None:
        shape = SlotShape(segment.count, segment.args_stride, segment.out_stride)
        self.home = home
        self.number = segment.arena
        self.index = segment.index
        self.shape = shape
        self.args_capacity = shape.args_capacity
        self.out_capacity = shape.out_capacity
        self.is_large = shape.total_bytes >= IDLE_PAIR_BYTES_MIN
        self.args = Mapping(args_fd, shape.args_bytes, writable=True)
        try:
            self.out = Mapping(out_fd, shape.out_bytes, writable=False)
        except OSError:
            self.args.close()
            raise
        self.is_closed = False
        self._closing = threading.Lock()
        self.free = [Slot(self, position) for position in reversed(range(shape.count))]
        self.used_s = 0.0  # monotonic, of the last use; kept for large pairs only

    @property
    def is_idle(self) -> bool:
        """Whether no slot is in use."""
        return len(self.free) == self.shape.count

    def close(self) -> None:
        """Unmap; nobody holds a slot. Idempotent: two threads may give back the last ones at once."""
        with self._closing:
            self.is_closed = True
            self.free.clear()
            self.args.close()
            self.out.close()


class Slot:
    """One slot, leased to at most one call at a time.

    Where an interrupt makes its call forget it, it comes back by itself.

    Attributes:
        home: the arena it belongs to.
        name: arena and slot number, as messages give them.
        generation: of its next call.
    """

    __slots__ = (
        "_args_stamp",
        "_args_start",
        "_args_view",
        "_begun",
        "_out_start",
        "_out_view",
        "_pair",
        "_position",
        "generation",
        "home",
        "name",
    )

    def __init__(self, pair: HostPair, position: int) -> None:
        self.home = pair.home
        self.name = pair.number, pair.index << SLOT_SHIFT | position
        self.generation = 1
        self._begun: tuple[int, ...] = ()  # what the worker's mark said before this call
        self._pair = pair
        self._position = position
        self._args_view = pair.args.view
        self._out_view = pair.out.view
        self._args_stamp = position * pair.shape.args_stride
        self._args_start = self._args_stamp + PAYLOAD_OFFSET
        self._out_start = position * pair.shape.out_stride + PAYLOAD_OFFSET

    def __del__(self) -> None:
        pair = self._pair
        if not pair.is_closed:  # else its end is this slot's; and a call in flight would hold the slot
            successor = Slot(pair, self._position)
            successor.generation = self.generation
            successor.give_back()

    def put_args(self, args: bytes | memoryview | None, size: int) -> None:
        """Copy the arguments in, which have `size` bytes and fit, and stamp the slot."""
        start, view = self._args_start, self._args_view
        self._begun = _mark_of(self._out_view, self._out_start - PAYLOAD_OFFSET)
        _stamp(view, self._args_stamp, self.generation)
        if not args:
            return
        if size < COPY_UNLOCKED_MIN or not isinstance(args, bytes):
            view[start : start + size] = args
        else:
            ctypes.memmove(self._pair.args.address + start, args, size)

    @property
    def has_begun(self) -> bool:
        """Whether a worker has marked this call as begun; the mark may be a lie of its contract, and may yet come."""
        mark = _mark_of(self._out_view, self._out_start - PAYLOAD_OFFSET)
        return mark not in (self._begun, (0,))

    def read(self, size: int) -> bytes:
        """Return a copy of the first bytes of the results."""
        start = self._out_start
        if size < COPY_UNLOCKED_MIN:
            return self._out_view[start : start + size].tobytes()
        result = bytes(size)  # nobody else has it yet, so it may still be filled
        ctypes.memmove(ctypes.c_char_p(result), self._pair.out.address + start, size)
        return result

    def copy_out(self, target: memoryview) -> None:
        """Copy results into a writable buffer, as many bytes as it holds."""
        size = target.nbytes
        if size >= COPY_UNLOCKED_MIN:
            source = self._pair.out.address + self._out_start
            ctypes.memmove((ctypes.c_char * size).from_buffer(target), source, size)
        else:
            target[:] = self._out_view[self._out_start : self._out_start + size]

    def give_back(self) -> None:
        """Let another call have the slot."""
        self.generation = self.generation + 1 & GENERATION_MASK
        pair, home = self._pair, self.home
        pair.free.append(self)
        if home.is_closed and pair.is_idle:
            pair.close()
        elif home.is_retired and pair.is_idle:
            home.drained.append(pair)
