"""Hosts as the simulation has them: they lease memory, call, cancel and leave, and some of them cannot be trusted.

A host writes a number of its own into each slot it calls with, and finds that number again in the answer, or somebody
else's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luacell.broker.registry import ContractRecord
from luacell.protocol.headers import HAS_ARGS, HAS_OUT, Call
from luacell.protocol.limits import DEADLINE_MAX_US, NS_PER_MS
from luacell.protocol.messages import API_MODULE, IN_INSTANCE, SEAT_SHIFT, Settings
from luacell.protocol.slots import GENERATION_MASK, SLOT_SHIFT
from tests.broker import auditor
from tests.broker.simulated_memory import Slot
from tests.broker.simulated_time import Wire

if TYPE_CHECKING:
    from tests.broker.simulation import Simulation

CONTRACTS = range(1, 6)
UNKNOWN_CONTRACT = 99
SLOTS = 4
PAIRS_MAX = 3  # that a host leases for a contract before it waits for its slots
SOURCES = (b"fine", b"fine", b"fine", b"flaky", b"flaky", b"load", b"type", b"crash", b"hang", b"close", b"ready")
REFUSED = "unused"


@dataclass(slots=True, eq=False)
class HostSlot:
    """A slot as its host sees it.

    Attributes:
        used: the generation of its last call that had an answer of the broker's; 1 before the first.
    """

    arena: int
    number: int
    memory: Slot
    generation: int = 1
    used: int = 1
    is_given_back: bool = False


@dataclass(slots=True, eq=False)
class HostCall:
    """A call as its host sees it; without a slot when it cannot be accepted."""

    number: int
    contract_id: int
    slot: HostSlot | None
    is_answered: bool = False
    is_kept: bool = False


class SimulatedHost:
    """A program that calls contracts.

    Attributes:
        calls: those that are not done with, by call id, oldest first.
    """

    is_worker = False

    def __init__(self, world: Simulation, host_id: bytes) -> None:
        self.world = world
        self.id = host_id
        self.is_alive = True
        self.inbox = Wire(world.schedule)
        self.outbox = Wire(world.schedule)
        self.grants = Wire(world.schedule)
        self.calls: dict[int, list[HostCall]] = {}
        self.cancelled: set[int] = set()
        self.requests: set[int] = set()
        self._free: dict[int, list[HostSlot]] = {}
        self._leased: dict[int, int] = {}  # pairs asked for, by contract
        self._last_id = 0
        self.outbox.send(lambda: world.server.on_hello(self))

    # -- deeds --------------------------------------------------------------------------------------------------
    def act(self) -> None:
        """Do something; mostly call."""
        schedule, swarm = self.world.schedule, self.world.swarm
        if schedule.chance(swarm.cancelling):
            self._cancel()
        elif schedule.chance(swarm.malice):
            self._call_badly()
        elif schedule.chance(swarm.registering):
            record = random_record(self.world, schedule.rng.choice(CONTRACTS), self.id)
            self.register(record, replace=schedule.chance(0.6))
        elif swarm.reloading and schedule.chance(swarm.reloading):
            self.register(random_record(self.world, schedule.rng.choice(CONTRACTS), self.id, b"fine"), replace=True)
        elif schedule.chance(swarm.registering / 6):
            self._unregister(schedule.rng.choice(CONTRACTS))
        elif schedule.chance(swarm.giving_back):
            self._give_back()
        else:
            for _ in range(1 + (swarm.burst and schedule.rng.randrange(swarm.burst))):
                self._call(CONTRACTS[int(schedule.rng.random() ** 2 * len(CONTRACTS))])

    def leave(self) -> None:
        """End: say so, or be found dead; part of what is under way is lost."""
        self.is_alive = False
        self.outbox.cut(self.world.schedule.rng.randrange(3))
        delay_ns = self.world.schedule.between(0, 5 * NS_PER_MS)
        self.world.schedule.after(delay_ns, lambda: self.world.server.on_host_gone(self))

    def unregister_all(self) -> None:
        """Clear up."""
        for contract_id in CONTRACTS:
            self._unregister(contract_id)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _call(self, contract_id: int) -> None:
        free = self._free.get(contract_id)
        if not free:
            self._lease(contract_id)
            return
        self._send_call(self._next_id(), contract_id, free.pop())

    def _send_call(self, call_id: int, contract_id: int, slot: HostSlot) -> None:
        number = self.world.auditor.next_number()
        slot.memory.generation = slot.generation
        slot.memory.args = number
        header = header_of(call_id, contract_id, slot, self._budget_us())
        self.calls.setdefault(call_id, []).append(HostCall(number, contract_id, slot))
        self.outbox.send(lambda: self.world.server.on_call(self, header, number))

    def _budget_us(self) -> int:
        return random_budget_us(self.world)

    def _lease(self, contract_id: int) -> None:
        leased = self._leased.get(contract_id, 0)
        if leased < PAIRS_MAX or self.world.schedule.chance(0.02):
            self._leased[contract_id] = leased + 1
            self.outbox.send(lambda: self.world.server.on_lease(self, contract_id, SLOTS))

    def _give_back(self) -> None:
        """Give a pair back: mostly an idle one, but nothing forbids to give back one in use."""
        contract_id = self.world.schedule.rng.choice(CONTRACTS)
        free = self._free.get(contract_id)
        if not free:
            return
        arena, index = free[0].arena, free[0].number >> SLOT_SHIFT
        whole = [slot for slot in free if slot.number >> SLOT_SHIFT == index]
        if len(whole) < SLOTS and not self.world.schedule.chance(0.2):
            return
        for slot in whole:
            free.remove(slot)
        for calls in self.calls.values():
            for call in calls:
                if call.slot is not None and (call.slot.arena, call.slot.number >> SLOT_SHIFT) == (arena, index):
                    call.slot.is_given_back = True
        self._leased[contract_id] -= 1
        self.outbox.send(lambda: self.world.server.on_give_back(self, arena, index))

    def _cancel(self) -> None:
        rng = self.world.schedule.rng
        call_id = rng.choice(list(self.calls)) if self.calls and rng.random() < 0.9 else rng.randrange(1, 1000)
        self.cancelled.add(call_id)
        self.outbox.send(lambda: self.world.server.on_cancel(self, call_id))

    def register(self, record: ContractRecord, *, replace: bool) -> None:
        """Register a contract."""
        request_id = self._next_id()
        self.requests.add(request_id)
        self.outbox.send(lambda: self.world.server.on_register(self, request_id, record, replace))

    def _unregister(self, contract_id: int) -> None:
        request_id = self._next_id()
        self.requests.add(request_id)
        self.outbox.send(lambda: self.world.server.on_unregister(self, request_id, contract_id))

    def _call_badly(self) -> None:
        """Send a call that must be refused, or that repeats an id."""
        rng = self.world.schedule.rng
        contract_id = rng.choice(CONTRACTS)
        free = self._free.get(contract_id)
        if not free:
            return
        slot = free[-1]
        good = header_of(self._next_id(), contract_id, slot, self._budget_us())
        deed = rng.randrange(11)
        if deed == 0:
            self._call_twice(contract_id, free)
            return
        bad = (
            good._replace(generation=(slot.used - 1) & GENERATION_MASK),
            good._replace(arena=slot.arena + rng.choice((-1, 1, 1000))),
            good._replace(slot=slot.number + (1 << SLOT_SHIFT << 8)),
            good._replace(slot=slot.number | SLOTS),
            good._replace(contract_id=UNKNOWN_CONTRACT),
            good._replace(call_id=0),
            good._replace(budget_us=DEADLINE_MAX_US + 1),
            good._replace(flags=rng.choice((0, 4, HAS_ARGS, HAS_OUT))),
            good._replace(args_size=1 << 30),
            self._over_one_in_flight(good),
        )[deed - 1]
        call = HostCall(self.world.auditor.next_number(), contract_id, None)
        self.calls.setdefault(bad.call_id, []).append(call)
        self.outbox.send(lambda: self.world.server.on_call(self, bad, call.number))

    def _over_one_in_flight(self, good: Call) -> Call:
        """Name the slot of a call that was answered and is not over; once it is, the generation is another."""
        for call in self._kept().values():
            if call.slot is not None:
                return header_of(good.call_id, call.contract_id, call.slot, good.budget_us)
        return good._replace(generation=0)

    def _call_twice(self, contract_id: int, free: list[HostSlot]) -> None:
        """Use the id of a call that is not over; by the time it arrives that may be, and all is well."""
        used = list(self._kept())
        if used:
            self._send_call(self.world.schedule.rng.choice(used), contract_id, free.pop())

    def _kept(self) -> dict[int, HostCall]:
        return {call_id: call for call_id, calls in self.calls.items() for call in calls if call.is_kept}

    # -- answers ------------------------------------------------------------------------------------------------
    def on_grant(self, contract_id: int, arena: int, index: int, memory: list[Slot]) -> None:
        if not self.is_alive:
            return
        slots = [HostSlot(arena, index << SLOT_SHIFT | position, slot) for position, slot in enumerate(memory)]
        self._free.setdefault(contract_id, []).extend(slots)
        self.outbox.send(lambda: self.world.server.on_mapped(self, arena, index))

    def on_result(self, call_id: int, code: int, out_size: int, error_size: int, is_free: bool) -> None:
        call = self._answered(call_id, is_refusal=False)
        slot = call.slot
        assert slot is not None, f"call {call.number} could not be accepted and has a result"
        self.world.auditor.host_read(call.number, slot.memory.out, out_size, error_size, code)
        self._keep_or_free(call_id, call, is_free)

    def on_failure(self, call_id: int, fate: str) -> None:
        call = self._answered(call_id, is_refusal=fate == REFUSED)
        if fate == REFUSED:
            self._forget(call_id, call)
            if call.slot is not None and not call.slot.is_given_back:
                self._free[call.contract_id].append(call.slot)
        else:
            self._keep_or_free(call_id, call, fate == "free")

    def on_released(self, call_id: int) -> None:
        kept = [call for call in self.calls.get(call_id, ()) if call.is_kept]
        if not kept and call_id in self.cancelled:  # it was over when the CANCEL came
            return
        assert len(kept) == 1, f"RELEASED for call {call_id}, of which {len(kept)} are kept"
        kept[0].is_kept = False
        self._keep_or_free(call_id, kept[0], is_free=True)

    def on_reply(self, request_id: int, kind: str) -> None:
        self.requests.remove(request_id)
        self.world.counts[f"reply {kind or 'OK'}"] += 1

    def _answered(self, call_id: int, *, is_refusal: bool) -> HostCall:
        """Find the call that is meant: of those with one id, a refusal is for the newest."""
        waiting = [call for call in self.calls.get(call_id, []) if not call.is_answered]
        assert waiting, f"host {self.id!r} has an answer too many for call {call_id}"
        call = waiting[-1 if is_refusal else 0]
        call.is_answered = True
        return call

    def _keep_or_free(self, call_id: int, call: HostCall, is_free: bool) -> None:
        if not is_free:
            call.is_kept = True
            return
        self._forget(call_id, call)
        slot = call.slot
        assert slot is not None
        slot.used = slot.generation
        slot.generation += self.world.schedule.rng.choice((1, 1, 2))  # hosts that are not sure count on
        if not slot.is_given_back:
            self._free[call.contract_id].append(slot)

    def _forget(self, call_id: int, call: HostCall) -> None:
        calls = self.calls[call_id]
        calls.remove(call)
        if not calls:
            del self.calls[call_id]


def random_budget_us(world: Simulation) -> int:
    """Choose how long a call may take; 0: what its contract says."""
    return world.schedule.rng.choice((0, 0, 1_000, 20_000, 150_000, DEADLINE_MAX_US))


def header_of(call_id: int, contract_id: int, slot: HostSlot, budget_us: int) -> Call:
    """Return the CALL of a call in a slot; some are of instances."""
    flags = HAS_ARGS | HAS_OUT
    fn_id = IN_INSTANCE | call_id % 7 << SEAT_SHIFT if call_id % 2 else 0
    return Call(call_id, contract_id, fn_id, budget_us, slot.arena, slot.number, slot.generation, flags, 8, 8)


def random_record(world: Simulation, contract_id: int, session: bytes, source: bytes = b"") -> ContractRecord:
    """Make up a contract."""
    rng = world.schedule.rng
    stateless = rng.random() < 0.4
    modules = {API_MODULE: b""} if rng.random() < 0.25 else {}
    settings = Settings(
        deadline_us=rng.choice((10_000, 60_000, 300_000)),
        run_limit_us=rng.choice((20_000, 100_000, 400_000)),
        stateless=stateless,
        workers=rng.randrange(1, 4) if stateless or modules else 1,
        max_queue=auditor.QUEUE_MAX,
        max_in_flight=auditor.CALLS_IN_FLIGHT_MAX,
    )
    owner = session if not source and rng.random() < 0.15 else None
    return ContractRecord(
        contract_id, "", None, source or rng.choice(SOURCES), f"={contract_id}", modules, settings, owner
    )
