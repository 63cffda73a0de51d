"""Recycling: a worker that has served its calls, or holds too much memory, is followed by one that starts first.

    worn worker   BUSY ──RECYCLE──> serves on ────────────┬── ends what it holds ──> DOOMED (with state: by SAVING)
    successor         ordered ──> LOADING ──loaded────────┘ ──> IDLE                 (with state: by RESTORING)

The worker itself says that it is worn (RECYCLE in DONE): it counts its calls and sees its memory. One worker of a
contract, or of a seat, is recycled at a time, which gives it a worker more meanwhile; the others say so again. Whatever
becomes of the successor, the worn worker serves until one has loaded, and no call fails. A singleton's state goes the
way of `carrying`.

It decides who follows whom; it employs and kills nobody and looks at no clock.
"""

from __future__ import annotations

from typing import Final

from luacell.broker import carrying
from luacell.broker.model import BUSY, IDLE, LEAVING, WAITING, Contract, Effect, Record, Worker
from luacell.protocol.limits import RSS_HARD_FACTOR

VERDICT: Final = "it was recycled"
WORN_OUT: Final = f"its memory is at {RSS_HARD_FACTOR} times max_rss, and no other worker has followed it"


def can_begin(worker: Worker) -> bool:
    """Whether a worker that is worn serves a contract for good, none of whose workers is being recycled yet."""
    contract = worker.contract
    if contract is None or contract.retired or contract.outgoing is not None or carrying.must_wait(contract):
        return False
    return worker.state in (IDLE, BUSY, WAITING) and worker.heir is None


def relieve(contract: Contract, effects: list[Effect]) -> Worker | None:
    """A worker of the contract has loaded: let it follow the worn one, if there is one.

    That gets no more calls from now on, and is none of the contract's workers any more.

    Returns:
        The worn worker where it is idle: it is to save its state where it has an heir now, else to be dismissed.
    """
    old, contract.outgoing = contract.outgoing, None
    if old is None:
        return None
    is_idle = old.state is IDLE
    if not is_idle:
        old.state = LEAVING
    old.is_followed = True
    del contract.workers[old]
    if is_idle:
        contract.idle.remove(old)
    effects.append(_recycled(old, contract))
    if old.saves and contract.restores:
        carrying.bequeath(old, contract)
    elif not contract.record.settings.stateless:
        reason = "its worker was recycled, and it has no save() and restore()"
        effects.append(carrying.lost(contract, reason))
    return old if is_idle else None


def no_room(worker: Worker, contract: Contract, workers_max: int) -> Record:
    """Say that a worn worker has to serve on."""
    fields = {"contract": contract.record.title, "worker": worker.id, "reason": f"workers: {workers_max} are there"}
    return Record("warning", "worker not recycled", fields)


def _recycled(worker: Worker, contract: Contract) -> Record:
    max_calls = contract.record.settings.max_calls
    limit = f"max_calls {max_calls}" if 0 < max_calls <= worker.served else "max_rss"
    fields = {"contract": contract.record.title, "worker": worker.id, "served": worker.served, "limit": limit}
    return Record("info", "worker recycled", fields)
