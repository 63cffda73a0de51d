"""Contracts that crash rest, for the host that crashes them or for all; everything else goes on."""

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from luacell.broker.windows import WINDOW_MAX
from luacell.client import AbiErrorCode, LuaFunction, LuaHostBridge
from luacell.protocol.errors import Quarantined, WorkerCrashed
from tests.support.contracts import CRASHED, DOUBLE, HEALTHY, PROBE, answers, deploy, failure, function
from tests.support.pending import has_begun
from tests.support.processes import Process
from tests.support.serving import Serving
from tests.support.typed_contracts import deploy_typed
from tests.support.waiting import LIMIT_S, eventually

CRASHES = 5
CRASHER = function("""
  if args[0] == 1 then ffi.cast("int *", 0)[0] = 1 end
  out[0] = 7
""")
BAD, GOOD = b"\x01", b"\x00"
SEATS = "host.seats@1"
PID, CRASH = range(2)
SEATS_API = """
[[host_contract]]
name = "host.seats"
version = "1.0.0"
[[host_contract.functions]]
name = "pid"
return = "u32"
[[host_contract.functions]]
name = "crash"
[[host_contract.functions]]
name = "spin"
"""
SEATS_LUA = """
local ffi = require("ffi")
ffi.cdef "int getpid(void);"
local Seats = {}
Seats.__index = Seats
function Seats.new() return setmetatable({}, Seats) end
function Seats:pid() return ffi.C.getpid() end
function Seats:crash() ffi.cast("int *", 0)[0] = 1 end
function Seats:spin() while true do end end
return Seats
"""


@pytest.fixture
def bridge(shared_serving: Serving) -> Iterator[LuaHostBridge]:
    with LuaHostBridge.connect(shared_serving.run_directory) as bridge:
        deploy(bridge, CRASHER)
        deploy(bridge, DOUBLE, HEALTHY)
        yield bridge
        for contract in bridge.contracts():
            bridge.unregister_host_contract(contract.id)


def crash(bridge: LuaHostBridge, times: int = CRASHES) -> None:
    for _ in range(times):
        assert failure(bridge, PROBE, args=BAD, out_size=1).code is CRASHED


def test_p12_the_fifth_crash_quarantines_the_contract_for_its_host_alone(
    shared_serving: Serving, bridge: LuaHostBridge
) -> None:
    crash(bridge)
    resting = failure(bridge, PROBE, args=GOOD, out_size=1)
    assert isinstance(resting, Quarantined)
    assert resting.code is AbiErrorCode.QUARANTINED
    assert resting.began == "no"
    assert resting.retry_after is not None
    assert 0 < resting.retry_after <= 1
    assert f"retry in {resting.retry_after:.3g} s" in resting.message
    assert answers(bridge, HEALTHY)
    (row,) = bridge.health()["quarantined"]
    assert (row["contract"], row["why"]) == (PROBE, "crashes")
    with LuaHostBridge.connect(shared_serving.run_directory) as other:
        assert other.call(PROBE, 0, GOOD, 1) == b"\x07"


def test_p12_a_call_that_goes_well_ends_the_quarantine(bridge: LuaHostBridge) -> None:
    crash(bridge)
    served = eventually(lambda: _call(bridge), "the back-off is over")
    assert served == b"\x07"
    assert bridge.call(PROBE, 0, GOOD, 1) == b"\x07"
    assert bridge.health()["quarantined"] == []


def test_p12_a_trial_that_crashes_doubles_the_back_off(bridge: LuaHostBridge) -> None:
    crash(bridge)
    trial = eventually(lambda: _crash_when_allowed(bridge), "the back-off is over")
    assert trial is CRASHED
    resting = failure(bridge, PROBE, args=GOOD, out_size=1)
    assert resting.retry_after is not None
    assert 1 < resting.retry_after <= 2


def test_p12_two_hosts_that_crash_it_stop_the_contract_for_all(shared_serving: Serving, bridge: LuaHostBridge) -> None:
    crash(bridge)
    with (
        LuaHostBridge.connect(shared_serving.run_directory) as second,
        LuaHostBridge.connect(shared_serving.run_directory) as third,
    ):
        crash(second)
        assert failure(third, PROBE, args=GOOD, out_size=1).code is AbiErrorCode.QUARANTINED
        assert answers(third, HEALTHY)
        assert third.revive(PROBE)
        assert not third.revive(PROBE)
        for each in (bridge, second, third):
            assert each.call(PROBE, 0, GOOD, 1) == b"\x07"


