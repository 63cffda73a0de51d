"""Part Z of the catalogue, as far as it is about endpoints and callers; malformed messages are in test_bad_input."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from luacell.client import LuaFunction, LuaHostBridge, Unavailable
from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET
from tests.support.children import child_process
from tests.support.contracts import DOUBLE, HEALTHY, PROBE, Stopwatch, answers, deploy, failure, function
from tests.support.processes import Process, Processes, broker_pid, run_directory
from tests.support.scheduling import Scheduling
from tests.support.serving import Serving, run_broker
from tests.support.waiting import LIMIT_S, eventually

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("load")
def test_z24_second_broker_refuses_to_start(bridge: LuaHostBridge) -> None:
    directory = run_directory(broker_pid(bridge))
    ended = run_broker(directory)
    assert ended.returncode == 78
    assert directory in ended.stderr
    with LuaHostBridge.connect(directory) as another:
        assert answers(another, HEALTHY)


def test_z25_stale_sockets_do_not_block_a_start(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    for name, kind in ((BROKER_SOCKET, socket.SOCK_STREAM), (DESCRIPTOR_SOCKET, socket.SOCK_SEQPACKET)):
        with socket.socket(socket.AF_UNIX, kind) as stale:
            stale.bind(os.fspath(path / name))
    with Serving(path), LuaHostBridge.connect(path) as bridge:
        bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
        assert answers(bridge, PROBE)


@pytest.mark.parametrize(
    ("name", "mode", "reason"), [("x" * 120, 0o700, "107"), ("open", 0o777, "0777"), ("readable", 0o755, "0755")]
)
def test_z25_unfit_run_directory_is_named(tmp_path: Path, name: str, mode: int, reason: str) -> None:
    path = tmp_path / name
    path.mkdir()
    path.chmod(mode)
    ended = run_broker(path)
    assert ended.returncode == 78
    assert str(path) in ended.stderr
    assert reason in ended.stderr


def test_z26_broker_that_is_down_at_connect_is_unavailable(tmp_path: Path) -> None:
    with Stopwatch() as stopwatch, pytest.raises(Unavailable, match="no broker at"):
        LuaHostBridge.connect(tmp_path)
    assert stopwatch.seconds < 1.0


def test_z26_broker_that_goes_down_is_unavailable_at_send_and_while_waiting() -> None:
    with LuaHostBridge() as bridge:
        deploy(bridge, function("while true do end"), deadline="10s")
        deploy(bridge, DOUBLE, HEALTHY)
        assert answers(bridge, HEALTHY)
        with ThreadPoolExecutor(2) as pool, closing(Process(broker_pid(bridge))) as broker:
            waiting = [pool.submit(failure, bridge, PROBE) for _ in range(2)]
            eventually(lambda: bridge.health()["slots_in_flight"] == 2, "both calls are under way")
            with Scheduling() as delays, Stopwatch() as stopwatch:
                broker.kill()
                for each in waiting:
                    assert isinstance(each.result(LIMIT_S), Unavailable)
            assert stopwatch.seconds < 1.0 + delays.slack_s
        assert answers(bridge, HEALTHY), "the next call finds the broker that came in its place"
        with Scheduling() as delays, Stopwatch() as stopwatch:
            bridge.close()
        assert stopwatch.seconds < 1.0 + delays.slack_s


def test_z26_broker_that_is_stopped_is_unavailable_by_the_deadline() -> None:
    with LuaHostBridge() as bridge:
        deploy(bridge, DOUBLE)
        assert answers(bridge, PROBE)
        with closing(Process(broker_pid(bridge))) as broker:
            with broker.stopped(), Stopwatch() as stopwatch:
                assert isinstance(failure(bridge, PROBE, args=bytes(4), out_size=4, timeout=0.2), Unavailable)
            assert stopwatch.seconds < 2.0
            assert eventually(lambda: answers(bridge, PROBE), "it goes on")


def test_z27_bridge_in_a_forked_child_says_so() -> None:
    command = [sys.executable, "-m", "tests.support.host", "forked"]
    with child_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as host:
        assert host.stdin is not None and host.stdout is not None
        ready = host.stdout.readline()
        lines = sorted([host.stdout.readline(), host.stdout.readline()])
        assert b'"BridgeForked"' in lines[0]
        assert lines[1] == b'{"parent": "ok"}\n'
        child = int(lines[0].split(b'"pid": ')[1].rstrip(b"}\n"))
        with closing(Process(child)) as process:
            process.kill()
            assert process.ends_within()
        host.stdin.write(b"\n")
        host.stdin.flush()
        assert host.stdout.readline() == b'{"answers": true}\n'
    assert host.returncode == 0
    assert ready


@pytest.mark.usefixtures("load")
def test_z28_many_threads_get_their_own_answers(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    with Processes.of(bridge), ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda number: answers(bridge, PROBE, number), range(4000)))
