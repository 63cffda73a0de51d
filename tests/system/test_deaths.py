"""What is told of calls that were not finished and of workers that died, with real processes."""

import os
from collections.abc import Iterator

import pytest

from luacell.client import CallError, DeadlineExceeded, LuaHostBridge, WorkerCrashed
from tests.support.contracts import PROBE, Stopwatch, deploy, failure, function
from tests.support.processes import services_of
from tests.support.scheduling import Scheduling
from tests.support.serving import Serving

LIMIT_S = 0.3
GRACE_S = 0.25  # promise 1
SEGFAULT, LOOP, SLEEP, BURN = range(1, 5)
DEADLY = function("""
  if fn_id == 1 then
    io.stderr:write("last words\\n")
    ffi.cast("int *", 0)[0] = 1
  elseif fn_id == 2 then
    while true do end
  elseif fn_id == 3 then
    ffi.C.poll(nil, 0, 60000)
  elseif fn_id == 4 then
    local from = os.clock()
    while os.clock() - from < 0.25 do end
  end
""").replace("return function", 'ffi.cdef("int poll(void *, unsigned long, int)")\nreturn function', 1)

# fn 1 begins a long message on each stream of its process, as ZMTP 3 has them, which the answer is then taken to be of.
SWALLOWS = function("""
  local kind, size, streams = ffi.new("int[1]"), ffi.new("unsigned[1]", 4), 0
  for descriptor = 3, fn_id * 255 do
    if ffi.C.getsockopt(descriptor, 1, 3, kind, size) == 0 and kind[0] == 1 then
      streams = streams + 1
      ffi.C.write(descriptor, "\\2\\0\\0\\0\\0\\0\\1\\0\\0", 9)
    end
  end
  out[0] = streams
""").replace(
    "return function",
    "ffi.cdef[[int getsockopt(int, int, int, void *, unsigned *); long write(int, const void *, size_t);]]\n"
    "return function",
    1,
)


@pytest.fixture
def bridge(serving: Serving) -> Iterator[LuaHostBridge]:
    with LuaHostBridge.connect(serving.run_directory) as bridge:
        yield bridge


@pytest.fixture
def deadly(bridge: LuaHostBridge) -> str:
    return deploy(bridge, DEADLY)


def overdue(bridge: LuaHostBridge, contract: str, fn_id: int, before: int) -> tuple[CallError, float]:
    """Return how a call failed at its deadline and after how long, with what its process was doing.

    A machine that is too busy to look at the process in time leaves that out; then it is tried again, a few times.
    """
    for _ in range(4):
        bridge.call(contract, before)
        with Scheduling(*services_of(bridge)) as delays, Stopwatch() as stopwatch:
            late = failure(bridge, contract, fn_id, timeout=LIMIT_S)
        assert isinstance(late, DeadlineExceeded)
        assert stopwatch.seconds <= LIMIT_S + GRACE_S + delays.latest_s + delays.waited_s
        if late.state is not None:
            break
    return late, stopwatch.seconds


def test_a_loop_at_its_deadline_is_told_to_compute(bridge: LuaHostBridge, deadly: str) -> None:
    late, seconds = overdue(bridge, deadly, LOOP, before=BURN)  # what calls before it took is not counted
    assert late.queued is not None and late.ran is not None and late.cpu is not None
    assert late.queued + late.ran >= LIMIT_S
    assert 0 < late.cpu <= seconds + 0.01
    assert (late.state, late.wchan) == ("R (running)", None)
    assert f"{deadly} fn {LOOP}: not finished within its deadline 0.3 s: queued " in late.message
    assert " s of CPU, state R (running)" in late.message


def test_a_wait_at_its_deadline_is_told_to_wait(bridge: LuaHostBridge, deadly: str) -> None:
    late, _ = overdue(bridge, deadly, SLEEP, before=0)
    assert late.state == "S (sleeping)"
    assert late.cpu is not None and late.cpu < LIMIT_S
    assert late.wchan is None or f"state S (sleeping) in {late.wchan}" in late.message


def test_the_record_of_a_death_names_its_call(serving: Serving, bridge: LuaHostBridge, deadly: str) -> None:
    crashed = failure(bridge, deadly, SEGFAULT)
    assert isinstance(crashed, WorkerCrashed)
    assert crashed.cpu is not None
    died = serving.record("worker died", contract=PROBE)
    assert (died["function"], died["began"], died["cause"]) == (SEGFAULT, "yes", "signal 11 (SIGSEGV)")
    assert died["host"] == f"pid {os.getpid()} of uid {os.getuid()}"
    assert died["call"] >= 1
    assert died["queued"] >= 0 and died["ran"] > 0 and died["cpu"] >= 0
    assert died["process_cpu"] > 0
    assert died["memory"] > 1 << 20
    assert died["stderr"] == "last words\n"
    assert bridge.health()["deaths"]["SIGSEGV"] == 1


def test_the_record_of_an_ordered_death_says_what_the_process_was_doing(
    serving: Serving, bridge: LuaHostBridge, deadly: str
) -> None:
    failure(bridge, deadly, LOOP, timeout=LIMIT_S)
    died = serving.record("worker died", contract=PROBE)
    assert (died["function"], died["began"], died["level"]) == (LOOP, "yes", "info")
    assert died["process_state"] == "R (running)"
    assert "ran" in died["verdict"]


def test_a_lone_answer_that_its_contract_has_swallowed_is_read_from_the_slot(bridge: LuaHostBridge) -> None:
    deploy(bridge, SWALLOWS, deadline="5s", run_limit="400ms")
    with Stopwatch() as stopwatch:
        assert bridge.call(PROBE, 1, None, 1) == b"\1"
    assert stopwatch.seconds < 1, "long before its deadline"
    assert bridge.call(PROBE, 0, None, 1) == b"\0", "by another worker: the one that was not heard is killed"
