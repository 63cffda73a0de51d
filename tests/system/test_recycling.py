"""Recycling: workers that are worn are followed by fresh ones while calls go on, and none of those fails."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from luacell.broker.starts import RATE
from luacell.client import Busy, LuaFunction, LuaHostBridge, WorkerCrashed
from tests.support.contracts import COUNTER, DOUBLE, HEALTHY, LEAK, LEAKED, PROBE, answers, deploy, unregister_all
from tests.support.serving import Serving
from tests.support.typed_contracts import COUNTER_LUA, counter_api, deploy_typed
from tests.support.waiting import eventually

SAVING_LUA = COUNTER_LUA.replace(
    "return Counter\n",
    """
function Counter:save() return tostring(self.n) end
function Counter:restore(text) self.n = assert(tonumber(text)) end
return Counter
""",
)
RSS = 64 << 20


@pytest.fixture
def bridge(shared_serving: Serving) -> Iterator[LuaHostBridge]:
    with LuaHostBridge.connect(shared_serving.run_directory) as bridge:
        yield bridge
        unregister_all(bridge)


def count(bridge: LuaHostBridge, name: str = PROBE) -> int:
    return int.from_bytes(bridge.call(name, 0, b"", 4), "little")


def test_p14_recycling_under_load_fails_no_call(shared_serving: Serving, bridge: LuaHostBridge) -> None:
    name = "host.often@1"
    deploy(bridge, COUNTER, name, max_calls=50, stateless=True)
    highest = workers = 0
    while workers < 7:
        number = count(bridge, name)
        workers += number == 1
        highest = max(highest, number)
        assert highest <= 80
        # The load's pace, no wait for an event: past its limit a worker has 30 calls, 1.5 s, until it must be followed.
        time.sleep(1 / 400 if number < 50 else 1 / 20)
    eventually(lambda: len(shared_serving.records("worker recycled", contract=name)) >= 6, "workers are recycled")
    assert highest >= 50
    records = shared_serving.records("worker recycled", contract=name)
    assert {each["limit"] for each in records} == {"max_calls 50"}


@pytest.mark.parametrize("sandbox", ["default", "hardened"])
def test_c98_contract_that_leaks_through_ffi_is_recycled_at_its_memory(
    shared_serving: Serving, bridge: LuaHostBridge, sandbox: str
) -> None:
    """10 KB a call for 7,000 calls are 72 MB: more than one worker's share, less than two's."""
    name = f"host.leak_{sandbox}@1"
    deploy(bridge, LEAK, name, max_rss=f"{RSS >> 20}MiB", stateless=True, sandbox=sandbox)
    for _ in range(7_000):
        bridge.call(name, LEAKED)
    records = shared_serving.records("worker recycled", contract=name)
    assert [each["limit"] for each in records] == ["max_rss"]
    leaked = records[0]["served"] * LEAKED
    assert 0.65 * RSS < leaked < RSS  # a fresh worker has some 15 MiB of its own


def test_worker_at_twice_its_memory_is_not_used_again(shared_serving: Serving, bridge: LuaHostBridge) -> None:
    name = "host.glutton@1"
    deploy(bridge, LEAK, name, max_rss="64MiB", sandbox="hardened")
    bridge.call(name, 2 * RSS)
    bridge.call(name, 0)
    eventually(
        lambda: any("max_rss" in each["verdict"] for each in shared_serving.records("worker died", contract=name)),
        "the worker is dead, and it is said why",
    )


def test_p13_crash_storm_has_a_pace_and_others_are_served(shared_serving: Serving, bridge: LuaHostBridge) -> None:
    names = [f"host.storm{number}@1" for number in range(100)]
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: bridge.register_host_contract(name, LuaFunction(COUNTER)), names))
        assert answers(bridge, HEALTHY)
        began = time.monotonic()
        storm = [pool.submit(bridge.call, name, 1, timeout=20) for _ in range(2) for name in names]
        number = 0
        while not all(each.done() for each in storm):
            assert answers(bridge, HEALTHY, number)
            number += 1
        took = time.monotonic() - began
    assert {type(each.exception()) for each in storm} <= {WorkerCrashed, Busy}
    died = shared_serving.records("worker died")
    deaths = sum(each.get("contract") in names and each.get("function") == 1 for each in died)
    assert deaths <= 2 * len(names), "each call costs one worker at most"
    assert len(storm) - len(names) - 100 <= RATE * took, "100 had a worker, 100 starts are free, the others have a pace"
    for name in names:
        bridge.unregister_host_contract(name)


def test_singleton_that_is_recycled_goes_on_where_it_was(
    shared_serving: Serving, bridge: LuaHostBridge, tmp_path: Path
) -> None:
    counter = deploy_typed(bridge, tmp_path, counter_api(singleton=True), SAVING_LUA, max_calls=10)
    with ThreadPoolExecutor(3) as pool:
        counts = list(pool.map(counter.add, [1] * 300))
    assert sorted(counts) == list(range(1, 301))
    eventually(lambda: shared_serving.records("state carried over"), "it was recycled")
