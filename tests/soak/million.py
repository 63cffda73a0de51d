"""A million calls: memory and descriptors stay as they are, and the last calls are as fast as the first.

Most are made by a pipelined host and by fifty tasks; before and after them, ten thousand come one after the other,
in batches that take turns with round trips through two pipes, so that what the machine itself did meanwhile can be
divided out.
"""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import pipe_ping_pong
from benchmarks.pipelined import pipelined_host
from luacell.client import AsyncLuaHostBridge, LuaFunction, LuaHostBridge
from tests.soak.report import Report
from tests.support.contracts import ECHO, PROBE
from tests.support.processes import descriptors_of
from tests.support.serving import Serving

PAYLOAD = bytes(range(64))
ECHO_64 = ECHO.replace("fn_id)", "64)")
STEPS = 10
WARM_STEPS = 3  # the broker's timers take a deadline's time, 5 s, to have as many buckets as they will ever need
TASKS, TASKS_SHARE = 50, 0.2
IN_FLIGHT = 32
SEQUENTIAL, BATCH = 10_000, 500  # calls one after the other at both ends, and between two looks at the pipes
SLOWER_MAX = 1.2
GROWTH_MAX_KIB = 1024  # of one process, from the end of the warm steps to the end of the last
US_PER_S = 1_000_000


@dataclass(frozen=True)
class Pace:
    """Medians of many round trips, in microseconds."""

    call_us: float
    pipe_us: float

    @property
    def ratio(self) -> float:
        return self.call_us / self.pipe_us


@dataclass(frozen=True)
class Holdings:
    """What each process has: memory in KiB, and descriptors."""

    memory_kib: dict[str, int]
    descriptors: dict[str, int]

    @classmethod
    def of(cls, pids: dict[str, int]) -> Holdings:
        return cls(
            {name: memory_kib(pid) for name, pid in pids.items()},
            {name: descriptors_of(pid).total() for name, pid in pids.items()},
        )


def memory_kib(pid: int) -> int:
    """Return the memory of a process in KiB.

    Pages of files and of shared memory are divided by those who share them. Its own pages count in full, also those
    that a forked process still shares: else the first write to one, by a garbage collection, would look like growth.
    """
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", rollup, re.MULTILINE)}
    return sizes["Anonymous"] + sizes["Pss_File"] + sizes["Pss_Shmem"]


def run(seed: int = 0, calls: int = 1_000_000, sequential: int = SEQUENTIAL, *, judges_pace: bool = True) -> Report:
    """Make so many calls; there is nothing random in it.

    Args:
        calls: in all but the sequential ones at both ends.
        sequential: at each end.
        judges_pace: whether a slower end is a violation.
    """
    with tempfile.TemporaryDirectory(prefix="million-") as directory, pipe_ping_pong(PAYLOAD) as pipe:
        run_directory = Path(directory) / "run"
        run_directory.mkdir(mode=0o700)
        with Serving(run_directory) as serving, LuaHostBridge.connect(run_directory) as bridge:
            bridge.register_host_contract(PROBE, LuaFunction(ECHO_64))

            def call() -> bool:
                return bridge.call(PROBE, 0, PAYLOAD, 64) == PAYLOAD

            with serving.processes() as processes, pipelined_host(run_directory, PROBE, PAYLOAD, IN_FLIGHT) as host:
                (worker,) = [each["pid"] for each in bridge.health()["workers"] if each["contract"] == PROBE]
                pids = {
                    "broker": processes.broker.pid,
                    "worker host": processes.worker_host.pid,
                    "worker": worker,
                    "host": os.getpid(),
                }
                violations: list[str] = []
                measured(call, pipe, sequential // 5, violations)
                first = measured(call, pipe, sequential, violations)
                looks = []
                started_s = time.monotonic()
                for _ in range(STEPS):
                    host.run(int(calls * (1 - TASKS_SHARE)) // STEPS, IN_FLIGHT, together=True)
                    asyncio.run(by_tasks(run_directory, int(calls * TASKS_SHARE) // STEPS, violations))
                    looks.append(Holdings.of(pids))
                lasted_s = time.monotonic() - started_s
                last = measured(call, pipe, sequential, violations)
    early, late = looks[WARM_STEPS - 1], looks[-1]
    violations += _growth(early, late)
    slower = last.ratio / first.ratio
    if judges_pace and slower > SLOWER_MAX:
        violations.append(f"the last calls take {slower:.2f} times as long as the first, beside the pipes")
    return Report(
        "a million calls",
        {
            "calls": f"{calls + 2 * sequential} ({calls / lasted_s:.0f}/s)",
            "p50 of the first and the last": f"{first.call_us:.0f} and {last.call_us:.0f} us"
            f" (pipes {first.pipe_us:.1f} and {last.pipe_us:.1f} us; beside them {(slower - 1) * 100:+.1f} %)",
            "memory in KiB": ", ".join(
                f"{name} {early.memory_kib[name]} {late.memory_kib[name] - early.memory_kib[name]:+d}" for name in pids
            ),
            "descriptors": ", ".join(
                f"{name} {early.descriptors[name]} {late.descriptors[name] - early.descriptors[name]:+d}"
                for name in pids
            ),
        },
        violations,
    )


def _growth(early: Holdings, late: Holdings) -> list[str]:
    violations = []
    for name, before in early.memory_kib.items():
        if late.memory_kib[name] - before > GROWTH_MAX_KIB:
            violations.append(f"the memory of the {name} went from {before} to {late.memory_kib[name]} KiB")
        if late.descriptors[name] != early.descriptors[name]:
            counts = early.descriptors[name], late.descriptors[name]
            violations.append(f"the descriptors of the {name} went from {counts[0]} to {counts[1]}")
    return violations


def measured(call: Callable[[], bool], pipe: Callable[[], object], calls: int, violations: list[str]) -> Pace:
    """Make calls one after the other, in turn with round trips through the pipes."""
    call_s: list[float] = []
    pipe_s: list[float] = []
    clock = time.perf_counter
    for _ in range(max(1, calls // BATCH)):
        for _ in range(min(calls, BATCH)):
            started_s = clock()
            is_right = call()
            call_s.append(clock() - started_s)
            if not is_right:
                violations.append("a call was answered wrongly")
        for _ in range(min(calls, BATCH)):
            started_s = clock()
            pipe()
            pipe_s.append(clock() - started_s)
    return Pace(statistics.median(call_s) * US_PER_S, statistics.median(pipe_s) * US_PER_S)


async def by_tasks(run_directory: Path, calls: int, violations: list[str]) -> None:
    """Make calls from many tasks of one bridge."""
    left = calls

    async def work(bridge: AsyncLuaHostBridge) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            if await bridge.call(PROBE, 0, PAYLOAD, 64) != PAYLOAD:
                violations.append("a task's call was answered wrongly")

    async with AsyncLuaHostBridge.connect(run_directory) as bridge:
        await asyncio.gather(*(work(bridge) for _ in range(TASKS)))
