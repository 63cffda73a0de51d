import pytest

from luacell.broker import books as books_module
from luacell.broker.books import Books, Pair, PairState, Refusal, SlotBook
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, Call
from luacell.protocol.limits import SEGMENTS_PER_ARENA_MAX
from luacell.protocol.slots import SLOT_SHIFT, SlotShape

HOST, OTHER = b"h" * 16, b"o" * 16
CONTRACT = 1
SHAPE = SlotShape.for_payloads(100, 100, 4)


def granted(books: Books, host: bytes = HOST, contract_id: int = CONTRACT, shape: SlotShape = SHAPE) -> Pair:
    pair = books.plan_pair(host, contract_id, shape)
    assert isinstance(pair, Pair)
    return pair


def usable(books: Books, host: bytes = HOST, contract_id: int = CONTRACT) -> Pair:
    pair = granted(books, host, contract_id)
    pair.state = PairState.GRANTED
    books.mapped(pair)
    return pair


def call_with(pair: Pair, position: int = 0, generation: int = 1) -> Call:
    slot = pair.index << SLOT_SHIFT | position
    return Call(5, pair.arena.contract_id, 1, 0, pair.arena.id, slot, generation, HAS_ARGS | HAS_OUT, 8, 8)


def take(books: Books, call: Call, host: bytes = HOST) -> SlotBook:
    book = books.take_slot(host, call)
    assert isinstance(book, SlotBook)
    return book


def refused(answer: SlotBook | Pair | Refusal) -> AbiErrorCode:
    assert isinstance(answer, Refusal)
    return answer.code


def test_new_books_are_empty() -> None:
    books = Books()
    assert (books.total_bytes, books.slots_in_flight) == (0, 0)


def test_a_pair_counts_from_the_moment_it_is_planned() -> None:
    books = Books()
    granted(books)
    assert books.total_bytes == SHAPE.total_bytes


def test_pairs_of_one_host_and_contract_share_an_arena() -> None:
    books = Books()
    one, two, of_another_contract = granted(books), granted(books), granted(books, contract_id=2)
    assert one.arena is two.arena
    assert one.key != two.key
    assert of_another_contract.arena is not one.arena
    assert granted(books, OTHER).arena.id not in (one.arena.id, of_another_contract.arena.id)


def test_a_host_gets_no_more_than_its_share() -> None:
    books = Books(host_memory_max=2 * SHAPE.total_bytes)
    granted(books)
    granted(books, contract_id=2)
    refusal = books.plan_pair(HOST, CONTRACT, SHAPE)
    assert isinstance(refusal, Refusal)
    assert refusal.code is AbiErrorCode.BUSY
    assert refusal.limit == f"memory per host: {2 * SHAPE.total_bytes}"
    granted(books, OTHER)


def test_all_hosts_get_no_more_than_there_is() -> None:
    books = Books(total_memory_max=2 * SHAPE.total_bytes)
    granted(books)
    granted(books, OTHER)
    refusal = books.plan_pair(HOST, CONTRACT, SHAPE)
    assert isinstance(refusal, Refusal)
    assert refusal.limit == f"memory of all hosts: {2 * SHAPE.total_bytes}"


def test_an_arena_has_no_more_pairs_than_its_limit() -> None:
    books = Books()
    for _ in range(SEGMENTS_PER_ARENA_MAX):
        granted(books)
    assert refused(books.plan_pair(HOST, CONTRACT, SHAPE)) is AbiErrorCode.BUSY


def test_an_index_is_used_again_only_when_all_others_were() -> None:
    books = Books()
    first = granted(books)
    arena = first.arena
    arena.next_index = 0xFFFF
    last = granted(books)
    assert last.index == 0xFFFF
    assert granted(books).index == 1, "0 is in use"


def test_a_pair_is_found_by_the_name_its_host_knows() -> None:
    books = Books()
    pair = granted(books)
    assert books.pair_of(HOST, *pair.key) is pair


def test_a_foreign_pair_is_not_found() -> None:
    books = Books()
    pair = granted(books)
    assert refused(books.pair_of(OTHER, *pair.key)) is AbiErrorCode.UNAUTHORIZED


