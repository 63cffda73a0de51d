"""Part M of the catalogue: shared memory."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from luacell.client import AbiErrorCode, CallError, DeadlineExceeded, LuaHostBridge, TooLarge, WorkerCrashed
from luacell.protocol.headers import HAS_ARGS, HAS_OUT
from luacell.protocol.limits import MIB, PAYLOAD_MAX
from luacell.protocol.memory.segments import Mapping
from tests.soak import late_writes
from tests.support.children import child_process
from tests.support.contracts import ECHO, HEALTHY, PROBE, Stopwatch, answers, deploy, failure
from tests.support.peers import Peer
from tests.support.processes import Processes, descriptors_of, mappings_of, services_of
from tests.support.scheduling import Scheduling
from tests.support.waiting import LIMIT_S, eventually, settles

ROOT = Path(__file__).parents[2]
RUNNING_S = 4  # the deadline of a call that outlives its host, in which the others must have come
SIZES = {"flags": HAS_ARGS | HAS_OUT, "args_size": 4, "out_size": 4}
Thrower = Callable[..., str]

# Opens the segment in which `args` lies anew, for writing: as root through /proc/self/map_files, else by any
# descriptor that is left; n[0] is the descriptor or -1.
REOPEN = """
local address = tonumber(ffi.cast("uintptr_t", {buffer}))
n[0] = -1
local maps = io.open("/proc/self/maps") -- the sandbox has it closed; should it not, the seals hold
for line in maps and maps:lines() or function() end do
  local range, first, last = line:match("^((%x+)-(%x+)) ")
  if address >= tonumber(first, 16) and address < tonumber(last, 16) then
    n[0] = ffi.C.open("/proc/self/map_files/" .. range, 2)
  end
