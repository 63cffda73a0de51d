"""Recycling: who follows a worn worker, when it goes, and whatever can come in between."""

from __future__ import annotations

import pytest

from luacell.broker.model import (
    BUSY,
    DOOMED,
    IDLE,
    LEAVING,
    RESTORING,
    SAVING,
    KillWorker,
    LoadWorker,
    Record,
    RestoreState,
    SaveState,
    SendCall,
    Worker,
)
from luacell.broker.registry import ContractRecord
from luacell.broker.workforce import backoff_ns
from luacell.protocol.headers import RECYCLE, RETIRE
from luacell.protocol.limits import NS_PER_MS
from luacell.protocol.messages import API_MODULE, Settings
from tests.broker.bench import CONTRACT, SEGFAULT, Bench, of_kind


class RecyclingBench(Bench):
    """A bench that sees what is recorded."""

    def events(self) -> list[tuple[str, str]]:
        """Return what was recorded by the last event about recycling and state, and why."""
        records = of_kind(self.effects, Record)
        return [(each.event, each.fields.get("limit", "")) for each in records if each.event != "worker died"]

    def worn(self) -> Worker:
        """Have the contract's worker say that it is worn; return it."""
        call = self.call()
        worker = call.worker
        assert worker is not None
        self.done(call, flags=RECYCLE)
        return worker


def test_the_successor_loads_first_and_the_old_worker_goes_when_it_is_idle() -> None:
    bench = RecyclingBench()
    bench.serve(stateless=True, max_calls=1)
    old = bench.worn()
    new = bench.load_start()
    assert old.state is IDLE
    assert new is not old
    call = bench.call()
    assert call.worker is old
    bench.done(call, flags=RECYCLE)
    assert not bench.has(KillWorker)
    bench.loaded(new)
    assert bench.only(KillWorker).worker is old
    assert old.verdict == "it was recycled"
    assert bench.events() == [("worker recycled", "max_calls 1")]
    assert bench.call().worker is new


def test_what_the_old_worker_holds_ends_and_it_gets_no_more() -> None:
    bench = RecyclingBench(window=4)
    bench.serve(stateless=True)
    first, second, third = bench.call(), bench.call(), bench.call()
    old = first.worker
    assert old is not None
    bench.done(first, flags=RECYCLE)
    new = bench.load_next()
    assert bench.events() == [("worker recycled", "max_rss")]
    assert (old.state, new.state) == (LEAVING, IDLE)
    later = bench.call()
    assert later.worker is new
    bench.done(second, flags=RECYCLE)
    assert bench.dispatcher.refill(old, bench.now_ns) == []
    bench.done(third)
    assert bench.only(KillWorker).worker is old
    bench.done(later)
    assert new.state is IDLE


def test_calls_that_wait_are_the_successor_s() -> None:
    bench = RecyclingBench()
    bench.serve(stateless=True)
    old = bench.worn()
    new = bench.load_start()
    running, waiting = bench.call(), bench.call()
    assert running.worker is old
    bench.loaded(new)
    assert bench.sent == SendCall(new, waiting)
    assert (old.state, new.state) == (LEAVING, BUSY)
    bench.done(waiting)
    assert new.state is IDLE


def test_one_worker_of_a_contract_is_recycled_at_a_time() -> None:
    bench = RecyclingBench(spares=3)
    bench.serve(stateless=True, workers=2)
    first, second = bench.call(), bench.call()
    bench.load_next()
    a, b = first.worker, second.worker
    assert a is not None
    assert b is not None
    bench.done(first, flags=RECYCLE)
    loading = bench.load_start()
    bench.done(second, flags=RECYCLE)
    assert not bench.has(LoadWorker)
    bench.loaded(loading)
    assert (a.state, b.state) == (DOOMED, IDLE)


def test_the_old_worker_serves_on_when_its_successor_does_not_load() -> None:
    bench = RecyclingBench(spares=2)
    bench.serve(stateless=True)
    old = bench.worn()
    bench.loaded(bench.load_start(), "load", "no such module")
    call = bench.call()
    assert call.worker is old
    bench.done(call, flags=RECYCLE)
    assert old.state is IDLE
    bench.pass_ms(backoff_ns(1) / NS_PER_MS + 5)
    bench.load_next()
    assert old.state is DOOMED


