"""What hosts are told of calls that get no result: refusals of calls that are not accepted, and failures.

Codes, texts and numbers; whether and when a call is answered is the dispatcher's. Every text names the thing,
its value and the limit.
"""

from __future__ import annotations

from typing import Final

from luacell.broker.books import Refusal
from luacell.broker.causes import NO_VITALS, SIGKILL, UNKNOWN, Cause, Vitals
from luacell.broker.model import Call, Contract, SendFailure, Session
from luacell.broker.quarantine import CRASHES_MAX, PERIOD_NS
from luacell.broker.starts import RATE
from luacell.protocol import headers
from luacell.protocol.errors import AbiErrorCode, Began
from luacell.protocol.identity import format_id
from luacell.protocol.limits import CALLS_IN_FLIGHT_MAX, DEADLINE_MAX_US, MIB, NS_PER_S

RETRY_MIN_S: Final = 0.001
RETRY_MAX_S: Final = 60.0
RETRY_UNKNOWN_S: Final = 0.1  # where no pace foretells anything
FLAGS: Final = headers.HAS_ARGS | headers.HAS_OUT


# -- calls that are not accepted ---------------------------------------------------------------------------
def refused(session: Session, header: headers.Call, refusal: Refusal) -> SendFailure:
    """Say that a call is not accepted; its slot was never used."""
    code, message, limit, retry_after = refusal
    return SendFailure(session.id, header.call_id, code, message, slot="unused", limit=limit, retry_after=retry_after)


def unknown_contract(header: headers.Call) -> Refusal:
    """No such contract is served, or not to this host."""
    text = f"host contract not found: contract_id={format_id(header.contract_id)}"
    return Refusal(AbiErrorCode.HOST_CONTRACT_NOT_FOUND, text)


def malformed(session: Session, header: headers.Call) -> Refusal | None:
    """Return what is wrong with a call's own numbers, or None."""
    bad = AbiErrorCode.BAD_REQUEST
    if header.call_id in session.calls or header.call_id == 0:
        return Refusal(bad, f"call id {header.call_id} is 0 or in flight")
    if header.budget_us > DEADLINE_MAX_US:
        return Refusal(bad, f"budget {header.budget_us} us is over {DEADLINE_MAX_US} us")
    if not are_flags_right(header):
        text = f"flags {header.flags:#x} are outside {FLAGS:#x}, or a size is given for an absent buffer"
        return Refusal(bad, text)
    return None


def are_flags_right(header: headers.Call) -> bool:
    """Whether the flags are known, and sizes are given only for buffers that are there."""
    flags = header.flags
    return not (
        flags & ~FLAGS
        or (header.args_size and not flags & headers.HAS_ARGS)
        or (header.out_size and not flags & headers.HAS_OUT)
    )


def over_bound(session: Session, contract: Contract, in_flight: int, owner: object) -> Refusal | None:
    """Return which bound one more call would exceed, or None.

    A full queue takes one where another host's can be displaced for it.

    Args:
        session: that calls.
        contract: that it calls.
        in_flight: its calls to this contract that are in flight, as far as that may matter.
        owner: as what its call would queue.
    """
    busy, title, retry_after = AbiErrorCode.BUSY, contract.record.title, _pace_of(contract)
    if len(session.calls) >= CALLS_IN_FLIGHT_MAX:
        limit = f"calls in flight per host: {CALLS_IN_FLIGHT_MAX}"
        text = f"the bound on {limit} is reached; retry when one has ended, in about {retry_after:.3g} s"
        return Refusal(busy, text, limit, retry_after)
    if in_flight >= contract.in_flight_max:
        limit = f"calls in flight per host for this contract: {contract.in_flight_max}"
        text = f"{title}: the bound on {limit} is reached; retry when one has ended, in about {retry_after:.3g} s"
        return Refusal(busy, text, limit, retry_after)
    if contract.queue.is_full and contract.queue.displaceable(owner) is None:
        limit, retry_after = _queue_limit(contract), _queue_wait(contract)
        text = f"{title}: the bound on {limit} is reached; retry later, in about {retry_after:.3g} s"
        return Refusal(busy, text, limit, retry_after)
    return None


def _queue_limit(contract: Contract) -> str:
    return f"calls queued for a contract: {contract.queue.bound}"


def _pace_of(contract: Contract) -> float:
    """Return in what time a call of the contract ends, in seconds, as far as its pace foretells."""
    if not contract.pace_ns:
        return RETRY_UNKNOWN_S
    return _bounded(contract.pace_ns / NS_PER_S / max(1, len(contract.workers)))


def _queue_wait(contract: Contract) -> float:
    """Return in what time half of a contract's queue has gone, in seconds, as far as its pace foretells."""
    if not contract.pace_ns:
        return RETRY_UNKNOWN_S
    return _bounded(_pace_of(contract) * len(contract.queue) / 2)


