"""A storm of crashes over many contracts beside healthy calls, which must not notice."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from luacell.client import CallError, LuaFunction, LuaHostBridge
from tests.soak.history import VALUE, History
from tests.soak.load import Load
from tests.soak.report import Report
from tests.support.contracts import DOUBLE, HEALTHY, answers, function
from tests.support.processes import Processes, descriptors_of, resident_kib
from tests.support.serving import Serving
from tests.support.waiting import LIMIT_S, settles

CRASHES: Final = 50  # a second
CALLS: Final = 200  # a second
LASTS_S: Final = 15.0
CRASHING: Final = 200  # contracts: none crashes five times in a run, so that none is put into quarantine
GROWTH_MAX_KIB: Final = 5 * 1024  # of the broker
CRASH: Final = function("if fn_id > 0 then ffi.cast('volatile int *', 0)[0] = 1 end")


def run(seed: int, lasts_s: float = LASTS_S) -> Report:
    """Crash and call for so long."""
    history = History(errors=())
    outcomes: Counter[str] = Counter()
    violations: list[str] = []
    with tempfile.TemporaryDirectory(prefix="storm-") as directory, ExitStack() as stack:
        run_directory = Path(directory) / "run"
        run_directory.mkdir(mode=0o700)
        stack.enter_context(Serving(run_directory, log_level="critical"))
        bridge = stack.enter_context(LuaHostBridge.connect(run_directory))
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        for number in range(CRASHING):
            bridge.register_host_contract(f"host.crash{number}@1", LuaFunction(CRASH))
        assert answers(bridge, HEALTHY)
        processes = stack.enter_context(Processes.of(bridge))
        broker = processes.broker
        before, held = resident_kib(broker.pid), sum(descriptors_of(broker.pid).values())
        with Load(run_directory, history, [HEALTHY], hosts=2, threads=2, rate=CALLS):
            due_s, started_s = time.monotonic(), time.monotonic()
            threads: list[threading.Thread] = []
            number = 0
            while time.monotonic() - started_s < lasts_s:
                thread = threading.Thread(target=_crash, args=(bridge, number % CRASHING, outcomes, violations))
                thread.start()
                threads.append(thread)
                number += 1
                due_s += 1 / CRASHES
                time.sleep(max(0.0, due_s - time.monotonic()))
            for thread in threads:
                thread.join(LIMIT_S)
        after = resident_kib(broker.pid)
        if not broker.is_alive:
            violations.append("the broker died")
        settles(lambda: bridge.health()["slots_in_flight"], 0, "all slots are free")
        left = sum(descriptors_of(broker.pid).values())
    violations += history.violations()
    healthy = history.outcomes()
    violations += [f"{count} healthy calls ended with {name}" for name, count in healthy.items() if name != VALUE]
    if sum(outcomes.values()) != number:
        violations.append(f"{number - sum(outcomes.values())} of {number} crashing calls were not answered once")
    if after - before > GROWTH_MAX_KIB:
        violations.append(f"the broker has grown by {after - before} KiB")
    return Report(
        "crash storm",
        {
            "crashes": f"{number} ({number / lasts_s:.0f}/s): "
            + ", ".join(f"{count} {name}" for name, count in outcomes.most_common()),
            "healthy calls": f"{healthy[VALUE]} of {len(history.entries)} ({len(history.entries) / lasts_s:.0f}/s)",
            "broker": f"{before} KiB {after - before:+d}, descriptors {held} {left - held:+d}",
        },
        violations,
    )


def _crash(bridge: LuaHostBridge, number: int, outcomes: Counter[str], violations: list[str]) -> None:
    """Make one call that crashes; BUSY is an answer too, as long as it comes."""
    try:
        bridge.call(f"host.crash{number}@1", 1, timeout=5)
    except CallError as error:
        name = type(error).__name__
    else:
        name = VALUE
    outcomes[name] += 1
    if name not in ("WorkerCrashed", "Busy"):
        violations.append(f"a crash ended with {name}")
