"""How soon all is well again: deaths seen, deadlines kept, workers and services replaced, and nobody left behind.

Each figure has a service to itself, or one of its own for every few kills: the parent waits longer with each restart in
a row (10 ms, 20 ms, …), which is no property of a single death.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from subprocess import PIPE
from typing import Final, NamedTuple

from luacell.client import DeadlineExceeded, LuacellError, LuaHostBridge, WorkerCrashed
from tests.soak.history import GRACE_S
from tests.soak.report import Report
from tests.support.children import child_process
from tests.support.contracts import COUNTER, DOUBLE, HEALTHY, PROBE, answers, deploy, failure, function
from tests.support.processes import Process, Processes, worker_of
from tests.support.scheduling import Scheduling
from tests.support.serving import Serving
from tests.support.waiting import LIMIT_S, eventually

ENDLESS: Final = function("if fn_id == 1 then while true do end end")
DEADLINE: Final = "20s"  # of the contract; calls that are to end sooner bring a timeout
BUDGETS_S: Final = (0.11, 0.2)  # of endless calls: more than the 100 ms from which on their worker is killed
CRASHES_IN_A_ROW: Final = 4  # five put a contract into quarantine
KILLS_IN_A_ROW: Final = 4  # of a broker or a worker host: the last of them is started again 80 ms later
RUNNING_TICKS: Final = 2  # of 10 ms: more processor time than a worker uses for anything but a contract
COLD_S: Final = 0.015  # what the call after a crash should take at most, half of the time, where no spare is warm
WARM_S: Final = 0.003  # and by how much it should take longer than the call before, where one is
ROOT: Final = Path(__file__).parents[2]


class Limits(NamedTuple):
    """In how many seconds all is to be well again; the promises.

    Attributes:
        back_s: the service, after the death of the broker or the worker host.
        gone_s: everybody who has no purpose any more.
    """

    back_s: float = 1.0
    gone_s: float = 0.1


PROMISED: Final = Limits()


class Recovery:
    """The measurements.

    Args:
        rng: of all chance.
        rounds: of each.
        limits: they are widened by what the machine was late itself.
    """

    def __init__(self, rng: random.Random, rounds: int, limits: Limits) -> None:
        self._rng = rng
        self._rounds = rounds
        self._kills = {"broker": rounds, "worker host": -(-rounds // 2)}
        self._hosts = -(-rounds // 8)  # embedded ones
        self._limits = limits
        self._gone_s: dict[str, list[float]] = {}  # after which all were gone, by who was killed
        self._violations: list[str] = []

    def run(self) -> Report:
        """Measure everything."""
        with Scheduling() as scheduling:
            return self._run(scheduling)

    def _run(self, scheduling: Scheduling) -> Report:
        with _service() as bridge:
            deploy(bridge, ENDLESS, deadline=DEADLINE, sandbox="hardened")
            seen_s = [self._death_seen(bridge) for _ in range(self._rounds)]
            late_s = [self._overshoot(bridge) for _ in range(self._rounds)]
        with _service() as bridge:
            deploy(bridge, COUNTER, sandbox="hardened")
            usual_s, warm_s = zip(*(self._next_call(bridge, number) for number in range(self._rounds)), strict=True)
        with _service("--spares", "0") as bridge:
            deploy(bridge, COUNTER, sandbox="hardened")
            cold_s = [self._next_call(bridge, number, spares=0)[1] for number in range(self._rounds)]
        back_s = {victim: list(self._kill_each(victim, kills)) for victim, kills in self._kills.items()}
        for _ in range(self._hosts):
            self._kill_embedded_host()
        self._judge(late_s, back_s, scheduling.slack_s)
        late = sum(each > PROMISED.gone_s for times_s in self._gone_s.values() for each in times_s)
        return Report(
            f"recovery, p50/p99/max of {self._rounds}",
            {
                "death of a worker seen by its caller": shown(seen_s),
                "deadline overshot": shown(late_s),
                "call after a crash, no spare (hardened)": f"{shown(cold_s)} ({verdict(cold_s, COLD_S)})",
                "call after a crash, warm spare (hardened)": f"{shown(warm_s)} ({verdict(warm_s, WARM_S, usual_s)})",
                "call before it": shown(usual_s),
                **{f"back, {len(times)} kills of the {victim}": shown(times) for victim, times in back_s.items()},
                **{f"gone, {len(times)} kills of the {victim}": shown(times) for victim, times in self._gone_s.items()},
                f"later than {PROMISED.gone_s * 1000:.0f} ms": str(late),
                "this machine was late": f"{scheduling.latest_s * 1000:.1f} ms at most",
            },
            self._violations,
        )

    # -- workers ---------------------------------------------------------------------------------------------
    def _death_seen(self, bridge: LuaHostBridge) -> float:
        """Kill a worker in a call that has begun; return when the caller knew it."""
        bridge.call(PROBE, 0)
        with closing(worker_of(bridge, PROBE)) as worker, ThreadPoolExecutor(1) as pool:
            idle_ticks = _ticks(worker.pid)
            running = pool.submit(_failed, bridge)
            eventually(lambda: _ticks(worker.pid) >= idle_ticks + RUNNING_TICKS, "the contract runs")
            killed_s = time.monotonic()
            worker.kill()
            error, seen_s = running.result(LIMIT_S)
        if not isinstance(error, WorkerCrashed) or error.began != "yes":
            self._violations.append(f"a call whose worker was killed ended with {error!r}")
        return seen_s - killed_s

    def _overshoot(self, bridge: LuaHostBridge) -> float:
        budget_s = self._rng.uniform(*BUDGETS_S)
        started_s = time.monotonic()
        error = failure(bridge, PROBE, 1, timeout=budget_s)
        late_s = time.monotonic() - started_s - budget_s
        if not isinstance(error, DeadlineExceeded):
            self._violations.append(f"an endless call ended with {error!r}")
        return late_s

    def _next_call(self, bridge: LuaHostBridge, number: int, spares: int = 1) -> tuple[float, float]:
        """Crash a contract; return what a call took before it, and what the next one took."""
        if number % CRASHES_IN_A_ROW == 0:
            bridge.revive(PROBE)
        bridge.call(PROBE, 0, None, 4)
        eventually(lambda: _hardened_spares(bridge) >= spares, "the spares are warm")
        usual_s = _timed(bridge)
        error = failure(bridge, PROBE, 1)
        after_s = _timed(bridge)
        if not isinstance(error, WorkerCrashed):
            self._violations.append(f"a crash ended with {error!r}")
        return usual_s, after_s

    # -- everything else -------------------------------------------------------------------------------------
    def _kill_each(self, victim: str, kills: int) -> Iterator[float]:
        """Kill a broker or a worker host again and again, and now and then the parent; give when all was back."""
        left = kills
        while left:
            with _serving() as serving, LuaHostBridge.connect(serving.run_directory) as bridge:
                deploy(bridge, DOUBLE, HEALTHY, sandbox="hardened")
                for _ in range(min(left, KILLS_IN_A_ROW)):
                    yield self._back_after(victim, serving, bridge)
                    left -= 1
                with serving.processes() as processes:
                    killed_s = time.monotonic()
                    processes.parent.kill()
                    self._await_end(processes.all, "parent", killed_s)

    def _back_after(self, victim: str, serving: Serving, bridge: LuaHostBridge) -> float:
        """Kill one; return when a host that had been there before was served again."""
        eventually(lambda: _is_served(bridge), "it is served")
        with serving.processes() as processes:
            killed = processes.broker if victim == "broker" else processes.worker_host
            spared = {processes.parent, killed} if victim == "broker" else {processes.parent, processes.broker, killed}
            killed_s = time.monotonic()
            killed.kill()
            assert killed.ends_within()
            with ThreadPoolExecutor(1) as pool:
                back = pool.submit(_served_at, bridge)
                self._await_end([each for each in processes.all if each not in spared], victim, killed_s)
                return back.result(2 * LIMIT_S) - killed_s

    def _kill_embedded_host(self) -> None:
        """Kill a host in a call to its own service, all of which must end."""
        command = [sys.executable, "-m", "tests.support.host", "calling"]
        with child_process(command, stdin=PIPE, stdout=PIPE, cwd=ROOT, start_new_session=True) as host:
            assert host.stdout is not None
            ready = json.loads(host.stdout.readline())
            with Processes(ready["parent"], ready["broker"]) as processes:
                killed_s = time.monotonic()
                host.kill()
                self._await_end(processes.all, "embedded host", killed_s)

    def _await_end(self, doomed: Sequence[Process], victim: str, killed_s: float) -> None:
        """Note when all are gone whom nobody needs after a death."""
        for each in doomed:
            assert each.ends_within(), f"{each} has not outlived the {victim}"
        self._gone_s.setdefault(victim, []).append(time.monotonic() - killed_s)

    # -- what is to hold -------------------------------------------------------------------------------------
    def _judge(self, late_s: Sequence[float], back_s: dict[str, list[float]], slack_s: float) -> None:
        """Compare with what is promised."""
        limits = self._limits
        found = [f"an answer came {each:.3f} s after its deadline" for each in late_s if each > GRACE_S + slack_s]
        for victim, times_s in back_s.items():
            late = [each for each in times_s if each > limits.back_s + slack_s]
            found += [f"the service was back {each:.3f} s after the death of the {victim}" for each in late]
        for victim, times_s in self._gone_s.items():
            late = [each for each in times_s if each > limits.gone_s + slack_s]
            found += [f"somebody was still there {each:.3f} s after the death of the {victim}" for each in late]
        self._violations += found


# -- services and what they tell -----------------------------------------------------------------------------
@contextmanager
def _serving(*options: str) -> Iterator[Serving]:
    with tempfile.TemporaryDirectory(prefix="recovery-") as directory:
        run_directory = Path(directory) / "run"
        run_directory.mkdir(mode=0o700)
        with Serving(run_directory, *options, log_level="critical") as serving:
            yield serving


@contextmanager
def _service(*options: str) -> Iterator[LuaHostBridge]:
    with _serving(*options) as serving, LuaHostBridge.connect(serving.run_directory) as bridge:
        yield bridge


def _hardened_spares(bridge: LuaHostBridge) -> int:
    workers = bridge.health()["workers"]
    return sum(each["state"] == "blank" and each["sandbox"] == "hardened" for each in workers)


def _failed(bridge: LuaHostBridge) -> tuple[LuacellError, float]:
    return failure(bridge, PROBE, 1), time.monotonic()


def _timed(bridge: LuaHostBridge) -> float:
    started_s = time.monotonic()
    bridge.call(PROBE, 0, None, 4)
    return time.monotonic() - started_s


def _served_at(bridge: LuaHostBridge) -> float:
    eventually(lambda: _is_served(bridge), "it is served again")
    return time.monotonic()


def _is_served(bridge: LuaHostBridge) -> bool:
    with suppress(LuacellError):
        return answers(bridge, HEALTHY)
    return False


def _ticks(pid: int) -> int:
    """Return the processor time of a process so far, in ticks."""
    with open(f"/proc/{pid}/stat", "rb") as status:
        return int(status.read().rpartition(b")")[2].split()[11])


# -- figures -------------------------------------------------------------------------------------------------
def percentile(seconds: Sequence[float], percent: int) -> float:
    """Return the value below which so many in a hundred lie."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def shown(seconds: Sequence[float]) -> str:
    """Return p50/p99/max in milliseconds."""
    chosen = percentile(seconds, 50), percentile(seconds, 99), max(seconds)
    return "/".join(f"{each * 1000:.1f}" for each in chosen) + " ms"


def verdict(seconds: Sequence[float], target_s: float, beside: Sequence[float] = (0.0,)) -> str:
    """Say whether half of them took as long as they should at most, beside others; a target, and no promise."""
    is_kept = percentile(seconds, 50) - percentile(beside, 50) <= target_s
    return f"p50 at most {target_s * 1000:.0f} ms{' longer' if any(beside) else ''}: {'kept' if is_kept else 'missed'}"


def run(seed: int, rounds: int = 200, limits: Limits = PROMISED) -> Report:
    """Measure each so often."""
    return Recovery(random.Random(seed), rounds, limits).run()