def test_a_pair_that_is_not_there_is_not_found() -> None:
    books = Books()
    pair = usable(books)
    assert refused(books.pair_of(HOST, 99, 0)) is AbiErrorCode.STALE_HANDLE
    assert refused(books.pair_of(HOST, pair.arena.id, 9)) is AbiErrorCode.STALE_HANDLE
    take(books, call_with(pair))
    books.retire(pair)
    assert refused(books.pair_of(HOST, *pair.key)) is AbiErrorCode.STALE_HANDLE


def test_an_idle_pair_is_gone_when_it_is_given_back() -> None:
    books = Books()
    assert books.retire(usable(books))
    assert books.total_bytes == 0


def test_a_pair_that_could_not_be_created_leaves_nothing() -> None:
    books = Books(host_memory_max=SHAPE.total_bytes)
    books.abandon(granted(books))
    assert books.total_bytes == 0
    granted(books)


def test_an_arena_lives_on_while_it_has_pairs() -> None:
    books = Books()
    one, two = usable(books), usable(books)
    books.retire(one)
    assert granted(books).arena is two.arena
    assert books.total_bytes == 2 * SHAPE.total_bytes


def test_a_pair_with_slots_in_flight_goes_with_the_last_of_them() -> None:
    books = Books()
    pair = usable(books)
    one, two = take(books, call_with(pair, 0)), take(books, call_with(pair, 1))
    assert not books.retire(pair)
    assert not books.release_slot(one)
    assert books.slots_in_flight == 1
    assert books.release_slot(two)
    assert books.total_bytes == 0


def test_a_retired_pair_takes_no_more_calls() -> None:
    books = Books()
    pair = usable(books)
    take(books, call_with(pair, 0))
    books.retire(pair)
    assert refused(books.take_slot(HOST, call_with(pair, 1))) is AbiErrorCode.STALE_HANDLE
    assert not books.slots


def test_a_released_slot_has_the_next_generation() -> None:
    books = Books()
    pair = usable(books)
    assert not books.release_slot(take(books, call_with(pair)))
    assert refused(books.take_slot(HOST, call_with(pair))) is AbiErrorCode.STALE_HANDLE
    assert take(books, call_with(pair, generation=2)).pair is pair


@pytest.mark.parametrize(("generation", "next_generation"), [(0, 1), (0x7FFFFFFF, 0x80000000), (0xFFFFFFFF, 0)])
def test_a_slot_of_any_generation_is_taken_once_and_the_next_one_wraps_with_its_field(
    generation: int, next_generation: int
) -> None:
    books = Books()
    pair = usable(books)
    books.slots[pair.slot_key(0)].generation = generation
    call = call_with(pair, generation=generation)
    book = take(books, call)
    assert refused(books.take_slot(HOST, call)) is AbiErrorCode.BAD_REQUEST
    books.release_slot(book)
    assert book.generation == next_generation


@pytest.mark.parametrize(
    ("last", "ahead"), [(1, 2), (1, 1000), (1, 0x80000000), (0xFFFFFFFF, 0), (0x90000000, 0x0FFFFFFF)]
)
def test_a_host_may_count_on_without_a_call(last: int, ahead: int) -> None:
    books = Books()
    pair = usable(books)
    books.slots[pair.slot_key(0)].generation = last
    book = take(books, call_with(pair, generation=ahead))
    books.release_slot(book)
    assert refused(books.take_slot(HOST, call_with(pair, generation=ahead))) is AbiErrorCode.STALE_HANDLE
    assert book.generation == (ahead + 1) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"arena": 99}, AbiErrorCode.STALE_HANDLE),
        ({"contract_id": 2}, AbiErrorCode.UNAUTHORIZED),
        ({"slot": 9 << SLOT_SHIFT}, AbiErrorCode.STALE_HANDLE),
        ({"slot": 4}, AbiErrorCode.STALE_HANDLE),
        ({"slot": 0xFFFFFFFF}, AbiErrorCode.STALE_HANDLE),
        ({"generation": 0}, AbiErrorCode.STALE_HANDLE),
        ({"generation": 0x80000001}, AbiErrorCode.STALE_HANDLE),
        ({"generation": 0xFFFFFFFF}, AbiErrorCode.STALE_HANDLE),
        ({"args_size": SHAPE.args_capacity + 1}, AbiErrorCode.BAD_REQUEST),
        ({"out_size": SHAPE.out_capacity + 1}, AbiErrorCode.BAD_REQUEST),
        ({"out_size": 0xFFFFFFFF}, AbiErrorCode.BAD_REQUEST),
    ],
)
def test_a_handle_that_is_not_good_is_refused(change: dict[str, int], code: AbiErrorCode) -> None:
    books = Books()
    pair = usable(books)
    assert refused(books.take_slot(HOST, call_with(pair)._replace(**change))) is code
    assert books.slots_in_flight == 0


