"""The broker's side of shared memory: the descriptors and mappings behind the pairs in the books.

It creates, maps, seals and closes what the books decided on, and reads what workers left in slots. Creation may run in
another thread (`create`); everything else belongs to the loop.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from luacell.broker.books import Pair
from luacell.broker.model import Call
from luacell.protocol.memory.segments import (
    ARGS_SEALS,
    OUT_SEALS,
    SIZE_SEALS,
    Mapping,
    add_seals,
    create_segment,
    seals_of,
)
from luacell.protocol.slots import PAYLOAD_OFFSET, SLOT_SHIFT, Answer, SlotShape, read_answer, write_withdrawn

_POSITION_MASK = (1 << SLOT_SHIFT) - 1


def create_descriptors(shape: SlotShape) -> tuple[int, int]:
    """Create the memfds of a pair with all their pages; takes 0.3 ms per MiB.

    Returns:
        Descriptors of args and out, owned by the caller.

    Raises:
        OSError: no memory or no descriptor.
    """
    args_fd = create_segment("luacell-args", shape.args_bytes, SIZE_SEALS)
    try:
        return args_fd, create_segment("luacell-out", shape.out_bytes, OUT_SEALS)
    except OSError:
        os.close(args_fd)
        raise


@dataclass(slots=True, eq=False)
class StoredPair:
    """A pair as the broker holds it; descriptors stay open so that workers can be given them later."""

    args_fd: int
    out_fd: int
    args: Mapping
    out: Mapping

    def close(self) -> None:
        """Unmap and close."""
        self.args.close()
        self.out.close()
        os.close(self.args_fd)
        os.close(self.out_fd)


class SegmentStore:
    """All pairs that exist; also the dispatcher's SlotMemory."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int], StoredPair] = {}
        self._fence = threading.Lock()

    def __len__(self) -> int:
        return len(self._pairs)

    def add(self, pair: Pair, args_fd: int, out_fd: int) -> StoredPair:
        """Take over the descriptors of a pair and map it.

        Raises:
            OSError: it cannot be mapped; the descriptors are closed.
        """
        shape = pair.shape
        args: Mapping | None = None
        try:
            args = Mapping(args_fd, shape.args_bytes, writable=True, populate=False)
            out = Mapping(out_fd, shape.out_bytes, writable=False, populate=False)
        except OSError:
            if args is not None:
                args.close()
            os.close(args_fd)
            os.close(out_fd)
            raise
        stored = self._pairs[pair.key] = StoredPair(args_fd, out_fd, args, out)
        return stored

    def get(self, pair: Pair) -> StoredPair:
        """Return what stands behind a pair of the books."""
        return self._pairs[pair.key]

    def seal(self, pair: Pair) -> None:
        """Close args against new writable mappings, now that its host has its own.

        Raises:
            OSError: the kernel refused, or the seals are not what they must be.
        """
        fd = self._pairs[pair.key].args_fd
        add_seals(fd, ARGS_SEALS)
        if seals_of(fd) & ARGS_SEALS != ARGS_SEALS:
            raise OSError(f"args of pair {pair.key} has seals {seals_of(fd):#x}, not {ARGS_SEALS:#x}")

    def drop(self, pair: Pair) -> None:
        """Unmap and close a pair."""
        stored = self._pairs.pop(pair.key, None)
        if stored is not None:
            stored.close()

    def close(self) -> None:
        """Unmap and close everything."""
        for stored in self._pairs.values():
            stored.close()
        self._pairs.clear()

    # -- SlotMemory -----------------------------------------------------------------------------------------------
    def look(self, call: Call) -> Answer:
        """Return what the worker has written into the call's slot."""
        stored = self._pairs[call.pair.key]
        return read_answer(stored.out.view, (call.header.slot & _POSITION_MASK) * call.pair.shape.out_stride)

    def withdraw(self, call: Call) -> None:
        """Forbid the worker to begin the call.

        The worker writes `begun` and then reads `withdrawn`; we write `withdrawn` and then read `begun`. With a full
        barrier between the two on both sides, at least one side sees the other.
        """
        stored = self._pairs[call.pair.key]
        offset = (call.header.slot & _POSITION_MASK) * call.pair.shape.args_stride
        write_withdrawn(stored.args.view, offset, call.sequence)
        with self._fence:  # a locked instruction: the barrier
            pass

    def read_args(self, call: Call, size: int) -> bytes:
        """Return a copy of the first bytes of a call's arguments, as its host left them.

        Args:
            call: its slot is not free.
            size: bytes, at most as many as it has.
        """
        stored = self._pairs[call.pair.key]
        start = (call.header.slot & _POSITION_MASK) * call.pair.shape.args_stride + PAYLOAD_OFFSET
        return bytes(stored.args.view[start : start + size])
