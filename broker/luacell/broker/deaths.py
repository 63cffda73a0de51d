"""What is told of a worker's death: of the process, and of the call that it was running.

Words and numbers for the records that people read, and which deaths are to be remembered with all that makes the call
again; what a death means for the calls is the dispatcher's.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from luacell.broker.causes import FROM_OUTSIDE, SIGALRM, Cause, Vitals
from luacell.broker.model import DOOMED, Call, Record, RecordCrash, Worker
from luacell.protocol.errors import AbiErrorCode, Began
from luacell.protocol.limits import MIB, NS_PER_S, US_PER_S
from luacell.protocol.slots import Answer

DIGITS: Final = 6  # of seconds behind the point: microseconds


class Episode(NamedTuple):
    """A call in the hands of the worker that ended with it.

    Attributes:
        call: the one that the worker was running.
        began: whether its contract was entered.
        queued: seconds from its arrival until its worker was free to begin it.
        ran: seconds from then on.
        cpu: seconds of CPU time that it took, or None.
    """

    call: Call
    began: Began
    queued: float
    ran: float
    cpu: float | None


def episode_of(call: Call, seen: Answer, vitals: Vitals, now_ns: int) -> Episode:
    """Return what is known of a call whose worker is dead, or will not be used again."""
    sent_ns = call.sent_ns or now_ns
    began: Began = "yes" if seen.begun == call.sequence else "no"
    queued, ran = (sent_ns - call.arrived_ns) / NS_PER_S, (now_ns - sent_ns) / NS_PER_S
    return Episode(call, began, queued, ran, cpu_of(seen, vitals) if began == "yes" else None)


def cpu_of(seen: Answer, vitals: Vitals) -> float | None:
    """Return the seconds of CPU time since a call began; what the slot says of that is the contract's to forge."""
    if vitals.cpu_us is None or seen.cpu_us > vitals.cpu_us:
        return None
    return (vitals.cpu_us - seen.cpu_us) / US_PER_S


def death_record(worker: Worker, cause: Cause, episode: Episode | None) -> Record:
    """Return the record of a death.

    Args:
        worker: as it was before it was known to be dead.
        cause: how it ended.
        episode: the call that it was running, if any.
    """
    vitals = cause.vitals
    fields: dict[str, Any] = {
        "worker": worker.id,
        "pid": worker.pid,
        "contract": worker.contract.record.title if worker.contract else None,
        "state": worker.state.value,
        "cause": str(cause),
        "verdict": worker.verdict,
        "served": worker.served,
    }
    if episode is not None:
        fields |= _told(episode)
    told = {
        "process_cpu": None if vitals.cpu_us is None else vitals.cpu_us / US_PER_S,
        "memory": vitals.memory,
        "process_state": vitals.state or None,
        "wchan": vitals.wchan or None,
        "stderr": cause.last_words or None,
    }
    fields |= {name: value for name, value in told.items() if value is not None}
    return Record("info" if worker.state is DOOMED else "warning", "worker died", fields)


def _told(episode: Episode) -> dict[str, Any]:
    call = episode.call
    told = {
        "function": call.header.fn_id,
        "call": call.header.call_id,
        "host": call.host.title,
        "began": episode.began,
        "queued": round(episode.queued, DIGITS),
        "ran": round(episode.ran, DIGITS),
    }
    return told if episode.cpu is None else told | {"cpu": episode.cpu}


def crash_of(episode: Episode, cause: Cause, verdict: str) -> RecordCrash | None:
    """Return what is to be remembered of a call that its worker died of, or None.

    That is nothing where its host no longer waited for it, where it is private to a host, and where the worker had to
    go with its worker host.

    Args:
        episode: of a call that had begun.
        cause: how the worker ended.
        verdict: why this broker has killed it, or "".
    """
    call = episode.call
    if call.contract.owner is not None or (call.answered and not call.is_overdue) or verdict in FROM_OUTSIDE:
        return None
    is_late = call.is_overdue or cause.signal == SIGALRM
    code = AbiErrorCode.DEADLINE_EXCEEDED if is_late else AbiErrorCode.WORKER_CRASHED
    return RecordCrash(
        call,
        code,
        f"{cause} (killed: {verdict})" if verdict else str(cause),
        cause.signal,
        cause.exit_code,
        episode.queued,
        episode.ran,
        episode.cpu,
        cause.last_words,
    )


def exhaustion_of(call: Call, now_ns: int, *, in_process: bool = False) -> RecordCrash | None:
    """Return what is to be remembered of a call that has used up its contract's memory, or None; see `crash_of`.

    Args:
        call: it.
        now_ns: when its worker said so.
        in_process: it was its process's, not that of its Lua heap.
    """
    if call.contract.owner is not None:
        return None
    settings = call.contract.record.settings
    size = settings.process_memory if in_process else settings.memory
    code, cause = (
        AbiErrorCode.OUT_OF_MEMORY,
        f"out of memory: {size / MIB:g} MiB{' in its process' if in_process else ''}",
    )
    sent_ns = call.sent_ns or now_ns
    queued, ran = (sent_ns - call.arrived_ns) / NS_PER_S, (now_ns - sent_ns) / NS_PER_S
    return RecordCrash(call, code, cause, None, None, queued, ran, None, None)
