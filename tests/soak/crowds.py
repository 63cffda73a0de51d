"""Many callers, each with a bridge of its kind, get their own answers while workers are killed at random.

Fifty tasks of one event loop, sixteen threads of one process, and a server of four processes that forks first and
connects afterwards, as gunicorn does. Each crowd has the service to itself for a while.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from luacell.client import AsyncLuaHostBridge, BridgeForked, LuaHostBridge
from tests.soak.history import VALUE, History
from tests.soak.killer import Killer
from tests.soak.load import NUMBER_SIZE, TIMEOUT_S, arguments, call, double_after, judge
from tests.soak.report import Report
from tests.support.contracts import HEALTHY, answers, deploy
from tests.support.serving import Serving
from tests.support.waiting import LIMIT_S, settles

ROOT = Path(__file__).parents[2]
TASKS, THREADS, PROCESSES = 50, 16, 4
WORKERS = 4
SPINS = 30_000  # a tenth of a millisecond or so
ERRORS = ("WorkerCrashed",)
DEADLINE = "20s"  # of the contract; calls bring a timeout
KILL_PAUSES_S = (0.01, 0.1)


class Tally:
    """What a crowd has come to."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.violations: list[str] = []

    def add(self, history: History) -> None:
        self.outcomes += history.outcomes()
        self.violations += history.violations()


def tasks(run_directory: Path, lasts_s: float, timeout_s: float) -> Tally:
    history = History(ERRORS)

    async def work(bridge: AsyncLuaHostBridge, until_s: float) -> None:
        while time.monotonic() < until_s:
            entry = history.sent(HEALTHY, timeout_s)
            try:
                reply = await bridge.call(HEALTHY, 0, arguments(entry), NUMBER_SIZE, timeout=timeout_s)
                outcome = judge(entry, reply)
            except Exception as error:
                outcome = type(error).__name__
            history.ended(entry, outcome)

    async def main() -> None:
        async with AsyncLuaHostBridge.connect(run_directory) as bridge:
            until_s = time.monotonic() + lasts_s
            await asyncio.wait_for(asyncio.gather(*(work(bridge, until_s) for _ in range(TASKS))), lasts_s + LIMIT_S)

    asyncio.run(main())
    tally = Tally()
    tally.add(history)
    return tally


def threads(run_directory: Path, lasts_s: float, timeout_s: float) -> Tally:
    history = History(ERRORS)
    until_s = time.monotonic() + lasts_s
    with LuaHostBridge.connect(run_directory) as bridge, ThreadPoolExecutor(THREADS) as pool:

        def work() -> None:
            while time.monotonic() < until_s:
                call(bridge, history, HEALTHY, timeout_s)

        for future in [pool.submit(work) for _ in range(THREADS)]:
            future.result(lasts_s + LIMIT_S)
    tally = Tally()
    tally.add(history)
    return tally


def processes(run_directory: Path, lasts_s: float, timeout_s: float) -> Tally:
    """Run a server, as a command of its own: this process has threads, and should not fork."""
    command = [sys.executable, "-m", "tests.soak.crowds", *map(str, (run_directory, lasts_s, timeout_s))]
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=lasts_s + 2 * LIMIT_S, check=False
    )
    told = [json.loads(line) for line in ended.stdout.splitlines()]
    tally = Tally()
    for each in told:
        tally.outcomes += Counter(each["outcomes"])
        tally.violations += each["violations"]
    if ended.returncode or len(told) != PROCESSES:
        tally.violations.append(f"the server ended with {ended.returncode} and {len(told)} reports")
    return tally


CROWDS: dict[str, Callable[[Path, float, float], Tally]] = {
    f"{TASKS} tasks": tasks,
    f"{THREADS} threads": threads,
    f"{PROCESSES} processes": processes,
}


def run(seed: int, lasts_s: float = 15.0, timeout_s: float = TIMEOUT_S) -> Report:
    """Let each crowd call for so many seconds, with so much time for each call."""
    rng = random.Random(seed)
    figures: dict[str, str] = {}
    violations: list[str] = []
    with tempfile.TemporaryDirectory(prefix="crowds-") as directory:
        run_directory = Path(directory) / "run"
        run_directory.mkdir(mode=0o700)
        with Serving(run_directory), LuaHostBridge.connect(run_directory) as bridge:
            deploy(bridge, double_after(SPINS), HEALTHY, stateless=True, workers=WORKERS, deadline=DEADLINE)
            assert answers(bridge, HEALTHY)
            for name, crowd in CROWDS.items():
                with Killer(run_directory, HEALTHY, rng, KILL_PAUSES_S) as killer:
                    tally = crowd(run_directory, lasts_s, timeout_s)
                outcomes = ", ".join(f"{number} {outcome}" for outcome, number in tally.outcomes.most_common())
                figures[name] = f"{tally.outcomes.total()} calls, {killer.kills} kills: {outcomes}"
                violations += [f"{name}: {text}" for text in tally.violations]
                if not killer.kills or not tally.outcomes[VALUE]:
                    violations.append(f"{name}: nothing was killed, or nothing answered")
                try:
                    settles(lambda: bridge.health()["slots_in_flight"], 0, f"{name}: slots come back")
                    settles(lambda: bridge.health()["hosts"], 1, f"{name}: its bridges have left")
                except AssertionError as error:
                    violations.append(str(error))
                if not answers(bridge, HEALTHY):
                    violations.append(f"{name}: the contract does not answer any more")
    return Report("own answers while workers are killed", figures, violations)


# -- the server that forks first ------------------------------------------------------------------------------
def serve(run_directory: Path, lasts_s: float, timeout_s: float) -> int:
    """Fork, and wait for the children; the parent's bridge is not for them."""
    with LuaHostBridge.connect(run_directory) as bridge:
        bridge.health()
        children = [os.fork() or _serve(bridge, run_directory, lasts_s, timeout_s) for _ in range(PROCESSES)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        bridge.health()
    return max(abs(code) for code in codes)


def _serve(parents: LuaHostBridge, run_directory: Path, lasts_s: float, timeout_s: float) -> int:
    """Do a child's work, and end it."""
    history = History(ERRORS)
    violations: list[str] = []
    try:
        parents.call(HEALTHY, 0)
        violations.append("the parent's bridge could be used in a child")
    except BridgeForked:
        pass
    until_s = time.monotonic() + lasts_s
    with LuaHostBridge.connect(run_directory) as bridge:
        while time.monotonic() < until_s:
            call(bridge, history, HEALTHY, timeout_s)
    violations += history.violations()
    told = {"outcomes": history.outcomes(), "violations": violations[:_TOLD_MAX]}
    os.write(1, json.dumps(told).encode() + b"\n")
    os._exit(0)


_TOLD_MAX = 20  # violations that a child tells of, so that its line stays one write


def main(words: Sequence[str]) -> int:
    assert threading.active_count() == 1
    return serve(Path(words[0]), float(words[1]), float(words[2]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
