"""The dispatcher: what happens to each call, from its acceptance until its slot is free.

Events come in, effects go out; it owns no socket, process, thread or clock. Every event is a method that takes the
time in nanoseconds (CLOCK_MONOTONIC) and returns the effects to perform, in order. `next_deadline` says when
`time_passed` has something to do.

The rules it keeps, whatever happens:

* a call that was accepted gets exactly one answer, at its deadline at the latest;
* a call is handed to a second worker only if the first one died without having begun it;
* a slot is released only when its worker has answered for it or is dead.

What a worker did when it died is read from the call's slot: `done` holds the call's number when the answer is there,
`begun` when the contract had been entered. `Catalogue` keeps contracts and their loading, `Workforce` the workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from luacell.broker.books import Books, Refusal
from luacell.broker.catalogue import Catalogue
from luacell.broker.causes import SIGALRM, SIGKILL, Cause
from luacell.broker.model import (
    Call,
    CallState,
    Contract,
    DropPair,
    Effect,
    SendCall,
    SendFailure,
    SendReleased,
    SendResult,
    Session,
    SlotMemory,
    Subject,
    Worker,
    WorkerState,
)
from luacell.broker.registry import Registry
from luacell.broker.timers import TimerWheel
from luacell.broker.workforce import Workforce
from luacell.protocol import headers
from luacell.protocol.errors import AbiErrorCode, Began
from luacell.protocol.identity import format_id
from luacell.protocol.limits import (
    CALLS_IN_FLIGHT_MAX,
    DEADLINE_MAX_US,
    ERROR_TEXT_MAX,
    NS_PER_MS,
    NS_PER_S,
    NS_PER_US,
)

KILL_AFTER_NS: Final = 100 * NS_PER_MS  # at its caller's deadline a call that ran this long costs its worker
ATTEMPTS_MAX: Final = 2  # a call that was not begun is handed out once more
_FLAGS: Final = headers.HAS_ARGS | headers.HAS_OUT


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

    # -- hosts ----------------------------------------------------------------------------------------------------
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
            if call.state is CallState.QUEUED:
                call.contract.queue.remove(session, call)
                self._end(call, effects)
            else:
                call.answered = True
        self._fail_all(self.catalogue.host_left(session_id, now_ns, effects), effects)
        effects.extend(DropPair(pair) for pair in self._books.host_left(session_id))
        return effects

    # -- calls ----------------------------------------------------------------------------------------------------
    def call_arrived(self, session_id: bytes, header: headers.Call, now_ns: int) -> list[Effect]:
        """A host calls: hand it to an idle worker, queue it, or refuse it."""
        session = self.sessions[session_id]
        contract = self.catalogue.serving.get(header.contract_id)
        if contract is None or contract.record.owner not in (None, session_id):
            text = f"host contract not found: contract_id={format_id(header.contract_id)}"
            return [_refused(session, header, AbiErrorCode.HOST_CONTRACT_NOT_FOUND, text)]
        refusal = _malformed(session, header) or _over_bound(session, contract)
        if refusal is not None:
            return [_refused(session, header, *refusal)]
        if contract.retry_ns > now_ns and not contract.workers:
            return [_load_failure(session_id, header, contract, slot="unused")]
        pair = self._books.take_slot(session_id, header)
        if isinstance(pair, Refusal):
            return [_refused(session, header, *pair)]
        limit_us = contract.record.settings.deadline_us
        budget_us = min(header.budget_us, limit_us) if header.budget_us else limit_us
        deadline_ns = now_ns + budget_us * NS_PER_US
        call = Call(session, header, contract, pair, now_ns, deadline_ns)
        call.timer = self._wheel.set(deadline_ns, call)
        session.calls[header.call_id] = call
        effects: list[Effect] = []
        if contract.idle:
            self._hand(contract.idle.pop(), call, now_ns, effects)
        else:
            contract.queue.push(session, call)
            self.catalogue.staff(contract, now_ns, effects)
        return effects

    def call_cancelled(self, session_id: bytes, call_id: int, now_ns: int) -> list[Effect]:
        """A host no longer wants an answer; unknown calls were answered meanwhile."""
        effects: list[Effect] = []
        call = self.sessions[session_id].calls.get(call_id)
        if call is None or call.answered:
            return effects
        self._give_up(call, AbiErrorCode.CANCELLED, "cancelled by its caller", "", now_ns, effects)
        if call.worker is not None and now_ns - call.sent_ns >= KILL_AFTER_NS:
            self.workforce.doom(call.worker, "the call that it ran was cancelled", effects)
        return effects

    # -- workers --------------------------------------------------------------------------------------------------
    def worker_ready(self, worker: Worker, now_ns: int) -> list[Effect]:
        """A worker has connected."""
        effects: list[Effect] = []
        if worker.state is WorkerState.STARTING:
            self.workforce.ready(worker, now_ns, effects)
        else:
            self.workforce.doom(worker, "it reported readiness twice", effects)
        return effects

    def worker_loaded(self, worker: Worker, problem: str, reason: str, now_ns: int) -> list[Effect]:
        """A worker has loaded its contract, or failed to."""
        effects: list[Effect] = []
        if worker.state is not WorkerState.LOADING or worker.contract is None:
            self.workforce.doom(worker, "it reported a load that nobody asked for", effects)
            return effects
        contract = worker.contract
        if problem:
            self.workforce.doom(worker, "its contract did not load", effects)
            self._fail_loads(contract, self.catalogue.load_failed(contract, problem, reason, now_ns, effects), effects)
            return effects
        self.workforce.loaded(worker)
        self.catalogue.load_succeeded(contract, now_ns, effects)
        self._employ(worker, now_ns, effects)
        return effects

    def worker_done(self, worker: Worker, done: headers.Done, now_ns: int) -> list[Effect]:
        """A worker answers for its call."""
        effects: list[Effect] = []
        call = worker.call
        if call is None or done.sequence != call.sequence:
            self.workforce.doom(worker, f"it answered for call {done.sequence}, which it does not hold", effects)
            return effects
        worker.call = None
        worker.served += 1
        self._settle(call, done, now_ns, effects)
        if worker.state is WorkerState.DOOMED:
            return effects
        if done.flags & headers.RETIRE:
            self.workforce.doom(worker, "its VM must not be used again", effects)
            self.catalogue.staff(call.contract, now_ns, effects)
        elif call.contract.retired:
            self.workforce.doom(worker, "its contract was replaced or unregistered", effects)
        else:
            self._employ(worker, now_ns, effects)
        return effects

    def worker_lost(self, worker: Worker) -> list[Effect]:
        """A worker's socketpair is closed while it may still live: it must die before its slots are touched."""
        effects: list[Effect] = []
        self.workforce.doom(worker, "it closed its descriptors", effects)
        return effects

    def worker_died(self, worker: Worker, cause: Cause, now_ns: int) -> list[Effect]:
        """A worker is dead: answer for what it held, from the evidence in the slot."""
        effects: list[Effect] = []
        was_loading = worker.contract if worker.state is WorkerState.LOADING else None
        verdict = worker.verdict
        contract, call = worker.contract, worker.call
        self.workforce.died(worker, cause, now_ns, effects)
        if was_loading is not None:
            reason = verdict or f"the worker died with {cause} while loading"
            self._fail_loads(was_loading, self.catalogue.load_failed(was_loading, "load", reason, now_ns, effects), effects)
        if call is not None:
            worker.call = None
            self._bury(call, cause, verdict, now_ns, effects)
        if contract is not None and not contract.retired:
            self.catalogue.staff(contract, now_ns, effects)
        return effects

    # -- time -----------------------------------------------------------------------------------------------------
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
                limit = "5 s"
                verb = "load" if subject.state is WorkerState.LOADING else "start"
                self._worker_overdue(subject, f"it did not {verb} within {limit}", now_ns, effects)
            elif isinstance(subject, Contract):
                self._fail_loads(subject, self.catalogue.time_passed(subject, now_ns, effects), effects)
            else:
                subject.replenish(now_ns, effects)
        return effects

    # -- inner workings -------------------------------------------------------------------------------------------
    def _hand(self, worker: Worker, call: Call, now_ns: int, effects: list[Effect]) -> None:
        worker.state = WorkerState.BUSY
        worker.sequence += 1
        worker.call = call
        call.worker = worker
        call.sequence = worker.sequence
        call.state = CallState.HELD
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
            worker.state = WorkerState.IDLE
            contract.idle.append(worker)

    def _settle(self, call: Call, done: headers.Done, now_ns: int, effects: list[Effect]) -> None:
        """Relay a worker's answer, unless the host has been answered, and release the slot."""
        if call.answered:
            self._release_answered(call, effects)
        elif done.flags & headers.NOT_BEGUN:
            self._answer_deadline(call, "no", "", now_ns, effects)
            self._end(call, effects)
        else:
            out_size = min(done.out_size, call.header.out_size)
            self.answered_count += 1
            effects.append(SendResult(call, done.code, out_size, min(done.error_size, ERROR_TEXT_MAX), True))
            self._end(call, effects)

    def _bury(self, call: Call, cause: Cause, verdict: str, now_ns: int, effects: list[Effect]) -> None:
        """Decide about the call that a dead worker held."""
        seen = self._memory.look(call)
        if seen.done == call.sequence:
            flags = seen.flags & headers.NOT_BEGUN
            self._settle(call, headers.Done(seen.done, seen.code, seen.out_size, seen.error_size, flags), now_ns, effects)
        elif call.answered:
            self._release_answered(call, effects)
        elif seen.begun != call.sequence and call.attempts < ATTEMPTS_MAX:
            self._requeue(call, effects)
        else:
            began: Began = "yes" if seen.begun == call.sequence else "no"
            if cause.signal == SIGALRM:
                self._answer_deadline(call, began, "the worker's own timer", now_ns, effects)
            else:
                self._answer_crash(call, cause, verdict, began, now_ns, effects)
            self._end(call, effects)

    def _requeue(self, call: Call, effects: list[Effect]) -> None:
        call.worker = None
        call.state = CallState.QUEUED
        if call.contract.retired and (successor := self.catalogue.serving.get(call.header.contract_id)) is not None:
            call.contract = successor
        if call.contract.retired:
            self._fail_all([call], effects)
            return
        self._set_timer(call, call.deadline_ns)
        call.contract.queue.push_front(call.session, call)

    def _call_due(self, call: Call, now_ns: int, effects: list[Effect]) -> None:
        """A call is at its deadline, or at the limit on its running time."""
        call.timer = None
        if call.state is CallState.QUEUED:
            call.contract.queue.remove(call.session, call)
            self._answer_deadline(call, "no", "", now_ns, effects)
            self._end(call, effects)
            return
        ran_ns = now_ns - call.sent_ns
        over_limit = ran_ns >= call.contract.run_limit_ns
        at_deadline = now_ns >= call.deadline_ns
        if not call.answered:
            limit = f"run_limit {call.contract.run_limit_ns / NS_PER_S:g} s" if not at_deadline else ""
            self._give_up(call, AbiErrorCode.DEADLINE_EXCEEDED, "", limit, now_ns, effects)
        assert call.worker is not None
        if over_limit or ran_ns >= KILL_AFTER_NS:
            self.workforce.doom(call.worker, f"it ran {call.title} for {ran_ns / NS_PER_S:.3f} s", effects)
            self.catalogue.staff(call.contract, now_ns, effects)
        else:
            call.timer = self._wheel.set(call.sent_ns + call.contract.run_limit_ns, call)

    def _worker_overdue(self, worker: Worker, verdict: str, now_ns: int, effects: list[Effect]) -> None:
        worker.timer = None
        contract = worker.contract
        self.workforce.doom(worker, verdict, effects)
        if contract is not None:
            self._fail_loads(contract, self.catalogue.load_failed(contract, "load", verdict, now_ns, effects), effects)

    def _give_up(
        self, call: Call, code: AbiErrorCode, text: str, limit: str, now_ns: int, effects: list[Effect]
    ) -> None:
        """Answer a call that has no result and will get none; a held slot stays in quarantine."""
        if call.state is CallState.QUEUED:
            call.contract.queue.remove(call.session, call)
            effects.append(_failure(call, code, f"{call.title}: {text}", "no", now_ns, slot="free"))
            self._end(call, effects)
            return
        self._memory.withdraw(call)
        seen = self._memory.look(call)
        if seen.done == call.sequence:
            self.answered_count += 1
            out_size = min(seen.out_size, call.header.out_size)
            effects.append(SendResult(call, seen.code, out_size, min(seen.error_size, ERROR_TEXT_MAX), False))
        else:
            began: Began = "yes" if seen.begun == call.sequence else "no"
            if code is AbiErrorCode.DEADLINE_EXCEEDED:
                self._answer_deadline(call, began, limit, now_ns, effects, slot="kept")
            else:
                effects.append(_failure(call, code, f"{call.title}: {text}", began, now_ns, slot="kept"))
        call.answered = True

    def _answer_deadline(
        self, call: Call, began: Began, limit: str, now_ns: int, effects: list[Effect], slot: str = "free"
    ) -> None:
        budget = (call.deadline_ns - call.arrived_ns) / NS_PER_S
        bound = limit or f"deadline {budget:g} s"
        where = "it was not begun" if began == "no" else "it was running"
        text = f"{call.title}: not finished within its {bound}; {where}"
        effects.append(_failure(call, AbiErrorCode.DEADLINE_EXCEEDED, text, began, now_ns, slot=slot, limit=bound))

    def _answer_crash(
        self, call: Call, cause: Cause, verdict: str, began: Began, now_ns: int, effects: list[Effect]
    ) -> None:
        where = "while running the call" if began == "yes" else "before it began the call, twice"
        why = f" (killed: {verdict})" if verdict and cause.signal == SIGKILL else ""
        text = f"{call.title}: the worker died with {cause} {where}{why}"
        effects.append(_failure(call, AbiErrorCode.WORKER_CRASHED, text, began, now_ns, cause=cause))

    def _fail_all(self, calls: list[Call], effects: list[Effect]) -> None:
        """Answer queued calls whose contract is gone."""
        for call in calls:
            text = f"host contract not found: contract_id={format_id(call.header.contract_id)} (unregistered meanwhile)"
            code = AbiErrorCode.HOST_CONTRACT_NOT_FOUND
            effects.append(SendFailure(call.session.id, call.header.call_id, code, text))
            self._end(call, effects)

    def _fail_loads(self, contract: Contract, calls: list[Call], effects: list[Effect]) -> None:
        for call in calls:
            effects.append(_load_failure(call.session.id, call.header, contract, slot="free"))
            self._end(call, effects)

    def unregister(self, contract_id: int, now_ns: int) -> list[Effect]:
        """Remove a contract: queued calls fail, running ones end."""
        effects: list[Effect] = []
        self._fail_all(self.catalogue.remove(contract_id, effects), effects)
        return effects

    def _release_answered(self, call: Call, effects: list[Effect]) -> None:
        if call.session.id in self.sessions:
            effects.append(SendReleased(call.session.id, call.header.call_id))
        self._end(call, effects)

    def _end(self, call: Call, effects: list[Effect]) -> None:
        call.state = CallState.ENDED
        call.answered = True
        call.session.calls.pop(call.header.call_id, None)
        if call.timer is not None:
            self._wheel.cancel(call.timer)
            call.timer = None
        if self._books.release_slot(call.pair, call.header.slot):
            effects.append(DropPair(call.pair))

    def _set_timer(self, call: Call, when_ns: int) -> None:
        if call.timer is not None:
            self._wheel.cancel(call.timer)
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


