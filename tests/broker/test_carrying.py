"""State of singletons, carried from a worker to the one that follows it, and whatever can come in between."""

from __future__ import annotations

import pytest

from luacell.broker import carrying
from luacell.broker.model import (
    BUSY,
    DOOMED,
    IDLE,
    LEAVING,
    RESTORING,
    SAVING,
    KillWorker,
    Record,
    RestoreState,
    SaveState,
    SendCall,
    SendFailure,
    Worker,
)
from luacell.protocol.limits import CARRY_LIMIT_NS, NS_PER_MS
from tests.broker.bench import CONTRACT, SEGFAULT, Bench, of_kind

LIMIT_MS = CARRY_LIMIT_NS // NS_PER_MS


class StateBench(Bench):
    """A bench whose contracts have state."""

    def keep(self, *, replace: bool = False, saves: bool = True, restores: bool = True) -> Worker:
        """Register a contract, or what takes its place, and load it; return its worker."""
        self.register(replace=replace)
        worker = self.load_start()
        self.loaded(worker, saves=saves, restores=restores)
        return worker

    def save(self, worker: Worker, state: bytes = b"state", problem: str = "") -> None:
        self.effects = self.dispatcher.worker_saved(worker, state, problem, self.now_ns)

    def restore(self, worker: Worker, problem: str = "") -> None:
        self.effects = self.dispatcher.worker_restored(worker, problem, self.now_ns)

    def reload_worker(self) -> Worker:
        """Load the next worker of the contract."""
        worker = self.load_start()
        self.loaded(worker, saves=True, restores=True)
        return worker

    @property
    def events(self) -> list[str]:
        return [record.event for record in of_kind(self.effects, Record) if record.event.startswith("state ")]


def handed_over(bench: StateBench) -> tuple[Worker, Worker]:
    """Replace a contract whose worker is idle; return the old and the new worker."""
    old = bench.keep()
    new = bench.keep(replace=True)
    assert bench.only(SaveState).worker is old
    assert (old.state, new.state) == (SAVING, RESTORING)
    return old, new


def test_state_goes_to_the_successor_before_any_call() -> None:
    bench = StateBench()
    old, new = handed_over(bench)
    call = bench.call()
    assert not bench.has(SendCall)
    bench.save(old)
    assert bench.only(RestoreState) == RestoreState(new, b"state")
    assert bench.only(KillWorker).worker is old
    assert not bench.has(SendCall)
    bench.restore(new)
    assert bench.sent == SendCall(new, call)
    assert bench.events == ["state carried over"]
    bench.done(call)
    assert new.state is IDLE


def test_what_the_old_worker_holds_comes_first() -> None:
    bench = StateBench(window=4)
    old = bench.keep()
    running, ahead = bench.call(), bench.call()
    assert ahead.worker is old
    new = bench.keep(replace=True)
    assert not bench.has(SaveState)
    later = bench.call()
    assert later.worker is None
    bench.done(running)
    assert not bench.has(SaveState)
    bench.done(ahead)
    assert bench.only(SaveState).worker is old
    bench.save(old)
    bench.restore(new)
    assert bench.sent == SendCall(new, later)


def test_a_worker_with_state_is_not_stopped_because_nobody_calls_it() -> None:
    bench = StateBench()
    old, new = handed_over(bench)
    bench.save(old)
    bench.restore(new)
    bench.pass_ms(60_000)
    assert new.state is IDLE


@pytest.mark.parametrize(("saves", "restores"), [(True, False), (False, True), (False, False)])
def test_nothing_is_carried_where_one_side_cannot(saves: bool, restores: bool) -> None:
    bench = StateBench()
    old = bench.keep(saves=saves)
    new = bench.keep(replace=True, restores=restores)
    assert not bench.has(SaveState)
    assert (old.state, new.state) == (DOOMED, IDLE)


def test_state_that_cannot_be_saved_leaves_a_fresh_successor_and_a_record() -> None:
    bench = StateBench()
    old, new = handed_over(bench)
    call = bench.call()
    bench.save(old, b"", "save() failed: no")
    assert bench.sent == SendCall(new, call)
    (record,) = [each for each in of_kind(bench.effects, Record) if each.event == "state not carried over"]
    assert record.fields["reason"] == "save() failed: no"


def test_worker_that_does_not_save_in_time_is_killed() -> None:
    bench = StateBench()
    old, new = handed_over(bench)
    call = bench.call()
    bench.pass_ms(LIMIT_MS + 10)
    assert old.verdict == "it did not save its state within 2 s"
    assert bench.sent == SendCall(new, call)
    assert bench.events == ["state not carried over"]


def test_death_of_the_old_worker_leaves_a_fresh_successor() -> None:
    bench = StateBench()
    old, new = handed_over(bench)
    bench.die(old, SEGFAULT)
    assert new.state is IDLE
    assert bench.events == ["state not carried over"]


def test_death_in_its_last_call_is_that_calls_only() -> None:
    bench = StateBench()
    old = bench.keep()
    running = bench.call()
    bench.begin(running)
    new = bench.keep(replace=True)
    later = bench.call()
    bench.die(old, SEGFAULT)
    assert [each.call_id for each in of_kind(bench.effects, SendFailure)] == [running.header.call_id]
    assert bench.sent == SendCall(new, later)
    assert bench.events == ["state not carried over"]


