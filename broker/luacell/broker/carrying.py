"""State of a singleton, carried from its old worker to the one that follows it, before that gets calls.

    old worker   IDLE, BUSY ──has ended what it holds──> SAVING ──SAVED──> DOOMED
                                                                    │ contract.state
    new worker   LOADING ──loaded──> RESTORING ── waits ────────────┴─ RESTORE ──RESTORED──> IDLE

Calls wait in the contract's queue meanwhile: as long as the old worker runs, they would have waited for it in any case;
then for the two steps, each within CARRY_LIMIT_NS. Whatever fails on the way, the new worker starts afresh and a record
says so; no call fails, and none runs in both.

`bequeath` is how it begins, whatever the reason for the new worker is: a contract that takes another's place, or a
worker that is to be recycled (then both are one contract's; where the old one is idle, `ask_to_save` at once). From
then on the old worker ends what it holds and gets no more; whoever would employ it again asks it to save, and whoever
has loaded a worker holds it back where `must_wait` says so. `Handover` and the dispatcher's events do that, and hear of
workers that are lost on the way (`Handover._part`).

It moves state between workers and contracts; it employs nobody and looks at no clock.
"""

from __future__ import annotations

from luacell.broker.model import (
    BUSY,
    IDLE,
    LEAVING,
    RESTORING,
    SAVING,
    Contract,
    Effect,
    Record,
    RestoreState,
    SaveState,
    Subject,
    Worker,
)
from luacell.broker.timers import TimerWheel
from luacell.protocol.limits import CARRY_LIMIT_NS


def bequeath(old: Worker, contract: Contract) -> None:
    """Let the next worker of a contract have an old one's state, and its calls only then; the old one gets no more."""
    if old.state is BUSY:
        old.state = LEAVING
    old.heir = contract
    contract.inherits = old
    contract.state = None


def disinherit(contract: Contract) -> None:
    """Forget what a contract was to inherit, and what its worker may be taking up."""
    if contract.inherits is not None:
        contract.inherits.heir = None
        contract.inherits = None
    contract.state = None
    for worker in contract.workers:
        worker.is_restoring = False


def succeed(predecessor: Contract, contract: Contract) -> None:
    """Let a contract inherit from the one whose place it takes: its worker's state, or what that was to have itself."""
    if not contract.restores or contract.seats or predecessor.seats:
        return
    old = predecessor.inherits
    if old is None and predecessor.state is None:
        old = next((each for each in predecessor.workers if each.saves and each.state in (IDLE, BUSY)), None)
    if old is not None:
        predecessor.inherits = None
        bequeath(old, contract)
    elif predecessor.state is not None:
        contract.state, predecessor.state = predecessor.state, None
    if must_wait(contract):
        while contract.idle:
            contract.idle.pop().state = RESTORING


def must_wait(contract: Contract) -> bool:
    """Whether a worker of the contract that has loaded gets state before it gets calls."""
    return contract.inherits is not None or contract.state is not None


def ask_to_save(old: Worker, now_ns: int, wheel: TimerWheel[Subject], effects: list[Effect]) -> None:
    """Have a worker save its state, which holds no call and gets no more."""
    assert not old.held, "its calls come first"
    contract = old.contract
    if contract is not None and old in contract.idle:
        contract.idle.remove(old)
    old.state = SAVING
    _limit(old, now_ns, wheel)
    effects.append(SaveState(old))


def hand_on(contract: Contract, now_ns: int, wheel: TimerWheel[Subject], effects: list[Effect]) -> Worker | None:
    """Give the worker that waits for state what there is; return it where there is none, for it to be employed."""
    if contract.inherits is not None:
        return None
    heir = next((each for each in contract.workers if each.state is RESTORING and not each.is_restoring), None)
    if heir is None or contract.state is None:
        return heir
    heir.is_restoring = True
    _limit(heir, now_ns, wheel)
    effects.append(RestoreState(heir, contract.state))
    return None


def _limit(worker: Worker, now_ns: int, wheel: TimerWheel[Subject]) -> None:
    if worker.timer is not None:
        wheel.cancel(worker.timer, worker)
    worker.timer = wheel.set(now_ns + CARRY_LIMIT_NS, worker)


def carried(contract: Contract, size: int) -> Record:
    """Say that a worker begins with its predecessor's state."""
    return Record("info", "state carried over", {"contract": contract.record.title, "bytes": size})


def lost(contract: Contract, reason: str) -> Record:
    """Say that a worker begins afresh though its predecessor had state."""
    return Record("warning", "state not carried over", {"contract": contract.record.title, "reason": reason})
