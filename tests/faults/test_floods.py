"""Part Z of the catalogue, as far as it is about hosts and strangers that send or take too much."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luacell.client import LuaFunction, LuaHostBridge, Unavailable
from luacell.protocol.paths import BROKER_SOCKET, BROKER_SOCKET_ASIDE
from tests.support.contracts import DOUBLE, HEALTHY, answers
from tests.support.processes import broker_pid
from tests.support.serving import Serving
from tests.support.strangers import Strangers
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
DESCRIPTORS = 1024
FEW_DESCRIPTORS = ("prlimit", f"--nofile={DESCRIPTORS}")
FRAMES = 1_000_000


def can_connect(run_directory: Path | str) -> bool:
    try:
        with LuaHostBridge.connect(run_directory) as another:
            return answers(another, HEALTHY)
    except Unavailable:
        return False


def test_z16b_accepting_pauses_while_silent_connections_take_the_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    with (
        Serving(path, prefix=FEW_DESCRIPTORS, log_level="warning") as serving,
        LuaHostBridge.connect(path) as bridge,
    ):
        bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
        broker = broker_pid(bridge)
        with Strangers(path) as strangers:
            assert strangers.connect(4 * DESCRIPTORS) < DESCRIPTORS, "the socket has lost its name"
            assert (path / BROKER_SOCKET_ASIDE).exists()
            used = len(os.listdir(f"/proc/{broker}/fd"))
            print(f"Z16b: {used} of {DESCRIPTORS} descriptors in use")
            assert all(answers(bridge, HEALTHY, number) for number in range(200))
            eventually((path / BROKER_SOCKET).exists, "the silent ones are dropped")
            assert can_connect(path)
        assert broker_pid(bridge) == broker
        assert serving.record("accepting pauses: descriptors are short")["limit"] == DESCRIPTORS * 4 // 5
        assert serving.record("accepting goes on")
        assert (path / BROKER_SOCKET).exists()


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
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as flood:
        assert flood.stdin is not None and flood.stdout is not None
        assert flood.stdout.readline() == "ready\n"
        flood.stdin.write("\n")
        flood.stdin.flush()
        took_ms = []
        for number in range(3000):
            start_s = time.monotonic()
            assert answers(bridge, HEALTHY, number)
            took_ms.append((time.monotonic() - start_s) * 1000)
        assert flood.stdout.readline() == "dropped\n"
    took_ms.sort()
    p99_ms = took_ms[len(took_ms) * 99 // 100]
    print(f"Z17, {kind}: others' calls: p99 {p99_ms:.1f} ms, longest {took_ms[-1]:.0f} ms")
    assert p99_ms < 50
    assert broker_pid(bridge) == broker
