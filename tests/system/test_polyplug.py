"""A real polyplug runtime, whose plugins call isolated Lua without knowing it."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import polyplug
import pytest
from polyplug_loaders_native import register_native_loader

from luacell.client import (
    DuplicateContract,
    HostContractNotFound,
    HostContractVersionMismatch,
    LuaFunction,
    LuaHostBridge,
    TypeMismatch,
)
from luacell.client.polyplug import SWEEP_MIN, Provided, provide
from luacell.protocol.api import Api, parse
from luacell.protocol.identity import fnv1a64
from luacell.protocol.limits import MIB
from tests.support.contracts import DOUBLE, PROBE, Stopwatch
from tests.support.guest import THREADS_C, Answer, Guest
from tests.support.processes import worker_of
from tests.support.typed_contracts import raw_echoes, write_typed

LIBRARY: Final = Path(polyplug.__file__).parent / "_native" / "linux-x64" / "libpolyplug.so"
U64_MAX: Final = (1 << 64) - 1
DEADLINE_S: Final = 1.0

TYPES: Final = """
[[enum]]
name = "Tiny"
repr = "u8"
variants = [{ name = "Off", value = "0" }, { name = "On", value = "255" }]
[[enum]]
name = "Short"
repr = "u16"
variants = [{ name = "Top", value = "0xFFFF" }]
[[enum]]
name = "Access"
repr = "u32"
bitflag = true
variants = [{ name = "Read", value = "1" }, { name = "Write", value = "Read << 31" }]
[[enum]]
name = "Wide"
repr = "u64"
bitflag = true
variants = [{ name = "Low", value = "1" }, { name = "Top", value = "1 << 63" }]
[[types]]
name = "Point"
fields = [{ name = "x", type = "f32" }, { name = "y", type = "f32" }]
[[types]]
name = "Record"
fields = [{ name = "flag", type = "bool" }, { name = "id", type = "u64" }, { name = "label", type = "StringView" },
          { name = "at", type = "Point" }, { name = "mode", type = "Tiny" }, { name = "blob", type = "Buffer" }]
[[types]]
name = "Shelf"
fields = [{ name = "n", type = "u8" }, { name = "records", type = "Array<Record>" },
          { name = "ids", type = "Array<u16>" }]
"""


def record(label: str, blob: bytes) -> dict[str, Any]:
    return {"flag": True, "id": U64_MAX, "label": label, "at": {"x": 1.5, "y": -2.0}, "mode": 255, "blob": blob}


VALUES: Final[dict[str, list[Any]]] = {
    **{f"u{bits}": [0, 7, (1 << bits) - 1] for bits in (8, 16, 32, 64)},
    **{f"i{bits}": [0, -(1 << (bits - 1)), (1 << (bits - 1)) - 1] for bits in (8, 16, 32, 64)},
    "f32": [0.5, -math.inf],
    "f64": [0.1, math.inf],
    "bool": [True, False],
    "Ptr": [0, U64_MAX],
    "StringView": ["", "naïve \0 text", "x" * (3 * MIB)],
    "Buffer": [b"", bytes(range(256))],
    "Tiny": [0, 255],
    "Short": [0xFFFF],
    "Access": [0, 1, 0x8000_0001],
    "Wide": [1 << 63, (1 << 63) + 1],
    "Point": [{"x": 0.25, "y": -1.0}],
    "Record": [record("a label", b"a blob"), record("", b"")],
    "Array<u8>": [[], [1, 2, 255]],
    "Array<f64>": [[0.5, -0.25, 1e300]],
    "Array<bool>": [[True, False, True]],
    "Array<StringView>": [["one", "", "three"]],
    "Array<Point>": [[{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 4.0}]],
    "Array<Record>": [[record("first", b"1"), record("second", b"")]],
    "Shelf": [{"n": 3, "records": [record("on it", b"\0")], "ids": [1, 65535]}, {"n": 0, "records": [], "ids": []}],
}
OTHERS: Final = {
    "nothing": ([], "Void"),
    "mix": ([("mode", "Tiny"), ("p", "Point"), ("data", "Buffer"), ("tag", "u16")], "Record"),
    "count": ([], "u64"),
    "crash": ([], "Void"),
    "hang": ([], "u64"),
    "fail": ([("code", "u32"), ("text", "StringView")], "StringView"),
    "complain": ([("text", "StringView")], "StringView"),
    "lie": ([], "Record"),
}
LUA: Final = """
local Every = {}; Every.__index = Every
function Every.new() return setmetatable({ n = 0 }, Every) end
function Every:nothing() end
function Every:mix(mode, p, data, tag)
  return { flag = true, id = 18446744073709551615ULL, label = "tag " .. tag, at = { x = p.y, y = p.x }, mode = mode,
    blob = data .. data }
