"""10,000 workers start and end, in every way that there is: nothing is left of them, and nobody grows (row P18)."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from luacell.client import LuaHostBridge, WorkerCrashed
from tests.soak.million import GROWTH_MAX_KIB, memory_kib
from tests.soak.report import Report
from tests.support.contracts import COUNTER, DOUBLE, answers, deploy, failure, unregister_all
from tests.support.processes import Holdings, Process, Processes, holdings_at_rest, workers_of
from tests.support.serving import Serving

STEPS: Final = 10
WARM_STEPS: Final = 3  # after these, crash records have reached their bound
WORN, BRIEF, CRASHING, KILLED = (f"host.{name}@1" for name in ("worn", "brief", "crashing", "killed"))
CRASHES_IN_A_ROW: Final = 4  # five put a contract into quarantine
PAUSE_S: Final = (0.0, 0.02)  # before a worker is killed from outside


class Starts:
    """One run.

    Args:
        bridge: to a service of its own.
        processes: of that service.
        rng: of all chance.
    """

    def __init__(self, bridge: LuaHostBridge, processes: Processes, rng: random.Random) -> None:
        self._bridge = bridge
        self._rng = rng
        self._pids = {
            "parent": processes.parent.pid,
            "broker": processes.broker.pid,
            "worker host": processes.worker_host.pid,
        }
        self._pause = threading.Event()
        self._ended: Counter[str] = Counter()  # by what was done
        self._violations: list[str] = []

    def run(self, ends: int) -> Report:
        """Let so many workers end."""
        before = self._at_rest()
        looks: list[dict[str, int]] = []
        started_s = time.monotonic()
        for step in range(1, STEPS + 1):
            self._end_workers(ends * step // STEPS)
            after = self._at_rest()
            if step == WARM_STEPS:
                before = after
            looks.append({name: memory_kib(pid) for name, pid in self._pids.items()})
        lasted_s = time.monotonic() - started_s
        if after != before:
            self._violations.append(f"before: {before}, after: {after}")
        early, late = looks[WARM_STEPS - 1], looks[-1]
        for name, kib in early.items():
            if late[name] - kib > GROWTH_MAX_KIB:
                self._violations.append(f"the memory of the {name} went from {kib} to {late[name]} KiB")
        count = self._count()
        return Report(
            "starts and ends of workers",
            {
                "workers": f"{count} ({count / lasted_s:.0f}/s)",
                "deeds": ", ".join(f"{number} {deed}" for deed, number in sorted(self._ended.items())),
                "memory in KiB": ", ".join(f"{name} {early[name]} {late[name] - early[name]:+d}" for name in early),
                "descriptors, mappings, threads, zombies, processes, files": "as before"
                if after == before
                else "others",
            },
            self._violations,
        )

    def _at_rest(self) -> Holdings:
        """Return what the service holds once it serves no contract any more."""
        unregister_all(self._bridge)
        return holdings_at_rest(self._bridge)

    def _count(self) -> int:
        """Return how many workers have ended since the beginning."""
        return sum(self._bridge.health()["deaths"].values())

    def _end_workers(self, ends: int) -> None:
        """Start and end workers in all ways at once until so many have ended since the beginning."""
        deploy(self._bridge, DOUBLE, WORN, stateless=True, max_calls=1)
        deploy(self._bridge, COUNTER, CRASHING)
        deploy(self._bridge, DOUBLE, KILLED)
        is_over = threading.Event()
        with ThreadPoolExecutor(len(WAYS)) as pool:
            try:
                runs = [pool.submit(self._until, is_over, deed, way) for deed, way in WAYS.items()]
                while self._count() < ends and not any(run.done() for run in runs):
                    self._pause.wait(0.05)
            finally:
                is_over.set()
            for run in runs:
                run.result()

    def _until(self, is_over: threading.Event, deed: str, way: Callable[[Starts, int], None]) -> None:
        number = 0
        while not is_over.is_set():
            way(self, number)
            number += 1
        self._ended[deed] += number

    # -- ways to end -----------------------------------------------------------------------------------------
    def _wear_out(self, number: int) -> None:
        """A worker has served its one call, and is recycled."""
        if not answers(self._bridge, WORN, number):
            self._violations.append(f"call {number} of a contract whose workers are recycled had another value")

    def _unregister(self, number: int) -> None:
        """A contract is there for one call."""
        deploy(self._bridge, DOUBLE, BRIEF)
        assert answers(self._bridge, BRIEF, number)
        self._bridge.unregister_host_contract(BRIEF)

    def _crash(self, number: int) -> None:
        """A contract crashes."""
        if number % CRASHES_IN_A_ROW == 0:
            self._bridge.revive(CRASHING)
        error = failure(self._bridge, CRASHING, 1)
        if not isinstance(error, WorkerCrashed):
            self._violations.append(f"a crash ended with {error!r}")

    def _kill(self, number: int) -> None:
        """A worker is killed from outside while it is idle."""
        assert answers(self._bridge, KILLED, number)
        for pid in workers_of(self._bridge, KILLED):
            with suppress(AssertionError, ProcessLookupError), closing(Process(pid)) as worker:
                self._pause.wait(self._rng.uniform(*PAUSE_S))
                worker.kill()
                assert worker.ends_within()


WAYS: Final[dict[str, Callable[[Starts, int], None]]] = {
    "calls of one that is recycled": Starts._wear_out,
    "unregistered": Starts._unregister,
    "crashes": Starts._crash,
    "kills from outside": Starts._kill,
}


def run(seed: int, ends: int = 10_000) -> Report:
    """Let so many workers end."""
    with tempfile.TemporaryDirectory(prefix="starts-") as directory:
        run_directory = Path(directory) / "run"
        run_directory.mkdir(mode=0o700)
        with (
            Serving(run_directory, log_level="critical") as serving,
            LuaHostBridge.connect(run_directory) as bridge,
            serving.processes() as processes,
        ):
            return Starts(bridge, processes, random.Random(seed)).run(ends)
