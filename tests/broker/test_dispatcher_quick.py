"""The dispatcher's quick way: it does what the long way does, or nothing."""

from typing import Any

import pytest

from luacell.broker.model import QUEUED, Call, SendFailure, Worker
from luacell.broker.queues import FairQueue
from luacell.protocol.headers import NOT_BEGUN, RETIRE, Done
from luacell.protocol.limits import ERROR_TEXT_MAX
from tests.broker.bench import HOST, OTHER_HOST, Bench, of_kind


@pytest.fixture
def bench() -> Bench:
    """A contract with a deadline of 50 ms that may run for 300 ms, and no spares."""
    bench = Bench(spares=0)
    bench.serve(deadline_us=50_000, run_limit_us=300_000)
    return bench


def quick_call(bench: Bench, **change: int) -> Call | None:
    header = bench.header(budget_us=20_000)._replace(**change)
    return bench.dispatcher.quick_call(HOST, header, bench.now_ns)


def quick_done(bench: Bench, call: Call, **change: int) -> Call | None:
    assert call.worker is not None
    done = Done(call.sequence, 0, 8, 0, 0)._replace(**change)
    return bench.dispatcher.quick_done(call.worker, done, bench.now_ns)


def traits(bench: Bench, call: Call, worker: Worker) -> dict[str, Any]:
    """What the rest of the dispatcher sees of a call and its worker."""
    names = ("state", "answered", "sequence", "sent_ns", "attempts", "arrived_ns", "deadline_ns", "timer")
    return {name: getattr(call, name) for name in names} | {
        "worker": (worker.state, worker.served, worker.call is call, call.worker is worker, call in worker.ahead),
        "contract": (call.contract.called, len(call.contract.idle), len(call.contract.queue)),
        "books": (call.book.generation, bench.books.slots_in_flight),
        "dispatcher": (len(call.session.calls), bench.dispatcher.answered_count, bench.dispatcher.next_deadline()),
    }


def test_the_quick_way_does_what_the_long_way_does() -> None:
    quick, long = Bench(spares=0), Bench(spares=0)
    quick_worker, long_worker = quick.serve(), long.serve()
    for _ in range(2):
        one = quick_call(quick)
        other = long.call(budget_us=20_000)
        assert one is not None
        assert traits(quick, one, quick_worker) == traits(long, other, long_worker)
        assert quick_done(quick, one) is one
        long.done(other)
        assert traits(quick, one, quick_worker) == traits(long, other, long_worker)
    assert quick.pass_ms(30) == []


@pytest.mark.parametrize(
    "change",
    [
        {"contract_id": 99},
        {"arena": 99},
        {"generation": 0},
        {"args_size": 1 << 30},
        {"out_size": 1 << 30},
        {"flags": 0},
        {"flags": 7},
        {"budget_us": 0},
        {"budget_us": 50_001},
        {"call_id": 0},
    ],
)
def test_an_unusual_call_does_not_go_the_quick_way(bench: Bench, change: dict[str, int]) -> None:
    assert quick_call(bench, **change) is None
    assert bench.books.slots_in_flight == 0
    assert not bench.dispatcher.sessions[HOST].calls


def test_quick_calls_expire_one_by_one_and_together(bench: Bench) -> None:
    bench.serve(2)
    bench.lease(2)
    calls = [quick_call(bench), bench.dispatcher.quick_call(HOST, bench.header(2, budget_us=20_000), bench.now_ns)]
    bench.pass_ms(25)
    failures = of_kind(bench.effects, SendFailure)
    assert {failure.call_id for failure in failures} == {call.header.call_id for call in calls if call is not None}
    assert len(failures) == 2


def test_a_call_waits_the_quick_way_when_its_workers_are_busy(bench: Bench) -> None:
    assert quick_call(bench) is not None
    waiting = quick_call(bench)
    assert waiting is not None
    assert (waiting.state, waiting.worker) == (QUEUED, None)
    assert list(waiting.contract.queue) == [waiting]


