"""Calls that contracts make: what they may, who waits for whom, and what comes of it when one of them ends early."""

from __future__ import annotations

import pytest

from luacell.broker import chains
from luacell.broker.model import Call, CallState, KillWorker, SendCall, SendFailure, SendResult, Worker, WorkerState
from luacell.broker.quarantine import CRASHES_MAX
from luacell.protocol.errors import AbiErrorCode
from tests.broker.bench import HOST, OTHER_HOST, SEGFAULT, SPARES_PAUSE_MS, Bench

A, B, C = 1, 2, 3


def nest(bench: Bench, worker: Worker, contract_id: int) -> Call:
    """The contract of a worker calls another; the call must be accepted."""
    bench.dispatcher.caller_joined(worker)
    return bench.call(contract_id, worker.routing_id)


def refusal(bench: Bench, worker: Worker, contract_id: int) -> SendFailure:
    """The contract of a worker calls another, in vain; return the answer."""
    bench.dispatcher.caller_joined(worker)
    bench.send(bench.header(contract_id, worker.routing_id), worker.routing_id)
    return bench.only(SendFailure)


def begin(bench: Bench, contract_id: int, host: bytes = HOST) -> Call:
    call = bench.call(contract_id, host)
    bench.begin(call)
    return call


@pytest.fixture
def bench() -> Bench:
    return Bench(spares=4)


def test_a_nested_call_ends_with_its_parent_and_waiting_is_no_running(bench: Bench) -> None:
    a, b = bench.serve(A, run_limit_us=100_000, deadline_us=300_000), bench.serve(B)
    bench.pass_ms(SPARES_PAUSE_MS)
    outer = begin(bench, A)
    inner = nest(bench, a, B)
    assert (inner.parent, inner.depth, inner.deadline_ns) == (outer, 1, outer.deadline_ns)
    assert bench.only(SendCall).worker is b
    assert a.state.value == "waiting"
    bench.begin(inner)
    assert not bench.pass_ms(200)  # twice its run limit
    bench.done(inner)
    assert bench.only(SendResult).call is inner
    assert a.state is WorkerState.BUSY
    assert not bench.pass_ms(50)
    bench.done(outer)
    assert bench.only(SendResult).call is outer


def test_who_runs_no_call_or_waits_already_makes_none(bench: Bench) -> None:
    a = bench.serve(A)
    bench.serve(B)
    assert refusal(bench, a, B).code is AbiErrorCode.CANCELLED
    outer = begin(bench, A)
    nest(bench, a, B)
    assert refusal(bench, a, B).code is AbiErrorCode.BAD_REQUEST
    bench.cancel(outer)
    assert refusal(bench, a, B).code is AbiErrorCode.CANCELLED


def test_depth_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "DEPTH_MAX", 1)
    a, b = bench.serve(A), bench.serve(B)
    bench.serve(C)
    begin(bench, A)
    bench.begin(nest(bench, a, B))
    assert refusal(bench, b, C).code is AbiErrorCode.TOO_LARGE


def test_what_was_accepted_may_call_while_the_broker_drains(bench: Bench) -> None:
    a = bench.serve(A)
    bench.serve(B)
    begin(bench, A)
    bench.dispatcher.drain()
    assert nest(bench, a, B).worker is not None


def test_a_private_contract_is_called_along_its_hosts_chains_alone(bench: Bench) -> None:
    a, b = bench.serve(A), bench.serve(B)
    bench.serve(C, private=True)
    outer = begin(bench, A)
    middle = nest(bench, a, B)
    bench.begin(middle)
    bench.done(nest(bench, b, C))
    bench.done(middle)
    bench.done(outer)
    begin(bench, A, OTHER_HOST)
    assert refusal(bench, a, C).code is AbiErrorCode.HOST_CONTRACT_NOT_FOUND
    assert bench.dispatcher.contract_for(b"nobody", C) is None


def test_a_chain_that_comes_back_to_state_is_refused(bench: Bench) -> None:
    a, b = bench.serve(A), bench.serve(B)
    begin(bench, A)
    assert nest(bench, a, B).worker is b
    assert refusal(bench, b, A).code is AbiErrorCode.REENTRANT_CALL
    assert b.state is WorkerState.BUSY


