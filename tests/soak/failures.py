"""Fail the n-th operation: of each kind, in each process, with each plausible error, until a run meets no failure.

A run is a host's short life (it connects, registers, calls, grows, crashes and times out contracts, unregisters,
leaves) while the n-th memfd_create, fork, send … fails once. Every step must give its value or a typed error, in its
time; afterwards the service must serve, and hold what it held before.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path

from luacell.client import BridgeError, CallError, LuacellError, LuaFunction, LuaHostBridge
from tests.soak.history import GRACE_S
from tests.soak.report import Report
from tests.support.contracts import DOUBLE, HEALTHY, answers, function
from tests.support.failing import OPERATIONS, Control, program
from tests.support.processes import Holdings, Processes, processes_with
from tests.support.scheduling import Scheduling
from tests.support.serving import Serving
from tests.support.waiting import LIMIT_S, eventually, settles

VICTIM = "host.victim@1"
SOURCE = function("""
  if fn_id == 1 then ffi.cast("int *", 0)[0] = 1 end
  if fn_id == 2 then while true do end end
  if out ~= nil then ffi.copy(out, args, fn_id) end
""")
TIMEOUT_S = 2.0
LATE_S = 0.12  # a call that is killed at its deadline
LARGE = 300_000
REQUEST_S = 10.0  # what registering and leasing may take
NUMBER_MAX = 200  # operations of one kind in a run, by far
OPTIONS = ("--max-restarts", "1000000")

Place = tuple[str, str, int]  # operation, role of the process, error

# Where each operation is made. What only a start makes (bind, and opening the registry) has runs of its own.
PLACES: dict[str, tuple[str, ...]] = {
    "memfd_create": ("broker",),
    "fallocate": ("broker",),
    "seal": ("broker",),
    "mmap": ("broker", "worker"),
    "pidfd_open": ("worker host", "parent"),
    "peer_pidfd": ("broker",),
    "fork": ("worker host",),
    "pipe": ("worker host",),
    "socketpair": ("worker host",),
    "accept": ("broker",),
    "recv": ("broker", "worker host", "worker"),
    "send": ("broker", "worker host"),
    "send_descriptors": ("broker", "worker host"),
    "zmq_send": ("broker",),
    "epoll_ctl": ("broker", "worker host"),
    "waitid": ("worker host",),
    "kill": ("worker host",),
    "sqlite": ("broker",),
    "log": ("broker", "worker host"),
}


@dataclass
class Tally:
    """What came of all runs."""

    runs: int = 0
    failures: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    slack_s: float = 0.0  # that was granted to the machine

    def report(self, title: str, place_count: int, unmet: Sequence[Place]) -> Report:
        """Make a report of it.

        Args:
            title: of the runs.
            place_count: places that were tried.
            unmet: those where nothing of the kind was done, so that nothing could fail.
        """
        figures = {
            "places": f"{place_count - len(unmet)} of {place_count} met",
            "runs": f"{self.runs}, {self.failures} with a failure",
            "outcomes": _counted(self.outcomes),
            "restarts": _counted(self.restarts),
            "slack for the machine": f"{self.slack_s * 1000:.0f} ms",
        }
        return Report(title, figures, self.violations)


class Failures:
    """One service and its runs.

    Args:
        directory: an empty one.
    """

    def __init__(self, directory: Path) -> None:
        self.tally = Tally()
        self._stack = ExitStack()
        self._scheduling = self._stack.enter_context(Scheduling())
        self._run_directory = directory / "run"
        self._run_directory.mkdir(mode=0o700)
        self.control = self._stack.enter_context(Control(directory / "control"))
        self._serving = self._stack.enter_context(
            Serving(self._run_directory, *OPTIONS, log_level="info", program=program(self.control))
        )
        self._bridge = self._stack.enter_context(LuaHostBridge.connect(self._run_directory))
        self._bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        assert answers(self._bridge, HEALTHY)
        self._life("", "")  # what is made at first is there before the first look

    def __enter__(self) -> Failures:
        return self

    def __exit__(self, *_: object) -> None:
        self.tally.slack_s = self._scheduling.slack_s
        self._stack.close()

    def run(self, operation: str, role: str, code: int, number_max: int = NUMBER_MAX) -> int:
        """Let the first, second … of these operations fail; return how many runs met a failure."""
        for number in range(1, number_max + 1):
            if not self.run_once(operation, role, code, number):
                return number - 1
        return number_max

    def run_once(self, operation: str, role: str, code: int, number: int) -> bool:
        """Let one operation fail; tell whether it was met."""
        title = f"{operation} {number} of the {role} with error {code}"
        before = self._at_rest(title)
        with Processes.of(self._bridge) as processes:
            self.control.arm(operation, role, code, number)
            self._life(title, role)
            met = self.control.disarm()
            self.tally.runs += 1
            self.tally.failures += met
            self._recover(title)
            for name, process in (("broker", processes.broker), ("worker host", processes.worker_host)):
                if not process.is_alive:
                    self.tally.restarts[f"{name}: {operation}"] += 1
        after = self._at_rest(title, before)
        if before is None or after != before:
            self.tally.violations.append(f"{title}: {_difference(before, after)}")
        return met

    # -- a host's life -------------------------------------------------------------------------------------------
    def _life(self, title: str, role: str) -> None:
        try:
            bridge = LuaHostBridge.connect(self._run_directory)
        except LuacellError as error:
            self.tally.outcomes[type(error).__name__] += 1
            return
        steps: Sequence[tuple[Callable[[], object], object, float]] = (
            (lambda: bridge.register_host_contract(VICTIM, LuaFunction(SOURCE)), None, REQUEST_S),
            (lambda: bridge.call(VICTIM, 4, b"1234", 4, timeout=TIMEOUT_S), b"1234", TIMEOUT_S),
            (lambda: bridge.call(VICTIM, LARGE, bytes(LARGE), LARGE, timeout=TIMEOUT_S), bytes(LARGE), TIMEOUT_S),
            (lambda: bridge.call(VICTIM, 1, timeout=TIMEOUT_S), None, TIMEOUT_S),
            (lambda: bridge.call(VICTIM, 4, b"5678", 4, timeout=TIMEOUT_S), b"5678", TIMEOUT_S),
            (lambda: bridge.call(VICTIM, 2, timeout=LATE_S), None, LATE_S),
            (lambda: bridge.call(VICTIM, 4, b"9abc", 4, timeout=TIMEOUT_S), b"9abc", TIMEOUT_S),
            (lambda: bridge.unregister_host_contract(VICTIM), None, REQUEST_S),
        )
        try:
            for place, (step, wanted, limit_s) in enumerate(steps):
                self._note(f"{title}: step {place}", step, wanted, limit_s)
        finally:
            started_s = time.monotonic()
            bridge.close()
            if time.monotonic() - started_s > 1.0:
                self.tally.violations.append(f"{title}: close() took {time.monotonic() - started_s:.2f} s")

    def _note(self, title: str, step: Callable[[], object], wanted: object, limit_s: float) -> None:
        started_s = time.monotonic()
        try:
            value = step()
            outcome = "value"
            if value != wanted:
                self.tally.violations.append(f"{title} gave another value")
        except (CallError, BridgeError) as error:
            outcome = type(error).__name__
        except Exception as error:
            outcome = type(error).__name__
            self.tally.violations.append(f"{title} ended with {outcome}: {error}")
        self.tally.outcomes[outcome] += 1
        late_s = time.monotonic() - started_s - limit_s
        if late_s > GRACE_S + self._scheduling.slack_s:
            self.tally.violations.append(f"{title} ended {late_s:.3f} s after its deadline")

    # -- what is to hold -----------------------------------------------------------------------------------------
    def _recover(self, title: str) -> None:
        """Wait until the service serves, and take away what the life has left registered."""

        def serves() -> bool:
            try:
                names = {str(contract) for contract in self._bridge.contracts()}
                if VICTIM in names:
                    self._bridge.unregister_host_contract(VICTIM)
                return answers(self._bridge, HEALTHY)
            except LuacellError:
                return False

        try:
            eventually(serves, f"{title}: the service serves")
        except AssertionError as error:
            self.tally.violations.append(str(error))

    def _at_rest(self, title: str, wanted: Holdings | None = None) -> Holdings | None:
        """Return what is held when nothing moves any more; waits for what is wanted, where that is told."""
        give_up_s = time.monotonic() + LIMIT_S / 4
        seen: Holdings | None = None
        while time.monotonic() < give_up_s:
            last, seen = seen, self._look()
            if seen is not None and (seen == wanted or (wanted is None and seen == last)):
                return seen
            time.sleep(0.01)
        return seen

    def _look(self) -> Holdings | None:
        try:
            states = Counter(worker["state"] for worker in self._bridge.health()["workers"])
            return Holdings.of(self._bridge) if states == {"blank": 1, "idle": 1} else None
        except (LuacellError, FileNotFoundError, ProcessLookupError, AssertionError, StopIteration):
            return None


# What a start does; failures here end in a service that is up all the same, or in a refusal that says why.
STARTS: dict[str, tuple[str, ...]] = {
    "bind": ("broker",),
    "zmq_bind": ("broker",),
    "sqlite": ("broker",),
    "epoll_ctl": ("broker", "worker host"),
    "poll": ("broker",),
    "pidfd_open": ("broker", "parent", "worker host"),
    "pipe": ("broker", "worker host"),
    "accept": ("broker",),
    "recv": ("broker", "worker host"),
    "send": ("broker", "worker host"),
    "fork": ("worker host",),
}
REFUSED = "luacell broker: "


class Starts:
    """Services that start while something fails, one after the other in the same directory."""

    def __init__(self, directory: Path) -> None:
        self.tally = Tally()
        self._run_directory = directory / "run"
        self._run_directory.mkdir(mode=0o700)
        self._control_path = directory / "control"

    def run(self, operation: str, role: str, code: int, number_max: int = NUMBER_MAX) -> int:
        """Let the first, second … of these operations fail; return how many starts met a failure."""
        for number in range(1, number_max + 1):
            with Control(self._control_path) as control:
                control.arm(operation, role, code, number)
                if not self._start(f"{operation} {number} of the starting {role} with error {code}", control):
                    return number - 1
        return number_max

    def _start(self, title: str, control: Control) -> bool:
        self.tally.runs += 1
        try:
            with Serving(self._run_directory, *OPTIONS, program=program(control)) as serving:
                eventually(self._serves, f"{title}: it serves")
                met = control.disarm()
                self.tally.outcomes["served"] += 1
            if serving.process.returncode != 0 and not met:
                self.tally.violations.append(f"{title}: serve ended with {serving.process.returncode}")
        except AssertionError as error:
            met = control.disarm()
            self.tally.outcomes["refused"] += 1
            if REFUSED not in str(error):
                self.tally.violations.append(f"{title}: {error}")
        self.tally.failures += met
        try:
            settles(lambda: len(processes_with(self._run_directory)), 0, "all processes have ended")
        except AssertionError as error:
            self.tally.violations.append(f"{title}: {error}")
        return met

    def _serves(self) -> bool:
        try:
            with LuaHostBridge.connect(self._run_directory) as bridge:
                bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE), replace=True)
                return answers(bridge, HEALTHY)
        except LuacellError:
            return False


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common()) or "none"


def _difference(before: Holdings | None, after: Holdings | None) -> str:
    if before is None or after is None:
        return f"the service does not come to rest{'' if before is None else ' any more'}"
    names = [each.name for each in fields(Holdings) if getattr(before, each.name) != getattr(after, each.name)]
    return "; ".join(f"{name} were {getattr(before, name)}, are {getattr(after, name)}" for name in names)


def run(seed: int) -> Report:
    """Let everything fail that can."""
    places = all_of(PLACES)
    random.Random(seed).shuffle(places)
    lives, starts = run_places(places), run_starts(all_of(STARTS))
    figures = {
        f"{report.title}: {name}": figure for report in (lives, starts) for name, figure in report.figures.items()
    }
    return Report("fail the n-th operation", figures, lives.violations + starts.violations)


def all_of(table: Mapping[str, tuple[str, ...]]) -> list[Place]:
    """Return the places of a table with every error that is plausible there."""
    return [(name, role, code) for name, roles in table.items() for role in roles for code in OPERATIONS[name]]


def run_places(places: Sequence[Place], number_max: int = NUMBER_MAX) -> Report:
    """Let operations fail at these places of a service that runs."""
    with tempfile.TemporaryDirectory(prefix="failures-") as directory, Failures(Path(directory)) as failures:
        unmet = [place for place in places if not failures.run(*place, number_max)]
    return failures.tally.report("lives of a host", len(places), unmet)


def run_starts(places: Sequence[Place]) -> Report:
    """Let operations fail at these places of a service that starts."""
    with tempfile.TemporaryDirectory(prefix="starts-") as directory:
        starts = Starts(Path(directory))
        unmet = [place for place in places if not starts.run(*place)]
    return starts.tally.report("starts of a service", len(places), unmet)
