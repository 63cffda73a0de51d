"""Calls handed ahead: who gets them, how many, what becomes of them, and who is spared when their worker must go."""

from typing import Any

import pytest

from luacell.broker.dispatcher import LOOK_NS, SILENCE_MAX_NS
from luacell.broker.handover import KILL_AFTER_NS
from luacell.broker.model import (
    BUSY,
    DOOMED,
    HELD,
    IDLE,
    LEAVING,
    QUEUED,
    WINDOW_FIRST,
    WINDOW_FIRST_OF_MANY,
    Call,
    KillWorker,
    SendCall,
    SendFailure,
    SendReleased,
    SendResult,
    Worker,
)
from luacell.broker.windows import PACE_CALLS_MIN, REFILL_AT, SLOW_NS, WINDOW_MAX, WINDOW_NS, measure, room_of
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.headers import NOT_BEGUN, RETIRE, Done
from luacell.protocol.limits import NS_PER_MS
from tests.broker.bench import CONTRACT, KILLED, OTHER_HOST, SEGFAULT, Bench, of_kind

SLOW_MS = SLOW_NS / NS_PER_MS
LONG_US = 60_000_000


@pytest.fixture
def bench() -> Bench:
    return Bench(spares=0, window=WINDOW_MAX)


@pytest.fixture
def worker(bench: Bench) -> Worker:
    return bench.serve(deadline_us=LONG_US, run_limit_us=LONG_US)


def finished_silently(bench: Bench, *calls: Call, **words: int) -> None:
    for call in calls:
        bench.begin(call)
        bench.finish(call, **words)


def refill(bench: Bench, worker: Worker) -> list[SendCall]:
    bench.effects = bench.dispatcher.refill(worker, bench.now_ns)
    return of_kind(bench.effects, SendCall)


# -- who gets how many ------------------------------------------------------------------------------------------
def test_a_busy_worker_is_handed_calls_ahead_and_works_them_off_in_order(bench: Bench, worker: Worker) -> None:
    first, second, third = bench.call(), bench.call(), bench.call()
    assert [first, second, third] == worker.held
    assert {call.state for call in worker.held} == {HELD}
    for call, following in ((first, second), (second, third), (third, None)):
        bench.done(call)
        assert bench.result.call is call
        assert worker.call is following
    assert worker.state is IDLE


def test_an_idle_worker_comes_first(bench: Bench) -> None:
    one = bench.serve(workers=2, stateless=True)
    first = bench.call()
    assert first.worker is one
    waiting = bench.call()
    assert waiting.state is QUEUED, "another worker is on its way"
    other = bench.load_next()
    assert waiting.worker is other


def test_a_contract_is_staffed_before_its_workers_hold_calls_ahead(bench: Bench) -> None:
    one = bench.serve(workers=2, stateless=True)
    bench.call()
    waiting = [bench.call() for _ in range(3)]
    assert {call.state for call in waiting} == {QUEUED}
    other = bench.load_next()
    assert [len(each.held) for each in (one, other)] == [1, 1]
    bench.done(one.held[0])
    assert one.call is waiting[1]


def test_the_worker_with_the_fewest_calls_gets_the_next(bench: Bench) -> None:
    one = bench.serve(workers=2, stateless=True, deadline_us=LONG_US)
    bench.call()
    bench.call()
    other = bench.load_next()
    for count in (1, 2, 3):
        bench.call()
        bench.call()
        assert [len(each.ahead) for each in (one, other)] == [count, count]


def test_calls_beyond_the_mark_wait_in_the_queue_and_fill_the_window_together(bench: Bench, worker: Worker) -> None:
    calls = [bench.call() for _ in range(1 + REFILL_AT + 20)]
    assert len(worker.ahead) == REFILL_AT
    assert len(refill(bench, worker)) == WINDOW_MAX - REFILL_AT
    assert worker.held == calls[: 1 + WINDOW_MAX]
    for call in calls[: WINDOW_MAX - REFILL_AT]:
        assert not refill(bench, worker), "it has enough"
        bench.done(call)
    assert len(refill(bench, worker)) == 4


