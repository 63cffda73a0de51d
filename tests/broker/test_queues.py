import pytest
from hypothesis import given
from hypothesis import strategies as st

from luacell.broker.queues import FairQueue


def filled(*items: tuple[str, int], bound: int = 100) -> FairQueue[str, int]:
    queue: FairQueue[str, int] = FairQueue(bound)
    for owner, item in items:
        queue.push(owner, item)
    return queue


def test_an_empty_queue_gives_nothing() -> None:
    queue = filled()
    assert queue.pop() is None
    assert queue.drain() == []


def test_items_of_one_owner_keep_their_order() -> None:
    assert filled(("a", 1), ("a", 2), ("a", 3)).drain() == [1, 2, 3]


def test_owners_take_turns_however_many_items_one_has() -> None:
    assert filled(("a", 1), ("a", 2), ("a", 3), ("b", 10), ("c", 20)).drain() == [1, 10, 20, 2, 3]


def test_an_item_that_is_put_back_is_next() -> None:
    queue = filled(("a", 1), ("b", 10), ("b", 11))
    queue.push_front("b", 9)
    assert queue.drain() == [9, 1, 10, 11]


def test_an_item_can_be_put_back_into_a_full_queue() -> None:
    queue = filled(("a", 1), bound=1)
    queue.push_front("a", 0)
    assert queue.is_full
    assert queue.drain() == [0, 1]


def test_a_full_queue_takes_nothing() -> None:
    queue = filled(("a", 1), ("b", 2), bound=2)
    assert queue.is_full
    with pytest.raises(AssertionError):
        queue.push("c", 3)


@pytest.mark.parametrize(
    ("owner", "item"),
    [
        pytest.param("c", 3, id="the newest of who has most, for one who has none"),
        pytest.param("b", 3, id="for one who has as many afterwards"),
        pytest.param("a", None, id="nothing for who has most"),
    ],
)
def test_what_a_full_queue_gives_up(owner: str, item: int | None) -> None:
    assert filled(("a", 1), ("a", 2), ("b", 10), ("a", 3)).displaceable(owner) == item


def test_owners_with_nearly_as_many_items_give_nothing_up() -> None:
    queue = filled(("a", 1), ("a", 2), ("b", 10))
    assert queue.displaceable("b") is None
    assert filled().displaceable("a") is None


def test_an_over_full_queue_gives_nothing_up() -> None:
    queue = filled(("a", 1), ("a", 2), bound=2)
    assert queue.displaceable("b") == 2
    queue.push_front("a", 0)
    assert queue.displaceable("b") is None


def test_a_removed_item_frees_its_place() -> None:
    queue = filled(("a", 1), ("a", 2), bound=2)
    queue.remove("a", 1)
    assert not queue.is_full
    assert list(queue) == [2]


def test_an_owner_without_items_loses_its_turn() -> None:
    queue = filled(("a", 1), ("b", 2))
    queue.remove("a", 1)
    queue.push("a", 3)
    assert queue.drain() == [2, 3]


def test_iterating_removes_nothing() -> None:
    queue = filled(("a", 1), ("b", 2))
    assert sorted(queue) == [1, 2]
    assert len(queue) == 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_everything_that_goes_in_comes_out_once_and_no_owner_waits_longer_than_a_round(
    pushes: list[tuple[str, bool]],
) -> None:
    queue: FairQueue[str, tuple[str, int]] = FairQueue(100)
    for number, (owner, _) in enumerate(pushes):
        queue.push(owner, (owner, number))
    drained = queue.drain()
    assert sorted(number for _, number in drained) == list(range(len(pushes)))
    left = {owner: sum(each == owner for each, _ in pushes) for owner, _ in pushes}
    while drained:
        owners = sum(count > 0 for count in left.values())
        round_, drained = drained[:owners], drained[owners:]
        assert len({owner for owner, _ in round_}) == len(round_)
        for owner, _ in round_:
            left[owner] -= 1