def test_a_call_does_not_wait_the_quick_way_for_a_worker_that_must_be_ordered_or_in_a_full_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.serve(2, workers=2, stateless=True)
    bench.lease(2)
    calls = [bench.dispatcher.quick_call(HOST, bench.header(2, budget_us=20_000), bench.now_ns) for _ in range(2)]
    assert calls[0] is not None
    assert calls[1] is None
    monkeypatch.setattr(FairQueue, "is_full", True)
    assert quick_call(bench) is not None
    assert quick_call(bench) is None


def test_calls_ahead_go_and_end_the_quick_way_as_on_the_long_way() -> None:
    quick, long = Bench(spares=0, window=3), Bench(spares=0, window=3)
    quick_worker, long_worker = quick.serve(), long.serve()
    ones = [quick_call(quick) for _ in range(5)]
    others = [long.call(budget_us=20_000) for _ in range(5)]
    for one, other in zip(ones, others, strict=True):
        assert one is not None
        assert traits(quick, one, quick_worker) == traits(long, other, long_worker)
    for one, other in zip(ones[:4], others[:4], strict=True):
        assert one is not None
        quick.pass_ms(1)
        long.pass_ms(1)
        assert quick_done(quick, one) is (one if one is not ones[3] else None)
        if one is ones[3]:  # the worker has nothing ahead, and a call waits
            quick.done(one)
        long.done(other)
        for each, twin in zip(ones, others, strict=True):
            assert each is not None
            assert traits(quick, each, quick_worker) == traits(long, twin, long_worker)


def test_a_call_goes_the_quick_way_only_from_a_host_with_its_own_slot(bench: Bench) -> None:
    header = bench.header(budget_us=20_000)
    assert bench.dispatcher.quick_call(OTHER_HOST, header, bench.now_ns) is None
    assert bench.dispatcher.quick_call(b"?" * 16, header, bench.now_ns) is None


def test_an_arena_serves_one_contract_the_quick_way_too(bench: Bench) -> None:
    bench.serve(2)
    assert quick_call(bench, contract_id=2) is None


def test_call_ids_and_bounds_hold_on_the_quick_way_too(bench: Bench) -> None:
    bench.serve(2, max_in_flight=1)
    call = bench.call(2)
    assert quick_call(bench, call_id=call.header.call_id) is None
    assert quick_call(bench, contract_id=2) is None


def test_a_private_contract_is_not_called_the_quick_way() -> None:
    bench = Bench()
    bench.serve(private=True)
    assert quick_call(bench) is None


def test_a_call_that_may_not_run_until_its_deadline_does_not_go_the_quick_way() -> None:
    bench = Bench()
    bench.serve(deadline_us=50_000, run_limit_us=19_999)
    assert quick_call(bench) is None


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 1 << 40},
        {"flags": RETIRE},
        {"flags": NOT_BEGUN},
        {"out_size": 9},
        {"error_size": ERROR_TEXT_MAX + 1},
    ],
)
def test_an_unusual_answer_does_not_go_the_quick_way(bench: Bench, change: dict[str, int]) -> None:
    call = bench.call()
    assert quick_done(bench, call, **change) is None
    assert not call.answered


def test_an_answer_that_nobody_waits_for_does_not_go_the_quick_way(bench: Bench) -> None:
    call = bench.call()
    bench.cancel(call)
    assert quick_done(bench, call) is None


def test_an_answer_does_not_go_the_quick_way_while_calls_wait(bench: Bench) -> None:
    call = bench.call()
    bench.call()
    assert quick_done(bench, call) is None


def test_an_answer_does_not_go_the_quick_way_when_its_worker_or_contract_or_memory_must_go(bench: Bench) -> None:
    call = bench.call()
    bench.lose(bench.worker())
    assert quick_done(bench, call) is None
    bench.serve(2)
    call = bench.call(2)
    bench.unregister(2)
    assert quick_done(bench, call) is None
    bench.serve(3)
    call = bench.call(3)
    bench.books.retire(call.pair)
    assert quick_done(bench, call) is None


def test_a_worker_that_holds_nothing_does_not_answer_the_quick_way(bench: Bench) -> None:
    call = bench.call()
    bench.done(call)
    assert quick_done(bench, call) is None
