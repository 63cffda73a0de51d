"""State of singletons over reloads, with real processes: nothing is lost or runs twice; failures leave it fresh."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from luacell.client import LuaHostBridge
from luacell.client.calls import Calls
from luacell.protocol.errors import Busy
from luacell.protocol.limits import MIB, STATE_MAX
from tests.support.serving import Serving
from tests.support.typed_contracts import COUNTER_LUA, counter_api, deploy_typed, write_typed

SAVING_LUA = COUNTER_LUA.replace(
    "return Counter\n",
    """
function Counter:save() return tostring(self.n) end
function Counter:restore(text) self.n = assert(tonumber(text)) end
return Counter
""",
)
SAVES, RESTORES = "return tostring(self.n)", "self.n = assert(tonumber(text))"


def keep(bridge: LuaHostBridge, directory: Path, source: str = SAVING_LUA) -> Any:
    return deploy_typed(bridge, directory, counter_api(singleton=True), source)


def test_singleton_goes_on_where_it_was_over_any_number_of_reloads(bridge: LuaHostBridge, tmp_path: Path) -> None:
    counter = keep(bridge, tmp_path)
    for number in range(1, 6):
        assert counter.add(1) == 2 * number - 1
        assert keep(bridge, tmp_path).add(1) == 2 * number


def test_no_call_is_lost_or_runs_twice_while_state_is_carried(bridge: LuaHostBridge, tmp_path: Path) -> None:
    counter = keep(bridge, tmp_path)
    counts: list[int] = []
    is_over = threading.Event()

    def call() -> None:
        while not is_over.is_set():
            counts.append(counter.add(1))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    try:
        for _ in range(10):
            bridge.deploy(write_typed(tmp_path, counter_api(singleton=True), SAVING_LUA))
    finally:
        is_over.set()
        for caller in callers:
            caller.join()
    assert sorted(counts) == list(range(1, len(counts) + 1))


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("error('full')", RESTORES, "save() failed: contract.lua:"),
        ("return {}", RESTORES, "save() returned a table, not a string"),
        (f"return ('x'):rep({STATE_MAX + 1})", RESTORES, f"save() returned {STATE_MAX + 1} bytes"),
        ("require('ffi').cast('int *', 0)[0] = 1", RESTORES, "its worker died with signal 11 (SIGSEGV)"),
        (SAVES, "error('unfit')", "restore() failed: contract.lua:"),
        (SAVES, "os.exit(3)", "its worker died with exit code 3"),
    ],
    ids=["save raises", "no text", "too large", "save crashes", "restore raises", "restore exits"],
)
def test_what_cannot_be_carried_leaves_a_fresh_singleton_and_a_record(
    serving: Serving, tmp_path: Path, before: str, after: str, reason: str
) -> None:
    with LuaHostBridge.connect(serving.run_directory) as bridge:
        assert keep(bridge, tmp_path, SAVING_LUA.replace(SAVES, before)).add(7) == 7
        counter = keep(bridge, tmp_path, SAVING_LUA.replace(RESTORES, after))
        assert counter.add(1) == 1
        assert counter.add(1) == 2
    record = serving.record("state not carried over")
    assert record["contract"] == "host.counter@1"
    assert reason in record["reason"]


def test_endless_save_ends_in_time(serving: Serving, tmp_path: Path) -> None:
    with LuaHostBridge.connect(serving.run_directory) as bridge:
        keep(bridge, tmp_path, SAVING_LUA.replace(SAVES, "while true do end")).add(7)
        assert keep(bridge, tmp_path).add(1) == 1
    assert "did not save its state within 2 s" in serving.record("state not carried over")["reason"]


def test_state_of_four_mebibytes_is_carried(serving: Serving, tmp_path: Path) -> None:
    with LuaHostBridge.connect(serving.run_directory) as bridge:
        source = SAVING_LUA.replace(SAVES, f"return ('x'):rep({STATE_MAX})").replace(RESTORES, "self.n = #text")
        keep(bridge, tmp_path, source)
        assert keep(bridge, tmp_path, source).add(1) == STATE_MAX + 1
    assert serving.record("state carried over")["bytes"] == STATE_MAX


def test_instances_outlive_all_memory_that_their_host_had(bridge: LuaHostBridge, tmp_path: Path) -> None:
    counter = deploy_typed(bridge, tmp_path, counter_api(), COUNTER_LUA)
    assert counter.add(1) == 1
    calls = bridge._link.calls
    assert isinstance(calls, Calls)
    for _ in range(3):
        with calls.session.lock:
            calls._memory.shrink()  # as when the broker has no memory for something else
        assert bridge.health()["memory_bytes"] == 0
        with contextlib.suppress(Busy):
            assert len(counter.grow("x" * MIB)) == MIB
    assert counter.add(1) == 5
