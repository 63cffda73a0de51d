"""Part S of the catalogue: what is hidden, and what cannot be had. Escapes have a file of their own."""

from __future__ import annotations

import os
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from luacell.client import LuaHostBridge, VmRegistrationFailed
from tests.support.contracts import EVALUATE, PROBE, deploy, holds, rows_of_level
from tests.support.processes import worker_of
from tests.support.serving import PYTHON, WITHOUT_LANDLOCK, Serving
from tests.support.waiting import LIMIT_S

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filters are written for x86-64")


def test_s15_without_landlock_the_default_level_says_so_and_hardened_contracts_are_refused(tmp_path: Path) -> None:
    with (
        Serving(tmp_path / "run", prefix=WITHOUT_LANDLOCK) as serving,
        LuaHostBridge.connect(serving.run_directory) as bridge,
    ):
        deploy(bridge, EVALUATE)
        assert holds(bridge, "io.open('/etc/passwd')"), "nothing hides it"
        assert rows_of_level(bridge, "default")["landlock"] is False
        assert rows_of_level(bridge, "default")["seccomp"] is True
        with pytest.raises(VmRegistrationFailed, match="sandbox layer landlock is not available"):
            deploy(bridge, EVALUATE, "host.hardened@1", sandbox="hardened")


def test_s15_floor_that_cannot_be_had_is_a_refusal_to_start(tmp_path: Path) -> None:
    command = [*WITHOUT_LANDLOCK, *PYTHON, "-m", "luacell.cli.serve", "--run-dir", str(tmp_path / "run")]
    ended = subprocess.run(
        [*command, "--sandbox", "hardened"], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert ended.returncode == 78
    assert "sandbox level 'hardened' cannot be had: sandbox layer landlock is not available" in ended.stderr


def test_s11_secrets_of_the_environment_are_in_no_worker_s_memory(tmp_path: Path) -> None:
    secret = "secret-" + os.urandom(8).hex()
    with (
        Serving(tmp_path / "run", environment={"LUACELL_TEST_SECRET": secret, "TZ": "UTC"}) as serving,
        LuaHostBridge.connect(serving.run_directory) as bridge,
    ):
        deploy(bridge, EVALUATE)
        assert not holds(bridge, "os.getenv('LUACELL_TEST_SECRET')")
        assert holds(bridge, "os.getenv('TZ') == 'UTC'")
        with closing(worker_of(bridge, PROBE)) as worker:
            assert _is_in_memory(worker.pid, b"loadstring") is (os.geteuid() == 0), "this finds what is there"
            assert not _is_in_memory(worker.pid, secret.encode())


def _is_in_memory(pid: int, wanted: bytes) -> bool:
    """Tell whether a process holds some bytes; only root may look, to others it is hidden altogether."""
    if os.geteuid() != 0:
        return False
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            first, last = (int(each, 16) for each in line.split()[0].split("-"))
            if " r" in line and "[v" not in line and last - first < 1 << 28:
                memory.seek(first)
                try:
                    if wanted in memory.read(last - first):
                        return True
                except OSError:
                    continue
    return False
