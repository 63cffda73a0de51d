"""Calls in the hands of workers: handed over, begun, answered for, taken back, and what becomes of them at a death.

This is the half of the dispatcher that its events have in common; it has no events of its own. What a worker holds is
in the order in which it was handed over: `finished` (marked as done, not answered for), `call`, `ahead`.

    QUEUED ──_hand, _hand_ahead──> HELD ──_settle──> _end
       ^─────────── _requeue ───────┤
                                    └──_bury: its worker is dead

Between two messages the slots know more than the broker: `_catch_up` reads how far a worker is, and before a worker is
killed `_take_back` forbids it what it has not begun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from luacell.broker import answers, carrying, chains, recycling
from luacell.broker.books import Books
from luacell.broker.catalogue import Catalogue
from luacell.broker.causes import HOST_LEAVES, NO_VITALS, SIGALRM, Cause, Vitals
from luacell.broker.deaths import Episode, cpu_of, episode_of, exhaustion_of
from luacell.broker.model import (
    BUSY,
    DOOMED,
    ENDED,
    HELD,
    IDLE,
    LEAVING,
    LOADING,
    QUEUED,
    WAITING,
    Call,
    Contract,
    DropPair,
    Effect,
    Inquiry,
    InspectWorker,
    Record,
    SendCall,
    SendReleased,
    SendResult,
    Session,
    SlotMemory,
    Subject,
    Worker,
)
from luacell.broker.registry import Registry
from luacell.broker.seats import seat_of, seats_beside
from luacell.broker.timers import TimerWheel
from luacell.broker.windows import SLOW_NS
from luacell.broker.workforce import Workforce
from luacell.protocol import headers
from luacell.protocol.errors import AbiErrorCode, Began
from luacell.protocol.limits import ERROR_TEXT_MAX, NS_PER_MS, NS_PER_S
from luacell.protocol.slots import Answer

KILL_AFTER_NS: Final = 100 * NS_PER_MS  # at its caller's deadline a call that ran this long costs its worker
INQUIRY_LIMIT_NS: Final = 50 * NS_PER_MS  # what is asked of a process past a deadline; the promise is 250 ms
RETIRED: Final = "its VM must not be used again"
ATTEMPTS_MAX: Final = 2  # a call that was not begun is handed out once more


class Handover:
    """What the events of the dispatcher have in common; see there for the arguments."""

    def __init__(
        self,
        memory: SlotMemory,
        books: Books,
        registry: Registry,
        new_routing_id: Callable[[], bytes],
        spares: int = 1,
        workers_max: int | None = None,
    ) -> None:
        self._memory = memory
        self._books = books
        self._wheel: TimerWheel[Subject] = TimerWheel()
        self.workforce = Workforce(self._wheel, new_routing_id, spares, workers_max)
        self.catalogue = Catalogue(registry, self.workforce, self._wheel)
        self.sessions: dict[bytes, Session] = {}
        self.answered_count = 0
        self.is_draining = False
        self._last_sequence = 0
        self._look_ns = 0  # when to look around next; see `Dispatcher`
        self._serving = self.catalogue.serving
        self._slots = books.slots
        self._buckets = self._wheel.buckets

    def _hand(self, worker: Worker, call: Call, now_ns: int, effects: list[Effect]) -> None:
        """Give a call to a worker that has nothing else to do."""
        contract = call.contract
        worker.state = LEAVING if contract.has_too_many_workers else BUSY  # the former came for a while
        contract.called = True
        self._hold(worker, call)
        self._take_up(worker, call, now_ns)
        effects.append(SendCall(worker, call))

    def _hand_ahead(self, worker: Worker, call: Call, now_ns: int, effects: list[Effect]) -> None:
        """Give a call to a busy worker, to be begun when those before it are done."""
        self._hold(worker, call)
        worker.ahead.append(call)
        if worker.timer is None:
            worker.timer = self._wheel.set(now_ns + SLOW_NS, worker)
        effects.append(SendCall(worker, call))

    def _hold(self, worker: Worker, call: Call) -> None:
        self._last_sequence += 1
        call.worker = worker
        call.sequence = self._last_sequence
        call.state = HELD

    def _take_up(self, worker: Worker, call: Call, now_ns: int) -> None:
        """The worker is free to begin the call: the limit on its running time counts from now."""
        worker.call = call
        call.sent_ns = now_ns
        kill_ns = now_ns + call.contract.run_limit_ns
        if call.timer is None:
            call.timer = self._wheel.set(kill_ns, call)
        elif kill_ns < call.deadline_ns:
            self._set_timer(call, kill_ns)

    def _go_on(self, worker: Worker, now_ns: int) -> None:
        """The call that the worker was running is over: it begins the next one that it holds."""
        worker.call = None
        if worker.ahead:
            self._take_up(worker, worker.ahead.popleft(), now_ns)

    def _employ(self, worker: Worker, now_ns: int, effects: list[Effect]) -> None:
        """Give a free worker the next call of its contract, or let it rest, or go."""
        contract = worker.contract
        assert contract is not None
        if worker.heir is not None:
            carrying.ask_to_save(worker, now_ns, self._wheel, effects)
            return
        if contract.retired:
            self._dismiss(worker, "its contract was replaced or unregistered", now_ns, effects)
            return
        if worker.state is LEAVING:
            self._dismiss(worker, _why_it_leaves(worker, self.workforce.has_host), now_ns, effects)
            return
        call = contract.queue.pop()
        if call is not None:
            self._hand(worker, call, now_ns, effects)
        elif contract.has_too_many_workers:
            self._dismiss(worker, "the calls that it came for are done", now_ns, effects)
        else:
            worker.state = IDLE
            worker.paced_ns = 0
            contract.idle.append(worker)

    def _catch_up(self, worker: Worker, now_ns: int, effects: list[Effect]) -> None:
        """Believe the slots about what a worker has finished and not answered for: it may be in its next call.

        Those who wait for it are answered; their slots stay in quarantine until the worker says so itself.
        """
        while worker.call is not None:
            call = worker.call
            seen = self._memory.look(call)
            if seen.done != call.sequence:
                return
            if not call.answered and not seen.flags & headers.NOT_BEGUN:
                call.answered = True
                self._resume(call, now_ns)
                self._relay(call, seen, now_ns, effects, slot_free=False)
            if call.answered and call.timer is not None:
                self._wheel.cancel(call.timer, call)
                call.timer = None
            self._tell_overdue(call, NO_VITALS, effects)
            worker.finished.append(call)
            self._go_on(worker, now_ns)
            if seen.flags & headers.RETIRE:
                self._dismiss(worker, RETIRED, now_ns, effects)
                return
            if worker.call is None:
                worker.silent_ns = now_ns
                if worker.timer is None:
                    worker.timer = self._wheel.set(now_ns + SLOW_NS, worker)

    def _settle(self, call: Call, done: headers.Done | Answer, now_ns: int, effects: list[Effect]) -> None:
        """Relay a worker's answer, unless the host has been answered, and release the slot."""
        if call.answered:
            self._release_answered(call, now_ns, effects)
        elif is_passed_by(call, done, now_ns):
            self._requeue([call], now_ns, effects)
        elif done.flags & headers.NOT_BEGUN:
            effects.append(answers.deadline_exceeded(call, "no", now_ns))
            self._end(call, now_ns, effects)
        else:
            self._relay(call, done, now_ns, effects, slot_free=True)
            self._end(call, now_ns, effects)

    def _bury(self, worker: Worker, cause: Cause, now_ns: int, effects: list[Effect]) -> None:
        """Decide about the calls that a dead worker held, in order.

        The first that is not done is the one it died of, or would have begun next; those behind it are innocent.
        """
        held = worker.held
        worker.call = None
        worker.finished.clear()
        worker.ahead.clear()
        is_first = True
        unbegun: list[Call] = []
        for call in held:
            seen = self._memory.look(call)
            self._tell_overdue(call, cause.vitals, effects)
            if seen.done == call.sequence or call.answered:
                if is_passed_by(call, seen, now_ns):
                    unbegun.append(call)
                    continue
                if has_crashed(call, seen) and not worker.verdict and cause.is_own_doing(""):
                    self._blame(call, now_ns, effects)
                self._settle(call, seen, now_ns, effects)
                continue
            if is_first:
                is_first = False
                if seen.begun == call.sequence or call.attempts + 1 >= ATTEMPTS_MAX:
                    episode = episode_of(call, seen, cause.vitals, now_ns)
                    self._fail_buried(episode, cause, worker.verdict, now_ns, effects)
                    continue
                call.attempts += 1
            unbegun.append(call)
        self._requeue(unbegun, now_ns, effects)

    def _fail_buried(self, episode: Episode, cause: Cause, verdict: str, now_ns: int, effects: list[Effect]) -> None:
        """Answer for a call that its worker has died of."""
        call, began, _, _, cpu = episode
        if cause.is_own_doing(verdict):
            self._blame(call, now_ns, effects)
        if cause.signal == SIGALRM:
            effects.append(answers.stopped_by_timer(call, began, now_ns, cpu))
        else:
            effects.append(answers.crashed(call, cause, verdict, began, now_ns, cpu))
        self._end(call, now_ns, effects)

    def _last_episode(self, worker: Worker, cause: Cause, now_ns: int) -> Episode | None:
        """Return what a worker that has died was running, if that is anything."""
        for call in worker.held:
            seen = self._memory.look(call)
            if is_running(call, seen):
                return episode_of(call, seen, cause.vitals, now_ns)
        return None

    def _inquire(self, call: Call, limit: str, seen: Answer, now_ns: int, effects: list[Effect]) -> None:
        """Have the process of a running call looked at before its host is told that it is past its time.

        The call counts as answered meanwhile; whatever ends it first has its host told first.
        """
        inquiry = Inquiry(call, now_ns, limit, seen, 0)
        inquiry.timer = self._wheel.set(now_ns + INQUIRY_LIMIT_NS, inquiry)
        call.inquiry = inquiry
        effects.append(InspectWorker(worker_of(call), call.sequence))

    def _tell_overdue(self, call: Call, vitals: Vitals, effects: list[Effect]) -> None:
        """Tell the host of a call that was past its time and running, with what is known of it; once."""
        inquiry, call.inquiry = call.inquiry, None
        if inquiry is None:
            return
        self._wheel.cancel(inquiry.timer, inquiry)
        if self.sessions.get(call.session.id) is not call.session:
            return
        began = has_begun(call, self._memory.look(call))  # its worker may have refused it since
        shown, cpu = (vitals, cpu_of(inquiry.seen, vitals)) if began == "yes" else (NO_VITALS, None)
        effects.append(
            answers.deadline_exceeded(
                call, began, inquiry.due_ns, limit=inquiry.limit, slot="kept", cpu=cpu, vitals=shown
            )
        )

    def _blame(self, call: Call, now_ns: int, effects: list[Effect]) -> None:
        """A call has crashed its contract, or had to be killed: where that is often so, those that wait rest, too."""
        contract = call.contract
        host = call.host
        if not contract.quarantine.crashed(host.id, call, now_ns):
            return
        contract.note_quarantine()
        wait_ns = contract.quarantine.wait_ns(host.id, now_ns)
        fields = {
            "contract": contract.record.title,
            "host": host.id.hex(),
            "for_all_hosts": contract.quarantine.whole is not None,
            "rest_s": wait_ns / NS_PER_S,
        }
        effects.append(Record("warning", "contract quarantined", fields))
        for place in seats_beside(contract, self._serving.get(contract.record.id)):
            for waiting in list(place.queue):
                if waiting is not call and self._must_rest(waiting, now_ns, effects):
                    place.queue.remove(waiting.owner, waiting)
                    self._end(waiting, now_ns, effects)

    def _must_rest(self, call: Call, now_ns: int, effects: list[Effect]) -> bool:
        """Answer a call that waits for a contract in quarantine, unless it is the one that may try."""
        quarantine = call.contract.quarantine
        if not quarantine.is_in_force or quarantine.is_trial(call):
            return False
        wait_ns = quarantine.wait_ns(call.host.id, now_ns)
        if wait_ns:
            effects.append(answers.quarantined(call, wait_ns, now_ns))
        else:
            quarantine.accepted(call.host.id, call)
        return wait_ns > 0

    def _requeue(self, calls: list[Call], now_ns: int, effects: list[Effect]) -> None:
        """Let other workers have calls that were not begun, ahead of all others: they have waited longest."""
        contracts: dict[Contract, None] = {}
        for call in reversed(calls):
            call.worker = None
            call.state = QUEUED
            call.sent_ns = 0
            call.taken_back = False
            contract = call.contract
            if contract.retired:
                successor = self.contract_for(call.session.id, call.header.contract_id)
                if successor is None:
                    self._fail_unregistered(call, now_ns, effects)
                    continue
                contract = call.contract = seat_of(successor, call.session.id, call.header.fn_id)
            if self._must_rest(call, now_ns, effects):
                self._end(call, now_ns, effects)
                continue
            self._set_timer(call, call.deadline_ns)
            contract.queue.push_front(call.owner, call)
            contracts[contract] = None
        for contract in contracts:
            while contract.idle and contract.queue.count:
                self._employ(contract.idle.pop(), now_ns, effects)
            self.catalogue.staff(contract, now_ns, effects)

    def _end_run(self, call: Call, now_ns: int, effects: list[Effect]) -> None:
        """Kill the worker that runs a call nobody waits for, or look again later where it may yet end well.

        A worker that has not begun the call will not, but it must say so by the run limit.
        """
        if worker_of(call).inner is not None:  # it waits, and not for long: what it waits for has no later deadline
            call.timer = self._wheel.set(now_ns + KILL_AFTER_NS, call)
            return
        ran_ns = now_ns - call.sent_ns - call.waited_ns
        has_run_out = ran_ns >= call.contract.run_limit_ns
        runs = is_running(call, self._memory.look(call))
        if has_run_out or (ran_ns >= KILL_AFTER_NS and runs):
            worker = worker_of(call)
            self._stop_running(call, f"it ran {call.title} for {ran_ns / NS_PER_S:.3f} s", now_ns, effects)
            if has_run_out and runs and worker.state is DOOMED:
                self._blame(call, now_ns, effects)
        else:
            call.timer = self._wheel.set(now_ns - ran_ns + call.contract.run_limit_ns, call)

    def _stop_running(self, call: Call, verdict: str, now_ns: int, effects: list[Effect]) -> None:
        """Kill a worker for the call that it runs, unless that has just ended: then those behind it have their turn.

        They are withdrawn first, so that the worker begins none of them before the signal arrives.
        """
        worker = worker_of(call)
        self._take_back(worker.ahead)
        self._catch_up(worker, now_ns, effects)
        if worker.call is call:
            self._dismiss(worker, verdict, now_ns, effects)

    def _spread(self, worker: Worker, now_ns: int, effects: list[Effect]) -> None:
        """Give the calls behind a slow one to other workers of the contract, where it may have any.

        They are withdrawn while the worker is seen inside the slow call: it cannot have come to them, and will leave
        their slots alone when it does.
        """
        running, contract = worker.call, worker.contract
        if not worker.ahead or running is None or contract is None or contract.workers_max == 1:
            return
        if now_ns - running.sent_ns >= SLOW_NS and is_running(running, self._memory.look(running)):
            self._give_away_what_is_behind(worker, running, now_ns, effects)

    def _give_away_what_is_behind(self, worker: Worker, running: Call, now_ns: int, effects: list[Effect]) -> None:
        behind = list(worker.ahead)
        self._take_back(behind)
        if not is_running(running, self._memory.look(running)):  # it has just ended: the worker says what it passes by
            return
        worker.ahead.clear()
        worker.passed.extend(call.sequence for call in behind)
        for call in behind:
            if call.answered:
                self._release_answered(call, now_ns, effects)
        self._requeue([call for call in behind if not call.answered], now_ns, effects)

    # -- calls that contracts make ------------------------------------------------------------------------------
    def _await(self, call: Call, outer: Call, now_ns: int, effects: list[Effect]) -> None:
        """A contract has made a call: its worker waits for the answer, does not run, and holds no other."""
        worker = worker_of(outer)
        worker.inner = call
        worker.waits_ns = now_ns
        if worker.state is BUSY:
            worker.state = WAITING
        self._set_timer(outer, outer.deadline_ns)
        if worker.ahead:
            self._give_away_what_is_behind(worker, outer, now_ns, effects)

    def _resume(self, call: Call, now_ns: int) -> None:
        """A call is answered: where a contract has made it, that runs again, and the limit on this goes on."""
        outer, worker = call.parent, call.session.worker
        if outer is None or worker is None or worker.inner is not call:
            return
        worker.inner = None
        if worker.state is WAITING:
            worker.state = BUSY
        outer.waited_ns += now_ns - worker.waits_ns
        if worker.call is outer:
            look_ns = outer.sent_ns + outer.waited_ns + outer.contract.run_limit_ns
            latest_ns = now_ns + KILL_AFTER_NS if outer.answered else outer.deadline_ns
            self._wheel.cancel(outer.timer or 0, outer)
            outer.timer = self._wheel.set(min(look_ns, latest_ns), outer)

    def can_progress(self, contract: Contract) -> bool:
        """Whether a call that is queued for a contract will be served, whoever waits for whom."""
        return chains.can_progress(contract, can_grow=self.workforce.can_grow)

    def _untie(self, call: Call, now_ns: int, effects: list[Effect]) -> None:
        """Let a nested call that would wait for itself have a worker of its own.

        It fails where the state of its contract, or the bound on workers, forbids that.
        It is not queued, or is about to be removed from its queue.
        """
        contract = call.contract
        if contract.record.settings.stateless and not self.workforce.can_grow:
            effects.append(answers.no_worker_for_chain(call, self.workforce.workers_max, now_ns))
            self._end(call, now_ns, effects)
        elif contract.record.settings.stateless:
            contract.extra += 1
            call.extra = contract
            contract.queue.push_front(call.owner, call)
            self.catalogue.staff(contract, now_ns, effects)
        else:
            effects.append(answers.reentrant(call, chains.chain_of(call), now_ns))
            self._end(call, now_ns, effects)

    def _untie_all(self, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        """A contract has a worker less: see to the nested calls that it might have served."""
        for call in () if contract.retired else [call for call in contract.queue if call.parent is not None]:
            if self.can_progress(contract):
                return
            contract.queue.remove(call.owner, call)
            self._untie(call, now_ns, effects)

    def _has_passed(self, worker: Worker, sequence: int) -> bool:
        """Note that a worker has come to a call that was taken back from it; tell whether that is so."""
        passed = worker.passed
        is_next = bool(passed) and passed[0] == sequence and not worker.finished
        if is_next and (worker.call is None or worker.call.sequence > sequence):
            passed.popleft()
            return True
        return False

    def _take_back(self, calls: Iterable[Call]) -> None:
        """Forbid a worker to begin calls that it holds; when it has passed them by, others get them."""
        for call in calls:
            if not call.answered:
                self._memory.withdraw(call)
                call.taken_back = True

    def _dismiss(self, worker: Worker, verdict: str, now_ns: int, effects: list[Effect]) -> None:
        """Doom a worker; where it was loading, that has failed, and where calls wait, another is to come."""
        was_loading, contract = worker.state is LOADING, worker.contract
        self._take_back(worker.held)
        self.workforce.doom(worker, verdict, now_ns, effects)
        if contract is None:
            return
        self._part(worker, verdict, now_ns, effects)
        if was_loading:
            self._load_failed(contract, "load", verdict, now_ns, effects)
        self.catalogue.staff(contract, now_ns, effects)

    def _part(self, worker: Worker, why: str, now_ns: int, effects: list[Effect]) -> None:
        """A worker is out of use: state that it was to hand on, or was taking up, is lost."""
        heir, contract = worker.heir, worker.contract
        if worker.is_restoring and contract is not None:
            worker.is_restoring = False
            contract.state = None
            effects.append(carrying.lost(contract, why))
        if heir is not None:
            carrying.disinherit(heir)
            effects.append(carrying.lost(heir, why))
            self._hand_on(heir, now_ns, effects)

    def _hand_on(self, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        """Let the worker that waits for state have it, or its first call where there is none."""
        heir = carrying.hand_on(contract, now_ns, self._wheel, effects)
        if heir is not None:
            self._employ(heir, now_ns, effects)

    def _recycle(self, worker: Worker, now_ns: int, effects: list[Effect]) -> None:
        """A worker is worn: get another that follows it, if there may be one."""
        contract = worker.contract
        if contract is None or not recycling.can_begin(worker):
            return
        if not self.workforce.is_full:
            contract.outgoing = worker
            self.catalogue.staff(contract, now_ns, effects)
        elif not worker.is_worn_out:
            worker.is_worn_out = True
            effects.append(recycling.no_room(worker, contract, self.workforce.workers_max))

    def _relieve(self, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        """A worker of the contract has loaded: let a worn one go."""
        old = recycling.relieve(contract, effects)
        if old is not None and old.heir is not None:
            carrying.ask_to_save(old, now_ns, self._wheel, effects)
        elif old is not None:
            self._dismiss(old, recycling.VERDICT, now_ns, effects)

    def _load_failed(self, contract: Contract, problem: str, reason: str, now_ns: int, effects: list[Effect]) -> None:
        for call in self.catalogue.load_failed(contract, problem, reason, now_ns, effects):
            effects.append(answers.load_failure(call.session.id, call.header, contract, now_ns, slot="free"))
            self._end(call, now_ns, effects)

    def contract_for(self, session_id: bytes, contract_id: int) -> Contract | None:
        """Return the contract that is served under an id, unless it is private to another host.

        A contract that calls others may call what the host may for which it runs.
        """
        contract = self._serving.get(contract_id)
        if contract is None or contract.owner is None:
            return contract
        session = self.sessions.get(session_id)
        return contract if session is not None and contract.owner == chains.host_of(session).id else None

    def _give_up(self, call: Call, now_ns: int, effects: list[Effect]) -> Answer:
        """End the wait for a call that a worker holds: it must not be begun, and what it has done counts.

        Its slot stays in quarantine. Where it has no result, the caller sends a failure.

        Returns:
            What its slot says.
        """
        self._memory.withdraw(call)
        seen = self._memory.look(call)
        call.answered = True
        self._resume(call, now_ns)
        if has_result(call, seen):
            self._relay(call, seen, now_ns, effects, slot_free=False)
        return seen

    def _relay(
        self, call: Call, done: headers.Done | Answer, now_ns: int, effects: list[Effect], *, slot_free: bool
    ) -> None:
        """Relay a worker's answer, made fit for that: sizes are within what the host asked for."""
        if done.code == AbiErrorCode.OUT_OF_MEMORY and done.flags & headers.RETIRE:
            # The worker does not know what the broker calls its contract. Without RETIRE it is another's memory.
            in_process = bool(done.flags & headers.PROCESS_FULL)
            crash = exhaustion_of(call, now_ns, in_process=in_process)
            if crash is not None:
                effects.append(crash)
            slot = "free" if slot_free else "kept"
            effects.append(answers.out_of_memory(call, now_ns, in_process=in_process, slot=slot))
            return
        self.answered_count += 1
        out_size = min(done.out_size, call.header.out_size)
        effects.append(SendResult(call, done.code, out_size, min(done.error_size, ERROR_TEXT_MAX), slot_free))

    def _fail_unregistered(self, call: Call, now_ns: int, effects: list[Effect]) -> None:
        effects.append(answers.unregistered(call))
        self._end(call, now_ns, effects)

    def _release_answered(self, call: Call, now_ns: int, effects: list[Effect]) -> None:
        self._tell_overdue(call, NO_VITALS, effects)
        if call.session.id in self.sessions:
            effects.append(SendReleased(call.session.id, call.header.call_id))
        self._end(call, now_ns, effects)

    def _end(self, call: Call, now_ns: int, effects: list[Effect]) -> None:
        call.state = ENDED
        call.answered = True
        call.session.calls.pop(call.header.call_id, None)
        self._resume(call, now_ns)
        if call.extra is not None:
            call.extra.extra -= 1
            call.extra = None
        if call.timer is not None:
            self._wheel.cancel(call.timer, call)
            call.timer = None
        if self._books.release_slot(call.book):
            effects.append(DropPair(call.book.pair))

    def _set_timer(self, call: Call, when_ns: int) -> None:
        """Move the timer of a call that waits for its answer, and so has one."""
        assert call.timer is not None
        self._wheel.cancel(call.timer, call)
        call.timer = self._wheel.set(when_ns, call)


def worker_of(call: Call) -> Worker:
    """Return the worker that holds a call."""
    assert call.worker is not None
    return call.worker


def _why_it_leaves(worker: Worker, has_host: bool) -> str:
    if worker.is_followed:
        return recycling.VERDICT
    return "it came for one call" if has_host else HOST_LEAVES


def has_begun(call: Call, seen: Answer) -> Began:
    """Say whether the contract has been entered, as hosts are told."""
    return "yes" if seen.begun == call.sequence else "no"


def has_result(call: Call, seen: Answer) -> bool:
    """Whether the worker has run the call and written its result."""
    return seen.done == call.sequence and not seen.flags & headers.NOT_BEGUN


def is_passed_by(call: Call, done: headers.Done | Answer, now_ns: int) -> bool:
    """Whether a worker has not begun a call because it was taken back, so that another may have it."""
    is_unbegun = bool(done.flags & headers.NOT_BEGUN)
    return is_unbegun and call.taken_back and not call.answered and now_ns < call.deadline_ns


def has_crashed(call: Call, seen: Answer) -> bool:
    """Whether the worker, now that it is dead, died while it ran the call."""
    return seen.begun == call.sequence and seen.done != call.sequence


def is_running(call: Call, seen: Answer) -> bool:
    """Whether the worker has begun the call and not finished it."""
    return seen.begun == call.sequence and seen.done != call.sequence
