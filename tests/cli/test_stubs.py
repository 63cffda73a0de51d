"""stubs: modules that type checkers and running hosts take, whatever an api.toml names its things."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import Command
from tests.support.typed_directory import write_typed

luacell = Command("/nonexistent")
MYPY_LIMIT_S = 110

HOST = """
import asyncio
import sys
from pathlib import Path

from luacell.client import AsyncLuaHostBridge, LuaHostBridge

import contracts
from contracts import Access, Mode, Point, Record

given = Record(2**64 - 1, Point(0.5, 2.0), Mode.On, Access.Read | Access.Write, "text", b"blob")


def sync(directory: Path) -> None:
    with LuaHostBridge() as bridge:
        bridge.deploy(directory)
        kinds: contracts.Kinds = contracts.kinds(bridge)
        record: Record = kinds.same(given)
        assert record == given and type(record) is Record and type(record.access) is Access
        points: list[Point] = kinds.with_options(timeout=5).points((Point(1.0, 2.0),))
        assert points == [Point(1.0, 2.0)]


async def awaited(directory: Path) -> None:
    async with AsyncLuaHostBridge() as bridge:
        await bridge.deploy(directory)
        kinds = await contracts.async_kinds(bridge)
        value: float = await kinds.scale(3, 2.5, True)
        assert value == 7.5 and await kinds.same(given) == given


if __name__ == "__main__":
    sync(Path(sys.argv[1]))
    asyncio.run(awaited(Path(sys.argv[1])))
    print("done")
"""

# Everything is named like something that the module needs.
AWKWARD = """
[[enum]]
name = "int"
repr = "u8"
variants = [{ name = "name", value = "0" }, { name = "value", value = "1" }]
[[enum]]
name = "IntEnum"
repr = "u64"
bitflag = true
variants = [{ name = "real", value = "1" }, { name = "B", value = "1 << 63", docs = "ends with a quote\\"" }]
[[enum]]
name = "Flags"
repr = "u8"
bitflag = true
variants = [{ name = "One", value = "1" }]
[[types]]
name = "list"
fields = [{ name = "int", type = "int" }, { name = "str", type = "StringView" }, { name = "list", type = "Array<str>" }]
[[types]]
name = "str"
docs = 'a \"\"\"quote\"\"\" and \\d "'
fields = [{ name = "float", type = "f64" }, { name = "bytes", type = "Buffer" }, { name = "dataclass", type = "Ptr" }]
[[types]]
name = "bridge"
fields = [{ name = "Protocol", type = "IntEnum" }]
[[host_contract]]
name = "host.a.kinds"
version = "1"
[[host_contract.functions]]
name = "list"
params = [{ name = "int", type = "Array<Buffer>" }, { name = "bridge", type = "bridge" }]
return = "list"
[[host_contract.functions]]
name = "cast"
return = "Flags"
[[host_contract.functions]]
name = "with_options"
return = "Array<bridge>"
[[host_contract]]
name = "host.b.kinds"
version = "1"
[[host_contract.functions]]
name = "nothing"
[[host_contract]]
name = "host.b.kinds"
version = "2"
"""


def mypy(directory: Path, *files: str) -> str:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache", *files]
    ended = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=MYPY_LIMIT_S, check=False)
    return ended.stdout + ended.stderr


def test_a_host_uses_the_module_under_strict_types_and_runs(tmp_path: Path) -> None:
    directory = write_typed(tmp_path / "kinds")
    ended = luacell("stubs", str(directory), "-o", str(tmp_path / "contracts.py"))
    assert (ended.code, ended.out) == (0, f"{tmp_path}/contracts.py: host.kinds@1\n")
    (tmp_path / "host.py").write_text(HOST)
    assert "Success: no issues found" in mypy(tmp_path, "host.py", "contracts.py")
    ran = subprocess.run(
        [sys.executable, "host.py", str(directory)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stdout == "done\n", ran.stderr


def test_a_wrong_use_is_found_by_types_alone(tmp_path: Path) -> None:
    directory = write_typed(tmp_path / "kinds")
    luacell("stubs", str(directory), "-o", str(tmp_path / "contracts.pyi"))
    wrong = "import contracts\n\n\ndef use(kinds: contracts.Kinds) -> str:\n    return kinds.scale('k', 1.0, True)\n"
    (tmp_path / "wrong.py").write_text(wrong)
    found = mypy(tmp_path, "wrong.py")
    assert 'Argument 1 to "scale" of "Kinds" has incompatible type "str"; expected "int"' in found
    assert 'got "float", expected "str"' in found


def test_names_that_the_module_needs_may_be_taken(tmp_path: Path) -> None:
    names = ("host.a.kinds@1", "host.b.kinds@1", "host.b.kinds@2")
    tables = "".join(f'[contract."{name}"]\nsource = "kinds.lua"\n' for name in names)
    directory = write_typed(tmp_path / "kinds", manifest=f'api = "api.toml"\n{tables}', api=AWKWARD)
    for file in ("contracts.py", "stubs.pyi"):
        assert luacell("stubs", str(directory), "-o", str(tmp_path / file)).code == 0
    assert "Success: no issues found in 2 source files" in mypy(tmp_path, "contracts.py", "stubs.pyi")
    text = (tmp_path / "contracts.py").read_text()
    (documented,) = [each for each in ast.parse(text).body if isinstance(each, ast.ClassDef) and each.name == "str"]
    assert ast.get_docstring(documented) == 'a """quote""" and \\d "'
    check = "import contracts as c; print(c.int['value'].value, c.str(1.0, b'', 2).dataclass, c.IntEnum['B'].value)"
    ran = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout == f"1 2 {1 << 63}\n", ran.stderr


def test_the_text_depends_on_the_description_alone(tmp_path: Path) -> None:
    directory = write_typed(tmp_path / "kinds")
    texts = set()
    for seed in ("1", "2", "3"):
        luacell("stubs", str(directory), "-o", str(tmp_path / f"s{seed}.py"), PYTHONHASHSEED=seed)
        texts.add((tmp_path / f"s{seed}.py").read_text())
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("file", "told"), [("contracts.txt", "ends neither with .py"), ("no/where.py", "cannot write")]
)
def test_file_that_cannot_be_written_is_usage(tmp_path: Path, file: str, told: str) -> None:
    ended = luacell("stubs", str(write_typed(tmp_path / "kinds")), "-o", str(tmp_path / file))
    assert ended.code == 2
    assert told in ended.errors


def test_raw_directory_has_nothing_to_type(tmp_path: Path) -> None:
    directory = write_typed(tmp_path / "kinds", manifest='[contract."host.kinds@1"]\nsource = "kinds.lua"\n')
    ended = luacell("stubs", str(directory), "-o", str(tmp_path / "x.py"))
    assert ended.code == 2
    assert "names no api; its contracts are raw" in ended.errors
