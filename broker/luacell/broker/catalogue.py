"""The catalogue: contracts that are served or about to be, how they load, and when they get workers.

Decides on registration, replacement, removal and failed loads; answers to calls are the dispatcher's, so
methods return the queued calls that must be failed. It loads nothing itself.

    register ──> pending ──first load succeeded, stored──> serving ──unregistered, replaced──> retired
                  │ └──or held, committed, all stored────────┤       (a later failed load: back-off, calls refused)
                  └────failed, dropped: nothing registered   │
    start of the broker: what was stored ────────────────────┘
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from luacell.broker import carrying
from luacell.broker.model import (
    BUSY,
    IDLE,
    LEAVING,
    SAVING,
    WAITING,
    Call,
    Contract,
    Effect,
    Record,
    Request,
    SendReply,
    StoreContract,
    StoreContracts,
    Subject,
)
from luacell.broker.quarantine import Quarantine
from luacell.broker.registry import ContractRecord, Registry
from luacell.broker.seats import move_calls
from luacell.broker.timers import TimerWheel
from luacell.broker.workforce import Workforce, backoff_ns
from luacell.protocol.confinement import DEFAULT, UNTRUSTED
from luacell.protocol.errors import AbiErrorCode, DuplicateContract, TypeMismatch, VmRegistrationFailed
from luacell.protocol.identity import format_id
from luacell.protocol.limits import CONTRACTS_MAX, LOAD_LIMIT_NS, NS_PER_S, START_LIMIT_NS

REGISTRATION_LIMIT_NS: Final = START_LIMIT_NS + LOAD_LIMIT_NS + NS_PER_S
HOLD_LIMIT_NS: Final = 60 * NS_PER_S  # for the host to load what else belongs to it, and to commit
UNCALLED_NS: Final = 5 * NS_PER_S  # a contract that nobody calls keeps the worker that proved it no longer than this


class Catalogue:
    """Contracts by id.

    Args:
        registry: keeps their records.
        workforce: gives them workers.
        wheel: for limits.
    """

    def __init__(self, registry: Registry, workforce: Workforce, wheel: TimerWheel[Subject]) -> None:
        self._registry = registry
        self._workforce = workforce
        self._wheel = wheel
        self.serving: dict[int, Contract] = {}
        self.pending: dict[int, Contract] = {}
        self.is_draining = False

    def register(
        self,
        request: Request,
        record: ContractRecord,
        *,
        replace: bool,
        hold: bool = False,
        now_ns: int,
        effects: list[Effect],
    ) -> None:
        """Begin a registration; its reply comes when the contract has loaded or failed to.

        With `hold` the contract is then kept back until the host commits it, for `HOLD_LIMIT_NS` at most.
        """
        if self.is_draining:
            reason = "the broker is shutting down"
            effects.append(SendReply(request, "Unavailable", AbiErrorCode.UNAVAILABLE, reason))
            return
        current = self.serving.get(record.id)
        if self._is_taken(record, current, replace):
            reason = str(DuplicateContract(record.id))
            effects.append(SendReply(request, "DuplicateContract", AbiErrorCode.DUPLICATE_PROVIDER, reason))
            return
        if current is None and len(self._registry) + len(self.pending) >= CONTRACTS_MAX:
            reason = f"the registry is at its limit of {CONTRACTS_MAX} contracts; unregister some"
            effects.append(SendReply(request, "Busy", AbiErrorCode.BUSY, reason))
            return
        if self._workforce.is_full:
            reason = f"the bound on workers: {self._workforce.workers_max} is reached; unregister what is not needed"
            effects.append(SendReply(request, "Busy", AbiErrorCode.BUSY, reason))
            return
        objection = _objection_to(record, self._workforce.floor)
        if hold and record.owner is not None:
            objection = "a private contract is not held: nobody else sees it"
        if objection:
            effects.append(SendReply(request, "BadRequest", AbiErrorCode.BAD_REQUEST, objection))
            return
        contract = Contract(record, request=request, hold=hold, successor_of=current)
        contract.timer = self._wheel.set(now_ns + REGISTRATION_LIMIT_NS, contract)
        self.pending[record.id] = contract
        self._workforce.request(contract, now_ns, effects)

    def restore(self, record: ContractRecord) -> str:
        """Serve a contract that was stored in another life; it is loaded when it is called.

        Returns:
            "", or why it cannot be served as it was registered.
        """
        objection = _objection_to(record, DEFAULT)
        if not objection:
            self._registry.put(record)
            self.serving[record.id] = Contract(record)
        return objection

    def load_succeeded(self, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        """A worker has loaded the contract; if that was its registration, it is served once it is stored."""
        contract.failures = 0
        contract.failure = ""
        contract.retry_ns = 0
        contract.died_loading = False
        request = contract.request
        if request is None:
            return
        contract.request = None
        if contract.hold:
            contract.holder = request.session_id
            self._set_timer(contract, now_ns + HOLD_LIMIT_NS)
            effects.append(SendReply(request))
        elif contract.record.owner is None:
            self._stop_timer(contract)
            effects.append(StoreContract(contract, request))
        else:
            self._serve(contract, now_ns, effects)
            effects.append(SendReply(request))

    def stored(self, contract: Contract, request: Request, problem: str, now_ns: int, effects: list[Effect]) -> None:
        """A contract was written to the registry's file, or could not be."""
        self.all_stored((contract,), request, problem, now_ns, effects)

    def commit(self, request: Request, ids: Sequence[int], now_ns: int, effects: list[Effect]) -> None:
        """Store contracts that are held for a host, to serve all of them or, where one is not held any more, none."""
        held = {each.record.id: each for each in self.pending.values() if each.holder == request.session_id}
        lost = next((contract_id for contract_id in ids if contract_id not in held), None)
        if lost is not None:
            reason = f"contract {format_id(lost)} is not held for this host (any longer); register it anew"
            effects.append(SendReply(request, "BadRequest", AbiErrorCode.BAD_REQUEST, reason))
            return
        chosen = tuple(held[contract_id] for contract_id in dict.fromkeys(ids))
        for contract in chosen:
            contract.holder = b""
            self._stop_timer(contract)
        effects.append(StoreContracts(chosen, request))

    def release(self, request: Request, ids: Sequence[int], now_ns: int, effects: list[Effect]) -> None:
        """Drop contracts that are held for a host, or load to be."""
        for contract_id in ids:
            contract = self.pending.get(contract_id)
            if contract is not None:
                self._release(contract, request.session_id, "its host no longer wants it", now_ns, effects)
        effects.append(SendReply(request))

    def _release(self, contract: Contract, session_id: bytes, why: str, now_ns: int, effects: list[Effect]) -> None:
        if contract.holder == session_id:
            self._drop(contract, now_ns, effects)
        elif contract.hold and contract.request is not None and contract.request.session_id == session_id:
            self._refuse(contract, contract.request, "load", why, now_ns, effects)

    def all_stored(
        self, contracts: Iterable[Contract], request: Request, problem: str, now_ns: int, effects: list[Effect]
    ) -> None:
        """Contracts were written to the registry's file in one transaction, or none of them could be."""
        for contract in contracts:
            if problem:
                self._drop(contract, now_ns, effects)
            else:
                self._serve(contract, now_ns, effects)
        failed = ("Unavailable", AbiErrorCode.UNAVAILABLE, problem) if problem else ()
        effects.append(SendReply(request, *failed))

    def _drop(self, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        """Forget a contract that has loaded and will not be served."""
        contract.holder = b""
        del self.pending[contract.record.id]
        self._retire(contract, now_ns, effects)

    def _serve(self, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        del self.pending[contract.record.id]
        self._set_timer(contract, now_ns + UNCALLED_NS)
        replaced = self._succeed(contract, now_ns, effects)
        self._registry.put(contract.record)
        self.serving[contract.record.id] = contract
        event = "contract replaced" if replaced else "contract registered"
        effects.append(Record("info", event, {"contract": contract.record.title}))

    def load_failed(
        self, contract: Contract, problem: str, reason: str, now_ns: int, effects: list[Effect]
    ) -> list[Call]:
        """A load failed: end the registration, or back off and return the calls to be failed."""
        if contract.request is not None:
            self._refuse(contract, contract.request, problem, reason, now_ns, effects)
            return []
        contract.died_loading = False
        contract.failures += 1
        contract.failure = f"the chunk gave a Lua {reason}, no function" if problem == "type" else reason
        contract.retry_ns = now_ns + backoff_ns(contract.failures)
        effects.append(Record("error", "contract does not load", {"contract": contract.record.title, "reason": reason}))
        self._workforce.withdraw(contract)
        return [] if contract.workers else contract.queue.drain()

    def staff(self, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        """Get the contract another worker where calls wait for one that it may have, after its back-off."""
        if not contract.wants_worker or contract in self._workforce.waiting:
            return
        if now_ns < contract.retry_ns:
            self._set_timer(contract, contract.retry_ns)
        else:
            self._workforce.request(contract, now_ns, effects)

    def remove(self, contract_id: int, now_ns: int, effects: list[Effect]) -> list[Call]:
        """Stop serving a contract; return its queued calls."""
        contract = self.serving.pop(contract_id, None)
        if contract is None:
            return []
        self._registry.remove(contract_id)
        calls = [call for place in contract.places for call in place.queue.drain()]
        self._retire(contract, now_ns, effects)
        effects.append(Record("info", "contract unregistered", {"contract": contract.record.title}))
        return calls

    def revive(self, contract: Contract, now_ns: int, effects: list[Effect]) -> bool:
        """End a contract's quarantine, and the wait for its next load; tell whether it rested."""
        was_resting = contract.quarantine.is_in_force or contract.retry_ns > now_ns
        fresh = Quarantine()
        for place in contract.places:
            place.quarantine = fresh
            place.note_quarantine()
            place.failures = 0
            place.retry_ns = 0
        if was_resting:
            effects.append(Record("info", "contract revived", {"contract": contract.record.title}))
        for place in contract.places:
            self.staff(place, now_ns, effects)
        return was_resting

    def host_left(self, session_id: bytes, now_ns: int, effects: list[Effect]) -> None:
        """Remove what was private to a host, registrations under way included; only it had calls there."""
        for contract in list(self.pending.values()):
            if contract.record.owner == session_id and contract.request is not None:
                self._refuse(contract, contract.request, "load", "its host is gone", now_ns, effects)
            else:
                self._release(contract, session_id, "its host is gone", now_ns, effects)
        for record in self._registry.owned_by(session_id):
            self.remove(record.id, now_ns, effects)

    def time_passed(self, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        """A registration took too long, a load may be tried again, or nobody called a new contract."""
        contract.timer = None
        if contract.request is not None:
            reason = f"no worker was ready for it within {REGISTRATION_LIMIT_NS // NS_PER_S} s"
            self._refuse(contract, contract.request, "load", reason, now_ns, effects)
            return
        if contract.holder:
            self._drop(contract, now_ns, effects)
            return
        self.staff(contract, now_ns, effects)
        if not contract.called:
            for worker in list(contract.idle):
                self._workforce.doom(worker, "nobody calls its contract", now_ns, effects)

    def _is_taken(self, record: ContractRecord, current: Contract | None, replace: bool) -> bool:
        """Whether the id cannot be had: only what the same hosts may call can be replaced."""
        if record.id in self.pending:
            return True
        return current is not None and not (replace and current.record.owner == record.owner)

    def _refuse(
        self,
        contract: Contract,
        request: Request,
        problem: str,
        reason: str,
        now_ns: int,
        effects: list[Effect],
    ) -> None:
        contract_id, title = contract.record.id, contract.record.title
        error: TypeMismatch | VmRegistrationFailed
        if problem == "type":
            error = TypeMismatch.of_lua(contract_id, reason)
        else:
            error = VmRegistrationFailed(contract_id, reason)
        effects.append(SendReply(request, type(error).__name__, AbiErrorCode.GENERIC, reason))
        effects.append(Record("warning", "contract not registered", {"contract": title, "reason": reason}))
        contract.request = None
        del self.pending[contract_id]
        self._retire(contract, now_ns, effects)

    def _succeed(self, contract: Contract, now_ns: int, effects: list[Effect]) -> bool:
        """Take over from the contract that is replaced, its queue included; tell whether there is one."""
        predecessor = contract.successor_of
        contract.successor_of = None
        if predecessor is None or predecessor.retired:
            return False
        move_calls(predecessor, contract)
        carrying.succeed(predecessor, contract)
        self._retire(predecessor, now_ns, effects)
        return True

    def _retire(self, contract: Contract, now_ns: int, effects: list[Effect]) -> None:
        """Let workers go: at once where they hold no call, else when it has ended."""
        for place in contract.places:
            place.retired = True
            place.outgoing = None
            self._workforce.forget(place, now_ns, effects)
            self._stop_timer(place)
            carrying.disinherit(place)
            for worker in list(place.workers):
                if worker.heir is not None and worker.state is IDLE:
                    carrying.ask_to_save(worker, now_ns, self._wheel, effects)
                elif worker.state not in (BUSY, WAITING, LEAVING, SAVING):
                    self._workforce.doom(worker, "its contract is no longer served", now_ns, effects)

    def _set_timer(self, contract: Contract, when_ns: int) -> None:
        self._stop_timer(contract)
        contract.timer = self._wheel.set(when_ns, contract)

    def _stop_timer(self, contract: Contract) -> None:
        if contract.timer is not None:
            self._wheel.cancel(contract.timer, contract)
            contract.timer = None


def _objection_to(record: ContractRecord, floor: str) -> str:
    settings = record.settings
    if objection := settings.confinement.objection():
        return objection
    level = settings.confinement.at_least(floor).level
    if level == UNTRUSTED and not record.is_typed:
        return f"sandbox level {level!r} is for typed contracts only: raw ones need FFI; give it an api.toml"
    if settings.workers > 1 and not settings.stateless and not record.is_typed:
        return f"workers = {settings.workers} of a raw contract needs stateless = true: its state lives in one worker"
    return ""
