"""Calls that contracts make: through real processes, with crashes, cycles, deadlines and sizes at the bound."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from luacell.broker.bounds import bounds_for
from luacell.client import AbiErrorCode, CallError, LuaFunction, LuaHostBridge
from luacell.client.requests import registration
from luacell.protocol.errors import (
    Busy,
    DeadlineExceeded,
    HostContractNotFound,
    ReentrantCall,
    TooLarge,
    WorkerCrashed,
)
from luacell.protocol.identity import ContractRef
from luacell.protocol.limits import MIB
from tests.support.apis import SVC
from tests.support.contracts import Stopwatch, deploy
from tests.support.processes import broker_pid, run_directory, worker_of
from tests.support.scheduling import Scheduling
from tests.support.serving import Serving
from tests.support.typed_contracts import COUNTER_LUA, SVC_LUA, counter_api, deploy_typed
from tests.support.waiting import LIMIT_S, eventually

WORKERS = 4
FEW_DESCRIPTORS = 120  # for a broker that may have so many workers
# Runs the Lua in its args, of the size in fn_id; its value is what comes back, behind its size.
EVAL = """
local ffi = require("ffi")
return function(fn_id, args, out)
  local value = tostring((assert(load(ffi.string(args, fn_id)))()))
  ffi.cast("uint32_t *", out)[0] = #value
  ffi.copy(out + 4, value, #value)
end
"""
OUT_SIZE = 4096
ECHO_OF_ALL = 'local ffi = require("ffi"); return function(size, args, out) ffi.copy(out, args, size) end'

# The same from Lua: run(contract, source).
RUN = """
local ffi = require("ffi")
local function run(contract, source)
  local out = luacell.call(contract, #source, source, 4096)
  local size = ffi.cast("const uint32_t *", out)[0]
  return out:sub(5, 4 + size)
end
"""


def run(bridge: LuaHostBridge, contract: str, source: str, timeout: float | None = None) -> str:
    """Have a contract run some Lua, which has `run` for others."""
    text = (RUN + source).encode()
    out = bridge.call(contract, len(text), text, OUT_SIZE, timeout=timeout)
    (size,) = struct.unpack_from("<I", out)
    return out[4 : 4 + size].decode()


def through(*contracts: str, end: str = "return 'end'") -> str:
    """Return Lua that has contracts run Lua for one another, and the last one `end`."""
    source = end
    for contract in reversed(contracts):
        source = _nest(contract, source)
    return source


def _nest(contract: str, source: str) -> str:
    level = 1
    while f"]{'=' * level}]" in source or f"[{'=' * level}[" in source:
        level += 1
    return f"{RUN} return run('{contract}', [{'=' * level}[{source}]{'=' * level}])"


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LuaHostBridge]:
    with LuaHostBridge.with_capacity(4) as bridge:
        for name in "abcd":
            deploy(bridge, EVAL, f"host.{name}@1", deadline="5s")
        deploy(bridge, EVAL, "host.pure@1", stateless=True, deadline="5s")
        deploy(bridge, ECHO_OF_ALL, "host.echo@1", stateless=True, workers=2)
        deploy_typed(bridge, tmp_path_factory.mktemp("svc"), SVC, SVC_LUA)
        yield bridge


def test_a_contract_calls_another_and_gets_its_bytes(bridge: LuaHostBridge) -> None:
    assert run(bridge, "host.a@1", through("host.b@1", "host.c@1", end="return 'from c'")) == "from c"


def test_a_typed_contract_is_called_with_values(bridge: LuaHostBridge) -> None:
    assert run(bridge, "host.a@1", "return luacell.call('host.svc@1', 'upper', 'text')") == "TEXT"
    assert run(bridge, "host.a@1", "return luacell.call('host.svc@1', 'scale', 3, 1.5, true)") == "4.5"


def test_an_error_of_the_called_contract_is_caught_or_becomes_the_callers_own(bridge: LuaHostBridge) -> None:
    caught = """
      local fine, problem = pcall(run, "host.b@1", "luacell.fail(1234, 'refused')")
      local parts = { tostring(fine), problem.code, problem.message, problem.kind, problem.began, tostring(problem) }
      return table.concat(parts, "|")
    """
    assert run(bridge, "host.a@1", caught) == "false|1234|refused|CallError|yes|refused"
    with pytest.raises(CallError, match="refused") as failed:
        run(bridge, "host.a@1", through("host.b@1", end="luacell.fail(1234, 'refused')"))
    assert (failed.value.code, failed.value.began) == (1234, "yes")


def test_what_cannot_be_called_says_so(bridge: LuaHostBridge) -> None:
    with pytest.raises(HostContractNotFound):
        run(bridge, "host.a@1", "return luacell.call('host.nobody@1', 0)")
    with pytest.raises(CallError, match="has no function nothing"):
        run(bridge, "host.a@1", "return luacell.call('host.svc@1', 'nothing')")
    with pytest.raises(CallError, match="takes 1 arguments, got 2"):
        run(bridge, "host.a@1", "return luacell.call('host.svc@1', 'upper', 'a', 'b')")
    with pytest.raises(CallError, match="expected StringView"):
        run(bridge, "host.a@1", "return luacell.call('host.svc@1', 'upper', 7)")
    with pytest.raises(CallError, match="is a raw contract"):
        run(bridge, "host.a@1", "return luacell.call('host.b@1', 'upper', 7)")
    with pytest.raises(CallError, match="lacks its version"):
        run(bridge, "host.a@1", "return luacell.call('host.b', 0)")
    for words in ("'host.b@1', 0, 7", "'host.b@1', 0, '', 1.5", "'host.b@1', -1", "7, 0"):
        with pytest.raises(CallError, match=r"Lua exception: \[string .*luacell.call: "):
            run(bridge, "host.a@1", f"luacell.call({words}) return 1")


@pytest.mark.parametrize("way", [["host.a@1"], ["host.b@1", "host.a@1"], ["host.b@1", "host.c@1", "host.a@1"]])
def test_a_chain_that_comes_back_to_a_contract_with_state_is_refused(bridge: LuaHostBridge, way: list[str]) -> None:
    began = time.monotonic()
    with pytest.raises(ReentrantCall, match="would wait for itself") as failed:
        run(bridge, "host.a@1", through(*way))
    assert failed.value.began == "yes"  # the host's own call had begun
    assert time.monotonic() - began < 4  # and did not wait for its deadline
    assert run(bridge, "host.a@1", through("host.b@1")) == "end"


def test_a_chain_that_comes_back_to_a_stateless_contract_has_another_worker(bridge: LuaHostBridge) -> None:
    assert run(bridge, "host.pure@1", through("host.a@1", "host.pure@1", "host.b@1", "host.pure@1")) == "end"
    assert run(bridge, "host.pure@1", "return 'one again'") == "one again"


def test_a_crash_of_the_called_contract_is_caught_by_its_caller(bridge: LuaHostBridge) -> None:
    crash = """
      local fine, problem = pcall(run, "host.b@1", "require('ffi').cast('int *', 0)[0] = 1")
      return problem.code .. " " .. problem.kind .. " " .. problem.began
    """
    assert run(bridge, "host.a@1", crash) == "257 WorkerCrashed yes"
    assert run(bridge, "host.a@1", through("host.b@1")) == "end"


def test_a_crash_of_a_caller_fails_its_chain_and_spares_the_called(bridge: LuaHostBridge) -> None:
    with pytest.raises(WorkerCrashed):
        run(
            bridge,
            "host.a@1",
            through("host.b@1", end=f"{RUN} run('host.c@1', ''); require('ffi').cast('int *', 0)[0] = 1"),
        )
    assert run(bridge, "host.a@1", through("host.b@1", "host.c@1")) == "end"


def test_the_deadline_holds_through_three_levels_and_spares_who_waited(bridge: LuaHostBridge) -> None:
    for name in "ab":
        run(bridge, f"host.{name}@1", "counted = (counted or 0) + 1")
    with Scheduling() as delays, Stopwatch() as stopwatch, pytest.raises(DeadlineExceeded):
        run(bridge, "host.a@1", through("host.b@1", "host.c@1", end="while true do end"), timeout=0.4)
    assert stopwatch.seconds < 0.4 + 0.25 + 0.25 + delays.slack_s
    for name in "ab":  # their workers have only waited
        assert run(bridge, f"host.{name}@1", "return counted") != "nil"
    left = float(run(bridge, "host.a@1", through("host.b@1", end="return luacell.deadline()"), timeout=0.8))
    assert 0 < left < 0.8


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, MIB])
def test_arguments_and_results_of_up_to_a_mebibyte(bridge: LuaHostBridge, size: int) -> None:
    source = f"""
      local text = ("abcdefg"):rep({size} / 7 + 1):sub(1, {size})
      return tostring(luacell.call("host.echo@1", #text, text, #text) == text)
    """
    assert run(bridge, "host.a@1", source) == "true"


def test_more_than_a_mebibyte_is_refused(bridge: LuaHostBridge) -> None:
    for call in (f"('x'):rep({MIB} + 1)", f"'x', {MIB} + 1"):
        with pytest.raises(TooLarge, match="1048577 bytes is over the limit of 1048576"):
            run(bridge, "host.a@1", f"return luacell.call('host.echo@1', 1, {call})")


def test_sixty_four_chains_at_once(bridge: LuaHostBridge) -> None:
    """Singletons serve one after another what goes through them; nothing waits in a circle."""
    ways = [("host.a@1", "host.b@1"), ("host.b@1", "host.c@1"), ("host.c@1", "host.d@1"), ("host.pure@1", "host.d@1")]

    def chain(number: int) -> str:
        first, second = ways[number % len(ways)]
        return run(bridge, first, through(second, end=f"return {number}"))

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(chain, range(64))) == [str(number) for number in range(64)]


def test_chains_that_meet_in_a_circle_all_end(bridge: LuaHostBridge) -> None:
    """Each of three contracts is called first by some and last by others: some chains are refused, none waits on."""
    names = ["host.a@1", "host.b@1", "host.c@1"]

    def chain(number: int) -> str:
        way = [names[(number + step) % 3] for step in range(3)]
        try:
            return run(bridge, way[0], through(way[1], way[2]))
        except ReentrantCall:
            return "refused"

    began = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(chain, range(96)))
    assert set(results) <= {"end", "refused"} and "end" in results
    assert time.monotonic() - began < 5


def runs(bridge: LuaHostBridge, contract: str) -> bool:
    """Whether a worker of a contract runs a call now, and waits for none."""
    return any(each["contract"] == contract and each["state"] == "busy" for each in bridge.health()["workers"])


SPIN = "while true do end"


def test_a_worker_that_is_killed_in_the_middle_of_a_chain_fails_it_from_there(bridge: LuaHostBridge) -> None:
    run(bridge, "host.a@1", "kept = 7")
    caught = f"""
      local fine, problem = pcall(run, "host.b@1", [==[{RUN} return run("host.c@1", "{SPIN}")]==])
      return problem.code .. " " .. problem.kind .. " " .. problem.began .. " " .. kept
    """
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run, bridge, "host.a@1", caught, 2.0)
        eventually(lambda: runs(bridge, "host.c@1"), "the chain is under way")
        with closing(worker_of(bridge, "host.b@1")) as worker:
            worker.kill()
        assert waiting.result(LIMIT_S) == "257 WorkerCrashed yes 7"
    assert run(bridge, "host.a@1", through("host.b@1")) == "end"
    assert run(bridge, "host.c@1", "return 'free'") == "free"  # at the deadline of what it was called for


def test_a_host_that_goes_in_the_middle_of_a_chain_leaves_all_its_contracts_free(bridge: LuaHostBridge) -> None:
    with LuaHostBridge.connect(run_directory(broker_pid(bridge))) as other, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run, other, "host.a@1", through("host.b@1", "host.c@1", end=SPIN), 2.0)
        eventually(lambda: runs(bridge, "host.c@1"), "the chain is under way")
        other.close()
        assert waiting.exception(LIMIT_S) is not None
    assert run(bridge, "host.a@1", through("host.b@1", "host.c@1")) == "end"


def test_a_private_contract_is_called_along_its_hosts_chains_alone(bridge: LuaHostBridge) -> None:
    own = ContractRef.of("host.own@1")
    with LuaHostBridge.connect(run_directory(broker_pid(bridge))) as other:
        other._request(registration(own, LuaFunction(EVAL), private=True), own.id)
        assert run(other, "host.a@1", through("host.b@1", "host.own@1", end="return 'mine'")) == "mine"
        assert run(other, "host.a@1", through("host.own@1", "host.b@1")) == "end"
        assert run(other, "host.own@1", through("host.a@1", "host.b@1")) == "end"
        assert other.lua().eval(through("host.a@1", "host.own@1")) == "end"
        with pytest.raises(ReentrantCall, match="would wait for itself"):
            run(other, "host.own@1", through("host.a@1", "host.own@1"))
        with pytest.raises(HostContractNotFound):
            run(bridge, "host.a@1", through("host.b@1", "host.own@1"))
        assert run(other, "host.a@1", through("host.own@1")) == "end"
    with pytest.raises(HostContractNotFound):
        run(bridge, "host.a@1", through("host.own@1"))


def test_a_chain_for_which_there_is_no_worker_more_is_told_so_at_once(tmp_path: Path) -> None:
    few = ("prlimit", f"--nofile={FEW_DESCRIPTORS}")
    with (
        Serving(tmp_path / "run", "--spares", "0", prefix=few) as serving,
        LuaHostBridge.connect(serving.run_directory) as bridge,
    ):
        deploy(bridge, EVAL, "host.pure@1", stateless=True, deadline="30s")
        for name in "abc":
            deploy(bridge, EVAL, f"host.{name}@1", deadline="30s")
        assert len(bridge.health()["workers"]) == WORKERS == bounds_for(FEW_DESCRIPTORS).workers
        caught = "local fine, problem = pcall(run, 'host.pure@1', 'return 1'); return problem.code .. problem.message"
        began = time.monotonic()
        told = run(bridge, "host.pure@1", through("host.a@1", end=RUN + caught))
        assert time.monotonic() - began < 10, "nobody has waited for the deadline"
        assert told.startswith(f"{int(AbiErrorCode.BUSY)}host.pure@1: the bound on workers: {WORKERS} is reached")
        with pytest.raises(Busy, match=f"the bound on workers: {WORKERS} is reached"):
            run(bridge, "host.pure@1", through("host.a@1", "host.pure@1"))
        assert run(bridge, "host.pure@1", through("host.a@1", "host.b@1", "host.c@1")) == "end"
        bridge.unregister_host_contract("host.c@1")
        assert run(bridge, "host.pure@1", through("host.a@1", "host.pure@1", "host.b@1")) == "end"


def test_a_typed_contract_that_was_replaced_is_called_by_its_new_description(
    bridge: LuaHostBridge, tmp_path: Path
) -> None:
    call = "return luacell.call('host.counter@1', 'add', 2)"
    deploy_typed(bridge, tmp_path, counter_api(), COUNTER_LUA)
    assert run(bridge, "host.a@1", call) == "2"
    deploy_typed(bridge, tmp_path, counter_api() + "# another description\n", COUNTER_LUA)
    assert run(bridge, "host.a@1", call + " + 1") == "3"


@pytest.mark.parametrize("size", [0, 1000, 5000, 300_000, MIB - 64])
def test_a_typed_result_that_is_larger_than_was_thought_is_fetched(bridge: LuaHostBridge, size: int) -> None:
    call = f"return #luacell.call('host.svc@1', 'upper', ('x'):rep({size}))"
    for _ in range(2):  # the second time there is room for it
        assert run(bridge, "host.b@1", call) == str(size)
