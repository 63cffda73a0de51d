"""The ways in which the demo lets workers die: which is due, how it is brought about, what answer it must have."""

import collections
import enum
import os
import select
import signal
import threading
import time
from collections.abc import Mapping
from typing import Protocol

from luacell.cli.demo.counting import CONTRACT, DEREFERENCE_NULL, EXIT, LOOP
from luacell.client import Busy, CallError, DeadlineExceeded, Quarantined, Unavailable, WorkerCrashed

FILES_PER_FAULT = 40  # ~1,800 files: ~45 faults
LOOP_TIMEOUT_S = 0.25
# A contract that crashes five times in 30 s is quarantined. The demo shows recovery, so it stays below;
# then it kills workers from outside instead, which is not held against the contract.
OWN_CRASHES_MAX = 4
OWN_CRASHES_WINDOW_S = 30.0
KILL_ATTEMPTS_MAX = 20
KILL_PAUSE_S = 0.01
KILL_WAIT_S = 1.0


class Bridge(Protocol):
    """What the callers need of a `LuaHostBridge`."""

    def call(
        self, contract: str, fn_id: int, args: bytes = b"", out_size: int = 0, *, timeout: float | None = None
    ) -> bytes:
        """Return what the contract wrote, or raise a CallError; `timeout` in seconds."""

    def health(self) -> Mapping[str, object]:
        """Return, among others, "workers": a list of dicts with "pid", "contract" and "state"."""


class Fault(enum.Enum):
    """A way in which a worker dies; the value is what the report calls it."""

    NULL = "null dereference"
    EXIT = "os.exit(0)"
    LOOP = "endless loop"
    KILL = "kill -9 from outside"


INJECTIONS: dict[Fault, tuple[int, float | None]] = {  # the function, and the timeout in seconds
    Fault.NULL: (DEREFERENCE_NULL, None),
    Fault.EXIT: (EXIT, None),
    Fault.LOOP: (LOOP, LOOP_TIMEOUT_S),
}


def has_blamed(fault: Fault, error: CallError) -> bool:
    """Is this the answer that the fault must have?"""
    match error:
        case WorkerCrashed() if fault is Fault.NULL:
            return error.signal == signal.SIGSEGV
        case WorkerCrashed() if fault is Fault.EXIT:
            return error.exit_code == 0
        case DeadlineExceeded():
            return fault is Fault.LOOP and error.began != "no"
    return False


def was_killed_from_outside(error: CallError) -> bool:
    """Is this the answer of a call whose worker somebody killed?"""
    return isinstance(error, WorkerCrashed) and error.signal == signal.SIGKILL


def is_refusal(error: CallError) -> bool:
    """Is this an answer that says "not now"?"""
    return isinstance(error, Busy | Quarantined | Unavailable | DeadlineExceeded)


def is_passing(error: CallError) -> bool:
    """Is this an answer after which the same call may well succeed?"""
    return was_killed_from_outside(error) or is_refusal(error)


class FaultPlan:
    """Decides which file comes with a fault, and with which; safe from any thread."""

    def __init__(self, files_count: int) -> None:
        # A short run sees each kind twice, too.
        self._files_per_fault = max(2, min(FILES_PER_FAULT, files_count // (2 * len(Fault))))
        self._lock = threading.Lock()
        self._own_crashes: collections.deque[float] = collections.deque(maxlen=OWN_CRASHES_MAX)

    def due(self, index: int, now: float) -> Fault | None:
        """Return the fault that goes before a file.

        Args:
            index: The file's, from 0.
            now: Seconds, monotonic.
        """
        turn, is_between = divmod(index + 1, self._files_per_fault)
        if is_between:
            return None
        fault = list(Fault)[(turn - 1) % len(Fault)]
        if fault in (Fault.NULL, Fault.EXIT) and not self._may_crash(now):
            return Fault.KILL
        return fault

    def _may_crash(self, now: float) -> bool:
        with self._lock:
            spent = len(self._own_crashes) == OWN_CRASHES_MAX
            if spent and now - self._own_crashes[0] < OWN_CRASHES_WINDOW_S:
                return False
            self._own_crashes.append(now)
            return True


def worker_pids(bridge: Bridge) -> list[int]:
    """Return the process ids of the demo's own workers, those at work first."""
    workers = bridge.health().get("workers")
    if not isinstance(workers, list):
        return []
    own = [worker for worker in workers if worker.get("contract") == CONTRACT]
    own.sort(key=lambda worker: worker.get("state") != "busy")
    return [pid for worker in own if isinstance(pid := worker.get("pid"), int)]


def kill_worker(bridge: Bridge) -> bool:
    """Kill one of the demo's own workers with SIGKILL, as an operator or the kernel might.

    Returns:
        Whether one has died of it.
    """
    for _ in range(KILL_ATTEMPTS_MAX):
        if any(kill_listed(bridge, pid) for pid in worker_pids(bridge)):
            return True
        time.sleep(KILL_PAUSE_S)  # a fresh worker may be on its way
    return False


def kill_listed(bridge: Bridge, pid: int) -> bool:
    """Kill a worker unless it is dead already or another process has its number by now."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Listed still, now that the descriptor holds the process: so it is no stranger with a reused number.
        if has_ended(descriptor, within_s=0) or pid not in worker_pids(bridge):
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return has_ended(descriptor, within_s=KILL_WAIT_S)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)


def has_ended(descriptor: int, *, within_s: float) -> bool:
    """Has the process of a pidfd ended, or does it within that time?"""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(within_s * 1000))
