"""Workers whose contracts call others, as the simulation's broker knows them: hosts whose memory it keeps itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luacell.broker.books import PairState, Refusal
from luacell.protocol.slots import SLOT_SHIFT, SlotShape
from tests.broker.simulated_hosts import REFUSED, HostSlot, header_of

if TYPE_CHECKING:
    from tests.broker.simulated_workers import SimulatedWorker
    from tests.broker.simulation import Simulation


@dataclass(slots=True, eq=False)
class NestedCall:
    """A call of a contract."""

    number: int
    contract_id: int
    slot: HostSlot


class SimulatedCaller:
    """A worker whose contract calls others.

    Args:
        world: the simulation.
        process: the worker.
        routing_id: its identity, and that of its session.
    """

    is_worker = True

    def __init__(self, world: Simulation, process: SimulatedWorker, routing_id: bytes) -> None:
        self.world = world
        self.id = routing_id
        self.inbox = process.inbox
        self._process = process
        self._free: dict[int, list[HostSlot]] = {}
        self._calls: dict[int, NestedCall] = {}

    def call(self, call_id: int, contract_id: int, budget_us: int) -> None:
        """Its CALL_INLINE is at the broker."""
        slot = self._slot_for(contract_id)
        if slot is None:
            self.inbox.send(lambda: self._process.inner_ended(call_id))
            return
        number = self.world.auditor.next_number()
        slot.memory.generation, slot.memory.args = slot.generation, number
        self._calls[call_id] = NestedCall(number, contract_id, slot)
        self.world.server.on_call(self, header_of(call_id, contract_id, slot, budget_us), number)

    def _slot_for(self, contract_id: int) -> HostSlot | None:
        free = self._free.setdefault(contract_id, [])
        if free:
            return free.pop()
        server = self.world.server
        pair = server.books.plan_pair(self.id, contract_id, SlotShape.for_payloads(8, 8, 1))
        if isinstance(pair, Refusal):
            return None
        (slot,) = server.memory.add(pair)
        pair.state = PairState.GRANTED
        server.books.mapped(pair)
        return HostSlot(pair.arena.id, pair.index << SLOT_SHIFT, slot)

    # -- answers ------------------------------------------------------------------------------------------------
    def on_result(self, call_id: int, code: int, out_size: int, error_size: int, is_free: bool) -> None:
        call = self._calls[call_id]
        self.world.counts["nested results"] += 1
        self.world.auditor.host_read(call.number, call.slot.memory.out, out_size, error_size, code)
        if is_free:
            self.on_released(call_id)
        self._process.inner_ended(call_id)

    def on_failure(self, call_id: int, fate: str) -> None:
        self.world.counts["nested failures"] += 1
        if fate == REFUSED:
            call = self._calls.pop(call_id)
            self._free[call.contract_id].append(call.slot)
        elif fate == "free":
            self.on_released(call_id)
        self._process.inner_ended(call_id)

    def on_released(self, call_id: int) -> None:
        call = self._calls.pop(call_id)
        call.slot.generation += 1
        self._free[call.contract_id].append(call.slot)
