"""Typed contracts through real processes: every value, every refusal, instances, and what a crash or an end does."""

from __future__ import annotations

import asyncio
import gc
import math
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luacell.client import (
    AbiErrorCode,
    AsyncLuaHostBridge,
    HostContractCallFailed,
    HostContractVersionMismatch,
    LuaFunction,
    LuaHostBridge,
    TypeMismatch,
    VmRegistrationFailed,
    WorkerCrashed,
)
from luacell.client.deployment import DeploymentError
from luacell.protocol.errors import StaleHandle
from luacell.protocol.limits import MIB
from tests.support.apis import SVC, apis, bits, values
from tests.support.children import child_process
from tests.support.contracts import failure
from tests.support.in_process import InProcess
from tests.support.processes import broker_pid, resident_kib, run_directory, workers_of
from tests.support.typed_contracts import (
    COUNTER_LUA,
    RAW_SVC_LUA,
    SVC_LUA,
    counter_api,
    deploy_typed,
    echoes,
    write_typed,
)
from tests.support.waiting import settles

U64_MAX, I64_MIN = (1 << 64) - 1, -(1 << 63)
COUNTER = "host.counter@1"


PID_API = """
[[host_contract.functions]]
name = "pid"
return = "u32"
"""
PID_LUA = """
local ffi = require("ffi")
ffi.cdef "int getpid(void);"
function Counter:pid() return ffi.C.getpid() end
return Counter
"""


@pytest.fixture
def svc(bridge: LuaHostBridge, tmp_path: Path) -> Any:
    return deploy_typed(bridge, tmp_path, SVC, SVC_LUA)


@pytest.fixture
def counter(bridge: LuaHostBridge, tmp_path: Path) -> Any:
    return deploy_typed(bridge, tmp_path, counter_api(), COUNTER_LUA)


# -- values ----
def test_all_functions_of_the_known_contract(svc: Any) -> None:
    assert svc.scale(3, 2.5, True) == 7.5
    assert svc.scale(k=255, v=math.inf, on=False) == -math.inf
    assert math.isnan(svc.scale(1, math.nan, True))
    assert svc.upper("") == ""
    assert svc.upper("héllo") == "HéLLO"
    record = svc.mix(1, {"x": 1.0, "y": 2.0}, b"ab", 7)
    assert (record.flag, record.id, record.label, record.blob) == (True, U64_MAX, "tag 7", b"abab")
    assert (record.at.x, record.at.y, record.mode) == (2.0, 1.0, 1)
    assert svc.open(1, 0, 0) == 1
    assert svc.open(3, -128, I64_MIN) == 2


def test_strings_of_three_mebibytes(svc: Any) -> None:
    text = "x" * (3 * MIB)
    assert svc.upper(text) == text.upper()
    assert svc.upper(text[1:]) == text[1:].upper()  # with room enough at once
    assert len(svc.mix(0, {"x": 0.0, "y": 0.0}, text.encode(), 0).blob) == 6 * MIB


def test_buffers_are_views_on_request(svc: Any) -> None:
    data = bytes(range(256)) * 8192  # fetched at first, with room enough at once later
    viewing = svc.with_options(views=True, timeout=10)
    for _ in range(2):
        blob = viewing.mix(0, {"x": 0.0, "y": 0.0}, data, 0).blob
        assert type(blob) is memoryview
        assert blob == 2 * data
    assert type(svc.mix(0, {"x": 0.0, "y": 0.0}, b"", 0).blob) is bytes
    assert viewing.upper("a") == "A"


@given(st.data())
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_drawn_descriptions_and_values_come_back_as_in_process(bridge: LuaHostBridge, data: st.DataObject) -> None:
    text = data.draw(apis())
    source = echoes(text)
    alone = InProcess(text, source, room=1 << 16)
    assert (alone.problem, alone.reason) == ("", "")
    with tempfile.TemporaryDirectory() as directory:
        proxy = deploy_typed(bridge, Path(directory), text, source)
    try:
        for function in alone.contract.functions:
            args = tuple(data.draw(values(param.type, alone.types)) for param in function.params)
            marshaller = alone.functions[function.name]
            same = [value for param, value in zip(function.params, args, strict=True) if param.type == function.result]
            if not same and marshaller.out_size:
                error = failure(bridge, int(alone.contract.id), function.id, args=marshaller.pack(args), out_size=65536)
                assert type(error) is HostContractCallFailed
                assert f"{alone.contract} {function.name}: result" in error.message
                continue
            expected = alone.bytes_of(function.name, *args)
            raw = bridge.call(alone.contract.id, function.id, marshaller.pack(args), len(expected))
            assert raw == expected
            result = getattr(proxy, function.name)(*(_as_host(proxy, value) for value in args))
            assert _plain(result) == _plain(same[0] if same else None)
    finally:
        bridge.unregister_host_contract(alone.contract.id)


