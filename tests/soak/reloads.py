"""A unit is deployed again every 100 ms under calls: none fails, and each sees the old or the new one.

Every deployment writes its number into the sources. A caller knows which number was served when it asked, and which
was on its way when it was answered; and since a unit is served whole, what it asks of the second contract is never
older than what the first has answered.
"""

from __future__ import annotations

import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from luacell.client import LuaHostBridge
from tests.soak.history import VALUE, History, percentiles
from tests.soak.report import Report
from tests.support.contracts import function
from tests.support.serving import Serving
from tests.support.waiting import LIMIT_S

ALONE, SHARED = "host.alone@1", "host.shared@1"
MANIFEST = f"""
name = "numbered"
[contract."{ALONE}"]
source = "alone.lua"
[contract."{SHARED}"]
source = "shared.lua"
stateless = true
workers = 2
"""
HOSTS, THREADS, RATE = 4, 4, 400.0
INTERVAL_S = 0.1
TIMEOUT_S = 5.0
SPINS = 50_000  # a tenth of a millisecond once compiled, so that replacements meet calls


class Reloads:
    """One run.

    Args:
        directory: an empty one.
    """

    def __init__(self, directory: Path) -> None:
        self._run_directory = directory / "run"
        self._unit = directory / "unit"
        self._run_directory.mkdir(mode=0o700)
        self._unit.mkdir()
        (self._unit / "luacell.toml").write_text(MANIFEST)
        self._history = History(errors=())
        self._is_over = threading.Event()
        self._on_its_way = self._served = 0
        self._violations: list[str] = []

    def run(self, lasts_s: float) -> Report:
        reload_s: list[float] = []
        with Serving(self._run_directory, log_level="warning") as serving, ExitStack() as stack:
            control = stack.enter_context(LuaHostBridge.connect(self._run_directory))
            self._deploy(control)
            bridges = [control, *(LuaHostBridge.connect(self._run_directory) for _ in range(HOSTS - 1))]
            for bridge in bridges[1:]:
                stack.enter_context(bridge)
            callers = [threading.Thread(target=self._call, args=(bridge,)) for bridge in bridges * THREADS]
            for caller in callers:
                caller.start()
            started_s = due_s = time.monotonic()
            try:
                while time.monotonic() < started_s + lasts_s:
                    reload_s.append(-time.monotonic())
                    self._deploy(control)
                    reload_s[-1] += time.monotonic()
                    due_s = max(due_s + INTERVAL_S, time.monotonic())
                    self._is_over.wait(due_s - time.monotonic())
            finally:
                self._is_over.set()
                for caller in callers:
                    caller.join(LIMIT_S)
            lasted_s = time.monotonic() - started_s
            self._violations += ["a caller hangs" for caller in callers if caller.is_alive()]
            deaths = serving.records("worker died", level="warning")
        self._violations += self._history.violations() + [f"a worker died: {death}" for death in deaths]
        return self._report(lasted_s, reload_s)

    def _deploy(self, bridge: LuaHostBridge) -> None:
        number = self._on_its_way + 1
        for name in ("alone", "shared"):
            source = function(f"""
              local sum = 0
              for step = 1, {SPINS} do sum = sum + step % 7 end
              ffi.cast("uint32_t *", out)[0] = {number} + (sum < 0 and 1 or 0)
            """)
            (self._unit / f"{name}.lua").write_text(source)
        self._on_its_way = number
        bridge.deploy(self._unit)
        self._served = number

    def _call(self, bridge: LuaHostBridge) -> None:
        pause_s = HOSTS * THREADS / RATE
        due_s, number, before = time.monotonic(), 0, 0
        while not self._is_over.wait(max(0.0, due_s - time.monotonic())):
            contract = (ALONE, SHARED)[number % 2]
            least = max(before, self._served)
            entry = self._history.sent(contract, TIMEOUT_S)
            try:
                before = int.from_bytes(bridge.call(contract, 0, b"", 4, timeout=TIMEOUT_S), "little")
            except Exception as error:
                self._history.ended(entry, f"{type(error).__name__}: {error}")
            else:
                is_old_or_new = least <= before <= self._on_its_way
                wrong = f"number {before}, which is not in {least}..{self._on_its_way}"
                self._history.ended(entry, VALUE if is_old_or_new else wrong)
            number += 1
            due_s = max(due_s + pause_s, time.monotonic() - 1.0)

    def _report(self, lasted_s: float, reload_s: list[float]) -> Report:
        calls = len(self._history.entries)
        outcomes = self._history.outcomes()
        return Report(
            "a unit deployed again and again under calls",
            {
                "deployments": f"{len(reload_s)} ({len(reload_s) / lasted_s:.1f}/s)",
                "each (p50/p99/max)": percentiles(reload_s),
                "calls": f"{calls} ({calls / lasted_s:.0f}/s), {calls - outcomes[VALUE]} failed",
                "answers (p50/p99/max)": percentiles(
                    [entry.ends[0].ended_s - entry.sent_s for entry in self._history.entries if entry.ends]
                ),
            },
            self._violations,
        )


def run(seed: int = 0, lasts_s: float = 30.0) -> Report:
    """Deploy and call for a while; there is nothing random in it."""
    with tempfile.TemporaryDirectory(prefix="reloads-") as directory:
        return Reloads(Path(directory)).run(lasts_s)