end
function Every:count() self.n = self.n + 1; return self.n end
function Every:crash() require("ffi").cast("int *", 0)[0] = 1 end
function Every:hang() while true do end end
function Every:fail(code, text) luacell.fail(code, text) end
function Every:complain(text) error(text, 0) end
function Every:lie() return { flag = 7 } end
"""


def echo_name(type_name: str) -> str:
    return "echo_" + type_name.replace("<", "_").rstrip(">")


def describe(*, is_singleton: bool) -> str:
    functions = [(echo_name(name), [("value", name)], name) for name in VALUES]
    functions += [(name, params, result) for name, (params, result) in OTHERS.items()]
    lines = [TYPES, "[[host_contract]]", 'name = "host.every"', 'version = "1.3.0"']
    lines.append(f"singleton = {str(is_singleton).lower()}")
    for name, params, result in functions:
        fields = ", ".join(f'{{ name = "{param}", type = "{type_name}" }}' for param, type_name in params)
        lines += ["[[host_contract.functions]]", f'name = "{name}"', f"params = [{fields}]", f'return = "{result}"']
    return "\n".join(lines)


EVERY: Final = "host.every@1"
API: Final[Api] = parse(describe(is_singleton=False), "api.toml")


def deploy_every(bridge: LuaHostBridge, directory: Path, *, is_singleton: bool = False) -> None:
    echoes = "".join(f"function Every:{echo_name(name)}(value) return value end\n" for name in VALUES)
    (directory / "api.toml").write_text(describe(is_singleton=is_singleton))
    (directory / "every.lua").write_text(f"{LUA}{echoes}return Every\n")
    (directory / "luacell.toml").write_text(
        f'api = "api.toml"\n[contract."host.every"]\nsource = "every.lua"\ndeadline = "{DEADLINE_S:g}s"\n'
    )
    assert bridge.deploy(directory) == [EVERY]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("POLYPLUG_LIB", str(LIBRARY))
    runtime = polyplug.Runtime()
    yield runtime
    runtime.__del__()  # polyplug's only way to end one; it is harmless when it comes again


@pytest.fixture(params=["native", "vm"])
def every(request: pytest.FixtureRequest, runtime: Any, bridge: LuaHostBridge, tmp_path: Path) -> Iterator[Any]:
    """A runtime with the contract that has every type, by either dispatch."""
    deploy_every(bridge, tmp_path)
    with provide(runtime, bridge, EVERY, dispatch=request.param):
        yield runtime


@pytest.fixture
def probe(runtime: Any, bridge: LuaHostBridge) -> Callable[..., Provided]:
    """Register and provide a raw contract."""

    def make(source: str, **options: Any) -> Provided:
        bridge.register_host_contract(PROBE, LuaFunction(source))
        return provide(runtime, bridge, PROBE, **options)

    return make


# -- values ----
def test_every_type_goes_in_and_comes_out(every: Any) -> None:
    guest = Guest(every, EVERY, API)
    for name, values in VALUES.items():
        for value in values:
            assert guest.call(echo_name(name), value) == value, name
    assert math.isnan(guest.call("echo_f64", math.nan))
    assert guest.call("nothing") is None
    mixed = guest.call("mix", 255, {"x": -2.0, "y": 1.5}, b"ab", 65535)
    assert mixed == record("tag 65535", b"abab")


def test_a_function_written_for_the_bridge_in_the_process_serves_plugins_as_it_is(
    runtime: Any, bridge: LuaHostBridge, tmp_path: Path
) -> None:
    text = describe(is_singleton=False)
    bridge.deploy(write_typed(tmp_path / "raw", text, raw_echoes(text)))
    provide(runtime, bridge, EVERY)
    guest = Guest(runtime, EVERY, API)
    for name, values in VALUES.items():
        assert [guest.call(echo_name(name), value) for value in values] == values, name


def test_plugin_finds_the_contract_by_version(every: Any) -> None:
    interface = Guest(every, EVERY, min_version=1 << 16 | 3).interface
    version = interface.contract_version
    assert (version.major, version.minor, version.patch) == (1, 3, 0)
    assert not interface.singleton
    with pytest.raises(AssertionError, match="the runtime has no"):
        Guest(every, EVERY, min_version=1 << 16 | 4)


def test_lent_buffer_has_no_capacity_that_could_be_freed(every: Any) -> None:
    from tests.support.guest import c_type, to_c

    guest, keep = Guest(every, EVERY, API), list[Any]()
    function = next(each for each in API.host_contracts[0].functions if each.name == "echo_Buffer")
    out = c_type(function.result)()
    assert guest.call_raw(function.id, to_c(function.result, b"bytes", keep), out).code == 0
    assert (ctypes.string_at(out.ptr, out.len), out.cap) == (b"bytes", 0)


def test_result_of_a_call_may_be_the_argument_of_the_next(every: Any) -> None:
    from tests.support.guest import c_type, to_c

    guest, keep = Guest(every, EVERY, API), list[Any]()
    function = next(each for each in API.host_contracts[0].functions if each.name == "echo_StringView")
    view = to_c(function.result, "again and again", keep)
    for _ in range(100):
        out = c_type(function.result)()
        assert guest.call_raw(function.id, view, out).code == 0
        view = out
    assert ctypes.string_at(view.ptr, view.len) == b"again and again"


# -- what goes wrong ----
def test_crash_is_102_and_the_next_call_works(every: Any, bridge: LuaHostBridge) -> None:
    guest, other = Guest(every, EVERY, API), Guest(every, EVERY, API)
    assert [guest.call("count"), guest.call("count"), other.call("count")] == [1, 2, 1]
    answer = guest.call("crash")
    assert answer.code == 102 and answer.text.startswith("WORKER_CRASHED (257): ") and "SIGSEGV" in answer.text
    assert guest.call("count") == 1
    assert other.call("count").code == 5, "the loss of its instance is told"
    assert other.call("count") == 1


def test_hang_is_102_in_time_and_the_next_call_works(every: Any) -> None:
    guest = Guest(every, EVERY, API)
    with Stopwatch() as watch:
        answer = guest.call("hang")
    assert answer.code == 102 and answer.text.startswith("DEADLINE_EXCEEDED (256): ")
    assert watch.seconds < DEADLINE_S + 1
    assert guest.call("echo_StringView", "alive") == "alive"


def test_death_of_a_worker_is_survived(every: Any, bridge: LuaHostBridge) -> None:
    guest = Guest(every, EVERY, API)
    assert guest.call("count") == 1
    worker = worker_of(bridge, EVERY)
    worker.kill()
    assert worker.ends_within()
    worker.close()
    answers = [guest.call("count") for _ in range(2)]
    assert answers[-1] in (1, 2) and answers.count(1) == 1


def test_codes_and_texts_of_a_contract_survive(every: Any) -> None:
    guest = Guest(every, EVERY, API)
    assert guest.call("fail", 1500, "naïve reason") == Answer(1500, "naïve reason")
    assert guest.call("fail", 4, "no such key") == Answer(4, "no such key")
    answer = guest.call("complain", "bad input")
    assert answer.code == 102 and answer.text.startswith("Lua exception: bad input")


def test_result_that_is_not_of_its_type_is_102_and_names_the_field(every: Any) -> None:
    answer = Guest(every, EVERY, API).call("lie")
    assert answer.code == 102 and "lie" in answer.text and "flag" in answer.text


def test_null_where_a_value_must_be_is_refused(every: Any) -> None:
    guest = Guest(every, EVERY, API)
    out = ctypes.c_uint8(77)
    assert guest.call_raw(0, None, out) == Answer(8, f"{EVERY}.echo_u8: args of 1 bytes is NULL")
    assert guest.call_raw(0, out, None) == Answer(8, f"{EVERY}.echo_u8: out of 1 bytes is NULL")
    assert out.value == 77


def test_null_string_with_a_length_is_refused(every: Any) -> None:
    guest = Guest(every, EVERY, API)
    function = next(each for each in API.host_contracts[0].functions if each.name == "echo_StringView")
    args, out = (ctypes.c_uint64 * 2)(0, 5), (ctypes.c_uint64 * 2)()
    assert guest.call_raw(function.id, args, out) == Answer(
        8, f"{EVERY}.echo_StringView: value is NULL with a length of 5"
    )
    args[1] = 1 << 63
    answer = guest.call_raw(function.id, args, out)
    assert answer.code == 102 and answer.text.startswith("TOO_LARGE (264): ")


def test_function_that_does_not_exist_is_6(runtime: Any, bridge: LuaHostBridge, tmp_path: Path) -> None:
    deploy_every(bridge, tmp_path)
    provide(runtime, bridge, EVERY, dispatch="vm")
    total = len(API.host_contracts[0].functions)
    assert Guest(runtime, EVERY).call_raw(total, None, None).code == 6
    assert Guest(runtime, EVERY).call_raw((1 << 32) - 1, None, None).code == 6


def test_contract_that_was_unregistered_is_100(every: Any, bridge: LuaHostBridge) -> None:
    guest = Guest(every, EVERY, API)
    assert guest.call("count") == 1
    bridge.unregister_host_contract(EVERY)
    assert guest.call("count").code == 100


def test_closed_bridge_is_102(runtime: Any, tmp_path: Path) -> None:
    with LuaHostBridge() as bridge:
        deploy_every(bridge, tmp_path)
        provide(runtime, bridge, EVERY)
    answer = Guest(runtime, EVERY, API).call("count")
    assert answer.code == 102 and answer.text.startswith("BridgeClosed")


# -- instances ----
def test_instances_count_apart_until_they_are_destroyed(every: Any) -> None:
    first, second = Guest(every, EVERY, API), Guest(every, EVERY, API)
    assert first.instance.data and second.instance.data and first.instance.data != second.instance.data
    assert [first.call("count"), first.call("count"), second.call("count")] == [1, 2, 1]
    first.leave()
    assert first.call("count").code == 5
    assert second.call("count") == 2
    first.instance.data = None
    assert [first.call("count"), first.call("count")] == [1, 2], "NULL is an instance that all share"


def test_singleton_is_one_for_all(runtime: Any, bridge: LuaHostBridge, tmp_path: Path) -> None:
    deploy_every(bridge, tmp_path, is_singleton=True)
    provide(runtime, bridge, EVERY)
    first, second = Guest(runtime, EVERY, API), Guest(runtime, EVERY, API)
    assert first.interface.singleton and first.instance.data == second.instance.data
    first.leave()
    assert [first.call("count"), second.call("count")] == [1, 2]
    assert first.call("crash").code == 102
    assert second.call("count") == 1


# -- threads ----
def test_threads_of_a_host_share_an_instance(every: Any) -> None:
    guest, answers = Guest(every, EVERY, API), list[Any]()

    def call() -> None:
        for number in range(25):
            text = f"{threading.get_ident()} {number}"
            answers.append((guest.call("count"), guest.call("echo_StringView", text) == text))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [(number, True) for number in range(1, 201)]


BUNDLE: Final = "n2.plugin"
UPPER: Final = """[[host_contract]]
name = "host.upper"
version = "1"
[[host_contract.functions]]
name = "upper"
params = [{ name = "text", type = "StringView" }]
return = "StringView"
"""


def load_plugin(runtime: Any, source: str, bundle: Path) -> ctypes.CDLL:
    """Compile a plugin, have polyplug load it, and return its library, as it was loaded."""
    bundle.mkdir()
    (bundle / "plugin.c").write_text(source)
    library = bundle / "plugin.so"
    command = ["gcc", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-o", str(library), str(bundle / "plugin.c")]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert compiled.returncode == 0, compiled.stderr
    bundle_id = fnv1a64(BUNDLE)
    assert bundle_id < 1 << 63, "TOML has no larger integers"
    manifest = f'loader = "native"\nid = {bundle_id}\nname = "{BUNDLE}"\nversion = "1.0.0"\nfile = "plugin.so"\n'
    (bundle / "manifest.toml").write_text(f"{manifest}provides = []\n")
    register_native_loader(runtime)
    runtime.load_bundle(bundle)
    return ctypes.CDLL(str(library))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
@pytest.mark.parametrize("dispatch", ["native", "vm"])
def test_threads_of_a_plugin_in_c_keep_what_they_were_lent(
    runtime: Any, bridge: LuaHostBridge, tmp_path: Path, dispatch: Any
) -> None:
    (tmp_path / "api.toml").write_text(UPPER)
    (tmp_path / "upper.lua").write_text("return { upper = function(self, text) return text:upper() end }")
    (tmp_path / "luacell.toml").write_text('api = "api.toml"\n[contract."host.upper"]\nsource = "upper.lua"\n')
    bridge.deploy(tmp_path)
    provided = provide(runtime, bridge, "host.upper@1", dispatch=dispatch)
    plugin = load_plugin(runtime, THREADS_C, tmp_path / "plugin")
    plugin.run_threads.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    for _ in range(10):  # 160 threads in all, most of which have ended
        assert plugin.run_threads(provided.contract.id, 16, 10) == 0
    assert len(provided._kept._by_thread) <= SWEEP_MIN + 16, "what ended threads were lent goes"
    assert set(provided._target._instances) == {0}, "all instances were destroyed"  # type: ignore[attr-defined]


# -- raw contracts ----
@pytest.mark.parametrize("dispatch", ["native", "vm"])
def test_raw_contract_takes_the_sizes_that_are_given(
    probe: Callable[..., Provided], runtime: Any, dispatch: str
) -> None:
    probe(DOUBLE, sizes={1: (4, 4)}, dispatch=dispatch)
    guest, out = Guest(runtime, PROBE), ctypes.c_int32()
    assert guest.call_raw(1, ctypes.c_int32(-21), out) == Answer(0, "")
    assert out.value == -42
    assert guest.call_raw(0, ctypes.c_int32(1), out).code == 6
    assert guest.call_raw(1, None, out).code == 8


def test_raw_contract_without_sizes_is_refused(probe: Callable[..., Provided]) -> None:
    with pytest.raises(TypeMismatch, match="or sizes of args and out by function id, got a raw one without sizes"):
        probe(DOUBLE)


@pytest.mark.parametrize("sizes", [{-1: (0, 0)}, {1024: (0, 0)}, {0: (-1, 0)}, {0: (0, 64 * MIB + 1)}, {0: (1, 2, 3)}])
def test_sizes_out_of_range_are_refused(probe: Callable[..., Provided], sizes: Any) -> None:
    with pytest.raises(ValueError, match="sizes: "):
        probe(DOUBLE, sizes=sizes)


# -- providing ----
def test_contract_is_provided_once_and_the_first_one_stays(runtime: Any, bridge: LuaHostBridge, tmp_path: Path) -> None:
    deploy_every(bridge, tmp_path)
    provide(runtime, bridge, EVERY)
    with pytest.raises(DuplicateContract):
        provide(runtime, bridge, EVERY)
    assert Guest(runtime, EVERY, API).call("count") == 1


def test_what_is_not_registered_is_not_provided(runtime: Any, bridge: LuaHostBridge, tmp_path: Path) -> None:
    for contract in (EVERY, 1234):
        with pytest.raises(HostContractNotFound):
            provide(runtime, bridge, contract)
    deploy_every(bridge, tmp_path)
    with pytest.raises(HostContractVersionMismatch, match=r"1\.4\.0 is required, 1\.3\.0 is registered"):
        provide(runtime, bridge, "host.every@1.4")
    with pytest.raises(ValueError, match="typed contract, whose sizes are known"):
        provide(runtime, bridge, EVERY, sizes={0: (1, 1)})
    with pytest.raises(ValueError, match="neither 'native' nor 'vm'"):
        provide(runtime, bridge, EVERY, dispatch="remote")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a LuaHostBridge is needed"):
        provide(runtime, object(), EVERY)  # type: ignore[arg-type]


def test_contract_known_by_its_id_alone_has_no_version(runtime: Any, bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(1234, LuaFunction(DOUBLE))
    with pytest.raises(ValueError, match="polyplug needs a version"):
        provide(runtime, bridge, 1234, sizes={0: (4, 4)})


def test_closed_contract_answers_102(runtime: Any, bridge: LuaHostBridge, tmp_path: Path) -> None:
    deploy_every(bridge, tmp_path)
    provided = provide(runtime, bridge, EVERY)
    guest = Guest(runtime, EVERY, API)
    assert guest.call("count") == 1
    provided.close()
    provided.close()
    assert repr(provided) == f"<Provided {EVERY}, closed>"
    assert guest.call("count") == Answer(102, f"BridgeClosed: {EVERY} is no longer provided")


def test_interrupt_in_a_call_is_102(
    runtime: Any, bridge: LuaHostBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy_every(bridge, tmp_path)
    provide(runtime, bridge, EVERY)
    guest = Guest(runtime, EVERY, API)

    def interrupted(*_: object, **__: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(bridge._link.calls, "call", interrupted)
        assert guest.call("count") == Answer(102, "KeyboardInterrupt: ")
    assert guest.call("count") == 1


def test_missing_polyplug_is_named(runtime: Any, bridge: LuaHostBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "polyplug_abi", None)
    with pytest.raises(ImportError, match=r"pip install 'luacell\[polyplug\]'"):
        provide(runtime, bridge, EVERY)
