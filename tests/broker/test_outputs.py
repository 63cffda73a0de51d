"""The budget of what contracts print."""

from hypothesis import given
from hypothesis import strategies as st

from luacell.broker.outputs import CUT_EVERY_NS, Kept, OutputBudget, RecordRate
from luacell.protocol.limits import NS_PER_S, OUTPUT_PER_CALL_MAX

NOW_NS = 10**12


def test_what_fits_the_call_is_kept() -> None:
    budget = OutputBudget()
    assert budget.take(0, 100, 0, NOW_NS) == Kept(100, 0)
    assert budget.take(0, OUTPUT_PER_CALL_MAX - 100, 0, NOW_NS) == Kept(OUTPUT_PER_CALL_MAX - 100, 0)


def test_what_is_beyond_is_cut_and_told_at_once() -> None:
    budget = OutputBudget()
    assert budget.take(0, OUTPUT_PER_CALL_MAX + 7, 0, NOW_NS) == Kept(OUTPUT_PER_CALL_MAX, 7)


def test_cuts_alone_are_told_once_a_second() -> None:
    budget = OutputBudget()
    budget.take(0, OUTPUT_PER_CALL_MAX, 0, NOW_NS)
    assert budget.take(0, 5, 0, NOW_NS) == Kept(0, 5)
    assert not budget.take(0, 6, 0, NOW_NS + CUT_EVERY_NS - 1).is_worth_a_record
    assert budget.take(0, 7, 0, NOW_NS + CUT_EVERY_NS) == Kept(0, 13)


def test_the_next_call_has_a_budget_of_its_own_and_tells_the_cuts_before_it() -> None:
    budget = OutputBudget()
    budget.take(0, OUTPUT_PER_CALL_MAX, 0, NOW_NS)
    budget.take(0, 5, 0, NOW_NS)
    budget.take(0, 6, 0, NOW_NS)
    assert budget.take(1, 50, 0, NOW_NS) == Kept(50, 6)


def test_cuts_of_the_worker_host_count_as_well() -> None:
    budget = OutputBudget()
    assert budget.take(0, 1, 1000, NOW_NS) == Kept(1, 1000)
    assert budget.take(0, 0, 0, NOW_NS) == Kept(0, 0)


def test_the_rest_can_be_told_at_any_time() -> None:
    budget = OutputBudget()
    budget.take(0, 0, 5, NOW_NS)
    budget.take(0, 0, 6, NOW_NS)
    assert budget.has_untold
    assert budget.tell(NOW_NS) == 6
    assert not budget.has_untold
    assert budget.tell(NOW_NS) == 0


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 50_000), st.integers(0, 50_000)), max_size=40))
def test_every_byte_is_kept_or_told(pieces: list[tuple[int, int, int]]) -> None:
    budget, served, kept, told = OutputBudget(), 0, 0, 0
    for index, (calls, size, cut) in enumerate(pieces):
        served += calls
        decided = budget.take(served, size, cut, NOW_NS + index * CUT_EVERY_NS // 3)
        kept += decided.size
        told += decided.cut
    told += budget.tell(NOW_NS)
    assert kept + told == sum(size + cut for _, size, cut in pieces)
    assert kept <= (served + 1) * OUTPUT_PER_CALL_MAX


def test_so_many_records_a_second_there_may_be() -> None:
    rate = RecordRate(2)
    assert [rate.take(NS_PER_S) for _ in range(3)] == [True, True, False]
    assert [rate.take(NS_PER_S + NS_PER_S // 2) for _ in range(2)] == [True, False]
