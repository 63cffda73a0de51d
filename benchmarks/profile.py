"""Where the broker's time goes: its loop runs under cProfile while a host in another process calls it.

The profiler's clock is the CPU time of the broker's thread, so that waiting counts for nothing. It is read at every
entry and exit of a function, which makes Python code look dearer than it is: take the order, not the sum.

`python -m benchmarks.profile RUN_DIRECTORY WAY CALLS` is that host.
"""

from __future__ import annotations

import cProfile
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.pipelined import pipelined_host
from benchmarks.service import ECHO, SOURCES
from luacell.broker.registry_store import RegistryStore
from luacell.broker.rundir import RunDirectory
from luacell.broker.server import Server
from luacell.client import LuaFunction, LuaHostBridge

ROWS = 12
IN_FLIGHT = 128
PAYLOAD = bytes(range(64))
WAYS: dict[str, str] = {
    "sequential": "one call at a time",
    "one": f"{IN_FLIGHT} in flight, one call per message",
    "several": f"{IN_FLIGHT} in flight, several calls per message",
}


def profile_broker(calls: int) -> None:
    """Print the costliest functions of the broker for each way to call it."""
    for way, words in WAYS.items():
        profiler = _profiled(way, calls)
        print(f"\nbroker under cProfile, {words}: CPU us per call, profiler included")
        print(f"{'own':>8}{'with callees':>14}{'entered':>9}   per call")
        for where, entered, own_s, all_s in _costliest(profiler):
            print(f"{own_s * 1e6 / calls:>8.2f}{all_s * 1e6 / calls:>14.2f}{entered / calls:>9.2f}   {where}")


def _profiled(way: str, calls: int) -> cProfile.Profile:
    with tempfile.TemporaryDirectory(prefix="luacell-bench-") as parent:
        run_directory = RunDirectory(Path(parent) / "run")
        server = Server(run_directory, 1, RegistryStore(run_directory.path / "registry.db"))
        path = str(run_directory.path)
        worker_host = subprocess.Popen(
            [sys.executable, "-P", "-m", "luacell.worker", "--run-dir", path, "--log-level", "critical"]
        )
        profiler = cProfile.Profile(time.thread_time)
        caller = threading.Thread(target=_run_caller, args=(path, way, calls, server.stop))
        caller.start()
        with suppress(SystemExit):
            profiler.runcall(server.run)
        caller.join()
        server.close()
        worker_host.wait()
        run_directory.close(remove=True)
    return profiler


def _run_caller(path: str, way: str, calls: int, stop: Callable[[], None]) -> None:
    try:
        subprocess.run([sys.executable, "-m", "benchmarks.profile", path, way, str(calls)], check=True)
    finally:
        stop()


def _costliest(profiler: cProfile.Profile) -> list[tuple[str, int, float, float]]:
    """Return where, how often entered, and the seconds without and with callees."""
    profiler.create_stats()
    stats: dict[tuple[str, int, str], Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    found = [
        (name if path == "~" else f"{Path(path).name}:{line} {name}", entered, own_s, all_s)
        for (path, line, name), (_, entered, own_s, all_s, _) in stats.items()
    ]
    return sorted(found, key=lambda each: each[2], reverse=True)[:ROWS]


def main(run_directory: Path, way: str, calls: int) -> None:
    with LuaHostBridge.connect(run_directory) as bridge:
        bridge.register_host_contract(ECHO, LuaFunction(SOURCES[ECHO]))
        if way == "sequential":
            for _ in range(calls):
                bridge.call(ECHO, len(PAYLOAD), PAYLOAD, len(PAYLOAD))
            return
        with pipelined_host(run_directory, ECHO, PAYLOAD, IN_FLIGHT) as host:
            host.run(calls, IN_FLIGHT, together=way == "several")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