def test_hosts_take_turns_when_a_window_is_filled(bench: Bench, worker: Worker) -> None:
    bench.lease(host=OTHER_HOST)
    calls = [bench.call() for _ in range(1 + REFILL_AT + 4)]
    late = bench.call(host=OTHER_HOST)
    bench.done(calls[0])
    refill(bench, worker)
    assert late in list(worker.ahead)[REFILL_AT - 1 : REFILL_AT + 1]


def test_behind_a_slow_call_one_may_wait(bench: Bench, worker: Worker) -> None:
    slow = bench.call()
    bench.begin(slow)
    bench.pass_ms(SLOW_MS + 1)
    first, second = bench.call(), bench.call()
    assert (first.state, second.state) == (HELD, QUEUED)
    assert room_of(worker, slow.contract, bench.now_ns) == 0
    bench.done(slow)
    assert [call for _, call in refill(bench, worker)] == [second]


def test_a_pace_makes_a_window(worker: Worker) -> None:
    contract = worker.contract
    assert contract is not None
    for pace_ns, window in (
        (1000, WINDOW_MAX),
        (WINDOW_NS // 10, 10),
        (WINDOW_NS // 2, 2),
        (WINDOW_NS * 3, 1),
        (0, WINDOW_MAX),
    ):
        now_ns, worker.served = 1000 * NS_PER_MS, 0
        worker.paced_ns = 0
        measure(worker, contract, now_ns)
        worker.served += PACE_CALLS_MIN - 1
        contract.window = 7
        measure(worker, contract, now_ns)
        assert contract.window == 7, "too few to know"
        worker.served += 1
        measure(worker, contract, now_ns + PACE_CALLS_MIN * pace_ns)
        assert contract.window == window


def test_windows_of_contracts_with_several_workers_are_small_at_first() -> None:
    bench = Bench(spares=0)
    windows: list[int] = []
    for contract_id, workers in ((1, 1), (2, 2)):
        bench.register(contract_id, workers=workers, stateless=True)
        contract = bench.catalogue.pending[contract_id]
        contract.__post_init__()
        windows.append(contract.window)
    assert windows == [WINDOW_FIRST, WINDOW_FIRST_OF_MANY]


# -- deadlines, cancelling, hosts that leave --------------------------------------------------------------------
def test_a_call_that_expires_ahead_is_answered_and_never_begun(bench: Bench, worker: Worker) -> None:
    running, ahead = bench.call(), bench.call(budget_us=20_000)
    bench.begin(running)
    bench.pass_ms(25)
    failure = bench.failure
    assert (failure.code, failure.began, failure.slot) == (AbiErrorCode.DEADLINE_EXCEEDED, "no", "kept")
    assert bench.slot_of(ahead).withdrawn == ahead.sequence
    assert not bench.has(KillWorker)
    bench.done(running)
    assert worker.call is ahead
    bench.done(ahead, flags=NOT_BEGUN)
    assert bench.only(SendReleased).call_id == ahead.header.call_id
    assert worker.state is IDLE


def test_a_worker_that_does_not_pass_by_a_withdrawn_call_must_go(bench: Bench) -> None:
    worker = bench.serve(deadline_us=LONG_US, run_limit_us=200_000)
    running, ahead = bench.call(), bench.call(budget_us=20_000)
    bench.pass_ms(25)
    bench.done(running)
    assert worker.call is ahead
    bench.pass_ms(150)
    assert worker.state is BUSY
    bench.pass_ms(60)
    assert worker.state is DOOMED


def test_cancelling_a_call_ahead_spares_the_worker(bench: Bench, worker: Worker) -> None:
    running, ahead = bench.call(), bench.call()
    bench.begin(running)
    bench.now_ns += KILL_AFTER_NS
    bench.cancel(ahead)
    assert (bench.failure.code, bench.failure.began) == (AbiErrorCode.CANCELLED, "no")
    assert worker.state is BUSY


def test_what_a_gone_host_has_ahead_is_not_begun(bench: Bench, worker: Worker) -> None:
    bench.lease(host=OTHER_HOST)
    bench.call(host=OTHER_HOST)
    ahead = bench.call()
    bench.leave()
    assert bench.memory.slot_of(ahead).withdrawn == ahead.sequence
    assert worker.state is BUSY


# -- deaths -----------------------------------------------------------------------------------------------------
def test_those_behind_the_call_that_a_worker_died_of_go_to_the_next_one_in_their_order(
    bench: Bench, worker: Worker
) -> None:
    done, culprit, *innocent = [bench.call() for _ in range(5)]
    finished_silently(bench, done)
    bench.begin(culprit)
    bench.die(worker, SEGFAULT)
    assert bench.result.call is done
    failure = bench.failure
    assert (failure.call_id, failure.code, failure.began) == (
        culprit.header.call_id,
        AbiErrorCode.WORKER_CRASHED,
        "yes",
    )
    assert list(culprit.contract.queue) == innocent
    successor = bench.load_next()
    assert successor.call is innocent[0]
    assert not any(call.attempts for call in innocent)


def test_only_the_first_that_was_not_begun_counts_as_tried(bench: Bench, worker: Worker) -> None:
    first, second = bench.call(), bench.call()
    bench.die(worker, KILLED)
    assert (first.attempts, second.attempts) == (1, 0)
    bench.load_next()
    bench.dispatcher.refill(bench.worker(), bench.now_ns)
    bench.die(bench.worker(), KILLED)
    assert (bench.failure.call_id, bench.failure.began) == (first.header.call_id, "no")
    assert list(second.contract.queue) == [second]


def test_killing_a_worker_withdraws_what_it_holds_ahead(bench: Bench) -> None:
    worker = bench.serve(deadline_us=LONG_US, run_limit_us=200_000)
    culprit, *innocent = [bench.call() for _ in range(3)]
    bench.begin(culprit)
    bench.pass_ms(205)
    assert worker.state is DOOMED
    assert [bench.slot_of(call).withdrawn for call in innocent] == [call.sequence for call in innocent]
    finished_silently(bench, innocent[0], flags=NOT_BEGUN)  # it had just ended the one before
    bench.die(worker, KILLED)
    assert not bench.has(SendFailure)
    assert list(culprit.contract.queue) == innocent


def test_a_worker_that_passes_by_what_was_taken_back_leaves_it_to_others(bench: Bench) -> None:
    worker = bench.serve(deadline_us=LONG_US, run_limit_us=200_000)
    culprit, innocent = bench.call(), bench.call()
    bench.begin(culprit)
    bench.pass_ms(205)
    bench.finish(culprit)
    bench.done(culprit)
    bench.done(innocent, flags=NOT_BEGUN)
    assert innocent.state is QUEUED
    successor = bench.load_next()
    assert successor.call is innocent
    bench.die(worker, KILLED)
    assert innocent.worker is successor


def test_a_call_taken_back_that_has_expired_meanwhile_is_not_sent_again(bench: Bench) -> None:
    worker = bench.serve(deadline_us=300_000, run_limit_us=200_000)
    culprit, innocent = bench.call(), bench.call()
    bench.begin(culprit)
    bench.pass_ms(205)
    bench.now_ns += 200 * NS_PER_MS
    finished_silently(bench, innocent, flags=NOT_BEGUN)
    bench.die(worker, KILLED)
    assert (bench.failure.call_id, bench.failure.began) == (innocent.header.call_id, "no")


def test_a_worker_that_must_not_be_used_again_leaves_its_calls_to_others(bench: Bench, worker: Worker) -> None:
    spent, ahead = bench.call(), bench.call()
    bench.done(spent, flags=RETIRE)
    assert worker.state is DOOMED
    bench.die(worker, KILLED)
    assert bench.load_next().call is ahead


# -- races between a look and the order that follows ------------------------------------------------------------
def at_withdrawal(bench: Bench, monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Let something happen just when the broker withdraws a call."""
    withdraw = bench.memory.withdraw

    def withdraw_late(call: Call) -> None:
        act(call)
        withdraw(call)

    monkeypatch.setattr(bench.memory, "withdraw", withdraw_late)


def test_a_call_that_ends_just_when_it_is_given_up_is_answered_with_its_result(
    bench: Bench, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled, expiring = bench.call(), bench.call(budget_us=20_000)
    at_withdrawal(bench, monkeypatch, lambda call: finished_silently(bench, call))
    bench.cancel(cancelled)
    assert bench.result.call is cancelled
    assert not bench.has(SendFailure)
    bench.pass_ms(25)
    assert bench.result.call is expiring
    assert not bench.has(SendFailure)
    assert worker.state is BUSY


def test_a_worker_that_has_just_ended_the_call_is_not_killed_for_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bench.serve(deadline_us=LONG_US, run_limit_us=200_000)
    slow, innocent = bench.call(), bench.call()
    bench.begin(slow)
    bench.pass_ms(20)

    def end(call: Call) -> None:
        if call is innocent:
            bench.finish(slow)
            bench.begin(innocent)

    at_withdrawal(bench, monkeypatch, end)
    bench.pass_ms(185)
    assert bench.failure.call_id == slow.header.call_id
    assert worker.state is BUSY
    assert worker.call is innocent
    bench.done(slow)
    bench.done(innocent)
    assert bench.result.call is innocent


# -- answers that a worker gathers -------------------------------------------------------------------------------
def test_the_slots_of_a_silent_worker_tell_who_can_be_answered(bench: Bench, worker: Worker) -> None:
    done, running, ahead = bench.call(), bench.call(), bench.call()
    finished_silently(bench, done)
    bench.begin(running)
    bench.pass_ms(SLOW_MS + 5)
    assert (bench.result.call, bench.result.slot_free) == (done, False)
    assert (worker.call, list(worker.ahead)) == (running, [ahead])
    bench.done(done)
    assert bench.only(SendReleased).call_id == done.header.call_id
    bench.done(running)
    assert bench.result.call is running


def test_a_worker_that_answers_is_not_looked_at(bench: Bench, worker: Worker) -> None:
    first, second, _ = bench.call(), bench.call(), bench.call()
    bench.now_ns += 8 * NS_PER_MS
    bench.done(first)
    finished_silently(bench, second)
    bench.pass_ms(6)
    assert not bench.has(SendResult)
    bench.pass_ms(SLOW_MS + 5)
    assert bench.result.call is second


def test_what_a_worker_marked_and_never_answers_for_ends_it(bench: Bench, worker: Worker) -> None:
    bench.serve(2, run_limit_us=100_000, deadline_us=200_000)
    silent = bench.call(2)
    bench.call(2)
    finished_silently(bench, *silent.worker.held if silent.worker else [])
    bench.pass_ms(SLOW_MS + 5)
    assert len(of_kind(bench.effects, SendResult)) == 2
    assert silent.worker is not None
    assert silent.worker.call is None
    for _ in range(9):
        bench.pass_ms(SILENCE_MAX_NS / NS_PER_MS / 10)
        assert silent.worker.state is BUSY
    bench.pass_ms(SILENCE_MAX_NS / NS_PER_MS / 10)
    assert silent.worker.state is DOOMED
    bench.die(silent.worker, KILLED)
    assert len(of_kind(bench.effects, SendReleased)) == 2


def test_a_mark_that_a_worker_must_go_is_believed(bench: Bench, worker: Worker) -> None:
    spent, ahead = bench.call(), bench.call()
    finished_silently(bench, spent, code=258, flags=RETIRE)
    bench.pass_ms(SLOW_MS + 5)
    assert bench.failure.code is AbiErrorCode.OUT_OF_MEMORY
    assert worker.state is DOOMED
    bench.die(worker, KILLED)
    assert bench.load_next().call is ahead


def test_a_passed_by_call_that_a_silent_worker_marked_is_answered_at_its_deadline(bench: Bench) -> None:
    worker = bench.serve(deadline_us=300_000, run_limit_us=100_000)
    culprit, innocent = bench.call(), bench.call()
    bench.begin(culprit)
    bench.pass_ms(105)
    assert worker.state is DOOMED
    finished_silently(bench, culprit, innocent, flags=NOT_BEGUN)
    bench.pass_ms(200)
    failures = {failure.call_id for failure in of_kind(bench.effects, SendFailure)}
    assert failures == {innocent.header.call_id}


def test_an_answer_out_of_turn_ends_the_worker(bench: Bench, worker: Worker) -> None:
    _, ahead = bench.call(), bench.call()
    bench.done(ahead)
    assert worker.state is DOOMED
    assert "not its turn" in worker.verdict


def test_nothing_is_handed_ahead_of_a_replaced_contract(bench: Bench, worker: Worker) -> None:
    old = [bench.call() for _ in range(3)]
    bench.serve(CONTRACT, replace=True)
    for call in old:
        bench.done(call)
        assert bench.result.call is call
    assert worker.state is DOOMED, "they have ended where they were"


# -- a worker host that leaves ----------------------------------------------------------------------------------
def test_a_worker_whose_host_leaves_finishes_what_it_holds_and_gets_nothing_more(bench: Bench, worker: Worker) -> None:
    running, ahead = bench.call(), bench.call()
    bench.workforce.host_leaves(bench.now_ns, [])
    late = bench.call()
    assert late.state is QUEUED
    bench.done(running)
    assert worker.state is LEAVING
    finished_silently(bench, ahead)
    bench.pass_ms(SLOW_MS + 5)
    assert (bench.result.call, bench.result.slot_free) == (ahead, False)
    assert worker.state is LEAVING
    bench.done(ahead)
    assert worker.state is DOOMED
    bench.join_worker_host()
    assert bench.load_next().call is late


# -- what waits behind a slow call, while others could run it -----------------------------------------------------
def crowd(bench: Bench, **settings: Any) -> tuple[Worker, Worker, list[Call]]:
    """Two workers with three calls each: one runs, two are ahead."""
    one = bench.serve(workers=2, stateless=True, deadline_us=LONG_US, run_limit_us=LONG_US, **settings)
    calls = [bench.call(), bench.call()]
    other = bench.load_next()
    calls += [bench.call() for _ in range(4)]
    assert [len(each.held) for each in (one, other)] == [3, 3]
    return one, other, calls


def work_off(bench: Bench, worker: Worker) -> None:
    while worker.call is not None:
        bench.done(worker.call)


def test_calls_behind_a_slow_one_go_to_the_worker_that_is_free(bench: Bench) -> None:
    slow, free, _ = crowd(bench)
    work_off(bench, free)
    running, behind = slow.held[0], slow.held[1:]
    numbers = [call.sequence for call in behind]
    bench.begin(running)
    bench.pass_ms(SLOW_MS + 5)
    assert free.held[:1] == behind[:1]
    assert slow.held == [running]
    assert [bench.memory.slot_of(call).withdrawn for call in behind] == numbers
    work_off(bench, free)
    assert list(running.contract.queue) == behind[1:] or free.state is IDLE
    bench.done(running)
    for number in numbers:
        bench.effects = bench.dispatcher.worker_done(slow, Done(number, 0, 0, 0, NOT_BEGUN), bench.now_ns)
        assert not bench.has(SendResult)
    assert slow.state in (IDLE, BUSY)


def test_calls_behind_one_that_is_not_begun_stay_where_they_are(bench: Bench) -> None:
    slow, free, _ = crowd(bench)
    work_off(bench, free)
    held = slow.held
    bench.pass_ms(SLOW_MS + 5)
    assert slow.held == held


def test_calls_behind_one_that_was_withdrawn_stay_as_their_worker_may_have_come_to_them(bench: Bench) -> None:
    slow, free, _ = crowd(bench)
    work_off(bench, free)
    withdrawn, next_, _ = held = slow.held
    bench.cancel(withdrawn)
    bench.begin(next_)  # it has passed the other by, and nobody has heard of that
    bench.pass_ms(SLOW_MS + 5)
    assert slow.held == held
    assert not bench.has(SendCall)
    assert not next_.taken_back


def test_calls_behind_one_that_has_just_ended_come_back_by_themselves(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, free, _ = crowd(bench)
    work_off(bench, free)
    running, *behind = slow.held
    bench.begin(running)
    at_withdrawal(bench, monkeypatch, lambda call: bench.finish(running))
    bench.pass_ms(SLOW_MS + 5)
    assert slow.held == [running, *behind]
    bench.done(running)
    for call in behind:
        bench.done(call, flags=NOT_BEGUN)
    assert {call.worker for call in behind} <= {slow, free, None}
    assert not any(call.taken_back for call in behind)


def test_what_was_given_up_behind_a_slow_call_is_released_when_it_is_withdrawn_for_good(bench: Bench) -> None:
    slow, free, _ = crowd(bench)
    work_off(bench, free)
    running, cancelled, waiting = slow.held
    bench.begin(running)
    bench.cancel(cancelled)
    bench.pass_ms(SLOW_MS + 5)
    assert bench.only(SendReleased).call_id == cancelled.header.call_id
    assert waiting.worker is free


def test_a_worker_that_begins_what_was_taken_back_must_go(bench: Bench) -> None:
    slow, free, _ = crowd(bench)
    work_off(bench, free)
    running, behind, _ = slow.held
    number = behind.sequence
    bench.begin(running)
    bench.pass_ms(SLOW_MS + 5)
    bench.done(running)
    bench.effects = bench.dispatcher.worker_done(slow, Done(number, 0, 8, 0, 0), bench.now_ns)
    assert slow.state is DOOMED
    assert not bench.has(SendResult)


def test_a_worker_says_what_it_passes_by_before_it_answers_for_later_calls(bench: Bench) -> None:
    slow, free, _ = crowd(bench)
    work_off(bench, free)
    running, *behind = slow.held
    numbers = [call.sequence for call in behind]
    bench.begin(running)
    bench.pass_ms(SLOW_MS + 5)
    bench.effects = bench.dispatcher.worker_done(slow, Done(numbers[0], 0, 0, 0, NOT_BEGUN), bench.now_ns)
    assert slow.state is DOOMED, "it is still in the slow call"


def test_a_lone_call_whose_answer_does_not_come_is_answered_from_its_slot_long_before_its_deadline(
    bench: Bench, worker: Worker
) -> None:
    call = bench.call()
    bench.begin(call)
    for _ in range(3):
        assert not bench.pass_ms(LOOK_NS / NS_PER_MS)
    bench.finish(call)
    bench.pass_ms(LOOK_NS / NS_PER_MS)
    assert (bench.result.call, bench.result.slot_free) == (call, False)
    bench.pass_ms(LONG_US / 1000)
    assert bench.only(KillWorker).worker is worker
    bench.die(worker, KILLED)
    assert bench.only(SendReleased).call_id == call.header.call_id


def test_workers_are_looked_at_as_long_as_there_are_calls(bench: Bench, worker: Worker) -> None:
    bench.done(bench.call())
    bench.pass_ms(LONG_US / 1000)
    looked_ns = bench.now_ns
    assert bench.dispatcher.next_deadline() is None
    call = bench.call()
    assert bench.dispatcher.next_deadline() == looked_ns + LOOK_NS
    bench.done(call)
    assert bench.dispatcher.next_deadline() is None
