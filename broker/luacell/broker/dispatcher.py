"""The dispatcher: what happens to each call, from its acceptance until its slot is free.

Events come in, effects go out; it owns no socket, process, thread or clock. Every event is a method that
takes the time in nanoseconds (CLOCK_MONOTONIC) and returns the effects to perform, in order. `next_deadline`
says when `time_passed` has something to do.

The rules it keeps, whatever happens:

* a call that was accepted gets exactly one answer, at its deadline at the latest;
* a call is handed over a second time only when it cannot be, or have been, begun the first time;
* a slot is released only when its worker has answered for it or is dead;
* a worker is killed only for the call that it is running.

What a worker did when it died is read from the call's slot: `done` holds the call's number when the answer is
there, `begun` when the contract had been entered. Slots outlive workers, so no two hand-overs share a number.

A busy worker holds calls ahead (`windows`). It answers in order, several at once as it likes; so while it is silent
the slots tell how far it has come (`_catch_up`). One with calls ahead has a timer for that; the others are looked at
now and then (`_look_around`), for what a contract writes to its worker's connection may have swallowed the answer.
Before a worker is killed for the call that it runs, those behind are withdrawn: it passes them by, or dies, and either
way they go to another worker.

`Catalogue` keeps contracts and their loading, `Workforce` the workers.
"""

from __future__ import annotations

from typing import Final

from luacell.broker import answers, carrying, chains, recycling
from luacell.broker.books import ARENA_BITS, PairState, Refusal
from luacell.broker.causes import NO_VITALS, Cause, Vitals
from luacell.broker.deaths import crash_of, death_record
from luacell.broker.handover import (
    KILL_AFTER_NS,
    RETIRED,
    Handover,
    has_begun,
    has_result,
    is_running,
    worker_of,
)
from luacell.broker.model import (
    BUSY,
    DOOMED,
    ENDED,
    HELD,
    IDLE,
    LEAVING,
    LOADING,
    QUEUED,
    RESTORING,
    SAVING,
    STARTING,
    WAITING,
    Call,
    Contract,
    DropPair,
    Effect,
    Inquiry,
    Request,
    SendReleased,
    Session,
    Worker,
)
from luacell.broker.seats import seat_of
from luacell.broker.timers import BUCKET_NS
from luacell.broker.windows import SLOW_NS, measure, room_of, worker_with_room
from luacell.protocol import headers
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.limits import (
    CARRY_LIMIT_NS,
    ERROR_TEXT_MAX,
    LOAD_LIMIT_NS,
    NS_PER_MS,
    NS_PER_S,
    NS_PER_US,
    START_LIMIT_NS,
)
from luacell.protocol.slots import GENERATION_MASK

LOOK_NS: Final = 100 * NS_PER_MS  # between looks at workers that run one call, and have for a while; 1 us each
SILENCE_MAX_NS: Final = NS_PER_S  # from the mark that a call is done to the answer; a mark may be a lie


