"""The bridge as polyplug's behaves, and where luacell promises more: both chunk forms, every size, every refusal."""

from __future__ import annotations

import array
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from luacell.client import (
    AbiErrorCode,
    ContractInfo,
    ContractNotFound,
    DeadlineExceeded,
    DeploymentError,
    DuplicateContract,
    HostContractCallFailed,
    HostContractId,
    HostContractNotFound,
    LuacellError,
    LuaFunction,
    LuaHostBridge,
    SupportedLanguage,
    TooLarge,
    TypeMismatch,
    VmRegistrationFailed,
)
from luacell.protocol.limits import MIB, PAYLOAD_MAX
from tests.support.contracts import (
    COUNTER,
    DOUBLE,
    ECHO,
    HEALTHY,
    PROBE,
    answers,
    deploy,
    failure,
    function,
    refusal,
    write_deployment,
)
from tests.support.processes import broker_pid, workers_of
from tests.support.waiting import settles

NOTHING = "function(fn_id, args, out) end"
SIZES = (0, 1, 4095, 4096, 4097, 16 * MIB + 3, 64 * MIB)
PATTERN = bytes(range(251))  # a prime, so that a shift by any power of two shows


def pattern(size: int) -> bytes:
    return (PATTERN * (size // len(PATTERN) + 1))[:size]


@pytest.fixture
def probe(bridge: LuaHostBridge) -> Callable[[str], str]:
    """Register a chunk as the probe contract."""

    def register(source: str) -> str:
        bridge.register_host_contract(PROBE, LuaFunction(source))
        return PROBE

    return register


# -- the original bridge's own tests ----
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(LuaHostBridge, id="new"),
        pytest.param(lambda: LuaHostBridge.with_capacity(2), id="with_capacity"),
        pytest.param(lambda: LuaHostBridge.with_capacity(0), id="with_capacity of none"),
    ],
)
def test_new_bridge_is_empty_and_usable(make: Callable[[], LuaHostBridge]) -> None:
    with make() as bridge:
        assert bridge.contracts() == []
        assert bridge.call_host_contract(1, 0, None, None).code is AbiErrorCode.HOST_CONTRACT_NOT_FOUND
        bridge.register_host_contract(1234, LuaFunction(DOUBLE))
        assert answers(bridge, 1234)


def test_capacity_out_of_range_is_a_value_error() -> None:
    for capacity in (-1, 65):
        with pytest.raises(ValueError, match=rf"capacity {capacity} is outside 0\.\.64"):
            LuaHostBridge.with_capacity(capacity)


def test_runtime_type_is_lua(bridge: LuaHostBridge) -> None:
    assert bridge.runtime_type() is SupportedLanguage.LUA
    assert bridge.runtime_type() == 4


