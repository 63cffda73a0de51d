"""One bridge, many threads: every caller gets its own answer, interrupted ones leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import pytest

from luacell.client import (
    BridgeClosed,
    CallError,
    HostContractCallFailed,
    LuaFunction,
    LuaHostBridge,
    Unavailable,
    WorkerCrashed,
)
from tests.support.children import child_process
from tests.support.contracts import DOUBLE, HEALTHY, NUMBERED, PROBE, Stopwatch, answers, deploy, function
from tests.support.environment import untraced
from tests.support.holdings import holdings, holds_no_more_than
from tests.support.processes import Processes, thread_count
from tests.support.waiting import LIMIT_S, eventually

ROOT = Path(__file__).parents[2]
THREADS = 8
CALLS = 500


def run(work: Callable[[int], None], count: int = THREADS) -> None:
    """Run work in threads that start together; raise what one of them raised."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> None:
        barrier.wait(LIMIT_S)
        work(number)

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(begin, number) for number in range(count)]:
            future.result()


def own_answer(bridge: LuaHostBridge, contract: str, number: int) -> bool:
    sent = number.to_bytes(4, "little")
    reply = bridge.call(contract, number % 3, sent + bytes(4), 8)
    return reply == sent + (number % 3).to_bytes(4, "little")


def test_every_thread_gets_its_own_answers(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(NUMBERED))

    def call(thread: int) -> None:
        for number in range(thread * CALLS, (thread + 1) * CALLS):
            assert own_answer(bridge, PROBE, number)

    run(call)
    assert bridge.health()["slots_in_flight"] == 0


def test_threads_on_contracts_of_their_own_get_their_own_answers(bridge: LuaHostBridge) -> None:
    names = [f"host.probe{number}@1" for number in range(4)]
    for name in names:
        bridge.register_host_contract(name, LuaFunction(NUMBERED))

    def call(thread: int) -> None:
        for number in range(CALLS):
            assert own_answer(bridge, names[thread % len(names)], thread * CALLS + number)

    run(call)


def test_sizes_of_all_kinds_at_once_come_back_exactly(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(function("ffi.copy(out, args, fn_id)")))
    sizes = (1, 100, 4096, 20_000, 300_000, 2_000_000)

    def call(thread: int) -> None:
        for number in range(60):
            size = sizes[(thread + number) % len(sizes)]
            sent = bytes([thread * 16 + number % 16]) * size
            assert bridge.call(PROBE, size, sent, size) == sent

    run(call)


def test_errors_reach_the_thread_they_belong_to(bridge: LuaHostBridge) -> None:
    deploy(bridge, NUMBERED, stateless=True, workers=2)

    def call(thread: int) -> None:
        for number in range(100):
            sent = (thread * 1000 + number).to_bytes(8, "little")
            if number % 5 == 3:
                with pytest.raises(HostContractCallFailed, match=f"^Lua exception: failed {thread * 1000 + number}\n"):
                    bridge.call(PROBE, 3, sent, 8)
            elif number == 4 and thread < 4:  # at a fifth crash the contract would rest
                with pytest.raises(WorkerCrashed, match="fn 4: the worker died with signal 11"):
                    bridge.call(PROBE, 4, sent, 8)
            else:
                assert own_answer(bridge, PROBE, thread * 1000 + number)

    run(call)


