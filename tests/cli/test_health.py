"""health shows whatever the broker tells, and --ready tells whether calls can be served."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from luacell.cli import health, tables
from luacell.client import LuaHostBridge
from tests.support.command import Command, Ended
from tests.support.contracts import HEALTHY, PROBE, answers, failure
from tests.support.processes import Process, Processes
from tests.support.serving import Serving
from tests.support.waiting import settles

STATE: dict[str, Any] = {
    "epoch": "00ff",
    "worker_host": True,
    "memory_bytes": 3 * 1024 * 1024,
    "uptime_s": 12.5,
    "delay_us": 250,
    "nothing": None,
    "deaths": {"signal 11 (SIGSEGV)": 2, "exit code 3": 1},
    "quiet": {},
    "levels": ["default", "hardened"],
    "pools": {"default": {"spares": 1, "wanted": 2}, "hardened": {"spares": 0, "memory_bytes": 2048}},
    "workers": [
        {"id": 1, "state": "idle", "contract": "host.kv@1"},
        {"id": 12, "state": "blank", "contract": None, "flags": {"seccomp": True, "landlock": False}},
    ],
}
SHOWN = """\
epoch                        00ff
worker host                  yes
memory                       3.0 MiB
uptime                       12.5 s
delay                        250 us
nothing                      -
deaths: signal 11 (SIGSEGV)  2
deaths: exit code 3          1
quiet                        none
levels                       default, hardened

pools
pools     spares  wanted  memory
default   1       2
hardened  0               2.0 KiB

workers
id  state  contract   flags
1   idle   host.kv@1
12  blank  -          seccomp yes, landlock no
"""


def test_whatever_is_told_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    health.show(STATE)
    assert capsys.readouterr().out == SHOWN


def test_on_a_terminal_the_same_is_drawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    health.show(STATE | {"name": "[bold]no markup[/bold]"})
    drawn = capsys.readouterr().out
    words = {word for line in SHOWN.splitlines() for word in line.split()}
    assert words <= set(drawn.split())
    assert "[bold]no markup[/bold]" in drawn


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("memory_bytes", 0, "0 B"),
        ("memory_bytes", 1023, "1023 B"),
        ("memory_bytes", 5 << 30, "5.0 GiB"),
        ("share", 0.25, "0.25"),
        ("count", 12345678, "12345678"),
        ("wait_ms", 20, "20 ms"),
        ("text", "", "-"),
        ("list", [], "none"),
    ],
)
def test_values_have_the_units_of_their_names(key: str, value: object, text: str) -> None:
    assert health.shown(key, value) == text


def test_health_of_a_service(luacell: Command, endpoint: Path) -> None:
    with LuaHostBridge.connect(endpoint) as bridge:
        assert answers(bridge, HEALTHY)
        failure(bridge, PROBE, 1)
    state = luacell("health", "--output", "json").json
    assert state["contracts"] == 3
    assert state["state_dir"] == str(endpoint / "state")
    assert state["deaths"]["SIGSEGV"] >= 1
    lines = luacell("health").out.splitlines()
    assert any(line.split() == ["contracts", "3"] for line in lines)
    assert any(line.startswith("deaths: SIGSEGV") for line in lines)
    assert any("host.healthy@1" in line and "idle" in line for line in lines)


# -- readiness ----
def test_ready_service_is_ready(luacell: Command) -> None:
    ended = luacell("health", "--ready")
    assert (ended.code, ended.out, ended.errors) == (0, "ready\n", "")
    assert luacell("health", "--ready", "--output", "json").json == {"ready": True, "reason": ""}


def test_service_without_workers_is_not_ready(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Serving(run), LuaHostBridge.connect(run) as bridge, Processes.of(bridge) as service:
        luacell = Command(run)
        assert luacell("health", "--ready", "--wait", "20").code == 0
        with service.worker_host.stopped():
            for worker in service.look_again():
                worker.kill()
                assert worker.ends_within()
            reason = "broker and worker host are there, no worker is up yet"  # until another worker host is there
            settles(lambda: health.unreadiness(bridge.health()), reason, "the broker knows of the death")
        assert luacell("health", "--ready", "--wait", "20").code == 0


def test_ready_waits_for_a_service_that_is_not_there_yet(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended: list[Ended] = []
    waiting = threading.Thread(target=lambda: ended.append(Command(run)("health", "--ready", "--wait", "20")))
    waiting.start()
    with Serving(run):
        waiting.join()
    assert [each.code for each in ended] == [0]


def test_ready_gives_up_at_its_limit(tmp_path: Path) -> None:
    ended = Command(tmp_path / "nobody")("health", "--ready", "--wait", "0.2")
    assert ended.code == 69
    assert "not ready: no broker at" in ended.errors


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"worker_host": True, "spares_wanted": 1, "workers": [{"state": "blank"}]}, ""),
        ({"worker_host": True, "spares_wanted": 1, "workers": [{"state": "busy"}, {"state": "starting"}]}, ""),
        ({"worker_host": True, "spares_wanted": 0, "workers": []}, ""),
        ({"worker_host": True, "spares_wanted": 1, "workers": [{"state": "starting"}]}, "no worker is up"),
        ({"worker_host": True, "spares_wanted": 1, "workers": [{"state": "doomed"}]}, "no worker is up"),
        ({"state": "draining", "worker_host": True, "workers": [{"state": "idle"}]}, "it is draining"),
        ({"worker_host": False, "spares_wanted": 1, "workers": [{"state": "blank"}]}, "its worker host is not"),
    ],
)
def test_readiness_needs_broker_worker_host_and_a_worker(state: dict[str, Any], reason: str) -> None:
    found = health.unreadiness(state)
    assert bool(found) == bool(reason)
    assert reason in found


def test_broker_that_does_not_answer_is_not_ready(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Serving(run), LuaHostBridge.connect(run) as bridge:
        pid = bridge.health()["broker_pid"]
        with closing(Process(pid)) as broker, broker.stopped():
            ended = Command(run)("health", "--ready")
        assert ended.code == 69
        assert "does not answer" in ended.errors