def test_two_chains_that_wait_for_each_other_are_told_apart(bench: Bench) -> None:
    """The one that comes second would close the circle; the first waits, over a queued call, for its end."""
    a, b, c = bench.serve(A), bench.serve(B), bench.serve(C)
    begin(bench, A)
    begin(bench, B)
    begin(bench, C)
    waiting = nest(bench, a, B)  # queued: B runs
    nest(bench, c, A)  # queued: A waits for that
    assert refusal(bench, b, A).code is AbiErrorCode.REENTRANT_CALL
    assert waiting.worker is None


def test_all_workers_of_a_contract_may_wait_for_one(bench: Bench) -> None:
    first = bench.serve(A, stateless=True, workers=2)
    b = bench.serve(B)
    begin(bench, A)
    bench.call(A)
    second = bench.load_next()
    bench.begin(bench.dispatcher.sessions[HOST].calls[max(bench.dispatcher.sessions[HOST].calls)])
    begin(bench, B)
    nest(bench, first, B)
    nest(bench, second, B)
    extra = nest(bench, b, A)
    assert extra.extra is not None


def test_a_stateless_contract_has_a_worker_for_the_purpose(bench: Bench) -> None:
    a, b = bench.serve(A, stateless=True), bench.serve(B)
    begin(bench, A)
    nest(bench, a, B)
    inner = nest(bench, b, A)
    extra = bench.load_start()
    bench.loaded(extra)
    assert inner.worker is extra
    bench.done(inner)
    assert bench.only(KillWorker).worker is extra
    assert inner.contract.extra == 0


def test_a_worker_that_came_for_a_call_that_was_cancelled_goes_again(bench: Bench) -> None:
    a, b = bench.serve(A, stateless=True), bench.serve(B)
    begin(bench, A)
    nest(bench, a, B)
    inner = nest(bench, b, A)
    extra = bench.load_start()
    bench.cancel(inner)
    bench.loaded(extra)
    assert bench.only(KillWorker).worker is extra


def test_when_the_worker_for_the_purpose_dies_who_counted_on_it_has_another(bench: Bench) -> None:
    a, b = bench.serve(A, stateless=True), bench.serve(B)
    begin(bench, A)
    nest(bench, a, B)
    inner = nest(bench, b, A)
    extra = bench.load_start()
    bench.cancel(inner)
    again = nest(bench, b, A)
    assert again.extra is None
    bench.die(extra, SEGFAULT)
    assert again.extra is again.contract


def test_a_queued_nested_call_stays_queued_when_a_worker_dies_that_is_replaced(bench: Bench) -> None:
    a, b = bench.serve(A), bench.serve(B)
    begin(bench, A)
    begin(bench, B)
    inner = nest(bench, a, B)
    bench.die(b, SEGFAULT)
    assert inner.state.value == "queued"


def test_what_a_waiting_worker_held_ahead_goes_back(bench: Bench) -> None:
    bench = Bench(spares=4, window=4)
    a = bench.serve(A)
    bench.serve(B)
    begin(bench, A)
    behind = bench.call(A)
    assert behind.worker is a
    nest(bench, a, B)
    assert behind.worker is None
    assert list(behind.contract.queue) == [behind]


def test_a_cancelled_chain_ends_from_above_and_spares_who_waited(bench: Bench) -> None:
    a, b = bench.serve(A), bench.serve(B)
    outer = begin(bench, A)
    inner = nest(bench, a, B)
    bench.begin(inner)
    bench.now_ns += 500_000_000
    bench.cancel(outer)
    assert bench.only(KillWorker).worker is b
    assert a.inner is None
    assert outer.answered


def test_at_the_deadline_who_waited_goes_on(bench: Bench) -> None:
    a, b = bench.serve(A, deadline_us=200_000), bench.serve(B)
    outer = begin(bench, A)
    bench.begin(nest(bench, a, B))
    bench.pass_ms(210)
    assert bench.only(KillWorker).worker is b
    bench.pass_ms(50)
    bench.done(outer)
    assert a.state is WorkerState.IDLE


def test_a_worker_that_is_to_leave_may_wait_before(bench: Bench) -> None:
    a, b = bench.serve(A), bench.serve(B)
    begin(bench, A)
    begin(bench, B, OTHER_HOST)
    inner = nest(bench, a, B)
    bench.dispatcher.worker_host_leaves(bench.now_ns)
    assert a.state is WorkerState.LEAVING
    bench.cancel(inner)
    assert a.state is WorkerState.LEAVING
    nest(bench, a, B)
    assert a.state is WorkerState.LEAVING
    assert b.state is WorkerState.LEAVING