def test_contract_is_registered_and_called(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(1234, LuaFunction(NOTHING))
    result = bridge.call_host_contract(1234, 5, None, None)
    assert (result.code, result.message, result.ok) == (AbiErrorCode.OK, "", True)


def test_second_registration_is_a_duplicate_and_the_first_stays(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(1234, LuaFunction(DOUBLE))
    with pytest.raises(DuplicateContract) as caught:
        bridge.register_host_contract(1234, LuaFunction(NOTHING))
    assert str(caught.value) == "duplicate host contract registration: contract_id=0x00000000000004D2"
    assert caught.value.contract_id == 1234
    assert answers(bridge, 1234)


def test_integer_is_no_implementation(bridge: LuaHostBridge) -> None:
    with pytest.raises(TypeMismatch) as caught:
        bridge.register_host_contract(1234, 42)  # type: ignore[arg-type]
    assert caught.value.got == "int"
    assert str(caught.value) == (
        "implementation type mismatch for contract_id=0x00000000000004D2: expected LuaFunction, got int"
    )
    assert bridge.contracts() == []


def test_type_is_checked_before_the_id(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(1234, LuaFunction(NOTHING))
    with pytest.raises(TypeMismatch):
        bridge.register_host_contract(1234, "function() end")  # type: ignore[arg-type]


def test_unknown_contract_is_code_100(bridge: LuaHostBridge) -> None:
    result = bridge.call_host_contract(9999, 0, None, None)
    assert result.code == 100
    assert result.message == "host contract not found: contract_id=0x000000000000270F"
    with pytest.raises(HostContractNotFound) as caught:
        bridge.call(9999, 0)
    assert isinstance(caught.value, ContractNotFound)
    assert (caught.value.contract_id, caught.value.began) == (9999, "no")


def test_lua_error_is_code_102_with_text_and_traceback(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(1234, LuaFunction("function(fn_id) error('test error') end", chunk_name="=mine"))
    result = bridge.call_host_contract(1234, 0, None, None)
    assert result.code == 102
    assert result.message.startswith("Lua exception: mine:1: test error\nstack traceback:\n")
    with pytest.raises(HostContractCallFailed) as caught:
        bridge.call(1234, 0)
    assert caught.value.message.startswith("Lua exception: mine:1: test error\nstack traceback:\n")
    assert caught.value.began == "yes"


# -- the scratch VM ----
@pytest.fixture(scope="module")
def scratch() -> Iterator[LuaHostBridge]:
    with LuaHostBridge() as bridge:
        yield bridge


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("42", 42),
        ("return 42", 42),
        ("1 / 4", 0.25),
        ("local x = 2 return x * 21", 42),
        ("true", True),
        ("false", False),
        ("nil", None),
        ("", None),
        ("'héllo'", "héllo"),
        ("18446744073709551615ULL", 2**64 - 1),
        ("-9223372036854775807LL - 1", -(2**63)),
        ("2^53", 2**53),
    ],
)
def test_lua_evaluates(scratch: LuaHostBridge, source: str, value: object) -> None:
    assert scratch.lua().eval(source) == value
    assert type(scratch.lua().eval(source)) is type(value)


def test_lua_gives_numbers_that_are_no_integers(scratch: LuaHostBridge) -> None:
    assert str(scratch.lua().eval("0/0")) in ("nan", "-nan")
    assert scratch.lua().eval("1/0") == float("inf")
    assert scratch.lua().eval("-1/0") == float("-inf")


@pytest.mark.parametrize("source", ["{}", "print", "error('boom')", "syntax error"])
def test_lua_refuses_what_has_no_value(scratch: LuaHostBridge, source: str) -> None:
    with pytest.raises(HostContractCallFailed):
        scratch.lua().eval(source)


def test_lua_keeps_what_was_defined(scratch: LuaHostBridge) -> None:
    scratch.lua().eval("count = (count or 0) + 1")
    scratch.lua().eval("count = count + 1")
    assert scratch.lua().eval("count") == 2
    assert scratch.contracts() == [], "it is nobody's contract"


# -- chunks ----
@pytest.mark.parametrize(
    "source",
    [
        pytest.param("function(fn_id, args, out) out[0] = 7 end", id="an expression"),
        pytest.param("return function(fn_id, args, out) out[0] = 7 end", id="a statement"),
        pytest.param("-- first a remark\nreturn function(fn_id, args, out) out[0] = 7 end\n", id="a remark before"),
        pytest.param("function(fn_id, args, out) out[0] = 7 end -- last", id="a remark behind"),
        pytest.param("local seven = 7\nlocal function f(_, _, out) out[0] = seven end\nreturn f", id="a local"),
        pytest.param("(function() return function(_, _, out) out[0] = 7 end end)()", id="a call"),
        pytest.param("print", id="a C function"),
    ],
)
def test_chunk_gives_its_function(bridge: LuaHostBridge, probe: Callable[[str], str], source: str) -> None:
    reply = bridge.call(probe(source), 0, None, 1)
    assert reply == (b"\0" if source == "print" else b"\7")


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("42", "number"),
        ("return 'text'", "string"),
        ("nil", "nil"),
        ("", "nil"),
        ("{}", "table"),
        ("return true", "boolean"),
    ],
)
def test_chunk_that_is_no_function_is_a_type_mismatch(bridge: LuaHostBridge, source: str, kind: str) -> None:
    refused = refusal(bridge, source)
    assert isinstance(refused, TypeMismatch)
    assert (refused.expected, refused.got) == ("Lua function", f"Lua {kind}")
    assert_free(bridge)


def assert_free(bridge: LuaHostBridge) -> None:
    """The id of the probe is not taken."""
    assert bridge.contracts() == []
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    assert answers(bridge, PROBE)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        pytest.param("function(", "host.probe@1:1:", id="does not parse"),
        pytest.param("return function() end end", "host.probe@1:1: '<eof>' expected near 'end'", id="goes on"),
        pytest.param("\n\nerror('not today')", "host.probe@1:3: not today", id="raises"),
        pytest.param("error({})", "table", id="raises a table"),
        pytest.param("error()", "nil", id="raises nothing"),
        pytest.param("require('no.such.module')", "no.such.module", id="needs a module"),
        pytest.param("require('ffi').cast('int *', 0)[0] = 1", "signal 11 (SIGSEGV)", id="segfaults"),
        pytest.param("os.exit(0)", "exit code 0", id="exits"),
        pytest.param("os.exit(3)", "exit code 3", id="exits with 3"),
        pytest.param("require('ffi').cdef('void abort()') require('ffi').C.abort()", "signal 6 (SIGABRT)", id="aborts"),
        pytest.param("local s = 'x' while true do s = s .. s end", "memory", id="eats memory"),
        pytest.param("\x1bLJ\x02\x00", "wrong mode", id="is bytecode"),
    ],
)
def test_chunk_that_does_not_load_is_refused_with_the_reason(bridge: LuaHostBridge, source: str, reason: str) -> None:
    refused = refusal(bridge, source)
    assert isinstance(refused, VmRegistrationFailed)
    assert reason in refused.reason
    assert str(refused).startswith(f"VM registration failed for contract_id=0x{refused.contract_id:016X}: ")
    assert_free(bridge)


