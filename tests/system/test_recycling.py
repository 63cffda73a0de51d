"""Recycling: workers that are worn are followed by fresh ones while calls go on, and none of those fails."""

import threading
import time
from collections.abc import Iterator

import pytest

from luacell.client import LuaHostBridge
from tests.support.contracts import COUNTER, PROBE, deploy, unregister_all
from tests.support.serving import Serving
from tests.support.waiting import eventually

# Leaks as many bytes as its function id says.
LEAK = """
local ffi = require("ffi")
ffi.cdef "void *malloc(size_t); void *memset(void *, int, size_t);"
return function(fn_id, args, out)
  ffi.C.memset(ffi.C.malloc(fn_id), 1, fn_id)
end
"""
LEAKED = 10 * 1024  # bytes a call, as in C98
RSS = 96 << 20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("run"), log_level="info") as serving:
        yield serving


@pytest.fixture
def bridge(service: Serving) -> Iterator[LuaHostBridge]:
    with LuaHostBridge.connect(service.run_directory) as bridge:
        yield bridge
        unregister_all(bridge)


def count(bridge: LuaHostBridge, name: str = PROBE) -> int:
    return int.from_bytes(bridge.call(name, 0, b"", 4), "little")


def test_p14_recycling_under_load_fails_no_call(service: Serving, bridge: LuaHostBridge) -> None:
    name = "host.often@1"
    deploy(bridge, COUNTER, name, max_calls=50, stateless=True)
    highest, began = 0, time.monotonic()
    calls = 400
    for number in range(calls):
        highest = max(highest, count(bridge, name))
        pause = began + number / 400 - time.monotonic()
        if pause > 0:
            threading.Event().wait(pause)
    eventually(lambda: len(service.records("worker recycled", contract=name)) >= 6, "workers are recycled")
    assert 50 <= highest <= 80
    records = service.records("worker recycled", contract=name)
    assert {each["limit"] for each in records} == {"max_calls 50"}


def test_c98_a_contract_that_leaks_through_ffi_is_recycled_at_its_memory(
    service: Serving, bridge: LuaHostBridge
) -> None:
    """10 KB a call for 15,000 calls are 150 MB, which is one worker's share and most of another's."""
    name = "host.leak@1"
    deploy(bridge, LEAK, name, max_rss=f"{RSS >> 20}MiB", stateless=True)
    for _ in range(15_000):
        bridge.call(name, LEAKED)
    records = service.records("worker recycled", contract=name)
    assert [each["limit"] for each in records] == ["max_rss"]
    leaked = records[0]["served"] * LEAKED
    assert 0.7 * RSS < leaked < 1.1 * RSS  # a fresh worker has some 15 MiB of its own
