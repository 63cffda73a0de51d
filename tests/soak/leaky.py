"""Two contracts that leak 10 KB a call, 100,000 calls: they are recycled at their limits, and none fails (row C98).

One has a bound on its memory, the other on its calls. What the first holds is seen from outside, in /proc, while it
is called; how many calls each worker of the other has served is in the service's records.
"""

from __future__ import annotations

import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from luacell.client import CallError, LuaHostBridge
from tests.soak.report import Report
from tests.support.contracts import LEAK, LEAKED, deploy
from tests.support.processes import resident_kib, workers_of
from tests.support.serving import Serving
from tests.support.waiting import LIMIT_S

MAX_RSS: Final = 64 << 20
MAX_CALLS: Final = 5_000  # 50 MB: below the bound on memory that a contract has which says nothing
SHARE_MAX: Final = 0.1  # by which a worker may miss its limit
LOOKS: Final = 10  # at the memory of workers before it is asked which there are
PAUSE_S: Final = 0.002  # between two of them, in which one leaks 100 KB or so
BY_MEMORY, BY_CALLS = "host.by_memory@1", "host.by_calls@1"


class Watch:
    """Looks at the memory of a contract's workers, for the length of a block.

    Attributes:
        highest_kib: what each of them held of its own at most, by pid.
    """

    def __init__(self, bridge: LuaHostBridge, contract: str) -> None:
        self.highest_kib: dict[int, int] = {}
        self._bridge = bridge
        self._contract = contract
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def _run(self) -> None:
        while not self._is_over.is_set():
            pids = workers_of(self._bridge, self._contract)
            for _ in range(LOOKS):
                for pid in pids:
                    with suppress(AssertionError, FileNotFoundError, ProcessLookupError):  # it has ended
                        self.highest_kib[pid] = max(self.highest_kib.get(pid, 0), resident_kib(pid))
                self._is_over.wait(PAUSE_S)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(LIMIT_S)


def run(seed: int, calls: int = 100_000, share_max: float = SHARE_MAX) -> Report:
    """Make so many calls, half of them to each of the two; there is nothing random in it."""
    with tempfile.TemporaryDirectory(prefix="leaky-") as directory:
        run_directory = Path(directory) / "run"
        run_directory.mkdir(mode=0o700)
        with Serving(run_directory, log_level="info") as serving, LuaHostBridge.connect(run_directory) as bridge:
            deploy(bridge, LEAK, BY_MEMORY, stateless=True, sandbox="hardened", max_rss=f"{MAX_RSS >> 20}MiB")
            deploy(bridge, LEAK, BY_CALLS, stateless=True, sandbox="hardened", max_calls=MAX_CALLS)
            started_s = time.monotonic()
            with Watch(bridge, BY_MEMORY) as watch, ThreadPoolExecutor(2) as pool:
                failed = list(pool.map(lambda name: _failures(bridge, name, calls // 2), (BY_MEMORY, BY_CALLS)))
            lasted_s = time.monotonic() - started_s
            by_memory, by_calls = (_recycled(serving, name) for name in (BY_MEMORY, BY_CALLS))
    held = sorted(watch.highest_kib.get(each["pid"], 0) / (MAX_RSS >> 10) for each in by_memory)
    served = sorted(each["served"] / MAX_CALLS for each in by_calls)
    violations = [text for texts in failed for text in texts]
    if not held or not served:
        violations.append(f"{len(held)} workers were recycled by memory, {len(served)} by calls")
    violations += [f"a worker held {share:.2f} of its max_rss" for share in held if abs(share - 1) > share_max]
    violations += [
        f"a worker served {share:.2f} of its max_calls" for share in served if not 1 <= share <= 1 + share_max
    ]
    return Report(
        "contracts that leak 10 KB a call",
        {
            "calls": f"{calls} ({calls / lasted_s:.0f}/s), {sum(map(len, failed))} failed",
            f"recycled at max_rss {MAX_RSS >> 20} MiB": f"{len(held)}, which held {_span(held)} of it",
            f"recycled at max_calls {MAX_CALLS}": f"{len(served)}, which served {_span(served)} of them",
        },
        violations,
    )


def _failures(bridge: LuaHostBridge, name: str, calls: int) -> list[str]:
    """Call one after the other; say what came of those that failed."""
    found = []
    for number in range(calls):
        try:
            bridge.call(name, LEAKED)
        except CallError as error:
            found.append(f"call {number} to {name} ended with {error!r}")
    return found


def _recycled(serving: Serving, name: str) -> list[dict[str, Any]]:
    """Return the records of the deaths of a contract's workers that were recycled."""
    workers = {record["worker"] for record in serving.records("worker recycled", contract=name)}
    return [serving.record("worker died", worker=worker) for worker in sorted(workers)]


def _span(shares: list[float]) -> str:
    return f"{shares[0] * 100:.1f} to {shares[-1] * 100:.1f} %" if shares else "nothing"