def test_p12_hosts_that_crash_it_once_each_stop_the_contract_for_all(
    shared_serving: Serving, bridge: LuaHostBridge
) -> None:
    for _ in range(2 * CRASHES):
        with LuaHostBridge.connect(shared_serving.run_directory) as passing:
            crash(passing, times=1)
    resting = failure(bridge, PROBE, args=GOOD, out_size=1)
    assert isinstance(resting, Quarantined)
    assert "for all hosts, calls of several have crashed it" in resting.message
    assert answers(bridge, HEALTHY)
    assert bridge.revive(PROBE)
    assert bridge.call(PROBE, 0, GOOD, 1) == b"\x07"


def test_p12_what_waits_in_another_seat_of_a_typed_contract_rests_at_once(
    bridge: LuaHostBridge, tmp_path: Path
) -> None:
    proxies = [
        deploy_typed(bridge, tmp_path, SEATS_API, SEATS_LUA, workers=2, deadline="20s"),
        bridge.contract("host.seats"),
    ]
    (crashing,) = struct.unpack("<I", bridge.call(SEATS, PID, None, 4))  # the seat of this host's default instance
    (busy,) = [proxy.with_options(timeout=LIMIT_S) for proxy in proxies if proxy.pid() != crashing]
    with closing(Process(busy.pid())) as worker, ThreadPoolExecutor(2 + WINDOW_MAX) as pool:
        running = pool.submit(busy.spin)
        eventually(lambda: has_begun(bridge), "one seat is busy")
        waiting = [pool.submit(busy.pid) for _ in range(1 + WINDOW_MAX)]
        queued = eventually(lambda: pool_of(bridge, SEATS)["queued"], "what its worker does not hold ahead waits")
        for _ in range(CRASHES):
            assert failure(bridge, SEATS, CRASH, args=None).code is CRASHED
        eventually(lambda: sum(each.done() for each in waiting) >= queued, "what waits is answered")
        assert not running.done(), "and not for its deadline"
        assert {type(each.exception()) for each in waiting if each.done()} == {Quarantined}
        worker.kill()
        assert isinstance(running.exception(LIMIT_S), WorkerCrashed)


def test_p12_crashes_of_nested_calls_count_for_the_host_of_the_chain(
    shared_serving: Serving, bridge: LuaHostBridge
) -> None:
    caller = 'out[0] = select(2, pcall(luacell.call, "host.probe@1", 0, ffi.string(args, 1), 1)) == "\\7" and 7 or 0'
    deploy(bridge, function(caller), "host.caller@1")
    call = partial(bridge.call, "host.caller@1", 0)
    for _ in range(CRASHES):
        assert call(BAD, 1) == b"\0"
    assert failure(bridge, PROBE, args=GOOD, out_size=1).code is AbiErrorCode.QUARANTINED
    with LuaHostBridge.connect(shared_serving.run_directory) as other:
        assert other.call("host.caller@1", 0, GOOD, 1) == b"\7", "another host's chain is served, by the same worker"


def test_p12_kills_from_outside_never_count(bridge: LuaHostBridge) -> None:
    for _ in range(2 * CRASHES):
        assert bridge.call(PROBE, 0, GOOD, 1) == b"\x07"
        (pid,) = [each["pid"] for each in bridge.health()["workers"] if each["contract"] == PROBE]
        os.kill(pid, signal.SIGKILL)
        eventually(partial(_is_gone, bridge, pid), "it is dead")
    assert bridge.call(PROBE, 0, GOOD, 1) == b"\x07"


def test_another_source_ends_the_quarantine(bridge: LuaHostBridge) -> None:
    crash(bridge)
    bridge.register_host_contract(PROBE, LuaFunction(CRASHER), replace=True)
    assert bridge.call(PROBE, 0, GOOD, 1) == b"\x07"


def test_the_shell_revives(shared_serving: Serving, bridge: LuaHostBridge) -> None:
    crash(bridge)
    command = [sys.executable, "-m", "luacell.cli", "revive", PROBE, "--endpoint", str(shared_serving.run_directory)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert told.stdout == f"{PROBE} revived\n"
    assert bridge.call(PROBE, 0, GOOD, 1) == b"\x07"


def pool_of(bridge: LuaHostBridge, contract: str) -> dict[str, Any]:
    return next(pool for pool in bridge.health()["pools"] if pool["contract"] == contract)


def _is_gone(bridge: LuaHostBridge, pid: int) -> bool:
    return all(each["pid"] != pid for each in bridge.health()["workers"])


def _call(bridge: LuaHostBridge) -> bytes | None:
    try:
        return bridge.call(PROBE, 0, GOOD, 1)
    except Quarantined:
        return None


def _crash_when_allowed(bridge: LuaHostBridge) -> AbiErrorCode | None:
    code = failure(bridge, PROBE, args=BAD, out_size=1).code
    return None if code is AbiErrorCode.QUARANTINED else code