def test_contracts_come_and_go_while_others_are_called(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    is_over = threading.Event()

    def work(thread: int) -> None:
        if thread == 0:
            try:
                for number in range(20):
                    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
                    assert answers(bridge, PROBE, number)
                    bridge.unregister_host_contract(PROBE)
            finally:
                is_over.set()
        while not is_over.is_set():
            assert answers(bridge, HEALTHY, thread)
            assert bridge.health()["contracts"] >= 1

    run(work, 4)


def test_threads_may_use_several_bridges_at_once(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    with LuaHostBridge() as other:
        other.register_host_contract(PROBE, LuaFunction(function("out[0] = 7")))

        def call(thread: int) -> None:
            for number in range(200):
                if (thread + number) % 2:
                    assert answers(bridge, PROBE, number)
                else:
                    assert other.call(PROBE, 0, None, 1) == b"\7"

        run(call)


def test_bridge_has_no_thread_of_its_own_for_calls(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    before = thread_count()
    for number in range(50):
        assert answers(bridge, PROBE, number)
    assert thread_count() == before


# -- interrupted calls ----
def interrupt(rounds: int, threads: int, is_time: Callable[[int], bool]) -> list[str]:
    """Run a host and interrupt each of its calls when it is time; return what it printed in the end."""
    command = [sys.executable, "-m", "tests.support.interrupted", str(rounds), str(threads)]
    with child_process(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=untraced()) as host:
        assert host.stdout is not None
        lines = []
        try:
            for line in host.stdout:
                if line == "calling\n":
                    eventually(lambda: is_time(host.pid), "it is time")
                    host.send_signal(signal.SIGINT)
                else:
                    lines.append(line)
        except BaseException:
            host.kill()  # what hangs would keep the test from ending as well
            raise
    assert host.returncode == 0
    return lines


def waits(pid: int) -> bool:
    """Tell whether the main thread of a process sleeps for longer than its own work takes."""
    status = Path(f"/proc/{pid}/task/{pid}/status")
    before = status.read_text()
    time.sleep(0.003)
    return before == status.read_text() and "sleeping" in before


@pytest.mark.parametrize("threads", [0, 3])
def test_interrupted_call_leaves_a_usable_bridge_and_its_slot_comes_back(threads: int) -> None:
    assert interrupt(20, threads, waits) == ["interrupted 20 20 wrong [] more memory 0\n"]


def test_call_interrupted_at_any_moment_leaves_a_usable_bridge() -> None:
    (line,) = interrupt(100, 0, lambda _: True)
    assert line.startswith("interrupted 100 100 wrong []")


# -- signal handlers ----
@contextmanager
def signals(
    act: Callable[[], object], pauses_s: Iterable[float], begins: threading.Semaphore | None = None
) -> Iterator[None]:
    """Have a handler of this thread act, after each of the pauses; each begins with a release of `begins`."""

    def send() -> None:
        for pause_s in pauses_s:
            if begins is not None:
                begins.acquire(timeout=LIMIT_S)
            is_over.wait(pause_s)
            if is_over.is_set():
                return
            os.kill(os.getpid(), signal.SIGUSR1)

    is_over = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: act())
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        is_over.set()
        if begins is not None:
            begins.release()
        sender.join()
        signal.signal(signal.SIGUSR1, before)


def test_signal_handlers_may_call_in_the_middle_of_a_call(bridge: LuaHostBridge) -> None:
    spin = "local ends = luacell.deadline() - 0.02 while luacell.deadline() > ends do end"
    deploy(bridge, function(spin), deadline="10s")
    rounds = 30
    fresh = [f"host.fresh{number}@1" for number in range(rounds)]  # a host asks for memory at the first call
    for name in fresh:
        deploy(bridge, DOUBLE, name)
    answered: list[bool] = []
    begins = threading.Semaphore(0)

    def act() -> None:
        answered.append(answers(bridge, fresh[len(answered)]))

    with Stopwatch() as stopwatch, signals(act, [number * 0.001 for number in range(rounds)], begins):
        for number in range(rounds):
            begins.release()
            while len(answered) <= number:
                bridge.call(PROBE, 0)
    assert answered == [True] * rounds
    assert stopwatch.seconds < 10.0  # none has waited for its deadline


def test_signals_do_not_put_off_deadlines(bridge: LuaHostBridge) -> None:
    deploy(bridge, DOUBLE)
    assert answers(bridge, PROBE)
    seen: list[int] = []
    with (
        Processes.of(bridge) as processes,
        processes.broker.stopped(),
        signals(lambda: seen.append(1), repeat(0.005)),
        Stopwatch() as stopwatch,
        pytest.raises(Unavailable),
    ):
        bridge.call(PROBE, 0, bytes(4), 4, timeout=0.2)
    assert len(seen) > 10
    assert stopwatch.seconds < 2.0


# -- closing ----
@pytest.mark.parametrize("source", [DOUBLE, function("while true do end")], ids=["short calls", "endless calls"])
def test_close_ends_calls_of_other_threads_with_a_typed_error(source: str) -> None:
    before = holdings()
    bridge = LuaHostBridge()
    deploy(bridge, source, deadline="30s", stateless=True, workers=2)
    begun = threading.Barrier(THREADS + 1)
    ends: list[type[Exception]] = []

    def call() -> None:
        begun.wait(LIMIT_S)
        try:
            while True:
                bridge.call(PROBE, 0, bytes(4), 4)
        except (CallError, BridgeClosed) as error:
            ends.append(type(error))

    with ThreadPoolExecutor(THREADS) as pool:
        calls = [pool.submit(call) for _ in range(THREADS)]
        begun.wait(LIMIT_S)
        with Stopwatch() as stopwatch:
            bridge.close()
        for each in calls:
            each.result(LIMIT_S)
    assert stopwatch.seconds < 2.0
    assert len(ends) == THREADS
    assert set(ends) <= {Unavailable, BridgeClosed}
    holds_no_more_than(before)


def test_close_from_several_threads_closes_once() -> None:
    bridge = LuaHostBridge()
    run(lambda _: bridge.close(), 4)
    with pytest.raises(BridgeClosed):
        bridge.contracts()
