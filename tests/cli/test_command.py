"""The command as a whole: quick, without tracebacks, and at home in a shell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from luacell.cli.__main__ import main
from luacell.client import LuaFunction, LuaHostBridge, Unavailable
from luacell.protocol.release import __version__
from tests.support.command import LUACELL, Command
from tests.support.contracts import DOUBLE, HEALTHY, answers
from tests.support.waiting import LIMIT_S, eventually

VERBS = (
    *("serve", "broker", "worker-host", "deploy", "undeploy", "dev", "register", "unregister", "revive", "call"),
    *("ls", "health", "demo", "bench", "validate", "explain", "stubs", "new", "crash", "doctor"),
)


def test_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert Command()("--version").out == f"luacell {__version__}\n"
    assert version("luacell") == __version__


@pytest.mark.parametrize("words", [("--help",), *((verb, "--help") for verb in VERBS)], ids=" ".join)
def test_help_loads_nothing_heavy(words: tuple[str, ...]) -> None:
    heavy = (
        "luacell.protocol.api",
        "zmq",
        "msgpack",
        "rich",
        "lupa",
        "luacell.client",
        "luacell.broker",
        "luacell.worker",
    )
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print([name for name in {heavy} if name in sys.modules], file=sys.stderr))\n"
        f"sys.argv = ['luacell', *{words}]\n"
        "from luacell.cli.__main__ import main\nmain()"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert ended.stderr == "[]\n"
    assert "Usage: luacell" in ended.stdout


def test_installed_command_is_there() -> None:
    script = Path(sys.executable).with_name("luacell")
    ended = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert ended.stdout == f"luacell {__version__}\n"


def test_no_verb_is_usage() -> None:
    ended = Command()()
    assert "Commands:" in ended.out + ended.errors


# -- output that goes nowhere ----
@pytest.mark.parametrize(
    "words", [("ls",), ("ls", "--output", "json"), ("health",), ("--help",), ("health", "--ready")]
)
def test_reader_that_has_left_is_no_traceback(luacell: Command, words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = luacell.start(*words, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert errors == b""
    assert process.returncode in (1, 141)  # 1 where typer itself prints


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_raw_bytes_to_a_reader_that_leaves_early(luacell: Command, unbuffered: str) -> None:
    command = [*LUACELL, "call", HEALTHY, "0", "--args-hex", "15000000", "--out-size", "8000000", "--raw"]
    environment = luacell.environment | {"PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(4) == b"\x2a\0\0\0"
    process.stdout.close()
    assert process.wait(LIMIT_S) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_full_disk_behind_stdout_is_told(luacell: Command) -> None:
    with Path("/dev/full").open("wb") as full:
        process = luacell.start("ls", stdout=full, stderr=subprocess.PIPE)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert b"No space left on device" in errors
    assert b"Traceback" not in errors


def test_closed_stdout_is_no_traceback(luacell: Command) -> None:
    command = " ".join([*LUACELL, "ls", ">&-"])
    ended = subprocess.run(
        command, shell=True, env=luacell.environment, capture_output=True, timeout=LIMIT_S, check=False
    )
    assert b"Traceback" not in ended.stderr


# -- Ctrl-C ----
def test_ctrl_c_in_a_call_is_130(luacell: Command, endpoint: Path) -> None:
    with LuaHostBridge.connect(endpoint) as bridge:
        process = luacell.start("call", "host.slow@1", "0", stderr=subprocess.PIPE)

        def is_running() -> bool:
            return any(each["state"] == "busy" for each in bridge.health()["workers"])

        eventually(is_running, "the call runs")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, errors) == (130, b"")
        assert answers(bridge, HEALTHY)


def test_ctrl_c_at_any_moment_is_130_or_too_late(luacell: Command) -> None:
    """The interpreter's own start is not ours: what strikes before our first line may say so."""
    for delay_ms in range(60, 320, 20):
        process = luacell.start("ls", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(delay_ms / 1000)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=LIMIT_S)
        if b"luacell/cli" in errors:
            pytest.fail(errors.decode())
        if b"init_import_site" not in errors:  # which the interpreter calls fatal
            assert process.returncode in (0, 130, -signal.SIGINT), (delay_ms, out, errors)


def test_ctrl_c_that_python_disguises_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def app(prog_name: str) -> None:
        raise RuntimeError(f"Error calling __set_name__ for {prog_name}") from KeyboardInterrupt()

    monkeypatch.setitem(sys.modules, "luacell.cli.main", SimpleNamespace(app=app))
    with pytest.raises(SystemExit, match="130"):
        main()


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def app(prog_name: str) -> None:
        raise RuntimeError(prog_name) from ValueError()

    monkeypatch.setitem(sys.modules, "luacell.cli.main", SimpleNamespace(app=app))
    with pytest.raises(RuntimeError, match="luacell"):
        main()


