"""Shared memory as the simulation has it: slots whose words are plain attributes, seen by all at once."""

from __future__ import annotations

from dataclasses import dataclass

from luacell.broker.books import Pair
from luacell.broker.model import Call
from luacell.protocol.slots import Answer

POSITION_MASK = 0xFFFF


@dataclass(slots=True, eq=False)
class Slot:
    """One slot. `args` and `out` hold the number of the call whose bytes they stand for."""

    generation: int = 0
    withdrawn: int = 0
    args: int = 0
    begun: int = 0
    done: int = 0
    code: int = 0
    out_size: int = 0
    error_size: int = 0
    flags: int = 0
    cpu_us: int = 0
    out: int = 0


class Memory:
    """All slots that the broker holds; the dispatcher's SlotMemory."""

    def __init__(self) -> None:
        self.pairs: dict[Pair, list[Slot]] = {}

    def add(self, pair: Pair) -> list[Slot]:
        """Create the slots of a pair."""
        slots = self.pairs[pair] = [Slot() for _ in range(pair.shape.count)]
        return slots

    def drop(self, pair: Pair) -> None:
        """Close a pair: whoever maps it keeps it, the broker does not."""
        self.pairs.pop(pair, None)

    def slot_of(self, call: Call) -> Slot:
        """Return the slot of a call."""
        return self.pairs[call.pair][call.header.slot & POSITION_MASK]

    def look(self, call: Call) -> Answer:
        """Return what the worker has written into the call's slot."""
        slot = self.slot_of(call)
        return Answer(slot.begun, slot.done, slot.code, slot.out_size, slot.error_size, slot.flags, slot.cpu_us)

    def withdraw(self, call: Call) -> None:
        """Forbid the worker to begin the call."""
        self.slot_of(call).withdrawn = call.sequence
