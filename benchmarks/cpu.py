"""What a call costs in CPU time, by process, and by thread: the one that runs Python or Lua, and libzmq's.

What one CPU does for a call bounds how many calls it can make per second, whatever the waits are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks.peers import bare_relay
from benchmarks.pipelined import pipelined_host
from benchmarks.service import ECHO, served
from luacell.client import LuaHostBridge

NS_PER_US = 1000
IN_FLIGHT = 128
PAYLOAD = bytes(range(64))
Spent = tuple[int, int]  # nanoseconds of the main thread, and of the others


def print_cpu(calls: int) -> None:
    """Print what each process spends per call, for each way to call and for the bare relay."""
    print("\nCPU us per call, without a profiler: main thread + libzmq's")
    print(f"{'':<40}{'host':>14}{'broker, relay':>16}{'worker':>14}{'in all':>9}")
    with ExitStack() as stack:
        relay = stack.enter_context(bare_relay())
        bridge, run_directory = stack.enter_context(served())
        host = stack.enter_context(pipelined_host(run_directory, ECHO, PAYLOAD, IN_FLIGHT))
        host.run(calls, IN_FLIGHT, together=True)
        health = bridge.health()
        worker = next(each["pid"] for each in health["workers"] if each["contract"] == ECHO)
        relayed = {"host": os.getpid(), **relay.pids}
        brokered = {"host": os.getpid(), "broker": health["broker_pid"], "worker": worker}
        ways: tuple[tuple[str, Mapping[str, int], Callable[[], object]], ...] = (
            ("bare relay, one at a time", relayed, lambda: relay.run(calls, 1)),
            ("brokered, one at a time", brokered, lambda: host.run(calls, 1, together=False)),
            ("brokered, one at a time, LuaHostBridge", brokered, lambda: _call_bridge(bridge, calls)),
            (f"bare relay, {IN_FLIGHT} in flight", relayed, lambda: relay.run(calls, IN_FLIGHT)),
            (f"brokered, {IN_FLIGHT}, one per message", brokered, lambda: host.run(calls, IN_FLIGHT, together=False)),
            (
                f"brokered, {IN_FLIGHT}, several per message",
                brokered,
                lambda: host.run(calls, IN_FLIGHT, together=True),
            ),
        )
        for name, pids, run in ways:
            before = {part: _spent(pid) for part, pid in pids.items()}
            run()
            each = [_per_call(before[part], _spent(pid), calls) for part, pid in pids.items()]
            cells = [f"{main:.1f} + {others:.1f}" for main, others in each]
            print(f"{name:<40}{cells[0]:>14}{cells[1]:>16}{cells[2]:>14}{sum(map(sum, each)):>9.1f}")


def _call_bridge(bridge: LuaHostBridge, calls: int) -> None:
    for _ in range(calls):
        bridge.call(ECHO, len(PAYLOAD), PAYLOAD, len(PAYLOAD))


def _spent(pid: int) -> Spent:
    """Return what a process has run for until now."""
    main, others = 0, 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        taken_ns = int((thread / "schedstat").read_text().split()[0])
        if thread.name == str(pid):
            main = taken_ns
        else:
            others += taken_ns
    return main, others


def _per_call(before: Spent, after: Spent, calls: int) -> tuple[float, float]:
    main, others = ((now - then) / calls / NS_PER_US for then, now in zip(before, after, strict=True))
    return main, others
