"""The pace of starts: a burst, then so many a second."""

from __future__ import annotations

import pytest

from luacell.broker.model import StartWorker
from luacell.broker.starts import BURST, COST_NS, RATE, StartBudget
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.limits import NS_PER_MS, NS_PER_S
from tests.broker.bench import HOST, OTHER_HOST, SEGFAULT, Bench, of_kind


def spent(now_ns: int) -> StartBudget:
    budget = StartBudget()
    for _ in range(BURST):
        budget.take(now_ns)
    return budget


def test_a_burst_is_free() -> None:
    budget = StartBudget()
    assert budget.available(NS_PER_S) == BURST
    assert budget.next_ns(NS_PER_S) == NS_PER_S
    assert spent(NS_PER_S).available(NS_PER_S) == 0


def test_tokens_come_back_one_by_one_and_no_more_than_the_burst() -> None:
    budget = spent(NS_PER_S)
    assert budget.next_ns(NS_PER_S) == NS_PER_S + COST_NS
    assert budget.available(NS_PER_S + COST_NS - 1) == 0
    assert budget.available(NS_PER_S + COST_NS) == 1
    assert budget.available(2 * NS_PER_S) == RATE
    assert budget.available(9 * NS_PER_S) == BURST


def test_more_than_there_is_cannot_be_taken() -> None:
    budget = spent(NS_PER_S)
    with pytest.raises(AssertionError):
        budget.take(NS_PER_S)


def crash_all_day(bench: Bench, duration_ms: int) -> int:
    """Let every worker die as soon as it is there; return how many were started."""
    count = len(of_kind(bench.effects, StartWorker))
    for _ in range(duration_ms):
        for worker in list(bench.workforce.by_id.values()):
            bench.dispatcher.worker_ready(worker, bench.now_ns)  # so that there is no back-off
            bench.die(worker, SEGFAULT)
            count += len(of_kind(bench.effects, StartWorker))
        bench.pass_ms(1)
        count += len(of_kind(bench.effects, StartWorker))
    return count


def test_starts_have_a_pace_whatever_dies() -> None:
    count = crash_all_day(Bench(spares=2), 10_000)
    assert BURST + 9 * RATE <= count <= BURST + 10 * RATE + 2


def test_calls_wait_for_a_start_and_a_full_queue_says_so() -> None:
    bench = Bench(spares=1)
    worker = bench.serve(max_queue=1)
    bench.unregister(99)
    budget = bench.workforce.starts
    while budget.available(bench.now_ns):
        budget.take(bench.now_ns)
    for each in list(bench.workforce.by_id.values()):
        if each is not worker:
            bench.die(each, SEGFAULT)
    bench.die(worker, SEGFAULT)
    waiting = bench.call(budget_us=5_000_000)
    assert waiting.worker is None
    bench.send(bench.header(host=HOST))
    assert bench.failure.code is AbiErrorCode.BUSY
    assert bench.failure.limit == f"worker starts: {RATE} a second"
    assert bench.failure.retry_after is not None
    assert 0 < bench.failure.retry_after <= 1
    bench.pass_ms(COST_NS / NS_PER_MS + 4)
    bench.only(StartWorker)
    bench.send(bench.header(host=OTHER_HOST), OTHER_HOST)
    bench.load_next()
    assert bench.sent.call is waiting
