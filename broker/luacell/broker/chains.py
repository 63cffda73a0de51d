"""Chains: calls that contracts make while they run one, who waits for whom, and which of that would never end.

A worker that calls another contract waits, and serves nobody meanwhile. So a queued call waits for any one worker of
its contract, and that worker perhaps for the call that it has made, and so on:

    call ──queued──> contract ──any of──> worker ──waits for──> call ──held by──> worker ──> …

As long as every queued call leads to a worker that runs, or that is yet to come, everything ends by itself. Each nested
call is checked when it comes: it alone can cut others off. So nothing that is queued ever has to be looked at again but
when a worker dies.

Questions about calls and workers; the dispatcher acts.
"""

from __future__ import annotations

from typing import Final

from luacell.broker import answers
from luacell.broker.books import Refusal
from luacell.broker.model import HELD, Call, Contract, Session, Worker
from luacell.protocol import headers

DEPTH_MAX: Final = 16  # calls that wait for one another; each holds a worker, and a chain this long is a mistake


def host_of(session: Session) -> Session:
    """Return the session of the host for which a session makes calls now: itself, or that of the chain."""
    call = session.worker.call if session.worker is not None else None
    return session if call is None else call.host


def objection_to(session: Session, header: headers.Call) -> Refusal | None:
    """Return why a worker may not make a call now, or None."""
    worker = session.worker
    assert worker is not None
    outer = worker.call
    if outer is None or outer.answered:
        return answers.nobody_waits(header)
    if worker.inner is not None:
        return answers.waits_already(header)
    if outer.depth >= DEPTH_MAX:
        return answers.too_deep(outer, DEPTH_MAX)
    return None


def can_progress(contract: Contract, *, can_grow: bool) -> bool:
    """Whether a call that is queued for a contract will be served, as far as it depends on who waits for whom.

    Args:
        contract: it waits for a worker of this one.
        can_grow: whether there can be another worker at all.
    """
    seen: set[Contract] = set()
    contracts = [contract]
    while contracts:
        contract = contracts.pop()
        if contract in seen:
            continue
        seen.add(contract)
        heirs_wait_for = contract.inherits
        if can_grow and contract.may_have_more_workers and heirs_wait_for is None:
            return True
        for worker in contract.workers if heirs_wait_for is None else (heirs_wait_for,):
            queued = _end_of_waiting(worker)
            if queued is None:
                return True
            contracts.append(queued.contract)
    return False


def _end_of_waiting(worker: Worker) -> Call | None:
    """Return the queued call that a worker waits for, over other workers where need be; None where one of them runs."""
    while worker.inner is not None:
        call = worker.inner
        if call.state is not HELD or call.worker is None:
            return call
        worker = call.worker
    return None


def chain_of(call: Call) -> list[Call]:
    """Return a call and those that wait for it, the host's first."""
    chain = [call]
    while chain[-1].parent is not None:
        chain.append(chain[-1].parent)
    return chain[::-1]
