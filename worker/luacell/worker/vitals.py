"""What a worker's process is doing, as the kernel tells its parent: CPU time, state, wait channel, memory.

It reads and decides nothing. What the kernel does not tell (another kernel, a /proc that hides processes, no right to
see where a process waits) is left out; nothing here raises. A look costs two small files, about 60 us.
"""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from luacell.protocol.limits import KIB, NS_PER_US
from luacell.protocol.messages import PROCESS_STATE_MAX, WAIT_CHANNEL_MAX

_READ_MAX: Final = 4096  # bytes; a status has about 1,500
_CPUCLOCK_SCHED: Final = 2  # of the kernel's posix-timers.h: a process's CPU time as a clock


class Vitals(NamedTuple):
    """What a process is doing.

    Attributes:
        cpu_us: CPU time of its life so far, all threads together, or None.
        memory: bytes of resident memory, or None.
        state: as proc_pid_status(5) has it, such as "R (running)", or "".
        wchan: the kernel's function in which its main thread waits, or "".
    """

    cpu_us: int | None
    memory: int | None
    state: str
    wchan: str


def read_vitals(pid: int) -> Vitals:
    """Look at a child that was not reaped, so that its pid is its own."""
    status = _read(f"/proc/{pid}/status")
    resident = _value(status, "VmRSS:").partition(" ")[0]
    wchan = _read(f"/proc/{pid}/wchan")
    return Vitals(
        _cpu_us(pid),
        int(resident) * KIB if resident.isdecimal() else None,
        _value(status, "State:")[:PROCESS_STATE_MAX],
        "" if wchan == "0" else wchan[:WAIT_CHANNEL_MAX],
    )


def _cpu_us(pid: int) -> int | None:
    """Return a process's CPU time; its clock's number is made as clock_getcpuclockid(3) makes it."""
    try:
        return time.clock_gettime_ns(~pid << 3 | _CPUCLOCK_SCHED) // NS_PER_US
    except OSError:
        return None


def _value(status: str, name: str) -> str:
    """Return what stands behind a name in /proc/PID/status, or ""."""
    for line in status.splitlines():
        if line.startswith(name):
            return line.removeprefix(name).strip()
    return ""


def _read(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            return (file.read(_READ_MAX) or b"").decode("utf-8", "replace")
    except OSError:
        return ""
