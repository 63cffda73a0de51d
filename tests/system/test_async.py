"""One event loop, many tasks: every task gets its own answer, cancelled ones leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from luacell.client import (
    AbiErrorCode,
    AsyncLuaHostBridge,
    BridgeClosed,
    BridgeError,
    BridgeNotInitialized,
    ContractNotFound,
    DeploymentError,
    DuplicateContract,
    HostContractCallFailed,
    HostContractNotFound,
    LuaFunction,
    LuaHostBridge,
    SupportedLanguage,
    TypeMismatch,
    Unavailable,
    WorkerCrashed,
)
from luacell.protocol.limits import MIB
from tests.support.children import child_process
from tests.support.contracts import (
    DOUBLE,
    ECHO,
    HEALTHY,
    NUMBERED,
    PROBE,
    Stopwatch,
    deploy,
    function,
    write_deployment,
)
from tests.support.holdings import holdings, holds_no_more_than
from tests.support.processes import (
    Process,
    broker_pid,
    mappings_of,
    run_directory,
    status_of,
)
from tests.support.waiting import LIMIT_S, settles

ROOT = Path(__file__).parents[2]
TASKS = 50
CALLS = 40
CRASHES = 4  # at a fifth the contract would rest
CLOSED_WITHIN_S = 2.0
ENDLESS = function("while true do end")


def place_of(bridge: LuaHostBridge) -> str:
    return run_directory(broker_pid(bridge))


def run_with(bridge: LuaHostBridge, work: Callable[[AsyncLuaHostBridge], Awaitable[None]]) -> None:
    """Run work in an event loop of its own, with an asyncio bridge to the service of another one."""

    async def main() -> None:
        async with AsyncLuaHostBridge.connect(place_of(bridge)) as own:
            await asyncio.wait_for(work(own), 4 * LIMIT_S)

    asyncio.run(main())


async def own_answer(bridge: AsyncLuaHostBridge, number: int) -> bool:
    sent = number.to_bytes(4, "little")
    reply = await bridge.call(PROBE, number % 3, sent + bytes(4), 8)
    return reply == sent + (number % 3).to_bytes(4, "little")


async def all_back(bridge: AsyncLuaHostBridge) -> bool:
    """Wait until no slot is in use."""
    async with asyncio.timeout(LIMIT_S):
        while (await bridge.health())["slots_in_flight"]:
            await asyncio.sleep(0.005)
    return True


# -- as the threaded bridge ----
def test_embedded_bridge_does_all_that_the_threaded_one_does(tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncLuaHostBridge() as bridge:
            assert bridge.runtime_type() is SupportedLanguage.LUA
            await bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
            with pytest.raises(DuplicateContract):
                await bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
            with pytest.raises(TypeMismatch):
                await bridge.register_host_contract(PROBE, 42)  # type: ignore[arg-type]
            write_deployment(tmp_path, NUMBERED, deadline="1s")
            assert await bridge.deploy(tmp_path) == [PROBE]
            with pytest.raises(DeploymentError):
                await bridge.deploy("/nonexistent")
            assert {str(each) for each in await bridge.contracts()} == {PROBE, HEALTHY}
            assert await own_answer(bridge, 7)
            out = bytearray(b"untouched")
            result = await bridge.call_host_contract(PROBE, 3, bytes(8), out)
            assert (result.code, bytes(out)) == (AbiErrorCode.HOST_CONTRACT_CALL_FAILED, b"untouched")
            assert (await bridge.call_host_contract(HEALTHY, 0, b"\1\0\0\0", memoryview(out)[:4])).ok
            assert bytes(out) == b"\2\0\0\0uched"
            scratch = await bridge.lua()
            assert await scratch.eval("6 * 7") == 42
            assert await bridge.lua() is scratch
            assert (await bridge.health())["contracts"] == 2, "the scratch VM is not listed"
            await bridge.unregister_host_contract(HEALTHY)
            with pytest.raises(ContractNotFound):
                await bridge.unregister_host_contract(HEALTHY)
            with pytest.raises(HostContractNotFound):
                await bridge.call(HEALTHY, 0)
            with pytest.raises(ValueError, match="timeout"):
                await bridge.call(PROBE, 0, timeout=0)
        for use in (bridge.contracts(), bridge.call(PROBE, 0), bridge.lua(), scratch.eval("1"), bridge.deploy(".")):
            with pytest.raises(BridgeClosed):
                await use

    asyncio.run(main())


def test_bridge_is_opened_by_a_block_or_by_await() -> None:
    async def main() -> None:
        unopened = AsyncLuaHostBridge.with_capacity(0)
        with pytest.raises(BridgeNotInitialized, match="open the bridge first"):
            await unopened.health()
        bridge = await unopened
        assert bridge is unopened
        assert (await bridge.health())["spares"] is not None
        await bridge.close()
        await bridge.close()
        with pytest.raises(BridgeClosed):
            await bridge
        with pytest.raises(Unavailable, match="no broker at /nonexistent"):
            await AsyncLuaHostBridge.connect("/nonexistent")
        for endpoint in ("tcp://127.0.0.1:9", "ipc+inline:///nonexistent"):
            with pytest.raises(
                ValueError, match=f"endpoint '{re.escape(endpoint)}' is for hosts without shared memory"
            ):
                AsyncLuaHostBridge.connect(endpoint)
        with pytest.raises(ValueError, match="capacity 65"):
            AsyncLuaHostBridge.with_capacity(65)
        never_opened = AsyncLuaHostBridge()
        await never_opened.close()
        with pytest.raises(BridgeClosed):
            await never_opened

    asyncio.run(main())


@pytest.mark.parametrize("size", [0, 1, 4096, 300_000, MIB, 3 * MIB + 1, 64 * MIB])
def test_sizes_of_all_kinds_come_back_exactly(bridge: LuaHostBridge, size: int) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(function("if args ~= nil then ffi.copy(out, args, fn_id) end")))
    sent = bytes(range(251)) * (size // 251 + 1)

    async def work(own: AsyncLuaHostBridge) -> None:
        for args in (sent[:size], bytearray(sent[:size])):
            assert await own.call(PROBE, size, args, size) == sent[:size]
            out = bytearray(size)
            assert await own.call(PROBE, size, args, out=out) == b""
            assert out == sent[:size]

    run_with(bridge, work)


# -- many tasks ----
def test_every_task_gets_its_own_answers(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(NUMBERED))

    async def work(own: AsyncLuaHostBridge) -> None:
        async def call(task: int) -> None:
            for number in range(task * CALLS, (task + 1) * CALLS):
                assert await own_answer(own, number)

        await asyncio.gather(*(call(task) for task in range(TASKS)))
        assert (await own.health())["slots_in_flight"] == 0

    run_with(bridge, work)


def test_tasks_get_their_own_errors_while_workers_crash(bridge: LuaHostBridge) -> None:
    deploy(bridge, NUMBERED, stateless=True, workers=2)

    async def work(own: AsyncLuaHostBridge) -> None:
        async def call(task: int) -> None:
            for number in range(task * CALLS, (task + 1) * CALLS):
                if number % 5 == 3:
                    with pytest.raises(HostContractCallFailed, match=f"^Lua exception: failed {number}\n"):
                        await own.call(PROBE, 3, number.to_bytes(8, "little"), 8)
                elif number % (TASKS * CALLS // CRASHES) == 4:
                    with pytest.raises(WorkerCrashed, match="fn 4: the worker died with signal 11"):
                        await own.call(PROBE, 4, number.to_bytes(8, "little"), 8)
                else:
                    assert await own_answer(own, number)

        await asyncio.gather(*(call(task) for task in range(TASKS)))

    run_with(bridge, work)


def test_more_calls_at_once_than_a_message_holds(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(NUMBERED))

    async def work(own: AsyncLuaHostBridge) -> None:
        ends = await asyncio.gather(*(own_answer(own, number) for number in range(1500)), return_exceptions=True)
        refused = [end for end in ends if end is not True]
        assert {type(end).__name__ for end in refused} <= {"Busy"}, "over a bound, and told so"
        assert len(ends) - len(refused) >= 500
        assert await own_answer(own, 1)

    run_with(bridge, work)


def test_deadline_of_one_task_does_not_hold_up_the_others(bridge: LuaHostBridge) -> None:
    deploy(bridge, ENDLESS, PROBE, deadline="10s")
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))

    async def work(own: AsyncLuaHostBridge) -> None:
        late = asyncio.create_task(own.call_host_contract(PROBE, 0, None, None, timeout=0.3))
        count = 0
        while not late.done():
            assert await own.call(HEALTHY, 0, b"\1\0\0\0", 4) == b"\2\0\0\0"
            count += 1
        assert (await late).code is AbiErrorCode.DEADLINE_EXCEEDED
        assert count > 1

    run_with(bridge, work)


# -- cancellation ----
def test_tasks_cancelled_at_any_point_leave_a_usable_bridge(bridge: LuaHostBridge) -> None:
    deploy(bridge, NUMBERED, stateless=True, workers=2)
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)

    async def work(own: AsyncLuaHostBridge) -> None:
        is_over = asyncio.Event()

        async def steady(task: int) -> None:
            number = task
            while not is_over.is_set():
                number += TASKS
                assert await own_answer(own, number)

        others = [asyncio.create_task(steady(task)) for task in range(10)]
        cancelled = 0
        for _ in range(40):
            sizes = [dice.choice((8, 8, 5000, 300_000, 2 * MIB)) for _ in range(TASKS - 10)]
            calls = [asyncio.create_task(own.call(PROBE, 0, bytes(size), size)) for size in sizes]
            for call in calls:
                for _ in range(dice.randrange(4)):
                    await asyncio.sleep(0)
                call.cancel()
            ends = await asyncio.gather(*calls, return_exceptions=True)
            cancelled += sum(isinstance(end, asyncio.CancelledError) for end in ends)
            wrong = [end for end in ends if not isinstance(end, bytes | asyncio.CancelledError)]
            assert {type(end).__name__ for end in wrong} <= {"Busy"}, f"seed {seed}: {wrong}"
        is_over.set()
        await asyncio.gather(*others)
        assert cancelled > 0
        assert await all_back(own)
        assert await own_answer(own, 5)

    run_with(bridge, work)


def test_slot_of_a_cancelled_call_rests_until_its_worker_is_dead(bridge: LuaHostBridge, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    deploy(bridge, function(f'io.open("{begun}", "w"):close() while true do end'), deadline="2s", write=[str(tmp_path)])

    async def work(own: AsyncLuaHostBridge) -> None:
        call = asyncio.create_task(own.call(PROBE, 0))
        while not begun.exists():
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (await own.health())["slots_in_flight"] == 1
        assert await all_back(own)

    run_with(bridge, work)


@pytest.mark.parametrize("rounds", range(2))
def test_opening_that_is_cancelled_leaves_nothing(rounds: int) -> None:
    async def main() -> None:
        for step in range(5):
            opening = asyncio.create_task(AsyncLuaHostBridge().__aenter__())
            await asyncio.wait([opening], timeout=0.08 * (rounds * 5 + step))
            opening.cancel()
            with suppress(asyncio.CancelledError):
                await (await opening).close()

    before = holdings()
    asyncio.run(main())
    holds_no_more_than(before)


# -- loops and forks ----
def test_each_loop_has_a_bridge_of_its_own(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(NUMBERED))
    barrier = threading.Barrier(2)
    ends: list[object] = []

    async def work(own: AsyncLuaHostBridge) -> None:
        await asyncio.gather(*(own_answer(own, number) for number in range(200)))
        await asyncio.to_thread(barrier.wait, LIMIT_S)

        def use_elsewhere() -> None:
            with pytest.raises(BridgeError, match="bound to another event loop"):
                asyncio.run(own.call(PROBE, 0, bytes(8), 8))
            with pytest.raises(BridgeError, match="bound to another event loop"):
                asyncio.run(own.close())

        await asyncio.to_thread(use_elsewhere)
        ends.append(await own_answer(own, 3))

    threads = [threading.Thread(target=run_with, args=(bridge, work)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * LIMIT_S)
    assert ends == [True, True]


def test_forked_child_has_no_bridge_and_its_parent_s_goes_on(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    command = [sys.executable, "-m", "tests.support.async_fork", place_of(bridge), HEALTHY]
    with child_process(command, stdout=subprocess.PIPE, cwd=ROOT) as host:
        assert host.stdout is not None
        told = [json.loads(host.stdout.readline()) for _ in range(2)]
        (child,) = (each for each in told if "child" in each)
        assert {"parent": "ok"} in told
        assert child["child"] == "BridgeForked"
        with closing(Process(child["pid"])) as process:
            assert mappings_of(process.pid) == 0
            hosts = bridge.health()["hosts"]
            host.send_signal(signal.SIGKILL)
            settles(lambda: bridge.health()["hosts"], hosts - 1, "the child does not hide the parent's death")
            process.kill()
            assert process.ends_within()


# -- ends ----
def in_new_service(work: Callable[[AsyncLuaHostBridge], Coroutine[Any, Any, None]]) -> None:
    """Run work with an embedded bridge; nothing of it is left."""

    async def main() -> None:
        bridge = await AsyncLuaHostBridge()
        await work(bridge)
        await bridge.close()

    with tempfile.TemporaryDirectory(prefix="ends-") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", directory)
        before = holdings()
        asyncio.run(main())
        holds_no_more_than(before)
        settles(lambda: list(Path(directory).iterdir()), list[Path](), "no directory is left")


def test_close_ends_running_calls_with_a_typed_error() -> None:
    async def work(bridge: AsyncLuaHostBridge) -> None:
        await bridge.register_host_contract(PROBE, LuaFunction(ENDLESS))
        calls = [asyncio.create_task(bridge.call(PROBE, 0)) for _ in range(TASKS)]
        while (await bridge.health())["slots_in_flight"] < TASKS:
            await asyncio.sleep(0)
        with Stopwatch() as stopwatch:
            await bridge.close()
        ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), LIMIT_S)
        assert Counter(type(end) for end in ends) == {Unavailable: TASKS}
        assert stopwatch.seconds < CLOSED_WITHIN_S

    in_new_service(work)


def test_service_that_has_ended_fails_calls_at_once_and_leaves_nothing() -> None:
    async def work(bridge: AsyncLuaHostBridge) -> None:
        await bridge.register_host_contract(HEALTHY, LuaFunction(ECHO))
        broker = status_of((await bridge.health())["broker_pid"])
        assert broker is not None
        with closing(Process(broker.parent)) as process:
            process.kill()
            assert await asyncio.to_thread(process.ends_within)
        for _ in range(3):
            with pytest.raises(Unavailable):
                await bridge.call(HEALTHY, 1, b"x", 1)

    in_new_service(work)


def test_bridge_that_nobody_closes_takes_its_service_with_it() -> None:
    async def main() -> None:
        bridge = await AsyncLuaHostBridge()
        await bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        assert await bridge.call(HEALTHY, 0, b"\1\0\0\0", 4) == b"\2\0\0\0"

    before = holdings()
    asyncio.run(main())
    holds_no_more_than(before)
