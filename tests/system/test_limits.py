"""Limits of single contracts, as `luacell.toml` has them: each holds, and is named when it is hit."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from luacell.client import LuaHostBridge
from luacell.protocol.errors import Busy
from tests.support.contracts import PROBE, deploy, function, unregister_all
from tests.support.serving import Serving
from tests.support.waiting import eventually

SLOW = function("local till = os.clock() + 0.2; while os.clock() < till do end")
PRINTING = function("for number = 1, 100 do io.stdout:write(string.rep('x', 99), '\\n') end")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("run"), log_level="info") as serving:
        yield serving


@pytest.fixture
def bridge(service: Serving) -> Iterator[LuaHostBridge]:
    with LuaHostBridge.connect(service.run_directory) as bridge:
        yield bridge
        unregister_all(bridge)


def refusals(bridge: LuaHostBridge, count: int) -> list[Busy]:
    with ThreadPoolExecutor(count) as pool:
        errors = [each.exception() for each in [pool.submit(bridge.call, PROBE, 0) for _ in range(count)]]
    return [each for each in errors if isinstance(each, Busy)]


def test_calls_in_flight_per_host_are_bounded(bridge: LuaHostBridge) -> None:
    deploy(bridge, SLOW, max_in_flight=1)
    refused = refusals(bridge, 4)
    assert len(refused) == 3
    assert {each.limit for each in refused} == {"calls in flight per host for this contract: 1"}
    assert all(each.retry_after for each in refused)


def test_the_queue_of_a_contract_is_bounded(bridge: LuaHostBridge) -> None:
    deploy(bridge, SLOW, max_queue=1)
    bridge.call(PROBE, 0)
    refused = refusals(bridge, 16)
    assert refused
    assert {each.limit for each in refused} == {"calls queued for a contract: 1"}
    assert all(each.retry_after for each in refused)


@pytest.mark.parametrize(("key", "value"), [("max_output", "1KiB"), ("max_log_lines", 1)])
def test_what_a_contract_prints_beyond_its_limit_is_cut_and_counted(
    service: Serving, bridge: LuaHostBridge, key: str, value: str | int
) -> None:
    name = f"host.{key}@1"
    deploy(bridge, PRINTING, name, **{key: value})
    for _ in range(2):
        bridge.call(name, 0)

    def told() -> tuple[int, int]:
        records = service.records("contract output", contract=name)
        return sum(len(each["text"]) for each in records), sum(each.get("cut", 0) for each in records)

    eventually(lambda: sum(told()) == 20_000, "all of it is told, or counted")
    kept, cut = told()
    assert 0 < kept <= (2048 if key == "max_output" else 6144)
    assert cut == 20_000 - kept
