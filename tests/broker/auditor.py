"""The auditor of the simulation: it knows what every process really did, and checks what the broker says against it.

It sees each effect before it is performed, each mark that a worker makes, and the dispatcher's state after each
event. Whatever breaks a rule raises `Violation`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luacell.broker import carrying, model
from luacell.broker.books import Pair
from luacell.broker.causes import SIGALRM, Cause
from luacell.broker.dispatcher import LOOK_NS, Dispatcher
from luacell.broker.handover import ATTEMPTS_MAX, KILL_AFTER_NS
from luacell.broker.model import CallState, Effect, Request, WorkerState
from luacell.broker.registry import ContractRecord
from luacell.broker.starts import COST_NS
from luacell.broker.timers import BUCKET_NS
from luacell.broker.windows import SLOW_NS
from luacell.broker.workforce import backoff_ns
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.headers import Call as CallHeader
from luacell.protocol.limits import NS_PER_MS, NS_PER_US
from tests.broker.simulated_memory import Slot
from tests.broker.simulated_server import TICK_NS, TIME_STEP_NS

if TYPE_CHECKING:
    from tests.broker.simulation import Simulation

INQUIRY_NS = 50 * NS_PER_MS  # how long it may take to find out what a process is doing
LATE_NS = BUCKET_NS + TIME_STEP_NS + TICK_NS  # what a deadline may be missed by: the timer's and the shell's share
NOTICED_NS = LOOK_NS + SLOW_NS + 3 * LATE_NS  # what the mark that a call is done may wait for
OUT_SIZE = 8  # bytes that every call asks for

# The bounds of simulated worlds: so small that a few hosts reach them, limits so short that they pass within a run.
QUEUE_MAX = 6
WINDOW_MAX = 4
CALLS_IN_FLIGHT_MAX = 14
CRASHES_MAX = 3
WORKERS_MAX = 12
STARTS_AT_ONCE_MAX = 3
STARTS_BURST = 12
START_LIMIT_NS = LOAD_LIMIT_NS = 200 * NS_PER_MS
REGISTRATION_LIMIT_NS = 600 * NS_PER_MS


class Violation(AssertionError):
    """A rule was broken."""


@dataclass(slots=True, eq=False)
class Truth:
    """What really happened to an accepted call."""

    number: int
    session_id: bytes
    call_id: int
    arrived_ns: int
    deadline_ns: int
    call: model.Call
    answers: int = 0
    is_kept: bool = False
    is_cancelled: bool = False
    is_released: bool = False
    is_host_gone: bool = False
    is_denied: bool = False  # its host was told that it had not begun
    is_marked: bool = False  # `begun` carried its number
    is_begun: bool = False
    is_lied_about: bool = False
    code: int | None = None  # of the result, once `done` carried its number
    finished_ns: int = 0  # when that was
    causes: list[Cause] = field(default_factory=list)  # of the deaths it was there for
    is_recorded: bool = False  # as a crash
    inspected_ns: int = 0  # when it was past its time and its process was to be looked at
    run_out_ns: int = 0  # when it has run for the limit of the contract that it was sent to
    workers: list[int] = field(default_factory=list)
    parent: Truth | None = None  # the call whose contract has made it

    @property
    def is_unwanted(self) -> bool:
        """Whether its host has cancelled it, or one that it is made for."""
        return self.is_cancelled or (self.parent is not None and self.parent.is_unwanted)

    def __str__(self) -> str:
        return f"call {self.number} ({self.session_id.hex()[-4:]}/{self.call_id})"


class Auditor:
    """Checks one simulation.

    Attributes:
        deaths: of workers, by the step that was their last.
        answers: by code.
        last: the latest events, for whoever has to find out.
    """

    def __init__(self, world: Simulation) -> None:
        self.world = world
        self.deaths: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.last: deque[tuple[Any, ...]] = deque(maxlen=60)
        self._number = 0
        self._starts_ns = 0  # when the last start is paid for
        self._by_number: dict[int, Truth] = {}
        self._by_call: dict[model.Call, Truth] = {}
        self._by_id: dict[tuple[bytes, int], Truth] = {}
        self._void_cancels: set[tuple[bytes, int]] = set()  # of calls that are over, or never were
        self._refusals: Counter[tuple[bytes, int]] = Counter()
        self._untied: set[tuple[bytes, int]] = set()  # accepted, and failed at once: they would wait for themselves
        self._open: dict[Truth, None] = {}  # those whose slot is not free
        self._unanswered: dict[Truth, None] = {}
        self._requests: dict[Request, int] = {}
        self._killed: set[int] = set()  # by an order, or with their worker host
        self._ordered: set[int] = set()
        self._loaded: set[int] = set()
        self._saved: set[int] = set()
        self._recorded: set[int] = set()  # whose deaths are on record as crashes
        self._orphans: set[int] = set()
        self._seats: dict[tuple[int, int | bytes], model.Contract] = {}
        self._records: dict[int, ContractRecord] = {}

    # -- what happens -------------------------------------------------------------------------------------------
    def note(self, *event: Any) -> None:
        """Remember an event."""
        self.last.append((self.world.schedule.now_ns, *event))

    def demand(self, holds: bool, *rule: object) -> None:
        """Raise Violation unless a rule holds."""
        if not holds:
            raise Violation(" ".join(str(part) for part in rule))

    def next_number(self) -> int:
        """Return a number for a call, its name in this simulation."""
        self._number += 1
        return self._number

    def call_arrived(
        self,
        dispatcher: Dispatcher,
        session_id: bytes,
        header: CallHeader,
        number: int,
        effects: list[Effect],
    ) -> None:
        """The broker has accepted or refused a call."""
        key = session_id, header.call_id
        if len(effects) == 1 and isinstance(effects[0], model.SendFailure) and effects[0].slot == "unused":
            self.note("refused", number, effects[0].message)
            self._refusals[key] += 1
            return
        call = dispatcher.sessions[session_id].calls.get(header.call_id)
        if call is None:
            self.demand(dispatcher.sessions[session_id].worker is not None, key, "is accepted and gone")
            self._untied.add(key)
            return
        settings = call.contract.record.settings
        budget_us = min(header.budget_us or settings.deadline_us, settings.deadline_us)
        now_ns = self.world.schedule.now_ns
        deadline_ns = now_ns + budget_us * NS_PER_US
        truth = Truth(number, session_id, header.call_id, now_ns, deadline_ns, call)
        if call.parent is not None:
            truth.parent = self._by_call[call.parent]
            truth.deadline_ns = min(deadline_ns, truth.parent.deadline_ns)
        self.demand(number not in self._by_number and key not in self._by_id, truth, "was accepted twice")
        self._by_number[number] = self._by_call[call] = self._by_id[key] = truth
        self._open[truth] = self._unanswered[truth] = None
        self.note("accepted", number)

    def cancelled(self, session_id: bytes, call_id: int) -> None:
        """A host's CANCEL is at the broker."""
        truth = self._by_id.get((session_id, call_id))
        if truth is not None:
            truth.is_cancelled = True
        else:
            self._void_cancels.add((session_id, call_id))

    def asked(self, request: Request) -> None:
        """A host's request is at the broker."""
        self._requests[request] = self.world.schedule.now_ns

    def host_left(self, session_id: bytes) -> None:
        """The broker hears that a host is gone: it owes it no answers any more."""
        for truth in [each for each in self._open if each.session_id == session_id]:
            truth.is_host_gone = True
            self._unanswered.pop(truth, None)

    def slot_read(self, worker_id: int, slot: Slot, generation: int) -> None:
        """A worker takes up the call in a slot."""
        self.demand(slot.generation == generation, "worker", worker_id, "found a slot that was used again")

    def marked_begun(self, number: int, is_marked: bool) -> None:
        """A worker has written `begun`, or taken that back: the call is past its deadline or withdrawn."""
        self._by_number[number].is_marked = is_marked

    def began(self, number: int, worker_id: int, deadline_ns: int) -> None:
        """A contract is entered."""
        truth = self._by_number[number]
        self.note("begins", number, worker_id)
        self.demand(not truth.is_begun, truth, "has begun twice")
        self.demand(not truth.is_denied, truth, "begins after its host was told that it did not")
        self.demand(deadline_ns == truth.deadline_ns, truth, "begins with another deadline")
        self.demand(worker_id not in self._ordered, truth, "begins in worker", worker_id, "whose death was ordered")
        truth.is_begun = True

    def lied(self, number: int) -> None:
        """A contract has marked its own call as done."""
        self._by_number[number].is_lied_about = True

    def finished(self, number: int, code: int) -> None:
        """A worker has written a result and `done`."""
        truth = self._by_number[number]
        truth.code, truth.finished_ns = code, self.world.schedule.now_ns

    def worker_ended(self, worker_id: int, step: str, cause: Cause) -> None:
        """A worker is dead."""
        self.note("dies", worker_id, step, str(cause))
        self.deaths[step] += 1
        for truth in self._open:
            if truth.workers and truth.workers[-1] == worker_id:
                truth.causes.append(cause)

    def orphaned(self, worker_ids: Iterable[int]) -> None:
        """The broker hears that the worker host is gone, and with it all workers."""
        self._orphans.update(worker_ids)
        self._killed.update(self._orphans)

    def host_read(self, number: int, found: int, out_size: int, error_size: int, code: int) -> None:
        """A host has read the slot of an answered call; only what a contract says of itself may be wrong."""
        truth = self._by_number.get(number)
        self.demand(out_size <= OUT_SIZE, "a result of", out_size, "bytes for a buffer of", OUT_SIZE)
        if truth is None or not truth.is_lied_about:
            self.demand(found == number, "the host of call", number, "reads the answer of call", found)
            self.demand((error_size > 0) == (code != 0), "call", number, "has code", code, "and error size", error_size)

    # -- what the broker does -----------------------------------------------------------------------------------
    def saw(self, effect: Effect) -> None:
        """The broker is about to do something."""
        match effect:
            case model.SendCall(worker, call):
                self._saw_call(worker, call)
            case model.SendResult():
                self._saw_result(effect)
            case model.SendFailure():
                self._saw_failure(effect)
            case model.SendReleased(session_id, call_id):
                self._saw_released(session_id, call_id)
            case model.SendReply(request, kind):
                self.note("reply", request, kind)
                self.demand(request in self._requests, "a request was answered twice")
                del self._requests[request]
            case model.StartWorker():
                self._saw_start()
            case model.LoadWorker(worker):
                self.note("load", worker.id, effect.record.source)
                is_blank = worker.id not in self._killed and worker.id not in self._loaded
                self.demand(is_blank, "worker", worker.id, "cannot load")
                self._check_back_off(worker)
                self._loaded.add(worker.id)
            case model.SaveState(worker):
                self._saw_save(worker)
            case model.RestoreState(worker, state):
                self._saw_restore(worker, state)
            case model.Record(_, event) if event.startswith(("state ", "worker recycled", "worker not recycled")):
                self.world.counts[event] += 1
            case model.KillWorker(worker):
                self.note("kill", worker.id, worker.verdict)
                self._saw_kill(worker)
            case model.InspectWorker(worker, sequence):
                self._saw_inspection(worker, sequence)
            case model.RecordCrash(call):
                self._saw_crash(effect, self._by_call[call])
            case model.DropPair(pair):
                self.note("drop", pair.key)
                self._saw_drop(pair)
            case _:
                pass

    def _saw_call(self, worker: model.Worker, call: model.Call) -> None:
        truth = self._by_call[call]
        process = self.world.workers[worker.id]
        self.note("execute", truth.number, worker.id)
        self.demand(worker.id not in self._killed, truth, "goes to doomed worker", worker.id)
        self.demand(worker.id in self._loaded, truth, "goes to blank worker", worker.id)
        holds = sum(map(process.may_touch, process.held))
        self.demand(holds <= WINDOW_MAX, truth, "goes to worker", worker.id, "whose window is full")
        self.demand(not worker.is_followed, truth, "goes to worker", worker.id, "which another follows")
        self.demand(not process.has_said_so, truth, "goes to worker", worker.id, "which must not be used again")
        self.demand(not truth.is_marked, truth, "had begun and is sent again")
        is_withdrawn = self.world.server.memory.slot_of(call).withdrawn >= call.sequence
        self.demand(not truth.answers or is_withdrawn, truth, "was answered and is sent")
        self._check_seat(worker, call, truth)
        contract = worker.contract
        assert contract is not None
        self.demand(worker.id not in self._saved, truth, "goes to worker", worker.id, "which has saved its state")
        self.demand(not carrying.must_wait(contract), truth, "goes to worker", worker.id, "before the state does")
        for earlier in truth.workers:
            is_touched = self.world.workers[earlier].may_touch(truth.number)
            self.demand(not is_touched, truth, "is sent again while worker", earlier, "may touch its slot")
        truth.workers.append(worker.id)
        truth.run_out_ns = self.world.schedule.now_ns + call.contract.run_limit_ns

    def _saw_start(self) -> None:
        """Starts have a pace."""
        now_ns = self.world.schedule.now_ns
        self._starts_ns = max(self._starts_ns, now_ns) + COST_NS
        self.demand(self._starts_ns - now_ns <= STARTS_BURST * COST_NS, "more starts than their pace allows")

    def _saw_save(self, worker: model.Worker) -> None:
        """A worker saves once, after its last call."""
        self.note("save", worker.id)
        process = self.world.workers[worker.id]
        self.demand(worker.id not in self._saved, "worker", worker.id, "saves twice")
        self.demand(not process.held or worker.id in self._killed, "worker", worker.id, "saves while it holds calls")
        self.demand(process.keeps_state, "worker", worker.id, "is to save and cannot")
        self._saved.add(worker.id)

    def _saw_restore(self, worker: model.Worker, state: bytes) -> None:
        """A worker takes up, before any call, what another has made of its own and earlier calls."""
        self.note("restore", worker.id, state)
        process = self.world.workers[worker.id]
        self.demand(not process.sequences, "worker", worker.id, "takes up state after calls")
        self.demand(process.keeps_state, "worker", worker.id, "is to restore and cannot")
        states = {self.world.workers[each].state for each in self._saved}
        self.demand(int(state) in states, "worker", worker.id, "takes up state that nobody has saved")

    def _check_seat(self, worker: model.Worker, call: model.Call, truth: Truth) -> None:
        """Calls of an instance, and those of a host's default one, never leave their seat."""
        contract, fn_id = worker.contract, call.header.fn_id
        assert contract is not None
        self.demand(call.contract is contract, truth, "goes to a worker of another contract or seat")
        if not contract.record.seats:
            return
        instance = fn_id >> 16 if fn_id else truth.session_id
        seat = self._seats.setdefault((id(contract.record), instance), contract)
        self.demand(seat is contract, truth, "leaves the seat of its instance")
        self._records[id(contract.record)] = contract.record  # so that its id stays its own

    def _saw_kill(self, worker: model.Worker) -> None:
        """Order a death once; one for a call only while that runs, or when it has had its time."""
        self.demand(worker.id not in self._killed, "worker", worker.id, "is killed twice")
        self._killed.add(worker.id)
        self._ordered.add(worker.id)
        truth = self._by_call.get(worker.call) if worker.call is not None else None
        if truth is None or "ran" not in worker.verdict.split():
            return
        now_ns = self.world.schedule.now_ns
        is_over = now_ns >= truth.run_out_ns
        self.demand(truth.is_marked or is_over, "worker", worker.id, "is killed for", truth, "which it does not run")
        is_deaf = now_ns >= truth.finished_ns + KILL_AFTER_NS
        self.demand(truth.code is None or is_deaf, "worker", worker.id, "is killed for", truth, "which it has finished")

    def _saw_inspection(self, worker: model.Worker, sequence: int) -> None:
        """Look at a process only for a call that it runs, that is past its time and that has no answer."""
        (call,) = (each for each in worker.held if each.sequence == sequence)  # it may not have told of the one before
        truth = self._by_call[call]
        self.note("inspect", truth.number, worker.id)
        now_ns = self.world.schedule.now_ns
        is_due = now_ns >= min(truth.deadline_ns, truth.run_out_ns)
        self.demand(is_due and truth.is_marked, truth, "is inspected and not past its time, or not begun")
        is_first = not truth.answers and not truth.inspected_ns and truth.code is None
        self.demand(is_first or truth.is_lied_about, truth, "is inspected and has its answer")
        truth.inspected_ns = now_ns

    def _saw_crash(self, effect: model.RecordCrash, truth: Truth) -> None:
        """Record what a contract did to its worker: once, and while the slot still holds the call."""
        self.note("crash", truth.number, effect.code.name)
        self.world.counts[f"crash {effect.code.name}"] += 1
        self.demand(not truth.is_released, truth, "is put on record after its slot was released")
        self.demand(not truth.is_recorded, truth, "is put on record twice")
        self.demand(truth.call.contract.owner is None, truth, "is private and put on record")
        truth.is_recorded = True
        if effect.code is AbiErrorCode.OUT_OF_MEMORY:
            self.demand(truth.is_lied_about or truth.code == effect.code, truth, "is put on record and had memory left")
            return
        worker_id = truth.workers[-1]
        self.demand(truth.is_marked, truth, "is put on record and had not begun")
        self.demand(truth.code is None, truth, "is put on record and was finished")
        self.demand(
            not self.world.workers[worker_id].is_alive, truth, "is put on record and worker", worker_id, "lives"
        )
        self.demand(worker_id not in self._recorded, "the death of worker", worker_id, "is put on record twice")
        self._recorded.add(worker_id)
        is_late = effect.code is AbiErrorCode.DEADLINE_EXCEEDED
        is_awaited = not truth.is_cancelled and not truth.is_host_gone
        self.demand(is_late or is_awaited, truth, "is put on record and nobody waited for it")

    def _check_back_off(self, worker: model.Worker) -> None:
        contract = worker.contract
        assert contract is not None
        if not contract.failures:
            return
        failed_ns = contract.retry_ns - backoff_ns(contract.failures)  # if only just, the load was ordered before
        is_early = failed_ns < self.world.schedule.now_ns < contract.retry_ns
        self.demand(not is_early, contract.record.title, "is loaded again before its back-off is over")

    def _saw_result(self, effect: model.SendResult) -> None:
        truth = self._by_call[effect.call]
        self._answer(truth, f"result {effect.code}", is_kept=not effect.slot_free)
        if not truth.is_lied_about:
            self.demand(truth.code is not None, truth, "has a result and was not finished")
            self.demand(truth.code == effect.code, truth, "gave", truth.code, "and is answered", effect.code)

    def _saw_failure(self, effect: model.SendFailure) -> None:
        key = effect.session_id, effect.call_id
        if effect.slot == "unused":
            self.demand(self._refusals[key] > 0, "a refusal too many for", key)
            self._refusals[key] -= 1
            self.answers[f"refused {effect.code.name}"] += 1
            return
        if key in self._untied:
            self._untied.remove(key)
            codes = AbiErrorCode.REENTRANT_CALL, AbiErrorCode.BUSY
            self.demand(effect.code in codes and effect.began == "no", key, "fails at once with", effect.code.name)
            self.answers[f"untied {effect.code.name}"] += 1
            return
        truth = self._by_id.get(key)
        self.demand(truth is not None, "an answer too many for", key)
        assert truth is not None
        self._answer(truth, f"failure {effect.code.name}, began {effect.began}", is_kept=effect.slot == "kept")
        ran_out = truth.code == effect.code == AbiErrorCode.OUT_OF_MEMORY  # the broker says so in its own words
        is_overdue = 0 < truth.inspected_ns <= truth.finished_ns  # it was to be told so before it was finished
        is_right = ran_out or is_overdue or truth.code is None
        self.demand(is_right, truth, "was finished and is answered", effect.code.name)
        self.demand(effect.began != "yes" or truth.is_marked, truth, "is said to have begun")
        self.demand(effect.began != "no" or not truth.is_begun, truth, "is said not to have begun")
        truth.is_denied = effect.began == "no"
        self._check_reason(truth, effect)

    def _check_reason(self, truth: Truth, effect: model.SendFailure) -> None:
        now_ns = self.world.schedule.now_ns
        if effect.code is AbiErrorCode.DEADLINE_EXCEEDED:
            has_run_out = bool(truth.workers) and now_ns >= truth.run_out_ns
            has_alarm = any(cause.signal == SIGALRM for cause in truth.causes)
            is_due = now_ns >= truth.deadline_ns or has_run_out or has_alarm
            self.demand(is_due, truth, "is not at its deadline")
        elif effect.code is AbiErrorCode.CANCELLED:
            self.demand(truth.is_unwanted, truth, "was not cancelled")
        elif effect.code is AbiErrorCode.WORKER_CRASHED:
            is_alive = self.world.workers[truth.workers[-1]].is_alive
            self.demand(not is_alive, truth, "is said to have crashed a worker that lives")
            is_kept = truth.is_recorded or truth.call.contract.owner is not None or truth.workers[-1] in self._orphans
            self.demand(is_kept or effect.began == "no", truth, "has crashed its worker and is not put on record")
            attempts = 1 if effect.began == "yes" else ATTEMPTS_MAX
            self.demand(len(truth.workers) >= attempts, truth, "was not tried again")
        elif effect.code is AbiErrorCode.OUT_OF_MEMORY:
            lied = truth.is_lied_about
            self.demand(lied or truth.code == effect.code, truth, "did not run out of memory")
        elif effect.code is AbiErrorCode.QUARANTINED:
            is_resting = truth.call.contract.quarantine.is_in_force
            self.demand(is_resting and bool(effect.retry_after), truth, "rests without a quarantine, or for no time")
        elif effect.code is AbiErrorCode.BUSY:
            is_nested = truth.parent is not None and effect.limit.startswith("workers")
            self.demand(is_nested or truth.call.contract.queue.is_full, truth, "makes room in a queue that is not full")
        elif effect.code is AbiErrorCode.REENTRANT_CALL:
            self.demand(truth.parent is not None, truth, "is a host's and told to wait for itself")
        else:
            codes = AbiErrorCode.HOST_CONTRACT_NOT_FOUND, AbiErrorCode.HOST_CONTRACT_CALL_FAILED
            self.demand(effect.code in codes, truth, "fails with", effect.code.name)

    def _answer(self, truth: Truth, text: str, *, is_kept: bool) -> None:
        self.note("answer", truth.number, text, "kept" if is_kept else "free")
        self.answers[text] += 1
        truth.answers += 1
        self.demand(truth.answers == 1, truth, "is answered twice")
        self.demand(not truth.is_host_gone, truth, "is answered to nobody")
        self._unanswered.pop(truth, None)
        truth.is_kept = is_kept
        if not is_kept:
            self._release(truth)

    def _saw_released(self, session_id: bytes, call_id: int) -> None:
        self.note("released", session_id.hex()[-4:], call_id)
        truth = self._by_id.get((session_id, call_id))
        if truth is None and (session_id, call_id) in self._void_cancels:
            self._void_cancels.remove((session_id, call_id))
            return
        self.demand(truth is not None and truth.is_kept, "RELEASED of a call whose slot was not kept:", call_id)
        assert truth is not None
        self.demand(not truth.is_host_gone, truth, "is released to nobody")
        self._release(truth)

    def _release(self, truth: Truth) -> None:
        """The slot is the host's again: nobody else may touch it any more."""
        self.demand(not truth.is_released, truth, "is released twice")
        for worker_id in truth.workers:
            is_touched = self.world.workers[worker_id].may_touch(truth.number)
            self.demand(not is_touched, truth, "is released while worker", worker_id, "may touch its slot")
        truth.is_released = True
        self._forget(truth)

    def _forget(self, truth: Truth) -> None:
        del self._by_id[truth.session_id, truth.call_id], self._open[truth]

    def _saw_drop(self, pair: Pair) -> None:
        for process in self.world.workers.values():
            for number in filter(process.may_touch, process.held):
                is_there = self._by_number[number].call.pair is pair
                self.demand(not is_there, "pair", pair.key, "is dropped while worker", process.id, "may touch it")

    # -- what the dispatcher's state must be ----------------------------------------------------------------------
    def check(self, dispatcher: Dispatcher) -> None:
        """Look at everything between two events."""
        self._check_times()
        self._check_calls(dispatcher)
        for contract in (*dispatcher.catalogue.serving.values(), *dispatcher.catalogue.pending.values()):
            for place in contract.places:
                self._check_contract(dispatcher, place)
        self._check_workers(dispatcher)
        if self.world.swarm.nesting:
            self._check_chains(dispatcher)
        for session in dispatcher.sessions.values():
            count = len(session.calls)
            self.demand(count <= CALLS_IN_FLIGHT_MAX, "a session has", count, "calls")

    def _check_chains(self, dispatcher: Dispatcher) -> None:
        """Whatever waits, waits in the end for a worker that runs, or that may yet come: found the other way round."""
        workers = list(dispatcher.workforce.by_id.values())
        going: set[object] = {worker for worker in workers if worker.inner is None}
        waiting = [worker for worker in workers if worker.inner is not None]
        contracts = {call.contract for call in self._by_call if call.state is CallState.QUEUED}
        contracts |= {worker.inner.contract for worker in waiting if worker.inner is not None}
        going |= {contract for contract in contracts if contract.may_have_more_workers and contract.inherits is None}
        before = -1
        while len(going) > before:
            before = len(going)
            for contract in contracts:
                heirs_wait_for = contract.inherits
                if not going.isdisjoint(contract.workers if heirs_wait_for is None else (heirs_wait_for,)):
                    going.add(contract)
            for worker in waiting:
                inner = worker.inner
                assert inner is not None
                if (inner.contract if inner.state is CallState.QUEUED else inner.worker) in going:
                    going.add(worker)
        for call, truth in self._by_call.items():
            if call.state is CallState.QUEUED:
                self.demand(call.contract in going, truth, "waits for itself")

    def _check_times(self) -> None:
        now_ns = self.world.schedule.now_ns
        for truth in self._unanswered:
            grace_ns = LATE_NS + (INQUIRY_NS + LATE_NS if truth.inspected_ns else 0)
            self.demand(now_ns <= truth.deadline_ns + grace_ns, truth, "has no answer after its deadline")
            worker = truth.call.worker
            if truth.finished_ns and worker is not None and worker.state is WorkerState.BUSY:
                self.demand(now_ns <= truth.finished_ns + NOTICED_NS, truth, "is done, which nobody notices")
        for request, asked_ns in self._requests.items():
            is_late = now_ns > asked_ns + REGISTRATION_LIMIT_NS + LATE_NS
            self.demand(not is_late, "request", request, "has no answer")

    def _check_calls(self, dispatcher: Dispatcher) -> None:
        ended = [call for call in self._by_call if call.state is CallState.ENDED]
        for call in ended:
            truth = self._by_call.pop(call)
            self.demand(truth.is_released or truth.is_host_gone, truth, "ended and is not released")
            if not truth.is_released:
                self._forget(truth)
        for call, truth in self._by_call.items():
            if call.state is CallState.QUEUED:
                self.demand(call in list(call.contract.queue), truth, "waits in no queue")
                self.demand(_has_timer(dispatcher, call), truth, "waits without a timer")
            else:
                worker = call.worker
                self.demand(worker is not None and call in worker.held, truth, "is held by nobody")
                assert worker is not None
                is_over = truth.answers or truth.is_host_gone or _has_inquiry(dispatcher, call)
                is_watched = _has_timer(dispatcher, call) or (is_over and _is_watched(dispatcher, worker))
                self.demand(bool(is_watched), truth, "runs without a timer")
        in_flight = self.world.server.books.slots_in_flight
        self.demand(in_flight == len(self._by_call), in_flight, "slots in flight for", len(self._by_call), "calls")

    def _check_contract(self, dispatcher: Dispatcher, contract: model.Contract) -> None:
        title, waiting = contract.record.title, dispatcher.workforce.waiting
        count = len(contract.queue)
        self.demand(count <= QUEUE_MAX + WORKERS_MAX, title, "has", count, "calls queued")
        workers_max = 1 if contract.record.seats else contract.record.settings.workers
        workers_max += contract.outgoing is not None
        leaving = sum(worker.state in (WorkerState.LEAVING, WorkerState.LOADING) for worker in contract.workers)
        self.demand(len(contract.workers) - leaving <= workers_max, title, "has too many workers")
        on_account = sum(call.extra is contract for call in self._by_call)
        self.demand(contract.extra == on_account, title, "has", contract.extra, "workers more for", on_account, "calls")
        is_there = contract.outgoing is None or contract.outgoing in contract.workers
        self.demand(is_there, title, "is to have a worker followed that is none of it")
        self.demand(not (count and contract.idle), title, "has calls that wait and workers that do too")
        backs_off = contract.timer is not None and contract.retry_ns > 0
        is_served = contract.workers or contract in waiting or backs_off
        self.demand(bool(is_served) or not count, title, "has calls that wait for nothing")
        self.demand(not contract.retired, title, "is retired and served")

    def _check_workers(self, dispatcher: Dispatcher) -> None:
        force = dispatcher.workforce
        starting = 0
        for worker in force.by_id.values():
            state, contract = worker.state, worker.contract
            starting += state is WorkerState.STARTING
            self.demand((worker.id in self._killed) == (state is WorkerState.DOOMED), "worker", worker.id, state)
            is_member = contract is not None and worker in contract.workers
            serves = (
                state not in (WorkerState.STARTING, WorkerState.BLANK, WorkerState.DOOMED) and not worker.is_followed
            )
            self.demand(is_member == serves, "worker", worker.id, state, "is a member:", is_member)
            is_idle = contract is not None and worker in contract.idle
            self.demand(is_idle == (state is WorkerState.IDLE), "worker", worker.id, state, "is idle:", is_idle)
            self.demand((worker in force.blank) == (state is WorkerState.BLANK), "worker", worker.id, state)
            if contract is not None and contract.retired and state is not WorkerState.DOOMED:
                ends = (WorkerState.BUSY, WorkerState.WAITING, WorkerState.LEAVING, WorkerState.SAVING)
                self.demand(state in ends, "worker", worker.id, "serves a retired contract:", state)
            if state is WorkerState.RESTORING:
                is_due = worker.is_restoring or (contract is not None and contract.inherits is not None)
                self.demand(is_due, "worker", worker.id, "waits for state that does not come")
            if worker.heir is not None:
                self.demand(worker.heir.inherits is worker, "worker", worker.id, "has an heir that knows nothing of it")
            if state is WorkerState.BUSY:
                self.demand(bool(worker.held), "worker", worker.id, "is busy with nothing")
                self.demand(worker.inner is None, "worker", worker.id, "is busy and waits")
            if state is WorkerState.WAITING:
                self.demand(worker.inner is not None, "worker", worker.id, "waits for nothing")
                self.demand(not worker.ahead, "worker", worker.id, "waits and holds calls ahead")
            if worker.inner is not None:
                is_its_own = worker.call is not None and worker.inner.parent is worker.call
                self.demand(is_its_own and not worker.inner.answered, "worker", worker.id, "waits for what is over")
            self.demand(len(worker.ahead) <= WINDOW_MAX, "worker", worker.id, "holds", len(worker.ahead), "ahead")
            self.demand(worker.call is not None or not worker.ahead, "worker", worker.id, "rests with calls ahead")
        self.demand(len(force.by_id) <= WORKERS_MAX, len(force.by_id), "workers")
        self.demand(starting <= STARTS_AT_ONCE_MAX, starting, "workers start at once")
        self.demand(not (force.blank and force.waiting), "blank workers and contracts that wait for one")

    # -- the end ------------------------------------------------------------------------------------------------
    def check_rest(self) -> None:
        """Everything has come to rest, and hosts are still there: nothing is owed."""
        for truth in self._by_number.values():
            if not truth.is_host_gone:
                self.demand(truth.answers == 1, truth, "has", truth.answers, "answers in the end")
                self.demand(truth.is_released, truth, "is not released in the end")
        self.demand(not self._requests, "requests are not answered:", list(self._requests))
        for host in self.world.hosts:
            self.demand(not host.calls, "host", host.id, "still waits for calls", list(host.calls))
            self.demand(not host.requests, "host", host.id, "still waits for requests", host.requests)

    def check_end(self, dispatcher: Dispatcher, spares: int) -> None:
        """All hosts are gone and all contracts with them: the broker is as it was in the beginning."""
        books, force, memory = self.world.server.books, dispatcher.workforce, self.world.server.memory
        self.demand(books.total_bytes == 0 and not memory.pairs, books.total_bytes, "bytes are left")
        self.demand(not self._by_call and not self._by_id, "calls are left")
        self.demand(not dispatcher.sessions and not dispatcher.catalogue.pending, "sessions or registrations are left")
        self.demand(dispatcher.next_deadline() is None, "timers are left")
        self.demand(not force.waiting, "contracts wait for workers")
        states = {worker.state for worker in force.by_id.values()}
        self.demand(states <= {WorkerState.BLANK}, "workers are left:", states)
        self.demand(len(force.by_id) >= spares, len(force.by_id), "spares of", spares)
        alive = {worker.id for worker in self.world.workers.values() if worker.is_alive}
        self.demand(alive == set(force.by_id), "processes", alive, "for workers", set(force.by_id))


def _is_watched(dispatcher: Dispatcher, worker: model.Worker) -> bool:
    """Whether something sees to it that a worker answers, or dies."""
    if worker.state is WorkerState.DOOMED:
        return True
    if worker.call is not None and _has_timer(dispatcher, worker.call):
        return True
    return worker.timer is not None and worker in dispatcher._wheel.buckets.get(worker.timer, {})


def _has_timer(dispatcher: Dispatcher, call: model.Call) -> bool:
    return call.timer is not None and call in dispatcher._wheel.buckets.get(call.timer, {})


def _has_inquiry(dispatcher: Dispatcher, call: model.Call) -> bool:
    """Whether a call's host is told that it is past its time, soon and in any case."""
    inquiry = call.inquiry
    return inquiry is not None and inquiry in dispatcher._wheel.buckets.get(inquiry.timer, {})