def _as_host(proxy: Any, value: Any) -> Any:
    """Give structs as dicts and enums as numbers: the proxy has types of its own."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _as_host(proxy, getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, list):
        return [_as_host(proxy, item) for item in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return [_plain(getattr(value, name)) for name in value.__dataclass_fields__]
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else bits(value)


# -- refusals ----
@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return '\\255'", "UTF-8"),
        ("return nil", "expected StringView, got nil"),
        ("return 1", "expected StringView, got number 1"),
    ],
)
def test_bad_result_is_the_contracts_fault(bridge: LuaHostBridge, tmp_path: Path, body: str, text: str) -> None:
    source = SVC_LUA.replace("return text:upper()", body)
    svc = deploy_typed(bridge, tmp_path, SVC, source)
    with pytest.raises(HostContractCallFailed, match=text) as raised:
        svc.upper("x")
    assert raised.value.code is AbiErrorCode.HOST_CONTRACT_CALL_FAILED
    assert "host.svc@1" in raised.value.message and "upper" in raised.value.message
    assert svc.scale(1, 1.0, True) == 1.0


@pytest.mark.parametrize("words", [(17, 1), (0, 17), (U64_MAX, 1), (1, U64_MAX), (U64_MAX, U64_MAX)])
def test_ranges_of_a_raw_caller_are_checked(bridge: LuaHostBridge, svc: Any, words: tuple[int, int]) -> None:
    (before,) = workers_of(bridge, "host.svc@1")
    error = failure(bridge, "host.svc@1", 1, args=struct.pack("<QQ", *words), out_size=64)
    assert error.code is AbiErrorCode.HOST_CONTRACT_CALL_FAILED
    assert "host.svc@1 upper: text" in error.message
    assert workers_of(bridge, "host.svc@1") == [before]
    assert svc.upper("a") == "A"


def test_raw_calls_by_the_known_layout_reach_the_default_instance(bridge: LuaHostBridge, counter: Any) -> None:
    one = struct.pack("<I", 1)
    assert [bridge.call(COUNTER, 0, one, 4) for _ in range(2)] == [struct.pack("<I", n) for n in (1, 2)]
    assert counter.add(1) == 1
    with LuaHostBridge.connect(run_directory(broker_pid(bridge))) as other:
        assert other.call(COUNTER, 0, one, 4) == one
    error = failure(bridge, COUNTER, 5, args=b"", out_size=4)
    assert error.code is AbiErrorCode.FUNCTION_NOT_AVAILABLE
    assert "host.counter@1 has 5 functions; there is no function 5" in error.message


def test_room_beyond_the_result_shows_nothing_of_earlier_calls(bridge: LuaHostBridge, svc: Any) -> None:
    secret = struct.pack("<QQ", 16, 200) + b"s" * 200
    bridge.call("host.svc@1", 1, secret, 256)
    result = bridge.call("host.svc@1", 0, struct.pack("<B7xd?7x", 1, 1.0, True), 256)
    assert result[:8] == struct.pack("<d", 1.0)
    assert b"S" not in result


@pytest.mark.parametrize(
    ("source", "kind", "text"),
    [
        ("return 42", TypeMismatch, "expected Lua table, got Lua number"),
        (SVC_LUA.replace("Svc:open", "Svc:opened"), VmRegistrationFailed, "host.svc@1: the implementation has no"),
    ],
)
def test_what_is_no_implementation_is_refused(
    bridge: LuaHostBridge, tmp_path: Path, source: str, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        bridge.deploy(write_typed(tmp_path, SVC, source))
    assert bridge.contracts() == []


def test_raw_function_serves_a_typed_contract(bridge: LuaHostBridge, tmp_path: Path) -> None:
    svc = deploy_typed(bridge, tmp_path, SVC, RAW_SVC_LUA)
    text = "x" * (3 * MIB)
    assert (svc.scale(3, 2.5, True), svc.upper(""), svc.upper("a\0b")) == (7.5, "", "A\0B")
    assert svc.upper(text) == text.upper()
    record = svc.mix(1, {"x": 1.0, "y": 2.0}, text.encode(), 7)
    assert (record.flag, record.id, record.label, record.at.x) == (True, U64_MAX, "tag 7", 2.0)
    assert record.blob == 2 * text.encode()
    assert svc.open(3, -128, I64_MIN) == 2
    raw = bridge.call("host.svc@1", 1, struct.pack("<QQ", 16, 2) + b"ab", 24)
    assert raw == struct.pack("<QQ", 16, 2) + b"AB" + bytes(6), "callers by bytes see offsets"


def test_pointers_of_a_raw_function_are_its_own_affair(bridge: LuaHostBridge, tmp_path: Path) -> None:
    wild = """
    local ffi = require("ffi")
    return function(fn_id, args, out)
      ffi.cast("uint64_t *", out)[0], ffi.cast("uint64_t *", out)[1] = 4096, args[8]
    end
    """
    svc = deploy_typed(bridge, tmp_path, SVC, wild)
    assert svc.upper("") == ""
    with pytest.raises(WorkerCrashed) as raised:
        svc.upper("followed")
    assert (raised.value.signal, raised.value.began) == (11, "yes")
    with pytest.raises(StaleHandle):
        svc.upper("")
    assert bridge.contract("host.svc").upper("") == ""


def test_untrusted_contract_is_no_raw_function(bridge: LuaHostBridge, tmp_path: Path) -> None:
    with pytest.raises(TypeMismatch, match="expected Lua table, got Lua function"):
        bridge.deploy(write_typed(tmp_path, SVC, "function(fn_id, args, out) end", sandbox="untrusted"))


def test_table_is_no_raw_contract(bridge: LuaHostBridge) -> None:
    with pytest.raises(TypeMismatch, match="expected Lua function, got Lua table"):
        bridge.register_host_contract(1234, LuaFunction("{}"))
    bridge.register_host_contract("host.raw@1", LuaFunction("function() end"))
    with pytest.raises(TypeMismatch, match="expected a typed contract"):
        bridge.contract("host.raw")


def test_versions_are_negotiated(bridge: LuaHostBridge, svc: Any) -> None:
    assert bridge.contract("host.svc", "1.2").upper("a") == "A"
    for version in ("1.4", "2.0"):
        with pytest.raises(HostContractVersionMismatch, match=rf"{version}.* is required, 1\.3\.0 is registered"):
            bridge.contract("host.svc", version)


# -- instances ----
def test_proxies_count_apart(bridge: LuaHostBridge, counter: Any) -> None:
    other = bridge.contract("host.counter")
    assert [counter.add(1), counter.add(1), other.add(5), counter.add(1)] == [1, 2, 5, 3]
    assert counter.with_options(timeout=5.0).add(1) == 4


def test_instance_outlives_the_memory_that_its_calls_used(counter: Any) -> None:
    assert counter.add(1) == 1
    for size in (10, 100_000, 10, 3 * MIB, 20 * MIB, 10):
        assert len(counter.grow("x" * size)) == size
    assert counter.add(1) == 8


def test_singleton_counts_together_over_hosts(bridge: LuaHostBridge, tmp_path: Path) -> None:
    counter = deploy_typed(bridge, tmp_path, counter_api(singleton=True), COUNTER_LUA)
    with LuaHostBridge.connect(run_directory(broker_pid(bridge))) as other:
        assert [counter.add(1), other.contract("host.counter").add(1), counter.add(1)] == [1, 2, 3]
    assert bridge.contract("host.counter").add(1) == 4


def test_crash_makes_handles_stale_and_a_new_proxy_works(bridge: LuaHostBridge, counter: Any) -> None:
    other = bridge.contract("host.counter")
    assert (counter.add(1), other.add(1)) == (1, 1)
    with pytest.raises(WorkerCrashed, match=r"host\.counter@1 fn 3"):
        counter.crash()
    for proxy in (counter, other):
        with pytest.raises(StaleHandle, match="worker was replaced") as raised:
            proxy.add(1)
        assert raised.value.code is AbiErrorCode.STALE_HANDLE
    assert bridge.contract("host.counter").add(1) == 1


def test_new_proxies_know_nothing_of_replacements(bridge: LuaHostBridge, counter: Any, tmp_path: Path) -> None:
    with LuaHostBridge.connect(run_directory(broker_pid(bridge))) as other, ThreadPoolExecutor(1) as pool:
        directory = write_typed(tmp_path / "again", counter_api(), COUNTER_LUA)
        (directory / "luacell.toml").write_text(f'name = "{tmp_path.name}"\n{(directory / "luacell.toml").read_text()}')
        reloading = pool.submit(lambda: [other.deploy(directory) for _ in range(15)])
        while not reloading.done():
            assert bridge.contract("host.counter").add(1) == 1
        assert reloading.result() == [[COUNTER]] * 15


def test_dropped_proxy_destroys_its_instance(bridge: LuaHostBridge, counter: Any) -> None:
    other = bridge.contract("host.counter")
    other.add(1)
    derived = other.with_options(timeout=5.0)
    del other
    gc.collect()
    assert derived.add(1) == 2
    assert counter.destroyed() == 0
    del derived
    gc.collect()
    assert counter.destroyed() == 1


def test_instances_are_spread_over_workers_and_kept_there(bridge: LuaHostBridge, tmp_path: Path) -> None:
    source = COUNTER_LUA.replace("return Counter\n", PID_LUA)
    counter = deploy_typed(bridge, tmp_path, counter_api() + PID_API, source, workers=3)
    proxies = [counter, *(bridge.contract("host.counter") for _ in range(5))]
    pids = [proxy.pid() for proxy in proxies]
    assert sorted(pids.count(pid) for pid in set(pids)) == [2, 2, 2]
    assert sorted(workers_of(bridge, COUNTER)) == sorted(set(pids))
    for _ in range(3):
        assert [proxy.pid() for proxy in proxies] == pids
    assert [proxy.add(1) for proxy in proxies] == [1] * 6
    assert len(counter.grow("x" * 100_000)) == 100_000  # fetched from where it is kept
    with pytest.raises(WorkerCrashed):
        counter.crash()
    for proxy, pid in zip(proxies, pids, strict=True):
        if pid == pids[0]:
            with pytest.raises(StaleHandle):
                proxy.add(1)
        else:
            assert proxy.add(1) == (2 if proxy is not counter else 3)
    assert sorted(workers_of(bridge, COUNTER)) != sorted(set(pids))


def test_raw_calls_of_one_host_reach_one_default_instance_in_any_number_of_workers(
    bridge: LuaHostBridge, tmp_path: Path
) -> None:
    deploy_typed(bridge, tmp_path, counter_api(), COUNTER_LUA, workers=4)
    one = struct.pack("<I", 1)
    assert [bridge.call(COUNTER, 0, one, 4) for _ in range(5)] == [struct.pack("<I", n) for n in range(1, 6)]


def test_singleton_has_one_worker(bridge: LuaHostBridge, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"luacell.toml:4:11: .* workers = 2 is not 1: a singleton"):
        deploy_typed(bridge, tmp_path, counter_api(singleton=True), COUNTER_LUA, workers=2)


def test_close_destroys_instances(bridge: LuaHostBridge, counter: Any) -> None:
    with LuaHostBridge.connect(run_directory(broker_pid(bridge))) as other:
        proxies = [other.contract("host.counter") for _ in range(3)]
        assert [proxy.add(1) for proxy in proxies] == [1, 1, 1]
        other.call(COUNTER, 0, struct.pack("<I", 1), 4)
    settles(counter.destroyed, 4, "the instances of a closed bridge are destroyed")


HOST = """
import sys
from luacell.client import LuaHostBridge
bridge = LuaHostBridge.connect(sys.argv[1])
proxy = bridge.contract("host.counter")
proxy.add(1)
print("ready", flush=True)
sys.stdin.read()
"""


def test_death_of_a_host_destroys_its_instances(bridge: LuaHostBridge, counter: Any) -> None:
    command = [sys.executable, "-c", HOST, run_directory(broker_pid(bridge))]
    with child_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"ready\n"
        assert counter.destroyed() == 0
        host.kill()
    settles(counter.destroyed, 1, "the instance of a dead host is destroyed")


def test_ten_thousand_instances_leave_nothing(bridge: LuaHostBridge, counter: Any) -> None:
    def churn(count: int) -> None:
        for _ in range(count):
            bridge_contract().add(1)

    shared, call = counter.__luacell_shared__, counter.__luacell_call__

    def bridge_contract() -> Any:
        return type(counter)(shared, call)

    churn(3_000)  # until what the compiler keeps of the loop is there
    gc.collect()
    heap = counter.heap()
    (pid,) = workers_of(bridge, COUNTER)
    resident = resident_kib(pid)
    churn(7_000)
    gc.collect()
    assert counter.destroyed() == 10_000
    assert counter.heap() < heap + 256 * 1024  # traces take up to 110 KiB more; 7,000 instances would take 900
    assert resident_kib(pid) < resident + 4 * 1024
    assert len(shared.dropped.notes) == 0


def test_dropped_proxy_of_a_host_without_shared_memory_destroys_its_instance(
    bridge: LuaHostBridge, counter: Any
) -> None:
    with LuaHostBridge.connect(f"ipc+inline://{run_directory(broker_pid(bridge))}") as other:
        proxy, stays = other.contract("host.counter"), other.contract("host.counter")
        assert (proxy.add(1), stays.add(1)) == (1, 1)
        del proxy
        gc.collect()
        assert stays.add(1) == 2
        settles(counter.destroyed, 1, "the instance is destroyed by the next call of its host")


def test_calls_of_another_contract_destroy_dropped_instances_too(bridge: LuaHostBridge, counter: Any) -> None:
    bridge.register_host_contract("host.raw@1", LuaFunction("function() end"))
    with LuaHostBridge.connect(run_directory(broker_pid(bridge))) as other:
        proxy = other.contract("host.counter")
        proxy.add(1)
        del proxy
        gc.collect()
        other.call("host.raw@1", 0)
        settles(counter.destroyed, 1, "the instance is destroyed by any call of its host")


# -- the asyncio bridge ----
def test_async_bridge_describes_and_destroys_dropped_instances(bridge: LuaHostBridge, counter: Any) -> None:
    async def main() -> None:
        async with await AsyncLuaHostBridge.connect(run_directory(broker_pid(bridge))) as mine:
            assert list((await mine.describe("host.counter", "1.0")).functions)[:2] == ["add", "destroyed"]
            proxy = await mine.contract("host.counter")
            await proxy.add(1)
            del proxy
            gc.collect()
            await mine.health()
            settles(counter.destroyed, 1, "the instance is destroyed by any request of its host")

    asyncio.run(main())


def test_a_crowd_of_calls_whose_results_do_not_fit_runs_once_each(bridge: LuaHostBridge, counter: Any) -> None:
    async def main() -> None:
        async with await AsyncLuaHostBridge.connect(run_directory(broker_pid(bridge))) as mine:
            proxy = await mine.contract("host.counter")
            texts = [
                "x" * (2000 + 200 * number) for number in range(100)
            ]  # none is learned of before all are on the way
            assert await asyncio.gather(*map(proxy.grow, texts)) == texts
            assert await proxy.add(0) == len(texts)

    asyncio.run(main())


def test_async_proxies_are_awaited(bridge: LuaHostBridge, counter: Any) -> None:
    async def main() -> None:
        async with await AsyncLuaHostBridge.connect(run_directory(broker_pid(bridge))) as mine:
            proxy, other = await mine.contract("host.counter"), await mine.contract("host.counter", "1.0")
            assert sorted(await asyncio.gather(*(proxy.add(1) for _ in range(20)))) == list(range(1, 21))
            assert await other.with_options(timeout=5.0).add(1) == 1
            text = "x" * (3 * MIB)
            assert await proxy.grow(text) == text
            assert await proxy.with_options(views=True).grow("") == ""
            with pytest.raises(WorkerCrashed):
                await proxy.crash()
            with pytest.raises(StaleHandle):
                await other.add(1)
            assert await (await mine.contract("host.counter")).add(1) == 1

    asyncio.run(main())
