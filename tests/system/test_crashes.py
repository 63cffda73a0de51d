"""Whatever a contract does to its process costs its own call and nothing else, and the caller is told what happened."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from luacell.client import (
    AbiErrorCode,
    CallError,
    DeadlineExceeded,
    LuaFunction,
    LuaHostBridge,
    OutOfMemory,
    Unavailable,
    WorkerCrashed,
)
from tests.support.contracts import (
    COUNTER,
    DOUBLE,
    HEALTHY,
    PROBE,
    Stopwatch,
    answers,
    deploy,
    failure,
    function,
)
from tests.support.pending import has_begun
from tests.support.processes import Process, broker_pid, services_of, worker_of, workers_of
from tests.support.scheduling import Scheduling
from tests.support.waiting import eventually

GRACE_S = 0.25  # promise 1

# fn 0 answers 42; every other one is fatal.
FATAL = """
local ffi = require("ffi")
ffi.cdef("void abort(); int raise(int); int close(int); int pause(); void exit(int); void _exit(int);")
local ways = {
  function() ffi.cast("int *", 0)[0] = 1 end,
  function() os.exit(0) end,
  function() os.exit(3) end,
  function() ffi.C.abort() end,
  function() ffi.C.raise(8) end,
  function() ffi.C._exit(0) end,
  function() while true do end end,
  function() ffi.C.pause() end,
  function() local s = "x" while true do s = s .. s end end,
  function() local t = {} for i = 1, 1e9 do t[i] = { i } end end,
}
return function(fn_id, args, out)
  if fn_id > 0 then ways[fn_id]() end
  if out ~= nil then out[0] = 42 end