# -- completion ----
def complete(luacell: Command, words: str) -> list[str]:
    count = str(len(words.split(" ")) - 1)
    ended = luacell(_LUACELL_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count)
    assert ended.code == 0
    return ended.out.split()


def test_verbs_options_and_contracts_are_completed(luacell: Command) -> None:
    assert complete(luacell, "luacell un") == ["undeploy", "unregister"]
    assert "--replace" in complete(luacell, "luacell register --")
    assert complete(luacell, "luacell call host.h") == [HEALTHY]
    assert set(complete(luacell, "luacell bench host.")) == {HEALTHY, "host.probe@1", "host.slow@1"}


def test_completion_without_a_service_is_empty(tmp_path: Path) -> None:
    assert complete(Command(tmp_path / "nobody"), "luacell call host.") == []


def test_completion_for_shells_is_shown(luacell: Command) -> None:
    script = luacell("--show-completion", "bash", SHELL="/bin/bash").out
    assert "_LUACELL_COMPLETE" in script or "complete_bash" in script


# -- processes of a service ----
def test_broker_and_worker_host_of_their_own_make_a_service(tmp_path: Path) -> None:
    run, state, luacell = tmp_path / "run", tmp_path / "state", Command(tmp_path / "run")
    common = ("--run-dir", str(run), "--log-level", "error")
    broker = luacell.start("broker", *common, "--state-dir", str(state))
    worker_host = luacell.start("worker-host", *common)
    try:
        assert luacell("health", "--ready", "--wait", "20").code == 0
        with LuaHostBridge.connect(run) as bridge:
            bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
            assert answers(bridge, HEALTHY)
            assert bridge.health()["state_dir"] == str(state)
    finally:
        for process in (worker_host, broker):
            process.terminate()
        assert [process.wait(LIMIT_S) for process in (worker_host, broker)] == [0, 0]


@pytest.mark.parametrize("given", ["nothing", "run directory", "state directory"])
def test_registry_lies_where_it_was_told_or_where_it_belongs(given: str) -> None:
    with tempfile.TemporaryDirectory(prefix="cli-") as name:
        home = Path(name)
        (home / "runtime").mkdir(mode=0o700)
        luacell = Command()
        places = {"HOME": name, "XDG_RUNTIME_DIR": str(home / "runtime"), "XDG_STATE_HOME": str(home / "states")}
        luacell.environment |= places
        options = {
            "nothing": ((), "runtime/luacell", "states/luacell"),
            "run directory": (("--run-dir", "cells"), "cells", "cells/state"),
            "state directory": (("--run-dir", "cells", "--state-dir", "kept/here"), "cells", "kept/here"),
        }
        words, run, state = options[given]
        process = luacell.start("serve", *words, "--log-level", "error", cwd=home, stderr=subprocess.DEVNULL)
        try:

            def connected() -> LuaHostBridge | None:
                with suppress(Unavailable):
                    return LuaHostBridge.connect(home / run)
                return None

            with eventually(connected, "the service is there") as bridge:
                bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE))
                assert answers(bridge, HEALTHY), "workers find a broker whose directory was named by a relative path"
                assert bridge.health()["state_dir"] == str(home / state)
            assert (home / state / "registry.db").exists()
            assert (home / state).stat().st_mode & 0o777 == 0o700
        finally:
            process.terminate()
            assert process.wait(LIMIT_S) == 0


def test_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o755)
    for verb in ("serve", "broker"):
        ended = Command()(verb, "--run-dir", str(tmp_path / "run"), "--state-dir", str(tmp_path / "state"))
        assert ended.code == 78
        assert f"state directory {tmp_path / 'state'} has mode 0755" in ended.errors


@pytest.mark.parametrize("verb", ["serve", "broker", "worker-host"])
def test_unknown_log_level_is_a_usage_error(tmp_path: Path, verb: str) -> None:
    ended = Command()(verb, "--run-dir", str(tmp_path / "run"), "--log-level", "loud")
    assert ended.code == 2
    assert "loud" in ended.errors
    assert "warning" in ended.errors
    assert "Traceback" not in ended.errors


@pytest.mark.parametrize("option", ["--run-dir", "--state-dir"])
def test_empty_directory_is_a_usage_error(option: str) -> None:
    ended = Command()("serve", option, "")
    assert ended.code == 2
    assert option in ended.errors
    assert "the path is empty" in ended.errors
