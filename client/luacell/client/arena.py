"""A host's memory for one contract: pairs of segments and the slots in them.

It hands out slots and takes them back; it sends nothing. A slot is given back only when the broker has said that
nobody else can touch it. All methods are called under the session's lock.
"""

from __future__ import annotations

import ctypes
from typing import Final

from luacell.protocol.limits import MIB
from luacell.protocol.memory.segments import Mapping
from luacell.protocol.messages import Segment
from luacell.protocol.slots import PAYLOAD_OFFSET, SLOT_SHIFT, SlotShape, write_generation

SLOTS_FIRST: Final = 16
SLOTS_MAX: Final = 128
LARGE_PAYLOAD: Final = 256 * 1024  # bytes; from here on a pair has few slots
COPY_UNLOCKED_MIN: Final = 256 * 1024  # bytes; from here on copies let other threads run
IDLE_PAIR_S: Final = 10.0
IDLE_PAIR_BYTES_MIN: Final = MIB  # smaller pairs are kept


class HostPair:
    """A pair of segments as its host sees it; made from the broker's grant.

    Raises:
        OSError: it cannot be mapped.
    """

    def __init__(self, segment: Segment, args_fd: int, out_fd: int) -> None:
        shape = SlotShape(segment.count, segment.args_stride, segment.out_stride)
        self.arena = segment.arena
        self.index = segment.index
        self.shape = shape
        self.args = Mapping(args_fd, shape.args_bytes, writable=True)
        try:
            self.out = Mapping(out_fd, shape.out_bytes, writable=False)
        except OSError:
            self.args.close()
            raise
        self.free = [Slot(self, position) for position in reversed(range(shape.count))]
        self.used_s = 0.0  # monotonic, of the last use

    @property
    def is_idle(self) -> bool:
        """Whether no slot is in use."""
        return len(self.free) == self.shape.count

    def close(self) -> None:
        """Unmap; nobody holds a slot."""
        self.args.close()
        self.out.close()


class Slot:
    """One slot, leased to at most one call at a time."""

    __slots__ = ("args_offset", "generation", "number", "out_offset", "pair")

    def __init__(self, pair: HostPair, position: int) -> None:
        self.pair = pair
        self.number = pair.index << SLOT_SHIFT | position
        self.generation = 1
        self.args_offset = position * pair.shape.args_stride
        self.out_offset = position * pair.shape.out_stride

    def put_args(self, args: memoryview) -> None:
        """Copy the arguments in and stamp the slot."""
        view = self.pair.args.view
        write_generation(view, self.args_offset, self.generation)
        size = args.nbytes
        if not size:
            return
        start = self.args_offset + PAYLOAD_OFFSET
        if size >= COPY_UNLOCKED_MIN and isinstance(args.obj, bytes) and len(args.obj) == size:
            ctypes.memmove(self.pair.args.address + start, args.obj, size)
        else:
            view[start : start + size] = args

    def read(self, size: int) -> memoryview:
        """Return a view of the first bytes of the results; it must not outlive the slot's lease."""
        start = self.out_offset + PAYLOAD_OFFSET
        return self.pair.out.view[start : start + size]

    def copy_out(self, target: memoryview) -> None:
        """Copy results into a writable buffer, as many bytes as it holds."""
        size = target.nbytes
        if size >= COPY_UNLOCKED_MIN:
            source = self.pair.out.address + self.out_offset + PAYLOAD_OFFSET
            ctypes.memmove((ctypes.c_char * size).from_buffer(target), source, size)
        else:
            target[:] = self.read(size)


class Arena:
    """All pairs of one contract.

    Attributes:
        id: the broker's number for it, 0 before the first grant.
        deadline_us: the contract's default deadline, as told with the last grant.
    """

    def __init__(self, contract_id: int) -> None:
        self.contract_id = contract_id
        self.deadline_us = 0
        self.pairs: list[HostPair] = []

    def take(self, args_size: int, out_size: int, now_s: float) -> Slot | None:
        """Return a free slot that is large enough, or None."""
        for pair in self.pairs:
            shape = pair.shape
            if pair.free and args_size <= shape.args_capacity and out_size <= shape.out_capacity:
                pair.used_s = now_s
                return pair.free.pop()
        return None

    def give_back(self, slot: Slot, *, used: bool) -> None:
        """Take a slot back that nobody else can touch; its generation moves on if a call was accepted with it."""
        if used:
            slot.generation = (slot.generation + 1) & 0xFFFFFFFF
        slot.pair.free.append(slot)

    def add(self, pair: HostPair) -> None:
        """Add a pair; small ones are tried first."""
        self.pairs.append(pair)
        self.pairs.sort(key=lambda each: (each.shape.args_stride + each.shape.out_stride, -each.shape.count))

    def remove_idle(self, before_s: float, size_min: int) -> list[HostPair]:
        """Remove and return idle pairs of at least `size_min` bytes that were last used before `before_s`."""
        idle = [
            pair for pair in self.pairs if pair.is_idle and pair.used_s <= before_s and pair.shape.total_bytes >= size_min
        ]
        for pair in idle:
            self.pairs.remove(pair)
        return idle

    def slots_wanted(self, args_size: int, out_size: int) -> int:
        """Return how many slots to ask for: more when many are in use, few when they are large."""
        size = max(args_size, out_size)
        if size >= LARGE_PAYLOAD:
            return 1
        fitting = [p for p in self.pairs if args_size <= p.shape.args_capacity and out_size <= p.shape.out_capacity]
        if size > 16 * 1024:
            return 4
        return min(max(SLOTS_FIRST, 2 * max((p.shape.count for p in fitting), default=0)), SLOTS_MAX)

    def close(self) -> None:
        """Unmap everything."""
        for pair in self.pairs:
            pair.close()
        self.pairs.clear()
