"""What a broker tells people of its state: counts, workers, the pools that serve contracts, memory, deaths.

It looks and changes nothing. Lists are bounded, as messages are.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from luacell.broker.books import Books
from luacell.broker.dispatcher import Dispatcher
from luacell.broker.model import Contract, WorkerState
from luacell.broker.quarantine import Rest
from luacell.protocol.limits import NS_PER_S

POOLS_MAX: Final = 200  # contracts shown; those with most to do come first


def snapshot(dispatcher: Dispatcher, books: Books, now_ns: int) -> dict[str, Any]:
    """Return counts and states: workers, pools, calls, slots, memory, deaths by cause."""
    force, serving = dispatcher.workforce, dispatcher.catalogue.serving
    kept = sum(call.answered for session in dispatcher.sessions.values() for call in session.calls.values())
    return {
        "state": "draining" if dispatcher.is_draining else "serving",
        "hosts": len(dispatcher.sessions),
        "contracts": sum(contract.owner is None for contract in serving.values()),
        "worker_host": force.has_host,
        "workers": [
            {
                "id": worker.id,
                "pid": worker.pid,
                "state": worker.state.value,
                "contract": worker.contract.record.title if worker.contract else None,
                "sandbox": worker.confinement.level,
                "served": worker.served,
            }
            for worker in force.by_id.values()
        ],
        "spares": len(force.blank),
        "spares_wanted": force.spares_wanted,
        "pools": _pools(list(serving.values())),
        "queued": sum(place.queue.count for contract in serving.values() for place in contract.places),
        "slots_in_flight": books.slots_in_flight,
        "slots": {"free": len(books.slots) - books.slots_in_flight, "held": books.slots_in_flight - kept, "kept": kept},
        "memory_bytes": books.total_bytes,
        "answered": dispatcher.answered_count,
        "deaths": dict(force.deaths),
        "quarantined": _quarantined(list(serving.values()), now_ns),
        "posture": {
            "level": force.floor,
            "layers": [layer.name for layer in force.posture.get(force.floor, ()) if layer.in_force],
        },
        "sandbox": [
            {"level": level, "layer": layer.name, "in_force": layer.in_force, "detail": layer.detail}
            for level, layers in sorted(force.posture.items())
            for layer in layers
        ],
    }


def _pools(contracts: list[Contract]) -> list[dict[str, Any]]:
    """Return how the contracts are served that have a worker, or wait for one."""
    pools = [_pool(contract) for contract in contracts if any(p.workers or p.queue.count for p in contract.places)]
    pools.sort(key=lambda pool: (-pool["queued"], -pool["workers"], pool["contract"]))
    return pools[:POOLS_MAX]


def _quarantined(contracts: list[Contract], now_ns: int) -> list[dict[str, Any]]:
    """Return which contracts rest, for whom, and for how long yet; the longest first."""
    rows = []
    for contract in contracts:
        quarantine, title = contract.quarantine, contract.record.title
        if quarantine.whole is not None:
            rows.append(_rest(title, None, quarantine.whole, now_ns))
        rows += [_rest(title, host.hex(), rest, now_ns) for host, rest in quarantine.hosts.items()]
        if contract.retry_ns > now_ns:
            wait_s = (contract.retry_ns - now_ns) / NS_PER_S
            rows.append({"contract": title, "host": None, "why": "does not load", "retry_after_s": round(wait_s, 3)})
    rows.sort(key=lambda row: row["retry_after_s"], reverse=True)
    return rows[:POOLS_MAX]


def _rest(title: str, host: str | None, rest: Rest, now_ns: int) -> dict[str, Any]:
    why = "trying" if rest.is_trying else "crashes"
    return {
        "contract": title,
        "host": host,
        "why": why,
        "retry_after_s": round(max(0, rest.until_ns - now_ns) / NS_PER_S, 3),
    }


def _pool(contract: Contract) -> dict[str, Any]:
    workers = [worker for place in contract.places for worker in place.workers]
    states = Counter(worker.state for worker in workers)
    return {
        "contract": contract.record.title,
        "workers_max": contract.record.settings.workers,
        "workers": len(workers),
        "idle": states[WorkerState.IDLE],
        "busy": states[WorkerState.BUSY] + states[WorkerState.WAITING] + states[WorkerState.LEAVING],
        "loading": states[WorkerState.LOADING],
        "ahead": sum(len(worker.ahead) for worker in workers),
        "queued": sum(place.queue.count for place in contract.places),
        "window": contract.window,
    }