def test_when_a_waiting_worker_dies_its_call_ends_and_nobody_is_told(bench: Bench) -> None:
    a, _ = bench.serve(A), bench.serve(B)
    outer = begin(bench, A)
    inner = nest(bench, a, B)
    bench.die(a, SEGFAULT)
    assert bench.only(SendFailure).call_id == outer.header.call_id
    bench.done(inner)
    assert not bench.has(SendResult)


def test_a_chain_for_which_there_is_no_worker_more_is_told_so_at_once() -> None:
    bench = Bench(spares=0, workers_max=2)
    a, b = bench.serve(A, stateless=True), bench.serve(B)
    begin(bench, A)
    bench.begin(nest(bench, a, B))
    failure = refusal(bench, b, A)
    assert (failure.code, failure.limit, failure.began) == (AbiErrorCode.BUSY, "workers: 2", "no")
    assert failure.retry_after
    assert b.state is WorkerState.BUSY


def test_a_contract_that_may_have_more_workers_waits_for_none_that_cannot_come() -> None:
    bench = Bench(spares=0, workers_max=2)
    a, b = bench.serve(A, stateless=True, workers=2), bench.serve(B)
    begin(bench, A)
    bench.begin(nest(bench, a, B))
    assert refusal(bench, b, A).code is AbiErrorCode.BUSY


def test_a_place_that_becomes_free_is_waited_for() -> None:
    bench = Bench(spares=0, workers_max=3)
    a, b = bench.serve(A, stateless=True), bench.serve(B)
    begin(bench, A)
    bench.begin(nest(bench, a, B))
    leaving = bench.serve(C)
    bench.dispatcher.worker_lost(leaving, bench.now_ns)
    assert nest(bench, b, A).state.value == "queued"


def test_a_contract_that_calls_itself_finds_room_where_its_worker_held_calls_ahead() -> None:
    bench = Bench(spares=1, window=4)
    a = bench.serve(A, stateless=True, workers=2, max_queue=1)
    begin(bench, A)
    bench.call(A)
    other = bench.load_next()
    bench.begin(bench.call_of(max(bench.dispatcher.sessions[HOST].calls)))
    behind = bench.call(A)
    assert behind.worker in (a, other)
    caller = behind.worker
    assert caller is not None
    inner = nest(bench, caller, A)
    assert [behind.state.value, inner.state.value].count("queued") >= 1
    assert not behind.answered
    assert not inner.answered


def crash_nested(bench: Bench, host: bytes) -> SendFailure:
    """A host calls A, which calls B, which crashes; return what A is told."""
    outer = begin(bench, A, host)
    assert outer.worker is not None
    inner = nest(bench, outer.worker, B)
    if inner.worker is None:
        bench.load_next()
    assert inner.worker is not None
    bench.begin(inner)
    bench.die(inner.worker, SEGFAULT)
    failure = bench.only(SendFailure)
    bench.done(outer)
    return failure


def test_crashes_of_nested_calls_count_for_the_host_of_the_chain(bench: Bench) -> None:
    bench.serve(A)
    bench.serve(B)
    for _ in range(CRASHES_MAX):
        assert crash_nested(bench, HOST).code is AbiErrorCode.WORKER_CRASHED
    outer = begin(bench, A)
    assert outer.worker is not None
    assert refusal(bench, outer.worker, B).code is AbiErrorCode.QUARANTINED
    bench.done(outer)
    bench.send(bench.header(B), HOST)
    assert bench.only(SendFailure).code is AbiErrorCode.QUARANTINED, "the host's own calls rest as well"
    other = begin(bench, A, OTHER_HOST)
    assert other.worker is outer.worker
    assert nest(bench, outer.worker, B).host.id == OTHER_HOST, "another host's chain over the same worker does not"


def test_nested_calls_of_one_host_take_turns_as_one_whichever_workers_make_them(bench: Bench) -> None:
    workers = [bench.serve(contract_id) for contract_id in (A, C)]
    bench.serve(B)
    begin(bench, B, OTHER_HOST)
    others = [next(call for call in iter(lambda: bench.call(B, OTHER_HOST), None) if call.state is CallState.QUEUED)]
    others += [bench.call(B, OTHER_HOST) for _ in range(2)]
    for contract_id in (A, C):
        begin(bench, contract_id)
    nested = [nest(bench, worker, B) for worker in workers]
    own = [bench.call(B) for _ in range(2)]
    queue = nested[0].contract.queue
    turns = [others[0], nested[0], own[0], others[1], nested[1], own[1], others[2]]
    assert queue.drain() == turns