def _bounded(seconds: float) -> float:
    return min(max(round(seconds, 3), RETRY_MIN_S), RETRY_MAX_S)


def resting(contract: Contract, wait_ns: int) -> Refusal:
    """A contract is in quarantine, for this host or for all."""
    retry_after = _bounded(wait_ns / NS_PER_S)
    return Refusal(AbiErrorCode.QUARANTINED, _resting(contract.record.title, contract, retry_after), "", retry_after)


def _resting(title: str, contract: Contract, retry_after: float) -> str:
    if contract.quarantine.whole is not None:
        why = "for all hosts, calls of several have crashed it"
    else:
        why = f"for this host, its calls crashed {CRASHES_MAX} times within {PERIOD_NS // NS_PER_S} s"
    return (
        f"{title}: quarantined {why}; "
        f"retry in {retry_after:.3g} s, or mend it: `luacell revive {contract.record.title}` ends this"
    )


def no_worker(contract: Contract, workers_max: int) -> Refusal:
    """There is no worker for a contract, and there are as many as there may be."""
    limit = f"workers: {workers_max}"
    text = f"{contract.record.title}: the bound on {limit} is reached; retry later, unregister what is not needed"
    return Refusal(AbiErrorCode.BUSY, text, limit, RETRY_UNKNOWN_S)


def starts_wait(contract: Contract, wait_ns: int) -> Refusal:
    """A contract's queue is full, and its worker waits for its turn to be started: many have crashed."""
    limit, retry_after = f"worker starts: {RATE} a second", _bounded(wait_ns / NS_PER_S)
    text = (
        f"{contract.record.title}: the bound on {limit} is reached, over all contracts, and with it "
        f"{_queue_limit(contract)}; retry in about {retry_after:.3g} s"
    )
    return Refusal(AbiErrorCode.BUSY, text, limit, retry_after)


def shutting_down(header: headers.Call) -> Refusal:
    """The broker finishes what it has and takes nothing new."""
    return Refusal(AbiErrorCode.UNAVAILABLE, f"call {header.call_id} comes too late: the broker is shutting down")


def nobody_waits(header: headers.Call) -> Refusal:
    """A contract calls another while nobody waits for its own answer any more."""
    text = "the call that this one is made for is over: it was cancelled, is past its deadline, or its host is gone"
    return Refusal(AbiErrorCode.CANCELLED, text)


def waits_already(header: headers.Call) -> Refusal:
    """A worker has made a call and makes another."""
    return Refusal(AbiErrorCode.BAD_REQUEST, f"call {header.call_id}: this worker waits for another one already")


def too_deep(outer: Call, depth_max: int) -> Refusal:
    """A chain of calls is as long as it may be."""
    limit = f"depth of nested calls: {depth_max}"
    text = f"{outer.title}: the bound on {limit} is reached; calls that wait for one another must end somewhere"
    return Refusal(AbiErrorCode.TOO_LARGE, text, limit)


# -- calls that got no result ------------------------------------------------------------------------------
def load_failure(session_id: bytes, header: headers.Call, contract: Contract, now_ns: int, slot: str) -> SendFailure:
    """Say that a registered contract no longer loads; the call was not begun."""
    ids = f"contract_id={format_id(contract.record.id)} fn_id={header.fn_id}"
    text = f"VM dispatch failed for {ids}: {contract.failure}"
    code = AbiErrorCode.HOST_CONTRACT_CALL_FAILED
    retry_after = _bounded((contract.retry_ns - now_ns) / NS_PER_S)
    return SendFailure(
        session_id, header.call_id, code, text, kind="ContractLoadFailed", slot=slot, retry_after=retry_after
    )


def unregistered(call: Call) -> SendFailure:
    """Say that a queued call's contract is gone."""
    contract_id = format_id(call.header.contract_id)
    text = f"host contract not found: contract_id={contract_id} (unregistered meanwhile)"
    return SendFailure(call.session.id, call.header.call_id, AbiErrorCode.HOST_CONTRACT_NOT_FOUND, text)


def displaced(call: Call, now_ns: int) -> SendFailure:
    """Say that a queued call has made room for one of a host that has fewer of them."""
    limit, retry_after = _queue_limit(call.contract), _queue_wait(call.contract)
    text = (
        f"{call.title}: the bound on {limit} is reached, and other hosts have fewer of them; "
        f"retry later, in about {retry_after:.3g} s"
    )
    return _failure(call, AbiErrorCode.BUSY, text, "no", now_ns, limit=limit)._replace(retry_after=retry_after)


