"""The books of shared memory: who owns which arena, which slots are in flight, and what it all adds up to.

It decides whether a call's handle is good and whether memory may be granted; it creates, maps and frees
nothing. Everything that hosts say about memory is checked against these books, never against memory itself.

A pair of segments lives so:

    planned ──created──> granted ──mapped──> usable ──given back, host left──> retired ──slots free──> gone
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from luacell.broker.bounds import PAIRS_MAX
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.headers import Call
from luacell.protocol.limits import HOST_MEMORY_MAX, SEGMENTS_PER_ARENA_MAX, TOTAL_MEMORY_MAX
from luacell.protocol.slots import GENERATION_MASK, SLOT_SHIFT, SlotShape

EMPTY_ARENAS_MAX: Final = 64  # that a host keeps without a pair; 80 MB for all hosts there may be
_POSITION_MASK: Final = (1 << SLOT_SHIFT) - 1
ARENA_BITS: Final = 32


class Refusal(NamedTuple):
    """Why something is not done: a code, a text for people, and the bound where one was hit.

    Attributes:
        retry_after: seconds after which it may fare better, an estimate; or None.
    """

    code: AbiErrorCode
    message: str
    limit: str = ""
    retry_after: float | None = None


class PairState(Enum):
    """Where a pair of segments stands in its life."""

    PLANNED = "planned"
    GRANTED = "granted"
    USABLE = "usable"
    RETIRED = "retired"


_RETIRED: Final = PairState.RETIRED  # looking a member up in its enum costs a quarter of a microsecond


class SlotBook:
    """What the broker knows of one slot of a usable pair.

    Attributes:
        generation: the oldest that its next call may have; while a call is in flight, the complement of that call's.
    """

    __slots__ = ("args_capacity", "contract_id", "generation", "out_capacity", "pair", "session")

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.session = pair.arena.session
        self.contract_id = pair.arena.contract_id
        self.generation = 1
        self.args_capacity = pair.shape.args_capacity
        self.out_capacity = pair.shape.out_capacity

    def fits(self, generation: int) -> bool:
        """Whether a call of this generation may have the slot: it is free, and no call of the past has had it.

        A host that does not know whether a call of its has arrived counts on; "later" is that of RFC 1982.
        """
        return self.generation >= 0 and (generation - self.generation) & GENERATION_MASK <= GENERATION_MASK >> 1


@dataclass(slots=True, eq=False)
class Pair:
    """A pair of segments (args, out).

    Attributes:
        in_flight: slots that a worker may touch.
    """

    arena: Arena
    index: int
    shape: SlotShape
    state: PairState = PairState.PLANNED
    in_flight: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Arena id and pair index: the name of the pair in this broker's life."""
        return self.arena.id, self.index

    def slot_key(self, position: int) -> int:
        """The name of a slot in this broker's life: its number and its arena."""
        return (self.index << SLOT_SHIFT | position) << ARENA_BITS | self.arena.id


@dataclass(slots=True, eq=False)
class Arena:
    """One host's memory for one contract: its name stays, though the host gives pairs back, for as long as it is there.

    Workers keep the host's instances by it.
    """

    id: int
    session: bytes
    contract_id: int
    pairs: dict[int, Pair] = field(default_factory=dict)
    next_index: int = 0
    is_left: bool = False  # its host is gone


