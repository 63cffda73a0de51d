"""Memory for hosts that have none to share: the broker is the host of their arenas.

It leases pairs of segments through the books as a local host does over messages, hands out their slots, and gives
idle pairs back. What the slots are for is `inline`'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from luacell.broker.books import Books, Pair, PairState, Refusal
from luacell.broker.store import SegmentStore, create_descriptors
from luacell.broker.watcher import WorkDone
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.limits import INLINE_PIECE, INLINE_SMALL_MAX, NS_PER_S, SLOTS_PER_SEGMENT_MAX
from luacell.protocol.memory.channel import close_all
from luacell.protocol.slots import GENERATION_MASK, PAYLOAD_OFFSET, SLOT_SHIFT, SlotShape, write_generation

if TYPE_CHECKING:
    from luacell.broker.inline import InlineCall, InlineHost

SLOTS_FIRST: Final = 16  # of an arena's first pair; 16 small slots are 192 KiB
SLOTS_MIDDLE: Final = 4  # for payloads of over INLINE_SMALL_MAX; of INLINE_PIECE or more a pair has one
IDLE_PAIR_NS: Final = 10 * NS_PER_S  # a pair that no call has taken for this long is given back


class InlineSlot:
    """One slot, used by one call at a time.

    Attributes:
        generation: of its next call.
    """

    __slots__ = ("_args_start", "_out_start", "_position", "_stored", "generation", "home")

    def __init__(self, home: InlinePair, position: int, store: SegmentStore) -> None:
        self.home = home
        self.generation = 1
        self._position = position
        self._stored = store.get(home.pair)
        self._args_start = position * home.pair.shape.args_stride
        self._out_start = position * home.pair.shape.out_stride + PAYLOAD_OFFSET

    @property
    def handle(self) -> tuple[int, int, int]:
        """Arena, slot and generation, as a CALL names them."""
        pair = self.home.pair
        return pair.arena.id, pair.index << SLOT_SHIFT | self._position, self.generation

    def put(self, offset: int, piece: memoryview) -> None:
        """Copy a piece of the arguments in; it fits."""
        start = self._args_start + PAYLOAD_OFFSET + offset
        self._stored.args.view[start : start + len(piece)] = piece

    def stamp(self) -> None:
        """Write the generation, as a host does before a call."""
        write_generation(self._stored.args.view, self._args_start, self.generation)

    def read(self, offset: int, size: int) -> memoryview:
        """Return a view of the results, or of an error's text; to be copied at once."""
        start = self._out_start + offset
        return self._stored.out.view[start : start + size]

    def give_back(self) -> None:
        """Let another call have the slot."""
        self.generation = self.generation + 1 & GENERATION_MASK
        self.home.free.append(self)


class InlinePair:
    """A pair of segments with its free slots."""

    __slots__ = ("free", "pair", "used_ns")

    def __init__(self, pair: Pair, store: SegmentStore, now_ns: int) -> None:
        self.pair = pair
        self.used_ns = now_ns
        self.free = [InlineSlot(self, position, store) for position in reversed(range(pair.shape.count))]

    def fits(self, args_size: int, out_size: int) -> bool:
        """Whether its slots are large enough."""
        return args_size <= self.pair.shape.args_capacity and out_size <= self.pair.shape.out_capacity

    @property
    def is_idle(self) -> bool:
        """Whether no slot is in use."""
        return len(self.free) == self.pair.shape.count


