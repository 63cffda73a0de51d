"""Which calls the dispatcher puts on record, and when: before their slots can be used again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from luacell.broker.causes import UNKNOWN, Cause
from luacell.broker.model import Call, DropPair, KillWorker, RecordCrash, SendFailure, SendReleased, Worker
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.headers import NOT_BEGUN, PROCESS_FULL, RETIRE
from tests.broker.bench import HOST, KILLED, SEGFAULT, VITALS, Bench, of_kind

CRASHED, LATE, SPENT = AbiErrorCode.WORKER_CRASHED, AbiErrorCode.DEADLINE_EXCEEDED, AbiErrorCode.OUT_OF_MEMORY


@pytest.fixture
def bench() -> Bench:
    return Bench()


def running(bench: Bench, **settings: Any) -> Call:
    """A call that its worker has begun."""
    bench.serve(**settings)
    call = bench.call()
    bench.begin(call)
    return call


def worker_of(call: Call) -> Worker:
    assert call.worker is not None
    return call.worker


def place(bench: Bench, kind: type[object]) -> int:
    """Where in the effects of the last event the one of a kind stands."""
    (number,) = [number for number, effect in enumerate(bench.effects) if isinstance(effect, kind)]
    return number


def test_a_crash_is_put_on_record_before_its_host_is_told(bench: Bench) -> None:
    call = running(bench)
    bench.now_ns += 30_000_000
    cause = replace(SEGFAULT, last_words="bye", vitals=VITALS._replace(cpu_us=20_000))
    bench.die(worker_of(call), cause)
    crash = bench.only(RecordCrash)
    assert crash == (call, CRASHED, "signal 11 (SIGSEGV)", 11, None, 0.0, 0.03, 0.02, "bye")
    assert place(bench, RecordCrash) < place(bench, SendFailure)


def test_a_crash_of_a_host_that_gave_its_memory_back_is_put_on_record_before_that_goes(bench: Bench) -> None:
    call = running(bench)
    assert not bench.books.retire(call.pair)
    bench.die(worker_of(call), SEGFAULT)
    assert place(bench, RecordCrash) < place(bench, DropPair)


def test_a_call_that_was_killed_at_its_limit_is_put_on_record_when_its_worker_is_dead(bench: Bench) -> None:
    call = running(bench, run_limit_us=200_000)
    bench.pass_ms(210)
    assert bench.failure.code is LATE
    assert not bench.has(RecordCrash)
    bench.die(worker_of(call), KILLED)
    crash = bench.only(RecordCrash)
    assert (crash.code, crash.signal) == (LATE, 9)
    assert crash.cause == "signal 9 (SIGKILL) (killed: it ran 0x0000000000000001 fn 7 for 0.210 s)"
    assert place(bench, RecordCrash) < place(bench, SendReleased)


def test_a_call_that_crashes_after_its_deadline_was_told_its_code_then(bench: Bench) -> None:
    bench.serve()
    call = bench.call(budget_us=10_000)
    bench.begin(call)
    bench.pass_ms(20)
    assert not bench.has(KillWorker)
    bench.die(worker_of(call), SEGFAULT)
    assert (bench.only(RecordCrash).code, bench.only(RecordCrash).cause) == (LATE, "signal 11 (SIGSEGV)")


def test_the_workers_own_timer_is_a_deadline(bench: Bench) -> None:
    call = running(bench)
    bench.die(worker_of(call), Cause(signal=14))
    assert bench.only(RecordCrash).code is LATE


def test_a_call_that_runs_out_of_memory_is_put_on_record_once(bench: Bench) -> None:
    call = running(bench, memory=32 << 20)
    worker = worker_of(call)
    bench.done(call, code=int(SPENT), flags=RETIRE)
    crash = bench.only(RecordCrash)
    assert (crash.code, crash.cause, crash.signal, crash.stderr) == (SPENT, "out of memory: 32 MiB", None, None)
    assert place(bench, RecordCrash) < place(bench, SendFailure)
    bench.die(worker, KILLED)
    assert not bench.has(RecordCrash)


def test_which_memory_it_was_that_ran_out_is_told_and_put_on_record(bench: Bench) -> None:
    call = running(bench, memory=32 << 20, max_rss=100 << 20)
    bench.done(call, code=int(SPENT), flags=RETIRE | PROCESS_FULL)
    assert bench.only(RecordCrash).cause == "out of memory: 200 MiB in its process"
    assert bench.only(SendFailure).limit == "process memory 200 MiB"


def test_a_call_whose_answer_is_found_in_its_slot_is_not_put_on_record(bench: Bench) -> None:
    call = running(bench)
    bench.finish(call)
    bench.die(worker_of(call), SEGFAULT)
    assert not bench.has(RecordCrash)


@pytest.mark.parametrize("cause", [SEGFAULT, KILLED, UNKNOWN])
def test_a_call_that_had_not_begun_is_not_put_on_record(bench: Bench, cause: Cause) -> None:
    worker = bench.serve()
    bench.call()
    bench.die(worker, cause)
    assert not bench.has(RecordCrash)


def test_a_call_that_was_cancelled_is_not_put_on_record(bench: Bench) -> None:
    call = running(bench)
    bench.cancel(call)
    bench.die(worker_of(call), SEGFAULT)
    assert not bench.has(RecordCrash)


def test_a_call_whose_host_is_gone_is_not_put_on_record(bench: Bench) -> None:
    call = running(bench)
    bench.leave(HOST)
    bench.die(worker_of(call), SEGFAULT)
    assert not bench.has(RecordCrash)


def test_crashes_of_private_contracts_are_not_put_on_record(bench: Bench) -> None:
    call = running(bench, private=True)
    bench.die(worker_of(call), SEGFAULT)
    assert bench.failure.code is CRASHED
    assert not bench.has(RecordCrash)


def test_private_contracts_that_run_out_of_memory_are_not_put_on_record(bench: Bench) -> None:
    call = running(bench, private=True)
    bench.done(call, code=int(SPENT), flags=RETIRE)
    assert bench.failure.code is SPENT
    assert not bench.has(RecordCrash)


def test_what_dies_with_its_worker_host_is_not_put_on_record(bench: Bench) -> None:
    call = running(bench)
    bench.dispatcher.worker_host_left(bench.now_ns)
    bench.die(worker_of(call), UNKNOWN)
    assert bench.failure.code is CRASHED
    assert not bench.has(RecordCrash)


def test_the_call_on_record_is_the_one_that_ran() -> None:
    bench = Bench(window=2)
    worker = bench.serve()
    first, second, third = bench.call(), bench.call(), bench.call()
    bench.finish(first, flags=NOT_BEGUN)
    bench.begin(second)
    bench.slot_of(third).begun = third.sequence  # a lie: nothing begins before the one ahead of it has ended
    bench.die(worker, SEGFAULT)
    (crash,) = of_kind(bench.effects, RecordCrash)
    assert crash.call is second


def test_a_call_is_on_record_behind_one_that_was_answered_unbegun() -> None:
    bench = Bench(window=1)
    worker = bench.serve()
    first, second = bench.call(), bench.call()
    bench.cancel(first)
    bench.begin(second)  # it has passed the first one by, and could not say so
    bench.die(worker, SEGFAULT)
    assert bench.only(RecordCrash).call is second