class Books:
    """All arenas of one broker.

    Args:
        host_memory_max: bytes one host may hold.
        total_memory_max: bytes all hosts may hold.
        pairs_max: pairs of segments there may be; each is two descriptors.

    Attributes:
        forgotten: ids of arenas that are gone since somebody looked, who empties it.
    """

    def __init__(
        self,
        host_memory_max: int = HOST_MEMORY_MAX,
        total_memory_max: int = TOTAL_MEMORY_MAX,
        pairs_max: int = PAIRS_MAX,
    ) -> None:
        self._pairs_max = pairs_max
        self._pair_count = 0
        self._host_memory_max = host_memory_max
        self._total_memory_max = total_memory_max
        self.slots: dict[int, SlotBook] = {}  # of usable pairs, by Pair.slot_key; read by the dispatcher
        self._arenas: dict[int, Arena] = {}
        self._by_owner: dict[bytes, dict[int, Arena]] = {}
        self._held: dict[bytes, int] = {}
        self._empty: dict[bytes, dict[int, Arena]] = {}  # arenas without a pair, by session, the oldest first
        self.forgotten: list[int] = []
        self._total = 0
        self._next_arena = 1

    @property
    def total_bytes(self) -> int:
        """Bytes of all pairs that are not gone."""
        return self._total

    @property
    def slots_in_flight(self) -> int:
        """Slots that a worker may touch."""
        return sum(pair.in_flight for arena in self._arenas.values() for pair in arena.pairs.values())

    def in_flight(self, session: bytes, contract_id: int) -> int:
        """Return how many slots of a host's calls to one contract a worker may touch, or will."""
        arena = self._by_owner.get(session, {}).get(contract_id)
        return 0 if arena is None else sum(pair.in_flight for pair in arena.pairs.values())

    def plan_pair(self, session: bytes, contract_id: int, shape: SlotShape) -> Pair | Refusal:
        """Reserve memory for a pair, before it is created; `abandon` takes the reservation back."""
        held = self._held.get(session, 0)
        wanted = shape.total_bytes
        if held + wanted > self._host_memory_max:
            return _over_budget("memory per host", wanted, held, self._host_memory_max)
        if self._total + wanted > self._total_memory_max:
            return _over_budget("memory of all hosts", wanted, self._total, self._total_memory_max)
        if self._pair_count >= self._pairs_max:
            limit = f"segments of all hosts: {2 * self._pairs_max}"
            return Refusal(AbiErrorCode.BUSY, f"the bound on {limit} is reached; retry later, or raise NOFILE", limit)
        arena = self._arena_of(session, contract_id)
        if len(arena.pairs) >= SEGMENTS_PER_ARENA_MAX:
            limit = f"segments per arena: {SEGMENTS_PER_ARENA_MAX}"
            return Refusal(AbiErrorCode.BUSY, f"arena {arena.id} has {len(arena.pairs)} pairs; the {limit}", limit)
        pair = Pair(arena, arena.next_index, shape)
        arena.next_index = (arena.next_index + 1) & _POSITION_MASK
        while arena.next_index in arena.pairs or arena.next_index == pair.index:
            arena.next_index = (arena.next_index + 1) & _POSITION_MASK
        arena.pairs[pair.index] = pair
        self._held[session] = held + wanted
        self._total += wanted
        self._pair_count += 1
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
        for position in range(pair.shape.count):
            self.slots.pop(pair.slot_key(position), None)
        return self._gone_if_quiet(pair)

    def abandon(self, pair: Pair) -> None:
        """Forget a pair that could not be created."""
        assert not pair.in_flight
        self.retire(pair)

    def host_left(self, session: bytes) -> list[Pair]:
        """Retire all pairs of a host; return those that are gone at once, others go with their last slot."""
        arenas = list(self._by_owner.get(session, {}).values())
        pairs = [pair for arena in arenas for pair in arena.pairs.values()]
        for arena in arenas:
            arena.is_left = True
            if not arena.pairs:
                self._forget(arena)
        return [pair for pair in pairs if pair.state is not PairState.RETIRED and self.retire(pair)]

    def mapped(self, pair: Pair) -> None:
        """Let calls name the slots of a pair, now that its host has it."""
        assert pair.state is PairState.GRANTED, pair.state
        pair.state = PairState.USABLE
        for position in range(pair.shape.count):
            self.slots[pair.slot_key(position)] = SlotBook(pair)

    def take_slot(self, session: bytes, call: Call) -> SlotBook | Refusal:
        """Check a call's handle and sizes, and note its slot as in flight."""
        book = self.slots.get(call.slot << ARENA_BITS | call.arena)
        if (
            book is None
            or not book.fits(call.generation)
            or book.contract_id != call.contract_id
            or book.session != session
            or call.args_size > book.args_capacity
            or call.out_size > book.out_capacity
        ):
            return _unfit(book, session, call)
        book.generation = ~call.generation
        book.pair.in_flight += 1
        return book

    def release_slot(self, book: SlotBook) -> bool:
        """Note a slot as free, now that nobody else can touch it; return whether its pair is gone with it."""
        book.generation = -book.generation & GENERATION_MASK  # of ~g that is g + 1
        pair = book.pair
        pair.in_flight -= 1
        return pair.state is _RETIRED and self._gone_if_quiet(pair)

    def _arena_of(self, session: bytes, contract_id: int) -> Arena:
        owned = self._by_owner.setdefault(session, {})
        arena = owned.get(contract_id)
        if arena is None:
            arena = Arena(self._next_arena, session, contract_id)
            self._next_arena += 1
            owned[contract_id] = self._arenas[arena.id] = arena
        self._empty.get(session, {}).pop(arena.id, None)
        return arena

    def _gone_if_quiet(self, pair: Pair) -> bool:
        if pair.state is not _RETIRED or pair.in_flight:
            return False
        arena = pair.arena
        del arena.pairs[pair.index]
        self._pair_count -= 1
        self._total -= pair.shape.total_bytes
        left = self._held[arena.session] - pair.shape.total_bytes
        self._held[arena.session] = left
        if not arena.pairs:
            self._emptied(arena)
        return True

    def _emptied(self, arena: Arena) -> None:
        """Keep an arena without pairs for its host, which may lease again; not too many."""
        if arena.is_left:
            self._forget(arena)
            return
        empty = self._empty.setdefault(arena.session, {})
        empty[arena.id] = arena
        if len(empty) > EMPTY_ARENAS_MAX:
            self._forget(next(iter(empty.values())))

    def _forget(self, arena: Arena) -> None:
        self.forgotten.append(arena.id)
        del self._arenas[arena.id]
        self._empty.get(arena.session, {}).pop(arena.id, None)
        owned = self._by_owner[arena.session]
        del owned[arena.contract_id]
        if not owned:
            del self._by_owner[arena.session]
            self._held.pop(arena.session, None)
            self._empty.pop(arena.session, None)