end
"""
CALLS = (
    "int open(const char *, int); long pwrite(int, const void *, size_t, long); int ftruncate(int, long);"
    "int mprotect(void *, size_t, int); void *mmap(void *, size_t, int, int, int, long);"
)


def serves(bridge: LuaHostBridge) -> bool:
    return bridge.call(PROBE, 0, None, 1) == bytes([42])


@pytest.mark.usefixtures("load")
def test_m01_writing_to_args_is_a_segfault(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("args[0] = 1")
    crashed = failure(bridge, PROBE, 1, args=b"x")
    assert isinstance(crashed, WorkerCrashed)
    assert (crashed.signal, crashed.began) == (signal.SIGSEGV, "yes")
    assert serves(bridge)


@pytest.mark.usefixtures("load")
def test_m02_args_cannot_be_made_writable(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract(
        "local n = ffi.cast('int *', out + 4) "
        "local page = ffi.cast('void *', ffi.cast('uintptr_t', args) - ffi.cast('uintptr_t', args) % 4096) "
        "n[1] = ffi.C.mprotect(page, 4096, 3)\n"
        + REOPEN.format(buffer="args")
        + "n[2] = n[0] < 0 and -1 or ffi.C.pwrite(n[0], 'x', 1, 0)\n"
        "n[3] = (n[0] < 0 or ffi.C.mmap(nil, 4096, 3, 1, n[0], 0) == ffi.cast('void *', -1)) and -1 or 0",
        CALLS,
    )
    reply = bridge.call(PROBE, 1, b"x" * 64, 20)
    values = [int.from_bytes(reply[4 * n : 4 * n + 4], "little", signed=True) for n in range(2, 5)]
    assert values == [-1, -1, -1]
    assert serves(bridge)


@pytest.mark.usefixtures("load")
def test_m03_worker_cannot_resize_a_segment(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract(
        "local n = ffi.cast('int *', out + 4)\n"
        + REOPEN.format(buffer="out")
        + "n[1] = n[0] < 0 and -1 or ffi.C.ftruncate(n[0], 0)\n"
        "n[2] = n[0] < 0 and -1 or ffi.C.ftruncate(n[0], 1e9)",
        CALLS,
    )
    reply = bridge.call(PROBE, 1, b"x" * 64, 16)
    assert [int.from_bytes(reply[4 * n : 4 * n + 4], "little", signed=True) for n in (2, 3)] == [-1, -1]
    assert serves(bridge)


@pytest.fixture
def peer(directory: str) -> Iterator[Peer]:
    with Peer(directory) as peer:
        yield peer


def healthy_id(bridge: LuaHostBridge) -> int:
    return next(contract.id for contract in bridge.contracts() if str(contract) == HEALTHY)


@pytest.mark.usefixtures("load")
def test_m03_host_cannot_resize_a_segment_or_write_to_out(bridge: LuaHostBridge, peer: Peer) -> None:
    grant = peer.lease(healthy_id(bridge))
    for descriptor in (grant.args_fd, grant.out_fd):
        for size in (0, 1 << 30):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
    assert peer.is_served(), "so it has heard that the memory is mapped, and sealed it"
    with pytest.raises(OSError, match="Operation not permitted") as caught:
        Mapping(grant.args_fd, 4096, writable=True)
    assert caught.value.errno == errno.EPERM


@pytest.mark.usefixtures("load")
def test_m04_numbers_out_of_range_are_bad_requests(bridge: LuaHostBridge, peer: Peer) -> None:
    contract_id = healthy_id(bridge)
    grant = peer.lease(contract_id)
    good = {"contract_id": contract_id, "arena": grant.arena, "generation": 1, **SIZES}
    number = 0
    for field in ("args_size", "out_size"):
        for value in (8192, 1 << 31, (1 << 32) - 1, (1 << 32) - 4096):
            number += 1
            peer.call(call_id=number, **(good | {field: value}))
            failed = peer.failure()
            assert (failed.call_id, failed.code) == (number, AbiErrorCode.BAD_REQUEST)
    for slot in (4, 0xFFFF, 1 << 16, (1 << 32) - 1):
        number += 1
        peer.call(call_id=number, slot=slot, **good)
        assert peer.refused_with() is AbiErrorCode.STALE_HANDLE


@pytest.mark.usefixtures("load")
def test_m05_handles_that_are_not_good_are_stale_or_unauthorized(
    bridge: LuaHostBridge, peer: Peer, directory: str
) -> None:
    contract_id = healthy_id(bridge)
    grant = peer.lease(contract_id)
    good = {"contract_id": contract_id, "arena": grant.arena, "generation": 1, **SIZES}
    stale, foreign = AbiErrorCode.STALE_HANDLE, AbiErrorCode.UNAUTHORIZED
    with Peer(directory) as other:
        theirs = other.lease(contract_id)
        for fields, code in (
            ({"arena": 1 << 20}, stale),
            ({"arena": theirs.arena}, foreign),
            ({"generation": 0}, stale),
            ({"generation": (1 << 31) + 1}, stale),
            ({"generation": 2, "slot": grant.slot | 1}, stale),  # one ahead of what the slot's word holds
        ):
            peer.call(call_id=1, **(good | fields))
            assert peer.answer() == (1, code)
    grant.stamp(1)
    peer.call(call_id=2, **good)
    assert peer.result().code == 0
    peer.call(call_id=3, **good)
    assert peer.refused_with() is stale, "its generation has moved on"
    grant.stamp(2)
    peer.call(call_id=4, **(good | {"generation": 2}))
    assert peer.result().code == 0


def test_m07_worker_that_is_timed_out_never_writes_into_a_slot_that_is_used_again() -> None:
    late_writes.run(1, rounds=8).check()


GRACE_S = 0.25  # promised after a deadline
SPOILT_S = 0.3  # the deadline of calls that spoil their segment, and how long they may run
SLOT = "local words = ffi.cast('uint64_t *', ffi.cast('uintptr_t', out) - ffi.cast('uintptr_t', out) % 4096)\n"
RANDOM = "for n = 0, 511 do words[n] = math.random(0, 2^53) end"


@pytest.mark.usefixtures("load")
@pytest.mark.parametrize(
    "body",
    [
        pytest.param("ffi.fill(words, 65536, 255)", id="ones"),
        pytest.param("ffi.fill(words, 65536)", id="zeros"),
        pytest.param("words[1] = words[0] words[2] = -1ULL words[3] = -1ULL", id="sizes without end"),
        pytest.param(RANDOM, id="random words"),
        pytest.param(f"while true do {RANDOM} end", id="random words for ever"),
        pytest.param("words[1] = words[0] while true do end", id="posing as done"),
        pytest.param("words[0] = 0 while true do end", id="posing as not begun"),
        pytest.param("words[0] = 0 ffi.cast('int *', 0)[0] = 1", id="crashing as not begun"),
        pytest.param("words[0] = words[0] + 1 words[1] = words[0] while true do end", id="ahead of the broker"),
    ],
)
def test_m06_spoiling_the_segment_spoils_its_own_call_alone(
    bridge: LuaHostBridge, contract: Thrower, body: str
) -> None:
    contract(SLOT + body, deadline=f"{SPOILT_S}s")
    broker = bridge.health()["broker_pid"]
    for _ in range(2):
        with Scheduling(*services_of(bridge)) as delays, Stopwatch() as stopwatch, suppress(CallError):
            bridge.call(PROBE, 1, b"x", 8)
        assert stopwatch.seconds <= SPOILT_S + GRACE_S + delays.latest_s + delays.waited_s
        eventually(lambda: _is_served_again(bridge), "its worker goes on, or another has come")
        bridge.revive(PROBE)
    assert bridge.health()["broker_pid"] == broker
    settles(lambda: _in_use(bridge), 0, "its slots are free")


def _is_served_again(bridge: LuaHostBridge) -> bool:
    try:
        return serves(bridge)
    except DeadlineExceeded:
        return False  # behind a call that poses as another one, until that is killed


@pytest.mark.usefixtures("load")
def test_m08_writing_past_out_costs_the_contract_alone(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("ffi.fill(out, fn_id, 255)")
    assert bridge.call(PROBE, 5000, None, 100) == b"\x2a" + b"\xff" * 99, "into the rest of its slot"
    for _ in range(5):
        failure(bridge, PROBE, 2**31)
        bridge.revive(PROBE)
        assert serves(bridge)
    crashed = failure(bridge, PROBE, 2**31)
    assert isinstance(crashed, WorkerCrashed)
    assert crashed.signal == signal.SIGSEGV
    assert serves(bridge)


@pytest.mark.usefixtures("load")
def test_m08_spoiling_other_slots_spoils_no_answer(bridge: LuaHostBridge, contract: Thrower) -> None:
    contract("local position = tonumber(ffi.cast('uintptr_t', out) % 131072) ffi.fill(out + 8064, 8192, 255)")
    for _ in range(20):
        assert bridge.call(PROBE, 1, None, 1) == bytes([42])
        assert serves(bridge)


@pytest.mark.usefixtures("load")
def test_m12_memory_of_a_killed_host_is_reclaimed(bridge: LuaHostBridge, contract: Thrower, directory: str) -> None:
    contract("while true do end", deadline=f"{RUNNING_S}s")
    assert serves(bridge)
    before = bridge.health()["memory_bytes"]
    command = [sys.executable, "-m", "tests.support.crowd", directory, PROBE, "100"]
    with child_process(command, stdout=subprocess.PIPE, cwd=ROOT) as crowd:
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == b"ready\n"
        assert bridge.health()["memory_bytes"] > before
        crowd.kill()
        with Stopwatch() as stopwatch:
            settles(lambda: _in_use(bridge) <= 1, True, "its slots are free")
            settles(lambda: bridge.health()["memory_bytes"], before, "its memory is given back")
    assert stopwatch.seconds < RUNNING_S + 2.0
    assert bridge.health()["hosts"] == 1
    assert serves(bridge)


def _in_use(bridge: LuaHostBridge) -> int:
    return int(bridge.health()["slots_in_flight"])


@pytest.mark.parametrize("victim", ["worker", "broker", "all"])
def test_m13_kill_9_leaves_no_memory(victim: str) -> None:
    before = descriptors_of()
    with LuaHostBridge() as bridge:
        deploy(bridge, ECHO)
        assert bridge.call(PROBE, 300_000, bytes(300_000), 300_000) == bytes(300_000)
        with Processes.of(bridge) as service:
            if victim == "worker":
                for worker in service.look_again():
                    worker.kill()
                assert bridge.call(PROBE, 4, b"live", 4) == b"live"
            else:
                for process in service.all if victim == "all" else [service.broker]:
                    process.kill()
                left = service.survivors(2.0)
                assert left == ([service.parent] if victim == "broker" else []), "the parent starts another broker"
    assert mappings_of() == 0
    settles(descriptors_of, before, "no descriptor is left", LIMIT_S)


@pytest.mark.usefixtures("load")
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, MIB, PAYLOAD_MAX])
def test_m17_sizes_come_back_exactly(bridge: LuaHostBridge, size: int) -> None:
    deploy(bridge, ECHO, deadline="20s")
    sent = (b"luacell" * (size // 7 + 1))[:size]
    assert bridge.call(PROBE, size, sent, size) == sent


@pytest.mark.usefixtures("load")
def test_m17_sizes_over_the_limit_are_too_large(bridge: LuaHostBridge) -> None:
    deploy(bridge, ECHO)
    for args_size, out_size in ((PAYLOAD_MAX + 1, 0), (0, PAYLOAD_MAX + 1)):
        with pytest.raises(TooLarge):
            bridge.call(PROBE, 0, bytes(args_size), out_size)
    assert answers(bridge, HEALTHY)