def test_chunk_that_hangs_is_refused_after_the_limit(bridge: LuaHostBridge) -> None:
    refused = refusal(bridge, "while true do end")
    assert isinstance(refused, VmRegistrationFailed)
    assert "within 5 s" in refused.reason
    assert_free(bridge)


def test_file_is_named_in_errors(bridge: LuaHostBridge, tmp_path: Path) -> None:
    path = tmp_path / "mine.lua"
    path.write_text("return function()\n  error('here')\nend\n")
    bridge.register_host_contract(PROBE, LuaFunction.from_file(path))
    assert "mine.lua:2: here" in failure(bridge, PROBE).message


def test_file_with_a_path_of_any_length_is_registered(bridge: LuaHostBridge, tmp_path: Path) -> None:
    directory = tmp_path.joinpath(*["d" * 200] * 4)
    directory.mkdir(parents=True)
    path = directory / "double.lua"
    path.write_text(DOUBLE)
    bridge.register_host_contract(PROBE, LuaFunction.from_file(path))
    assert answers(bridge, PROBE)


def test_source_of_the_largest_size_is_registered(bridge: LuaHostBridge) -> None:
    source = DOUBLE + "--" + "x" * (4 * MIB - len(DOUBLE) - 2)
    bridge.register_host_contract(PROBE, LuaFunction(source))
    assert answers(bridge, PROBE)
    with pytest.raises(ValueError, match="limit of 4194304"):
        LuaFunction(source + "x")


# -- two bridges ----
def test_two_bridges_share_nothing() -> None:
    with LuaHostBridge() as first, LuaHostBridge() as second:
        assert broker_pid(first) != broker_pid(second)
        for bridge in (first, second):
            bridge.register_host_contract(1234, LuaFunction(COUNTER))
        for _ in range(3):
            first.call(1234, 0, None, 4)
        assert second.call(1234, 0, None, 4) == (1).to_bytes(4, "little")
        assert first.call(1234, 0, None, 4) == (4).to_bytes(4, "little")
        first.unregister_host_contract(1234)
        assert len(second.contracts()) == 1
        first.lua().eval("shared = 1")
        assert second.lua().eval("shared") is None


# -- ids and numbers ----
@pytest.mark.parametrize("contract_id", [0, 1, 2**53, 2**53 + 1, 2**63, 2**64 - 1])
def test_every_u64_names_its_own_contract(bridge: LuaHostBridge, contract_id: int) -> None:
    bridge.register_host_contract(contract_id, LuaFunction(DOUBLE))
    assert answers(bridge, contract_id)
    neighbour = contract_id ^ 1
    assert bridge.call_host_contract(neighbour, 0, None, None).code == 100
    assert [contract.id for contract in bridge.contracts()] == [contract_id]


@pytest.mark.parametrize("contract", [-1, 2**64])
def test_id_out_of_range_is_a_value_error(bridge: LuaHostBridge, contract: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.2\*\*64-1"):
        bridge.call(contract, 0)
    with pytest.raises(ValueError, match=r"outside 0\.\.2\*\*64-1"):
        bridge.register_host_contract(contract, LuaFunction(NOTHING))


@pytest.mark.parametrize(
    "contract", ["host.probe", "probe@1", "host.probe@x", "host..probe@1", "host.probe@1.2.3.4", ""]
)
def test_malformed_name_is_a_value_error(bridge: LuaHostBridge, contract: str) -> None:
    with pytest.raises(ValueError, match=r"contract|version"):
        bridge.call(contract, 0)


@pytest.mark.parametrize("contract", [None, 1.0, True, b"host.probe@1"])
def test_contract_of_another_type_is_a_type_error(bridge: LuaHostBridge, contract: object) -> None:
    with pytest.raises(TypeError):
        bridge.call(contract, 0)  # type: ignore[arg-type]


def test_one_contract_has_many_names(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract("host.probe@1.2.3", LuaFunction(DOUBLE))
    names: list[int | str | HostContractId] = [PROBE, "host.probe@1.7", HostContractId("host.probe", 1)]
    for name in [*names, int(HostContractId("host.probe", 1))]:
        assert bridge.call_host_contract(name, 0, (21).to_bytes(4, "little"), bytearray(4)).ok


@pytest.mark.parametrize("fn_id", [0, 1, 2**31, 2**32 - 1])
def test_function_id_arrives_as_it_is(bridge: LuaHostBridge, probe: Callable[[str], str], fn_id: int) -> None:
    probe(function("ffi.cast('uint32_t *', out)[0] = fn_id"))
    assert bridge.call(PROBE, fn_id, None, 4) == fn_id.to_bytes(4, "little")


@pytest.mark.parametrize("fn_id", [-1, 2**32, 1.5, None])
def test_function_id_out_of_range_is_a_value_error(bridge: LuaHostBridge, fn_id: object) -> None:
    with pytest.raises(ValueError, match="fn_id"):
        bridge.call(1, fn_id)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, 2**53 + 1, 2**62 - 1, 2**64 - 1])
