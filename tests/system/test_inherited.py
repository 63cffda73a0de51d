"""Whatever the host, or the shell that starts a service, has closed, ignored, blocked or limited: the service works."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from luacell.client import AbiErrorCode, LuaHostBridge
from tests.support.children import child_process
from tests.support.contracts import DOUBLE, HEALTHY, answers, deploy
from tests.support.serving import PYTHON, Serving, listens
from tests.support.waiting import LIMIT_S, eventually

ROOT = Path(__file__).parents[2]

# A host that crashes a worker, is answered, and ends; its service must not notice how the host was started.
HOST = """
import resource, signal, sys
{before}
from luacell.client import Busy, LuaFunction, LuaHostBridge, WorkerCrashed
source = "function(fn_id, args, out) if fn_id == 1 then os.exit(3) end out[0] = 7 end"
with LuaHostBridge() as bridge:
    bridge.register_host_contract("host.probe@1", LuaFunction(source))
    try:
        bridge.call("host.probe@1", 1)
    except WorkerCrashed as error:
        assert error.exit_code == 3, error
    else:
        raise AssertionError("it did not crash")
    assert bridge.call("host.probe@1", 0, b"", 1) == bytes([7])
    {then}
with open({told!r}, "w") as told:
    told.write("well")
"""


def host(before: str = "", then: str = "pass", shell: str = "exec {}") -> str:
    """Run a host; return what it has to tell, or what went wrong."""
    with tempfile.TemporaryDirectory(prefix="inherit-") as directory:
        told, script = Path(directory) / "told", Path(directory) / "host.py"
        script.write_text(HOST.format(before=before, then=then, told=str(told)))
        command = shell.format(f"{sys.executable} {script}")
        ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=4 * LIMIT_S, cwd=ROOT)
        return told.read_text() if told.exists() else f"exit code {ended.returncode}\n{ended.stderr}"


def test_host_that_ignores_sigchld() -> None:
    assert host("signal.signal(signal.SIGCHLD, signal.SIG_IGN)") == "well"


def test_host_that_blocks_every_signal() -> None:
    assert host("signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())") == "well"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_host_without_standard_descriptors(closed: str) -> None:
    assert host(shell=f"exec {{}} {closed}") == "well"


def test_host_with_few_descriptors_is_told_which_bound_was_hit() -> None:
    then = """
    refused = 0
    for number in range(100):
        try:
            bridge.register_host_contract(number, LuaFunction(source))
            bridge.call(number, 0, b"", 1)
        except Busy as error:
            assert "bound on workers" in str(error) or "segments" in str(error), error
            refused += 1
    assert refused > 0
    assert bridge.call("host.probe@1", 0, b"", 1) == bytes([7])
"""
    assert host("resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))", then) == "well"


@pytest.fixture
def short_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="inherit-") as directory:
        yield Path(directory)


def test_service_that_a_careless_shell_starts(short_directory: Path) -> None:
    prefix = ["bash", "-c", 'trap "" CHLD; exec "$@" <&- >&-', "bash"]
    with Serving(short_directory / "run", prefix=prefix), LuaHostBridge.connect(short_directory / "run") as bridge:
        deploy(bridge, DOUBLE, HEALTHY)
        assert answers(bridge, HEALTHY)
        assert bridge.call_host_contract(HEALTHY, 0, None, bytearray(4)).code is AbiErrorCode.WORKER_CRASHED
        assert eventually(lambda: answers(bridge, HEALTHY), "another worker serves it")


def test_service_in_a_relative_directory(short_directory: Path) -> None:
    serve = [*PYTHON, "-m", "luacell.cli", "serve", "--run-dir", "run", "--log-level", "error"]
    with child_process(serve, cwd=short_directory, start_new_session=True) as process:
        try:
            assert eventually(lambda: listens(short_directory / "run"), "it listens")
            with LuaHostBridge.connect(short_directory / "run") as bridge:
                deploy(bridge, DOUBLE, HEALTHY)
                assert answers(bridge, HEALTHY)
        finally:
            process.terminate()
            assert process.wait(LIMIT_S) == 0
