"""The books of shared memory: who owns which arena, which slots are in flight, and what it all adds up to.

It decides whether a call's handle is good and whether memory may be granted; it creates, maps and frees
nothing. Everything that hosts say about memory is checked against these books, never against memory itself.

A pair of segments lives so:

    planned ──created──> granted ──mapped──> usable ──given back, host left──> retired ──slots free──> gone
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.headers import Call
from luacell.protocol.limits import HOST_MEMORY_MAX, SEGMENTS_PER_ARENA_MAX, TOTAL_MEMORY_MAX
from luacell.protocol.slots import SLOT_SHIFT, SlotShape

_POSITION_MASK = (1 << SLOT_SHIFT) - 1


class Refusal(NamedTuple):
    """Why something is not done: a code, a text for people, and the bound where one was hit."""

    code: AbiErrorCode
    message: str
    limit: str = ""


class PairState(Enum):
    """Where a pair of segments stands in its life."""

    PLANNED = "planned"
    GRANTED = "granted"
    USABLE = "usable"
    RETIRED = "retired"


_USABLE = PairState.USABLE  # looking a member up in its enum costs a quarter of a microsecond
_RETIRED = PairState.RETIRED


@dataclass(slots=True, eq=False)
class Pair:
    """A pair of segments (args, out) and the state of its slots."""

    arena: Arena
    index: int
    shape: SlotShape
    state: PairState = PairState.PLANNED
    generations: list[int] = field(default_factory=list)  # of the next call, per slot
    taken: set[int] = field(default_factory=set)  # positions in flight
    count: int = 0
    args_capacity: int = 0
    out_capacity: int = 0

    def __post_init__(self) -> None:
        self.count = self.shape.count
        self.args_capacity = self.shape.args_capacity
        self.out_capacity = self.shape.out_capacity
        self.generations = [1] * self.count

    @property
    def key(self) -> tuple[int, int]:
        """Arena id and pair index: the name of the pair in this broker's life."""
        return self.arena.id, self.index


@dataclass(slots=True, eq=False)
class Arena:
    """One host's memory for one contract."""

    id: int
    session: bytes
    contract_id: int
    pairs: dict[int, Pair] = field(default_factory=dict)
    next_index: int = 0


