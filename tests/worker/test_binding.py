"""Bindings in a VM of this process, on real memory: values both ways, refusals, instances, results that wait."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest

from luacell.protocol.api import parse
from luacell.protocol.errors import AbiErrorCode, BadResult
from luacell.protocol.messages import SEAT_SHIFT
from luacell.worker.binding import binding_source, caller_source
from tests.support.apis import SVC
from tests.support.in_process import ARENA, CREATE, DESTROY, FETCH, IN_INSTANCE, Failed, InProcess, head
from tests.support.typed_contracts import COUNTER_LUA, SVC_LUA, counter_api, echoes

U64_MAX, I64_MIN = (1 << 64) - 1, -(1 << 63)
DECLARED = """
[[types]]
name = "Point"
fields = [{ name = "x", type = "f32" }, { name = "y", type = "f32" }]
[[types]]
name = "Line"
fields = [{ name = "start", type = "Point" }, { name = "label", type = "StringView" },
          { name = "stop", type = "Point" }]
[[types]]
name = "Path"
fields = [{ name = "lines", type = "Array<Line>" }, { name = "closed", type = "bool" }]
"""
ENUMS = "".join(
    f'[[enum]]\nname = "E{width}"\nrepr = "u{width}"\nvariants = [{{ name = "Low", value = "1" }}, '
    f'{{ name = "High", value = "{(1 << width) - 1:#x}" }}]\n'
    for width in (8, 16, 32, 64)
)


def one(returns: str, *params: str, declared: str = DECLARED + ENUMS) -> str:
    """Describe a contract with one function."""
    listed = ", ".join(f'{{ name = "p{index}", type = "{type_}" }}' for index, type_ in enumerate(params))
    return (
        f'{declared}\n[[host_contract]]\nname = "host.one"\nversion = "1"\n[[host_contract.functions]]\n'
        f'name = "run"\nparams = [{listed}]\nreturn = "{returns}"\n'
    )


def echo(type_: str) -> InProcess:
    text = one(type_, type_)
    return InProcess(text, echoes(text), room=8192)


def returning(type_: str, expression: str) -> InProcess:
    made = InProcess(one(type_), f"local One = {{}}\nfunction One:run() return {expression} end\nreturn One")
    assert made.problem == "", made.reason
    return made


# -- values ----
@pytest.fixture(scope="module")
def svc() -> InProcess:
    made = InProcess(SVC, SVC_LUA)
    assert (made.problem, made.reason) == ("", "")
    return made


def test_known_layouts_reach_the_implementation_and_come_back(svc: InProcess) -> None:
    assert svc.raw(0, struct.pack("<B7xd?7x", 3, 2.5, True), 8) == struct.pack("<d", 7.5)
    assert svc.raw(1, struct.pack("<QQ", 16, 2) + b"ab", 32) == struct.pack("<QQ", 16, 2) + b"AB" + bytes(6)
    args = struct.pack("<B3xffxxxxQQQH6x", 1, 1.0, 2.0, 48, 2, 2, 7) + b"xy"
    out = svc.raw(2, args, 128)
    assert struct.unpack_from("<?7xQQQffB7xQQQ", out) == (True, U64_MAX, 72, 5, 2.0, 1.0, 1, 80, 4, 4)
    assert out[72:] == b"tag 7" + bytes(3) + b"xyxy" + bytes(4)
    assert svc.raw(3, struct.pack("<Ibxxxq", 1, -128, I64_MIN), 4) == struct.pack("<I", 2)


def test_result_does_not_show_what_the_slot_held() -> None:
    results = {
        fill: InProcess(SVC, SVC_LUA, fill=fill).bytes_of("mix", 1, {"x": 1.0, "y": 2.0}, b"xyz", 7)
        for fill in (0x00, 0x55, 0xFF)
    }
    assert len(set(results.values())) == 1


WIDTHS = [(f"{sign}{bits}", bits, sign == "i") for sign in "ui" for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize(("type_", "bits", "signed"), WIDTHS)
def test_integers_of_all_widths_are_exact(type_: str, bits: int, signed: bool) -> None:
    made = echo(type_)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    near = [value for value in (2**53 - 1, 2**53, 2**53 + 1, -(2**53) - 1, -1, 1) if low <= value <= high]
    for value in (low, high, 0, *near):
        assert made.call("run", value) == value


@pytest.mark.parametrize("type_", ["f32", "f64"])
def test_floats_keep_their_bits(type_: str) -> None:
    made = echo(type_)
    for value in (0.5, -0.0, math.inf, -math.inf):
        assert math.copysign(1, made.call("run", value)) == math.copysign(1, value)
        assert made.call("run", value) == value
    assert math.isnan(made.call("run", math.nan))


def test_greatest_floats_of_32_bits_and_infinities_are_floats() -> None:
    for expression, value in (
        ("2 ^ 128 - 2 ^ 104", 2.0**128 - 2.0**104),
        ("-(2 ^ 128 - 2 ^ 103 - 2 ^ 80)", -(2.0**128) + 2.0**104),
        ("math.huge", math.inf),
        ("-math.huge", -math.inf),
    ):
        assert returning("f32", expression).call("run") == value


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_enums_of_all_widths(width: int) -> None:
    made = echo(f"E{width}")
    for member in made.types.enums[f"E{width}"]:
        assert made.call("run", member) is member


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        ("bool", True),
        ("bool", False),
        ("Ptr", U64_MAX),
        ("StringView", ""),
        ("StringView", "grüße\0"),
        ("Buffer", b""),
        ("Buffer", bytes(range(256))),
        *[(f"Array<{name}>", [0, 1, 127]) for name in ("u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64", "Ptr")],
        ("Array<u64>", [U64_MAX, 0]),
        ("Array<i64>", [I64_MIN, 0]),
        ("Array<f32>", [0.5, -1.5]),
        ("Array<f64>", [math.inf, 1e300]),
        ("Array<bool>", [True, False, True]),
        ("Array<StringView>", ["", "a", "bcd" * 9]),
        ("Array<Buffer>", [b"", b"\xff\0"]),
        ("Array<u8>", []),
    ],
)
def test_values_of_every_kind_come_back(type_: str, value: Any) -> None:
    assert echo(type_).call("run", value) == value


def test_nested_structs_and_arrays_come_back() -> None:
    made = echo("Path")
    point, line, path = (made.types.structs[name] for name in ("Point", "Line", "Path"))
    value = path([line(point(1.0, 2.0), "a", point(3.0, 4.0)), line(point(5.0, 6.0), "", point(7.0, 8.0))], True)
    assert made.call("run", value) == value
    assert echo("Array<Line>").functions["run"].out_varies


def test_more_fields_than_a_lua_function_has_locals() -> None:
    fields = ", ".join(f'{{ name = "f{index}", type = "u16" }}' for index in range(256))
    declared = f'[[types]]\nname = "Wide"\nfields = [{fields}]\n'
    text = one("Wide", *["Wide"] * 4, "Array<Wide>", declared=declared)
    made = InProcess(text, echoes(text), room=65536)
    assert (made.problem, made.reason) == ("", "")
    wide = made.types.structs["Wide"](*range(256))
    assert made.call("run", wide, wide, wide, wide, [wide, wide]) == wide


def test_implementation_finds_enums_by_name_and_names_by_value() -> None:
    made = returning("StringView", "luacell.enums.E8[255] .. luacell.enums.E8.Low .. tostring(luacell.enums.E64.High)")
    assert made.call("run") == "High118446744073709551615ULL"


# -- bad results ----
@pytest.mark.parametrize(
    ("type_", "expression", "text"),
    [
        ("u8", "256", "result: expected u8, got number 256"),
        ("u8", "-1", "result: expected u8, got number -1"),
        ("u8", "1.5", "result: expected u8, got number 1.5"),
        ("u8", "0/0", "result: expected u8, got number"),
        ("u8", "'7'", 'result: expected u8, got string "7"'),
        ("u8", "nil", "result: expected u8, got nil"),
        ("u8", "{}", "result: expected u8, got a table"),
        ("u8", "256LL", "result: expected u8, got cdata 256LL"),
        ("u8", "256ULL", "result: expected u8, got cdata 256ULL"),
        ("i8", "-129LL", "result: expected i8, got cdata -129LL"),
        ("u8", "require('ffi').new('int[1]')", "result: expected u8, got a cdata"),
        ("f32", "1e300", "result: expected f32, got number 1.0000000000000001e+300"),
        ("f32", "-(2 ^ 128 - 2 ^ 103)", "result: expected f32, got number -3.4028235677973366e+38"),
        ("u64", "-1", "result: expected u64, got number -1"),
        ("u64", "-1LL", "result: expected u64, got cdata -1LL"),
        ("u64", "2^64", "result: expected u64, got number 1.8446744073709552e+19"),
        ("u64", "1/0", "result: expected u64, got number inf"),
        ("u64", "false", "result: expected u64, got boolean false"),
        ("i64", "9223372036854775808ULL", "result: expected i64, got cdata 9223372036854775808ULL"),
        ("i64", "2^63", "result: expected i64, got number"),
        ("f64", "'x'", 'result: expected f64, got string "x"'),
        ("f32", "nil", "result: expected f32, got nil"),
        ("bool", "1", "result: expected bool, got number 1"),
        ("bool", "nil", "result: expected bool, got nil"),
        ("StringView", "1", "result: expected StringView, got number 1"),
        ("Buffer", "nil", "result: expected Buffer, got nil"),
        ("Buffer", "{}", "result: expected Buffer, got a table"),
        ("Ptr", "'x'", 'result: expected Ptr, got string "x"'),
        ("E8", "256", "result: expected E8, got number 256"),
        ("E64", "-1", "result: expected E64, got number -1"),
        ("Point", "3", "result: expected Point, got number 3"),
        ("Point", "{ x = 1 }", "result.y: expected f32, got nil"),
        ("Point", f"{{ x = 1, y = '{'long' * 20}' }}", "result.y: expected f32, got string of 80 bytes"),
        ("Array<u8>", "'abc'", 'result: expected Array<u8>, got string "abc"'),
        ("Array<u8>", "{ 1, 2, 999 }", "result[]: expected u8, got number 999"),
        ("Path", "{ closed = true, lines = { { label = 'x' } } }", "result.lines[].start: expected Point, got nil"),
    ],
)
def test_bad_result_names_contract_function_and_field(type_: str, expression: str, text: str) -> None:
    made = returning(type_, expression)
    with pytest.raises(Failed) as raised:
        made.call("run")
    assert raised.value.code is AbiErrorCode.HOST_CONTRACT_CALL_FAILED
    assert f"host.one@1 run: {text}" in str(raised.value)


def test_exact_integers_are_taken_in_either_form() -> None:
    for expression in ("255", "255LL", "255ULL"):
        assert returning("u8", expression).call("run") == 255
        assert returning("u64", expression).call("run") == 255
        assert returning("i64", expression).call("run") == 255
        assert returning("f64", expression).call("run") == 255.0


def test_array_beyond_the_limit_is_refused() -> None:
    made = returning("Array<u8>", "(function() local t = {} for i = 1, 1048577 do t[i] = 1 end return t end)()")
    with pytest.raises(Failed, match="1048577 items; the limit of Array<u8> is 1048576"):
        made.call("run")


def test_text_that_is_no_utf8_is_a_bad_result() -> None:
    with pytest.raises(BadResult, match=r"host\.one@1\.run.*UTF-8"):
        returning("StringView", "'\\255'").call("run")


# -- bad arguments ----
@pytest.mark.parametrize(
    "args",
    [
        struct.pack("<QQ", 17, 1),
        struct.pack("<QQ", 0, 17),
        struct.pack("<QQ", U64_MAX, 1),
        struct.pack("<QQ", 1, U64_MAX),
        struct.pack("<QQ", U64_MAX, U64_MAX),
        struct.pack("<QQ", 8, U64_MAX - 7),
        struct.pack("<QQ", 1 << 63, 1 << 63),
    ],
)
@pytest.mark.parametrize("type_", ["StringView", "Array<u64>", "Array<Line>"])
def test_ranges_outside_the_arguments_are_refused(type_: str, args: bytes) -> None:
    made = echo(type_)
    with pytest.raises(Failed, match=r"host\.one@1 run: p0: .* lie outside the 16 bytes of arguments") as raised:
        made.raw(0, args, 64)
    assert raised.value.code is AbiErrorCode.HOST_CONTRACT_CALL_FAILED


def test_too_few_bytes_of_arguments_are_refused(svc: InProcess) -> None:
    for args in (b"", bytes(23)):
        with pytest.raises(Failed, match=f"host.svc@1 scale: {len(args)} bytes of arguments, not 24"):
            svc.raw(0, args, 8)


def test_items_beyond_the_limit_are_refused() -> None:
    text = one("Void", "Array<u8>")
    made = InProcess(text, echoes(text), room=(1 << 20) + 64)
    with pytest.raises(Failed, match="1048577 items; the limit is 1048576"):
        made.raw(0, struct.pack("<QQ", 16, (1 << 20) + 1) + bytes((1 << 20) + 1), 0)


@pytest.mark.parametrize("fn_id", [4, 255, 0x7FFF_FFFF])
def test_function_out_of_range_is_not_available(svc: InProcess, fn_id: int) -> None:
    for number, args in ((fn_id, bytes(24)), (fn_id | IN_INSTANCE | 5 << SEAT_SHIFT, head(0))):
        if number > IN_INSTANCE + 0x3F_FFFF:
            continue
        with pytest.raises(Failed, match=f"host.svc@1 has 4 functions; there is no function {fn_id}$") as raised:
            svc.raw(number, args, 8)
        assert raised.value.code is AbiErrorCode.FUNCTION_NOT_AVAILABLE


def test_instance_needs_its_number(svc: InProcess) -> None:
    for fn_id in (IN_INSTANCE, CREATE):
        with pytest.raises(Failed, match="the number of an instance is missing"):
            svc.raw(fn_id, bytes(8), 8)
    with pytest.raises(Failed, match="8 bytes"):
        svc.raw(FETCH, bytes(4), 8)


# -- results that do not fit ----
def kept(made: InProcess, arena: int = ARENA) -> tuple[int, int]:
    """Make a call whose result does not fit; return its size and token."""
    with pytest.raises(Failed) as raised:
        made.raw(0, made.functions["run"].pack(("x" * 100,)), 16, arena)
    assert raised.value.code is AbiErrorCode.BUFFER_TOO_SMALL
    words = str(raised.value).split()
    return int(words[2]), int(words[-1])


def test_large_result_is_kept_and_fetched_once() -> None:
    made = echo("StringView")
    size, token = kept(made)
    with pytest.raises(Failed) as raised:
        made.raw(FETCH, struct.pack("<Q", token), 16)
    assert raised.value.code is AbiErrorCode.BUFFER_TOO_SMALL
    assert made.functions["run"].unpack(made.raw(FETCH, struct.pack("<Q", token), size)) == "x" * 100
    with pytest.raises(Failed) as raised:
        made.raw(FETCH, struct.pack("<Q", token), size)
    assert raised.value.code is AbiErrorCode.STALE_HANDLE


def fetched(made: InProcess, size: int, token: int, arena: int = ARENA) -> bool:
    try:
        return len(made.raw(FETCH, struct.pack("<Q", token), size, arena)) == size
    except Failed as error:
        assert error.code is AbiErrorCode.STALE_HANDLE
        assert "no longer kept" in str(error)
        return False


def test_kept_results_are_bounded_and_belong_to_their_host() -> None:
    made = echo("StringView")
    made.map(ARENA + 1)
    size, first = kept(made)
    assert not fetched(made, size, first, ARENA + 1)
    others = [kept(made, ARENA + 1)[1] for _ in range(1025)]
    assert [fetched(made, size, token, ARENA + 1) for token in others[:2]] == [False, True]
    assert fetched(made, size, first), "a host that leaves its results alone takes none of another's"
    made.vm.remove_pair(ARENA + 1, 0)
    made.vm.forget(ARENA + 1)
    made.map(ARENA + 1)
    assert not fetched(made, size, others[-1], ARENA + 1)
    assert made.call("run", "fits") == "fits"


def test_kept_results_have_half_of_the_contracts_memory() -> None:
    grow = "local T = {}\nfunction T:run(n) return ('x'):rep(n) end\nreturn T"
    made = InProcess(one("StringView", "u32"), grow, room=256 * 1024)
    made.map(ARENA + 1)
    made.vm._typed.limit_memory(512 * 1024)

    def keep(size: int, arena: int = ARENA) -> int:
        with pytest.raises(Failed, match=f"result of {size + 16} bytes is kept as") as raised:
            made.raw(0, struct.pack("<I", size), 16, arena)
        return int(str(raised.value).split()[-1])

    foreign, *mine = keep(100_000, ARENA + 1), keep(100_000), keep(100_000)
    assert [fetched(made, 100_016, token) for token in mine] == [False, True], "its own oldest goes first"
    assert fetched(made, 100_016, foreign, ARENA + 1)
    foreign, alone = keep(200_000, ARENA + 1), keep(200_000)
    assert [fetched(made, 200_016, alone), fetched(made, 200_016, foreign, ARENA + 1)] == [True, False]


# -- instances ----
def add(made: InProcess, number: int, arena: int = ARENA) -> int:
    out = made.raw(IN_INSTANCE, head(number) + struct.pack("<I", 1), 4, arena)
    return int.from_bytes(out, "little")


def test_instances_count_apart_and_the_default_one_is_their_hosts() -> None:
    made = InProcess(counter_api(), COUNTER_LUA)
    made.map(ARENA + 1)
    for number in (1, 2):
        made.raw(CREATE, head(number), 0)
    assert [add(made, number) for number in (1, 1, 2, 0)] == [1, 2, 1, 1]
    made.raw(CREATE, head(1), 0)
    assert add(made, 1) == 3  # made once
    assert made.raw(0, struct.pack("<I", 1), 4) == struct.pack("<I", 2)
    assert made.raw(0, struct.pack("<I", 1), 4, ARENA + 1) == struct.pack("<I", 1)
    for number, arena in ((3, ARENA), (1, ARENA + 1)):
        with pytest.raises(Failed, match="a new proxy gets a new one") as raised:
            add(made, number, arena)
        assert raised.value.code is AbiErrorCode.STALE_HANDLE


def test_destroy_runs_once_for_each_instance_whichever_way_it_goes() -> None:
    made = InProcess(counter_api(), COUNTER_LUA)
    made.map(ARENA + 1)
    for number in (1, 2, 3):
        made.raw(CREATE, head(number), 0)
        made.raw(CREATE, head(number), 0, ARENA + 1)
    made.raw(DESTROY, struct.pack("<QQQQ", 1, 2, 2, 99), 0)
    assert made.call("destroyed") == 2
    made.vm.remove_pair(ARENA + 1, 0)
    assert made.call("destroyed") == 2, "their host may get other memory"
    made.vm.forget(ARENA + 1)
    made.vm.forget(ARENA + 1)
    assert made.call("destroyed") == 5
    assert add(made, 3) == 1


def test_singleton_is_one_for_all() -> None:
    made = InProcess(counter_api(singleton=True), COUNTER_LUA)
    made.map(ARENA + 1)
    assert made.raw(0, struct.pack("<I", 1), 4) == struct.pack("<I", 1)
    assert made.raw(0, struct.pack("<I", 1), 4, ARENA + 1) == struct.pack("<I", 2)


def test_instances_are_bounded() -> None:
    source = (
        "local T = {}\nfunction T.new() return setmetatable({}, { __index = T }) end\nfunction T:run() end\nreturn T"
    )
    made = InProcess(one("Void"), source)
    create = made.raw
    for number in range(1, 100_001):
        create(CREATE, head(number), 0)
    with pytest.raises(Failed, match="there are 100000 instances, which is the limit"):
        create(CREATE, head(100_001), 0)
    made.raw(DESTROY, head(1), 0)
    made.raw(CREATE, head(100_001), 0)


def test_error_in_destroy_is_nobodys() -> None:
    source = "local T = {}; T.__index = T\nfunction T.new() return setmetatable({}, T) end\nfunction T:run() end\n"
    made = InProcess(one("Void"), source + "function T:destroy() error('no') end\nreturn T")
    made.raw(CREATE, head(1), 0)
    made.raw(DESTROY, head(1), 0)
    assert made.call("run") is None


# -- loading ----
@pytest.mark.parametrize(
    ("source", "problem", "reason"),
    [
        ("return nil", "type", "table nil"),
        ("return {}", "load", "host.one@1: the implementation has no function run"),
        ("return { run = 3 }", "load", "host.one@1: the implementation has no function run"),
        ("return setmetatable({}, { __index = function() error('hidden') end })", "load", "hidden"),
        ("error('early')", "load", "early"),
    ],
)
def test_what_is_no_implementation_is_refused(source: str, problem: str, reason: str) -> None:
    made = InProcess(one("Void"), source)
    assert made.problem == problem
    assert reason in made.reason


def test_functions_that_are_declared_are_no_hooks() -> None:
    functions = "".join(f'[[host_contract.functions]]\nname = "{name}"\nreturn = "u8"\n' for name in ("new", "destroy"))
    text = f'[[host_contract]]\nname = "host.made"\nversion = "1"\n{functions}'
    lua = "local T = { n = 0 }\nfunction T:new() self.n = self.n + 1 return self.n end\nT.destroy = T.new\nreturn T"
    made = InProcess(text, lua)
    made.raw(CREATE, head(1), 0)
    assert [made.raw(IN_INSTANCE | fn_id, head(1), 1) for fn_id in (0, 1)] == [b"\1", b"\2"]
    made.raw(DESTROY, struct.pack("<Q", 1), 0)
    assert made.call("new") == 3, "no end of an instance has called it"


def test_new_must_give_a_table() -> None:
    made = InProcess(one("Void"), "return { run = function() end, new = function() return 3 end }")
    with pytest.raises(Failed, match=r"host\.one@1: new\(\): expected a table, got number 3"):
        made.raw(0, b"", 0)


def test_source_depends_on_the_description_alone() -> None:
    api = parse(SVC, "api.toml")
    assert binding_source(api.host_contracts[0], api.enums) == binding_source(api.host_contracts[0], api.enums)


# -- state ----
SAVING_LUA = """
local T = {}; T.__index = T
function T.new() return setmetatable({ n = 0 }, T) end
function T:run() self.n = self.n + 1; return self.n end
function T:save() return tostring(self.n) end
function T:restore(text) self.n = assert(tonumber(text)) end
return T
"""


def saving(source: str = SAVING_LUA, text: str = one("u32")) -> InProcess:
    return InProcess(text.replace('version = "1"', 'version = "1"\nsingleton = true'), source)


def test_singleton_hands_its_state_to_another() -> None:
    old, new = saving(), saving()
    assert [old.call("run"), old.call("run")] == [1, 2]
    assert (old.vm.saves, new.vm.restores) == (True, True)
    assert old.vm.save(100) == (b"2", "")
    assert new.vm.restore(b"2") == ""
    assert new.call("run") == 3


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return 7", "save() returned number 7, not a string"),
        ("error('no')", "save() failed: contract.lua:5: no"),
        ("return ('x'):rep(101)", "save() returned 101 bytes; the limit is 100"),
        ("local t = {}; while true do t[#t + 1] = ('x'):rep(1e5) .. #t end", "memory"),
    ],
)
def test_state_that_cannot_be_saved_says_why(body: str, text: str) -> None:
    made = saving(SAVING_LUA.replace("return tostring(self.n)", body))
    state, problem = made.vm.save(100)
    assert state == b""
    assert text in problem


def test_any_bytes_are_state() -> None:
    state = bytes(range(256)) * 16384
    made = saving(
        SAVING_LUA.replace("return tostring(self.n)", "return self.s").replace(
            "self.n = assert(tonumber(text))", "self.s = text"
        )
    )
    assert made.vm.restore(state) == ""
    assert made.vm.save(len(state)) == (state, "")


def test_state_that_is_not_taken_up_says_why() -> None:
    assert "restore() failed: " in saving().vm.restore(b"no number")
    endless = "while true do self[#self + 1] = text .. #self end"
    made = saving(SAVING_LUA.replace("self.n = assert(tonumber(text))", endless))
    assert "memory" in made.vm.restore(b"x" * 100_000)


def test_only_singletons_hand_on_state_and_functions_of_the_contract_are_no_hooks() -> None:
    made = InProcess(one("u32"), SAVING_LUA)
    assert (made.vm.saves, made.vm.restores) == (False, False)
    text = one("u32") + '[[host_contract.functions]]\nname = "save"\n'
    made = saving(text=text)
    assert (made.vm.saves, made.vm.restores) == (False, True)


def test_callers_of_a_typed_contract_have_a_table_of_its_functions() -> None:
    text = caller_source(parse(SVC, "api.toml").host_contracts[0])
    assert 'functions["upper"] = { id = 1, count = 1, size = 16, varies = true' in text
    assert 'functions["scale"] = { id = 0, count = 3, size = 8, varies = false' in text
    nothing = caller_source(parse(counter_api(), "api.toml").host_contracts[0])
    assert "pack = function()\n  return nil\nend, unpack = nil }" in nothing