def _malformed(session: Session, header: headers.Call) -> Refusal | None:
    bad = AbiErrorCode.BAD_REQUEST
    if header.call_id in session.calls or header.call_id == 0:
        return Refusal(bad, f"call id {header.call_id} is 0 or in flight")
    if header.budget_us > DEADLINE_MAX_US:
        return Refusal(bad, f"budget {header.budget_us} us is over {DEADLINE_MAX_US} us")
    if header.flags & ~_FLAGS:
        return Refusal(bad, f"flags {header.flags:#x} are outside {_FLAGS:#x}")
    if (header.args_size and not header.flags & headers.HAS_ARGS) or (
        header.out_size and not header.flags & headers.HAS_OUT
    ):
        return Refusal(bad, "a size is given for a buffer that is absent")
    return None


def _over_bound(session: Session, contract: Contract) -> Refusal | None:
    if len(session.calls) >= CALLS_IN_FLIGHT_MAX:
        limit = f"calls in flight per host: {CALLS_IN_FLIGHT_MAX}"
        return Refusal(AbiErrorCode.BUSY, f"the bound on {limit} is reached; retry when one has ended", limit)
    if contract.queue.is_full and not contract.idle:
        limit = f"calls queued for a contract: {len(contract.queue)}"
        return Refusal(AbiErrorCode.BUSY, f"{contract.record.title}: the bound on {limit} is reached; retry later", limit)
    return None


