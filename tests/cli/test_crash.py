"""Crashes from the command line: listed, shown, made again, and exported as tests that fail until they are fixed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from luacell.cli.console import UsageError
from luacell.cli.crash_arguments import dumped
from luacell.cli.regression import literal
from luacell.cli.reproduction import Reproduction, manifest_of
from luacell.client import Crash, CrashInfo, LuaFunction, LuaHostBridge
from luacell.client.deployment import Deployment
from luacell.protocol.limits import KIB, MIB
from luacell.protocol.messages import Settings
from tests.support.command import Command
from tests.support.contracts import CRASHED, DEADLINE, PROBE, deploy, failure, function
from tests.support.serving import Serving
from tests.support.typed_directory import write_typed
from tests.support.waiting import LIMIT_S, eventually

# Crashes where its arguments begin with a null pointer; the repaired one refuses them.
DEADLY: Final = function("""
  local helper = require("helper")
  if fn_id == 3 then while true do end end
  if args[0] == 0 then io.stderr:write("last words\\n"); ffi.cast("int *", 0)[0] = 1 end
  out[0] = helper.double(args[0])
""")
REPAIRED: Final = DEADLY.replace("io.stderr", 'error("a null pointer", 0); io.stderr')
HELPER: Final = "return { double = function(value) return 2 * value end }\n"
ARGS: Final = b'\0\xff"\\\n\r\ttext'

TYPED: Final = """
local ffi = require("ffi")
local Kinds = {}
Kinds.__index = Kinds
function Kinds.new() return setmetatable({}, Kinds) end
function Kinds:same(record) ffi.cast("int *", 0)[0] = 1 end
function Kinds:scale(k, v, on) if k == 7 then os.exit(3) end return k * v end
function Kinds:points(points) return points end
function Kinds:nothing() end
function Kinds:spin() end
return Kinds
"""


def newest(bridge: LuaHostBridge, contract: str) -> CrashInfo:
    """Wait for the last crash of a contract: at a deadline the caller is told before the worker is dead."""
    return eventually(
        lambda: next((info for info in bridge.crashes() if info.contract == contract), None), f"{contract} has crashed"
    )


@pytest.fixture(scope="module")
def bridge(endpoint: Path) -> Iterator[LuaHostBridge]:
    with LuaHostBridge.connect(endpoint) as bridge:
        yield bridge


@pytest.fixture(scope="module")
def raw(bridge: LuaHostBridge, tmp_path_factory: pytest.TempPathFactory) -> CrashInfo:
    """A crash of a raw contract with a module and settings of its own."""
    directory = tmp_path_factory.mktemp("deadly")
    (directory / "deadly.lua").write_text(DEADLY)
    (directory / "helper.lua").write_text(HELPER)
    (directory / "luacell.toml").write_text(
        '[contract."host.deadly@1.2.3"]\nsource = "deadly.lua"\nsandbox = "hardened"\nmemory = "32MiB"\n'
    )
    bridge.deploy(directory)
    assert failure(bridge, "host.deadly@1", 2, args=ARGS, out_size=1).code == CRASHED
    return newest(bridge, "host.deadly@1")


@pytest.fixture(scope="module")
def typed(bridge: LuaHostBridge, tmp_path_factory: pytest.TempPathFactory) -> CrashInfo:
    """A crash of an instance of a typed contract."""
    bridge.deploy(write_typed(tmp_path_factory.mktemp("kinds"), lua=TYPED))
    kinds = bridge.contract("host.kinds@1")
    with pytest.raises(Exception, match="exit"):
        kinds.scale(7, 2.5, True)
    return newest(bridge, "host.kinds@1")


def test_crashes_are_listed(luacell: Command, raw: CrashInfo) -> None:
    (line,) = [line for line in luacell("crash", "ls").out.splitlines() if raw.id in line]
    assert "host.deadly@1  fn 2" in line
    assert line.endswith("257   signal 11 (SIGSEGV)")
    (row,) = [row for row in luacell("crash", "ls", "--output", "json").json if row["id"] == raw.id]
    assert (row["contract"], row["version"], row["signal"]) == ("host.deadly@1", "1.2.3", 11)


def test_a_crash_is_shown_with_a_dump_of_its_arguments(luacell: Command, raw: CrashInfo) -> None:
    out = luacell("crash", "show", raw.id).out
    assert "cause     signal 11 (SIGSEGV)\n" in out
    assert f"00000000  {ARGS.hex(' ')}" in out
    assert out.endswith("stderr\n  last words\n")
    shown = luacell("crash", "show", raw.id, "--output", "json").json
    assert (shown["args"], shown["arguments"]) == (ARGS.hex(), None)
    assert shown["settings"]["sandbox"] == "hardened"


def test_typed_arguments_are_shown_by_name(luacell: Command, typed: CrashInfo) -> None:
    shown = luacell("crash", "show", typed.id, "--output", "json").json
    assert (shown["function"], shown["arguments"]) == ("scale", {"k": 7, "v": 2.5, "on": True})
    assert "v   2.5\n" in luacell("crash", "show", typed.id).out


def test_a_replay_ends_as_recorded_and_a_repaired_source_does_not(
    luacell: Command, raw: CrashInfo, tmp_path: Path
) -> None:
    ended = luacell("crash", "replay", raw.id, "--output", "json")
    assert ended.code == 1
    assert ended.json["as_recorded"]
    assert (ended.json["outcome"]["code"], ended.json["outcome"]["signal"]) == (257, 11)
    assert ended.json["outcome"]["began"] == "yes"
    (tmp_path / "fixed.lua").write_text(DEADLY.replace("args[0] == 0", "false"))
    ended = luacell("crash", "replay", raw.id, "--source", str(tmp_path / "fixed.lua"))
    assert ended.code == 0, ended
    assert "now          succeeds, and writes 00" in ended.out
    assert "as recorded  no" in ended.out
    ended = luacell("crash", "replay", raw.id, "--source", "-", stdin=REPAIRED.encode())
    assert ended.code == 1
    assert "code 102: " in ended.out
    assert "a null pointer" in ended.out


def test_a_call_of_an_instance_is_replayed_on_the_default_one(luacell: Command, typed: CrashInfo) -> None:
    ended = luacell("crash", "replay", typed.id, "--output", "json")
    assert ended.code == 1
    assert ended.json["as_recorded"]
    assert ended.json["outcome"]["exit_code"] == 3
    ended = luacell("crash", "replay", typed.id, "--source", "-", stdin=TYPED.replace("k == 7", "false").encode())
    assert ended.code == 0, ended


def test_a_replay_leaves_the_service_alone_and_nothing_behind(
    luacell: Command, bridge: LuaHostBridge, raw: CrashInfo
) -> None:
    before = bridge.crashes()
    assert luacell("crash", "replay", raw.id).code == 1
    assert bridge.crashes() == before


@pytest.mark.parametrize("words", [("show",), ("replay",), ("export", "--pytest")], ids=" ".join)
def test_unknown_ids_are_told(luacell: Command, words: tuple[str, ...]) -> None:
    ended = luacell("crash", *words, "0123456789ab")
    assert ended.code == 3
    assert "crash '0123456789ab' is not on record" in ended.errors


# -- under the circumstances of the record ----
C_MODULES: Final = [str(path) for path in (Path("/usr/lib/x86_64-linux-gnu/lua/5.1/cjson.so"),) if path.exists()]
EVALUATE: Final = function(f"""
  if fn_id == 1 and {len(C_MODULES)} > 0 then require("cjson") end
  if fn_id == 2 and io.open("/usr/bin/env") then error("it is not confined", 0) end
  if fn_id < 3 then ffi.cast("int *", 0)[0] = 1 end
  while fn_id == 3 do end