class Books:
    """All arenas of one broker.

    Args:
        host_memory_max: bytes one host may hold.
        total_memory_max: bytes all hosts may hold.
    """

    def __init__(
        self, host_memory_max: int = HOST_MEMORY_MAX, total_memory_max: int = TOTAL_MEMORY_MAX
    ) -> None:
        self._host_memory_max = host_memory_max
        self._total_memory_max = total_memory_max
        self._arenas: dict[int, Arena] = {}
        self._by_owner: dict[bytes, dict[int, Arena]] = {}
        self._held: dict[bytes, int] = {}
        self._total = 0
        self._next_arena = 1

    @property
    def total_bytes(self) -> int:
        """Bytes of all pairs that are not gone."""
        return self._total

    @property
    def slots_in_flight(self) -> int:
        """Slots that a worker may touch."""
        return sum(len(pair.taken) for arena in self._arenas.values() for pair in arena.pairs.values())

    def plan_pair(self, session: bytes, contract_id: int, shape: SlotShape) -> Pair | Refusal:
        """Reserve memory for a pair, before it is created; `abandon` takes the reservation back."""
        held = self._held.get(session, 0)
        wanted = shape.total_bytes
        if held + wanted > self._host_memory_max:
            return _over_budget("memory per host", wanted, held, self._host_memory_max)
        if self._total + wanted > self._total_memory_max:
            return _over_budget("memory of all hosts", wanted, self._total, self._total_memory_max)
        arena = self._arena_of(session, contract_id)
        if len(arena.pairs) >= SEGMENTS_PER_ARENA_MAX:
            limit = f"segments per arena: {SEGMENTS_PER_ARENA_MAX}"
            return Refusal(
                AbiErrorCode.BUSY, f"arena {arena.id} has {len(arena.pairs)} pairs; the {limit}", limit
            )
        pair = Pair(arena, arena.next_index, shape)
        arena.next_index = (arena.next_index + 1) & _POSITION_MASK
        while arena.next_index in arena.pairs or arena.next_index == pair.index:
            arena.next_index = (arena.next_index + 1) & _POSITION_MASK
        arena.pairs[pair.index] = pair
        self._held[session] = held + wanted
        self._total += wanted
        return pair

    def pair_of(self, session: bytes, arena_id: int, index: int) -> Pair | Refusal:
        """Find a pair by the name a host gives it."""
        arena = self._arenas.get(arena_id)
        pair = arena.pairs.get(index) if arena is not None else None
        if arena is None or pair is None or pair.state is PairState.RETIRED:
            return Refusal(AbiErrorCode.STALE_HANDLE, f"there is no pair {index} of arena {arena_id}")
        if arena.session != session:
            return Refusal(AbiErrorCode.UNAUTHORIZED, f"arena {arena_id} belongs to another host")
        return pair

    def retire(self, pair: Pair) -> bool:
        """Let nobody use a pair any more; return whether it is gone already (no slot in flight)."""
        pair.state = PairState.RETIRED
        return self._gone_if_quiet(pair)

    def abandon(self, pair: Pair) -> None:
        """Forget a pair that could not be created."""
        assert not pair.taken
        self.retire(pair)

    def host_left(self, session: bytes) -> list[Pair]:
        """Retire all pairs of a host; return those that are gone at once, others go with their last slot."""
        pairs = [pair for arena in self._by_owner.get(session, {}).values() for pair in arena.pairs.values()]
        return [pair for pair in pairs if pair.state is not PairState.RETIRED and self.retire(pair)]

    def take_slot(self, session: bytes, call: Call) -> Pair | Refusal:
        """Check a call's handle and sizes, and note its slot as in flight."""
        arena = self._arenas.get(call.arena)
        if arena is None or arena.session != session or arena.contract_id != call.contract_id:
            return _foreign(arena, session, call)
        pair = arena.pairs.get(call.slot >> SLOT_SHIFT)
        position = call.slot & _POSITION_MASK
        if (
            pair is None
            or pair.state is not _USABLE
            or position >= pair.count
            or position in pair.taken
            or call.generation != pair.generations[position]
            or call.args_size > pair.args_capacity
            or call.out_size > pair.out_capacity
        ):
            return _unfit(pair, position, call)
        pair.taken.add(position)
        return pair

    def release_slot(self, pair: Pair, slot: int) -> bool:
        """Note a slot as free, now that nobody else can touch it; return whether its pair is gone with it."""
        position = slot & _POSITION_MASK
        pair.taken.remove(position)
        pair.generations[position] = (pair.generations[position] + 1) & 0xFFFFFFFF
        return self._gone_if_quiet(pair)

    def _arena_of(self, session: bytes, contract_id: int) -> Arena:
        owned = self._by_owner.setdefault(session, {})
        arena = owned.get(contract_id)
        if arena is None:
            arena = Arena(self._next_arena, session, contract_id)
            self._next_arena += 1
            owned[contract_id] = self._arenas[arena.id] = arena
        return arena

    def _gone_if_quiet(self, pair: Pair) -> bool:
        if pair.state is not _RETIRED or pair.taken:
            return False
        arena = pair.arena
        del arena.pairs[pair.index]
        self._total -= pair.shape.total_bytes
        left = self._held[arena.session] - pair.shape.total_bytes
        self._held[arena.session] = left
        if not arena.pairs:
            self._forget(arena)
        return True

    def _forget(self, arena: Arena) -> None:
        del self._arenas[arena.id]
        owned = self._by_owner[arena.session]
        del owned[arena.contract_id]
        if not owned:
            del self._by_owner[arena.session]
            del self._held[arena.session]


def _foreign(arena: Arena | None, session: bytes, call: Call) -> Refusal:
    if arena is None:
        return Refusal(AbiErrorCode.STALE_HANDLE, f"arena {call.arena} does not exist")
    if arena.session != session:
        return Refusal(AbiErrorCode.UNAUTHORIZED, f"arena {call.arena} belongs to another host")
    return Refusal(AbiErrorCode.UNAUTHORIZED, f"arena {call.arena} serves another contract")


def _unfit(pair: Pair | None, position: int, call: Call) -> Refusal:
    if pair is None or pair.state is not _USABLE or position >= pair.count:
        return Refusal(AbiErrorCode.STALE_HANDLE, f"slot {call.slot:#x} of arena {call.arena} does not exist")
    if position in pair.taken:
        return Refusal(AbiErrorCode.BAD_REQUEST, f"slot {call.slot:#x} of arena {call.arena} is in flight")
    expected = pair.generations[position]
    if call.generation != expected:
        return Refusal(
            AbiErrorCode.STALE_HANDLE, f"generation {call.generation} is stale; the slot is at {expected}"
        )
    return Refusal(
        AbiErrorCode.BAD_REQUEST,
        f"args of {call.args_size} and out of {call.out_size} bytes exceed the slot's "
        f"{pair.args_capacity} and {pair.out_capacity}",
    )


def _over_budget(bound: str, wanted: int, held: int, limit: int) -> Refusal:
    text = f"{wanted} bytes more than the {held} held exceed the {bound} of {limit} bytes"
    return Refusal(AbiErrorCode.BUSY, f"{text}; give memory back or retry in 1 s", f"{bound}: {limit}")
