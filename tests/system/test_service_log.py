"""What an embedded service writes reaches the logger `luacell` of its host, and the error when it cannot start."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

import pytest

from luacell.client import AsyncLuaHostBridge, BridgeNotInitialized, LuaFunction, LuaHostBridge, WorkerCrashed
from tests.support.contracts import COUNTER, DOUBLE, HEALTHY, PROBE, answers, deploy, function
from tests.support.processes import broker_pid, run_directory
from tests.support.waiting import LIMIT_S, eventually

CRASH = 1  # of COUNTER
SLOW_END = "did not end in time"  # of a process, which a busy machine brings about


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "luacell")
    return caplog


def told_of_crash(log: pytest.LogCaptureFixture) -> bool:
    return any(
        record.name.startswith("luacell.") and PROBE in record.getMessage() and "SIGSEGV" in record.getMessage()
        for record in log.records
    )


def test_death_of_a_worker_is_a_record_of_its_host(log: pytest.LogCaptureFixture) -> None:
    with LuaHostBridge() as bridge:
        bridge.register_host_contract(PROBE, LuaFunction(COUNTER))
        with pytest.raises(WorkerCrashed):
            bridge.call(PROBE, CRASH)
        eventually(lambda: bridge.health() and told_of_crash(log), "the death is recorded")


def test_death_of_a_worker_is_a_record_without_any_further_use(log: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with AsyncLuaHostBridge() as bridge:
            await bridge.register_host_contract(PROBE, LuaFunction(COUNTER))
            with pytest.raises(WorkerCrashed):
                await bridge.call(PROBE, CRASH)
            async with asyncio.timeout(LIMIT_S):
                while not told_of_crash(log):
                    await asyncio.sleep(0.005)

    asyncio.run(main())


def test_who_waits_reads_for_the_service(log: pytest.LogCaptureFixture) -> None:
    with LuaHostBridge() as bridge:
        deploy(bridge, function("while true do end"), HEALTHY, deadline="30s")
        bridge.register_host_contract(PROBE, LuaFunction(COUNTER))
        place = run_directory(broker_pid(bridge))
        waiting = threading.Thread(target=bridge.call_host_contract, args=(HEALTHY, 0, None, None))
        waiting.start()
        with LuaHostBridge.connect(place) as other, pytest.raises(WorkerCrashed):
            other.call(PROBE, CRASH)
        eventually(lambda: told_of_crash(log), "the death is recorded")
    waiting.join(LIMIT_S)


def test_what_was_not_read_before_is_read_at_the_end(log: pytest.LogCaptureFixture) -> None:
    with LuaHostBridge() as bridge:
        bridge.register_host_contract(PROBE, LuaFunction(COUNTER))
        with pytest.raises(WorkerCrashed):
            bridge.call(PROBE, CRASH)
    assert told_of_crash(log)


def test_orderly_life_and_end_are_no_error(log: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with LuaHostBridge() as bridge:
            bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
            assert answers(bridge, HEALTHY)
    problems = [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]
    assert [each for each in problems if SLOW_END not in each] == []


def test_nothing_is_printed_by_a_host_that_has_not_asked(capfd: pytest.CaptureFixture[str]) -> None:
    with LuaHostBridge() as bridge:
        bridge.register_host_contract(PROBE, LuaFunction(COUNTER))
        with pytest.raises(WorkerCrashed):
            bridge.call(PROBE, CRASH)
    assert capfd.readouterr() == ("", "")


def test_service_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))

    async def main() -> None:
        async with AsyncLuaHostBridge():
            raise AssertionError("it started")

    with pytest.raises(BridgeNotInitialized, match=r"socket paths .* set XDG_RUNTIME_DIR to a shorter"):
        asyncio.run(main())
    assert list(deep.iterdir()) == []