""")


def test_a_replay_has_the_floor_the_c_modules_and_the_time_of_the_record(luacell: Command, tmp_path: Path) -> None:
    options = ["--sandbox", "hardened", *(word for path in C_MODULES for word in ("--c-module", path))]
    with (
        Serving(tmp_path / "run", *options) as serving,
        LuaHostBridge.connect(serving.run_directory) as bridge,
    ):
        deploy(bridge, EVALUATE)
        bridge.register_host_contract(0xF100, LuaFunction(EVALUATE))
        assert failure(bridge, PROBE, 1, args=None).code == failure(bridge, 0xF100, 2, args=None).code == CRASHED
        bridge.call(PROBE, 4)  # there is a worker again, whose start is no part of the next call's time
        assert failure(bridge, PROBE, 3, args=None, timeout=0.2).code == DEADLINE
        late = eventually(lambda: next((each for each in bridge.crashes() if each.fn_id == 3), None), "it is on record")
        ids = [each.id for each in bridge.crashes() if each.id != late.id]
        crash = bridge.crash(late.id)
        assert (crash.sandbox, crash.c_modules, crash.budget) == ("hardened", tuple(C_MODULES), 0.2)
        endpoint = ("--endpoint", str(serving.run_directory))
        assert "sandbox   hardened\n" in luacell("crash", "show", late.id, *endpoint).out
        for each in ids:
            ended = luacell("crash", "replay", each, "--output", "json", *endpoint)
            assert ended.json["as_recorded"], ended
        ended = luacell("crash", "replay", late.id, "--output", "json", *endpoint)
        assert ended.json["as_recorded"]
        assert "its deadline 0.2 s" in ended.json["outcome"]["message"]
        text = luacell("crash", "export", late.id, "--pytest", *endpoint).out
        assert "TIMEOUT = 0.2\n" in text
        assert 'sandbox = "hardened"' in text


# -- exported tests ----
def run_pytest(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(file.parent), str(file)]
    return subprocess.run(command, cwd=file.parent, capture_output=True, text=True, timeout=LIMIT_S * 3, check=False)


def exported(luacell: Command, info: CrashInfo, file: Path, *words: str) -> Path:
    ended = luacell("crash", "export", info.id, "--pytest", "-o", str(file), *words)
    assert (ended.code, ended.out) == (0, f"{file}\n"), ended
    return file


def test_an_exported_test_fails_until_the_contract_is_repaired(
    luacell: Command, raw: CrashInfo, tmp_path: Path
) -> None:
    (tmp_path / "lua").mkdir()
    (tmp_path / "tests").mkdir()
    source = tmp_path / "lua" / "deadly.lua"
    source.write_text(DEADLY)
    file = exported(luacell, raw, tmp_path / "tests" / "test_deadly.py", "--source", str(source))
    assert '"../lua/deadly.lua"' in file.read_text()
    broken = run_pytest(file)
    assert broken.returncode == 1
    assert "SIGSEGV" in broken.stdout
    source.write_text(REPAIRED)
    repaired = run_pytest(file)
    assert repaired.returncode == 0, repaired.stdout
    assert "1 passed" in repaired.stdout


def test_an_exported_test_holds_its_source_itself(luacell: Command, typed: CrashInfo, tmp_path: Path) -> None:
    file = exported(luacell, typed, tmp_path / "test_kinds.py")
    broken = run_pytest(file)
    assert broken.returncode == 1
    assert "exit code 3" in broken.stdout
    file.write_text(file.read_text().replace("k == 7", "false"))
    assert run_pytest(file).returncode == 0


def test_a_contract_known_by_its_id_is_registered_by_it(
    luacell: Command, bridge: LuaHostBridge, tmp_path: Path
) -> None:
    bridge.register_host_contract(0xDEAD, LuaFunction(function("os.exit(fn_id)")))
    failure(bridge, 0xDEAD, 9, args=None)
    (info, *_) = bridge.crashes()
    assert luacell("crash", "replay", info.id, "--output", "json").json["as_recorded"]
    file = exported(luacell, info, tmp_path / "test_dead.py")
    assert "CONTRACT = 0x000000000000DEAD" in file.read_text()
    assert "exit code 9" in run_pytest(file).stdout


def test_an_exported_test_passes_a_linter(luacell: Command, raw: CrashInfo, typed: CrashInfo, tmp_path: Path) -> None:
    files = [str(exported(luacell, info, tmp_path / f"test_{info.id}.py")) for info in (raw, typed)]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--line-length", "120"]
    linted = subprocess.run(
        [*command, "--select", "E,F,W,B", *files], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert linted.returncode == 0, linted.stdout


def test_a_file_that_is_there_is_not_touched(luacell: Command, raw: CrashInfo, tmp_path: Path) -> None:
    file = exported(luacell, raw, tmp_path / "test_it.py")
    ended = luacell("crash", "export", raw.id, "--pytest", "-o", str(file))
    assert ended.code == 2
    assert "is there already" in ended.errors
    assert luacell("crash", "export", raw.id).code == 2
    assert luacell("crash", "export", raw.id, "--pytest").out == file.read_text()


# -- from records alone ----
INFO: Final = CrashInfo(
    id="0123456789ab",
    time=0.0,
    contract_id=1,
    contract=PROBE,
    version="1.0.0",
    fn_id=1,
    function="",
    code=257,
    cause="signal 11 (SIGSEGV)",
    signal=11,
    exit_code=None,
    began="yes",
    queued=None,
    ran=None,
    cpu=None,
    args_size=4,
    args_kept=4,
    out_size=0,
    source_digest="",
    host="",
    stderr="",
)


def crash(**changes: Any) -> Crash:
    made = Crash(info=INFO, args=b"1234", source=b"s", chunk_name="@s.lua", modules={}, settings=Settings())
    return replace(made, **changes)


def test_a_record_of_an_earlier_release_is_made_again_as_its_contract_says() -> None:
    made = Reproduction.of(crash(settings=Settings(sandbox="hardened")))
    assert (made.sandbox, made.timeout) == ("hardened", None)
    assert made.service_options == ["--sandbox", "hardened"]
    assert Reproduction.of(crash()).service_options == []


def test_c_modules_are_loaded_where_they_cannot_be_opened() -> None:
    modules = ("/lib/a.so", "/lib/b.so")
    assert Reproduction.of(crash(sandbox="default", c_modules=modules)).service_options == []
    made = Reproduction.of(crash(sandbox="hardened", c_modules=modules))
    assert made.service_options == ["--sandbox", "hardened", "--c-module", "/lib/a.so", "--c-module", "/lib/b.so"]
    assert b'sandbox = "hardened"' in made.files["luacell.toml"]


@pytest.mark.parametrize(("budget", "timeout"), [(0.25, 0.25), (0.001, 0.1)])
def test_a_fresh_service_has_the_time_that_it_needs(budget: float, timeout: float) -> None:
    assert Reproduction.of(crash(budget=budget)).timeout == timeout


def test_arguments_that_were_cut_are_refused() -> None:
    with pytest.raises(UsageError, match="of 10 bytes of arguments 4 are on record"):
        Reproduction.of(crash(info=replace(INFO, args_size=10)))


@pytest.mark.parametrize("name", ["..etc.passwd", "a..b", "/etc/x", "a/../b", "a\0b", "", "x" * 256])
def test_modules_that_could_leave_the_directory_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="module"):
        Reproduction.of(crash(modules={name: b""}))


def test_a_raw_function_id_is_left_as_it_is() -> None:
    made = Reproduction.of(crash(info=replace(INFO, fn_id=0x8000_0001)))
    assert (made.fn_id, made.args) == (0x8000_0001, b"1234")


@pytest.mark.parametrize("deed", [0xFFFD, 0xFFFF])
def test_deeds_that_mean_nothing_alone_are_refused(deed: int) -> None:
    with pytest.raises(UsageError, match="cannot be made again alone"):
        Reproduction.of(crash(info=replace(INFO, fn_id=0x8000_0000 | deed), modules={":api.toml": b""}))


def test_the_source_is_a_module_of_its_directory_or_has_a_file_of_its_own() -> None:
    assert Reproduction.of(crash(modules={"a.b": b"s", ":unit": b"u"})).source_file == "a/b.lua"
    assert Reproduction.of(crash(modules={"contract": b"other"})).source_file == "contract_.lua"


def test_a_manifest_says_all_that_the_settings_say(tmp_path: Path) -> None:
    settings = Settings(
        deadline_us=250_000,
        run_limit_us=1_500_001,
        memory=48 * MIB + 1,
        workers=3,
        stateless=True,
        idempotent=True,
        read="/srv/a\n/srv/b ö",
        write="/srv/c",
        network=True,
        max_queue=7,
        max_in_flight=8,
        max_output=9 * KIB,
        max_log_lines=10,
        max_calls=50,
        max_rss=100 * MIB,
    )
    same = [
        name for name, value in settings.as_fields().items() if value == getattr(Settings(), name) and name != "sandbox"
    ]
    assert same == [], "every setting is tried"
    for each in (settings, Settings(), Settings(sandbox="hardened")):
        (tmp_path / "s.lua").write_text("")
        (tmp_path / "luacell.toml").write_text(manifest_of("host.x@1.2.3", "s.lua", each, is_typed=False))
        (unit,) = Deployment.read(tmp_path).units
        assert (unit.settings, str(unit.ref.version)) == (each, "1.2.3")


@pytest.mark.parametrize("value", [b"", b'"\\', bytes(range(256)) * 3, b"a\n\nb\n" * 40, b"\\n" * 100])
def test_literals_are_what_they_stand_for(value: bytes) -> None:
    text = literal(value, 4)
    assert eval(text) == value
    assert max(map(len, text.splitlines())) <= 112


def test_a_dump_is_bounded() -> None:
    assert [*dumped(bytes(40), 20)] == [
        f"00000000  {'00 ' * 16} {'.' * 16}",
        f"00000010  {'00 ' * 4}{' ' * 36} ....",
        "… 20 bytes more; --output json has all",
    ]
