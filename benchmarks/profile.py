"""Where the broker's time goes: its loop runs under cProfile while a host in another process calls it.

The profiler's clock is the CPU time of the broker's thread, so that waiting counts for nothing. What the profiler
itself costs per function call is measured beforehand and taken off, half from the caller and half from the callee;
what is left is good for an order, not for a sum (`cpu` has that). C functions of extensions, `recv` among them, belong
to who calls them.

`python -m benchmarks.profile RUN_DIRECTORY WAY CALLS` is that host.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.pipelined import pipelined_host
from benchmarks.service import ECHO, SOURCES
from luacell.broker.__main__ import GC_THRESHOLDS
from luacell.broker.registry_store import RegistryStore
from luacell.broker.rundir import RunDirectory
from luacell.broker.server import Server
from luacell.client import LuaFunction, LuaHostBridge

ROWS = 12
CALIBRATION_CALLS = 100_000
IN_FLIGHT = 128
PAYLOAD = bytes(range(64))
WAYS: dict[str, str] = {
    "sequential": "one call at a time",
    "one": f"{IN_FLIGHT} in flight, one call per message",
    "several": f"{IN_FLIGHT} in flight, several calls per message",
}


def profile_broker(calls: int) -> None:
    """Print the costliest functions of the broker for each way to call it."""
    overhead_s = _overhead_s()
    for way, words in WAYS.items():
        profiler = _profiled(way, calls)
        print(f"\nbroker, {words}: CPU us per call, of each function without those that it calls")
        print(f"{'us':>8}{'entered':>9}   per call")
        for where, entered, own_s in _costliest(profiler, overhead_s):
            print(f"{own_s * 1e6 / calls:>8.2f}{entered / calls:>9.2f}   {where}")


def _overhead_s() -> float:
    """Return what the profiler adds to one function call."""

    def work() -> None:
        for _ in range(CALIBRATION_CALLS):
            _nothing()

    start_s = time.thread_time()
    work()
    plain_s = time.thread_time() - start_s
    profiler = cProfile.Profile(time.thread_time)
    start_s = time.thread_time()
    profiler.runcall(work)
    return (time.thread_time() - start_s - plain_s) / CALIBRATION_CALLS


def _nothing() -> None:
    pass


def _profiled(way: str, calls: int) -> cProfile.Profile:
    gc.freeze()  # as the broker's own process does
    gc.set_threshold(*GC_THRESHOLDS)
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


def _costliest(profiler: cProfile.Profile, overhead_s: float) -> list[tuple[str, int, float]]:
    """Return where, how often entered, and the seconds without callees and without the profiler."""
    profiler.create_stats()
    stats: dict[tuple[str, int, str], Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    made: Counter[tuple[str, int, str]] = Counter()
    for _, _, _, _, callers in stats.values():
        for caller, (calls, *_) in callers.items():
            made[caller] += calls
    found = [
        (
            name if path == "~" else f"{Path(path).name}:{line} {name}",
            entered,
            own_s - overhead_s / 2 * (entered + made[path, line, name]),
        )
        for (path, line, name), (_, entered, own_s, _, _) in stats.items()
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