def test_integers_of_64_bits_are_exact(bridge: LuaHostBridge, probe: Callable[[str], str], number: int) -> None:
    probe(function("ffi.cast('uint64_t *', out)[0] = ffi.cast('uint64_t *', args)[0] + 0ULL"))
    assert bridge.call(PROBE, 0, number.to_bytes(8, "little"), 8) == number.to_bytes(8, "little")


# -- bytes ----
@pytest.mark.parametrize("size", SIZES)
def test_bytes_of_any_size_come_back_exactly(bridge: LuaHostBridge, size: int) -> None:
    deploy(bridge, ECHO, memory="64MiB", deadline="20s")
    sent = pattern(size)
    reply = bridge.call(PROBE, size, sent, size)
    assert reply == sent
    out = bytearray(b"\xaa" * size)
    assert bridge.call_host_contract(PROBE, size, sent, out).ok
    assert out == sent


@pytest.mark.parametrize(("args_size", "out_size", "name"), [(PAYLOAD_MAX + 1, 0, "args"), (0, PAYLOAD_MAX + 1, "out")])
def test_payload_over_the_limit_is_too_large(
    bridge: LuaHostBridge, probe: Callable[[str], str], args_size: int, out_size: int, name: str
) -> None:
    probe(NOTHING)
    with pytest.raises(TooLarge, match=f"{name} of {PAYLOAD_MAX + 1} bytes is over the limit") as caught:
        bridge.call(PROBE, 0, bytes(args_size), out_size)
    assert caught.value.began == "no"
    result = bridge.call_host_contract(PROBE, 0, bytes(args_size), bytearray(out_size))
    assert result.code == AbiErrorCode.TOO_LARGE


def test_out_that_the_contract_did_not_write_is_zero(bridge: LuaHostBridge, probe: Callable[[str], str]) -> None:
    probe(function("if fn_id > 0 then ffi.fill(out, fn_id, 255) end"))
    for size in (100, 5000, 300_000):
        for _ in range(40):  # more than there are slots, so that each is used again
            assert bridge.call(PROBE, size, None, size) == b"\xff" * size
            assert bridge.call(PROBE, 0, None, size) == bytes(size)
            assert bridge.call(PROBE, 7, None, size) == b"\xff" * 7 + bytes(size - 7)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("error('after writing')", id="error"),
        pytest.param("luacell.fail(1024, 'no')", id="fail"),
        pytest.param("ffi.cast('int *', 0)[0] = 1", id="crash"),
        pytest.param("while true do end", id="deadline"),
    ],
)
def test_out_is_untouched_after_a_failure(bridge: LuaHostBridge, body: str) -> None:
    deploy(bridge, function(f"ffi.fill(out, 600, 1) {body}"), deadline="200ms")
    out = bytearray(b"\xaa" * 600)
    assert not bridge.call_host_contract(PROBE, 0, None, out).ok
    assert out == b"\xaa" * 600
    with pytest.raises(LuacellError):
        bridge.call(PROBE, 0, out=out)
    assert out == b"\xaa" * 600


ABSENT = function("out[0] = args == nil and 1 or 2")


def test_args_are_null_when_absent(bridge: LuaHostBridge, probe: Callable[[str], str]) -> None:
    probe(ABSENT)
    out = bytearray(1)
    assert bridge.call_host_contract(PROBE, 0, None, out).ok
    assert out == b"\1"
    assert bridge.call_host_contract(PROBE, 0, b"", out).ok
    assert out == b"\2", "an empty buffer is a buffer"
    assert bridge.call(PROBE, 0, None, 1) == b"\1"
    assert bridge.call(PROBE, 0, b"", 1) == b"\1"
    assert bridge.call(PROBE, 0, b"x", 1) == b"\2"


def test_out_is_null_when_absent(bridge: LuaHostBridge, probe: Callable[[str], str]) -> None:
    probe(function("error(out == nil and 'null' or 'there', 0)"))
    for out, seen in ((None, "null"), (bytearray(), "there"), (bytearray(1), "there")):
        assert f"Lua exception: {seen}" in bridge.call_host_contract(PROBE, 0, None, out).message
    assert "Lua exception: null" in failure(bridge, PROBE, out_size=0).message
    assert "Lua exception: there" in failure(bridge, PROBE, out_size=1).message


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int32), ("y", ctypes.c_int32))