class Dispatcher(Handover):
    """The decisions of one broker.

    Args:
        memory: reads and marks slots.
        books: of shared memory.
        registry: of contracts.
        new_routing_id: makes 16 unguessable bytes for a worker.
        spares: blank workers to keep.
        workers_max: how many workers there may be; None for WORKERS_MAX.
    """

    # -- hosts ----------------------------------------------------------------------------------------------
    def host_joined(self, session_id: bytes, name: str = "") -> None:
        """A host has introduced itself; records have its name where it is known."""
        self.sessions.setdefault(session_id, Session(session_id, name))

    def caller_joined(self, worker: Worker) -> None:
        """The contract of a worker is about to call others; its death is the end of that."""
        self.sessions.setdefault(worker.routing_id, Session(worker.routing_id, worker=worker))

    def host_left(self, session_id: bytes, now_ns: int) -> list[Effect]:
        """A host is gone: drop what it has queued, let running calls end, reclaim its memory."""
        effects: list[Effect] = []
        session = self.sessions.pop(session_id, None)
        if session is None:
            return effects
        for call in list(session.calls.values()):
            if call.state is QUEUED:
                call.contract.queue.remove(call.owner, call)
                self._end(call, now_ns, effects)
            elif not call.answered:
                self._memory.withdraw(call)
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
        outer = None
        if session.worker is not None:
            outer = session.worker.call
            objection = chains.objection_to(session, header)
            if objection is not None:
                return [answers.refused(session, header, objection)]
        elif self.is_draining:
            return [answers.refused(session, header, answers.shutting_down(header))]
        contract = self.contract_for(session_id, header.contract_id)
        if contract is None:
            return [answers.refused(session, header, answers.unknown_contract(header))]
        contract = seat_of(contract, session_id, header.fn_id)
        refusal = answers.malformed(session, header) or self.over_bound(session, contract, now_ns)
        if refusal is None and not contract.workers and self.workforce.is_full:
            refusal = answers.no_worker(contract, self.workforce.workers_max)
        if refusal is not None:
            return [answers.refused(session, header, refusal)]
        if contract.retry_ns > now_ns and not contract.workers:
            return [answers.load_failure(session_id, header, contract, now_ns, slot="unused")]
        book = self._books.take_slot(session_id, header)
        if isinstance(book, Refusal):
            return [answers.refused(session, header, book)]
        budget_us = header.budget_us
        if not 0 < budget_us < contract.deadline_us:
            budget_us = contract.deadline_us
        if arrived_ns is None:
            arrived_ns = now_ns
        deadline_ns = arrived_ns + budget_us * NS_PER_US
        if outer is not None:
            deadline_ns = min(deadline_ns, outer.deadline_ns)
        call = session.calls[header.call_id] = Call(session, header, contract, book, arrived_ns, deadline_ns)
        call.timer = self._wheel.set(deadline_ns, call)
        effects: list[Effect] = []
        if outer is not None:
            call.parent, call.depth = outer, outer.depth + 1
            self._await(call, outer, now_ns, effects)
        if contract.quarantine.is_in_force:
            contract.quarantine.accepted(call.host.id, call)
        if contract.idle:
            self._hand(contract.idle.pop(), call, now_ns, effects)
            return effects
        worker = None
        if not contract.queue.count and len(contract.workers) >= contract.workers_max:
            worker = worker_with_room(contract, now_ns)
        if worker is not None:
            self._hand_ahead(worker, call, now_ns, effects)
        elif outer is not None and not self.can_progress(contract):
            self._untie(call, now_ns, effects)
        else:
            if not contract.queue.is_full or self._displace(contract, call.owner, now_ns, effects):
                contract.queue.push(call.owner, call)
            else:  # a contract that calls itself: what its worker held ahead has just come back
                contract.queue.push_front(call.owner, call)
            self.catalogue.staff(contract, now_ns, effects)
        return effects

    def over_bound(self, session: Session, contract: Contract, now_ns: int) -> Refusal | None:
        """Return why a contract cannot have another call of a host now, or None."""
        host = chains.host_of(session)
        if contract.quarantine.is_in_force:
            wait_ns = contract.quarantine.wait_ns(host.id, now_ns)
            if wait_ns:
                return answers.resting(contract, wait_ns)
            contract.note_quarantine()
        in_flight = 0
        if len(session.calls) >= contract.in_flight_max:
            in_flight = self._books.in_flight(session.id, contract.record.id)
        refusal = answers.over_bound(session, contract, in_flight, session if host is session else host.chains)
        wait_ns = 0 if refusal is None else self.workforce.start_wait_ns(contract, now_ns)
        return answers.starts_wait(contract, wait_ns) if wait_ns and contract.queue.is_full else refusal

    def _displace(self, contract: Contract, owner: object, now_ns: int, effects: list[Effect]) -> bool:
        """Make room in a full queue for a call of `owner`, where that is fair, and tell whether it is.

        A host with many calls must not keep others out.
        """
        call = contract.queue.displaceable(owner)
        if call is None:
            return False
        effects.append(answers.displaced(call, now_ns))
        contract.queue.remove(call.owner, call)
        self._end(call, now_ns, effects)
        return True

    def quick_call(self, session_id: bytes, header: headers.Call, now_ns: int) -> Call | None:
        """Do what `call_arrived` does where nothing is unusual.

        This and `quick_done` are the hot path, each in one piece: a bytecode costs the broker 70 ns here.

        Returns:
            The call: HELD, to be sent to its worker, or QUEUED; or None, and nothing has changed: `call_arrived` must
            decide.
        """
        call_id, contract_id, _, budget_us, arena, slot, generation, flags, args_size, out_size = header
        session = self.sessions.get(session_id)
        contract = self._serving.get(contract_id)
        book = self._slots.get(slot << ARENA_BITS | arena)
        if (
            session is None
            or contract is None
            or book is None
            or self.is_draining
            or book.generation != generation
            or book.contract_id != contract_id
            or book.session != session_id
            or args_size > book.args_capacity
            or out_size > book.out_capacity
            or flags != answers.FLAGS
            or not 0 < budget_us <= contract.quick_budget_us
            or not call_id
            or call_id in session.calls
            or len(session.calls) >= contract.in_flight_max
            or not (contract.idle or (len(contract.workers) >= contract.workers_max and not contract.queue.is_full))
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
        if contract.idle:
            worker = call.worker = contract.idle.pop()
            worker.call = call
            worker.state = BUSY
            call.sent_ns = now_ns
            contract.called = True
        else:
            busy = None if contract.queue.count else worker_with_room(contract, now_ns)
            if busy is None:
                contract.queue.push(session, call)
                return call
            call.worker = busy
            busy.ahead.append(call)
            if busy.timer is None:
                busy.timer = self._wheel.set(now_ns + SLOW_NS, busy)
        call.sequence = self._last_sequence = self._last_sequence + 1
        call.state = HELD
        return call

    def quick_done(self, worker: Worker, done: headers.Done, now_ns: int) -> Call | None:
        """Do what `worker_done` does where nothing is unusual and the worker has more to do, or nothing waits for it.

        Returns:
            The call, whose host is to be sent this very result with its slot free; or None, and nothing has
            changed: `worker_done` must decide.
        """
        sequence, _, out_size, error_size, flags = done
        call, contract, ahead = worker.call, worker.contract, worker.ahead
        if (
            call is None
            or contract is None
            or call.sequence != sequence
            or flags
            or call.answered
            or call.parent is not None
            or worker.state is not BUSY
            or contract.retired
            or (contract.queue.count and not ahead)
            or out_size > call.header.out_size
            or error_size > ERROR_TEXT_MAX
            or call.timer is None
            or call.book.pair.state is not PairState.USABLE
            or worker.finished
        ):
            return None
        worker.served += 1
        if ahead:
            self._take_up(worker, ahead.popleft(), now_ns)
        else:
            worker.call = None
            worker.state = IDLE
            worker.paced_ns = 0
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

    def refill(self, worker: Worker, now_ns: int) -> list[Effect]:
        """Hand a busy worker more calls ahead, after its answers were dealt with."""
        effects: list[Effect] = []
        contract = worker.contract
        if contract is None or not contract.queue.count:
            return effects
        room = room_of(worker, contract, now_ns)
        if room:
            measure(worker, contract, now_ns)
        for _ in range(room):
            call = contract.queue.pop()
            if call is None:
                break
            self._hand_ahead(worker, call, now_ns, effects)
        return effects

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
        if call.state is HELD and not call.answered:
            self._catch_up(worker_of(call), now_ns, effects)
        if call.answered:
            return effects
        is_waiting = call.worker is not None and call.worker.call is call and call.worker.inner is not None
        if call.state is QUEUED:
            call.contract.queue.remove(call.owner, call)
            effects.append(answers.cancelled(call, "no", now_ns))
            self._end(call, now_ns, effects)
            return effects
        seen = self._give_up(call, now_ns, effects)
        if not has_result(call, seen):
            effects.append(answers.cancelled(call, has_begun(call, seen), now_ns, slot="kept"))
        if is_waiting:
            inner = worker_of(call).inner
            assert inner is not None
            effects += self.call_cancelled(inner.session.id, inner.header.call_id, now_ns)
        elif call.sent_ns and is_running(call, seen) and now_ns - call.sent_ns - call.waited_ns >= KILL_AFTER_NS:
            self._stop_running(call, "the call that it ran was cancelled", now_ns, effects)
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

    def worker_loaded(
        self,
        worker: Worker,
        problem: str,
        reason: str,
        now_ns: int,
        *,
        saves: bool = False,
        restores: bool = False,
    ) -> list[Effect]:
        """A worker has loaded its contract, or failed to; it tells whether it can hand on state, or take some up."""
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
        worker.saves, contract.restores = saves, restores
        self.catalogue.load_succeeded(contract, now_ns, effects)
        self._relieve(contract, now_ns, effects)
        if carrying.must_wait(contract):
            worker.state = RESTORING
            self._hand_on(contract, now_ns, effects)
        else:
            self._employ(worker, now_ns, effects)
        self.catalogue.staff(contract, now_ns, effects)
        return effects

    def worker_saved(self, worker: Worker, state: bytes, problem: str, now_ns: int) -> list[Effect]:
        """A worker has saved its state, or failed to; it is not needed any more."""
        effects: list[Effect] = []
        if worker.state is not SAVING:
            self._dismiss(worker, "it reported state that nobody asked for", now_ns, effects)
            return effects
        heir, worker.heir = worker.heir, None
        if heir is not None:
            carrying.disinherit(heir)
            if problem:
                effects.append(carrying.lost(heir, problem))
            else:
                heir.state = state
        self._dismiss(worker, "another worker has taken its place", now_ns, effects)
        if heir is not None:
            self._hand_on(heir, now_ns, effects)
        return effects

    def worker_restored(self, worker: Worker, problem: str, now_ns: int) -> list[Effect]:
        """A worker has taken up its predecessor's state, or failed to, and must not be used."""
        effects: list[Effect] = []
        contract = worker.contract
        if not worker.is_restoring or contract is None:
            self._dismiss(worker, "it reported to have state that it was not given", now_ns, effects)
            return effects
        if problem:
            self._dismiss(worker, f"its state was not restored: {problem}", now_ns, effects)
            return effects
        state, contract.state = contract.state or b"", None
        worker.is_restoring = False
        self.workforce.loaded(worker)
        contract.called = True  # it has state: it is not stopped because nobody calls it
        effects.append(carrying.carried(contract, len(state)))
        self._employ(worker, now_ns, effects)
        self.catalogue.staff(contract, now_ns, effects)
        return effects

    def worker_done(self, worker: Worker, done: headers.Done, now_ns: int) -> list[Effect]:
        """A worker answers for the call that it has held longest."""
        effects: list[Effect] = []
        if self._has_passed(worker, done.sequence):
            if not done.flags & headers.NOT_BEGUN:
                self._dismiss(worker, "it began a call that was taken back", now_ns, effects)
            return effects
        held = worker.finished or ((worker.call,) if worker.call is not None else ())
        if not held or done.sequence != held[0].sequence:
            verdict = f"it answered for call {done.sequence}, which is not its turn"
            self._dismiss(worker, verdict, now_ns, effects)
            return effects
        call = held[0]
        if worker.finished:
            worker.finished.popleft()
            worker.silent_ns = now_ns
        else:
            self._go_on(worker, now_ns)
        worker.served += 1
        self._settle(call, done, now_ns, effects)
        if worker.state is DOOMED:
            return effects
        if done.flags & headers.RETIRE:
            verdict = RETIRED if done.code == AbiErrorCode.OUT_OF_MEMORY else recycling.WORN_OUT
            self._dismiss(worker, verdict, now_ns, effects)
            return effects
        if done.flags & headers.RECYCLE:
            self._recycle(worker, now_ns, effects)
        if worker.call is None and not worker.finished:
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
        contract = worker.contract
        episode = self._last_episode(worker, cause, now_ns)
        effects.append(death_record(worker, cause, episode))
        crash = crash_of(episode, cause, worker.verdict) if episode is not None else None
        if crash is not None:
            effects.append(crash)
        self.workforce.died(worker, cause, now_ns, effects)
        self._bury(worker, cause, now_ns, effects)
        effects += self.host_left(worker.routing_id, now_ns)
        if contract is None:
            return effects
        self._part(worker, f"its worker died with {cause}", now_ns, effects)
        if was_loading and contract.died_loading:
            reason = f"the worker died with {cause} while loading"
            self._load_failed(contract, "load", reason, now_ns, effects)
        elif was_loading:  # it may have been killed from outside: try once more
            contract.died_loading = True
        self.catalogue.staff(contract, now_ns, effects)
        self._untie_all(contract, now_ns, effects)
        return effects

    def worker_inspected(self, worker: Worker, sequence: int, vitals: Vitals, now_ns: int) -> list[Effect]:
        """It is known what a worker's process was doing at a hand-over's deadline."""
        effects: list[Effect] = []
        call = worker.call
        if call is not None and call.sequence == sequence:
            self._tell_overdue(call, vitals, effects)
        return effects

    def worker_host_leaves(self, now_ns: int) -> list[Effect]:
        """The worker host is to end: its workers get no more calls, and go as soon as they hold none."""
        effects: list[Effect] = []
        for worker in self.workforce.host_leaves(now_ns, effects):
            if worker.contract is not None:
                self._part(worker, worker.verdict, now_ns, effects)
                self.catalogue.staff(worker.contract, now_ns, effects)
        return effects

    def worker_host_left(self, now_ns: int) -> list[Effect]:
        """The worker host is gone: no worker gets another call, and calls wait for a new one."""
        effects: list[Effect] = []
        for worker in self.workforce.host_left(now_ns):
            if worker.contract is not None:
                self._part(worker, worker.verdict, now_ns, effects)
                self.catalogue.staff(worker.contract, now_ns, effects)
        return effects

    def contracts_stored(
        self, contracts: tuple[Contract, ...], request: Request, problem: str, now_ns: int
    ) -> list[Effect]:
        """Contracts that were held were written, or, with a problem, none of them could be."""
        effects: list[Effect] = []
        self.catalogue.all_stored(contracts, request, problem, now_ns, effects)
        for contract in contracts:
            self._take_over(contract, now_ns, effects)
        return effects

    def contract_stored(self, contract: Contract, request: Request, problem: str, now_ns: int) -> list[Effect]:
        """A registered contract was written to the registry's file, or, with a problem, could not be."""
        effects: list[Effect] = []
        self.catalogue.stored(contract, request, problem, now_ns, effects)
        self._take_over(contract, now_ns, effects)
        return effects

    def _take_over(self, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        """Hand out the calls that waited for the contract that this one replaces."""
        self._hand_on(contract, now_ns, effects)
        for place in contract.places:
            while place.idle and place.queue:
                self._employ(place.idle.pop(), now_ns, effects)
            self.catalogue.staff(place, now_ns, effects)

    def unregister(self, contract_id: int, now_ns: int) -> list[Effect]:
        """Remove a contract: queued calls fail, running ones end."""
        effects: list[Effect] = []
        for call in self.catalogue.remove(contract_id, now_ns, effects):
            self._fail_unregistered(call, now_ns, effects)
        return effects

    # -- the end --------------------------------------------------------------------------------------------
    def drain(self) -> None:
        """Take no new calls and registrations; what was accepted is finished."""
        self.is_draining = True
        self.catalogue.is_draining = True

    @property
    def owes(self) -> bool:
        """Whether a call or a registration has no answer yet."""
        if self.catalogue.pending:
            return True
        calls = (call for session in self.sessions.values() for call in session.calls.values())
        return any(not call.answered or call.inquiry is not None for call in calls)

    def cancel_all(self, now_ns: int) -> list[Effect]:
        """Answer every call that has no answer: the broker ends."""
        effects: list[Effect] = []
        by = "the broker, which is shutting down"
        for session in self.sessions.values():
            for call in session.calls.values():
                self._tell_overdue(call, NO_VITALS, effects)
            for call in [call for call in session.calls.values() if not call.answered]:
                if call.state is QUEUED:
                    call.contract.queue.remove(call.owner, call)
                    effects.append(answers.cancelled(call, "no", now_ns, by=by))
                    self._end(call, now_ns, effects)
                    continue
                seen = self._give_up(call, now_ns, effects)
                if not has_result(call, seen):
                    effects.append(answers.cancelled(call, has_begun(call, seen), now_ns, by=by, slot="kept"))
        return effects

    # -- time -----------------------------------------------------------------------------------------------
    def next_deadline(self) -> int | None:
        """Return when `time_passed` is due, or None.

        Where there are timers there may be a worker to look at: whoever waits for a call has one.
        """
        next_ns = self._wheel.next_ns()
        return next_ns if next_ns is None or next_ns <= self._look_ns else self._look_ns

    def time_passed(self, now_ns: int) -> list[Effect]:
        """Act on everything that is due."""
        effects: list[Effect] = []
        for subject in self._wheel.expired(now_ns):
            if isinstance(subject, Call):
                self._call_due(subject, now_ns, effects)
            elif isinstance(subject, Worker):
                self._worker_due(subject, now_ns, effects)
            elif isinstance(subject, Contract):
                self.catalogue.time_passed(subject, now_ns, effects)
            elif isinstance(subject, Inquiry):
                self._tell_overdue(subject.call, NO_VITALS, effects)
            else:
                subject.replenish(now_ns, effects)
        if now_ns >= self._look_ns:
            self._look_ns = now_ns + LOOK_NS
            self._look_around(now_ns, effects)
        return effects

    def _look_around(self, now_ns: int, effects: list[Effect]) -> None:
        """See whether workers have marked their calls as done without having answered for them, so far."""
        slow_ns = now_ns - SLOW_NS
        for worker in list(self.workforce.by_id.values()):
            call = worker.call
            if call is not None and call.sent_ns <= slow_ns and worker.timer is None and worker.state is not DOOMED:
                self._catch_up(worker, now_ns, effects)

    def _worker_due(self, worker: Worker, now_ns: int, effects: list[Effect]) -> None:
        """A worker did not start or load in time, or it is time to see how far a busy one has come."""
        worker.timer = None
        if worker.state in (STARTING, LOADING, SAVING, RESTORING):
            self._dismiss(worker, _overdue(worker), now_ns, effects)
        elif worker.state in (BUSY, WAITING, LEAVING) and (
            worker.call is None or now_ns - worker.call.sent_ns >= SLOW_NS
        ):
            self._catch_up(worker, now_ns, effects)
        if worker.state not in (BUSY, WAITING, LEAVING):
            return
        silence_max_ns = max(SILENCE_MAX_NS, worker.contract.run_limit_ns if worker.contract else 0)
        if worker.call is None and now_ns - worker.silent_ns >= silence_max_ns:
            self._dismiss(worker, "it marked a call as done and does not answer for it", now_ns, effects)
            return
        self._spread(worker, now_ns, effects)
        if worker.timer is None and (worker.call is None or worker.ahead or worker.finished):
            worker.timer = self._wheel.set(now_ns + SLOW_NS, worker)

    def _call_due(self, call: Call, now_ns: int, effects: list[Effect]) -> None:
        """A call is at its deadline, or at the limit on its running time."""
        call.timer = None
        if call.state is QUEUED:
            call.contract.queue.remove(call.owner, call)
            effects.append(answers.deadline_exceeded(call, "no", now_ns))
            self._end(call, now_ns, effects)
            return
        worker = worker_of(call)
        self._catch_up(worker, now_ns, effects)
        is_running = worker.call is call
        if not call.answered:
            seen = self._give_up(call, now_ns, effects)
            if not has_result(call, seen):
                call.is_overdue = True
                run_limit = f"run_limit {call.contract.run_limit_ns / NS_PER_S:g} s"
                limit = "" if now_ns >= call.deadline_ns else run_limit
                began = has_begun(call, seen)
                if began == "yes" and worker.state is not DOOMED:
                    self._inquire(call, limit, seen, now_ns, effects)
                else:
                    effects.append(answers.deadline_exceeded(call, began, now_ns, limit=limit, slot="kept"))
        if is_running and worker.state is not DOOMED:
            self._end_run(call, now_ns, effects)


def _overdue(worker: Worker) -> str:
    if worker.state is LOADING:
        return f"it did not load within {LOAD_LIMIT_NS // NS_PER_S} s"
    if worker.state in (SAVING, RESTORING):
        what = "save" if worker.state is SAVING else "restore"
        return f"it did not {what} its state within {CARRY_LIMIT_NS // NS_PER_S} s"
    return f"it did not start within {START_LIMIT_NS // NS_PER_S} s"