def _refused(session: Session, header: headers.Call, code: AbiErrorCode, message: str, limit: str = "") -> SendFailure:
    return SendFailure(session.id, header.call_id, code, message, slot="unused", limit=limit)


def _load_failure(session_id: bytes, header: headers.Call, contract: Contract, slot: str) -> SendFailure:
    text = (
        f"VM dispatch failed for contract_id={format_id(contract.record.id)} fn_id={header.fn_id}: {contract.failure}"
    )
    code = AbiErrorCode.HOST_CONTRACT_CALL_FAILED
    return SendFailure(session_id, header.call_id, code, text, kind="ContractLoadFailed", slot=slot)


def _failure(
    call: Call,
    code: AbiErrorCode,
    text: str,
    began: Began,
    now_ns: int,
    *,
    slot: str = "free",
    cause: Cause | None = None,
    limit: str = "",
) -> SendFailure:
    sent_ns = call.sent_ns or now_ns
    return SendFailure(
        call.session.id,
        call.header.call_id,
        code,
        text,
        slot=slot,
        began=began,
        signal=cause.signal if cause else None,
        exit_code=cause.exit_code if cause else None,
        limit=limit,
        queued=(sent_ns - call.arrived_ns) / NS_PER_S,
        ran=(now_ns - sent_ns) / NS_PER_S,
    )