def test_death_of_the_new_worker_before_it_has_the_state_loses_nothing() -> None:
    bench = StateBench(spares=2)
    old, new = handed_over(bench)
    bench.die(new, SEGFAULT)
    assert bench.events == []
    call = bench.call()
    third = bench.reload_worker()
    assert third.state is RESTORING
    bench.save(old)
    assert bench.only(RestoreState) == RestoreState(third, b"state")
    bench.restore(third)
    assert bench.sent == SendCall(third, call)


def test_state_waits_for_a_worker_that_comes_later() -> None:
    bench = StateBench(spares=2)
    old, new = handed_over(bench)
    bench.die(new, SEGFAULT)
    bench.save(old)
    assert not bench.has(RestoreState)
    call = bench.call()
    third = bench.reload_worker()
    assert bench.only(RestoreState) == RestoreState(third, b"state")
    bench.restore(third)
    assert bench.sent == SendCall(third, call)


def test_state_that_kills_the_new_worker_is_not_tried_again() -> None:
    bench = StateBench(spares=2)
    old, new = handed_over(bench)
    bench.save(old)
    call = bench.call()
    bench.die(new, SEGFAULT)
    assert bench.events == ["state not carried over"]
    third = bench.reload_worker()
    assert bench.sent == SendCall(third, call)


def test_state_that_is_not_taken_up_costs_the_worker_and_no_call() -> None:
    bench = StateBench(spares=2)
    old, new = handed_over(bench)
    bench.save(old)
    call = bench.call()
    bench.restore(new, "restore() failed: no")
    assert new.verdict == "its state was not restored: restore() failed: no"
    assert bench.events == ["state not carried over"]
    third = bench.reload_worker()
    assert bench.sent == SendCall(third, call)


def test_worker_that_does_not_restore_in_time_is_killed() -> None:
    bench = StateBench()
    old, new = handed_over(bench)
    bench.save(old)
    bench.pass_ms(LIMIT_MS + 10)
    assert new.verdict == "it did not restore its state within 2 s"
    assert bench.events == ["state not carried over"]


def test_a_third_version_inherits_what_the_second_was_to_have() -> None:
    bench = StateBench(spares=3)
    old, second = handed_over(bench)
    third = bench.keep(replace=True)
    assert (old.state, second.state, third.state) == (SAVING, DOOMED, RESTORING)
    bench.save(old)
    assert bench.only(RestoreState) == RestoreState(third, b"state")


def test_a_third_version_inherits_what_the_second_was_taking_up() -> None:
    bench = StateBench(spares=3)
    old, second = handed_over(bench)
    bench.save(old)
    third = bench.keep(replace=True)
    assert bench.only(RestoreState) == RestoreState(third, b"state")
    bench.die(second, SEGFAULT)
    assert bench.events == [], "it is not lost"
    bench.restore(third)
    assert bench.events == ["state carried over"]


def test_a_third_version_without_restore_starts_fresh() -> None:
    bench = StateBench(spares=3)
    old, _ = handed_over(bench)
    third = bench.keep(replace=True, restores=False)
    assert third.state is IDLE
    bench.save(old)
    assert not bench.has(RestoreState)
    assert bench.only(KillWorker).worker is old


def test_unregistering_ends_it() -> None:
    bench = StateBench()
    old, new = handed_over(bench)
    bench.unregister()
    assert new.state is DOOMED
    bench.save(old)
    assert not bench.has(RestoreState)
    assert bench.only(KillWorker).worker is old


def test_unregistering_while_state_is_taken_up_ends_it() -> None:
    bench = StateBench()
    old, new = handed_over(bench)
    bench.save(old)
    bench.unregister()
    bench.die(new, SEGFAULT)
    assert bench.events == []


def test_end_of_the_worker_host_loses_the_state() -> None:
    bench = StateBench()
    handed_over(bench)
    bench.effects = bench.dispatcher.worker_host_left(bench.now_ns)
    assert bench.events == ["state not carried over"]


def test_worker_host_that_is_to_end_loses_the_state() -> None:
    bench = StateBench()
    handed_over(bench)
    bench.effects = bench.dispatcher.worker_host_leaves(bench.now_ns)
    assert bench.events == ["state not carried over"]


def test_workers_that_say_so_unasked_are_killed() -> None:
    bench = StateBench()
    worker = bench.keep()
    bench.save(worker)
    assert "nobody asked" in worker.verdict
    other = bench.keep(replace=True)
    bench.restore(other)
    assert "was not given" in other.verdict


def test_a_worker_may_bequeath_its_state_within_its_contract() -> None:
    """What recycling does: a new worker of the same contract follows the old one."""
    bench = StateBench(spares=3)
    old = bench.keep()
    contract = bench.catalogue.serving[CONTRACT]
    running = bench.call()
    assert old.state is BUSY
    carrying.bequeath(old, contract)
    assert old.state is LEAVING
    contract.workers_max = 2
    later = bench.call()
    assert later.worker is None
    new = bench.reload_worker()
    assert new.state is RESTORING
    bench.done(running)
    assert bench.only(SaveState).worker is old
    bench.save(old)
    assert bench.only(RestoreState) == RestoreState(new, b"state")
    bench.restore(new)
    assert bench.sent == SendCall(new, later)
