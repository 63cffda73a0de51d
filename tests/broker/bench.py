"""A test bench for the broker's decisions: the real dispatcher with real books, and slots that tests write into.

Every event advances no clock by itself; `pass_ms` does. What the last event asked for is in `effects`.
"""

from __future__ import annotations

from typing import Any, TypeVar

from luacell.broker.books import Books, Pair, PairState, Refusal
from luacell.broker.causes import UNKNOWN, Cause, Vitals
from luacell.broker.dispatcher import Dispatcher
from luacell.broker.model import (
    Call,
    Effect,
    InspectWorker,
    LoadWorker,
    Request,
    SendCall,
    SendFailure,
    SendReply,
    SendResult,
    StartWorker,
    StoreContract,
    StoreContracts,
    Worker,
)
from luacell.broker.registry import ContractRecord, Registry
from luacell.broker.timers import BUCKET_NS
from luacell.broker.workforce import SPARES_PAUSE_NS
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, Done
from luacell.protocol.headers import Call as CallHeader
from luacell.protocol.limits import NS_PER_MS
from luacell.protocol.messages import Settings
from luacell.protocol.slots import SLOT_SHIFT, SlotShape
from tests.broker.simulated_memory import Memory, Slot

HOST, OTHER_HOST = b"h" * 16, b"o" * 16
CONTRACT = 1
KILLED = Cause(signal=9)
SEGFAULT = Cause(signal=11)
VITALS = Vitals(cpu_us=240_000, memory=9 << 20, state="R (running)")

SPARES_PAUSE_MS = (SPARES_PAUSE_NS + BUCKET_NS) / NS_PER_MS  # from a load on; spares that are missing are ordered then

E = TypeVar("E")


def record_of(contract_id: int = CONTRACT, owner: bytes | None = None, **settings: Any) -> ContractRecord:
    """Make a contract known by its id only."""
    return ContractRecord(contract_id, "", None, b"return f", "=f", {}, Settings(**settings), owner)


def of_kind(effects: list[Effect], kind: type[E]) -> list[E]:
    """Return the effects of one kind."""
    return [effect for effect in effects if isinstance(effect, kind)]


