"""Everything at once: 400 calls/s of four processes with threads, hostile calls among them, kill -9 and SIGSTOP.

Every twentieth call misbehaves (`hostile.py`), while workers, the worker host, the broker and the hosts themselves are
killed or stopped at random. What each host was told is heard over a pipe, line by line, and judged at the end. A
call whose host was killed needs no answer; one whose host was stopped may be late by as long as that was.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from luacell.client import LuacellError, LuaHostBridge
from tests.soak.history import GRACE_S, VALUE, WRONG, End, Entry, percentiles
from tests.soak.hostile import DOUBLED, HEALTHY_NAMES, HOSTILE, name_of, outcomes_of, source_of
from tests.soak.load import TIMEOUT_S
from tests.soak.remains import remains
from tests.soak.report import Report
from tests.support.contracts import answers, deploy, function
from tests.support.holdings import holdings
from tests.support.processes import Process, Processes, descriptors_of, resident_kib
from tests.support.scheduling import Scheduling
from tests.support.serving import Serving
from tests.support.waiting import LIMIT_S, eventually

HOSTS, RATE = 4, 400.0
LASTS_S = 60
COPIES = 3  # of each hostile contract
OPTIONS = ("--max-restarts", "1000000")
VICTIMS = {"worker": 12, "host": 3, "worker host": 2, "broker": 2}  # and how often each, among these
PAUSES_S = (0.05, 0.4)  # between two deeds
STOPS_S = (0.01, 0.3)
DEADLINE = "20s"  # of healthy contracts; calls bring a timeout
LIMITS = {"memory": "16MiB", "deadline": "1s"}


@dataclass
class Host:
    """A process that calls, and what it has told so far."""

    process: subprocess.Popen[bytes]
    entries: dict[int, Entry] = field(default_factory=dict)
    stops: list[tuple[float, float]] = field(default_factory=list)  # from when to when, monotonic seconds
    is_killed: bool = False

    def hear(self) -> None:
        """Take lines until there will be no more."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            match line.decode().rstrip("\n").split("\t"):
                case ["sent", number, contract, sent, timeout]:
                    self.entries[int(number)] = Entry(int(number), contract, float(sent), float(timeout))
                case ["ended", number, outcome, ended]:
                    self.entries[int(number)].ends.append(End(outcome, float(ended)))

    def stopped_s(self, since_s: float, until_s: float) -> float:
        return sum(max(0.0, min(until_s, end) - max(since_s, start)) for start, end in self.stops)

    def faults(self, slack_s: float) -> list[str]:
        """Say what is against the promises."""
        found = [text for entry in self.entries.values() for text in self._faults_of(entry, slack_s)]
        if self.process.returncode and not self.is_killed:
            found.append(f"host {self.process.pid} ended by itself, with {self.process.returncode}")
        return found

    def _faults_of(self, entry: Entry, slack_s: float) -> list[str]:
        title = f"call {entry.number} of host {self.process.pid} to {entry.contract}"
        found = []
        if len(entry.ends) != 1 and not (self.is_killed and not entry.ends):
            found.append(f"{title} was answered {len(entry.ends)} times")
        for end in entry.ends:
            if end.outcome not in outcomes_of(entry.contract):
                found.append(f"{title} ended with {end.outcome} after {end.ended_s - entry.sent_s:.3f} s")
            late_s = end.ended_s - entry.sent_s - entry.timeout_s - self.stopped_s(entry.sent_s, end.ended_s)
            if late_s > GRACE_S + slack_s:
                found.append(f"{title} ended {late_s:.3f} s after its deadline, with {end.outcome}")
        return found


