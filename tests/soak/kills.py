"""kill -9 of each process of a service in turn, under calls of several hosts.

Every call gets one answer, the service is back within a second, every contract is still there, and in the end nothing
is left. Killed with the parent, the service is started again as an init system would do it.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from luacell.client import LuacellError, LuaFunction, LuaHostBridge
from tests.soak.history import History, percentiles
from tests.soak.load import TIMEOUT_S, Load, double_after
from tests.soak.remains import GONE_WITHIN_S, remains
from tests.soak.report import Report
from tests.support.contracts import DOUBLE, answers, deploy
from tests.support.holdings import holdings
from tests.support.processes import Process, Processes, workers_of
from tests.support.scheduling import Scheduling
from tests.support.serving import Serving
from tests.support.waiting import eventually

VICTIMS = ("worker", "worker host", "broker", "parent")
HOSTS, THREADS, RATE = 4, 4, 200.0
CALLED, OTHERS = 4, 16  # contracts
SPINS = 200_000  # half a millisecond or so
ERRORS = ("WorkerCrashed", "Unavailable")
DEADLINE = "20s"  # of the contracts; calls bring a timeout
BACK_WITHIN_S = 1.0
PAUSES_S = (0.02, 0.3)  # between a recovery and the next kill
OPTIONS = ("--max-restarts", "1000000")


class Kills:
    """One run.

    Args:
        directory: an empty one.
        rng: chooses workers and pauses.
        back_within_s: in which the service must be back after the death of the broker or the worker host; widened by
            what the machine was late itself.
        timeout_s: of each call, in which the service must be back, too.
    """

    def __init__(self, directory: Path, rng: random.Random, back_within_s: float, timeout_s: float) -> None:
        self._back_within_s = back_within_s
        self._timeout_s = timeout_s
        self._run_directory = directory / "run"
        self._run_directory.mkdir(mode=0o700)
        self._rng = rng
        self._history = History(ERRORS)
        self._called = [f"host.called{number}@1" for number in range(CALLED)]
        self._others = [f"host.other{number}@1" for number in range(OTHERS)]
        self._pause = threading.Event()
        self._recoveries_s: dict[str, list[float]] = {victim: [] for victim in VICTIMS}
        self._violations: list[str] = []

    def run(self, rounds: int) -> Report:
        """Kill each so often."""
        with Scheduling() as scheduling:
            return self._run(rounds, scheduling)

    def _run(self, rounds: int, scheduling: Scheduling) -> Report:
        before = holdings()
        self._serving = Serving(self._run_directory, *OPTIONS)
        try:
            with LuaHostBridge.connect(self._run_directory) as control:
                self._register(control)
                self._control = control
                started_s = time.monotonic()
                with Load(
                    self._run_directory,
                    self._history,
                    self._called,
                    hosts=HOSTS,
                    threads=THREADS,
                    rate=RATE,
                    timeout_s=self._timeout_s,
                ):
                    for _ in range(rounds):
                        for victim in VICTIMS:
                            self._kill(victim)
                lasted_s = time.monotonic() - started_s
                self._check_contracts(everything=True)
        finally:
            self._serving.stop()
        self._violations += self._history.violations(scheduling.slack_s)
        self._violations += remains(self._run_directory, before)
        return self._report(rounds, lasted_s, scheduling.slack_s)

    def _register(self, bridge: LuaHostBridge) -> None:
        """Half of the contracts that are called keep a state and have one worker, half have two."""
        for number, name in enumerate(self._called):
            settings: dict[str, int | bool] = {"stateless": True, "workers": 2} if number % 2 else {}
            deploy(bridge, double_after(SPINS), name, deadline=DEADLINE, **settings)
            assert answers(bridge, name)
        for name in self._others:
            bridge.register_host_contract(name, LuaFunction(DOUBLE))

    # -- one kill --------------------------------------------------------------------------------------------
    def _kill(self, victim: str) -> None:
        self._pause.wait(self._rng.uniform(*PAUSES_S))
        contracts = self._called
        with self._serving.processes() as processes:
            if victim == "worker":
                contracts = [self._rng.choice(self._called)]
                killed = self._a_worker(contracts[0])
                doomed = [killed]
            else:
                killed = {
                    "worker host": processes.worker_host,
                    "broker": processes.broker,
                    "parent": processes.parent,
                }[victim]
                doomed = self._doomed_by(victim, processes)
            mark = len(self._history.answered)
            killed_s = time.monotonic()
            killed.kill()
            assert killed.ends_within(), f"{victim} {killed} ends"
            dead_s = time.monotonic()
            if victim == "parent":
                self._serving.stop()
                self._serving = Serving(self._run_directory, *OPTIONS)
            self._await_service(contracts, mark, dead_s, f"the death of the {victim}")
            self._recoveries_s[victim].append(self._served_s(contracts, mark, dead_s) - killed_s)
            left = _survivors(doomed)
            if left:
                self._violations.append(f"{left} outlived the {victim}")
            if victim == "worker":
                killed.close()
        self._check_contracts()

    def _a_worker(self, contract: str) -> Process:
        def look() -> Process | None:
            with suppress(AssertionError, ProcessLookupError, LuacellError):
                return Process(self._rng.choice(workers_of(self._control, contract) or [0]))
            return None

        return eventually(look, f"{contract} has a worker")

    def _doomed_by(self, victim: str, processes: Processes) -> list[Process]:
        """Return who must end when the victim does: workers with their worker host, it with its broker."""
        spared = {"worker host": {processes.parent, processes.broker}, "broker": {processes.parent}, "parent": set()}
        processes.look_again()
        return [process for process in processes.all if process not in spared[victim]]

    def _await_service(self, contracts: Sequence[str], mark: int, dead_s: float, what: str) -> None:
        eventually(lambda: self._served_s(contracts, mark, dead_s), f"the service is back after {what}")

    def _served_s(self, contracts: Sequence[str], mark: int, dead_s: float) -> float:
        """Return when all these contracts had answered calls that were made after a death; 0 when they have not."""
        first_s: dict[str, float] = {}
        for entry in self._history.answered[mark:]:
            if entry.sent_s >= dead_s and entry.contract in contracts:
                first_s.setdefault(entry.contract, entry.ends[0].ended_s)
        return max(first_s.values()) if len(first_s) == len(contracts) else 0.0

    # -- what is to hold -------------------------------------------------------------------------------------
    def _check_contracts(self, *, everything: bool = False) -> None:
        listed = {str(contract) for contract in self._control.contracts()}
        wanted = {*self._called, *self._others}
        if listed != wanted:
            self._violations.append(f"contracts {sorted(listed ^ wanted)} are missing or too many")
        for name in self._others if everything else ():
            if not answers(self._control, name):
                self._violations.append(f"{name} does not answer any more")

    def _report(self, rounds: int, lasted_s: float, slack_s: float) -> Report:
        for victim in ("broker", "worker host"):
            late = [each for each in self._recoveries_s[victim] if each >= self._back_within_s + slack_s]
            self._violations += [f"the service was back {each:.3f} s after the death of the {victim}" for each in late]
        calls = len(self._history.entries)
        return Report(
            "kill -9 of each process in turn",
            {
                "kills": " + ".join(f"{rounds} {victim}" for victim in VICTIMS),
                "calls": f"{calls} ({calls / lasted_s:.0f}/s)",
                "outcomes": _counted(self._history.outcomes()),
                **{f"back after {victim} p50/p99/max": percentiles(self._recoveries_s[victim]) for victim in VICTIMS},
                "contracts": f"{CALLED + OTHERS} of {CALLED + OTHERS}",
            },
            self._violations,
        )


def _counted(outcomes: Counter[str]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common())


def _survivors(doomed: Sequence[Process]) -> list[Process]:
    give_up_s = time.monotonic() + GONE_WITHIN_S
    return [process for process in doomed if not process.ends_within(max(0.0, give_up_s - time.monotonic()))]


def run(seed: int, rounds: int = 50, back_within_s: float = BACK_WITHIN_S, timeout_s: float = TIMEOUT_S) -> Report:
    """Kill each of the four processes `rounds` times."""
    with tempfile.TemporaryDirectory(prefix="kills-") as directory:
        return Kills(Path(directory), random.Random(seed), back_within_s, timeout_s).run(rounds)
