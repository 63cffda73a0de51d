"""Limits of single contracts, as `luacell.toml` has them: each holds, and is named when it is hit."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from luacell.client import LuaFunction, LuaHostBridge, VmRegistrationFailed
from luacell.protocol.errors import Busy
from luacell.protocol.limits import KIB, MIB, PAYLOAD_MAX, RSS_MIN, SOURCE_MAX, STATE_MAX
from tests.support.contracts import ECHO, GATED, HEALTHY, PROBE, deploy, function, unregister_all
from tests.support.processes import resident_kib, worker_of
from tests.support.serving import Serving
from tests.support.typed_contracts import COUNTER_LUA, counter_api, deploy_typed
from tests.support.waiting import eventually

# 200 loops, each of them compiled.
COMPILED = function("""
  local sum = 0
  for number = 1, 200 do
    local loop = assert(loadstring("local sum = 0 for n = 1, 100 do sum = sum + n end return sum -- " .. number))
    sum = sum + loop()
  end
  ffi.cast("uint64_t *", out)[0] = sum
""")
# Saves as large a state as there may be, and adds what was lost of it to what is counted.
KEEPING = f"""
function Counter:save() return tostring(self.n) .. ("x"):rep({STATE_MAX} - 1) end
function Counter:restore(text) self.n = tonumber(text:sub(1, 1)) + #text - 1 end
return Counter
"""
# Has 70 MiB from the beginning, beside the 15 of every worker.
HOARD = """
local ffi = require("ffi")
ffi.cdef "void *malloc(size_t); void *memset(void *, int, size_t);"
ffi.C.memset(ffi.C.malloc(70 * 2^20), 1, 70 * 2^20)
return function() end
"""
PRINTING = function("for number = 1, 100 do io.stdout:write(string.rep('x', 99), '\\n') end")


@pytest.fixture
def bridge(shared_serving: Serving) -> Iterator[LuaHostBridge]:
    with LuaHostBridge.connect(shared_serving.run_directory) as bridge:
        yield bridge
        unregister_all(bridge)


def refusals(bridge: LuaHostBridge, directory: Path, count: int, wanted: int, **settings: int) -> list[Busy]:
    """Make calls at once that end only when some of them have been answered, as they can be by refusals alone."""
    gate = directory / "gate"
    name = bytes(gate)
    deploy(bridge, GATED, PROBE, deadline="30s", **settings)
    with ThreadPoolExecutor(count) as pool:
        calls = [pool.submit(bridge.call, PROBE, len(name), name) for _ in range(count)]
        try:
            eventually(lambda: sum(each.done() for each in calls) >= wanted, "calls are refused")
        finally:
            gate.touch()
        errors = [each.exception() for each in calls]
    return [each for each in errors if isinstance(each, Busy)]


def test_calls_in_flight_per_host_are_bounded(bridge: LuaHostBridge, tmp_path: Path) -> None:
    refused = refusals(bridge, tmp_path, 4, 3, max_in_flight=1)
    assert len(refused) == 3
    assert {each.limit for each in refused} == {"calls in flight per host for this contract: 1"}
    assert all(each.retry_after for each in refused)


def test_the_queue_of_a_contract_is_bounded(bridge: LuaHostBridge, tmp_path: Path) -> None:
    refused = refusals(bridge, tmp_path, 16, 1, max_queue=1)
    assert refused
    assert {each.limit for each in refused} == {"calls queued for a contract: 1"}
    assert all(each.retry_after for each in refused)


@pytest.mark.parametrize(("key", "value"), [("max_output", "1KiB"), ("max_log_lines", 1)])
def test_what_a_contract_prints_beyond_its_limit_is_cut_and_counted(
    shared_serving: Serving, bridge: LuaHostBridge, key: str, value: str | int
) -> None:
    name = f"host.{key}@1"
    deploy(bridge, PRINTING, name, **{key: value})
    for _ in range(2):
        bridge.call(name, 0)

    def told() -> tuple[int, int]:
        records = shared_serving.records("contract output", contract=name)
        return sum(len(each["text"]) for each in records), sum(each.get("cut", 0) for each in records)

    eventually(lambda: sum(told()) == 20_000, "all of it is told, or counted")
    kept, cut = told()
    # With max_output: 1 KiB for each number of served calls that the broker may see output with, 0, 1 and 2.
    assert 0 < kept <= (3 * 1024 if key == "max_output" else 6144)
    assert cut == 20_000 - kept


# What a contract may need beside its Lua heap, where that and max_rss are the smallest there are.
LEAST = {"memory": "1MiB", "max_rss": f"{RSS_MIN // MIB}MiB"}


@pytest.mark.parametrize("sandbox", ["default", "hardened"])
@pytest.mark.parametrize("settings", [LEAST, {}], ids=["least", "usual"])
def test_payloads_of_all_sizes_pass_whatever_memory_a_contract_may_have(
    bridge: LuaHostBridge, sandbox: str, settings: dict[str, str]
) -> None:
    deploy(bridge, ECHO, sandbox=sandbox, **settings)
    for size in (PAYLOAD_MAX, MIB, PAYLOAD_MAX):
        args = os.urandom(64) * (size // 64)
        assert bridge.call(PROBE, size, args, size) == args


@pytest.mark.parametrize("sandbox", ["default", "hardened"])
def test_code_is_compiled_whatever_memory_a_contract_may_have(bridge: LuaHostBridge, sandbox: str) -> None:
    """Machine code is mapped apart from the Lua heap, and made writable and executable by turns."""
    deploy(bridge, COMPILED, sandbox=sandbox, **LEAST)
    assert int.from_bytes(bridge.call(PROBE, 0, None, 8), "little") == 200 * 5050


def test_the_largest_state_is_carried_in_little_memory(bridge: LuaHostBridge, tmp_path: Path) -> None:
    lua = COUNTER_LUA.replace("return Counter\n", KEEPING)
    for number in range(2):
        counter = deploy_typed(
            bridge, tmp_path, counter_api(singleton=True), lua, memory="16MiB", max_rss=LEAST["max_rss"]
        )
        assert counter.add(1) == 1 + number * STATE_MAX


@pytest.mark.parametrize("sandbox", ["default", "hardened"])
def test_contract_that_is_at_max_rss_once_it_has_loaded_is_refused(bridge: LuaHostBridge, sandbox: str) -> None:
    with pytest.raises(VmRegistrationFailed, match=r"8\d MiB of memory as soon as it has loaded.*max_rss 64 MiB"):
        deploy(bridge, HOARD, max_rss="64MiB", sandbox=sandbox)
    deploy(bridge, HOARD, max_rss="128MiB", sandbox=sandbox)
    bridge.call(PROBE, 0)


def test_memory_that_only_loading_took_does_not_count(shared_serving: Serving, bridge: LuaHostBridge) -> None:
    name = "host.tidy@1"
    deploy(
        bridge, "local made = {} for n = 1, 1e6 do made[n] = { n } end\n" + ECHO, name, memory="512MiB", max_rss="64MiB"
    )
    for _ in range(200):
        bridge.call(name, 1, b"x", 1)
    assert shared_serving.records("worker recycled", contract=name) == []


def test_worker_does_not_keep_the_memory_of_the_message_that_brought_its_source(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(ECHO))
    bridge.register_host_contract(HEALTHY, LuaFunction(ECHO + "--" + "x" * (SOURCE_MAX - len(ECHO) - 2)))
    for name in (PROBE, HEALTHY):
        bridge.call(name, 0)
    small, large = (resident_kib(worker_of(bridge, name).pid) for name in (PROBE, HEALTHY))
    assert (large - small) * KIB < 1.5 * SOURCE_MAX  # Lua has a copy, too, until it collects garbage