end
"""
SEGFAULT, EXIT_0, EXIT_3, ABORT, FPE, EXIT_0_AT_ONCE, LOOP, PAUSE, STRING_BOMB, TABLE_BOMB = range(1, 11)
LIMIT_S = 0.3


@pytest.fixture
def fatal(bridge: LuaHostBridge) -> str:
    return deploy(bridge, FATAL)


@pytest.fixture
def bystander(bridge: LuaHostBridge) -> Iterator[None]:
    """Another contract, whose worker lives through the test."""
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    assert answers(bridge, HEALTHY)
    with closing(worker_of(bridge, HEALTHY)) as worker:
        yield
        assert answers(bridge, HEALTHY)
        assert worker.is_alive
        assert workers_of(bridge, HEALTHY) == [worker.pid]


def serves(bridge: LuaHostBridge, contract: str) -> bool:
    return bridge.call(contract, 0, None, 1) == bytes([42])


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    ("fn_id", "number", "exit_code", "words"),
    [
        pytest.param(SEGFAULT, signal.SIGSEGV, None, "signal 11 (SIGSEGV)", id="segfault"),
        pytest.param(ABORT, signal.SIGABRT, None, "signal 6 (SIGABRT)", id="abort"),
        pytest.param(FPE, signal.SIGFPE, None, "signal 8 (SIGFPE)", id="raise"),
        pytest.param(EXIT_0, None, 0, "exit code 0", id="exit 0"),
        pytest.param(EXIT_3, None, 3, "exit code 3", id="exit 3"),
        pytest.param(EXIT_0_AT_ONCE, None, 0, "exit code 0", id="_exit 0"),
    ],
)
def test_crash_costs_its_own_call_and_is_blamed(
    bridge: LuaHostBridge, fatal: str, fn_id: int, number: int | None, exit_code: int | None, words: str
) -> None:
    assert serves(bridge, fatal)
    crashed = failure(bridge, fatal, fn_id)
    assert isinstance(crashed, WorkerCrashed)
    assert (crashed.code, crashed.began) == (AbiErrorCode.WORKER_CRASHED, "yes")
    assert (crashed.signal, crashed.exit_code) == (number, exit_code)
    assert f"{fatal} fn {fn_id}: the worker died with {words} while running the call" in crashed.message
    assert crashed.queued is not None and crashed.queued >= 0
    assert crashed.ran is not None and crashed.ran >= 0
    assert serves(bridge, fatal)
    result = bridge.call_host_contract(fatal, fn_id, None, None)
    assert result.code == AbiErrorCode.WORKER_CRASHED
    assert words in result.message


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("fn_id", [pytest.param(LOOP, id="loop"), pytest.param(PAUSE, id="pause")])
def test_endless_call_is_answered_at_its_deadline(bridge: LuaHostBridge, fatal: str, fn_id: int) -> None:
    assert serves(bridge, fatal)
    with Scheduling(*services_of(bridge)) as delays, Stopwatch() as stopwatch:
        late = failure(bridge, fatal, fn_id, timeout=LIMIT_S)
    assert isinstance(late, DeadlineExceeded)
    assert LIMIT_S <= stopwatch.seconds <= LIMIT_S + GRACE_S + delays.latest_s + delays.waited_s
    assert (late.began, late.limit) == ("yes", f"deadline {LIMIT_S:g} s")
    assert f"{fatal} fn {fn_id}: not finished within its deadline 0.3 s: queued " in late.message
    assert (late.signal, late.exit_code) == (None, None)
    assert serves(bridge, fatal)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("fn_id", [pytest.param(STRING_BOMB, id="strings"), pytest.param(TABLE_BOMB, id="tables")])
def test_memory_bomb_is_out_of_memory(bridge: LuaHostBridge, fn_id: int) -> None:
    deploy(bridge, FATAL, memory="16MiB", deadline="10s")
    assert serves(bridge, PROBE)
    with closing(worker_of(bridge, PROBE)) as worker:
        starved = failure(bridge, PROBE, fn_id)
        assert isinstance(starved, OutOfMemory)
        assert starved.began == "yes"
        assert worker.ends_within(), "its VM is not used again"
    assert serves(bridge, PROBE)


def test_out_of_memory_names_contract_function_and_limit(bridge: LuaHostBridge) -> None:
    deploy(bridge, FATAL, memory="16MiB", deadline="10s")
    for fn_id in (STRING_BOMB, TABLE_BOMB):
        starved = failure(bridge, PROBE, fn_id)
        assert f"{PROBE} fn {fn_id}" in starved.message
        assert "memory" in starved.message
        assert starved.limit is not None
        assert "16" in starved.limit


def test_queued_calls_survive_the_crash_before_them(bridge: LuaHostBridge, fatal: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            crash = pool.submit(failure, bridge, fatal, SEGFAULT)
            calls = [pool.submit(serves, bridge, fatal) for _ in range(20)]
            assert isinstance(crash.result(), WorkerCrashed)
            assert all(call.result() for call in calls)
            bridge.revive(fatal)


def test_call_in_the_queue_at_its_deadline_had_not_begun(bridge: LuaHostBridge) -> None:
    deploy(bridge, FATAL)
    assert serves(bridge, PROBE)
    with closing(worker_of(bridge, PROBE)) as worker, ThreadPoolExecutor(1) as pool:
        running = pool.submit(failure, bridge, PROBE, LOOP, timeout=10)
        eventually(lambda: has_begun(bridge), "the loop has begun")
        with Scheduling(*services_of(bridge)) as delays, Stopwatch() as stopwatch:
            queued = failure(bridge, PROBE, 0, timeout=0.1)
        worker.kill()
        assert isinstance(queued, DeadlineExceeded)
        assert (queued.began, queued.limit) == ("no", "deadline 0.1 s")
        assert stopwatch.seconds <= 0.1 + GRACE_S + delays.latest_s + delays.waited_s
        assert running.result().began == "yes"
    assert serves(bridge, PROBE)


def test_short_budget_does_not_kill_the_contract_for_others(bridge: LuaHostBridge) -> None:
    deploy(bridge, function("local ends = luacell.deadline() - 0.05 while luacell.deadline() > ends do end"))
    bridge.call(PROBE, 0)
    with closing(worker_of(bridge, PROBE)) as worker:
        exceeded = 0
        for _ in range(5):
            try:
                bridge.call(PROBE, 0, timeout=0.001)  # is answered where the broker looks later than the run takes
            except DeadlineExceeded:
                exceeded += 1
            with Stopwatch() as stopwatch:
                bridge.call(PROBE, 0)
            assert stopwatch.seconds < 2.0, "two runs of 50 ms, and no wait for a message that was there"
        assert exceeded
        assert worker.is_alive


def test_run_limit_ends_a_call_that_its_caller_would_wait_for(bridge: LuaHostBridge) -> None:
    deploy(bridge, FATAL, deadline="10s", run_limit="200ms")
    with Scheduling(*services_of(bridge)) as delays, Stopwatch() as stopwatch:
        late = failure(bridge, PROBE, LOOP)
    assert isinstance(late, DeadlineExceeded)
    assert (late.began, late.limit) == ("yes", "run_limit 0.2 s")
    assert stopwatch.seconds <= 0.2 + GRACE_S + delays.latest_s + delays.waited_s
    assert serves(bridge, PROBE)


def test_healthy_calls_beside_fifty_crashes_all_succeed(bridge: LuaHostBridge, bystander: None) -> None:
    names = [deploy(bridge, FATAL, f"host.fatal{number}@1") for number in range(10)]
    crashed: list[CallError] = []

    def crash() -> None:
        crashed.extend(failure(bridge, name, SEGFAULT) for name in names for _ in range(5))

    with ThreadPoolExecutor(3) as pool:
        storm = pool.submit(crash)
        others = [pool.submit(call_until, storm.done, bridge) for _ in range(2)]
        storm.result()
        counts = [other.result() for other in others]
    assert [type(error) for error in crashed] == [WorkerCrashed] * 50
    assert all(counts)


def call_until(is_over: Callable[[], bool], bridge: LuaHostBridge) -> int:
    """Call the healthy contract until something is over; return how often."""
    count = 0
    while not is_over():
        assert answers(bridge, HEALTHY, count)
        count += 1
    return count


def test_stateful_contract_starts_afresh_after_a_crash(bridge: LuaHostBridge) -> None:
    deploy(bridge, COUNTER)
    counted = [bridge.call(PROBE, 0, None, 4)[0] for _ in range(3)]
    failure(bridge, PROBE, 1)
    counted += [bridge.call(PROBE, 0, None, 4)[0] for _ in range(2)]
    assert counted == [1, 2, 3, 1, 2]


def test_contract_that_closes_all_its_descriptors_harms_only_its_own_call(
    bridge: LuaHostBridge, bystander: None
) -> None:
    deploy(
        bridge,
        'local ffi = require("ffi") ffi.cdef("int close(int);")\n'
        "return function(fn_id, args, out)\n"
        "  if fn_id == 1 then for fd = 0, 1023 do ffi.C.close(fd) end end\n  out[0] = 42\nend",
    )
    for _ in range(20):
        try:
            assert bridge.call(PROBE, 1, None, 1, timeout=2) == bytes([42])
        except WorkerCrashed as error:
            assert error.began == "yes"
        assert serves(bridge, PROBE)


def test_death_of_an_idle_worker_is_invisible(bridge: LuaHostBridge, fatal: str) -> None:
    for _ in range(10):
        assert serves(bridge, fatal)
        with closing(worker_of(bridge, fatal)) as worker:
            worker.kill()
            assert serves(bridge, fatal), "called before its death is known"
            assert worker.ends_within()
        assert serves(bridge, fatal)


def test_worker_killed_from_outside_in_a_call_is_told_from_a_crash(bridge: LuaHostBridge, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    body = f'if fn_id == 0 then out[0] = 42 return end io.open("{begun}", "w"):close() while true do end'
    deploy(bridge, function(body), deadline="10s", write=[str(tmp_path)])
    assert serves(bridge, PROBE)
    with ThreadPoolExecutor(1) as pool, closing(worker_of(bridge, PROBE)) as worker:
        running = pool.submit(failure, bridge, PROBE, LOOP)
        eventually(begun.exists, "the loop has begun")
        worker.kill()
        crashed = running.result()
    assert isinstance(crashed, WorkerCrashed)
    assert (crashed.signal, crashed.began) == (signal.SIGKILL, "yes")
    assert serves(bridge, PROBE)


def test_worker_s_own_timer_kills_it_when_the_broker_is_stopped(bridge: LuaHostBridge) -> None:
    deploy(bridge, FATAL, run_limit="800ms")
    assert serves(bridge, PROBE)
    with (
        closing(worker_of(bridge, PROBE)) as worker,
        closing(Process(broker_pid(bridge))) as broker,
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(failure, bridge, PROBE, LOOP, timeout=0.8)
        eventually(lambda: has_begun(bridge), "the loop has begun")
        with broker.stopped(), Stopwatch() as stopwatch:
            assert isinstance(running.result(), Unavailable), "nobody answers, and the host does not wait for ever"
            assert worker.ends_within(5.0), "the kernel ends what the broker cannot"
        assert stopwatch.seconds < 5.0
    assert eventually(lambda: serves(bridge, PROBE), "it is served again")
    assert eventually(lambda: "SIGALRM" in bridge.health()["deaths"], "its death is counted")


def test_timer_does_not_outlive_the_call_it_guards(bridge: LuaHostBridge) -> None:
    deploy(bridge, FATAL, run_limit="100ms")
    assert serves(bridge, PROBE)
    with closing(worker_of(bridge, PROBE)) as worker:
        assert not worker.ends_within(2.0)
        assert serves(bridge, PROBE)
        assert workers_of(bridge, PROBE) == [worker.pid]