def _unfit(book: SlotBook | None, session: bytes, call: Call) -> Refusal:
    where = f"slot {call.slot:#x} of arena {call.arena}"
    if book is None:
        return Refusal(AbiErrorCode.STALE_HANDLE, f"{where} does not exist")
    if book.session != session:
        return Refusal(AbiErrorCode.UNAUTHORIZED, f"{where} belongs to another host")
    if book.contract_id != call.contract_id:
        return Refusal(AbiErrorCode.UNAUTHORIZED, f"{where} serves another contract")
    if book.generation < 0:
        return Refusal(AbiErrorCode.BAD_REQUEST, f"{where} is in flight")
    if not book.fits(call.generation):
        text = f"generation {call.generation} is stale; {where} is at {book.generation}"
        return Refusal(AbiErrorCode.STALE_HANDLE, text)
    return Refusal(
        AbiErrorCode.BAD_REQUEST,
        f"args of {call.args_size} and out of {call.out_size} bytes exceed the slot's "
        f"{book.args_capacity} and {book.out_capacity}",
    )


def _over_budget(bound: str, wanted: int, held: int, limit: int) -> Refusal:
    text = f"{wanted} bytes more than the {held} held exceed the {bound} of {limit} bytes"
    return Refusal(AbiErrorCode.BUSY, f"{text}; give memory back or retry in 1 s", f"{bound}: {limit}")
