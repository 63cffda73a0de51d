import pytest

from luacell.broker.causes import UNKNOWN, Cause, Vitals
from luacell.broker.dispatcher import SILENCE_MAX_NS
from luacell.broker.handover import INQUIRY_LIMIT_NS, KILL_AFTER_NS
from luacell.broker.model import (
    BUSY,
    DOOMED,
    IDLE,
    Call,
    DropPair,
    Effect,
    InspectWorker,
    KillWorker,
    LoadWorker,
    Record,
    SendCall,
    SendFailure,
    SendReleased,
    SendReply,
    SendResult,
    Worker,
)
from luacell.broker.quarantine import CRASHES_MAX
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.headers import NOT_BEGUN, RETIRE, Done
from luacell.protocol.limits import CALLS_IN_FLIGHT_MAX, ERROR_TEXT_MAX, NS_PER_MS, QUEUE_MAX
from tests.broker.bench import CONTRACT, HOST, KILLED, OTHER_HOST, SEGFAULT, VITALS, Bench, of_kind

LONG_US = 60_000_000
DEADLINE = AbiErrorCode.DEADLINE_EXCEEDED


@pytest.fixture
def bench() -> Bench:
    """A contract with a deadline of 50 ms that may run for 300 ms, and no spares."""
    bench = Bench(spares=0)
    bench.serve(deadline_us=50_000, run_limit_us=300_000)
    return bench


@pytest.fixture
def worker(bench: Bench) -> Worker:
    return bench.worker()


def is_slot_free(bench: Bench, call: Call) -> bool:
    return call.book.generation >= 0


