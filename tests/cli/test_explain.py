"""explain: what a contract says of itself, and that its layouts are those which callers pack."""

from __future__ import annotations

from pathlib import Path

import pytest

from luacell.client import LuaHostBridge
from tests.support.command import Command
from tests.support.contracts import HEALTHY
from tests.support.typed_directory import NAME, write_typed


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_typed(tmp_path / "kinds")


def test_a_directory_is_explained_without_a_service(directory: Path) -> None:
    ended = Command("/nonexistent")("explain", NAME, "--dir", str(directory))
    assert ended.code == 0, ended
    for line in (
        "    Python  scale(k: int, v: float, on: bool) -> float",
        "    Lua     function Service:scale(k, v, on)  -- k: number, v: number, on: boolean -> number",
        "    args    24 bytes, aligned to 8",
        "      @8   8  f64   v",
        "      @16  1  bool  on",
        "    Return what it is given.",
        "    record: any",
        "    returns the same",
        "struct Point: 16 bytes, aligned to 8",
        "      @8  8  f64  y",
        "      On   1  At last.",
        "flags Access: u32",
    ):
        assert line in ended.out.splitlines(), (line, ended.out)


def test_a_service_explains_the_same_as_the_directory(endpoint: Path, luacell: Command, directory: Path) -> None:
    with LuaHostBridge.connect(endpoint) as bridge:
        bridge.deploy(directory)
        try:
            for more in ((), ("--output", "json")):
                assert (
                    luacell("explain", NAME, *more).out == luacell("explain", NAME, "--dir", str(directory), *more).out
                )
        finally:
            bridge.unregister_host_contract(NAME)


def test_json_has_sizes_and_offsets(directory: Path) -> None:
    told = Command()("explain", "host.kinds", "--dir", str(directory), "--output", "json").json
    assert (told["name"], told["version"], told["singleton"]) == ("host.kinds", "1.2.0", False)
    scale = told["functions"][1]
    assert [(leaf["path"], leaf["offset"], leaf["size"]) for leaf in scale["args"]["leaves"]] == [
        ("k", 0, 1),
        ("v", 8, 8),
        ("on", 16, 1),
    ]
    assert scale["args"]["size"] == 24
    assert told["functions"][3]["args"] is None
    record = told["types"][0]
    assert [(field["name"], field["offset"]) for field in record["fields"]] == [
        ("id", 0),
        ("at", 8),
        ("mode", 24),
        ("access", 28),
        ("label", 32),
        ("blob", 48),
    ]
    assert record["size"] == 72


def test_what_is_not_there_is_told(luacell: Command, directory: Path) -> None:
    ended = luacell("explain", "host.kinds@2", "--dir", str(directory))
    assert ended.code == 2
    assert "is not declared in" in ended.errors and "host.kinds@1" in ended.errors
    assert luacell("explain", "host.nope@1").code == 3
    ended = luacell("explain", HEALTHY)
    assert ended.code == 1
    assert "a raw one, registered without an api.toml" in ended.errors
