"""`luacell doctor`: the layers of each level, with a service and without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from luacell.client import LuaHostBridge
from tests.support.contracts import ECHO, deploy
from tests.support.serving import WITHOUT_LANDLOCK, Serving
from tests.support.waiting import LIMIT_S

LEVELS = ["default", "hardened", "untrusted"]


def doctor(*words: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-P", "-m", "luacell.cli", "doctor", *words]
    environment = {"XDG_RUNTIME_DIR": "/nowhere", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment)


def test_without_a_service_every_level_is_tried() -> None:
    ended = doctor("--output", "json")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert (report["service"], report["floor"], list(report["levels"])) == (False, None, LEVELS)
    for level in report["levels"].values():
        assert (level["available"], level["by"]) == (True, "trial")
        in_force = {layer["layer"]: layer["in_force"] for layer in level["layers"]}
        assert in_force["seccomp"] and in_force["landlock"] and in_force["no privileges"]
        assert not in_force["W^X"], "LuaJIT needs memory that it can write and execute"


def test_people_get_a_table() -> None:
    ended = doctor()
    assert ended.returncode == 0, ended.stderr
    assert "level untrusted" in ended.stdout
    assert any(line.split()[:3] == ["hardened", "seccomp", "yes"] for line in ended.stdout.splitlines())


def test_level_that_cannot_be_had_names_its_layer() -> None:
    ended = doctor("--output", "json", prefix=WITHOUT_LANDLOCK)
    assert ended.returncode == 1
    assert "hardened, untrusted" in ended.stderr
    report = json.loads(ended.stdout)
    assert report["levels"]["default"]["available"]
    assert "sandbox layer landlock is not available" in report["levels"]["hardened"]["problem"]


def test_service_tells_of_the_levels_that_it_uses(tmp_path: Path) -> None:
    with Serving(tmp_path / "run") as serving, LuaHostBridge.connect(serving.run_directory) as bridge:
        deploy(bridge, ECHO, sandbox="hardened")
        ended = doctor("--endpoint", str(serving.run_directory), "--output", "json")
    report = json.loads(ended.stdout)
    assert (report["service"], report["floor"]) == (True, "default")
    assert {name: level["by"] for name, level in report["levels"].items()} == {
        "default": "service",
        "hardened": "service",
        "untrusted": "trial",
    }


def test_service_that_is_named_and_not_there_is_an_error() -> None:
    assert doctor("--endpoint", "/nowhere/run").returncode == 69
