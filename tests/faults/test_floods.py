"""Part Z of the catalogue, as far as it is about hosts and strangers that send or take too much."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from luacell.broker.__main__ import DESCRIPTORS_PREPARED
from luacell.broker.bounds import usable_descriptors
from luacell.client import LuaFunction, LuaHostBridge, Unavailable
from luacell.protocol import messages
from luacell.protocol.headers import HAS_ARGS, HAS_OUT
from luacell.protocol.messages import encode
from luacell.protocol.paths import BROKER_SOCKET, BROKER_SOCKET_ASIDE
from tests.soak import strangers
from tests.support.children import child_process
from tests.support.contracts import DOUBLE, HEALTHY, PROBE, Stopwatch, answers, deploy, function
from tests.support.peers import InlinePeer, Peer
from tests.support.processes import broker_pid, has_its_spares
from tests.support.scheduling import Scheduling
from tests.support.serving import Serving
from tests.support.strangers import Strangers
from tests.support.waiting import eventually, settles

ROOT = Path(__file__).parents[2]
DESCRIPTORS = 1024
FEW_DESCRIPTORS = ("prlimit", f"--nofile={DESCRIPTORS}")
FRAMES = 1_000_000
SILENT = 1500
QUEUE = 16
BOTH = HAS_ARGS | HAS_OUT
SLOW_DOUBLE = function("""
  for _ = 1, 300000 do args = args end -- a millisecond or so
  ffi.cast("int32_t *", out)[0] = 2 * ffi.cast("int32_t *", args)[0]
