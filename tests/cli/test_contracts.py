"""The verbs about contracts: what they print, and how their exit codes tell what went wrong."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from luacell.client import LuaHostBridge
from luacell.protocol.limits import SOURCE_MAX
from tests.support.command import Command
from tests.support.contracts import DOUBLE, ECHO, HEALTHY, PROBE, function, write_deployment
from tests.support.serving import AS_THE_FILES_SAY
from tests.support.waiting import LIMIT_S

ARGS = ("--args-hex", "15000000", "--out-size", "4")
OWN = "host.own@1.2.3"


@pytest.fixture
def own(endpoint: Path, tmp_path: Path) -> Iterator[Path]:
    """A file with a contract, which the test registers as OWN."""
    path = tmp_path / "own.lua"
    path.write_text(DOUBLE)
    yield path
    with LuaHostBridge.connect(endpoint) as bridge:
        if any(info.name == "host.own" for info in bridge.contracts()):
            bridge.unregister_host_contract(OWN)


# -- call ----
def test_call_prints_hex_digits(luacell: Command) -> None:
    ended = luacell("call", HEALTHY, "0", *ARGS)
    assert (ended.code, ended.out, ended.errors) == (0, "2a000000\n", "")


def test_call_prints_json(luacell: Command) -> None:
    ended = luacell("call", HEALTHY, "0", *ARGS, "--output", "json")
    assert ended.json == {"contract": HEALTHY, "function": 0, "out": "2a000000"}


def test_call_without_an_out_prints_nothing(luacell: Command, own: Path) -> None:
    own.write_text(function(""))
    luacell("register", OWN, str(own))
    ended = luacell("call", OWN, "0")
    assert (ended.code, ended.out, ended.errors) == (0, "", "")


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_call_passes_bytes_through(luacell: Command, own: Path, tmp_path: Path, source: str) -> None:
    own.write_text(ECHO)
    luacell("register", OWN, str(own))
    payload = os.urandom(100_000)
    (tmp_path / "args").write_bytes(payload)
    args = "-" if source == "stdin" else str(tmp_path / "args")
    size = str(len(payload))
    ended = luacell("call", OWN, size, "--args-file", args, "--out-size", size, "--raw", stdin=payload)
    assert ended.code == 0
    assert ended.raw == payload


def test_call_takes_an_id_in_hex(luacell: Command) -> None:
    (row,) = [row for row in luacell("ls", "--output", "json").json if row["name"] == "host.healthy"]
    assert luacell("call", row["id"], "0", *ARGS).out == "2a000000\n"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("call", "host.nope@1", "0"), 3, "host.nope@1: host contract not found"),
        (("call", "0x04D2", "0"), 3, "contract_id=0x00000000000004D2"),
        (("unregister", "host.nope@1"), 3, "host contract not found"),
        (("call", "host.slow@1", "0", "--timeout", "0.2"), 4, "host.slow@1 fn 0"),
        (("call", PROBE, "1"), 1, "signal 11 (SIGSEGV)"),
        (("call", "host.healthy", "0"), 2, "lacks its version"),
        (("call", "no name@1", "0"), 2, "'no name'"),
        (("call", "0x1ffffffffffffffff", "0"), 2, "more than 64 bits"),
        (("call", "0xzz", "0"), 2, "0xzz"),
        (("call", HEALTHY, "0", "--args-hex", "1"), 2, "'1' is no pairs of hex digits"),
        (("call", HEALTHY, "0", "--args-hex", "00", "--args-file", "x"), 2, "exclude each other"),
        (("call", HEALTHY, "0", "--args-file", "/nonexistent"), 2, "cannot read /nonexistent: No such file"),
        (("call", HEALTHY, "0", "--raw", "--output", "json"), 2, "exclude each other"),
        (("call", HEALTHY, "0", "--timeout", "61"), 2, "60 s"),
        (("call", HEALTHY, "0", "--out-size", "99999999999"), 2, "over the limit"),
        (("call", HEALTHY, "-1"), 2, "-1"),
        (("call", HEALTHY, "4294967296"), 2, "4294967295"),
        (("call", HEALTHY, "first"), 2, "is a raw contract"),
        (("call", HEALTHY), 2, "FUNCTION"),
        (("register", "host.x@1", "/nonexistent.lua"), 2, "cannot read /nonexistent.lua"),
        (("deploy", "/nonexistent"), 2, "/nonexistent/luacell.toml"),
        (("ls", "--output", "xml"), 2, "xml"),
        (("frobnicate",), 2, "frobnicate"),
    ],
    ids=lambda part: " ".join(part)[:50] if isinstance(part, tuple) else "",
)
def test_what_goes_wrong_is_told_on_stderr_and_by_the_exit_code(
    luacell: Command, words: tuple[str, ...], code: int, told: str
) -> None:
    ended = luacell(*words)
    assert ended.code == code, ended
    assert told in ended.errors
    assert ended.out == ""


@pytest.mark.parametrize("words", [("ls",), ("health",), ("call", HEALTHY, "0"), ("health", "--ready")])
def test_broker_that_is_not_there_is_69_with_its_place(tmp_path: Path, words: tuple[str, ...]) -> None:
    ended = Command(tmp_path / "none")(*words)
    assert ended.code == 69
    assert f"no broker at {tmp_path / 'none'}/fd.sock" in ended.errors
    assert "hint: " in ended.errors


def test_endpoint_of_another_kind_is_usage() -> None:
    ended = Command("udp://127.0.0.1:1")("ls")
    assert ended.code == 2
    assert "udp://" in ended.errors


def test_directory_that_may_not_be_entered_is_not_allowed(endpoint: Path) -> None:
    endpoint.chmod(0o600)
    try:
        with tempfile.TemporaryFile() as errors:
            process = Command(endpoint).start("ls", stderr=errors, prefix=AS_THE_FILES_SAY)
            assert process.wait(LIMIT_S) == 5
            errors.seek(0)
            assert b"Permission denied" in errors.read()
    finally:
        endpoint.chmod(0o700)


# -- register, unregister ----
def test_register_replace_unregister(luacell: Command, own: Path) -> None:
    ended = luacell("register", OWN, str(own))
    assert (ended.code, ended.out) == (0, "host.own@1 registered\n")
    assert luacell("call", OWN, "0", *ARGS).out == "2a000000\n"
    again = luacell("register", OWN, str(own))
    assert again.code == 1
    assert "duplicate host contract" in again.errors
    assert "hint: --replace" in again.errors
    own.write_text(DOUBLE.replace("2 *", "3 *"))
    replaced = luacell("register", OWN, str(own), "--replace", "--output", "json")
    assert replaced.json["registered"] == "host.own@1"
    assert luacell("call", OWN, "0", *ARGS).out == "3f000000\n"
    gone = luacell("unregister", OWN, "--output", "json")
    assert gone.json == {"unregistered": "host.own@1", "id": replaced.json["id"]}
    assert luacell("call", OWN, "0", *ARGS).code == 3


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("this is no Lua", "own.lua:1:"),
        ("return 42", "expected Lua function, got Lua number"),
        ("error('\\27[31mred')", "\\x1b[31mred"),
    ],
)
def test_contract_that_does_not_load_is_not_registered(luacell: Command, own: Path, source: str, told: str) -> None:
    own.write_text(source)
    ended = luacell("register", OWN, str(own))
    assert ended.code == 1
    assert told in ended.errors
    assert "host.own" not in luacell("ls").out


def test_source_that_is_too_large_is_usage(luacell: Command, own: Path) -> None:
    own.write_bytes(b"-" * (SOURCE_MAX + 1))
    ended = luacell("register", OWN, str(own))
    assert ended.code == 2
    assert str(SOURCE_MAX) in ended.errors


def test_deploy_names_what_it_has_registered(luacell: Command, tmp_path: Path) -> None:
    write_deployment(tmp_path, DOUBLE, "host.deployed@1")
    assert luacell("deploy", str(tmp_path)).out == "host.deployed@1\n"
    luacell("unregister", "host.deployed@1")
    assert luacell("deploy", str(tmp_path), "--output", "json").json == {"deployed": ["host.deployed@1"]}
    luacell("unregister", "host.deployed@1")


def test_deployment_that_is_not_right_names_file_and_key(luacell: Command, tmp_path: Path) -> None:
    write_deployment(tmp_path, DOUBLE, "host.deployed@1", workerz=2)
    ended = luacell("deploy", str(tmp_path))
    assert ended.code == 2
    assert "did you mean 'workers'" in ended.errors


# -- ls ----
def test_ls_lists_what_is_registered(luacell: Command) -> None:
    ended = luacell("ls")
    head, *rows = ended.out.splitlines()
    assert head.split() == ["id", "name", "version", "deadline", "workers", "kind"]
    assert {row.split()[1] for row in rows} == {"host.healthy", "host.probe", "host.slow"}
    (slow,) = [row for row in rows if "host.slow" in row]
    assert slow.split()[2:] == ["1.0.0", "30", "s", "1", "stateful"]
    assert [row.index("host.") for row in rows] == [head.index("name")] * 3


def test_ls_as_json_has_all_fields(luacell: Command) -> None:
    (slow,) = [row for row in luacell("ls", "--output", "json").json if row["name"] == "host.slow"]
    assert slow.pop("id").startswith("0x")
    assert slow.pop("unit").startswith("probe-")
    assert slow == {"name": "host.slow", "version": "1.0.0", "deadline": 30.0, "stateless": False, "workers": 1}