# -- calls that end well ----------------------------------------------------------------------------------------
def test_a_call_goes_to_an_idle_worker_and_its_result_back(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    assert bench.effects == [SendCall(worker, call)]
    assert worker.state is BUSY
    bench.done(call, code=0, out_size=8)
    assert bench.effects == [SendResult(call, 0, 8, 0, True)]
    assert worker.state is IDLE
    assert is_slot_free(bench, call)
    assert not bench.dispatcher.sessions[HOST].calls


def test_the_contracts_own_codes_are_relayed(bench: Bench) -> None:
    bench.done(bench.call(), code=1024, out_size=0, error_size=5)
    assert (bench.result.code, bench.result.error_size) == (1024, 5)


def test_sizes_that_a_worker_gives_are_cut_to_what_may_be_there(bench: Bench) -> None:
    bench.done(bench.call(), out_size=1 << 31, error_size=1 << 31)
    assert (bench.result.out_size, bench.result.error_size) == (8, ERROR_TEXT_MAX)


def test_the_worker_that_was_used_last_is_used_next(bench: Bench) -> None:
    bench.serve(2, workers=2, stateless=True)
    first, second = bench.call(2), bench.call(2)
    bench.load_next()
    bench.done(second)
    bench.done(first)
    assert bench.call(2).worker is first.worker


def test_calls_wait_for_a_busy_worker_in_turns_of_their_hosts(bench: Bench) -> None:
    calls = [bench.call(), bench.call(), bench.call(), bench.call(host=OTHER_HOST)]
    order = []
    for _ in calls:
        running = bench.worker().call
        assert running is not None
        order.append(running)
        bench.done(running)
    assert order == [calls[0], calls[1], calls[3], calls[2]]


def test_no_two_hand_overs_share_a_number(bench: Bench) -> None:
    sequences = []
    for _ in range(3):
        call = bench.call()
        sequences.append(call.sequence)
        bench.die(bench.worker(), KILLED)
        bench.load_next()
        sequences.append(call.sequence)
        bench.done(call)
    assert len(set(sequences)) == 6


def test_a_budget_of_zero_is_the_contracts_deadline_and_none_is_longer(bench: Bench) -> None:
    budgets_us = [bench.call(budget_us=budget_us) for budget_us in (0, 20_000, LONG_US)]
    assert [(call.deadline_ns - bench.now_ns) // NS_PER_MS for call in budgets_us] == [50, 20, 50]


# -- calls that are refused -------------------------------------------------------------------------------------
def test_a_call_of_an_unknown_contract_is_refused(bench: Bench) -> None:
    bench.send(bench.header(99))
    assert bench.failure.code is AbiErrorCode.HOST_CONTRACT_NOT_FOUND
    assert bench.failure.slot == "unused"


@pytest.mark.parametrize(
    "change", [{"call_id": 0}, {"budget_us": LONG_US + 1}, {"flags": 4}, {"flags": 0}, {"out_size": 1 << 30}]
)
def test_a_malformed_call_is_refused(bench: Bench, change: dict[str, int]) -> None:
    header = bench.header()._replace(**change)
    bench.send(header)
    assert bench.effects == [bench.failure]
    assert (bench.failure.call_id, bench.failure.code) == (header.call_id, AbiErrorCode.BAD_REQUEST)
    assert bench.failure.slot == "unused"
    assert bench.books.slots_in_flight == 0


def test_a_call_without_buffers_is_accepted(bench: Bench) -> None:
    bench.send(bench.header()._replace(flags=0, args_size=0, out_size=0))
    assert bench.has(SendCall)


def test_a_call_id_is_not_used_twice_while_its_slot_is_not_free(bench: Bench) -> None:
    call = bench.call()
    bench.cancel(call)
    bench.send(bench.header()._replace(call_id=call.header.call_id))
    assert bench.failure.code is AbiErrorCode.BAD_REQUEST
    bench.done(call)
    bench.send(bench.header()._replace(call_id=call.header.call_id))
    assert bench.has(SendCall)


def test_a_handle_is_checked(bench: Bench) -> None:
    bench.send(bench.header()._replace(generation=0))
    assert bench.failure.code is AbiErrorCode.STALE_HANDLE


def test_a_host_has_no_more_calls_in_flight_than_its_bound(bench: Bench) -> None:
    bench.serve(2)
    for number in range(CALLS_IN_FLIGHT_MAX):
        bench.call(1 + number % 2)
    bench.send(bench.header())
    assert bench.failure.code is AbiErrorCode.BUSY
    assert bench.failure.limit == f"calls in flight per host: {CALLS_IN_FLIGHT_MAX}"
    assert bench.call(host=OTHER_HOST)


def test_no_more_calls_wait_for_a_contract_than_its_bound(bench: Bench) -> None:
    for number in range(QUEUE_MAX + 1):
        bench.call(host=(HOST, OTHER_HOST)[number % 2])
    bench.send(bench.header())
    assert bench.failure.code is AbiErrorCode.BUSY
    assert bench.failure.limit == f"calls queued for a contract: {QUEUE_MAX}"


def test_a_full_queue_makes_room_for_a_host_that_has_fewer_calls_in_it(bench: Bench) -> None:
    calls = [bench.call() for _ in range(CALLS_IN_FLIGHT_MAX)]
    newest = calls[-1]
    bench.call(host=OTHER_HOST)
    bench.call(host=OTHER_HOST)
    assert bench.failure.call_id == newest.header.call_id
    assert (bench.failure.code, bench.failure.began) == (AbiErrorCode.BUSY, "no")
    assert bench.failure.limit == f"calls queued for a contract: {QUEUE_MAX}"
    assert "other hosts have fewer of them" in bench.failure.message
    assert is_slot_free(bench, newest)


def test_messages_of_a_host_that_was_sent_away_meanwhile_are_dropped(bench: Bench) -> None:
    call = bench.call()
    header = bench.header()
    bench.leave()
    assert bench.send(header) == []
    assert bench.cancel(call) == []
    assert bench.leave() == []


# -- deadlines --------------------------------------------------------------------------------------------------
def test_a_call_that_waits_at_its_deadline_fails_and_frees_its_slot(bench: Bench) -> None:
    running = bench.call(budget_us=LONG_US)
    waiting = bench.call(budget_us=10_000)
    bench.pass_ms(15)
    assert (bench.failure.call_id, bench.failure.code) == (waiting.header.call_id, DEADLINE)
    assert (bench.failure.began, bench.failure.slot) == ("no", "free")
    assert is_slot_free(bench, waiting)
    bench.done(running)
    assert not bench.has(SendCall)


def test_a_call_that_runs_at_its_deadline_fails_and_keeps_its_slot(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.begin(call)
    bench.pass_ms(55)
    assert bench.effects == [bench.failure]
    assert (bench.failure.code, bench.failure.began, bench.failure.slot) == (DEADLINE, "yes", "kept")
    assert not is_slot_free(bench, call)
    bench.done(call)
    assert bench.effects == [SendReleased(HOST, call.header.call_id)]
    assert is_slot_free(bench, call)
    assert worker.state is IDLE


def test_a_call_that_was_not_begun_at_its_deadline_is_withdrawn(bench: Bench) -> None:
    call = bench.call()
    bench.pass_ms(55)
    assert bench.failure.began == "no"
    assert bench.slot_of(call).withdrawn == call.sequence
    bench.done(call, flags=NOT_BEGUN)
    assert bench.effects == [SendReleased(HOST, call.header.call_id)]


def test_a_worker_that_refuses_a_call_past_its_deadline_says_so(bench: Bench) -> None:
    call = bench.call()
    bench.now_ns += 50 * NS_PER_MS
    bench.done(call, flags=NOT_BEGUN)
    assert (bench.failure.code, bench.failure.began, bench.failure.slot) == (DEADLINE, "no", "free")


def test_a_call_that_its_worker_refused_is_no_success_at_the_deadline(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.finish(call, flags=NOT_BEGUN)
    bench.pass_ms(55)
    assert (bench.failure.code, bench.failure.began, bench.failure.slot) == (DEADLINE, "no", "kept")
    assert worker.state is BUSY


def test_a_result_that_is_there_at_the_deadline_counts(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.begin(call)
    bench.finish(call, code=102, out_size=0, error_size=7)
    bench.pass_ms(55)
    assert bench.effects == [SendResult(call, 102, 0, 7, False)]
    bench.done(call, code=102)
    assert bench.effects == [SendReleased(HOST, call.header.call_id)]
    assert worker.state is IDLE


def test_a_call_is_answered_once_whatever_comes_later(bench: Bench) -> None:
    call = bench.call()
    bench.begin(call)
    bench.pass_ms(55)
    bench.cancel(call)
    assert not bench.effects
    bench.pass_ms(300)
    assert not bench.has(SendFailure)
    bench.finish(call)
    bench.die(bench.worker(), KILLED)
    assert of_kind(bench.effects, SendReleased) == [SendReleased(HOST, call.header.call_id)]
    assert not bench.has(SendResult)


# -- what a process is doing at a deadline ----------------------------------------------------------------------
@pytest.fixture
def overdue(bench: Bench) -> Call:
    """A call that runs and is past its deadline, and whose process is looked at."""
    bench.inspects_at_once = False
    call = bench.call()
    bench.begin(call)
    bench.slot_of(call).cpu_us = 1_000_000
    bench.pass_ms(55)
    assert bench.effects == [InspectWorker(bench.worker(), call.sequence)]
    return call


def test_a_missed_deadline_tells_what_the_process_was_doing(bench: Bench, overdue: Call) -> None:
    bench.inspected(overdue, Vitals(1_040_000, 1 << 20, "S (sleeping)", "do_sys_poll"))
    assert bench.effects == [bench.failure]
    assert (bench.failure.code, bench.failure.began, bench.failure.slot) == (DEADLINE, "yes", "kept")
    assert (bench.failure.cpu, bench.failure.state, bench.failure.wchan) == (0.04, "S (sleeping)", "do_sys_poll")
    assert (bench.failure.queued, bench.failure.ran) == (0.0, 0.055)
    assert not bench.inspected(overdue, VITALS), "it is told once"


def test_what_a_contract_has_forged_about_its_time_is_left_out(bench: Bench, overdue: Call) -> None:
    bench.inspected(overdue, Vitals(999_999, 1 << 20, "R (running)", ""))
    assert (bench.failure.cpu, bench.failure.state) == (None, "R (running)")


def test_a_host_is_told_of_its_deadline_though_nobody_answers_for_the_process(bench: Bench, overdue: Call) -> None:
    bench.pass_ms(INQUIRY_LIMIT_NS / NS_PER_MS + 4)
    assert (bench.failure.code, bench.failure.cpu, bench.failure.state) == (DEADLINE, None, "")
    assert bench.failure.ran == 0.055, "the time until it was due"
    assert not bench.inspected(overdue, VITALS)


def test_the_answer_about_another_hand_over_is_ignored(bench: Bench, overdue: Call) -> None:
    worker = bench.worker()
    assert not bench.dispatcher.worker_inspected(worker, overdue.sequence + 1, VITALS, bench.now_ns)
    assert overdue.inquiry is not None


def test_a_call_that_ends_meanwhile_is_told_late_before_its_slot_is_free(bench: Bench, overdue: Call) -> None:
    bench.done(overdue)
    assert bench.effects == [bench.failure, SendReleased(HOST, overdue.header.call_id)]
    assert bench.failure.code is DEADLINE


def test_a_call_that_marks_its_end_meanwhile_is_late_all_the_same(bench: Bench, overdue: Call) -> None:
    bench.finish(overdue)
    bench.pass_ms(1000)
    assert bench.failure.code is DEADLINE
    assert not bench.has(SendResult)


def test_a_call_that_its_worker_refuses_meanwhile_had_not_begun(bench: Bench, overdue: Call) -> None:
    bench.begin(overdue)
    bench.slot_of(overdue).begun = 0
    bench.done(overdue, flags=NOT_BEGUN)
    assert (bench.failure.began, bench.failure.cpu) == ("no", None)


def test_a_death_meanwhile_tells_what_is_known_of_the_dead(bench: Bench, overdue: Call) -> None:
    vitals = Vitals(1_050_000, 1 << 20, "R (running)", "")
    bench.die(bench.worker(), Cause(signal=9, vitals=vitals))
    assert (bench.failure.code, bench.failure.cpu, bench.failure.state) == (DEADLINE, 0.05, "R (running)")
    assert bench.only(SendReleased).call_id == overdue.header.call_id


def test_a_host_that_is_gone_is_told_nothing(bench: Bench, overdue: Call) -> None:
    bench.leave()
    assert not bench.inspected(overdue, VITALS)


def test_a_broker_that_ends_tells_what_it_was_about_to(bench: Bench, overdue: Call) -> None:
    bench.dispatcher.drain()
    assert bench.dispatcher.owes
    bench.effects = bench.dispatcher.cancel_all(bench.now_ns)
    assert bench.failure.code is DEADLINE
    assert not bench.dispatcher.owes


def test_the_process_of_a_doomed_worker_is_not_looked_at(bench: Bench, worker: Worker) -> None:
    bench.inspects_at_once = False
    call = bench.call()
    bench.begin(call)
    bench.lose(worker)
    bench.pass_ms(55)
    assert bench.effects == [bench.failure]
    assert bench.failure.code is DEADLINE


# -- how long a call may run ------------------------------------------------------------------------------------
def test_a_short_deadline_does_not_cost_the_worker(bench: Bench, worker: Worker) -> None:
    call = bench.call(budget_us=1_000)
    bench.begin(call)
    bench.pass_ms(10)
    assert bench.has(SendFailure)
    assert worker.state is BUSY
    bench.pass_ms(280)
    assert not bench.effects
    bench.pass_ms(20)
    assert bench.only(KillWorker).worker is worker


def test_a_call_that_ran_long_costs_its_worker_at_the_deadline() -> None:
    bench = Bench(spares=0)
    worker = bench.serve(deadline_us=200_000, run_limit_us=LONG_US)
    bench.begin(bench.call())
    bench.pass_ms(205)
    assert bench.only(KillWorker).worker is worker
    assert worker.verdict == "it ran 0x0000000000000001 fn 7 for 0.205 s"


def test_calls_that_wait_get_another_worker_before_the_doomed_one_is_dead() -> None:
    bench = Bench(spares=1)
    worker = bench.serve(deadline_us=LONG_US, run_limit_us=100_000)
    bench.ready()
    bench.begin(bench.call())
    waiting = bench.call()
    bench.pass_ms(105)
    assert bench.only(KillWorker).worker is worker
    new = bench.load_next()
    assert bench.sent == (new, waiting)


def test_the_run_limit_ends_a_call_before_its_deadline() -> None:
    bench = Bench(spares=0)
    worker = bench.serve(deadline_us=LONG_US, run_limit_us=20_000)
    call = bench.call()
    bench.begin(call)
    bench.pass_ms(25)
    assert (bench.failure.code, bench.failure.limit) == (DEADLINE, "run_limit 0.02 s")
    assert bench.only(KillWorker).worker is worker
    bench.die(worker, KILLED)
    assert bench.only(SendReleased).call_id == call.header.call_id


def test_a_worker_that_has_not_begun_is_not_killed_at_the_deadline_but_at_the_run_limit() -> None:
    bench = Bench(spares=0)
    worker = bench.serve(deadline_us=200_000, run_limit_us=400_000)
    bench.call()
    bench.pass_ms(205)
    assert bench.failure.began == "no"
    assert worker.state is BUSY
    bench.pass_ms(200)
    assert bench.only(KillWorker).worker is worker


def test_a_worker_that_has_finished_is_given_time_to_say_so_once() -> None:
    bench = Bench(spares=0)
    worker = bench.serve(deadline_us=LONG_US, run_limit_us=150_000)
    liar = bench.call()
    bench.begin(liar)
    bench.finish(liar)
    bench.pass_ms(155)
    assert bench.result.slot_free is False
    assert worker.state is BUSY
    bench.pass_ms(SILENCE_MAX_NS / NS_PER_MS - 10)
    assert worker.state is BUSY
    bench.pass_ms(20)
    assert bench.only(KillWorker).worker is worker


def test_a_mark_that_lies_buys_a_call_no_more_than_its_run_limit() -> None:
    bench = Bench(spares=0)
    worker = bench.serve(deadline_us=100_000, run_limit_us=1_000_000)
    call = bench.call()
    bench.begin(call)
    bench.finish(call)
    bench.pass_ms(105)
    assert bench.result.slot_free is False
    for _ in range(9):
        bench.pass_ms(105)
        assert worker.state is BUSY
    bench.pass_ms(105)
    assert worker.state is DOOMED


# -- cancelling -------------------------------------------------------------------------------------------------
def test_a_cancelled_call_that_waits_leaves_the_queue(bench: Bench) -> None:
    running, waiting = bench.call(), bench.call()
    bench.cancel(waiting)
    assert (bench.failure.code, bench.failure.began) == (AbiErrorCode.CANCELLED, "no")
    assert is_slot_free(bench, waiting)
    bench.done(running)
    assert not bench.has(SendCall)


def test_a_cancelled_call_that_runs_keeps_its_slot_and_its_worker(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.begin(call)
    bench.cancel(call)
    assert bench.effects == [bench.failure]
    assert (bench.failure.code, bench.failure.began, bench.failure.slot) == (AbiErrorCode.CANCELLED, "yes", "kept")
    assert worker.state is BUSY


def test_a_cancelled_call_that_has_run_long_costs_its_worker_and_others_get_a_new_one() -> None:
    bench = Bench(spares=1)
    worker = bench.serve(deadline_us=LONG_US, run_limit_us=LONG_US)
    bench.ready()
    call = bench.call()
    bench.begin(call)
    bench.call()
    bench.now_ns += KILL_AFTER_NS
    bench.cancel(call)
    assert bench.only(KillWorker).worker is worker
    bench.only(LoadWorker)


def test_cancelling_what_has_a_result_relays_it_and_spares_the_worker() -> None:
    bench = Bench(spares=0)
    worker = bench.serve(deadline_us=LONG_US, run_limit_us=LONG_US)
    call = bench.call()
    bench.begin(call)
    bench.finish(call)
    bench.now_ns += KILL_AFTER_NS
    bench.cancel(call)
    assert bench.effects == [SendResult(call, 0, 8, 0, False)]
    assert worker.state is BUSY


def test_cancelling_a_call_that_is_not_in_flight_tells_that_its_slot_is_free(bench: Bench, worker: Worker) -> None:
    assert bench.dispatcher.call_cancelled(HOST, 999, bench.now_ns) == [SendReleased(HOST, 999)]
    call = bench.call()
    bench.done(call)
    assert bench.cancel(call) == [SendReleased(HOST, call.header.call_id)]


def test_cancelling_a_call_twice_tells_once_that_its_slot_is_free(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.cancel(call)
    assert bench.cancel(call) == []
    bench.done(call)
    assert bench.has(SendReleased)


# -- deaths of workers ------------------------------------------------------------------------------------------
def test_death_of_a_worker_fails_only_its_own_call(bench: Bench, worker: Worker) -> None:
    running, waiting = bench.call(), bench.call()
    bench.begin(running)
    bench.die(worker, SEGFAULT)
    assert (bench.failure.call_id, bench.failure.code) == (running.header.call_id, AbiErrorCode.WORKER_CRASHED)
    assert (bench.failure.signal, bench.failure.began, bench.failure.slot) == (11, "yes", "free")
    new = bench.load_next()
    assert bench.sent == (new, waiting)


def test_a_call_that_was_not_begun_goes_to_another_worker_first_of_all(bench: Bench, worker: Worker) -> None:
    running, waiting = bench.call(), bench.call()
    bench.die(worker, SEGFAULT)
    assert not bench.has(SendFailure)
    assert running.sent_ns == 0
    new = bench.load_next()
    assert bench.sent == (new, running)
    bench.done(running)
    assert bench.sent.call is waiting


def test_a_call_that_was_not_begun_twice_is_not_sent_again(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.die(worker, KILLED)
    bench.die(bench.load_next(), Cause(exit_code=0))
    assert (bench.failure.code, bench.failure.began) == (AbiErrorCode.WORKER_CRASHED, "no")
    assert (bench.failure.exit_code, bench.failure.signal) == (0, None)
    assert is_slot_free(bench, call)


def test_a_call_that_comes_back_goes_to_an_idle_worker_at_once() -> None:
    bench = Bench(spares=0)
    bench.serve(workers=2, stateless=True)
    first, second = bench.call(), bench.call()
    other = bench.load_next()
    bench.done(second)
    assert first.worker is not None
    bench.die(first.worker, KILLED)
    assert bench.sent == (other, first)


def test_a_call_that_comes_back_keeps_its_deadline(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.pass_ms(30)
    bench.die(worker, KILLED)
    bench.pass_ms(25)
    assert (bench.failure.code, bench.failure.ran) == (DEADLINE, 0.0)
    assert is_slot_free(bench, call)


def test_a_result_that_was_not_heard_before_the_death_is_relayed(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.begin(call)
    bench.finish(call, out_size=8)
    bench.die(worker, SEGFAULT)
    assert of_kind(bench.effects, SendResult) == [SendResult(call, 0, 8, 0, True)]
    assert not bench.has(SendFailure)


def test_a_refusal_that_was_not_heard_before_the_death_counts(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.finish(call, flags=NOT_BEGUN)
    bench.die(worker, KILLED)
    assert (bench.failure.code, bench.failure.began) == (DEADLINE, "no")


def test_marks_of_earlier_calls_in_the_same_slot_prove_nothing(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    slot = bench.slot_of(call)
    slot.begun = slot.done = call.sequence - 1
    bench.die(worker, KILLED)
    assert not bench.has(SendResult)
    assert not bench.has(SendFailure)


def test_the_death_of_a_worker_whose_call_was_answered_releases_the_slot(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.begin(call)
    bench.cancel(call)
    bench.die(worker, KILLED)
    assert of_kind(bench.effects, SendReleased) == [SendReleased(HOST, call.header.call_id)]
    assert is_slot_free(bench, call)


def test_death_by_the_workers_own_timer_is_a_missed_deadline(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.begin(call)
    bench.die(worker, Cause(signal=14))
    assert (bench.failure.code, bench.failure.limit) == (DEADLINE, "the worker's own timer")
    assert is_slot_free(bench, call)


def test_the_death_of_an_idle_worker_is_not_noticed(bench: Bench, worker: Worker) -> None:
    bench.die(worker, KILLED)
    assert not bench.has(SendFailure)
    call = bench.call()
    new = bench.load_next()
    assert bench.sent == (new, call)


def test_nothing_a_dead_worker_is_told_matters(bench: Bench, worker: Worker) -> None:
    bench.die(worker, KILLED)
    assert worker.state is DOOMED
    assert bench.lose(worker) == []


# -- workers that must go ---------------------------------------------------------------------------------------
def test_a_worker_that_asks_to_retire_is_replaced(bench: Bench, worker: Worker) -> None:
    running, waiting = bench.call(), bench.call()
    bench.done(running, code=258, flags=RETIRE)
    failure = bench.only(SendFailure)
    assert (failure.code, failure.began, failure.slot) == (AbiErrorCode.OUT_OF_MEMORY, "yes", "free")
    assert bench.only(KillWorker).worker is worker
    bench.load_next()
    assert bench.sent.call is waiting


@pytest.mark.parametrize("offset", [-1, 1, 1000])
def test_an_answer_for_another_call_costs_the_worker_and_answers_nothing(
    bench: Bench, worker: Worker, offset: int
) -> None:
    call = bench.call()
    forged = Done(call.sequence + offset, 0, 8, 0, 0)
    bench.effects = bench.dispatcher.worker_done(worker, forged, bench.now_ns)
    assert not bench.has(SendResult)
    assert bench.only(KillWorker).worker is worker
    assert not call.answered


def test_a_second_answer_costs_the_worker(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.done(call)
    bench.done(call)
    assert bench.only(KillWorker).worker is worker
    assert not bench.has(SendResult)


def test_a_doomed_worker_that_answers_still_answers_for_its_call(bench: Bench, worker: Worker) -> None:
    running, waiting = bench.call(), bench.call()
    bench.lose(worker)
    bench.done(running)
    assert bench.effects == [SendResult(running, 0, 8, 0, True)]
    new = bench.load_next()
    assert bench.sent == (new, waiting)


def test_a_worker_that_closes_its_channel_is_killed_before_its_slot_is_touched(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.begin(call)
    bench.lose(worker)
    assert of_kind(bench.effects, KillWorker) == [KillWorker(worker)]
    assert not is_slot_free(bench, call)
    bench.die(worker, KILLED)
    assert bench.failure.code is AbiErrorCode.WORKER_CRASHED
    assert "(killed: it closed its descriptors)" in bench.failure.message


def test_a_call_whose_worker_host_is_gone_says_so(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.begin(call)
    bench.effects = bench.dispatcher.worker_host_left(bench.now_ns)
    assert not bench.effects
    bench.die(worker, UNKNOWN)
    assert "(killed: its worker host is gone)" in bench.failure.message


# -- contracts that go or are replaced meanwhile ------------------------------------------------------------------
def test_when_a_contract_is_unregistered_waiting_calls_fail_and_the_running_one_ends(
    bench: Bench, worker: Worker
) -> None:
    running, waiting = bench.call(), bench.call()
    bench.unregister()
    assert (bench.failure.call_id, bench.failure.code) == (
        waiting.header.call_id,
        AbiErrorCode.HOST_CONTRACT_NOT_FOUND,
    )
    assert not bench.has(KillWorker)
    bench.done(running)
    assert bench.has(SendResult)
    assert bench.only(KillWorker).worker is worker


def test_a_call_that_comes_back_to_an_unregistered_contract_fails(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.unregister()
    bench.die(worker, KILLED)
    assert (bench.failure.code, bench.failure.slot) == (AbiErrorCode.HOST_CONTRACT_NOT_FOUND, "free")
    assert is_slot_free(bench, call)


def test_a_call_that_comes_back_to_a_replaced_contract_goes_to_its_successor(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    new = bench.serve(replace=True)
    bench.die(worker, KILLED)
    assert bench.sent == (new, call)
    assert call.contract is bench.catalogue.serving[CONTRACT]


def test_a_call_does_not_come_back_to_what_is_private_to_another_host(bench: Bench, worker: Worker) -> None:
    bench.call()
    bench.unregister()
    bench.serve(CONTRACT, OTHER_HOST, private=True)
    bench.die(worker, KILLED)
    assert bench.failure.code is AbiErrorCode.HOST_CONTRACT_NOT_FOUND


def test_a_call_that_comes_back_while_its_contract_backs_off_waits_for_that(bench: Bench) -> None:
    bench.serve(2, workers=2, stateless=True, deadline_us=LONG_US, run_limit_us=LONG_US)
    running, waiting = bench.call(2), bench.call(2)
    bench.loaded(bench.load_start(), "load", "oops")
    assert running.worker is not None
    bench.die(running.worker, KILLED)
    assert not bench.has(LoadWorker)
    bench.pass_ms(20)
    bench.load_next()
    assert bench.sent.call is running
    assert waiting.state.value == "queued"


def test_calls_that_fail_with_a_load_do_not_expire_as_well() -> None:
    bench = Bench(spares=0)
    bench.die(bench.serve(deadline_us=LONG_US), KILLED)
    calls = [bench.call(budget_us=5_000_000) for _ in range(3)]
    bench.ready()
    bench.pass_ms(5_010)
    assert [failure.kind for failure in of_kind(bench.effects, SendFailure)] == ["ContractLoadFailed"] * len(calls)


# -- hosts that leave -------------------------------------------------------------------------------------------
def test_when_a_host_leaves_its_waiting_calls_go_and_its_running_one_ends(bench: Bench, worker: Worker) -> None:
    running, waiting, other = bench.call(), bench.call(), bench.call(host=OTHER_HOST)
    bench.leave()
    assert not bench.effects, "nobody to tell, and the pair is in use"
    assert is_slot_free(bench, waiting)
    bench.done(running)
    assert [type(effect) for effect in bench.effects] == [DropPair, SendCall]
    assert bench.sent.call is other


def test_the_memory_of_a_host_that_left_is_dropped_when_its_worker_is_dead(bench: Bench, worker: Worker) -> None:
    call = bench.call()
    bench.begin(call)
    bench.leave()
    bench.pass_ms(305)
    assert bench.only(KillWorker).worker is worker
    assert not bench.has(DropPair)
    bench.die(worker, KILLED)
    assert bench.only(DropPair).pair is call.pair
    assert not bench.has(SendReleased)
    assert bench.books.total_bytes == 0


def test_the_idle_memory_of_a_host_that_left_is_dropped_at_once(bench: Bench) -> None:
    pair = bench.lease()
    bench.leave()
    assert bench.effects == [DropPair(pair)]


# -- the whole --------------------------------------------------------------------------------------------------
def test_at_rest_there_is_nothing_to_wait_for(bench: Bench) -> None:
    for _ in range(3):
        bench.done(bench.call())
    bench.pass_ms(5_010)
    assert bench.dispatcher.next_deadline() is None


def test_the_next_deadline_is_that_of_the_next_call(bench: Bench) -> None:
    bench.pass_ms(0)  # it has looked around
    bench.call(budget_us=20_000)
    next_ns = bench.dispatcher.next_deadline()
    assert next_ns is not None
    assert 20 <= (next_ns - bench.now_ns) / NS_PER_MS <= 24


# -- the end ----------------------------------------------------------------------------------------------------
def test_a_draining_broker_finishes_what_it_has_and_takes_nothing_new(bench: Bench, worker: Worker) -> None:
    running, waiting = bench.call(), bench.call()
    late = bench.header()
    bench.dispatcher.drain()
    assert bench.dispatcher.owes
    bench.send(late)
    assert (bench.failure.code, bench.failure.slot) == (AbiErrorCode.UNAVAILABLE, "unused")
    bench.register(2)
    assert bench.only(SendReply).kind == "Unavailable"
    assert bench.dispatcher.quick_call(HOST, late, bench.now_ns) is None
    bench.done(running)
    assert bench.dispatcher.owes
    bench.done(waiting)
    assert not bench.dispatcher.owes
    assert bench.dispatcher.is_draining


def test_a_registration_under_way_is_owed_an_answer(bench: Bench) -> None:
    bench.register(2)
    bench.dispatcher.drain()
    assert bench.dispatcher.owes
    bench.load_next()
    assert not bench.dispatcher.owes


def test_who_waits_at_the_end_of_a_drain_is_told(bench: Bench, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    running, waiting = bench.call(), bench.call()
    bench.begin(running)
    bench.dispatcher.drain()
    failures = of_kind(bench.dispatcher.cancel_all(bench.now_ns), SendFailure)
    told = {failure.call_id: (failure.code, failure.began, failure.slot) for failure in failures}
    assert told == {
        running.header.call_id: (AbiErrorCode.CANCELLED, "yes", "kept"),
        waiting.header.call_id: (AbiErrorCode.CANCELLED, "no", "free"),
    }
    assert "shutting down" in failures[0].message
    assert not bench.dispatcher.owes
    assert bench.dispatcher.cancel_all(bench.now_ns) == []


def test_a_result_that_is_there_at_the_end_of_a_drain_is_relayed(bench: Bench, worker: Worker) -> None:
    running = bench.call()
    bench.finish(running)
    bench.effects = bench.dispatcher.cancel_all(bench.now_ns)
    assert bench.result.call is running
    assert not bench.has(SendFailure)


# -- quarantine -------------------------------------------------------------------------------------------------
def crash(bench: Bench, host: bytes = HOST, cause: Cause = SEGFAULT, times: int = CRASHES_MAX) -> None:
    for _ in range(times):
        call = bench.call(host=host)
        if call.worker is None:
            bench.load_next()
        bench.begin(call)
        assert call.worker is not None
        bench.die(call.worker, cause)


def test_a_contract_that_crashes_rests_for_its_host_and_one_call_tries(bench: Bench) -> None:
    crash(bench)
    assert "contract quarantined" in [each.event for each in of_kind(bench.effects, Record)]
    bench.send(bench.header())
    assert (bench.failure.code, bench.failure.slot) == (AbiErrorCode.QUARANTINED, "unused")
    assert bench.failure.retry_after == 1.0
    other = bench.call(host=OTHER_HOST)
    bench.load_next()
    bench.done(other)
    bench.pass_ms(1_100)
    trial = bench.call()
    bench.send(bench.header())
    assert bench.failure.code is AbiErrorCode.QUARANTINED
    bench.done(trial)
    bench.done(bench.call())
    assert not trial.contract.quarantine.is_in_force
    assert trial.contract.quick_budget_us > 0


def test_calls_that_wait_rest_too(bench: Bench) -> None:
    crash(bench, times=CRASHES_MAX - 1)
    running = bench.call()
    worker = bench.load_next()
    waiting, other = bench.call(), bench.call(host=OTHER_HOST)
    bench.begin(running)
    bench.die(worker, SEGFAULT)
    codes = [(each.call_id, each.code) for each in of_kind(bench.effects, SendFailure)]
    assert set(codes) == {
        (running.header.call_id, AbiErrorCode.WORKER_CRASHED),
        (waiting.header.call_id, AbiErrorCode.QUARANTINED),
    }
    bench.load_next()
    assert other.worker is not None


def test_calls_that_were_handed_ahead_rest_too() -> None:
    bench = Bench(spares=0, window=8)
    bench.serve()
    crash(bench, times=CRASHES_MAX - 1)
    running, ahead = bench.call(), bench.call()
    worker = bench.load_next()
    bench.begin(running)
    bench.die(worker, SEGFAULT)
    assert ahead.state is not None
    assert ahead.answered


def test_kills_from_outside_are_no_reason_to_rest(bench: Bench) -> None:
    crash(bench, cause=KILLED, times=3 * CRASHES_MAX)
    bench.call()


def test_a_call_that_crashes_after_its_deadline_counts_too(bench: Bench) -> None:
    for _ in range(CRASHES_MAX):
        call = bench.call(budget_us=20_000)
        if call.worker is None:
            bench.load_next()
        bench.begin(call)
        bench.pass_ms(30)
        assert call.answered
        assert call.worker is not None
        bench.die(call.worker, SEGFAULT)
    bench.send(bench.header())
    assert bench.failure.code is AbiErrorCode.QUARANTINED


def test_kills_at_the_run_limit_count(bench: Bench) -> None:
    bench.serve(2, deadline_us=300_000, run_limit_us=50_000)
    for _ in range(CRASHES_MAX):
        call = bench.call(2)
        if call.worker is None:
            bench.load_next()
        bench.begin(call)
        bench.pass_ms(60)
        assert call.worker is not None
        bench.die(call.worker, KILLED)
    bench.send(bench.header(2))
    assert bench.failure.code is AbiErrorCode.QUARANTINED


def test_a_contract_that_is_revived_is_called_at_once(bench: Bench) -> None:
    crash(bench)
    contract = bench.catalogue.serving[CONTRACT]
    effects: list[Effect] = []
    assert bench.catalogue.revive(contract, bench.now_ns, effects)
    assert not bench.catalogue.revive(contract, bench.now_ns, effects)
    bench.call()


def test_a_call_that_was_not_begun_tries_when_the_rest_is_over(bench: Bench) -> None:
    crash(bench)
    bench.pass_ms(1_100)
    trial = bench.call()
    worker = bench.load_next()
    bench.die(worker, KILLED)
    bench.load_next()
    assert trial.worker is not None
    assert trial.contract.quarantine.is_trial(trial)


def test_calls_in_flight_per_host_are_bounded_for_a_contract(bench: Bench) -> None:
    bench.serve(2, max_in_flight=2)
    bench.call(2)
    bench.call(2)
    bench.send(bench.header(2))
    assert bench.failure.limit == "calls in flight per host for this contract: 2"
    assert bench.failure.retry_after
    bench.call(1)
    bench.call(2, host=OTHER_HOST)