def quarantined(call: Call, wait_ns: int, now_ns: int) -> SendFailure:
    """Say that a call which waited has to rest with its contract."""
    retry_after = _bounded(wait_ns / NS_PER_S)
    text = _resting(call.title, call.contract, retry_after)
    return _failure(call, AbiErrorCode.QUARANTINED, text, "no", now_ns)._replace(retry_after=retry_after)


def reentrant(call: Call, chain: list[Call], now_ns: int) -> SendFailure:
    """Say that a call would wait, over others, for itself."""
    way = " -> ".join(each.title for each in chain)
    text = f"{call.title}: it would wait for itself ({way}); only a contract with stateless = true is called this way"
    return _failure(call, AbiErrorCode.REENTRANT_CALL, text, "no", now_ns)


def no_worker_for_chain(call: Call, workers_max: int, now_ns: int) -> SendFailure:
    """Say that a call would wait for itself, and that there are too many workers for it to have one of its own."""
    refusal = no_worker(call.contract, workers_max)
    failure = _failure(call, refusal.code, f"{refusal.message}; call: {call.title}", "no", now_ns, limit=refusal.limit)
    return failure._replace(retry_after=refusal.retry_after)


def cancelled(call: Call, began: Began, now_ns: int, *, by: str = "its caller", slot: str = "free") -> SendFailure:
    """Say that a call was ended by its caller, or by a broker that shuts down."""
    text = f"{call.title}: cancelled by {by}"
    return _failure(call, AbiErrorCode.CANCELLED, text, began, now_ns, slot=slot)


def deadline_exceeded(
    call: Call,
    began: Began,
    now_ns: int,
    *,
    limit: str = "",
    slot: str = "free",
    cpu: float | None = None,
    vitals: Vitals = NO_VITALS,
) -> SendFailure:
    """Say that a call was not finished in time: by its deadline, or by the limit that is named.

    `now_ns` is when it was due; `cpu` are the seconds of CPU time that it has taken, where that is known, `vitals` what
    its worker's process was doing.
    """
    bound = limit or f"deadline {(call.deadline_ns - call.arrived_ns) / NS_PER_S:g} s"
    failure = _failure(call, AbiErrorCode.DEADLINE_EXCEEDED, "", began, now_ns, slot=slot, limit=bound)
    if began == "no":
        parts = [f"it was not begun, queued {_seconds(failure.queued)}"]
    else:
        parts = [f"queued {_seconds(failure.queued)}", f"ran {_seconds(failure.ran)}"]
    if cpu is not None:
        parts.append(f"{_seconds(cpu)} of CPU")
    if vitals.state:
        parts.append(f"state {vitals.state}" + (f" in {vitals.wchan}" if vitals.wchan else ""))
    text = f"{call.title}: not finished within its {bound}: {', '.join(parts)}"
    return failure._replace(message=text, cpu=cpu, state=vitals.state, wchan=vitals.wchan)


def _seconds(duration: float | None) -> str:
    return f"{round(duration or 0, 3):g} s"


def stopped_by_timer(call: Call, began: Began, now_ns: int, cpu: float | None = None) -> SendFailure:
    """Say that the interval timer of the worker's process ended it: ours, or one that the contract has set."""
    text = f"{call.title}: the worker was ended by its own interval timer, {_at_which(began)}"
    limit = "the worker's own timer"
    return _failure(call, AbiErrorCode.DEADLINE_EXCEEDED, text, began, now_ns, limit=limit)._replace(cpu=cpu)


def _at_which(began: Began) -> str:
    return "while running the call" if began == "yes" else "before it began the call"


def out_of_memory(call: Call, now_ns: int, *, in_process: bool = False, slot: str = "free") -> SendFailure:
    """Say that a call ran into a limit of its contract's memory: the process's, with what C took, or the Lua heap's."""
    settings = call.contract.record.settings
    bound, key = f"memory {settings.memory / MIB:g} MiB", "memory"
    if in_process:
        bound, key = f"process memory {settings.process_memory / MIB:g} MiB", "max_rss"
    text = f"{call.title}: used more than its {bound}; its state is lost, raise `{key}` if it needs more"
    return _failure(call, AbiErrorCode.OUT_OF_MEMORY, text, "yes", now_ns, slot=slot, limit=bound)


def crashed(call: Call, cause: Cause, verdict: str, began: Began, now_ns: int, cpu: float | None = None) -> SendFailure:
    """Say that the worker which held a call died; `verdict` is why this broker killed it, or ""."""
    where = _at_which(began) + ("" if began == "yes" else ", twice")
    why = f" (killed: {verdict})" if verdict and (cause.signal == SIGKILL or cause == UNKNOWN) else ""
    text = f"{call.title}: the worker died with {cause} {where}{why}"
    return _failure(call, AbiErrorCode.WORKER_CRASHED, text, began, now_ns, cause=cause)._replace(cpu=cpu)


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
    sent_ns = now_ns if began == "no" else call.sent_ns or now_ns
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
