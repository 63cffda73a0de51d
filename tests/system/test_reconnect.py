"""The broker goes and another one comes: pending calls are told at once, and the same bridge finds the new one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from luacell.client import (
    AsyncLuaHostBridge,
    BridgeClosed,
    CallError,
    HostContractNotFound,
    LuacellError,
    LuaFunction,
    LuaHostBridge,
    Unavailable,
)
from tests.support.children import child_process
from tests.support.contracts import DOUBLE, HEALTHY, PROBE, Stopwatch, answers, deploy, failure, function
from tests.support.holdings import holdings, holds_no_more_than
from tests.support.parts import Parts
from tests.support.pending import has_begun, in_thread
from tests.support.processes import Process, Processes
from tests.support.scheduling import Scheduling
from tests.support.waiting import LIMIT_S, eventually

ROOT = Path(__file__).parents[2]
ENDLESS = function("while true do end")
THREADS = 16
TASKS = 50
RESTARTS = 3
CLOSED_WITHIN_S = 2.0
GRACE_S = 0.25  # promise 1
UNAVAILABLE_WITHIN_S = 1.0  # promised where the broker dies


@pytest.fixture
def parts() -> Iterator[Parts]:
    before = holdings()
    with tempfile.TemporaryDirectory(prefix="again-") as directory, Parts(Path(directory) / "run") as running:
        yield running
    holds_no_more_than(before)


@pytest.fixture
def host(parts: Parts) -> Iterator[LuaHostBridge]:
    with LuaHostBridge.connect(parts.run_directory) as bridge:
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        assert answers(bridge, HEALTHY)
        yield bridge


# -- one caller ----
def test_same_bridge_answers_again_when_another_broker_serves(parts: Parts, host: LuaHostBridge) -> None:
    for number in range(RESTARTS):
        parts.restart()
        assert answers(host, HEALTHY, number)
        assert host.health()["broker_pid"] == parts.broker.pid


def test_large_calls_and_requests_find_the_new_broker_too(parts: Parts, host: LuaHostBridge) -> None:
    parts.restart()
    host.register_host_contract(PROBE, LuaFunction(function("ffi.copy(out, args, fn_id)")))
    sent = bytes(range(250)) * 8000
    assert host.call(PROBE, len(sent), sent, len(sent)) == sent
    parts.restart()
    out = bytearray(len(sent))
    assert host.call_host_contract(PROBE, len(sent), sent, out).ok
    assert out == sent


def test_running_call_is_told_at_once_that_it_had_begun(parts: Parts, host: LuaHostBridge) -> None:
    deploy(host, ENDLESS, deadline="30s")
    thread, ends = in_thread(lambda: (failure(host, PROBE), time.monotonic()))
    eventually(lambda: has_begun(host), "the call has begun")
    with Scheduling() as delays:
        killed_s = time.monotonic()
        parts.kill_broker()
        thread.join(LIMIT_S)
    ((error, told_s),) = ends
    assert isinstance(error, Unavailable)
    assert error.began == "yes"
    assert told_s - killed_s < UNAVAILABLE_WITHIN_S + delays.slack_s


def test_waiting_call_is_told_that_nobody_knows_whether_it_began(parts: Parts, host: LuaHostBridge) -> None:
    deploy(host, ENDLESS, deadline="30s")
    calls = [in_thread(lambda: host.call(PROBE, 0)) for _ in range(2)]
    eventually(lambda: host.health()["slots_in_flight"] == 2, "both calls are under way")
    eventually(lambda: has_begun(host), "the first one has begun")
    parts.kill_broker()
    for thread, _ in calls:
        thread.join(LIMIT_S)
    errors = [end for _, (end,) in calls]
    assert sorted(error.began for error in errors if isinstance(error, Unavailable)) == ["unknown", "yes"]


def test_call_without_a_broker_looks_for_one_within_its_time_and_says_where(parts: Parts, host: LuaHostBridge) -> None:
    parts.kill_broker()
    with Stopwatch() as stopwatch:
        error = failure(host, HEALTHY, args=bytes(4), out_size=4, timeout=0.5)
    assert isinstance(error, Unavailable)
    assert error.began == "no"
    assert str(parts.run_directory) in error.message
    assert 0.4 < stopwatch.seconds < 0.5 + LIMIT_S
    parts.start()
    assert answers(host, HEALTHY)


def test_call_waits_for_the_broker_that_comes_in_its_time(parts: Parts, host: LuaHostBridge) -> None:
    host.unregister_host_contract(HEALTHY)
    deploy(host, DOUBLE, HEALTHY, deadline="20s")  # in which both come, and a worker
    assert answers(host, HEALTHY)
    parts.kill_broker()
    thread, ends = in_thread(lambda: host.call(HEALTHY, 0, bytes(4), 4))
    parts.start()
    thread.join(LIMIT_S)
    (end,) = ends  # a broker that remembers its contracts answers; another one knows none of that name
    assert end == bytes(4) or isinstance(end, HostContractNotFound)


def test_scratch_vm_is_there_again(parts: Parts, host: LuaHostBridge) -> None:
    scratch = host.lua()
    scratch.eval("x = 1")
    parts.restart()
    assert scratch.eval("x") is None, "it starts afresh"
    assert host.lua().eval("6 * 7") == 42


def test_nothing_is_left_of_lost_sessions(parts: Parts, host: LuaHostBridge) -> None:
    before = holdings()
    for _ in range(RESTARTS):
        parts.restart()
        assert answers(host, HEALTHY)
        with suppress(LuacellError):
            host.unregister_host_contract(PROBE)
        host.register_host_contract(PROBE, LuaFunction(function("")))
        host.call(PROBE, 0, bytes(2_000_000), 2_000_000)
    host.unregister_host_contract(PROBE)
    holds_no_more_than(before)


# -- closing ----
@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "stopped"])
def test_close_takes_no_broker(parts: Parts, is_gone: bool) -> None:
    bridge = LuaHostBridge.connect(parts.run_directory)
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    assert answers(bridge, HEALTHY)
    if is_gone:
        parts.kill_broker()
        thread, ends = in_thread(lambda: bridge.call(HEALTHY, 0, bytes(4), 4))
        with Stopwatch() as stopwatch:
            bridge.close()
    else:
        with parts.broker.stopped():
            thread, ends = in_thread(lambda: bridge.call(HEALTHY, 0, bytes(4), 4))
            with Stopwatch() as stopwatch:
                bridge.close()
    thread.join(LIMIT_S)
    assert [type(end) for end in ends] in ([Unavailable], [BridgeClosed])
    assert stopwatch.seconds < CLOSED_WITHIN_S


def test_embedded_bridge_closes_although_its_broker_is_stopped() -> None:
    bridge = LuaHostBridge()
    with Processes.of(bridge) as service:
        with service.broker.stopped(), Stopwatch() as stopwatch:
            bridge.close()
        assert service.survivors(LIMIT_S) == []
    assert stopwatch.seconds < CLOSED_WITHIN_S


def test_stopped_broker_costs_a_call_its_time_and_no_more(parts: Parts, host: LuaHostBridge) -> None:
    with parts.broker.stopped():
        for size in (4, 5_000_000):  # with memory at hand, and without
            with Stopwatch() as stopwatch:
                error = failure(host, HEALTHY, args=bytes(size), out_size=size, timeout=0.3)
            assert isinstance(error, Unavailable)
            assert stopwatch.seconds < 0.3 + GRACE_S + CLOSED_WITHIN_S
    assert answers(host, HEALTHY)


# -- many callers ----
def is_answer(reply: bytes, number: int) -> bool:
    return int.from_bytes(reply, "little") == 2 * number


def restart_often(parts: Parts, counted: Counter[str]) -> None:
    """Kill the broker and start another one, as soon as calls have been answered by each."""
    for _ in range(RESTARTS):
        answered = counted["answered"]
        eventually(lambda answered=answered: counted["answered"] > answered + 100, "calls are answered")  # type: ignore[misc]
        parts.restart()
    answered = counted["answered"]
    eventually(lambda: counted["answered"] > answered + 100, "calls are answered again")


def test_threads_get_their_own_answers_or_typed_errors(parts: Parts, host: LuaHostBridge) -> None:
    counted: Counter[str] = Counter()
    is_over = threading.Event()

    def call(thread: int) -> None:
        number = thread
        while not is_over.is_set():
            number += THREADS
            try:
                reply = host.call(HEALTHY, 0, number.to_bytes(4, "little"), 4)
            except CallError as error:
                counted[type(error).__name__] += 1
                assert not isinstance(error, Unavailable) or error.began in ("no", "unknown", "yes")
            else:
                assert is_answer(reply, number)
                counted["answered"] += 1

    with ThreadPoolExecutor(THREADS) as pool:
        calls = [pool.submit(call, thread) for thread in range(THREADS)]
        try:
            restart_often(parts, counted)
        finally:
            is_over.set()
        for each in calls:
            each.result(LIMIT_S)
    assert set(counted) <= {"answered", "Unavailable", "HostContractNotFound"}


def test_tasks_get_their_own_answers_or_typed_errors(parts: Parts) -> None:
    counted: Counter[str] = Counter()

    async def call(bridge: AsyncLuaHostBridge, task: int, is_over: asyncio.Event) -> None:
        number = task
        while not is_over.is_set():
            number += TASKS
            try:
                reply = await bridge.call(HEALTHY, 0, number.to_bytes(4, "little"), 4)
            except CallError as error:
                counted[type(error).__name__] += 1
            else:
                assert is_answer(reply, number)
                counted["answered"] += 1

    async def main() -> None:
        is_over = asyncio.Event()
        async with AsyncLuaHostBridge.connect(parts.run_directory) as bridge:
            await bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
            calls = [asyncio.create_task(call(bridge, task, is_over)) for task in range(TASKS)]
            try:
                await asyncio.to_thread(restart_often, parts, counted)
            finally:
                is_over.set()
            await asyncio.wait_for(asyncio.gather(*calls), LIMIT_S)

    asyncio.run(main())
    assert set(counted) <= {"answered", "Unavailable", "HostContractNotFound"}


def test_tasks_find_the_new_broker_and_the_scratch_vm(parts: Parts) -> None:
    async def main() -> None:
        async with AsyncLuaHostBridge.connect(parts.run_directory) as bridge:
            await bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
            scratch = await bridge.lua()
            await scratch.eval("x = 1")
            running = asyncio.create_task(bridge.call(HEALTHY, 0, bytes(4), 4))
            await running
            await asyncio.to_thread(parts.restart)
            assert await scratch.eval("x") is None
            assert is_answer(await bridge.call(HEALTHY, 0, (21).to_bytes(4, "little"), 4), 21)
            await asyncio.to_thread(parts.kill_broker)
            with pytest.raises(Unavailable) as caught:
                await bridge.call(HEALTHY, 0, bytes(4), 4, timeout=0.3)
            assert caught.value.began == "no"
            assert str(parts.run_directory) in caught.value.message

    asyncio.run(main())


def test_running_calls_of_tasks_are_told_at_once(parts: Parts) -> None:
    async def main() -> None:
        async with AsyncLuaHostBridge.connect(parts.run_directory) as bridge:
            await bridge.register_host_contract(PROBE, LuaFunction(ENDLESS))
            calls = [asyncio.create_task(bridge.call(PROBE, 0)) for _ in range(TASKS)]
            while (await bridge.health())["slots_in_flight"] < TASKS:
                await asyncio.sleep(0)
            await asyncio.to_thread(parts.kill_broker)
            ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), LIMIT_S)
        assert [type(end) for end in ends] == [Unavailable] * TASKS
        assert {end.began for end in ends if isinstance(end, Unavailable)} <= {"unknown", "yes"}

    asyncio.run(main())


# -- a server that forks first ----
def test_processes_that_connect_after_the_fork_get_their_own_answers_while_workers_are_killed(parts: Parts) -> None:
    with LuaHostBridge.connect(parts.run_directory) as bridge:
        deploy(bridge, DOUBLE, HEALTHY, stateless=True, workers=3)
        command = [sys.executable, "-m", "tests.support.preforking", str(parts.run_directory), HEALTHY, "4", "300"]
        with child_process(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
            killed = 0
            while server.poll() is None:
                pids = [worker["pid"] for worker in bridge.health()["workers"] if worker["state"] == "busy"]
                for pid in pids[:1]:
                    with suppress(AssertionError, ProcessLookupError), closing(Process(pid)) as worker:
                        worker.kill()
                        killed += 1
            assert server.stdout is not None
            lines = server.stdout.read().splitlines()
        assert server.returncode == 0, lines
        assert len(lines) == 4
        assert killed > 0
        assert all(line.startswith("wrong 0 ") for line in lines), lines
        bridge.revive(HEALTHY)  # so many deaths may have put it into quarantine
        assert answers(bridge, HEALTHY)
