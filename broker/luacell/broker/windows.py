"""The window: how many calls a busy worker may hold that it has not begun, and which worker gets the next one.

One call at a time, answered before the next is sent, leaves a worker idle for two messages' time a call. Calls handed
ahead keep it busy; but behind a slow one they wait where no other worker can take them. So the window is a span of
time, turned into a number by the pace at which the contract's workers answer.

It looks at workers and measures their pace; it hands nothing over.
"""

from __future__ import annotations

from typing import Final

from luacell.broker.model import BUSY, Contract, Worker
from luacell.protocol.limits import NS_PER_MS

WINDOW_MAX: Final = 32  # calls
WINDOW_NS: Final = 5 * NS_PER_MS  # of work handed ahead, as far as the pace foretells
SLOW_NS: Final = 10 * NS_PER_MS  # behind a call that has run for longer, one may wait
REFILL_AT: Final = 16  # calls left ahead at which a worker gets more, as many at once as its window has room for
PACE_CALLS_MIN: Final = 8  # answers that make a pace


def worker_with_room(contract: Contract, now_ns: int) -> Worker | None:
    """Return the busy worker of a contract that holds the fewest calls ahead, if one more may go to it now."""
    chosen = None
    fewest = min(REFILL_AT, contract.window)
    for worker in contract.workers:
        head = worker.call
        if worker.state is BUSY and head is not None:
            count = len(worker.ahead) + len(worker.finished)
            if count < fewest and (not count or now_ns - head.sent_ns <= SLOW_NS):
                chosen, fewest = worker, count
    return chosen


def room_of(worker: Worker, contract: Contract, now_ns: int) -> int:
    """Return how many more calls a worker may be handed ahead; 0 while it has enough."""
    head, count = worker.call, len(worker.ahead) + len(worker.finished)
    if worker.state is not BUSY or head is None or count > REFILL_AT:
        return 0
    window = contract.window if now_ns - head.sent_ns <= SLOW_NS else 1
    return max(0, window - count)


def measure(worker: Worker, contract: Contract, now_ns: int) -> None:
    """Learn from a worker that has been busy since the last time how large its contract's window should be."""
    count = worker.served - worker.paced_served
    if worker.paced_ns and count < PACE_CALLS_MIN:
        return
    if worker.paced_ns:
        pace_ns = contract.pace_ns = max(1, (now_ns - worker.paced_ns) // count)
        contract.window = max(1, min(WINDOW_MAX, WINDOW_NS // pace_ns))
    worker.paced_ns, worker.paced_served = now_ns, worker.served