@pytest.mark.parametrize(
    "buffer",
    [
        pytest.param(b"12345678", id="bytes"),
        pytest.param(bytearray(b"12345678"), id="bytearray"),
        pytest.param(memoryview(b"12345678"), id="memoryview"),
        pytest.param(memoryview(b"xx12345678xx")[2:10], id="a slice"),
        pytest.param(memoryview(bytearray(b"12345678")).cast("I"), id="of wider items"),
        pytest.param(memoryview(b"12345678").cast("B", (2, 4)), id="of two dimensions"),
        pytest.param(array.array("q", [int.from_bytes(b"12345678", "little")]), id="array"),
        pytest.param(Point.from_buffer_copy(b"12345678"), id="a ctypes structure"),
        pytest.param((ctypes.c_double * 1).from_buffer_copy(b"12345678"), id="a ctypes array"),
        pytest.param(ctypes.c_uint64(int.from_bytes(b"12345678", "little")), id="a ctypes number"),
    ],
)
def test_arguments_may_be_any_buffer(bridge: LuaHostBridge, probe: Callable[[str], str], buffer: bytes) -> None:
    probe(ECHO)
    assert bridge.call(PROBE, 8, buffer, 8) == b"12345678"
    out = bytearray(8)
    assert bridge.call_host_contract(PROBE, 8, buffer, out).ok
    assert out == b"12345678"