def test_a_slot_holds_exactly_its_capacity() -> None:
    books = Books()
    pair = usable(books)
    full = call_with(pair)._replace(args_size=SHAPE.args_capacity, out_size=SHAPE.out_capacity)
    assert take(books, full).pair is pair


def test_a_slot_of_another_host_is_refused() -> None:
    books = Books()
    pair = usable(books)
    assert refused(books.take_slot(OTHER, call_with(pair))) is AbiErrorCode.UNAUTHORIZED


def test_a_slot_in_flight_is_refused() -> None:
    books = Books()
    pair = usable(books)
    take(books, call_with(pair))
    for generation in (0, 1, 2, 0xFFFFFFFE):
        assert refused(books.take_slot(HOST, call_with(pair, generation=generation))) is AbiErrorCode.BAD_REQUEST


def test_a_pair_that_its_host_has_not_mapped_cannot_be_used() -> None:
    books = Books()
    pair = granted(books)
    assert refused(books.take_slot(HOST, call_with(pair))) is AbiErrorCode.STALE_HANDLE
    pair.state = PairState.GRANTED
    assert refused(books.take_slot(HOST, call_with(pair))) is AbiErrorCode.STALE_HANDLE
    books.mapped(pair)
    take(books, call_with(pair))


def test_a_host_that_leaves_loses_its_idle_pairs_at_once_and_the_others_with_their_slots() -> None:
    books = Books()
    idle, busy, retired = usable(books), usable(books, contract_id=2), usable(books)
    of_another = usable(books, OTHER)
    one, other = take(books, call_with(busy)), take(books, call_with(retired))
    books.retire(retired)
    assert books.host_left(HOST) == [idle]
    assert refused(books.take_slot(HOST, call_with(busy, 1))) is AbiErrorCode.STALE_HANDLE
    assert books.release_slot(one)
    assert books.release_slot(other)
    assert books.total_bytes == of_another.shape.total_bytes
    assert books.host_left(HOST) == []


def test_arena_keeps_its_name_while_its_host_is_there() -> None:
    books = Books()
    pair = usable(books)
    books.retire(pair)
    assert books.forgotten == []
    assert usable(books).arena is pair.arena
    books.retire(pair.arena.pairs[1])
    assert books.host_left(HOST) == []
    assert books.forgotten == [pair.arena.id]
    assert usable(books).arena.id != pair.arena.id


def test_arena_of_a_host_that_left_is_forgotten_with_its_last_slot() -> None:
    books = Books()
    pair = usable(books)
    book = take(books, call_with(pair))
    assert books.host_left(HOST) == []
    assert books.forgotten == []
    books.release_slot(book)
    assert books.forgotten == [pair.arena.id]


def test_arenas_without_a_pair_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books_module, "EMPTY_ARENAS_MAX", 2)
    books = Books()
    for contract_id in (1, 2, 3):
        pair = books.plan_pair(HOST, contract_id, SlotShape.for_payloads(8, 8, 1))
        assert not isinstance(pair, Refusal)
        books.abandon(pair)
    assert books.forgotten == [1]
    assert books.host_left(HOST) == []
    assert books.forgotten == [1, 2, 3]
