"""Hosts, workers and contracts that do nothing: what they cost those who call.

`python -m benchmarks.idle RUN_DIRECTORY COUNT` is a process with COUNT idle hosts, each with a descriptor channel and a
connection as any host has; it writes a line when all have joined, and ends with its stdin.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from benchmarks.pipelined import join
from luacell.broker.bounds import bounds_for
from luacell.client import LuaFunction, LuaHostBridge

DESCRIPTORS_PER_HOST = 4  # in the helper: channel, connection, and two that libzmq has per socket at most
OWN_DESCRIPTORS = 64
SETTLE_LIMIT_S = 30.0
LOOK_S = 0.1
NOTHING = "return function() end"


def objection(hosts: int = 0, workers: int = 0) -> str:
    """Return why there cannot be that many, or ""."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    bounds = bounds_for(limit)
    if hosts >= bounds.hosts or workers + 2 > bounds.workers or hosts * DESCRIPTORS_PER_HOST + OWN_DESCRIPTORS > limit:
        return f"{hosts or workers} are more than RLIMIT_NOFILE allows, whose hard limit is {limit}"
    return ""


@contextmanager
def idle_hosts(bridge: LuaHostBridge, run_directory: Path, count: int) -> Iterator[None]:
    command = [sys.executable, "-m", "benchmarks.idle", str(run_directory), str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{count} idle hosts did not come up")
        found = bridge.health()["hosts"]
        assert found == count + 1, f"{found} hosts"
        yield
    finally:
        process.communicate(timeout=SETTLE_LIMIT_S)  # closes its stdin


def add_idle_workers(bridge: LuaHostBridge, count: int) -> None:
    """Register `count` contracts and call each once, so that each keeps its worker."""
    for number in range(count):
        bridge.register_host_contract(f"host.idle_{number}@1", LuaFunction(NOTHING))
        bridge.call(f"host.idle_{number}@1", 0, None)
    found = sum(1 for worker in bridge.health()["workers"] if worker["contract"])
    assert found >= count, f"{found} workers"


def add_contracts(bridge: LuaHostBridge, count: int) -> None:
    """Register `count` contracts that nobody calls, and wait until their workers are gone."""
    for number in range(count):
        bridge.register_host_contract(f"host.uncalled_{number}@1", LuaFunction(NOTHING))
    until_s = time.monotonic() + SETTLE_LIMIT_S
    while any("uncalled" in (worker["contract"] or "") for worker in bridge.health()["workers"]):
        if time.monotonic() > until_s:
            raise RuntimeError(f"contracts that nobody calls have workers after {SETTLE_LIMIT_S:g} s")
        time.sleep(LOOK_S)
    found = len(bridge.contracts())
    assert found >= count, f"{found} contracts"


def main(run_directory: Path, count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, count + 1)
    hosts = [join(context, run_directory) for _ in range(count)]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    for channel, _ in hosts:
        channel.close()
    context.destroy(linger=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