class Bench:
    """One broker with a worker host and two hosts.

    Args:
        spares: blank workers to keep.
        window: calls that a worker of a new contract may hold ahead; 0: the others wait in the queue.
        has_worker_host: whether one is there from the beginning.
        workers_max: how many workers there may be.

    Attributes:
        effects: of the last event.
        stores_at_once: whether contracts are stored as soon as that is asked for.
        inspects_at_once: whether it is known at once what a worker's process is doing, which is `VITALS`.
    """

    stores_at_once = True
    inspects_at_once = True

    def __init__(
        self, spares: int = 1, *, window: int = 0, has_worker_host: bool = True, workers_max: int | None = None
    ) -> None:
        self._window = window
        self.now_ns = 1_000 * NS_PER_MS
        self.effects: list[Effect] = []
        self.memory = Memory()
        self.books = Books()
        self.registry = Registry()
        self._count = 0
        self.dispatcher = Dispatcher(self.memory, self.books, self.registry, self._new_routing_id, spares, workers_max)
        self.catalogue = self.dispatcher.catalogue
        self.workforce = self.dispatcher.workforce
        self._slots: dict[tuple[bytes, int], tuple[Pair, list[int]]] = {}
        for host in (HOST, OTHER_HOST):
            self.dispatcher.host_joined(host)
        if has_worker_host:
            self.join_worker_host()

    def _new_routing_id(self) -> bytes:
        return self._number().to_bytes(16, "big")

    def _number(self) -> int:
        self._count += 1
        return self._count

    # -- what happened --------------------------------------------------------------------------------------------
    def only(self, kind: type[E]) -> E:
        """Return the one effect of a kind that the last event had."""
        (effect,) = of_kind(self.effects, kind)
        return effect

    def has(self, kind: type[Any]) -> bool:
        """Whether the last event had an effect of a kind."""
        return bool(of_kind(self.effects, kind))

    def worker(self, number: int = -1) -> Worker:
        """Return a worker by the order of starts, dead ones left out; the last one by default."""
        return list(self.workforce.by_id.values())[number]

    def slot_of(self, call: Call) -> Slot:
        """Return the slot of a call."""
        return self.memory.slot_of(call)

    def call_of(self, call_id: int, host: bytes = HOST) -> Call:
        """Return an accepted call."""
        return self.dispatcher.sessions[host].calls[call_id]

    # -- events ---------------------------------------------------------------------------------------------------
    def pass_ms(self, duration_ms: float) -> list[Effect]:
        """Let time pass, and tell the dispatcher afterwards."""
        self.now_ns += int(duration_ms * NS_PER_MS)
        self.effects = self.dispatcher.time_passed(self.now_ns)
        for effect in of_kind(self.effects, InspectWorker) if self.inspects_at_once else ():
            self.effects = [each for each in self.effects if each is not effect]
            self.effects += self.dispatcher.worker_inspected(*effect, VITALS, self.now_ns)
        return self.effects

    def inspected(self, call: Call, vitals: Vitals) -> list[Effect]:
        """It is known what the process of the worker that holds a call is doing."""
        assert call.worker is not None
        self.effects = self.dispatcher.worker_inspected(call.worker, call.sequence, vitals, self.now_ns)
        return self.effects

    def join_worker_host(self) -> list[StartWorker]:
        """A worker host is there; return the starts that are ordered."""
        self.effects = []
        self.workforce.host_joined(self.now_ns, self.effects)
        return of_kind(self.effects, StartWorker)

    def ready(self, worker: Worker | None = None) -> Worker:
        """A worker is ready: the given one, or the one that was started first."""
        if worker is None:
            worker = next(each for each in self.workforce.by_id.values() if each.state.value == "starting")
        self.effects = self.dispatcher.worker_ready(worker, self.now_ns)
        return worker

    def loaded(
        self, worker: Worker, problem: str = "", reason: str = "", *, saves: bool = False, restores: bool = False
    ) -> list[Effect]:
        """A worker has loaded its contract, or not."""
        self.effects = self.dispatcher.worker_loaded(
            worker, problem, reason, self.now_ns, saves=saves, restores=restores
        )
        for effect in of_kind(self.effects, StoreContract) if self.stores_at_once else ():
            self.effects = [each for each in self.effects if each is not effect]
            self.effects += self.dispatcher.contract_stored(*effect, "", self.now_ns)
        return self.effects

    def stored(self, effect: StoreContract, problem: str = "") -> list[Effect]:
        """A contract was stored, or could not be."""
        self.effects = self.dispatcher.contract_stored(*effect, problem, self.now_ns)
        return self.effects

    def register(
        self,
        contract_id: int = CONTRACT,
        host: bytes = HOST,
        *,
        replace: bool = False,
        hold: bool = False,
        **settings: Any,
    ) -> Request:
        """A host registers a contract; `private=True` makes it its own."""
        owner = host if settings.pop("private", False) else None
        return self.register_record(record_of(contract_id, owner, **settings), host, replace=replace, hold=hold)

    def register_record(
        self, record: ContractRecord, host: bytes = HOST, *, replace: bool = False, hold: bool = False
    ) -> Request:
        """A host registers a contract."""
        request = Request(host, self._number())
        self.effects = []
        self.catalogue.register(
            request,
            record,
            replace=replace,
            hold=hold,
            now_ns=self.now_ns,
            effects=self.effects,
        )
        pending = self.catalogue.pending.get(record.id)
        if pending is not None:
            pending.window = self._window
        return request

    def hold(self, contract_id: int = CONTRACT, host: bytes = HOST, *, replace: bool = False) -> Worker:
        """Register a contract that is held, and load it; return its worker."""
        self.register(contract_id, host, replace=replace, hold=True)
        worker = self.load_next()
        assert self.only(SendReply).kind == ""
        return worker

    def commit(self, *ids: int, host: bytes = HOST) -> Request:
        """A host commits contracts that are held for it."""
        request = Request(host, self._number())
        self.effects = []
        self.catalogue.commit(request, ids, self.now_ns, self.effects)
        return request

    def release(self, *ids: int, host: bytes = HOST) -> None:
        """A host has contracts dropped that are held for it."""
        self.effects = []
        self.catalogue.release(Request(host, self._number()), ids, self.now_ns, self.effects)

    def all_stored(self, effect: StoreContracts, problem: str = "") -> list[Effect]:
        """Contracts that were held were stored, or could not be."""
        self.effects = self.dispatcher.contracts_stored(*effect, problem, self.now_ns)
        return self.effects

    def serve(
        self, contract_id: int = CONTRACT, host: bytes = HOST, *, replace: bool = False, **settings: Any
    ) -> Worker:
        """Register a contract and load it; return its worker, which is idle."""
        self.register(contract_id, host, replace=replace, **settings)
        worker = self.load_next()
        assert self.only(SendReply).kind == ""
        return worker

    def load_start(self) -> Worker:
        """Return the worker that the last event told to load, or else the next one to become ready."""
        if not self.has(LoadWorker):
            self.ready()
        return self.only(LoadWorker).worker

    def load_next(self) -> Worker:
        """Let that worker load."""
        worker = self.load_start()
        self.loaded(worker)
        return worker

    def lease(self, contract_id: int = CONTRACT, host: bytes = HOST, count: int = 64) -> Pair:
        """Grant a host a pair of segments, mapped and usable."""
        pair = self.books.plan_pair(host, contract_id, SlotShape.for_payloads(8, 8, count))
        assert not isinstance(pair, Refusal)
        self.memory.add(pair)
        pair.state = PairState.GRANTED
        self.books.mapped(pair)
        self._slots[host, contract_id] = pair, list(range(count))
        return pair

    def header(self, contract_id: int = CONTRACT, host: bytes = HOST, budget_us: int = 0) -> CallHeader:
        """Make a call with a slot of its own."""
        if not self._slots.get((host, contract_id), (None, []))[1]:
            self.lease(contract_id, host)
        pair, free = self._slots[host, contract_id]
        position = free.pop(0)
        slot = pair.index << SLOT_SHIFT | position
        generation = self.books.slots[pair.slot_key(position)].generation
        flags = HAS_ARGS | HAS_OUT
        return CallHeader(self._number(), contract_id, 7, budget_us, pair.arena.id, slot, generation, flags, 8, 8)

    def send(self, header: CallHeader, host: bytes = HOST) -> list[Effect]:
        """A call arrives."""
        self.effects = self.dispatcher.call_arrived(host, header, self.now_ns)
        return self.effects

    def call(self, contract_id: int = CONTRACT, host: bytes = HOST, budget_us: int = 0) -> Call:
        """A host calls; the call must be accepted."""
        header = self.header(contract_id, host, budget_us)
        self.send(header, host)
        return self.call_of(header.call_id, host)

    def cancel(self, call: Call) -> list[Effect]:
        """A host cancels a call."""
        self.effects = self.dispatcher.call_cancelled(call.session.id, call.header.call_id, self.now_ns)
        return self.effects

    def done(self, call: Call, code: int = 0, out_size: int = 8, error_size: int = 0, flags: int = 0) -> list[Effect]:
        """The worker that holds a call answers for it."""
        assert call.worker is not None
        answer = Done(call.sequence, code, out_size, error_size, flags)
        self.effects = self.dispatcher.worker_done(call.worker, answer, self.now_ns)
        return self.effects

    def begin(self, call: Call) -> None:
        """The worker marks a call as begun."""
        self.slot_of(call).begun = call.sequence

    def finish(self, call: Call, code: int = 0, out_size: int = 8, error_size: int = 0, flags: int = 0) -> None:
        """The worker writes an answer into the slot and marks it as done."""
        slot = self.slot_of(call)
        slot.code, slot.out_size, slot.error_size, slot.flags = code, out_size, error_size, flags
        slot.done = call.sequence

    def die(self, worker: Worker, cause: Cause = UNKNOWN) -> list[Effect]:
        """A worker is dead."""
        self.effects = self.dispatcher.worker_died(worker, cause, self.now_ns)
        return self.effects

    def lose(self, worker: Worker) -> list[Effect]:
        """A worker has closed its channel."""
        self.effects = self.dispatcher.worker_lost(worker, self.now_ns)
        return self.effects

    def unregister(self, contract_id: int = CONTRACT) -> list[Effect]:
        """A contract is unregistered."""
        self.effects = self.dispatcher.unregister(contract_id, self.now_ns)
        return self.effects

    def leave(self, host: bytes = HOST) -> list[Effect]:
        """A host is gone."""
        self.effects = self.dispatcher.host_left(host, self.now_ns)
        return self.effects

    @property
    def replied(self) -> tuple[str, AbiErrorCode]:
        """Kind and code of the one reply that the last event had."""
        reply = self.only(SendReply)
        return reply.kind, reply.code

    # -- shorthands for what must have been answered ----------------------------------------------------------------
    @property
    def failure(self) -> SendFailure:
        """The one failure that the last event told a host of."""
        return self.only(SendFailure)

    @property
    def result(self) -> SendResult:
        """The one result that the last event relayed."""
        return self.only(SendResult)

    @property
    def sent(self) -> SendCall:
        """The one call that the last event handed to a worker."""
        return self.only(SendCall)