class Chaos:
    """One run.

    Args:
        directory: an empty one.
        rng: of all chance but the moments at which processes run.
        copies: of each hostile contract.
        timeout_s: of healthy calls, in which a service that was killed must be back.
    """

    def __init__(self, directory: Path, rng: random.Random, copies: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._run_directory = directory / "run"
        self._state_directory = directory / "state"
        for each in (self._run_directory, self._state_directory):
            each.mkdir(mode=0o700)
        self._rng = rng
        self._copies = copies
        self._hosts: list[Host] = []
        self._threads: list[threading.Thread] = []
        self._deeds: Counter[str] = Counter()
        self._pause = threading.Event()

    def run(self, lasts_s: float) -> Report:
        before = holdings()
        self._serving = Serving(self._run_directory, *OPTIONS, state_directory=self._state_directory)
        try:
            with LuaHostBridge.connect(self._run_directory) as control:
                self._register(control)
                at_first = self._sizes()
                with Scheduling() as scheduling:
                    self._make_chaos(lasts_s)
                violations = [text for host in self._hosts for text in host.faults(scheduling.slack_s)]
                violations += self._unserved(control)
                at_last = self._sizes()
        finally:
            self._end_hosts()
            self._serving.stop()
        violations += remains(self._run_directory, before)
        return self._report(lasts_s, scheduling, {"at first": at_first, "at last": at_last}, violations)

    def _register(self, bridge: LuaHostBridge) -> None:
        for number, name in enumerate(HEALTHY_NAMES):
            settings: dict[str, int | bool] = {"stateless": True, "workers": 2} if number % 2 else {}
            deploy(bridge, function(DOUBLED), name, deadline=DEADLINE, **settings)
            assert answers(bridge, name)
        for misdeed in HOSTILE:
            for copy in range(self._copies):
                deploy(bridge, source_of(misdeed), name_of(misdeed, copy), **LIMITS)

    # -- hosts -----------------------------------------------------------------------------------------------
    def _start_host(self) -> Host:
        words = (self._run_directory, self._rng.randrange(1 << 32), RATE / HOSTS, self._copies, self._timeout_s)
        command = [sys.executable, "-m", "tests.soak.chaos_host", *map(str, words)]
        host = Host(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        thread = threading.Thread(target=host.hear, name=f"ears for host {host.process.pid}")
        thread.start()
        self._threads.append(thread)
        self._hosts.append(host)
        return host

    def _end_hosts(self) -> None:
        """Let them finish what they have begun, and hear it."""
        for host in self._hosts:
            assert host.process.stdin is not None
            host.process.stdin.close()
        for host in self._hosts:
            with suppress(subprocess.TimeoutExpired):
                host.process.wait(LIMIT_S)
            host.process.kill()
            host.process.wait()
        for thread in self._threads:
            thread.join()
        for host in self._hosts:
            assert host.process.stdout is not None
            host.process.stdout.close()

    # -- chaos -----------------------------------------------------------------------------------------------
    def _make_chaos(self, lasts_s: float) -> None:
        alive = [self._start_host() for _ in range(HOSTS)]
        for host in alive:
            eventually(lambda host=host: host.entries, "a host calls")  # type: ignore[misc]
        until_s = time.monotonic() + lasts_s
        while time.monotonic() < until_s:
            self._pause.wait(self._rng.uniform(*PAUSES_S))
            (victim,) = self._rng.choices(list(VICTIMS), list(VICTIMS.values()))
            if victim == "host":
                place = self._rng.randrange(HOSTS)
                if self._harm_host(alive[place]):
                    alive[place] = self._start_host()
                continue
            with suppress(LuacellError, AssertionError, ProcessLookupError), self._serving.processes() as processes:
                self._harm(victim, self._chosen(victim, processes))
        self._end_hosts()

    def _chosen(self, victim: str, processes: Processes) -> Process:
        if victim == "worker":
            workers = processes.look_again()
            assert workers, "there is no worker"
            return self._rng.choice(workers)
        return processes.broker if victim == "broker" else processes.worker_host

    def _harm_host(self, host: Host) -> bool:
        """Kill or stop a host; tell whether it was killed."""
        with closing(Process(host.process.pid)) as process:
            started_s = time.monotonic()
            host.is_killed = self._harm("host", process)
            host.stops.append((started_s, time.monotonic()))
            if host.is_killed:
                host.process.wait()
        return host.is_killed

    def _harm(self, victim: str, process: Process) -> bool:
        if self._rng.random() < 0.5:
            process.kill()
            self._deeds[f"{victim} killed"] += 1
            return process.ends_within()
        with process.stopped():
            self._pause.wait(self._rng.uniform(*STOPS_S))
        self._deeds[f"{victim} stopped"] += 1
        return False

    # -- what is to hold -------------------------------------------------------------------------------------
    def _unserved(self, bridge: LuaHostBridge) -> list[str]:
        """Say which healthy contract does not come back, though nothing is done to it any more."""
        found = []
        for name in HEALTHY_NAMES:
            try:
                eventually(lambda name=name: _answers(bridge, name), f"{name} answers")  # type: ignore[misc]
            except AssertionError as error:
                found.append(str(error))
        return found

    def _sizes(self) -> str:
        with self._serving.processes() as processes:
            parts = {"broker": processes.broker, "worker host": processes.worker_host}
            return ", ".join(
                f"{name} {resident_kib(part.pid)} KiB {descriptors_of(part.pid).total()} descriptors"
                for name, part in parts.items()
            )

    def _report(self, lasts_s: float, scheduling: Scheduling, sizes: dict[str, str], violations: list[str]) -> Report:
        entries = [entry for host in self._hosts for entry in host.entries.values()]
        ends = [(entry, end) for entry in entries for end in entry.ends]
        healthy = Counter(end.outcome for entry, end in ends if entry.contract in HEALTHY_NAMES)
        hostile = Counter(end.outcome for entry, end in ends if entry.contract not in HEALTHY_NAMES)
        values_s = [end.ended_s - entry.sent_s for entry, end in ends if end.outcome == VALUE]
        return Report(
            "chaos",
            {
                "calls": f"{len(entries)} ({len(entries) / lasts_s:.0f}/s)",
                "healthy": _counted(healthy),
                "hostile": f"{hostile.total()}: {_counted(hostile)}",
                "died with their host": str(len(entries) - len({id(entry) for entry, _ in ends})),
                "wrong values": str(healthy[WRONG] + hostile[WRONG]),
                "done to processes": _counted(self._deeds),
                "values after p50/p99/max": percentiles(values_s),
                "scheduling slack": f"{scheduling.slack_s * 1000:.0f} ms",
                **sizes,
            },
            violations,
        )


def _answers(bridge: LuaHostBridge, name: str) -> bool:
    with suppress(LuacellError):
        return answers(bridge, name)
    return False


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counter.most_common())


def run(seed: int, lasts_s: float = LASTS_S, copies: int = COPIES, timeout_s: float = TIMEOUT_S) -> Report:
    """Make chaos for so long."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        return Chaos(Path(directory), random.Random(seed), copies, timeout_s).run(lasts_s)
