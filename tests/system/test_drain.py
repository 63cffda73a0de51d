"""A broker that is told to end finishes what it has; whoever waits longer than it may is told so."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from luacell.client import CallError, Cancelled, LuaHostBridge, Unavailable, WorkerCrashed
from tests.support.contracts import DOUBLE, GATED, HEALTHY, PROBE, answers, deploy, failure
from tests.support.pending import has_begun
from tests.support.serving import Serving, listens
from tests.support.waiting import LIMIT_S, eventually

# A broker whose patience is short.
BROKER = """
import sys
from luacell.broker import server
server.DRAIN_LIMIT_NS = int(sys.argv[1]) * 1_000_000
from luacell.broker.__main__ import main
sys.exit(main(["--run-dir", sys.argv[2], "--log-level", "error"]))
"""


class Parts:
    """A broker and a worker host of the test's own."""

    def __init__(self, run_directory: Path, drain_limit_ms: int) -> None:
        self.run_directory = run_directory
        broker = [sys.executable, "-P", "-c", BROKER, str(drain_limit_ms), str(run_directory)]
        host = [sys.executable, "-P", "-m", "luacell.worker", "--run-dir", str(run_directory), "--log-level", "error"]
        self._stack = ExitStack()
        self.broker, self.worker_host = (self._start(command) for command in (broker, host))
        eventually(lambda: listens(run_directory), "the broker listens")

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        process = self._stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        self._stack.callback(process.kill)
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@pytest.fixture
def run_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="drain-") as directory:
        yield Path(directory) / "run"


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """What calls wait for; it is not there yet."""
    return tmp_path / "gate"


def call(pool: ThreadPoolExecutor, bridge: LuaHostBridge, gate: Path) -> Future[bytes]:
    """Call a contract that waits for the gate, and wait until the broker has the call."""
    before = bridge.health()["slots_in_flight"]
    args = bytes(gate)
    pending = pool.submit(bridge.call, PROBE, len(args), args, 1)
    eventually(lambda: bridge.health()["slots_in_flight"] > before, "the call is under way")
    return pending


def test_p15_calls_in_flight_and_in_the_queue_are_finished_and_later_ones_refused(
    run_directory: Path, gate: Path
) -> None:
    with (
        Parts(run_directory, 20_000) as parts,
        LuaHostBridge.connect(run_directory) as bridge,
        LuaHostBridge.connect(run_directory) as other,
        ThreadPoolExecutor(8) as pool,
    ):
        deploy(bridge, GATED, deadline="20s")
        deploy(bridge, DOUBLE, HEALTHY)
        assert answers(other, HEALTHY)
        pending = [call(pool, bridge, gate) for _ in range(4)]
        parts.broker.send_signal(signal.SIGTERM)
        eventually(lambda: other.health()["state"] == "draining", "it drains")
        refused = failure(other, HEALTHY, args=bytes(4), out_size=4, timeout=0.3)
        assert isinstance(refused, Unavailable)
        assert refused.began == "no"
        gate.touch()
        assert [each.result(LIMIT_S) for each in pending] == [bytes([42])] * 4
        assert parts.broker.wait(LIMIT_S) == 0


def test_p15_who_waits_longer_than_the_broker_may_is_cancelled(run_directory: Path, gate: Path) -> None:
    with (
        Parts(run_directory, 300) as parts,
        LuaHostBridge.connect(run_directory) as bridge,
        ThreadPoolExecutor(8) as pool,
    ):
        deploy(bridge, GATED, deadline="20s")
        running, waiting = (call(pool, bridge, gate) for _ in range(2))
        eventually(lambda: has_begun(bridge), "the first one has begun")
        parts.broker.send_signal(signal.SIGTERM)
        for pending, began in ((running, "yes"), (waiting, "no")):
            error = pending.exception(LIMIT_S)
            assert isinstance(error, Cancelled)
            assert error.began == began
            assert "shutting down" in error.message
        assert parts.broker.wait(LIMIT_S) == 0
        parts.worker_host.wait(LIMIT_S)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_p15_second_signal_ends_it_at_once(run_directory: Path, gate: Path, second: int) -> None:
    with (
        Parts(run_directory, 20_000) as parts,
        LuaHostBridge.connect(run_directory) as bridge,
        LuaHostBridge.connect(run_directory) as other,
        ThreadPoolExecutor(8) as pool,
    ):
        deploy(bridge, GATED, deadline="20s")
        running = call(pool, bridge, gate)
        parts.broker.send_signal(signal.SIGTERM)
        eventually(lambda: other.health()["state"] == "draining", "it drains")
        parts.broker.send_signal(second)
        error = running.exception(LIMIT_S)
        assert isinstance(error, Unavailable)
        assert error.began in ("yes", "unknown"), "a worker had it, and may have come to it"
        assert parts.broker.wait(LIMIT_S) == 0


def test_p15_serve_finishes_calls_before_it_ends(run_directory: Path, gate: Path) -> None:
    with (
        Serving(run_directory) as serving,
        LuaHostBridge.connect(run_directory) as bridge,
        ThreadPoolExecutor(8) as pool,
    ):
        deploy(bridge, GATED, deadline="20s")
        running = call(pool, bridge, gate)
        serving.process.send_signal(signal.SIGTERM)
        eventually(lambda: bridge.health()["state"] == "draining", "it drains")
        gate.touch()
        assert running.result(LIMIT_S) == bytes([42])
        assert serving.process.wait(LIMIT_S) == 0


def test_worker_host_that_is_told_to_end_lets_calls_finish(run_directory: Path, gate: Path) -> None:
    with (
        Parts(run_directory, 20_000) as parts,
        LuaHostBridge.connect(run_directory) as bridge,
        ThreadPoolExecutor(8) as pool,
    ):
        deploy(bridge, GATED, deadline="20s")
        pending = [call(pool, bridge, gate) for _ in range(2)]
        eventually(lambda: has_begun(bridge), "the first one has begun")
        parts.worker_host.send_signal(signal.SIGTERM)
        eventually(lambda: len(bridge.health()["workers"]) == 1, "the free workers are gone, the busy one is not")
        gate.touch()
        results: list[bytes | CallError] = [each.result(LIMIT_S) for each in pending]
        assert results == [bytes([42])] * 2, "the one handed ahead, too"
        assert parts.worker_host.wait(LIMIT_S) == 0
        assert not isinstance(failure(bridge, PROBE, timeout=0.1), WorkerCrashed)
