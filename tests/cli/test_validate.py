"""validate: a directory that can be deployed passes; any other is refused with the place of what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command import Command
from tests.support.typed_directory import API, LUA, MANIFEST, write_typed

luacell = Command("/nonexistent")  # no service is asked


def test_good_directory_is_valid(tmp_path: Path) -> None:
    directory = write_typed(tmp_path / "kinds")
    ended = luacell("validate", str(directory))
    assert (ended.code, ended.errors) == (0, "")
    assert ended.out == f"host.kinds@1  kinds.lua  5 functions\n{directory} is valid\n"
    ended = luacell("validate", str(directory), "--load", "--output", "json")
    row = {"contract": "host.kinds@1", "source": "kinds.lua", "functions": 5}
    assert ended.json == {"valid": True, "loaded": True, "contracts": [row]}


@pytest.mark.parametrize(
    ("manifest", "api", "told"),
    [
        (MANIFEST.replace("source", "sorce"), API, "luacell.toml:4:1: [contract.\"host.kinds\"] unknown key 'sorce'"),
        (MANIFEST + "workers = 0\n", API, "luacell.toml:5:11: "),
        (MANIFEST.replace("kinds.lua", "none.lua"), API, "luacell.toml:4:10: "),
        (MANIFEST.replace("api.toml", "none.toml"), API, "luacell.toml:1:7: api = 'none.toml' is not a readable file"),
        (MANIFEST.replace("host.kinds", "host.kind"), API, "luacell.toml:3:11: "),
        (MANIFEST + "source =\n", API, "luacell.toml:5:9: "),
        ("[" * 100_000, API, "luacell.toml"),
        (MANIFEST, API.replace('"f32"', '"f23"'), "api.toml:17:32: unknown type 'f23'; did you mean 'f32'?"),
        (MANIFEST, API.replace("bitflag", "bitflags"), "api.toml:11:1: unknown key 'bitflags'"),
    ],
    ids=range(9),
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, manifest: str, api: str, told: str) -> None:
    ended = luacell("validate", str(write_typed(tmp_path / "kinds", manifest=manifest, api=api)))
    assert ended.code == 2, ended
    assert told in ended.errors
    assert ended.out == ""


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    manifest = (
        MANIFEST.replace('api = "api.toml"', 'api = "api.toml"\nrequires = 7\nunits = 1')
        + 'workers = 0\nmemory = "1"\ndeadline = "x"\nstateless = 1\n[contract."host.none"]\nsource = "none.lua"\n'
    )
    ended = luacell("validate", str(write_typed(tmp_path / "kinds", manifest=manifest)))
    assert ended.code == 2
    places = ("2:12", "3:1", "7:11", "8:10", "9:12", "10:13", "11:11")
    assert all(f"luacell.toml:{place}: " in ended.errors for place in places), ended.errors


def test_everything_is_told_of_both_files(tmp_path: Path) -> None:
    api = API.replace('"f32"', '"f23"').replace("bitflag", "bitflags")
    manifest = MANIFEST.replace("kinds.lua", "none.lua") + (
        'sandbox = "open"\nread = ["data"]\nwrite = "/"\ndeadline = 5\nmemory = 64\nmax_output = "1TiB"\n'
        '[contract."host.raised"]\nsource = "kinds.lua"\nsandbox = "hardened"\nnetwork = true\n[contract."host.bare"]\n'
    )
    ended = luacell("validate", str(write_typed(tmp_path / "kinds", manifest=manifest, api=api)))
    assert ended.code == 2
    places = ("4:10", "5:11", "6:8", "7:9", "8:12", "9:10", "10:14", "14:11", "15:1")
    assert all(f"luacell.toml:{place}: " in ended.errors for place in places), ended.errors
    assert "api.toml:11:1: unknown key 'bitflags'; did you mean 'bitflag'?" in ended.errors
    assert "api.toml:17:32: unknown type 'f23'; did you mean 'f32'?" in ended.errors
    assert "max_output = '1TiB' is not a size such as \"64KiB\", from 0 B to 64 KiB" in ended.errors
    assert ended.errors.count("\n") == len(places) + 2


@pytest.mark.parametrize(
    ("lua", "told"),
    [("this is no Lua", "kinds.lua:1:"), (LUA.replace("Kinds:points", "Kinds:pints"), "points")],
)
def test_what_does_not_load_is_found_on_request(tmp_path: Path, lua: str, told: str) -> None:
    directory = str(write_typed(tmp_path / "kinds", lua=lua))
    assert luacell("validate", directory).code == 0
    ended = luacell("validate", directory, "--load")
    assert ended.code == 2, ended
    assert told in ended.errors
