"""Calls that crash their workers are put on record, with real crashes, and found again by the next broker."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from luacell.client import (
    AsyncLuaHostBridge,
    Crash,
    CrashInfo,
    CrashNotFound,
    LuacellError,
    LuaFunction,
    LuaHostBridge,
    Unauthorized,
    Unavailable,
)
from luacell.protocol.limits import CRASH_ARGS_MAX, MIB
from luacell.protocol.paths import CRASHES_DIRECTORY, STATE_DIRECTORY
from tests.support.contracts import CRASHED, DEADLINE, HEALTHY, NO_MEMORY, PROBE, deploy, failure, function
from tests.support.processes import Process, broker_pid
from tests.support.serving import Serving
from tests.support.waiting import eventually

SEGFAULT, EXIT, LOOP, EAT, RETURN = range(1, 6)
DEADLY = function("""
  if fn_id == 1 then
    io.stderr:write("last words\\n")
    ffi.cast("int *", 0)[0] = 1
  elseif fn_id == 2 then
    os.exit(3)
  elseif fn_id == 3 then
    while true do end
  elseif fn_id == 4 then
    io.stderr:write("hungry\\n")
    local eaten = {}
    while true do eaten[#eaten + 1] = ("x"):rep(100000) .. #eaten end
  end
""")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def serving(tmp_path: Path, state: Path) -> Iterator[Serving]:
    with Serving(tmp_path / "run", state_directory=state, log_level="info") as serving:
        yield serving


@pytest.fixture
def bridge(serving: Serving) -> Iterator[LuaHostBridge]:
    with LuaHostBridge.connect(serving.run_directory) as bridge:
        yield bridge


def crashed(bridge: LuaHostBridge, contract: str, fn_id: int, args: bytes | None = b"") -> CrashInfo:
    """Make a call that crashes; return what is on record of it, which must be there."""
    before = time.time()
    error = failure(bridge, contract, fn_id, args=args)
    (info, *_) = bridge.crashes()
    assert before <= info.time <= time.time()
    assert (info.code, info.fn_id) == (error.code, fn_id)
    return info


def newest(bridge: LuaHostBridge, fn_id: int) -> CrashInfo:
    """Wait for the record of a crash that its caller was told of before the worker was dead."""

    def look() -> CrashInfo | None:
        return next((info for info in bridge.crashes() if info.fn_id == fn_id), None)

    return eventually(look, f"a crash of function {fn_id} is on record")


def is_served(bridge: LuaHostBridge) -> bool:
    try:
        return bool(bridge.health())
    except Unavailable:
        return False


def files(state: Path) -> dict[str, Path]:
    return {path.name: path for path in (state / CRASHES_DIRECTORY).iterdir()}


def test_a_segfault_is_on_record_with_all_that_makes_the_call_again(bridge: LuaHostBridge, state: Path) -> None:
    deploy(bridge, DEADLY, memory="32MiB")
    info = crashed(bridge, PROBE, SEGFAULT, b"arguments")
    assert (info.contract, info.version, info.function, info.began) == (PROBE, "1.0.0", "", "yes")
    assert (info.code, info.cause, info.signal, info.exit_code) == (CRASHED, "signal 11 (SIGSEGV)", 11, None)
    assert (info.args_size, info.args_kept, info.out_size) == (9, 9, 0)
    assert info.queued is not None and info.ran is not None and info.cpu is not None
    assert info.host == f"pid {os.getpid()} of uid {os.getuid()}"
    assert info.stderr == "last words\n"
    crash = bridge.crash(info.id)
    assert (crash.info, crash.args, crash.source) == (info, b"arguments", DEADLY.encode())
    assert crash.settings.memory == 32 * MIB
    assert [path.stat().st_mode & 0o777 for path in files(state).values()] == [0o600, 0o600]
    assert (state / CRASHES_DIRECTORY).stat().st_mode & 0o777 == 0o700
    assert f"{info.source_digest}.sources" in files(state)


def test_exits_ends_by_limits_and_memory_that_ran_out_are_on_record(bridge: LuaHostBridge) -> None:
    deploy(bridge, DEADLY, run_limit="200ms")
    assert crashed(bridge, PROBE, EXIT, None).exit_code == 3
    assert failure(bridge, PROBE, LOOP, args=b"for ever").code == DEADLINE
    late = newest(bridge, LOOP)
    assert (late.code, late.signal) == (DEADLINE, 9)
    assert f"(killed: it ran {PROBE} fn {LOOP} for 0." in late.cause
    assert late.ran is not None and late.ran >= 0.2
    assert len({info.source_digest for info in bridge.crashes()}) == 1
    deploy(bridge, DEADLY, HEALTHY)  # it may take its time to run out of memory
    spent = crashed(bridge, HEALTHY, EAT, b"hungry")
    assert (spent.code, spent.cause, spent.signal) == (NO_MEMORY, "out of memory: 64 MiB", None)
    assert [bridge.crash(info.id).args for info in bridge.crashes()] == [b"hungry", b"for ever", None]
    # The broker waits for the end of its worker, but not for long.
    words = spent.stderr or crashed(bridge, HEALTHY, EAT).stderr or crashed(bridge, HEALTHY, EAT).stderr
    assert words.startswith("hungry\n")


def test_arguments_are_cut(bridge: LuaHostBridge) -> None:
    deploy(bridge, DEADLY)
    args = os.urandom(CRASH_ARGS_MAX + 1)
    info = crashed(bridge, PROBE, EXIT, args)
    assert (info.args_size, info.args_kept) == (CRASH_ARGS_MAX + 1, CRASH_ARGS_MAX)
    assert bridge.crash(info.id).args == args[:CRASH_ARGS_MAX]


def test_the_next_broker_finds_what_is_whole_and_tells_of_the_rest(serving: Serving, state: Path) -> None:
    with LuaHostBridge.connect(serving.run_directory) as bridge:
        deploy(bridge, DEADLY)
        deploy(bridge, DEADLY, HEALTHY)
        ids = [crashed(bridge, name, EXIT, name.encode()).id for name in (PROBE, PROBE, HEALTHY)]
        broken, *_ = ids
        path = files(state)[f"{broken}.crash"]
        path.write_bytes(path.read_bytes()[:-1])
        (path.parent / "notes.txt").write_text("not ours")
        with closing(Process(broker_pid(bridge))) as broker:
            broker.kill()
            assert broker.ends_within()
        eventually(lambda: is_served(bridge), "there is another broker")
        found = bridge.crashes()
        assert [info.id for info in found] == ids[:0:-1]
        assert bridge.crash(ids[1]).args == PROBE.encode()
        with pytest.raises(CrashNotFound, match=broken):
            bridge.crash(broken)
        told = serving.record("crash records skipped")
        assert told["files"] == 2
        assert path.exists() and (path.parent / "notes.txt").exists()
        assert crashed(bridge, PROBE, EXIT).id not in ids
    assert len(serving.records("crash records skipped")) == 1


def test_nothing_is_kept_where_that_is_switched_off(tmp_path: Path, state: Path) -> None:
    with Serving(tmp_path / "run", "--no-crash-records", state_directory=state) as serving:
        with LuaHostBridge.connect(serving.run_directory) as bridge:
            deploy(bridge, DEADLY)
            failure(bridge, PROBE, SEGFAULT)
            assert bridge.crashes() == []
        assert not (state / CRASHES_DIRECTORY).exists()


def test_what_a_service_of_a_while_has_recorded_goes_with_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Serving(run, "--ephemeral") as serving:
        with LuaHostBridge.connect(run) as bridge:
            deploy(bridge, DEADLY)
            crashed(bridge, PROBE, SEGFAULT)
        assert len(files(run / STATE_DIRECTORY)) == 2
        serving.stop()
    assert not run.exists()


def test_nobody_else_reads_what_a_scratch_vm_died_of(bridge: LuaHostBridge) -> None:
    with pytest.raises(LuacellError):
        bridge.lua().eval("require('ffi').cast('int *', 0)[0]")
    assert bridge.crashes() == []


def test_ten_crashes_of_a_contract_are_kept(bridge: LuaHostBridge, state: Path) -> None:
    deploy(bridge, DEADLY)
    ids = []
    for count in range(12):
        if count % 4 == 3:  # else it rests
            bridge.revive(PROBE)
        ids.append(crashed(bridge, PROBE, EXIT).id)
    assert [info.id for info in bridge.crashes()] == ids[:1:-1]
    assert len(files(state)) == 11


def test_hosts_over_tcp_are_refused(tmp_path: Path) -> None:
    with Serving(tmp_path / "run", "--tcp", "tcp://127.0.0.1:0") as serving:
        with LuaHostBridge.connect(serving.run_directory) as bridge:
            address = bridge.health()["tcp"]
        with LuaHostBridge.connect(address) as stranger, pytest.raises(Unauthorized, match="run directory"):
            stranger.crashes()


def test_bridges_of_event_loops_read_them_too(bridge: LuaHostBridge, serving: Serving) -> None:
    async def read() -> Crash:
        async with AsyncLuaHostBridge.connect(serving.run_directory) as other:
            (info,) = await other.crashes()
            return await other.crash(info.id)

    bridge.register_host_contract("host.raw@2", LuaFunction(DEADLY))
    crashed(bridge, "host.raw@2", SEGFAULT, b"args")
    crash = asyncio.run(read())
    assert (crash.args, crash.chunk_name) == (b"args", "=host.raw@2")


def test_an_unknown_id_is_told(bridge: LuaHostBridge) -> None:
    for crash_id in ("0123456789ab", "", "../../registry.db"):
        with pytest.raises(CrashNotFound) as caught:
            bridge.crash(crash_id)
        assert caught.value.crash_id == crash_id


def test_sources_are_those_that_had_crashed(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(DEADLY))
    first = crashed(bridge, PROBE, EXIT)
    bridge.register_host_contract(PROBE, LuaFunction(function("out[0] = 7")), replace=True)
    crash = bridge.crash(first.id)
    assert crash.source == DEADLY.encode()
    again = LuaFunction(crash.source, chunk_name=crash.chunk_name)
    bridge.register_host_contract(PROBE, again, replace=True)
    assert crashed(bridge, PROBE, EXIT).source_digest == first.source_digest