class InlineArena:
    """One host's memory for one contract, and the calls that wait for some.

    Attributes:
        waiting: calls without a slot, in order of arrival.
        is_growing: a pair is being made.
        is_due: it has a place in the backlog.
    """

    __slots__ = ("contract_id", "host", "is_due", "is_growing", "pairs", "waiting")

    def __init__(self, host: InlineHost, contract_id: int) -> None:
        self.host = host
        self.contract_id = contract_id
        self.pairs: list[InlinePair] = []
        self.waiting: dict[InlineCall, None] = {}
        self.is_growing = False
        self.is_due = False

    def take(self, args_size: int, out_size: int, now_ns: int) -> InlineSlot | None:
        """Return a free slot that is large enough, or None."""
        for each in self.pairs:
            if each.free and each.fits(args_size, out_size):
                each.used_ns = now_ns
                return each.free.pop()
        return None

    def add(self, new: InlinePair) -> None:
        """Add a pair; small ones are tried first."""
        self.pairs.append(new)
        self.pairs.sort(key=lambda each: each.pair.shape.args_stride + each.pair.shape.out_stride)

    def slots_wanted(self, args_size: int, out_size: int) -> int:
        """Return how many slots the next pair is to have: more when many are in use, few when they are large."""
        size = max(args_size, out_size)
        if self.host.is_worker:  # its calls come one at a time
            return 1
        if size >= INLINE_PIECE:
            return 1
        if size > INLINE_SMALL_MAX:
            return SLOTS_MIDDLE
        largest = max((each.pair.shape.count for each in self.pairs if each.fits(args_size, out_size)), default=0)
        return min(max(SLOTS_FIRST, 2 * largest), SLOTS_PER_SEGMENT_MAX)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is lost when it is forgotten."""
        return not self.pairs and not self.waiting and not self.is_growing


class InlineMemory:
    """Makes pairs and gives them back.

    Args:
        books, store: the broker's.
        order: has work done in the second thread.
        drop: unmaps and closes a pair that nobody uses any more.
    """

    def __init__(
        self,
        books: Books,
        store: SegmentStore,
        order: Callable[[Callable[[], WorkDone]], None],
        drop: Callable[[Pair], None],
    ) -> None:
        self._books = books
        self._store = store
        self._order = order
        self._drop = drop

    def grow(
        self, arena: InlineArena, args_size: int, out_size: int, now_ns: int, tell: Callable[[Refusal | None], None]
    ) -> Refusal | None:
        """Have another pair made; idle ones of this host go back where the budget is used up.

        Args:
            arena: for which.
            args_size: bytes of arguments that its slots must hold.
            out_size: bytes of results that they must hold.
            now_ns: monotonic.
            tell: called when the pair is there, or cannot be made.

        Returns:
            Why not, where the books say so; then nothing follows.
        """
        owner = arena.host.peer
        shape = SlotShape.for_payloads(args_size, out_size, arena.slots_wanted(args_size, out_size))
        pair = self._books.plan_pair(owner, arena.contract_id, shape)
        if isinstance(pair, Refusal):
            for each in list(arena.host.arenas.values()):
                self.give_back_idle(each, now_ns)
            if arena.host.is_gone:  # what was sent meanwhile has shown it
                return pair
            pair = self._books.plan_pair(owner, arena.contract_id, shape)
        if isinstance(pair, Refusal):
            return pair
        planned = pair
        arena.is_growing = True
        self._order(lambda: self._create(arena, planned, now_ns, tell))
        return None

    def _create(self, arena: InlineArena, pair: Pair, now_ns: int, tell: Callable[[Refusal | None], None]) -> WorkDone:
        """Allocate a pair's memory; runs in the watcher thread."""
        try:
            descriptors = create_descriptors(pair.shape)
        except OSError as error:
            reason = f"no memory for {pair.shape.total_bytes} bytes: {error.strerror}"
            return WorkDone(lambda: self._failed(arena, pair, reason, tell))
        return WorkDone(lambda: self._created(arena, pair, descriptors, now_ns, tell))

    def _failed(self, arena: InlineArena, pair: Pair, reason: str, tell: Callable[[Refusal | None], None]) -> None:
        if pair.state is PairState.RETIRED:  # the host left meanwhile
            return
        self._books.abandon(pair)
        arena.is_growing = False
        tell(Refusal(AbiErrorCode.BUSY, reason, "memory of the machine"))

    def _created(
        self,
        arena: InlineArena,
        pair: Pair,
        descriptors: tuple[int, int],
        now_ns: int,
        tell: Callable[[Refusal | None], None],
    ) -> None:
        if pair.state is not PairState.PLANNED:  # the host left meanwhile
            close_all(descriptors)
            return
        try:
            self._store.add(pair, *descriptors)
            self._store.seal(pair)
        except OSError as error:
            self._store.drop(pair)
            self._failed(arena, pair, str(error), tell)
            return
        pair.state = PairState.GRANTED
        self._books.mapped(pair)
        arena.is_growing = False
        arena.add(InlinePair(pair, self._store, now_ns))
        tell(None)

    def give_back_idle(self, arena: InlineArena, before_ns: int) -> None:
        """Give back pairs that are idle and were last taken from before `before_ns`."""
        for each in [each for each in arena.pairs if each.is_idle and each.used_ns <= before_ns]:
            arena.pairs.remove(each)
            if self._books.retire(each.pair):
                self._drop(each.pair)