@pytest.mark.parametrize("size", [8, 400_000])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(bytearray, id="bytearray"),
        pytest.param(lambda size: memoryview(bytearray(size)), id="memoryview"),
        pytest.param(lambda size: memoryview(bytearray(size + 4))[4:], id="a slice"),
        pytest.param(lambda size: array.array("q", bytes(size)), id="array"),
        pytest.param(lambda size: (ctypes.c_int16 * (size // 2))(), id="a ctypes array"),
        pytest.param(lambda size: (Point * (size // 8))(), id="ctypes structures"),
    ],
)
def test_out_may_be_any_writable_buffer(
    bridge: LuaHostBridge, probe: Callable[[str], str], make: Callable[[int], bytearray], size: int
) -> None:
    probe(ECHO)
    sent = pattern(size)
    first, second = make(size), make(size)
    assert bridge.call_host_contract(PROBE, size, sent, first).ok
    assert bridge.call(PROBE, size, sent, out=second) == b""
    assert bytes(first) == bytes(second) == sent


@pytest.mark.parametrize("out", [b"12345678", memoryview(b"12345678"), "text", 8, memoryview(bytearray(16))[::2]])
def test_out_that_cannot_be_written_is_a_type_error(bridge: LuaHostBridge, out: bytearray) -> None:
    with pytest.raises(TypeError):
        bridge.call_host_contract(1, 0, None, out)
    with pytest.raises(TypeError):
        bridge.call(1, 0, out=out)


def test_out_size_is_no_negative_number(bridge: LuaHostBridge) -> None:
    with pytest.raises(ValueError, match="out_size -1"):
        bridge.call(1, 0, b"", -1)


def test_what_is_returned_is_ignored(bridge: LuaHostBridge, probe: Callable[[str], str]) -> None:
    probe(function("out[0] = 5 return 'ignored', 7"))
    assert bridge.call(PROBE, 0, None, 1) == b"\5"


# -- time ----
@pytest.mark.parametrize("timeout", [0, -1, -0.001, 61, 60.001, float("inf"), float("nan")])
def test_timeout_out_of_range_is_a_value_error(bridge: LuaHostBridge, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        bridge.call(1, 0, timeout=timeout)
    with pytest.raises(ValueError, match="timeout"):
        bridge.call_host_contract(1, 0, None, None, timeout=timeout)


def test_timeout_and_deadline_the_smaller_holds(bridge: LuaHostBridge) -> None:
    deploy(bridge, function("while true do end"), deadline="200ms")
    for timeout, limit in ((None, "0.2"), (60, "0.2"), (0.1, "0.1")):
        with pytest.raises(DeadlineExceeded, match=f"deadline {limit} s"):
            bridge.call(PROBE, 0, timeout=timeout)


def test_deadline_tells_the_seconds_left(bridge: LuaHostBridge) -> None:
    deploy(bridge, function("ffi.cast('double *', out)[0] = luacell.deadline()"), deadline="5s")

    def left(timeout: float | None = None) -> float:
        return float(memoryview(bridge.call(PROBE, 0, None, 8, timeout=timeout)).cast("d")[0])

    assert 4.0 < left() <= 5.0
    assert 0.0 < left(timeout=0.5) <= 0.5


def test_new_deadline_holds_after_the_contract_was_registered_anew(bridge: LuaHostBridge) -> None:
    slow = function("local ends = luacell.deadline() - 0.4 while luacell.deadline() > ends do end")
    deploy(bridge, slow, deadline="100ms")
    failure(bridge, PROBE)
    bridge.unregister_host_contract(PROBE)
    deploy(bridge, slow, deadline="5s")
    bridge.call(PROBE, 0)
    bridge.register_host_contract(PROBE, LuaFunction(slow), replace=True)
    bridge.call(PROBE, 0)


# -- refusing in a typed way ----
@pytest.mark.parametrize("code", [*range(1, 10), 1024, 1025, 2**31, 2**32 - 1])
def test_fail_gives_its_code_and_text(bridge: LuaHostBridge, probe: Callable[[str], str], code: int) -> None:
    probe(function(f"luacell.fail({code}, 'because')"))
    result = bridge.call_host_contract(PROBE, 0, None, None)
    assert (int(result.code), result.message) == (code, "because")
    refused = failure(bridge, PROBE)
    assert (refused.code, refused.message, refused.began) == (code, "because", "yes")


@pytest.mark.parametrize("code", [0, 10, 100, 102, 256, 1023, 2**32, -1, 1.5, "'1'", "nil", "{}"])
def test_fail_with_a_code_that_is_not_the_contract_s_is_an_error(
    bridge: LuaHostBridge, probe: Callable[[str], str], code: object
) -> None:
    probe(function(f"luacell.fail({code}, 'because')"))
    result = bridge.call_host_contract(PROBE, 0, None, None)
    assert result.code == 102
    assert "neither in 1..9 nor from 1024 on" in result.message


def test_fail_that_was_caught_does_not_colour_a_later_error(bridge: LuaHostBridge, probe: Callable[[str], str]) -> None:
    probe(function("pcall(luacell.fail, 1024, 'caught') if fn_id == 1 then error('later') end"))
    assert bridge.call_host_contract(PROBE, 0, None, None).ok
    result = bridge.call_host_contract(PROBE, 1, None, None)
    assert result.code == 102
    assert "later" in result.message


# -- deployment ----
def test_directory_s_own_modules_are_found(bridge: LuaHostBridge, tmp_path: Path) -> None:
    write_deployment(
        tmp_path,
        "local a, b, c = require('util'), require('deep.er'), require('pack')\n"
        "return function(_, _, out) out[0] = a + b.value + c() + require('later') end",
    )
    (tmp_path / "util.lua").write_text("return 1")
    (tmp_path / "later.lua").write_text("return 8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "er.lua").write_text("return { value = require('util') + 1 }")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "init.lua").write_text("return function() return 4 end")
    assert bridge.deploy(tmp_path) == [PROBE]
    assert bridge.call(PROBE, 0, None, 1) == bytes([15])


def test_module_of_the_directory_that_fails_is_named(bridge: LuaHostBridge, tmp_path: Path) -> None:
    write_deployment(tmp_path, "local x = require('broken')\nreturn function() end")
    (tmp_path / "broken.lua").write_text("return 1 +\n")
    with pytest.raises(VmRegistrationFailed, match=r"broken\.lua:2:"):
        bridge.deploy(tmp_path)
    (tmp_path / "broken.lua").write_text("\nerror('inside')")
    with pytest.raises(VmRegistrationFailed, match=r"broken\.lua:2: inside"):
        bridge.deploy(tmp_path)
    assert bridge.contracts() == []


def test_deployment_of_several_contracts_is_all_or_nothing(bridge: LuaHostBridge, tmp_path: Path) -> None:
    (tmp_path / "good.lua").write_text(DOUBLE)
    (tmp_path / "bad.lua").write_text("error('no')")
    manifest = tmp_path / "luacell.toml"
    table = '[contract."{}"]\nsource = "{}"\n'
    manifest.write_text(table.format("host.a@1", "good.lua") + table.format("host.b@1", "bad.lua"))
    with pytest.raises(VmRegistrationFailed, match=r"bad\.lua:1: no"):
        bridge.deploy(tmp_path)
    assert bridge.contracts() == []
    manifest.write_text(table.format("host.a@1", "good.lua") + table.format("host.b@1.4.2", "good.lua"))
    assert bridge.deploy(tmp_path) == ["host.a@1", "host.b@1"]
    assert answers(bridge, "host.a@1")
    assert bridge.deploy(tmp_path) == ["host.a@1", "host.b@1"], "a unit replaces itself"
    assert answers(bridge, "host.b@1")


def test_large_sources_are_deployed(bridge: LuaHostBridge, tmp_path: Path) -> None:
    write_deployment(tmp_path, DOUBLE + "--" + "x" * MIB)
    (tmp_path / "other.lua").write_text("return 1 --" + "x" * MIB)
    bridge.deploy(tmp_path)
    assert answers(bridge, PROBE)


def test_sources_that_are_too_large_are_refused_and_the_bridge_lives(bridge: LuaHostBridge, tmp_path: Path) -> None:
    write_deployment(tmp_path, DOUBLE + "--" + "x" * (3 * MIB))
    (tmp_path / "other.lua").write_text("return 1 --" + "x" * (3 * MIB))
    with pytest.raises((DeploymentError, TooLarge), match=r"limit|more than"):
        bridge.deploy(tmp_path)
    deploy(bridge, DOUBLE)
    assert answers(bridge, PROBE)


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        ("[contrac]", ["unknown key 'contrac'", "did you mean 'contract'?"]),
        ("", ["names no contract"]),
        ("contract = 1", ["names no contract"]),
        ("[contract", ["Expected ']'"]),
        ('[contract."host.a@1"]', ['[contract."host.a@1"]', "lacks source"]),
        ('[contract."host.a"]\nsource = "a.lua"', ["host.a", "lacks its version"]),
        ('[contract."a@1"]\nsource = "a.lua"', ["lacks the prefix 'host.'"]),
        ('[contract."host.a@1"]\nsorce = "a.lua"', ['[contract."host.a@1"]', "'sorce'", "did you mean 'source'?"]),
        ('[contract."host.a@1"]\nsource = "b.lua"', ["source = 'b.lua'", "readable Lua file"]),
        ('[contract."host.a@1"]\nsource = "."', ["source = '.'", "regular file"]),
        ('[contract."host.a@1"]\nsource = "../a.lua"', ["source = '../a.lua'", "a file in"]),
        ('[contract."host.a@1"]\nsource = "/etc/passwd"', ["source = '/etc/passwd'"]),
        ('[contract."host.a@1"]\nsource = 1', ["source = 1", "text"]),
        ('[contract."host.a@1"]\nsource = "a.lua"\ndeadline = "5"', ["deadline = '5'", '"250ms"']),
        ('[contract."host.a@1"]\nsource = "a.lua"\ndeadline = 5', ["deadline = 5"]),
        ('[contract."host.a@1"]\nsource = "a.lua"\ndeadline = "61s"', ["deadline = '61s'", "60 s"]),
        ('[contract."host.a@1"]\nsource = "a.lua"\nrun_limit = "0s"', ["run_limit = '0s'"]),
        ('[contract."host.a@1"]\nsource = "a.lua"\nmemory = "64"', ["memory = '64'", "MiB"]),
        ('[contract."host.a@1"]\nsource = "a.lua"\nmemory = "9GiB"', ["memory = '9GiB'", "2048 MiB"]),
        ('[contract."host.a@1"]\nsource = "a.lua"\nworkers = 0', ["workers = 0", "1..64"]),
        ('[contract."host.a@1"]\nsource = "a.lua"\nworkers = true', ["workers = True"]),
        ('[contract."host.a@1"]\nsource = "a.lua"\nstateless = 1', ["stateless = 1", "true or false"]),
        ('[contract."host.a@1"]\nsource = "a.lua"\nsandbox = "hard"', ["sandbox = 'hard'", "hardened"]),
    ],
)
def test_manifest_that_is_wrong_is_refused_with_file_table_and_key(
    bridge: LuaHostBridge, tmp_path: Path, manifest: str, says: list[str]
) -> None:
    (tmp_path / "a.lua").write_text(DOUBLE)
    (tmp_path / "luacell.toml").write_text(manifest)
    with pytest.raises(DeploymentError) as caught:
        bridge.deploy(tmp_path)
    for words in [str(tmp_path / "luacell.toml"), *says]:
        assert words in str(caught.value)


def test_directory_without_a_manifest_is_refused_by_name(bridge: LuaHostBridge, tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DeploymentError, match="No such file") as caught:
            bridge.deploy(directory)
        assert str(directory / "luacell.toml") in str(caught.value)


def test_several_workers_need_a_stateless_contract(bridge: LuaHostBridge) -> None:
    with pytest.raises(DeploymentError, match="workers = 2 is not 1, and more need stateless = true"):
        deploy(bridge, DOUBLE, workers=2)
    assert bridge.contracts() == []
    deploy(bridge, DOUBLE, workers=2, stateless=True)
    assert answers(bridge, PROBE)


# -- C modules of the system ----
def needs(path: str, package: str) -> None:
    if not list(Path("/usr/lib").glob(f"*/lua/5.1/{path}")) and not list(Path("/usr").glob(f"*/lib/lua/5.1/{path}")):
        pytest.skip(f"{package} is not installed here (Debian: apt-get install {package})")


def test_lua_cjson_works(bridge: LuaHostBridge, probe: Callable[[str], str]) -> None:
    needs("cjson.so", "lua-cjson")
    probe(
        'local ffi, cjson = require("ffi"), require("cjson")\n'
        "return function(size, args, out)\n"
        "  local value = cjson.decode(ffi.string(args, size))\n"
        "  local text = cjson.encode({ sum = value.a + value.b[2], name = value.name })\n"
        "  ffi.copy(out, text, #text)\nend"
    )
    sent = b'{"a": 1, "b": [10, 20], "name": "h\\u00e9"}'
    import json

    assert json.loads(bridge.call(PROBE, len(sent), sent, 100).rstrip(b"\0")) == {"sum": 21, "name": "hé"}
    assert "Expected" in failure(bridge, PROBE, 1, args=b"{").message


def test_lpeg_works(bridge: LuaHostBridge, probe: Callable[[str], str]) -> None:
    needs("lpeg.so", "lua-lpeg")
    probe(
        'local ffi, lpeg = require("ffi"), require("lpeg")\n'
        "local number = lpeg.R('09')^1 / tonumber\n"
        "local sum = lpeg.Cf(number * (lpeg.P('+') * number)^0, function(a, b) return a + b end)\n"
        "return function(size, args, out)\n"
        "  ffi.cast('uint32_t *', out)[0] = lpeg.match(sum, ffi.string(args, size)) or 0\nend"
    )
    assert bridge.call(PROBE, 9, b"1+20+300 ", 4) == (321).to_bytes(4, "little")
    assert bridge.call(PROBE, 1, b"x", 4) == bytes(4)


# -- what there is ----
def test_contracts_are_listed_in_order_of_id(bridge: LuaHostBridge) -> None:
    deploy(bridge, DOUBLE, "host.probe@2.1.7", deadline="250ms", stateless=True, workers=3)
    bridge.register_host_contract(5, LuaFunction(DOUBLE))
    first, second = bridge.contracts()
    assert first == ContractInfo(5, "", "", 5.0, False, 1)
    assert second == ContractInfo(
        int(HostContractId("host.probe", 2)), "host.probe", "2.1.7", 0.25, True, 3, second.unit
    )
    assert second.unit.startswith("probe-"), "it is named like its directory"
    assert (str(first), str(second)) == ("0x0000000000000005", "host.probe@2")


def test_long_listings_are_complete(bridge: LuaHostBridge) -> None:
    for number in range(40):
        bridge.register_host_contract(number, LuaFunction(NOTHING))
    assert [contract.id for contract in bridge.contracts()] == list(range(40))


def test_contract_is_gone_after_unregistering(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    assert answers(bridge, PROBE)
    bridge.unregister_host_contract(PROBE)
    assert bridge.contracts() == []
    assert bridge.call_host_contract(PROBE, 0, None, None).code == 100
    with pytest.raises(ContractNotFound) as caught:
        bridge.unregister_host_contract(PROBE)
    assert caught.value.contract_id == int(HostContractId("host.probe", 1))
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    assert answers(bridge, PROBE)


def test_replacement_takes_over_and_one_that_does_not_load_does_not(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    with pytest.raises(VmRegistrationFailed):
        bridge.register_host_contract(PROBE, LuaFunction("error('no')"), replace=True)
    assert answers(bridge, PROBE)
    bridge.register_host_contract(PROBE, LuaFunction(function("out[0] = 9")), replace=True)
    assert bridge.call(PROBE, 0, None, 1) == b"\t"
    assert len(bridge.contracts()) == 1
    bridge.register_host_contract(HEALTHY, LuaFunction(DOUBLE), replace=True)
    assert answers(bridge, HEALTHY)


def test_health_tells_who_serves_what(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    for _ in range(3):
        assert answers(bridge, PROBE)
    health = bridge.health()
    assert (health["hosts"], health["contracts"], health["queued"], health["slots_in_flight"]) == (1, 1, 0, 0)
    (worker,) = (worker for worker in health["workers"] if worker["contract"] == PROBE)
    assert (worker["state"], worker["served"]) == ("idle", 3)
    assert workers_of(bridge, PROBE) == [worker["pid"]]
    assert health["memory_bytes"] > 0


def test_bridge_shows_what_it_is(bridge: LuaHostBridge) -> None:
    assert repr(bridge) == f"<LuaHostBridge embedded open broker_pid={broker_pid(bridge)}>"


def test_contract_that_nobody_calls_gives_its_worker_back_and_is_served_all_the_same(bridge: LuaHostBridge) -> None:
    bridge.register_host_contract(PROBE, LuaFunction(DOUBLE))
    settles(lambda: len(workers_of(bridge, PROBE)), 0, "its worker is given back", limit_s=20)
    assert answers(bridge, PROBE)