def test_a_successor_that_dies_is_followed_by_another() -> None:
    bench = RecyclingBench(spares=2)
    bench.serve(stateless=True)
    old = bench.worn()
    bench.die(bench.load_start(), SEGFAULT)
    assert old.state is IDLE
    bench.load_next()
    assert old.state is DOOMED


def test_a_worn_worker_that_dies_needs_no_leave() -> None:
    bench = RecyclingBench(spares=2)
    bench.serve(stateless=True)
    old = bench.worn()
    new = bench.load_start()
    bench.die(old, SEGFAULT)
    bench.loaded(new)
    assert new.state is IDLE
    assert bench.events() == []


def test_a_contract_that_goes_takes_both() -> None:
    bench = RecyclingBench()
    bench.serve(stateless=True)
    old = bench.worn()
    new = bench.load_start()
    bench.unregister()
    assert {each.worker for each in of_kind(bench.effects, KillWorker)} == {old, new}


def test_an_answer_of_a_worker_whose_contract_is_gone_begins_nothing() -> None:
    bench = RecyclingBench()
    bench.serve(stateless=True)
    call = bench.call()
    bench.unregister()
    bench.done(call, flags=RECYCLE)
    assert not bench.has(LoadWorker)


def test_where_no_worker_more_may_be_the_old_one_serves_on_which_is_said_once() -> None:
    bench = RecyclingBench(spares=0)
    old = bench.serve(stateless=True)
    bench.workforce.workers_max = 1
    bench.worn()
    assert [event for event, _ in bench.events()] == ["worker not recycled"]
    bench.worn()
    assert bench.events() == []
    bench.workforce.workers_max = 2
    bench.worn()
    bench.load_next()
    assert old.state is DOOMED


def test_a_worker_at_the_hard_bound_is_not_used_again() -> None:
    bench = RecyclingBench()
    old = bench.serve(stateless=True)
    call = bench.call()
    bench.done(call, flags=RETIRE)
    assert bench.result.code == 0
    assert bench.only(KillWorker).worker is old
    assert "twice" in old.verdict or "2 times" in old.verdict


def test_the_loss_of_state_is_recorded() -> None:
    bench = RecyclingBench()
    bench.serve(max_calls=1)
    bench.worn()
    bench.load_next()
    assert [event for event, _ in bench.events()] == ["worker recycled", "state not carried over"]


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_singleton_s_state_goes_to_its_successor(is_busy: bool) -> None:
    bench = RecyclingBench()
    bench.register()
    old = bench.load_start()
    bench.loaded(old, saves=True, restores=True)
    bench.worn()
    new = bench.load_start()
    running = bench.call() if is_busy else None
    bench.loaded(new, saves=True, restores=True)
    later = bench.call()
    assert later.worker is None
    if running is not None:
        assert old.state is LEAVING
        bench.done(running, flags=RECYCLE)
        assert bench.only(SaveState).worker is old
    assert (old.state, new.state) == (SAVING, RESTORING)
    bench.effects = bench.dispatcher.worker_saved(old, b"state", "", bench.now_ns)
    assert bench.only(RestoreState) == RestoreState(new, b"state")
    bench.effects = bench.dispatcher.worker_restored(new, "", bench.now_ns)
    assert bench.sent == SendCall(new, later)


def test_a_seat_s_worker_is_followed_in_its_seat() -> None:
    bench = RecyclingBench(spares=3)
    record = ContractRecord(CONTRACT, "", None, b"", "=f", {API_MODULE: b""}, Settings(workers=2, stateless=True))
    bench.register_record(record)
    old = bench.load_next()
    call = bench.call()
    assert call.worker is old
    place = call.contract
    bench.done(call, flags=RECYCLE)
    new = bench.load_next()
    assert (new.contract, old.state) == (place, DOOMED)
