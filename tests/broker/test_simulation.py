"""The dispatcher among simulated hosts and workers; and proof that the simulation finds what it is meant to find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from luacell.broker import answers, carrying, deaths, dispatcher, handover, model, recycling
from luacell.broker.books import ARENA_BITS
from luacell.broker.catalogue import Catalogue
from luacell.broker.causes import Cause
from luacell.broker.deaths import Episode
from luacell.broker.dispatcher import Dispatcher
from luacell.broker.handover import Handover
from luacell.broker.model import (
    BUSY,
    DOOMED,
    QUEUED,
    Call,
    Contract,
    Effect,
    KillWorker,
    RecordCrash,
    SendReleased,
    SendResult,
    Worker,
)
from luacell.broker.starts import StartBudget
from luacell.broker.timers import TimerWheel
from luacell.broker.workforce import Workforce
from luacell.protocol import headers
from luacell.protocol.headers import Done
from luacell.protocol.limits import NS_PER_MS, NS_PER_S
from luacell.protocol.slots import Answer
from tests.broker.auditor import Violation
from tests.broker.simulated_memory import Memory
from tests.broker.simulated_workers import CARRY_STEPS, NEST_STEPS, STEPS
from tests.broker.simulation import Simulation, Swarm, simulate
from tests.soak.simulation import kept

SEEDS = range(1, 41)
STEPS_PER_SEED = 5_000
HUNT_SEEDS = range(100, 160)
HUNT_STEPS = 3_000

Effects = list[Effect]
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def worlds() -> list[Simulation]:
    return [simulate(seed, STEPS_PER_SEED) for seed in SEEDS]


def test_no_rule_is_broken_in_a_hundred_thousand_steps(worlds: list[Simulation]) -> None:
    assert sum(world.steps for world in worlds) >= 100_000


@pytest.mark.parametrize("step", STEPS)
def test_workers_die_at_each_step(worlds: list[Simulation], step: str) -> None:
    assert sum((world.auditor.deaths for world in worlds), Counter[str]())[step] > 0


@pytest.mark.parametrize(
    "answer",
    [
        "result 0",
        "result 102",
        "failure CANCELLED, began no",
        "failure CANCELLED, began yes",
        "failure DEADLINE_EXCEEDED, began no",
        "failure DEADLINE_EXCEEDED, began yes",
        "failure HOST_CONTRACT_CALL_FAILED, began no",
        "failure HOST_CONTRACT_NOT_FOUND, began no",
        "failure OUT_OF_MEMORY, began yes",
        "failure WORKER_CRASHED, began no",
        "failure WORKER_CRASHED, began yes",
        "refused BAD_REQUEST",
        "refused BUSY",
        "refused HOST_CONTRACT_CALL_FAILED",
        "refused HOST_CONTRACT_NOT_FOUND",
        "refused STALE_HANDLE",
        "refused UNAUTHORIZED",
    ],
)
def test_every_kind_of_answer_is_given(worlds: list[Simulation], answer: str) -> None:
    assert sum((world.auditor.answers for world in worlds), Counter[str]())[answer] > 0


@pytest.mark.parametrize("code", ["DEADLINE_EXCEEDED", "OUT_OF_MEMORY", "WORKER_CRASHED"])
def test_every_kind_of_crash_is_put_on_record(worlds: list[Simulation], code: str) -> None:
    assert sum((world.counts for world in worlds), Counter[str]())[f"crash {code}"] > 0


def test_the_quick_way_is_taken(worlds: list[Simulation]) -> None:
    counts = sum((world.counts for world in worlds), Counter[str]())
    assert counts["quick calls"] > 0
    assert counts["quick answers"] > 0


def test_a_seed_makes_the_same_world_twice() -> None:
    one, other = simulate(3, 2_000), simulate(3, 2_000)
    assert (one.schedule.now_ns, one.auditor.answers) == (other.schedule.now_ns, other.auditor.answers)


RELOADS = Swarm(reloading=0.5, death=0.05, failing=0.1, hang=0.01, call_gap_ns=20 * NS_PER_MS, hosts=3, spares=3)


def test_state_is_carried_over_and_at_times_lost() -> None:
    worlds = [simulate(seed, 4_000, RELOADS) for seed in range(4)]
    counts = sum((world.counts + world.auditor.deaths for world in worlds), Counter[str]())
    assert all(counts[key] > 0 for key in ("state carried over", "state not carried over", *CARRY_STEPS)), counts


WEAR = Swarm(wearing=0.3, reloading=0.05, death=0.03, failing=0.05, hang=0.002, hosts=3, spares=3)


def test_workers_are_recycled_with_deaths_at_every_step() -> None:
    worlds = [simulate(seed, 4_000, WEAR) for seed in range(6)]
    counts = sum((world.counts + world.auditor.deaths for world in worlds), Counter[str]())
    assert all(counts[key] > 0 for key in {"worker recycled", "state carried over", *STEPS} - {"blank"}), counts


NESTED = Swarm(nesting=0.3, death=0.02, failing=0.05, cancelling=0.05, slow=0.02, endless=0.003, hosts=3, spares=3)


def test_contracts_call_each_other_and_die_at_each_step() -> None:
    worlds = [simulate(seed, 4_000, NESTED) for seed in range(6)]
    counts = sum((world.counts + world.auditor.deaths + world.auditor.answers for world in worlds), Counter[str]())
    answers = ("nested results", "nested failures", "untied REENTRANT_CALL")
    assert all(counts[key] > 0 for key in (*answers, *NEST_STEPS)), counts


# -- broken dispatchers -----------------------------------------------------------------------------------------
# Each breaks one rule. What the simulation does not notice, it does not check.
BREAKAGES: dict[str, Callable[[Patch], None]] = {}
QUICK: set[str] = set()  # those of the quick way
SWARMS: dict[str, Swarm] = {}  # worlds in which a rare coincidence is not


def breakage(break_it: Callable[[Patch], None]) -> Callable[[Patch], None]:
    BREAKAGES[break_it.__name__] = break_it
    return break_it


def quick_breakage(break_it: Callable[[Patch], None]) -> Callable[[Patch], None]:
    QUICK.add(break_it.__name__)
    return breakage(break_it)


@pytest.mark.parametrize("name", BREAKAGES)
def test_the_simulation_notices(name: str, monkeypatch: Patch) -> None:
    if name not in QUICK:  # else most calls would not meet the breakage
        monkeypatch.setattr(Dispatcher, "quick_call", lambda self, session_id, header, now_ns: None)
        monkeypatch.setattr(Dispatcher, "quick_done", lambda self, worker, done, now_ns: None)
    BREAKAGES[name](monkeypatch)
    with pytest.raises(Violation) as caught:
        for seed in HUNT_SEEDS:
            simulate(seed, HUNT_STEPS, SWARMS.get(name))
    assert "--seed" in str(caught.value)


@breakage
def a_call_that_had_begun_is_sent_again(patch: Patch) -> None:
    fail = Dispatcher._fail_buried

    def send_again(
        self: Dispatcher, episode: Episode, cause: Cause, verdict: str, now_ns: int, effects: Effects
    ) -> None:
        if episode.began == "yes":
            self._requeue([episode.call], now_ns, effects)
        else:
            fail(self, episode, cause, verdict, now_ns, effects)

    patch.setattr(Dispatcher, "_fail_buried", send_again)


@breakage
def calls_behind_the_one_that_a_worker_is_killed_for_are_not_withdrawn(patch: Patch) -> None:
    patch.setattr(Dispatcher, "_take_back", lambda self, calls: None)


@breakage
def starts_have_no_pace(patch: Patch) -> None:
    patch.setattr(StartBudget, "take", lambda self, now_ns: None)


SWARMS["workers_that_are_followed_serve_on"] = WEAR
SWARMS["calls_do_not_wait_for_state"] = RELOADS
SWARMS["workers_that_were_to_save_are_not_missed"] = RELOADS


@breakage
def workers_that_are_followed_serve_on(patch: Patch) -> None:
    relieve = recycling.relieve

    def serve_on(contract: Contract, effects: Effects) -> Worker | None:
        old, was_busy = contract.outgoing, contract.outgoing is not None and contract.outgoing.state is BUSY
        idle = relieve(contract, effects)
        if old is not None and was_busy and old.heir is None:
            old.state = BUSY
        return idle

    patch.setattr(recycling, "relieve", serve_on)


@breakage
def calls_do_not_wait_for_state(patch: Patch) -> None:
    succeed = carrying.succeed

    def do_not_wait(predecessor: Contract, contract: Contract) -> None:
        succeed(predecessor, contract)
        for worker in contract.workers:
            if worker.state is model.RESTORING:
                worker.state = model.IDLE
                contract.idle.append(worker)

    patch.setattr(carrying, "succeed", do_not_wait)


@breakage
def workers_that_were_to_save_are_not_missed(patch: Patch) -> None:
    patch.setattr(Dispatcher, "_part", lambda self, worker, why, now_ns, effects: None)


SWARMS["a_call_that_would_wait_for_itself_is_queued"] = NESTED
SWARMS["a_nested_call_may_take_longer_than_the_one_it_is_made_in"] = NESTED
SWARMS["who_waits_keeps_what_it_holds_ahead"] = NESTED
SWARMS["a_worker_that_has_its_answer_still_waits"] = NESTED


@breakage
def a_call_that_would_wait_for_itself_is_queued(patch: Patch) -> None:
    patch.setattr(Handover, "can_progress", lambda self, contract: True)


@breakage
def a_nested_call_may_take_longer_than_the_one_it_is_made_in(patch: Patch) -> None:
    wait = Handover._await

    def wait_longer(self: Dispatcher, call: Call, outer: Call, now_ns: int, effects: Effects) -> None:
        call.deadline_ns += 10 * NS_PER_MS
        wait(self, call, outer, now_ns, effects)

    patch.setattr(Dispatcher, "_await", wait_longer)


@breakage
def who_waits_keeps_what_it_holds_ahead(patch: Patch) -> None:
    patch.setattr(Handover, "_give_away_what_is_behind", lambda self, worker, running, now_ns, effects: None)


@breakage
def a_worker_that_has_its_answer_still_waits(patch: Patch) -> None:
    patch.setattr(Handover, "_resume", lambda self, call, now_ns: None)


@breakage
def calls_leave_the_seat_of_their_instance(patch: Patch) -> None:
    def any_seat(contract: Contract, session_id: bytes, fn_id: int) -> Contract:
        return contract.places[len(contract.queue) % len(contract.places)]

    patch.setattr(dispatcher, "seat_of", any_seat)


@breakage
def the_calls_behind_the_one_that_a_worker_died_of_are_blamed_too(patch: Patch) -> None:
    requeue = Dispatcher._requeue

    def blame(self: Dispatcher, calls: list[Call], now_ns: int, effects: Effects) -> None:
        for call in calls[1:]:
            self._fail_buried(Episode(call, "no", 0.0, 0.0, None), Cause(signal=11), "", now_ns, effects)
        requeue(self, calls[:1], now_ns, effects)

    patch.setattr(Dispatcher, "_requeue", blame)


@breakage
def a_call_that_had_not_begun_is_not_sent_again(patch: Patch) -> None:
    patch.setattr(handover, "ATTEMPTS_MAX", 1)


@breakage
def an_inspection_that_is_not_answered_is_waited_for(patch: Patch) -> None:
    patch.setattr(handover, "INQUIRY_LIMIT_NS", 10 * NS_PER_S)


@breakage
def a_slot_is_released_before_its_host_was_told_of_the_deadline(patch: Patch) -> None:
    def release(self: Dispatcher, call: Call, now_ns: int, effects: Effects) -> None:
        call.inquiry = None
        if call.session.id in self.sessions:
            effects.append(SendReleased(call.session.id, call.header.call_id))
        self._end(call, now_ns, effects)

    patch.setattr(Dispatcher, "_release_answered", release)


@breakage
def the_slot_is_free_at_the_deadline(patch: Patch) -> None:
    rightly = answers.deadline_exceeded
    patch.setattr(
        answers,
        "deadline_exceeded",
        lambda *arguments, slot="free", **others: rightly(*arguments, **others),
    )


@breakage
def a_late_answer_is_relayed_too(patch: Patch) -> None:
    settle = Dispatcher._settle

    def settle_again(self: Dispatcher, call: Call, done: Done | Answer, now_ns: int, effects: Effects) -> None:
        call.answered = False
        settle(self, call, done, now_ns, effects)

    patch.setattr(Dispatcher, "_settle", settle_again)


def _blind_to_done(method: str, patch: Patch) -> None:
    looks = getattr(Dispatcher, method)

    class Blind:
        def __init__(self, memory: Memory) -> None:
            self.withdraw = memory.withdraw
            self._look = memory.look

        def look(self, call: Call) -> Answer:
            return self._look(call)._replace(done=0)

    def blindly(self: Dispatcher, *arguments: object) -> object:
        memory = self._memory
        assert isinstance(memory, Memory)
        self._memory = Blind(memory)
        try:
            return looks(self, *arguments)
        finally:
            self._memory = memory

    patch.setattr(Dispatcher, method, blindly)


@breakage
def the_evidence_of_a_dead_worker_is_ignored(patch: Patch) -> None:
    _blind_to_done("_bury", patch)


@breakage
def calls_are_not_withdrawn(patch: Patch) -> None:
    patch.setattr(Memory, "withdraw", lambda self, call: None)


@breakage
def a_doomed_worker_is_used_again(patch: Patch) -> None:
    settle = Dispatcher.worker_done

    def use_again(self: Dispatcher, worker: Worker, done: Done, now_ns: int) -> Effects:
        effects = settle(self, worker, done, now_ns)
        if worker.state is DOOMED and worker.call is None and worker.contract is not None:
            worker.state = BUSY
            worker.contract.workers[worker] = None
            self._employ(worker, now_ns, effects)
        return effects

    patch.setattr(Dispatcher, "worker_done", use_again)


@breakage
def a_worker_that_must_not_be_used_again_is(patch: Patch) -> None:
    patch.setattr(headers, "RETIRE", 0)


@breakage
def a_worker_of_a_retired_contract_goes_on(patch: Patch) -> None:
    settle = Dispatcher.worker_done

    def go_on(self: Dispatcher, worker: Worker, done: Done, now_ns: int) -> Effects:
        contract = worker.contract
        was_retired = contract is not None and contract.retired
        if contract is not None:
            contract.retired = False
        effects = settle(self, worker, done, now_ns)
        if contract is not None:
            contract.retired = was_retired
        return effects

    patch.setattr(Dispatcher, "worker_done", go_on)


@breakage
def a_call_that_was_not_begun_is_a_success(patch: Patch) -> None:
    settle = Dispatcher._settle

    def succeed(self: Dispatcher, call: Call, done: Done | Answer, now_ns: int, effects: Effects) -> None:
        settle(self, call, done._replace(flags=0), now_ns, effects)

    patch.setattr(Dispatcher, "_settle", succeed)


@breakage
def a_refused_call_is_a_success_at_the_deadline(patch: Patch) -> None:
    for module in (dispatcher, handover):
        patch.setattr(module, "has_result", lambda call, seen: seen.done == call.sequence)


@breakage
def each_worker_counts_its_calls_from_one(patch: Patch) -> None:
    hand, counts = Dispatcher._hand, Counter[int]()

    def count(self: Dispatcher, worker: Worker, call: Call, now_ns: int, effects: Effects) -> None:
        hand(self, worker, call, now_ns, effects)
        counts[worker.id] += 1
        call.sequence = counts[worker.id]

    patch.setattr(Dispatcher, "_hand", count)


@breakage
def a_call_that_comes_back_waits_though_a_worker_is_idle(patch: Patch) -> None:
    requeue = Dispatcher._requeue

    def wait(self: Dispatcher, calls: list[Call], now_ns: int, effects: Effects) -> None:
        idle = {contract: contract.idle for contract in self.catalogue.serving.values()}
        for contract in idle:
            contract.idle = []
        requeue(self, calls, now_ns, effects)
        for contract, workers in idle.items():
            contract.idle = workers

    patch.setattr(Dispatcher, "_requeue", wait)


@breakage
def nobody_replaces_a_doomed_worker(patch: Patch) -> None:
    def dismiss(self: Dispatcher, worker: Worker, verdict: str, now_ns: int, effects: Effects) -> None:
        self.workforce.doom(worker, verdict, now_ns, effects)

    patch.setattr(Dispatcher, "_dismiss", dismiss)


@breakage
def a_busy_worker_is_still_idle(patch: Patch) -> None:
    hand = Dispatcher._hand

    def stay_idle(self: Dispatcher, worker: Worker, call: Call, now_ns: int, effects: Effects) -> None:
        hand(self, worker, call, now_ns, effects)
        call.contract.idle.append(worker)

    patch.setattr(Dispatcher, "_hand", stay_idle)


@breakage
def kept_slots_are_not_released(patch: Patch) -> None:
    patch.setattr(Dispatcher, "_release_answered", Dispatcher._end)


@breakage
def slots_of_a_host_that_left_are_dropped_at_once(patch: Patch) -> None:
    leave = Dispatcher.host_left

    def drop(self: Dispatcher, session_id: bytes, now_ns: int) -> Effects:
        session = self.sessions.get(session_id)
        calls = list(session.calls.values()) if session is not None else []
        effects = leave(self, session_id, now_ns)
        for call in calls:
            if call.worker is not None and call.worker.call is call:
                call.worker.call = None
                self._end(call, now_ns, effects)
        return effects

    patch.setattr(Dispatcher, "host_left", drop)


@breakage
def queued_calls_do_not_expire(patch: Patch) -> None:
    due = Dispatcher._call_due

    def only_held(self: Dispatcher, call: Call, now_ns: int, effects: Effects) -> None:
        if call.state is not QUEUED:
            due(self, call, now_ns, effects)

    patch.setattr(Dispatcher, "_call_due", only_held)


SWARMS["timers_that_were_cancelled_meanwhile_fire"] = Swarm(hang=0.3, kill_gap_ns=50 * NS_PER_MS, hosts=3, spares=2)


@breakage
def timers_that_were_cancelled_meanwhile_fire(patch: Patch) -> None:
    expired = TimerWheel.expired

    def all_at_once(self: TimerWheel[object], now_ns: int) -> Iterator[object]:
        return iter(list(expired(self, now_ns)))

    patch.setattr(TimerWheel, "expired", all_at_once)


@breakage
def the_queue_of_a_replaced_contract_is_lost(patch: Patch) -> None:
    def succeed(self: Catalogue, contract: Contract, now_ns: int, effects: Effects) -> None:
        predecessor = contract.successor_of
        if predecessor is not None and not predecessor.retired:
            self._retire(predecessor, now_ns, effects)

    patch.setattr(Catalogue, "_succeed", succeed)


@breakage
def the_slots_of_a_silent_worker_are_not_looked_at(patch: Patch) -> None:
    patch.setattr(Dispatcher, "_catch_up", lambda self, worker, now_ns, effects: None)


SWARMS["workers_that_run_one_call_are_not_looked_at"] = Swarm(hostile=0.1, call_gap_ns=20 * NS_PER_MS, spares=2)


@breakage
def workers_that_run_one_call_are_not_looked_at(patch: Patch) -> None:
    patch.setattr(Dispatcher, "_look_around", lambda self, now_ns, effects: None)


@breakage
def a_worker_is_killed_for_a_call_that_it_has_not_begun(patch: Patch) -> None:
    for module in (dispatcher, handover):
        patch.setattr(module, "is_running", lambda call, seen: True)


@breakage
def a_kill_is_ordered_and_the_worker_forgotten(patch: Patch) -> None:
    def forget(self: Workforce, worker: Worker, verdict: str, now_ns: int, effects: Effects) -> None:
        effects.append(KillWorker(worker))

    patch.setattr(Workforce, "doom", forget)


SWARMS["a_contract_that_does_not_load_is_tried_at_once"] = Swarm(
    hang=0.1, registering=0.05, death=0.01, hosts=4, spares=2
)


@breakage
def crashes_are_not_put_on_record(patch: Patch) -> None:
    patch.setattr(dispatcher, "crash_of", lambda episode, cause, verdict: None)


@breakage
def crashes_that_nobody_waited_for_are_put_on_record(patch: Patch) -> None:
    tell = deaths.crash_of

    def tell_all(episode: Episode, cause: Cause, verdict: str) -> RecordCrash | None:
        was_answered, episode.call.answered = episode.call.answered, False
        crash = tell(episode, cause, verdict)
        episode.call.answered = was_answered
        return crash

    patch.setattr(dispatcher, "crash_of", tell_all)


@breakage
def a_contract_that_does_not_load_is_tried_at_once(patch: Patch) -> None:
    staff = Catalogue.staff

    def hurry(self: Catalogue, contract: Contract, now_ns: int, effects: Effects) -> None:
        staff(self, contract, max(now_ns, contract.retry_ns), effects)

    patch.setattr(Catalogue, "staff", hurry)


@breakage
def results_are_not_cut_to_size(patch: Patch) -> None:
    def whole(
        self: Dispatcher, call: Call, done: Done | Answer, now_ns: int, effects: Effects, *, slot_free: bool
    ) -> None:
        effects.append(SendResult(call, done.code, done.out_size, done.error_size, slot_free))

    patch.setattr(Dispatcher, "_relay", whole)


SWARMS["results_are_not_cut_to_size"] = Swarm(hostile=0.3, slow=0.3, cancelling=0.2, hosts=3, spares=3)


# -- the quick way: each leaves out one of its questions ----------------------------------------------------------
def _pretend(patch: Patch, pretend: Callable[[Worker, Call, Contract], None]) -> None:
    """Let `quick_done` see a worker, call and contract that are not as they are."""
    quick_done = Dispatcher.quick_done

    def misled(self: Dispatcher, worker: Worker, done: Done, now_ns: int) -> Call | None:
        call, contract = worker.call, worker.contract
        if call is None or contract is None:
            return None
        before = worker.state, call.answered, call.sequence, contract.retired, contract.queue.count, call.timer
        pretend(worker, call, contract)
        served = quick_done(self, worker, done, now_ns)
        if served is None:
            worker.state, call.answered = before[:2]
        call.sequence, contract.retired, contract.queue.count = before[2:5]
        return served

    patch.setattr(Dispatcher, "quick_done", misled)


@quick_breakage
def a_doomed_worker_is_used_again_the_quick_way(patch: Patch) -> None:
    def pretend(worker: Worker, call: Call, contract: Contract) -> None:
        worker.state = BUSY

    _pretend(patch, pretend)


@quick_breakage
def a_late_answer_is_relayed_the_quick_way(patch: Patch) -> None:
    def pretend(worker: Worker, call: Call, contract: Contract) -> None:
        call.answered = False

    _pretend(patch, pretend)


@quick_breakage
def a_worker_of_a_retired_contract_goes_on_the_quick_way(patch: Patch) -> None:
    def pretend(worker: Worker, call: Call, contract: Contract) -> None:
        contract.retired = False

    _pretend(patch, pretend)


@quick_breakage
def a_worker_rests_the_quick_way_while_calls_wait(patch: Patch) -> None:
    def pretend(worker: Worker, call: Call, contract: Contract) -> None:
        contract.queue.count = 0

    _pretend(patch, pretend)


@quick_breakage
def a_forged_answer_is_taken_the_quick_way(patch: Patch) -> None:
    quick_done = Dispatcher.quick_done

    def believe(self: Dispatcher, worker: Worker, done: Done, now_ns: int) -> Call | None:
        sequence = worker.call.sequence if worker.call is not None else 0
        return quick_done(self, worker, done._replace(sequence=sequence), now_ns)

    patch.setattr(Dispatcher, "quick_done", believe)


@quick_breakage
def a_refusal_is_a_success_the_quick_way(patch: Patch) -> None:
    quick_done = Dispatcher.quick_done

    def accept(self: Dispatcher, worker: Worker, done: Done, now_ns: int) -> Call | None:
        return quick_done(self, worker, done._replace(flags=0), now_ns)

    patch.setattr(Dispatcher, "quick_done", accept)


SWARMS["a_slot_in_flight_is_taken_the_quick_way"] = Swarm(malice=0.5, cancelling=0.2, slow=0.3, stuck=0.1, hosts=4)
SWARMS["a_call_id_is_taken_twice_the_quick_way"] = SWARMS["a_slot_in_flight_is_taken_the_quick_way"]


@quick_breakage
def a_slot_in_flight_is_taken_the_quick_way(patch: Patch) -> None:
    quick_call = Dispatcher.quick_call

    def take(self: Dispatcher, session_id: bytes, header: headers.Call, now_ns: int) -> Call | None:
        book = self._slots.get(header.slot << ARENA_BITS | header.arena)
        if book is not None and book.generation < 0:
            header = header._replace(generation=book.generation)
        return quick_call(self, session_id, header, now_ns)

    patch.setattr(Dispatcher, "quick_call", take)


@quick_breakage
def a_call_id_is_taken_twice_the_quick_way(patch: Patch) -> None:
    quick_call = Dispatcher.quick_call

    def take(self: Dispatcher, session_id: bytes, header: headers.Call, now_ns: int) -> Call | None:
        calls = self.sessions[session_id].calls
        first = calls.pop(header.call_id, None)
        call = quick_call(self, session_id, header, now_ns)
        if first is not None and call is None:
            calls[header.call_id] = first
        return call

    patch.setattr(Dispatcher, "quick_call", take)


@pytest.mark.parametrize(("seed", "steps"), [(1, 1_000), *kept()])
def test_worlds_that_broke_a_rule_once_break_none(seed: int, steps: int) -> None:
    simulate(seed, steps)
