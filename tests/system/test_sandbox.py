"""Levels of the sandbox as a service has them: floors, grants, spares, what cannot be had, and what is hidden."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from luacell.client import DeploymentError, LuaHostBridge, VmRegistrationFailed
from luacell.client.deployment import Deployment
from tests.support.contracts import EVALUATE, PROBE, deploy, holds, rows_of_level, write_deployment
from tests.support.processes import Processes, broker_pid, run_directory, worker_of
from tests.support.serving import PYTHON, Serving
from tests.support.waiting import LIMIT_S, eventually

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filters are written for x86-64")

DIAL = """
local function dial(port)
  local fd = ffi.C.socket(2, 1, 0)
  if fd < 0 then return false end
  local address = ffi.new("uint8_t[16]", 2, 0, math.floor(port / 256), port % 256, 127, 0, 0, 1)
  local outcome = ffi.C.connect(fd, address, 16)
  ffi.C.close(fd)
  return outcome == 0
end
"""


def spares(bridge: LuaHostBridge) -> list[str]:
    return sorted(worker["sandbox"] for worker in bridge.health()["workers"] if worker["state"] == "blank")


# -- grants ----
def test_reading_is_granted_by_path(bridge: LuaHostBridge, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "data").write_text("x")
    (tmp_path / "other").write_text("x")
    deploy(bridge, EVALUATE, read=[str(tmp_path / "given")])
    assert holds(bridge, f"io.open('{tmp_path}/given/data')")
    assert not holds(bridge, f"io.open('{tmp_path}/given/data', 'a')")
    assert not holds(bridge, f"io.open('{tmp_path}/given/new', 'w')")
    assert not holds(bridge, f"io.open('{tmp_path}/other')")
    assert not holds(bridge, f"io.open('{tmp_path}/given/../other')")


def test_writing_is_granted_by_path(bridge: LuaHostBridge, tmp_path: Path) -> None:
    deploy(bridge, EVALUATE, write=[str(tmp_path)])
    assert holds(
        bridge, f"(function(file) file:write('words') file:close() return true end)(io.open('{tmp_path}/new', 'w'))"
    )
    assert (tmp_path / "new").read_text() == "words"
    assert holds(bridge, f"os.remove('{tmp_path}/new')")
    assert not holds(bridge, "io.open('/tmp/luacell-elsewhere', 'w')")


def test_link_out_of_a_grant_leads_nowhere(bridge: LuaHostBridge, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    deploy(bridge, EVALUATE, write=[str(tmp_path)])
    assert not holds(bridge, f"io.open('{tmp_path}/link')")


def test_network_is_granted_and_unix_sockets_are_not(bridge: LuaHostBridge) -> None:
    declared = (
        f'require("ffi").cdef "int socket(int, int, int); int connect(int, void *, unsigned); int close(int);"\n{DIAL}'
    )
    source = f"local ffi = require('ffi')\n{declared}\n" + EVALUATE.replace("loadstring(", "within(")
    source = source.replace(
        "return function",
        "local function within(text) return setfenv(assert(loadstring(text)), "
        "setmetatable({ dial = dial, ffi = ffi }, { __index = _G })) end\nreturn function",
        1,
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        deploy(bridge, source)
        deploy(bridge, source, "host.dials@1", network=True)
        assert not holds(bridge, f"dial({port})")
        assert holds(bridge, f"dial({port})", "host.dials@1")
        assert not holds(bridge, "ffi.C.socket(1, 1, 0) >= 0", "host.dials@1")


@pytest.mark.parametrize(
    ("granted", "words"),
    [
        ({"read": ["/nowhere"]}, "read = '/nowhere' cannot be granted: No such file or directory"),
        ({"write": ["/"]}, "/proc must stay out of reach"),
        ({"read": ["/proc/self"]}, "/proc must stay out of reach"),
        ({"read": ["RUN"]}, "must stay out of reach"),
        ({"read": ["RUN/state/registry.db"]}, "must stay out of reach"),
    ],
)
def test_grant_that_cannot_be_given_is_a_refusal_that_names_it(
    bridge: LuaHostBridge, granted: dict[str, list[str]], words: str
) -> None:
    run = run_directory(broker_pid(bridge))
    settings: dict[str, Any] = {key: [path.replace("RUN", run) for path in paths] for key, paths in granted.items()}
    with pytest.raises(VmRegistrationFailed, match=words):
        deploy(bridge, EVALUATE, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"read": "/srv"}, "a list of absolute paths"),
        ({"read": ["srv"]}, "a list of absolute paths"),
        ({"write": ["/a\n/b"]}, "a list of absolute paths"),
        ({"write": ["/" + "x" * 500]}, "480 characters together"),
        ({"network": 1}, "true or false"),
        ({"network": True, "sandbox": "hardened"}, "only 'default' has grants"),
        ({"read": ["/srv"], "sandbox": "untrusted"}, "only 'default' has grants"),
    ],
)
def test_grants_in_the_manifest_are_checked(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    write_deployment(tmp_path, EVALUATE, **settings)
    with pytest.raises(DeploymentError, match=words):
        Deployment.read(tmp_path)


# -- levels ----
def test_spares_are_kept_for_the_levels_in_use(bridge: LuaHostBridge) -> None:
    deploy(bridge, EVALUATE, sandbox="hardened")
    eventually(lambda: spares(bridge) == ["default", "hardened"], "each level has a spare")
    with closing(worker_of(bridge, PROBE)) as worker:
        worker.kill()
        eventually(lambda: not worker.is_alive, "the worker is dead")
    assert holds(bridge, "true")
    bridge.unregister_host_contract(PROBE)
    eventually(lambda: spares(bridge) == ["default"], "the spare of a level that nobody uses is gone")


def test_floor_lifts_every_contract_and_is_shown(tmp_path: Path) -> None:
    with (
        Serving(tmp_path / "run", "--sandbox", "hardened") as serving,
        LuaHostBridge.connect(serving.run_directory) as bridge,
    ):
        deploy(bridge, EVALUATE)
        assert not holds(bridge, "io.open('/usr/bin/env')")
        assert bridge.health()["posture"]["level"] == "hardened"
        assert {worker["sandbox"] for worker in bridge.health()["workers"]} == {"hardened"}
        assert rows_of_level(bridge, "hardened")["landlock"] and not rows_of_level(bridge, "hardened")["W^X"]
        with pytest.raises(VmRegistrationFailed, match="level 'hardened' has none"):
            deploy(bridge, EVALUATE, "host.granted@1", read=["/srv"])


# -- what cannot be had ----
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nowhere/x.so", "cannot be loaded"),
        ("/etc/passwd", "does not end with .so"),
        ("/a\n.so", "cannot be printed"),
        ("/x" * 5000 + ".so", "more than 8192 characters together"),
    ],
)
def test_c_module_that_cannot_be_loaded_is_a_refusal_to_start(tmp_path: Path, path: str, words: str) -> None:
    command = [*PYTHON, "-m", "luacell.cli.serve", "--run-dir", str(tmp_path / "run"), "--c-module", path]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == 78
    assert words in ended.stderr


# -- what is hidden ----
def test_no_process_of_a_service_is_dumpable(bridge: LuaHostBridge) -> None:
    # What /proc shows of a process that is not dumpable belongs to root; tests that run as root see no difference.
    deploy(bridge, EVALUATE)
    with Processes.of(bridge) as processes:
        for process in (processes.parent, processes.broker, processes.worker_host, *processes.look_again()):
            assert os.stat(f"/proc/{process.pid}/mem").st_uid == 0