""")


def can_connect(run_directory: Path | str) -> bool:
    try:
        with LuaHostBridge.connect(run_directory) as another:
            return answers(another, HEALTHY)
    except Unavailable:
        return False


def times_ms(bridge: LuaHostBridge, contract: str, number: int) -> list[float]:
    """Call one time after the other, check the answers, and return how long each took."""
    took_ms = []
    for value in range(number):
        with Stopwatch() as stopwatch:
            assert answers(bridge, contract, value)
        took_ms.append(stopwatch.seconds * 1000)
    return took_ms


def p99(times: list[float]) -> float:
    return sorted(times)[len(times) * 99 // 100]


@pytest.mark.usefixtures("load")
def test_z10_host_that_is_killed_with_a_thousand_calls_queued_leaves_nothing_behind(
    bridge: LuaHostBridge, directory: str
) -> None:
    deploy(bridge, function("while fn_id == 1 do end"), deadline="30s", run_limit="6s", max_queue=1024)
    assert bridge.call(PROBE, 0) == b""
    before = bridge.health()["memory_bytes"]
    command = [sys.executable, "-m", "tests.support.crowd", directory, PROBE, "1000"]
    with child_process(command, stdout=subprocess.PIPE, cwd=ROOT) as crowd:
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == b"ready\n"
        assert bridge.health()["queued"] > 900
        crowd.kill()
        with Stopwatch() as stopwatch:
            settles(lambda: bridge.health()["queued"], 0, "its queue is dropped")
            settles(lambda: bridge.health()["slots_in_flight"], 0, "its slots are free")
            settles(lambda: bridge.health()["memory_bytes"], before, "its memory is given back")
    print(f"Z10: all is back after {stopwatch.seconds:.2f} s")
    assert bridge.health()["hosts"] == 1
    assert bridge.call(PROBE, 0) == b""


@pytest.mark.usefixtures("load")
def test_z12_flood_of_one_host_is_busy_for_it_and_others_are_answered(bridge: LuaHostBridge, directory: str) -> None:
    deploy(bridge, SLOW_DOUBLE, stateless=True, max_queue=QUEUE)
    at_first = {name: times_ms(bridge, name, 300) for name in (HEALTHY, PROBE)}
    command = [sys.executable, "-m", "tests.support.flood", directory, PROBE, str(10 * QUEUE)]
    with child_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as flood:
        assert flood.stdin is not None and flood.stdout is not None
        assert flood.stdout.readline() == "flooding\n"
        under_flood = {HEALTHY: times_ms(bridge, HEALTHY, 300), PROBE: times_ms(bridge, PROBE, 50)}
        flood.stdin.close()
        outcomes = json.loads(flood.stdout.readline())
    for name, took_ms in under_flood.items():
        before, now = at_first[name], took_ms
        print(
            f"Z12: {name}: p50 {median(before):.2f} -> {median(now):.2f} ms, p99 {p99(before):.1f} -> {p99(now):.1f} ms"
        )
    assert set(outcomes) == {"ok", "Busy"}


@pytest.mark.usefixtures("load")
def test_z13_silent_connections_are_dropped_and_leave_no_memory(bridge: LuaHostBridge, directory: str) -> None:
    broker = broker_pid(bridge)
    eventually(lambda: has_its_spares(bridge), "the spare that the healthy contract has taken is replaced")
    at_first = strangers.wave(directory, broker, SILENT, patient=False)
    at_last = strangers.wave(directory, broker, SILENT, patient=True)
    print(f"Z13: the broker has {at_first} KiB after {SILENT} connections, {at_last} KiB after as many more")
    assert at_last - at_first < strangers.GROWTH_MAX_KIB
    assert can_connect(directory)


@pytest.mark.usefixtures("load")
def test_z21_answers_reach_who_has_a_routing_id_first(bridge: LuaHostBridge, directory: str) -> None:
    contract_id = next(each.id for each in bridge.contracts())
    with Peer(directory) as peer:
        grant = peer.lease(contract_id)
        second = peer.connect(peer.routing_id)
        good = {"contract_id": contract_id, "arena": grant.arena, "flags": BOTH, "args_size": 4, "out_size": 4}
        for generation in range(1, 101):
            grant.stamp(generation)
            second.send(encode(messages.Health(request_id=generation)))
            peer.call(call_id=generation, generation=generation, **good)
            assert peer.answer() == (generation, 0)
        assert not second.poll(0), "what is sent to the id goes to the first"
        second.close()
    address = f"ipc://{Path(directory) / BROKER_SOCKET}"
    with InlinePeer(address) as first, InlinePeer(address, greet=False, routing_id=first.routing_id) as second_one:
        second_one.tell(messages.Hello(role="inline"))
        for call_id in range(1, 101):
            first.call(contract_id, call_id, call_id.to_bytes(4, "little"), out_size=4)
            result, data = first.result()
            assert (result.call_id, data) == (call_id, (2 * call_id).to_bytes(4, "little"))
        assert not second_one.dealer.poll(0)


def test_z16b_accepting_pauses_while_silent_connections_take_the_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    with (
        Serving(path, prefix=FEW_DESCRIPTORS, log_level="warning") as serving,
        LuaHostBridge.connect(path) as bridge,
    ):
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        broker = broker_pid(bridge)
        with Strangers(path) as silent:
            assert silent.connect(4 * DESCRIPTORS) < DESCRIPTORS, "the socket has lost its name"
            assert (path / BROKER_SOCKET_ASIDE).exists()
            used = len(os.listdir(f"/proc/{broker}/fd"))
            print(f"Z16b: {used} of {DESCRIPTORS} descriptors in use")
            assert all(answers(bridge, HEALTHY, number) for number in range(200))
            eventually((path / BROKER_SOCKET).exists, "the silent ones are dropped")
            assert can_connect(path)
        assert broker_pid(bridge) == broker
        assert serving.record("accepting pauses: descriptors are short")["limit"] == usable_descriptors(DESCRIPTORS)
        assert serving.record("accepting goes on")
        assert (path / BROKER_SOCKET).exists()


def test_z16b_broker_has_room_for_descriptors_before_it_has_threads(bridge: LuaHostBridge) -> None:
    """Where a table of descriptors grows under threads, the kernel stops who opens one for 10 ms and more."""
    status = Path(f"/proc/{broker_pid(bridge)}/status").read_text()
    (size,) = re.findall(r"^FDSize:\s+(\d+)$", status, re.MULTILINE)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert int(size) >= min(hard, DESCRIPTORS_PREPARED)


def test_z16b_broker_that_was_killed_while_accepting_paused_is_followed_by_another(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    with Serving(path):
        pass
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(os.fspath(path / BROKER_SOCKET_ASIDE))
    with Serving(path), LuaHostBridge.connect(path) as bridge:
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        assert answers(bridge, HEALTHY)
        assert not (path / BROKER_SOCKET_ASIDE).exists()


@pytest.mark.usefixtures("load")
@pytest.mark.parametrize("kind", ["empty", "paired"])
def test_z17_host_that_sends_a_million_frames_in_one_message_is_dropped(
    bridge: LuaHostBridge, directory: str, kind: str
) -> None:
    broker = broker_pid(bridge)
    command = [sys.executable, "-m", "tests.support.strangers", kind, directory, str(FRAMES)]
    with child_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as flood:
        assert flood.stdin is not None and flood.stdout is not None
        assert flood.stdout.readline() == "ready\n"
        flood.stdin.write("\n")
        flood.stdin.flush()
        with Scheduling() as delays:
            took_ms = times_ms(bridge, HEALTHY, 3000)
        assert flood.stdout.readline() == "dropped\n"
    print(f"Z17, {kind}: others' calls: p99 {p99(took_ms):.1f} ms, longest {max(took_ms):.0f} ms")
    assert p99(took_ms) < 50 + 1000 * delays.slack_s
    assert broker_pid(bridge) == broker
