"""The dispatcher: what happens to each call, from its acceptance until its slot is free.

Events come in, effects go out; it owns no socket, process, thread or clock. Every event is a method that
takes the time in nanoseconds (CLOCK_MONOTONIC) and returns the effects to perform, in order. `next_deadline`
says when `time_passed` has something to do.

The rules it keeps, whatever happens:

* a call that was accepted gets exactly one answer, at its deadline at the latest;
* a call is handed to a second worker only if the first one died without having begun it;
* a slot is released only when its worker has answered for it or is dead;
* a worker is killed only for the call that it is running.

What a worker did when it died is read from the call's slot: `done` holds the call's number when the answer is
there, `begun` when the contract had been entered. Slots outlive workers, so no two hand-overs share a number.
`Catalogue` keeps contracts and their loading, `Workforce` the workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from luacell.broker import answers
from luacell.broker.books import ARENA_BITS, Books, PairState, Refusal
from luacell.broker.catalogue import Catalogue
from luacell.broker.causes import SIGALRM, Cause
from luacell.broker.model import (
    BUSY,
    DOOMED,
    ENDED,
    HELD,
    IDLE,
    LOADING,
    QUEUED,
    STARTING,
    Call,
    Contract,
    DropPair,
    Effect,
    SendCall,
    SendReleased,
    SendResult,
    Session,
    SlotMemory,
    Subject,
    Worker,
)
from luacell.broker.registry import Registry
from luacell.broker.timers import BUCKET_NS, TimerWheel
from luacell.broker.workforce import Workforce
from luacell.protocol import headers
from luacell.protocol.errors import AbiErrorCode, Began
from luacell.protocol.limits import (
    CALLS_IN_FLIGHT_MAX,
    ERROR_TEXT_MAX,
    LOAD_LIMIT_NS,
    NS_PER_MS,
    NS_PER_S,
    NS_PER_US,
    START_LIMIT_NS,
)
from luacell.protocol.slots import GENERATION_MASK, Answer

KILL_AFTER_NS: Final = 100 * NS_PER_MS  # at its caller's deadline a call that ran this long costs its worker
ATTEMPTS_MAX: Final = 2  # a call that was not begun is handed out once more


class Dispatcher:
    """The decisions of one broker.

    Args:
        memory: reads and marks slots.
        books: of shared memory.
        registry: of contracts.
        new_routing_id: makes 16 unguessable bytes for a worker.
        spares: blank workers to keep.
    """

    def __init__(
        self,
        memory: SlotMemory,
        books: Books,
        registry: Registry,
        new_routing_id: Callable[[], bytes],
        spares: int = 1,
    ) -> None:
        self._memory = memory
        self._books = books
        self._wheel: TimerWheel[Subject] = TimerWheel()
        self.workforce = Workforce(self._wheel, new_routing_id, spares)
        self.catalogue = Catalogue(registry, self.workforce, self._wheel)
        self.sessions: dict[bytes, Session] = {}
        self.answered_count = 0
        self._last_sequence = 0
        self._serving = self.catalogue.serving
        self._slots = books.slots
        self._buckets = self._wheel.buckets

    # -- hosts ----------------------------------------------------------------------------------------------
    def host_joined(self, session_id: bytes) -> None:
        """A host has introduced itself."""
        self.sessions.setdefault(session_id, Session(session_id))

    def host_left(self, session_id: bytes, now_ns: int) -> list[Effect]:
        """A host is gone: drop what it has queued, let running calls end, reclaim its memory."""
        effects: list[Effect] = []
        session = self.sessions.pop(session_id, None)
        if session is None:
            return effects
        for call in list(session.calls.values()):
            if call.state is QUEUED:
                call.contract.queue.remove(session, call)
                self._end(call, effects)
            else:
                call.answered = True
        self.catalogue.host_left(session_id, now_ns, effects)
        effects.extend(DropPair(pair) for pair in self._books.host_left(session_id))
        return effects

    # -- calls ----------------------------------------------------------------------------------------------
    def call_arrived(
        self, session_id: bytes, header: headers.Call, now_ns: int, arrived_ns: int | None = None
    ) -> list[Effect]:
        """A host calls: hand it to an idle worker, queue it, or refuse it.

        Its deadline counts from `arrived_ns` where that is given: its arguments took a while to follow.
        """
        session = self.sessions.get(session_id)
        if session is None:  # it was sent away for an earlier call of the same message
            return []
        contract = self._contract_for(session_id, header.contract_id)
        if contract is None:
            return [answers.refused(session, header, answers.unknown_contract(header))]
        refusal = answers.malformed(session, header) or answers.over_bound(session, contract)
        if refusal is not None:
            return [answers.refused(session, header, refusal)]
        if contract.retry_ns > now_ns and not contract.workers:
            return [answers.load_failure(session_id, header, contract, slot="unused")]
        book = self._books.take_slot(session_id, header)
        if isinstance(book, Refusal):
            return [answers.refused(session, header, book)]
        budget_us = header.budget_us
        if not 0 < budget_us < contract.deadline_us:
            budget_us = contract.deadline_us
        if arrived_ns is None:
            arrived_ns = now_ns
        deadline_ns = arrived_ns + budget_us * NS_PER_US
        call = session.calls[header.call_id] = Call(session, header, contract, book, arrived_ns, deadline_ns)
        call.timer = self._wheel.set(deadline_ns, call)
        effects: list[Effect] = []
        if contract.idle:
            self._hand(contract.idle.pop(), call, now_ns, effects)
        else:
            contract.queue.push(session, call)
            self.catalogue.staff(contract, now_ns, effects)
        return effects

    def quick_call(self, session_id: bytes, header: headers.Call, now_ns: int) -> Call | None:
        """Do what `call_arrived` does where nothing is unusual and a worker is idle.

        This and `quick_done` are the hot path, each in one piece: a bytecode costs the broker 70 ns here.

        Returns:
            The call, to be sent to its worker; or None, and nothing has changed: `call_arrived` must decide.
        """
        call_id, contract_id, _, budget_us, arena, slot, generation, flags, args_size, out_size = header
        session = self.sessions.get(session_id)
        contract = self._serving.get(contract_id)
        book = self._slots.get(slot << ARENA_BITS | arena)
        if (
            session is None
            or contract is None
            or book is None
            or not contract.idle
            or book.generation != generation
            or book.contract_id != contract_id
            or book.session != session_id
            or args_size > book.args_capacity
            or out_size > book.out_capacity
            or flags != answers.FLAGS
            or not 0 < budget_us <= contract.quick_budget_us
            or not call_id
            or call_id in session.calls
            or len(session.calls) >= CALLS_IN_FLIGHT_MAX
        ):
            return None
        book.generation = ~generation
        book.pair.in_flight += 1
        deadline_ns = now_ns + budget_us * NS_PER_US
        call = session.calls[call_id] = Call(session, header, contract, book, now_ns, deadline_ns)
        number = call.timer = deadline_ns // BUCKET_NS + 1
        bucket = self._buckets.get(number)
        if bucket is not None:
            bucket[call] = None
        else:
            self._wheel.set(deadline_ns, call)
        worker = call.worker = contract.idle.pop()
        worker.call = call
        worker.state = BUSY
        call.sequence = self._last_sequence = self._last_sequence + 1
        call.state = HELD
        call.sent_ns = now_ns
        call.attempts = 1
        contract.called = True
        return call

    def quick_done(self, worker: Worker, done: headers.Done) -> Call | None:
        """Do what `worker_done` does where nothing is unusual and no call waits for the worker.

        Returns:
            The call, whose host is to be sent this very result with its slot free; or None, and nothing has
            changed: `worker_done` must decide.
        """
        sequence, _, out_size, error_size, flags = done
        call, contract = worker.call, worker.contract
        if (
            call is None
            or contract is None
            or call.sequence != sequence
            or flags
            or call.answered
            or worker.state is not BUSY
            or contract.retired
            or contract.queue.count
            or out_size > call.header.out_size
            or error_size > ERROR_TEXT_MAX
            or call.timer is None
            or call.book.pair.state is not PairState.USABLE
        ):
            return None
        worker.call = None
        worker.served += 1
        worker.state = IDLE
        contract.idle.append(worker)
        call.state = ENDED
        call.answered = True
        del call.session.calls[call.header.call_id]
        del self._buckets[call.timer][call]
        call.timer = None
        book = call.book
        book.generation = -book.generation & GENERATION_MASK
        book.pair.in_flight -= 1
        self.answered_count += 1
        return call

    def call_cancelled(self, session_id: bytes, call_id: int, now_ns: int) -> list[Effect]:
        """A host no longer wants an answer.

        Where the call is over, or never came, the host is told that nobody else can touch its slot: it may not know
        whether its message left, or have lost the answer to a signal.
        """
        effects: list[Effect] = []
        session = self.sessions.get(session_id)
        if session is None:
            return effects
        call = session.calls.get(call_id)
        if call is None:
            return [SendReleased(session_id, call_id)]
        if call.answered:
            return effects
        if call.state is QUEUED:
            call.contract.queue.remove(call.session, call)
            effects.append(answers.cancelled(call, "no", now_ns))
            self._end(call, effects)
            return effects
        seen = self._give_up(call, now_ns, effects)
        if not _has_result(call, seen):
            effects.append(answers.cancelled(call, _began(call, seen), now_ns, slot="kept"))
        if _is_running(call, seen) and now_ns - call.sent_ns >= KILL_AFTER_NS:
            self._dismiss(_worker_of(call), "the call that it ran was cancelled", now_ns, effects)
        return effects

    # -- workers --------------------------------------------------------------------------------------------
    def worker_ready(self, worker: Worker, now_ns: int) -> list[Effect]:
        """A worker has connected."""
        effects: list[Effect] = []
        if worker.state is not STARTING:
            self._dismiss(worker, "it reported readiness twice", now_ns, effects)
            return effects
        self.workforce.ready(worker, now_ns, effects)
        if worker.contract is not None:
            self.catalogue.staff(worker.contract, now_ns, effects)
        return effects

    def worker_loaded(self, worker: Worker, problem: str, reason: str, now_ns: int) -> list[Effect]:
        """A worker has loaded its contract, or failed to."""
        effects: list[Effect] = []
        if worker.state is not LOADING:
            self._dismiss(worker, "it reported a load that nobody asked for", now_ns, effects)
            return effects
        contract = worker.contract
        assert contract is not None
        if problem:
            self.workforce.doom(worker, "its contract did not load", now_ns, effects)
            self._load_failed(contract, problem, reason, now_ns, effects)
            self.catalogue.staff(contract, now_ns, effects)
            return effects
        self.workforce.loaded(worker)
        self.catalogue.load_succeeded(contract, now_ns, effects)
        self._employ(worker, now_ns, effects)
        self.catalogue.staff(contract, now_ns, effects)
        return effects

    def worker_done(self, worker: Worker, done: headers.Done, now_ns: int) -> list[Effect]:
        """A worker answers for its call."""
        effects: list[Effect] = []
        call = worker.call
        if call is None or done.sequence != call.sequence:
            verdict = f"it answered for call {done.sequence}, which it does not hold"
            self._dismiss(worker, verdict, now_ns, effects)
            return effects
        worker.call = None
        worker.served += 1
        self._settle(call, done, now_ns, effects)
        if worker.state is DOOMED:
            return effects
        if done.flags & headers.RETIRE:
            self._dismiss(worker, "its VM must not be used again", now_ns, effects)
        elif call.contract.retired:
            self._dismiss(worker, "its contract was replaced or unregistered", now_ns, effects)
        else:
            self._employ(worker, now_ns, effects)
        return effects

    def worker_lost(self, worker: Worker, now_ns: int) -> list[Effect]:
        """A worker's channel is closed while it may still live: it must die before its slots are touched."""
        effects: list[Effect] = []
        self._dismiss(worker, "it closed its descriptors", now_ns, effects)
        return effects

    def worker_died(self, worker: Worker, cause: Cause, now_ns: int) -> list[Effect]:
        """A worker is dead: answer for what it held, from the evidence in the slot."""
        effects: list[Effect] = []
        was_loading = worker.state is LOADING
        contract, call = worker.contract, worker.call
        self.workforce.died(worker, cause, now_ns, effects)
        if call is not None:
            worker.call = None
            self._bury(call, cause, worker.verdict, now_ns, effects)
        if contract is None:
            return effects
        if was_loading and contract.died_loading:
            reason = f"the worker died with {cause} while loading"
            self._load_failed(contract, "load", reason, now_ns, effects)
        elif was_loading:  # it may have been killed from outside: try once more
            contract.died_loading = True
        self.catalogue.staff(contract, now_ns, effects)
        return effects

    def worker_host_left(self, now_ns: int) -> list[Effect]:
        """The worker host is gone: no worker gets another call, and calls wait for a new one."""
        effects: list[Effect] = []
        for worker in self.workforce.host_left(now_ns):
            if worker.contract is not None:
                self.catalogue.staff(worker.contract, now_ns, effects)
        return effects

    def unregister(self, contract_id: int, now_ns: int) -> list[Effect]:
        """Remove a contract: queued calls fail, running ones end."""
        effects: list[Effect] = []
        for call in self.catalogue.remove(contract_id, now_ns, effects):
            self._fail_unregistered(call, effects)
        return effects

    # -- time -----------------------------------------------------------------------------------------------
    def next_deadline(self) -> int | None:
        """Return when `time_passed` is due, or None."""
        return self._wheel.next_ns()

    def time_passed(self, now_ns: int) -> list[Effect]:
        """Act on everything that is due."""
        effects: list[Effect] = []
        for subject in self._wheel.expired(now_ns):
            if isinstance(subject, Call):
                self._call_due(subject, now_ns, effects)
            elif isinstance(subject, Worker):
                subject.timer = None
                self._dismiss(subject, _overdue(subject), now_ns, effects)
            elif isinstance(subject, Contract):
                self.catalogue.time_passed(subject, now_ns, effects)
            else:
                subject.replenish(now_ns, effects)
        return effects

    # -- inner workings -------------------------------------------------------------------------------------
    def _hand(self, worker: Worker, call: Call, now_ns: int, effects: list[Effect]) -> None:
        self._last_sequence += 1
        worker.state = BUSY
        worker.call = call
        call.worker = worker
        call.sequence = self._last_sequence
        call.state = HELD
        call.sent_ns = now_ns
        call.attempts += 1
        call.contract.called = True
        kill_ns = now_ns + call.contract.run_limit_ns
        if kill_ns < call.deadline_ns:
            self._set_timer(call, kill_ns)
        effects.append(SendCall(worker, call))

    def _employ(self, worker: Worker, now_ns: int, effects: list[Effect]) -> None:
        """Give a free worker the next call of its contract, or let it rest."""
        contract = worker.contract
        assert contract is not None
        call = contract.queue.pop()
        if call is not None:
            self._hand(worker, call, now_ns, effects)
        else:
            worker.state = IDLE
            contract.idle.append(worker)

    def _settle(self, call: Call, done: headers.Done | Answer, now_ns: int, effects: list[Effect]) -> None:
        """Relay a worker's answer, unless the host has been answered, and release the slot."""
        if call.answered:
            self._release_answered(call, effects)
        elif done.flags & headers.NOT_BEGUN:
            effects.append(answers.deadline_exceeded(call, "no", now_ns))
            self._end(call, effects)
        else:
            effects.append(self._result(call, done, now_ns, slot_free=True))
            self._end(call, effects)

    def _bury(self, call: Call, cause: Cause, verdict: str, now_ns: int, effects: list[Effect]) -> None:
        """Decide about the call that a dead worker held."""
        seen = self._memory.look(call)
        if seen.done == call.sequence:
            self._settle(call, seen, now_ns, effects)
        elif call.answered:
            self._release_answered(call, effects)
        elif seen.begun != call.sequence and call.attempts < ATTEMPTS_MAX:
            self._requeue(call, now_ns, effects)
        else:
            began = _began(call, seen)
            if cause.signal == SIGALRM:
                timer = "the worker's own timer"
                effects.append(answers.deadline_exceeded(call, began, now_ns, limit=timer))
            else:
                effects.append(answers.crashed(call, cause, verdict, began, now_ns))
            self._end(call, effects)

    def _requeue(self, call: Call, now_ns: int, effects: list[Effect]) -> None:
        """Send a call that was not begun to another worker, ahead of all others: it has waited longest."""
        call.worker = None
        call.state = QUEUED
        call.sent_ns = 0
        contract = call.contract
        if contract.retired:
            successor = self._contract_for(call.session.id, call.header.contract_id)
            if successor is None:
                self._fail_unregistered(call, effects)
                return
            contract = call.contract = successor
        self._set_timer(call, call.deadline_ns)
        if contract.idle:
            self._hand(contract.idle.pop(), call, now_ns, effects)
        else:
            contract.queue.push_front(call.session, call)
            self.catalogue.staff(contract, now_ns, effects)

    def _call_due(self, call: Call, now_ns: int, effects: list[Effect]) -> None:
        """A call is at its deadline, or at the limit on its running time."""
        call.timer = None
        if call.state is QUEUED:
            call.contract.queue.remove(call.session, call)
            effects.append(answers.deadline_exceeded(call, "no", now_ns))
            self._end(call, effects)
        elif call.answered:
            self._end_run(call, self._memory.look(call), now_ns, effects)
        else:
            seen = self._give_up(call, now_ns, effects)
            if not _has_result(call, seen):
                run_limit = f"run_limit {call.contract.run_limit_ns / NS_PER_S:g} s"
                limit = "" if now_ns >= call.deadline_ns else run_limit
                began = _began(call, seen)
                effects.append(answers.deadline_exceeded(call, began, now_ns, limit=limit, slot="kept"))
            self._end_run(call, seen, now_ns, effects)

    def _end_run(self, call: Call, seen: Answer, now_ns: int, effects: list[Effect]) -> None:
        """Kill the worker that runs a call nobody waits for, or look again later where it may yet end well.

        A worker that has not begun the call will not, but it must say so by the run limit. One that has
        finished has said so already and is not heard yet; it gets a little time, once: the mark may be a lie.
        """
        ran_ns = now_ns - call.sent_ns
        if seen.done == call.sequence and not call.excused:
            call.excused = True
            call.timer = self._wheel.set(now_ns + KILL_AFTER_NS, call)
        elif ran_ns >= call.contract.run_limit_ns or (_is_running(call, seen) and ran_ns >= KILL_AFTER_NS):
            verdict = f"it ran {call.title} for {ran_ns / NS_PER_S:.3f} s"
            self._dismiss(_worker_of(call), verdict, now_ns, effects)
        else:
            call.timer = self._wheel.set(call.sent_ns + call.contract.run_limit_ns, call)

    def _dismiss(self, worker: Worker, verdict: str, now_ns: int, effects: list[Effect]) -> None:
        """Doom a worker; where it was loading, that has failed, and where calls wait, another is to come."""
        was_loading, contract = worker.state is LOADING, worker.contract
        self.workforce.doom(worker, verdict, now_ns, effects)
        if contract is None:
            return
        if was_loading:
            self._load_failed(contract, "load", verdict, now_ns, effects)
        self.catalogue.staff(contract, now_ns, effects)

    def _load_failed(self, contract: Contract, problem: str, reason: str, now_ns: int, effects: list[Effect]) -> None:
        for call in self.catalogue.load_failed(contract, problem, reason, now_ns, effects):
            effects.append(answers.load_failure(call.session.id, call.header, contract, slot="free"))
            self._end(call, effects)

    def _contract_for(self, session_id: bytes, contract_id: int) -> Contract | None:
        """Return the contract that is served under an id, unless it is private to another host."""
        contract = self._serving.get(contract_id)
        if contract is None or contract.owner not in (None, session_id):
            return None
        return contract

    def _give_up(self, call: Call, now_ns: int, effects: list[Effect]) -> Answer:
        """End the wait for a call that a worker holds: it must not be begun, and what it has done counts.

        Its slot stays in quarantine. Where it has no result, the caller sends a failure.

        Returns:
            What its slot says.
        """
        self._memory.withdraw(call)
        seen = self._memory.look(call)
        call.answered = True
        if _has_result(call, seen):
            effects.append(self._result(call, seen, now_ns, slot_free=False))
        return seen

    def _result(self, call: Call, done: headers.Done | Answer, now_ns: int, *, slot_free: bool) -> Effect:
        """Make a worker's answer fit to be relayed: sizes are within what the host asked for."""
        if done.code == AbiErrorCode.OUT_OF_MEMORY:  # the worker does not know what the broker calls its contract
            return answers.out_of_memory(call, now_ns, slot="free" if slot_free else "kept")
        self.answered_count += 1
        out_size = min(done.out_size, call.header.out_size)
        return SendResult(call, done.code, out_size, min(done.error_size, ERROR_TEXT_MAX), slot_free)

    def _fail_unregistered(self, call: Call, effects: list[Effect]) -> None:
        effects.append(answers.unregistered(call))
        self._end(call, effects)

    def _release_answered(self, call: Call, effects: list[Effect]) -> None:
        if call.session.id in self.sessions:
            effects.append(SendReleased(call.session.id, call.header.call_id))
        self._end(call, effects)

    def _end(self, call: Call, effects: list[Effect]) -> None:
        call.state = ENDED
        call.answered = True
        call.session.calls.pop(call.header.call_id, None)
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

    def snapshot(self) -> dict[str, Any]:
        """Return counts and states for people: workers, contracts, calls, memory."""
        workers = [
            {
                "id": worker.id,
                "pid": worker.pid,
                "state": worker.state.value,
                "contract": worker.contract.record.title if worker.contract else None,
                "served": worker.served,
            }
            for worker in self.workforce.by_id.values()
        ]
        return {
            "hosts": len(self.sessions),
            "contracts": len(self.catalogue.serving),
            "workers": workers,
            "spares": len(self.workforce.blank),
            "queued": sum(len(contract.queue) for contract in self.catalogue.serving.values()),
            "slots_in_flight": self._books.slots_in_flight,
            "memory_bytes": self._books.total_bytes,
            "answered": self.answered_count,
            "deaths": dict(self.workforce.deaths),
        }


def _worker_of(call: Call) -> Worker:
    assert call.worker is not None
    return call.worker


def _overdue(worker: Worker) -> str:
    if worker.state is LOADING:
        return f"it did not load within {LOAD_LIMIT_NS // NS_PER_S} s"
    return f"it did not start within {START_LIMIT_NS // NS_PER_S} s"


def _began(call: Call, seen: Answer) -> Began:
    return "yes" if seen.begun == call.sequence else "no"


def _has_result(call: Call, seen: Answer) -> bool:
    return seen.done == call.sequence and not seen.flags & headers.NOT_BEGUN


def _is_running(call: Call, seen: Answer) -> bool:
    return seen.begun == call.sequence and seen.done != call.sequence
