"""Whoever ends, and however: the service is gone within two seconds, nothing is left of it, and the next one starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from luacell.client import (
    BridgeClosed,
    CallError,
    LuaFunction,
    LuaHostBridge,
    Unavailable,
    WorkerCrashed,
)
from tests.support.contracts import COUNTER, DOUBLE, HEALTHY, PROBE, Stopwatch, answers, deploy, failure, function
from tests.support.environment import untraced
from tests.support.holdings import holdings, holds_no_more_than
from tests.support.pending import has_begun
from tests.support.processes import (
    Process,
    Processes,
    broker_pid,
    descriptors_of,
    mappings_of,
    resident_kib,
    thread_count,
)
from tests.support.waiting import LIMIT_S, eventually, settles

ROOT = Path(__file__).parents[2]
ENDLESS = function("while true do end")
GONE_WITHIN_S = 2.0


@pytest.fixture
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where embedded services make their directories; short, for sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="ends-") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


@pytest.fixture(autouse=True)
def nothing_is_left_here(runtime_directory: Path) -> Iterator[None]:
    """This process holds what it held before, and a service starts where another one ended."""
    before = holdings()
    yield
    with LuaHostBridge() as bridge:
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        assert answers(bridge, HEALTHY)
    holds_no_more_than(before)
    assert mappings_of() == 0
    assert not any("memfd:luacell" in name for name in descriptors_of())
    settles(lambda: list(runtime_directory.iterdir()), list[Path](), "no directory is left")


class Host:
    """A host in a process and a process group of its own."""

    def __init__(self, mode: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.host", mode],
            env=untraced(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        ready = self.told()
        self.service = Processes(ready["parent"], ready["broker"])

    def told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the host ended"
        told: dict[str, Any] = json.loads(line)
        return told

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate(timeout=LIMIT_S)
        self.service.close()


# -- the host ----
def test_close_ends_the_service(runtime_directory: Path) -> None:
    bridge = LuaHostBridge()
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    assert answers(bridge, PROBE)
    bridge.lua().eval("42")
    with Processes.of(bridge) as service:
        assert len(service.all) >= 5, "parent, broker, worker host and workers"
        with Stopwatch() as stopwatch:
            bridge.close()
        assert service.survivors(GONE_WITHIN_S) == []
    assert stopwatch.seconds < GONE_WITHIN_S
    assert list(runtime_directory.iterdir()) == []


def test_everything_after_close_is_bridge_closed() -> None:
    bridge = LuaHostBridge()
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    scratch = bridge.lua()
    bridge.close()
    bridge.close()
    uses: list[Callable[[], object]] = [
        lambda: bridge.call(PROBE, 0),
        lambda: bridge.call_host_contract(PROBE, 0, None, None),
        lambda: bridge.register_host_contract(PROBE, LuaFunction(DOUBLE)),
        lambda: bridge.unregister_host_contract(PROBE),
        lambda: bridge.contracts(),
        lambda: bridge.health(),
        lambda: bridge.lua(),
        lambda: scratch.eval("42"),
        lambda: bridge.deploy("/nonexistent"),
    ]
    for use in uses:
        with pytest.raises(BridgeClosed):
            use()
    assert "BridgeClosed" in repr(bridge)


def test_bridge_closes_at_the_end_of_its_block_whatever_happened() -> None:
    with pytest.raises(RuntimeError, match="of the host"), LuaHostBridge() as bridge:
        service = Processes.of(bridge)
        raise RuntimeError("an error of the host")
    with service:
        assert service.survivors(GONE_WITHIN_S) == []


def test_bridge_that_is_dropped_takes_its_service_with_it() -> None:
    bridge = LuaHostBridge()
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    assert answers(bridge, PROBE)
    with Processes.of(bridge) as service:
        del bridge
        assert service.survivors(GONE_WITHIN_S) == []


@pytest.mark.parametrize("mode", ["idle", "carefree"])
def test_host_that_ends_takes_its_service_with_it(mode: str) -> None:
    with Host(mode) as host:
        host.go_on()
        assert host.told() == {"answers": True}
        assert host.process.wait(LIMIT_S) == 0
        assert host.service.survivors(GONE_WITHIN_S) == []


def test_ctrl_c_reaches_the_host_alone() -> None:
    with Host("idle") as host:
        eventually(lambda: sleeps(host.process.pid), "the host waits to be told to go on")
        os.killpg(host.process.pid, signal.SIGINT)
        assert host.told() == {"interrupted": True}
        host.go_on()
        assert host.told() == {"answers": True}
        assert host.process.wait(LIMIT_S) == 0
        assert host.service.survivors(GONE_WITHIN_S) == []


def test_ctrl_c_in_a_call_ends_host_and_service() -> None:
    with Host("calling") as host:
        eventually(lambda: sleeps(host.process.pid), "the host waits for its call")
        os.killpg(host.process.pid, signal.SIGINT)
        assert host.process.wait(LIMIT_S) == -signal.SIGINT
        assert host.service.survivors(GONE_WITHIN_S) == []


def sleeps(pid: int) -> bool:
    return "sleeping" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("mode", ["idle", "calling"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_host_that_is_killed_takes_its_service_with_it(mode: str, number: int, runtime_directory: Path) -> None:
    with Host(mode) as host:
        host.process.send_signal(number)
        assert host.process.wait(LIMIT_S) == -number
        assert host.service.survivors(GONE_WITHIN_S) == []
    assert list(runtime_directory.iterdir()) == []


# -- processes of the service ----
Victim = Callable[[Processes], Process]
VICTIMS = [
    pytest.param(lambda service: service.parent, id="parent"),
    pytest.param(lambda service: service.broker, id="broker"),
    pytest.param(lambda service: service.worker_host, id="worker host"),
]


@pytest.mark.parametrize("victim", VICTIMS)
def test_death_of_a_part_is_told_to_its_calls_and_close_leaves_nothing(victim: Victim) -> None:
    with LuaHostBridge() as bridge, ThreadPoolExecutor(4) as pool:
        deploy(bridge, ENDLESS, deadline="30s")
        deploy(bridge, DOUBLE, HEALTHY)
        assert answers(bridge, HEALTHY)
        with Processes.of(bridge) as service:
            calls = [pool.submit(failure, bridge, PROBE) for _ in range(4)]
            eventually(lambda: has_begun(bridge), "a call has begun")
            service.look_again()
            with Stopwatch() as stopwatch:
                victim(service).kill()
                running = next(as_completed(calls)).result(LIMIT_S)
            assert stopwatch.seconds < GONE_WITHIN_S
            assert isinstance(running, Unavailable | WorkerCrashed)
            bridge.close()
            assert all(isinstance(call.result(LIMIT_S), CallError) for call in calls)
            assert service.survivors(GONE_WITHIN_S) == []


def test_death_of_the_parent_ends_the_service() -> None:
    with LuaHostBridge() as bridge:
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        assert answers(bridge, HEALTHY)
        with Processes.of(bridge) as service:
            service.parent.kill()
            assert service.survivors(GONE_WITHIN_S) == []
        assert isinstance(failure(bridge, HEALTHY), Unavailable)
        with pytest.raises(Unavailable):
            bridge.contracts()


def test_death_of_the_worker_host_while_nothing_happens_is_not_seen() -> None:
    with LuaHostBridge() as bridge:
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        assert answers(bridge, HEALTHY)
        with Processes.of(bridge) as service:
            service.worker_host.kill()
            assert service.worker_host.ends_within()
            assert answers(bridge, HEALTHY)
            assert service.broker.is_alive


def test_stopped_broker_does_not_keep_its_host_waiting_for_ever() -> None:
    with LuaHostBridge() as bridge:
        deploy(bridge, DOUBLE)
        assert answers(bridge, PROBE)
        with closing(Process(broker_pid(bridge))) as broker, broker.stopped():
            with Stopwatch() as stopwatch:
                assert isinstance(failure(bridge, PROBE, args=bytes(4), out_size=4, timeout=0.3), Unavailable)
            assert stopwatch.seconds < 0.3 + GONE_WITHIN_S
            with Stopwatch() as stopwatch:
                bridge.close()
            assert stopwatch.seconds < LIMIT_S


def test_all_at_once() -> None:
    bridge = LuaHostBridge()
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    assert answers(bridge, HEALTHY)
    with Processes.of(bridge) as service:
        for process in service.all:
            process.kill()
        assert service.survivors(GONE_WITHIN_S) == []
        assert isinstance(failure(bridge, HEALTHY), CallError)
    bridge.close()


# -- fork ----
def test_forked_child_has_no_bridge_and_hides_no_death(runtime_directory: Path) -> None:
    with Host("forked") as host:
        told = [host.told(), host.told()]
        (child,) = (each for each in told if "child" in each)
        assert {"parent": "ok"} in told
        assert child["child"] == "BridgeForked"
        with closing(Process(child["pid"])) as process:
            try:
                assert mappings_of(process.pid) == 0
                host.process.kill()
                assert host.process.wait(LIMIT_S) == -signal.SIGKILL
                assert host.service.survivors(GONE_WITHIN_S) == []
                assert process.is_alive
            finally:
                process.kill()
                assert process.ends_within()
    assert list(runtime_directory.iterdir()) == []


def test_parent_s_bridge_works_while_and_after_a_forked_child_lives() -> None:
    with Host("forked") as host:
        told = [host.told(), host.told()]
        (child,) = (each for each in told if "child" in each)
        with closing(Process(child["pid"])) as process:
            process.kill()
            assert process.ends_within()
        host.go_on()
        assert host.told() == {"answers": True}
        assert host.process.wait(LIMIT_S) == 0
        assert host.service.survivors(GONE_WITHIN_S) == []


# -- leaks ----
def test_opening_and_closing_leaves_nothing() -> None:
    def cycle() -> None:
        with LuaHostBridge() as bridge:
            bridge.register_host_contract(PROBE, LuaFunction(COUNTER))
            bridge.call(PROBE, 0, None, 4)
            bridge.call(PROBE, 0, bytes(300_000), 300_000)
            failure(bridge, PROBE, 1)
            bridge.lua().eval("42")

    cycle()
    before = holdings()
    maps = mapping_count()
    for _ in range(15):
        cycle()
    holds_no_more_than(before)
    assert mapping_count() <= maps + 10, "a leak would be at least one for each cycle"


def mapping_count() -> int:
    return Path("/proc/self/maps").read_text().count("\n")


def test_calls_leave_nothing() -> None:
    with LuaHostBridge() as bridge:
        bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
        for number in range(2000):
            assert answers(bridge, PROBE, number)
        with Processes.of(bridge) as service:
            pids: list[int | str] = ["self", service.broker.pid, service.worker_host.pid]
            pids += [worker.pid for worker in service.look_again()]
            before = [(descriptors_of(pid), mappings_of(pid), thread_count(pid)) for pid in pids]
            memory = [resident_kib(pid) for pid in pids]
            for number in range(20_000):
                assert answers(bridge, PROBE, number)
            assert [(descriptors_of(pid), mappings_of(pid), thread_count(pid)) for pid in pids] == before
            grown = [resident_kib(pid) - kib for pid, kib in zip(pids, memory, strict=True)]
        assert max(grown) < 5 * 1024


def test_crashes_leave_nothing() -> None:
    with LuaHostBridge() as bridge:
        names = [deploy(bridge, COUNTER, f"host.probe{number}@1") for number in range(25)]

        def crash() -> None:
            for name in names:
                failure(bridge, name, 1)

        def held() -> tuple[object, ...]:
            pids: tuple[int | str, ...] = ("self", service.broker.pid, service.worker_host.pid)
            return tuple((descriptors_of(pid), thread_count(pid), mappings_of(pid)) for pid in pids)

        with Processes.of(bridge) as service:
            crash()
            settles(lambda: spares_only(bridge), True, "the dead are gone and a spare is there")
            before = held()
            memory = resident_kib(service.broker.pid)
            for _ in range(4):
                crash()
            settles(lambda: spares_only(bridge), True, "the dead are gone and a spare is there")
            settles(held, before, "descriptors, threads and mappings are as before")
            assert resident_kib(service.broker.pid) - memory < 5 * 1024


def spares_only(bridge: LuaHostBridge) -> bool:
    return [worker["state"] for worker in bridge.health()["workers"]] == ["blank"]
