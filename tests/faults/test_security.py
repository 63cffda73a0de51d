"""Part S of the catalogue: what is hidden, and what cannot be had. Escapes have a file of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from luacell.client import LuaHostBridge, VmRegistrationFailed, WorkerCrashed
from tests.support.contracts import EVALUATE, PROBE, deploy, failure, holds, rows_of_level
from tests.support.processes import worker_of
from tests.support.serving import AS_NOBODY, NOBODY, PYTHON, WITHOUT_LANDLOCK, WITHOUT_SECCOMP, Serving
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


LAYERS = ("landlock", "seccomp", "no privileges", "not dumpable", "limits")
NULL_READ = b"require('ffi').cast('int *', 0)[0] == 1"


def test_s15_without_seccomp_no_level_can_be_had(tmp_path: Path) -> None:
    command = [*WITHOUT_SECCOMP, *PYTHON, "-m", "luacell.cli.serve", "--run-dir", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == 78
    assert "sandbox level 'default' cannot be had: sandbox layer seccomp is not available" in ended.stderr


def test_s15_service_of_a_user_without_rights_has_every_layer() -> None:
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory(prefix="luacell-", dir="/tmp") as place:  # pytest's are root's alone
        if is_root:
            os.chown(place, NOBODY, NOBODY)
        with (
            Serving(Path(place) / "run", prefix=AS_NOBODY if is_root else ()) as serving,
            LuaHostBridge.connect(serving.run_directory) as bridge,
        ):
            for level in ("default", "hardened"):
                deploy(bridge, EVALUATE, sandbox=level)
                assert all(rows_of_level(bridge, level)[layer] for layer in LAYERS)
                assert holds(bridge, "not io.open('/etc/passwd')")
                assert holds(bridge, "os.execute('true') ~= 0")
                crashed = failure(bridge, PROBE, args=NULL_READ, fn_id=len(NULL_READ), out_size=1)
                assert isinstance(crashed, WorkerCrashed)
                assert crashed.signal == signal.SIGSEGV
                assert holds(bridge, "true")
                with closing(worker_of(bridge, PROBE)) as worker:
                    status = Path(f"/proc/{worker.pid}/status").read_text()
                assert "\nUid:\t0\t" not in status
                assert "\nCapPrm:\t0000000000000000\n" in status
                bridge.unregister_host_contract(PROBE)


# Run as another user: tells by name what it can do, with the run directory as its argument.
TRESPASS = """
import os, socket, sys
directory = sys.argv[1]
def tries(name, action):
    try:
        action()
    except PermissionError:
        return
    print(name)
for name, kind in (("broker.sock", socket.SOCK_STREAM), ("fd.sock", socket.SOCK_SEQPACKET)):
    tries("connect " + name, lambda: socket.socket(socket.AF_UNIX, kind).connect(f"{directory}/{name}"))
for name in ("broker.sock", "fd.sock", "broker.lock", "state/registry.db"):
    tries("look at " + name, lambda: os.stat(f"{directory}/{name}"))
    tries("open " + name, lambda: open(f"{directory}/{name}", "rb"))
tries("list", lambda: os.listdir(directory))
tries("make a file", lambda: open(directory + "/mine", "w"))
print("done")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("is_open", [False, True])
def test_s10_another_user_reaches_nothing(is_open: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="luacell-test-") as directory:
        os.chmod(directory, 0o755)
        path = Path(directory) / "run"
        with Serving(path), LuaHostBridge.connect(path) as bridge:
            deploy(bridge, EVALUATE)
            if is_open:  # by somebody's mistake: the files themselves keep others out
                path.chmod(0o755)
            ended = subprocess.run(
                ["/usr/bin/env", "python3", "-c", TRESPASS, str(path)],
                user=65534,
                group=65534,
                extra_groups=[],
                cwd="/",
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=True,
            )
            assert holds(bridge, "true")
    allowed = ["list", "look at broker.lock", "look at broker.sock", "look at fd.sock"] if is_open else []
    assert sorted(ended.stdout.split("\n")[:-2]) == allowed


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
