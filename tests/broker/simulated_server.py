"""The broker of the simulation: the real dispatcher and books, and in place of `server.py` a shell of virtual time.

It keeps the real shell's rules: messages of unknown peers are dropped, the cause of a death is awaited for a while,
a worker is served only when its worker host has reported it, and deadlines are looked at no more often than needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from luacell.broker import model
from luacell.broker.books import Books, Pair, PairState, Refusal
from luacell.broker.causes import UNKNOWN, Cause, Vitals
from luacell.broker.dispatcher import Dispatcher
from luacell.broker.model import Effect, Request, SendReply, Worker
from luacell.broker.registry import ContractRecord, Registry
from luacell.protocol import headers
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.limits import NS_PER_MS
from luacell.protocol.slots import SlotShape
from tests.broker.simulated_callers import SimulatedCaller
from tests.broker.simulated_hosts import SimulatedHost
from tests.broker.simulated_memory import Memory
from tests.broker.simulated_workers import Execute, SimulatedWorker, SimulatedWorkerHost

if TYPE_CHECKING:
    from tests.broker.simulation import Simulation

TICK_NS = 20 * NS_PER_MS  # how long the real shell waits for a message while something has a deadline
TIME_STEP_NS = 4 * NS_PER_MS  # how long it does not look at deadlines while messages keep coming
CLOSING_WAIT_NS = 20 * NS_PER_MS
CAUSE_WAIT_NS = 250 * NS_PER_MS
HOST_MEMORY_MAX = 6 * 4 * 12 * 1024  # six pairs of four small slots
TOTAL_MEMORY_MAX = 15 * 4 * 12 * 1024


class SimulatedServer:
    """One broker."""

    def __init__(self, world: Simulation, spares: int) -> None:
        self.world = world
        self.memory = Memory()
        self.books = Books(HOST_MEMORY_MAX, TOTAL_MEMORY_MAX)
        self.registry = Registry()
        self._last_routing_id = 0
        self.dispatcher = Dispatcher(self.memory, self.books, self.registry, self._new_routing_id, spares)
        self.workforce = self.dispatcher.workforce
        self.hosts: dict[bytes, SimulatedHost | SimulatedCaller] = {}
        self.links: dict[int, SimulatedWorker] = {}
        self.worker_host: SimulatedWorkerHost | None = None
        self._ready_early: set[int] = set()
        self._mapped: set[tuple[int, Pair]] = set()
        self._closing: dict[int, int] = {}  # since when, by worker
        self._dying: dict[int, int] = {}
        self._looked_ns = 0
        self._heard_ns = 0
        self._has_tick = False
        self._performers: dict[type[Effect], Callable[..., None]] = {
            model.SendResult: self._send_result,
            model.SendFailure: self._send_failure,
            model.SendReleased: self._send_released,
            model.SendReply: self._send_reply,
            model.StoreContract: self._store_contract,
            model.StartWorker: self._start_worker,
            model.LoadWorker: self._load_worker,
            model.SaveState: self._save_state,
            model.RestoreState: self._restore_state,
            model.KillWorker: self._kill_worker,
            model.InspectWorker: self._inspect_worker,
            model.DropPair: self._drop_pair,
            model.RecordCrash: lambda effect: None,
            model.Record: lambda effect: None,
        }

    def _new_routing_id(self) -> bytes:
        self._last_routing_id += 1
        return self._last_routing_id.to_bytes(16, "big")

    # -- the loop -----------------------------------------------------------------------------------------------
    @property
    def now_ns(self) -> int:
        return self.world.schedule.now_ns

    def _perform(self, effects: Iterable[Effect]) -> None:
        """Perform effects; calls leave last, together by worker, as the real shell sends them."""
        together: dict[Worker, list[model.SendCall]] = {}
        for effect in effects:
            if isinstance(effect, model.SendCall):
                together.setdefault(effect.worker, []).append(effect)
            else:
                self.world.auditor.saw(effect)
                self._performers[type(effect)](effect)
        for worker, calls in together.items():
            self._send_calls(worker, calls)

    def _turn(self) -> None:
        """Something was heard: look at deadlines, unless that was done just now; then let all be checked."""
        self._heard_ns = self.now_ns
        if self.now_ns >= self._looked_ns + TIME_STEP_NS:
            self._pass_time()
        self.world.auditor.check(self.dispatcher)
        self._arm_tick()

    def _arm_tick(self) -> None:
        is_quiet = self.dispatcher.next_deadline() is None and not self._dying and not self._closing
        if not self._has_tick and not is_quiet:
            self._has_tick = True
            self.world.schedule.at(self._heard_ns + TICK_NS, self._tick)

    def _tick(self) -> None:
        self._has_tick = False
        if self.now_ns >= self._heard_ns + TICK_NS:
            self._heard_ns = self.now_ns
            self._pass_time()
            self.world.auditor.check(self.dispatcher)
        self._arm_tick()

    def _pass_time(self) -> None:
        now_ns = self._looked_ns = self.now_ns
        next_ns = self.dispatcher.next_deadline()
        if next_ns is not None and next_ns <= now_ns:
            self._perform(self.dispatcher.time_passed(now_ns))
        for worker_id in [each for each, since_ns in self._closing.items() if now_ns - since_ns >= CLOSING_WAIT_NS]:
            del self._closing[worker_id]
            self._perform(self.dispatcher.worker_lost(self.workforce.by_id[worker_id], now_ns))
        for worker_id in [each for each, since_ns in self._dying.items() if now_ns - since_ns >= CAUSE_WAIT_NS]:
            self._worker_died(self.workforce.by_id[worker_id], UNKNOWN)

    def _comes_in_a_batch(self) -> bool:
        """Whether a record is one of several in its message: the real shell's quick way is for single ones."""
        return self.world.schedule.chance(0.2)

    # -- hosts --------------------------------------------------------------------------------------------------
    def on_hello(self, host: SimulatedHost) -> None:
        self.hosts[host.id] = host
        self.dispatcher.host_joined(host.id)
        self._turn()

    def on_host_gone(self, host: SimulatedHost) -> None:
        if self.hosts.pop(host.id, None) is not None:
            self.world.auditor.host_left(host.id)
            self._perform(self.dispatcher.host_left(host.id, self.now_ns))
            self._turn()

    def on_call(self, host: SimulatedHost | SimulatedCaller, header: headers.Call, number: int) -> None:
        if host.id not in self.hosts:
            return
        effects: list[Effect]
        is_usual = not host.is_worker and not self._comes_in_a_batch()
        call = self.dispatcher.quick_call(host.id, header, self.now_ns) if is_usual else None
        if call is not None:
            self.world.counts["quick calls"] += 1
            effects = [] if call.worker is None else [model.SendCall(call.worker, call)]
        else:
            effects = self.dispatcher.call_arrived(host.id, header, self.now_ns)
        self.world.auditor.call_arrived(self.dispatcher, host.id, header, number, effects)
        self._perform(effects)
        self._turn()

    def on_nested(self, worker_id: int, call_id: int, contract_id: int, budget_us: int) -> None:
        """A contract calls another."""
        worker = self.workforce.by_id.get(worker_id)
        if worker is None:
            return
        caller = self.hosts.get(worker.routing_id)
        if not isinstance(caller, SimulatedCaller):
            caller = SimulatedCaller(self.world, self.world.workers[worker_id], worker.routing_id)
            self.hosts[caller.id] = caller
            self.dispatcher.caller_joined(worker)
        caller.call(call_id, contract_id, budget_us)

    def on_cancel(self, host: SimulatedHost, call_id: int) -> None:
        if host.id in self.hosts:
            self.world.auditor.cancelled(host.id, call_id)
            self._perform(self.dispatcher.call_cancelled(host.id, call_id, self.now_ns))
            self._turn()

    def on_register(self, host: SimulatedHost, request_id: int, record: ContractRecord, replace: bool) -> None:
        if host.id not in self.hosts:
            return
        effects: list[Effect] = []
        request = Request(host.id, request_id)
        self.world.auditor.asked(request)
        self.dispatcher.catalogue.register(request, record, replace=replace, now_ns=self.now_ns, effects=effects)
        self._perform(effects)
        self._turn()

    def on_unregister(self, host: SimulatedHost, request_id: int, contract_id: int) -> None:
        if host.id not in self.hosts:
            return
        request = Request(host.id, request_id)
        self.world.auditor.asked(request)
        contract = self.dispatcher.catalogue.serving.get(contract_id)
        if contract is None or contract.record.owner not in (None, host.id):
            self._perform([SendReply(request, "ContractNotFound", AbiErrorCode.HOST_CONTRACT_NOT_FOUND, "")])
            return
        self._perform(self.dispatcher.unregister(contract_id, self.now_ns))
        self._perform([SendReply(request)])
        self._turn()

    def _store_contract(self, effect: model.StoreContract) -> None:
        """Write it, a little later: that is done elsewhere, and the disk may be full."""
        problem = "the disk is full" if self.world.schedule.chance(0.05) else ""
        self.world.schedule.after(2 * NS_PER_MS, lambda: self._on_stored(effect, problem))

    def _on_stored(self, effect: model.StoreContract, problem: str) -> None:
        self._perform(self.dispatcher.contract_stored(*effect, problem, self.now_ns))
        self._turn()

    def on_lease(self, host: SimulatedHost, contract_id: int, count: int) -> None:
        """Grant a pair, a little later: memory is allocated elsewhere."""
        contract = self.dispatcher.catalogue.serving.get(contract_id)
        if host.id not in self.hosts or contract is None or contract.record.owner not in (None, host.id):
            return
        pair = self.books.plan_pair(host.id, contract_id, SlotShape.for_payloads(8, 8, count))
        if not isinstance(pair, Refusal):
            self.world.schedule.after(3 * NS_PER_MS, lambda: self._grant(host, pair))

    def _grant(self, host: SimulatedHost, pair: Pair) -> None:
        if pair.state is not PairState.PLANNED:
            return
        if self.world.schedule.chance(0.05):  # no memory
            self.books.abandon(pair)
            return
        slots = self.memory.add(pair)
        pair.state = PairState.GRANTED
        host.grants.send(lambda: host.on_grant(pair.arena.contract_id, pair.arena.id, pair.index, slots))

    def on_mapped(self, host: SimulatedHost, arena: int, index: int) -> None:
        pair = self.books.pair_of(host.id, arena, index)
        if not isinstance(pair, Refusal) and pair.state is PairState.GRANTED:
            self.books.mapped(pair)

    def on_give_back(self, host: SimulatedHost, arena: int, index: int) -> None:
        pair = self.books.pair_of(host.id, arena, index)
        if not isinstance(pair, Refusal) and self.books.retire(pair):
            self._perform([model.DropPair(pair)])
            self._turn()

    # -- workers ------------------------------------------------------------------------------------------------
    def on_ready(self, worker_id: int) -> None:
        worker = self.workforce.by_id.get(worker_id)
        if worker is None:
            return
        if worker_id in self.links:
            self._perform(self.dispatcher.worker_ready(worker, self.now_ns))
            self._turn()
        else:
            self._ready_early.add(worker_id)

    def on_loaded(self, worker_id: int, problem: str, keeps_state: bool = False) -> None:
        worker = self.workforce.by_id.get(worker_id)
        if worker is not None:
            effects = self.dispatcher.worker_loaded(
                worker, problem, "a reason", self.now_ns, saves=keeps_state, restores=keeps_state
            )
            self._perform(effects)
            self._turn()

    def on_saved(self, worker_id: int, state: bytes, problem: str) -> None:
        worker = self.workforce.by_id.get(worker_id)
        if worker is not None:
            self._perform(self.dispatcher.worker_saved(worker, state, problem, self.now_ns))
            self._turn()

    def on_restored(self, worker_id: int, problem: str) -> None:
        worker = self.workforce.by_id.get(worker_id)
        if worker is not None:
            self._perform(self.dispatcher.worker_restored(worker, problem, self.now_ns))
            self._turn()

    def on_done(self, worker_id: int, done: headers.Done) -> None:
        worker = self.workforce.by_id.get(worker_id)
        if worker is None:
            return
        process = self.world.workers[worker_id]
        process.has_said_so = process.has_said_so or bool(done.flags & 1)
        call = None if self._comes_in_a_batch() else self.dispatcher.quick_done(worker, done, self.now_ns)
        if call is not None:
            self.world.counts["quick answers"] += 1
            self._perform([model.SendResult(call, done.code, done.out_size, done.error_size, True)])
        else:
            self._perform(self.dispatcher.worker_done(worker, done, self.now_ns))
        if not self._comes_in_a_batch():
            self._perform(self.dispatcher.refill(worker, self.now_ns))
        self._turn()

    # -- worker hosts, pidfds, socketpairs ----------------------------------------------------------------------
    def on_worker_host_joined(self, host: SimulatedWorkerHost) -> None:
        self.worker_host = host
        effects: list[Effect] = []
        self.workforce.host_joined(self.now_ns, effects)
        self._perform(effects)
        self._turn()

    def on_worker_host_gone(self, host: SimulatedWorkerHost) -> None:
        self.worker_host = None
        self.world.auditor.orphaned(self.workforce.by_id)
        self._perform(self.dispatcher.worker_host_left(self.now_ns))
        for worker_id in list(self._dying):
            self._worker_died(self.workforce.by_id[worker_id], UNKNOWN)
        for worker in [each for each in self.workforce.by_id.values() if each.id not in self.links]:
            self._worker_died(worker, Cause(problem="the worker host died while starting it"))
        self._turn()

    def on_started(self, worker: SimulatedWorker) -> None:
        known = self.workforce.by_id.get(worker.id)
        if known is None:
            return
        self.links[worker.id] = worker
        if not worker.is_alive:  # its pidfd is readable at once
            self.world.schedule.after(0, lambda: self.on_pidfd(worker.id))
        elif not worker.has_channel:
            self.world.schedule.after(0, lambda: self.on_channel_closed(worker.id))
        if worker.id in self._ready_early:
            self._ready_early.discard(worker.id)
            self._perform(self.dispatcher.worker_ready(known, self.now_ns))
        self._turn()

    def on_exited(self, worker_id: int, cause: Cause) -> None:
        worker = self.workforce.by_id.get(worker_id)
        if worker is not None:
            self._worker_died(worker, cause)
            self._turn()

    def on_pidfd(self, worker_id: int) -> None:
        if worker_id not in self.links:
            return
        if self.worker_host is None:
            self._worker_died(self.workforce.by_id[worker_id], UNKNOWN)
        else:
            self._closing.pop(worker_id, None)
            self._dying.setdefault(worker_id, self.now_ns)
        self._turn()

    def on_channel_closed(self, worker_id: int) -> None:
        if worker_id in self.links and worker_id not in self._dying:
            self._closing[worker_id] = self.now_ns
            self._turn()

    def _worker_died(self, worker: Worker, cause: Cause) -> None:
        self._ready_early.discard(worker.id)
        self._closing.pop(worker.id, None)
        self._dying.pop(worker.id, None)
        self.links.pop(worker.id, None)
        self._perform(self.dispatcher.worker_died(worker, cause, self.now_ns))
        if self.hosts.pop(worker.routing_id, None) is not None:
            self.world.auditor.host_left(worker.routing_id)

    # -- effects ------------------------------------------------------------------------------------------------
    def _send_calls(self, worker: Worker, calls: list[model.SendCall]) -> None:
        """Send a worker its calls, unless it cannot be given the memory that they need."""
        for each in calls:
            self.world.auditor.saw(each)
        process = self.links[worker.id]
        needed = {(worker.id, each.call.pair) for each in calls}
        if not needed <= self._mapped and not process.has_channel:
            self._perform(self.dispatcher.worker_lost(worker, self.now_ns))
            return
        self._mapped |= needed
        for each in calls:
            self._send_call(process, each.call)

    def _send_call(self, process: SimulatedWorker, call: model.Call) -> None:
        execute = Execute(
            call.sequence,
            call.deadline_ns,
            call.contract.run_limit_ns,
            call.header.generation,
            call.header.out_size,
            self.memory.slot_of(call),
            self.memory.slot_of(call).args,
        )
        if process.is_alive:
            process.held.add(execute.number)
            process.executes[execute.number] = execute
            process.sequences.add(execute.sequence)
            process.inbox.send(lambda: process.receive(lambda: process.execute(execute)))

    def _load_worker(self, effect: model.LoadWorker) -> None:
        process, source = self.links[effect.worker.id], effect.record.source
        is_single = effect.record.settings.workers == 1
        process.inbox.send(lambda: process.receive(lambda: process.load(source, is_single)))

    def _save_state(self, effect: model.SaveState) -> None:
        process = self.links[effect.worker.id]
        process.inbox.send(lambda: process.receive(process.save))

    def _restore_state(self, effect: model.RestoreState) -> None:
        process, state = self.links[effect.worker.id], effect.state
        process.inbox.send(lambda: process.receive(lambda: process.restore(state)))

    def _start_worker(self, effect: model.StartWorker) -> None:
        host, worker_id = self.worker_host, effect.worker.id
        if host is not None:
            host.orders.send(lambda: host.start(worker_id))

    def _kill_worker(self, effect: model.KillWorker) -> None:
        host, worker_id = self.worker_host, effect.worker.id
        if host is not None:
            host.orders.send(lambda: host.kill(worker_id))

    def _inspect_worker(self, effect: model.InspectWorker) -> None:
        host, (worker, sequence) = self.worker_host, effect
        if host is not None:
            host.orders.send(lambda: host.inspect(worker.id, sequence))

    def on_inspected(self, worker_id: int, sequence: int) -> None:
        worker = self.workforce.by_id.get(worker_id)
        if worker is not None:
            self.world.counts["inspections"] += 1
            vitals = Vitals(self.now_ns // 1000, 1 << 20, "R (running)", "")
            self._perform(self.dispatcher.worker_inspected(worker, sequence, vitals, self.now_ns))
            self._turn()

    def _drop_pair(self, effect: model.DropPair) -> None:
        self.memory.drop(effect.pair)
        self._mapped = {each for each in self._mapped if each[1] is not effect.pair}

    def _send_result(self, effect: model.SendResult) -> None:
        host = self.hosts.get(effect.call.session.id)
        if host is not None:
            call_id, (_, code, out_size, error_size, is_free) = effect.call.header.call_id, effect
            host.inbox.send(lambda: host.on_result(call_id, code, out_size, error_size, is_free))

    def _send_failure(self, effect: model.SendFailure) -> None:
        host = self.hosts.get(effect.session_id)
        if host is not None:
            host.inbox.send(lambda: host.on_failure(effect.call_id, effect.slot))

    def _send_released(self, effect: model.SendReleased) -> None:
        host = self.hosts.get(effect.session_id)
        if host is not None:
            host.inbox.send(lambda: host.on_released(effect.call_id))

    def _send_reply(self, effect: model.SendReply) -> None:
        host = self.hosts.get(effect.request.session_id)
        if isinstance(host, SimulatedHost):
            host.inbox.send(lambda: host.on_reply(effect.request.request_id, effect.kind))
