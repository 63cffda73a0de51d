"""Values survive, bad ones are refused by name before anything travels, and no result is believed."""

from __future__ import annotations

import array
import dataclasses
import struct
import timeit
from enum import IntEnum, IntFlag
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luacell.client.typed import HostTypes, Marshaller, compile_contract, compile_function
from luacell.client.typed.refusals import ResultCheck, shown
from luacell.client.typed.values import COMBINATIONS_MAX
from luacell.protocol.api import Api, Struct, Void, parse
from luacell.protocol.api.model import ARRAY_ITEMS_MAX
from luacell.protocol.errors import (
    ArgumentError,
    ArgumentOverflowError,
    ArgumentTypeError,
    ArgumentValueError,
    BadResult,
    HostContractCallFailed,
    TooLarge,
)
from luacell.protocol.limits import MIB, PAYLOAD_MAX
from tests.protocol.support import steady
from tests.support.apis import SVC, apis, bits, echo, svc, values

FLAGS = """
[[enum]]
name = "Wide"
repr = "u64"
bitflag = true
variants = [{ name = "None0", value = "0" }, { name = "Low", value = "0xFFFF" }, { name = "Top", value = "1 << 63" }]
"""
POINT = '[[types]]\nname = "Point"\nfields = [{ name = "x", type = "f32" }, { name = "s", type = "StringView" }]\n'
BAG = '[[types]]\nname = "Bag"\nfields = [{ name = "n", type = "u8" }, { name = "items", type = "Array<u16>" }]\n'


def marshaller(api: Api, types: HostTypes | None = None) -> Marshaller:
    contract = api.host_contracts[0]
    return compile_function(api, contract, contract.functions[0], types)


def echoing(type_name: str, declarations: str = "") -> tuple[Marshaller, HostTypes]:
    api = echo(type_name, declarations)
    types = HostTypes(api)
    return marshaller(api, types), types


def words(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def record_api() -> tuple[Marshaller, HostTypes]:
    types = SVC[: SVC.index("[[host_contract]]")]
    return echoing("Record", types)


@settings(steady, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], max_examples=150)
@given(apis(), st.data())
def test_any_values_of_any_description_survive(text: str, data: st.DataObject) -> None:
    api = parse(text, "drawn.toml")
    types = HostTypes(api)
    contract = api.host_contracts[0]
    for function in contract.functions:
        packers = compile_function(api, contract, function, types)
        args = tuple(data.draw(values(param.type, types)) for param in function.params)
        payload = packers.pack(args)
        assert len(payload) % 8 == 0 or len(payload) < 8 * len(args)
        if not isinstance(function.result, Void):
            echoed = marshaller(_echo_of(text, function.result.name), types)
            value = data.draw(values(function.result, types))
            result = echoed.pack((value,))
            assert bits(echoed.unpack(result)) == bits(value)
            assert bits(echoed.unpack(memoryview(result))) == bits(value)
        if len(args) == 1:
            same = marshaller(_echo_of(text, function.params[0].type.name), types)
            assert bits(same.unpack(payload)) == bits(args[0])


def _echo_of(text: str, type_name: str) -> Api:
    return echo(type_name, text[: text.index("[[host_contract]]")])


@settings(steady, suppress_health_check=[HealthCheck.too_slow], max_examples=150)
@given(apis(), st.data())
def test_no_result_does_more_than_a_typed_error(text: str, data: st.DataObject) -> None:
    api = parse(text, "drawn.toml")
    for packers in compile_contract(api, api.host_contracts[0]).values():
        small = st.integers(0, 64).map(lambda number: number.to_bytes(8, "little"))
        result = b"".join(data.draw(st.lists(small | st.binary(min_size=8, max_size=8), max_size=packers.out_size + 9)))
        for unpack in (packers.unpack, packers.unpack_views):
            try:
                unpack(result)
            except BadResult as error:
                assert error.code == 102
                assert packers.title in error.message
                assert "changed while" not in error.message


def test_payload_is_the_struct_and_behind_it_what_its_pointers_name() -> None:
    packers = compile_contract(svc(), svc().host_contracts[0])["mix"]
    payload = packers.pack((1, {"x": 1.5, "y": -2}, b"hello", 7))
    assert payload == (struct.pack("<B3xff4xQQQH6x", 1, 1.5, -2, 48, 5, 5, 7) + b"hello\0\0\0")
    assert (packers.fn_id, packers.out_size, packers.out_varies) == (2, 72, True)


def test_items_of_an_array_stand_before_what_they_hold() -> None:
    packers, _ = echoing("Array<StringView>")
    assert packers.pack((["a", "", "bcd"],)) == (
        words(16, 3) + words(64, 1, 72, 0, 72, 3) + b"a".ljust(8, b"\0") + b"bcd".ljust(8, b"\0")
    )


def test_nothing_is_packed_for_no_parameters_and_unpacked_for_no_result() -> None:
    text = '[[host_contract]]\nname = "host.x"\nversion = "1"\n[[host_contract.functions]]\nname = "f"\n'
    packers = marshaller(parse(text, "x.toml"))
    assert packers.pack(()) == b""
    assert packers.unpack(b"anything") is None
    assert (packers.out_size, packers.out_varies) == (0, False)
    with pytest.raises(ArgumentTypeError, match=r"^host\.x@1\.f: takes 0 arguments \(none\), not 1$"):
        packers.pack((1,))


@pytest.mark.parametrize("size", [0, 3 * MIB])
def test_strings_and_buffers_of_any_size_survive(size: int) -> None:
    text, _ = echoing("StringView")
    assert text.unpack(text.pack(("é" * size,))) == "é" * size
    blob, _ = echoing("Buffer")
    assert blob.unpack(blob.pack((bytes(size),))) == bytes(size)


def test_a_payload_over_the_limit_is_too_large() -> None:
    blob, _ = echoing("Buffer")
    with pytest.raises(TooLarge, match=f"args of {PAYLOAD_MAX + 24} bytes are over the limit of {PAYLOAD_MAX}"):
        blob.pack((bytes(PAYLOAD_MAX),))


def test_any_buffer_is_taken_and_a_view_is_given_on_request() -> None:
    blob, _ = echoing("Buffer")
    numbers = array.array("H", [1, 2, 3])
    for given_ in (bytearray(numbers.tobytes()), memoryview(numbers), numbers):
        assert blob.unpack(blob.pack((given_,))) == numbers.tobytes()
    assert blob.unpack(blob.pack((memoryview(b"abcdef")[::2],))) == b"ace"
    assert blob.unpack(blob.pack((memoryview(numbers)[:0],))) == b""
    payload = bytearray(blob.pack((b"abc",)))
    view = blob.unpack_views(memoryview(payload))
    payload[24] = ord("x")
    assert isinstance(view, memoryview)
    assert bytes(view) == b"xbc"


def test_structs_are_dataclasses_and_enums_are_enums() -> None:
    types = HostTypes(svc())
    record, mode, access = types.structs["Record"], types.enums["Mode"], types.enums["Access"]
    assert [field.name for field in dataclasses.fields(record)] == ["flag", "id", "label", "at", "mode", "blob"]
    assert [field.type for field in dataclasses.fields(record)] == [
        bool, int, str, types.structs["Point"], mode, bytes,
    ]  # fmt: skip
    assert not hasattr(record(True, 1, "", None, mode(0), b""), "__dict__")
    assert issubclass(mode, IntEnum)
    assert issubclass(access, IntFlag)
    assert (mode["Fast"], access["Read"] | access["Write"]) == (1, 3)
    assert mode.__doc__ == "Mode, as its api.toml declares it."
    assert types.of(echo("Array<u8>").host_contracts[0].functions[0].result) == list[int]
    assert types.of(Void()) is None


def test_plain_ints_are_taken_for_enums_and_dicts_for_structs() -> None:
    packers, types = record_api()
    record, point, mode = types.structs["Record"], types.structs["Point"], types.enums["Mode"]
    value = record(True, 1 << 63, "é", point(0.5, 1.0), mode(1), b"x")
    given_ = {"flag": True, "id": 1 << 63, "label": "é", "at": {"x": 0.5, "y": 1}, "mode": 1, "blob": b"x"}
    assert packers.pack((given_,)) == packers.pack((value,))
    assert packers.unpack(packers.pack((given_,))) == value


def test_flags_take_combinations_of_variants_and_remember_only_so_many() -> None:
    packers, types = echoing("Wide", FLAGS)
    wide = types.enums["Wide"]
    for value in (0, 1, (1 << 63) | 0xFFFF):
        result = packers.unpack(packers.pack((value,)))
        assert result == value
        assert type(result) is wide
    for value in range(2 * COMBINATIONS_MAX):
        assert packers.unpack(packers.pack((value,))) == value
    assert len(wide._value2member_map_) <= COMBINATIONS_MAX
    with pytest.raises(ValueError, match="invalid value"):
        wide(1 << 20)


class Lies(dict[str, Any]):
    """It is complete whenever somebody looks, but not when it is read."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)


SURROGATE = "StringView is UTF-8, which has no U+D800 (character 1)"
FIELDS = "its fields are x, s"
RELEASED = memoryview(b"")
RELEASED.release()
REFUSED: list[tuple[str, Any, type[ArgumentError], str]] = [
    ("u8", 256, ArgumentOverflowError, "value: int 256 is out of range of u8: 0..255"),
    ("i64", 1 << 63, ArgumentOverflowError, f"value: int {1 << 63} is out of range of i64: {-(1 << 63)}..{2**63 - 1}"),
    ("u64", -1, ArgumentOverflowError, f"value: int -1 is out of range of u64: 0..{2**64 - 1}"),
    ("u64", 1 << 999, ArgumentOverflowError, f"value: an int of 1000 bits is out of range of u64: 0..{2**64 - 1}"),
    ("Ptr", -1, ArgumentOverflowError, f"value: int -1 is out of range of Ptr: 0..{2**64 - 1}"),
    ("u8", True, ArgumentTypeError, "value: u8 takes an int, not bool True"),
    ("u8", 1.0, ArgumentTypeError, "value: u8 takes an int, not float 1.0"),
    ("u8", None, ArgumentTypeError, "value: u8 takes an int, not None"),
    ("f64", True, ArgumentTypeError, "value: f64 takes a float, not bool True"),
    ("f64", "1", ArgumentTypeError, "value: f64 takes a float, not str '1'"),
    ("f32", 1e39, ArgumentOverflowError,
     "value: float 1e+39 is out of range of f32: inf, nan and what its exponent holds"),
    ("bool", 1, ArgumentTypeError, "value: bool takes a bool, not int 1"),
    ("StringView", b"x" * 99, ArgumentTypeError,
     f"value: StringView takes a str, not bytes {b'x' * 60!r}..."),
    ("StringView", "x\ud800", ArgumentValueError, f"value: {SURROGATE}"),
    ("Buffer", "x", ArgumentTypeError, "value: Buffer takes bytes or another buffer, not str 'x'"),
    ("Buffer", RELEASED, ArgumentTypeError,
     "value: Buffer takes bytes or another buffer, not a value of type memoryview"),
    ("Wide", 1 << 20, ArgumentValueError,
     "value: Wide has no value int 1048576; it takes combinations of None0, Low, Top"),
    ("Wide", -1, ArgumentValueError, "value: Wide has no value int -1; it takes combinations of None0, Low, Top"),
    ("Wide", True, ArgumentTypeError, "value: Wide takes a Wide or its int, not bool True"),
    ("Wide", 1.0, ArgumentTypeError, "value: Wide takes a Wide or its int, not float 1.0"),
    ("Point", 5, ArgumentTypeError, "value: Point takes a Point or a dict of its fields, not int 5"),
    ("Point", {"x": 1}, ArgumentTypeError, f"value: Point lacks s; {FIELDS}"),
    ("Point", {"x": 1, "s": "", "t": 1}, ArgumentTypeError, f"value: Point has no t; {FIELDS}"),
    ("Point", {"x": "a", "s": ""}, ArgumentTypeError, "value.x: f32 takes a float, not str 'a'"),
    ("Array<u16>", {1}, ArgumentTypeError, "value: Array<u16> takes a list or tuple, not a value of type set"),
    ("Array<u16>", [1, 2, 3, 1 << 16], ArgumentOverflowError,
     "value[3]: int 65536 is out of range of u16: 0..65535"),
    ("Array<u16>", [True], ArgumentTypeError, "value[0]: u16 takes an int, not bool True"),
    ("Array<bool>", [True, 1], ArgumentTypeError, "value[1]: bool takes a bool, not int 1"),
    ("Array<u8>", [0] * (ARRAY_ITEMS_MAX + 1), ArgumentValueError,
     f"value: Array<u8> of {ARRAY_ITEMS_MAX + 1} items; the limit is {ARRAY_ITEMS_MAX}"),
    ("Array<Point>", [{"x": 1, "s": ""}, {"x": 1, "s": "x\ud800"}], ArgumentValueError, f"value[1].s: {SURROGATE}"),
    ("Array<Point>", [{"x": True, "s": ""}], ArgumentTypeError, "value[0].x: f32 takes a float, not bool True"),
    ("Bag", {"n": True, "items": []}, ArgumentTypeError, "value.n: u8 takes an int, not bool True"),
]  # fmt: skip


@pytest.mark.parametrize(("type_name", "value", "error_class", "text"), REFUSED)
def test_bad_value_is_refused_by_path_type_value_and_range(
    type_name: str, value: Any, error_class: type[ArgumentError], text: str
) -> None:
    packers, _ = echoing(type_name, FLAGS + POINT + BAG)
    with pytest.raises(error_class) as caught:
        packers.pack((value,))
    assert type(caught.value) is error_class
    assert str(caught.value) == f"host.echo@1.echo: {text}"
    assert caught.value.path == text[: text.index(": ")]
    assert caught.value.__context__ is None


def test_value_of_an_enum_without_flags_is_one_of_its_variants() -> None:
    packers, types = record_api()
    point = {"x": 0, "y": 0}
    with pytest.raises(ArgumentValueError, match=r"value\.mode: Mode has no value int 2; it takes Slow, Fast$"):
        packers.pack(({"flag": True, "id": 1, "label": "", "at": point, "mode": 2, "blob": b""},))
    incomplete = object.__new__(types.structs["Record"])
    with pytest.raises(ArgumentTypeError, match=r"value: Record lacks flag, id, label, at, mode, blob; its fields"):
        packers.pack((incomplete,))


@pytest.mark.parametrize(("args", "given_"), [((), "0"), ((1, 2), "2"), (None, "None")])
def test_wrong_number_of_arguments_is_a_type_error(args: Any, given_: str) -> None:
    packers, _ = echoing("u8")
    with pytest.raises(TypeError, match=rf"^host\.echo@1\.echo: takes 1 argument \(value\), not {given_}$"):
        packers.pack(args)


def test_a_value_that_is_another_at_each_look_is_refused_all_the_same() -> None:
    packers, _ = echoing("Point", POINT)

    class Shifty:
        looks = 0

        def __index__(self) -> int:
            self.looks += 1
            return 256 if self.looks == 1 else 1

    numbers, _ = echoing("u8")
    with pytest.raises(ArgumentTypeError, match="an argument changed while it was read"):
        numbers.pack((Shifty(),))
    with pytest.raises(ArgumentTypeError, match="an argument changed while it was read"):
        packers.pack((Lies(x=1.0, s=""),))


def test_long_lists_of_names_are_cut() -> None:
    variants = ", ".join(f'{{ name = "V{number}", value = "{number}" }}' for number in range(9))
    packers, _ = echoing("Many", f'[[enum]]\nname = "Many"\nrepr = "u8"\nvariants = [{variants}]\n')
    with pytest.raises(ValueError, match=r"it takes V0, V1, V2, V3, V4, V5, V6, V7, \.\.\.$"):
        packers.pack((9,))


def test_values_are_shown_short() -> None:
    assert shown("x" * 61) == f"str {'x' * 60!r}..."
    assert shown("x" * 60) == f"str {'x' * 60!r}"
    assert shown([1]) == "a value of type list"


BAD_RESULTS: list[tuple[str, bytes, str]] = [
    ("u64", bytes(7), "it has 7 bytes, but u64 has 8"),
    ("bool", b"\2", "2 is no bool"),
    ("Wide", words(1 << 20), "1048576 is no value of Wide"),
    ("StringView", words(16, 1), "StringView of 1 bytes at offset 16 is outside the 16 bytes of the result"),
    ("StringView", words(2**64 - 1, 2), f"StringView of 2 bytes at offset {2**64 - 1} is outside"),
    ("StringView", words(0, 2**64 - 1), f"StringView of {2**64 - 1} bytes at offset 0 is outside"),
    ("StringView", words(16, 1) + b"\xff", "StringView is no UTF-8: invalid start byte at byte 0"),
    ("Buffer", words(17, 8, 8), "Buffer of 8 bytes at offset 17 is outside the 24 bytes of the result"),
    ("Point", bytes(8) + words(1, 99), "s: StringView of 99 bytes at offset 1 is outside the 24 bytes of the result"),
    ("Array<u16>", words(16, 1), "Array<u16> of 2 bytes at offset 16 is outside the 16 bytes of the result"),
    ("Array<u16>", words(0, 1 << 40), f"Array<u16> of {1 << 40} items; the limit is {ARRAY_ITEMS_MAX}"),
    ("Array<bool>", words(16, 2) + b"\1\3", "[1]: 3 is no bool"),
    ("Array<Point>", words(16, 1) + bytes(8) + words(0, 41), "[0].s: StringView of 41 bytes at offset 0 is outside"),
    (
        "Array<StringView>",
        words(16, 3) + words(0, 64, 0, 64, 0, 64),
        "[0]: StringView of 64 bytes: ranges name more than 64 bytes in all",
    ),
]


@pytest.mark.parametrize(("type_name", "result", "text"), BAD_RESULTS)
def test_bad_result_is_refused_naming_contract_function_and_field(type_name: str, result: bytes, text: str) -> None:
    packers, _ = echoing(type_name, FLAGS + POINT)
    for unpack in (packers.unpack, packers.unpack_views):
        with pytest.raises(BadResult) as caught:
            unpack(result)
        assert caught.value.message.startswith(f"host.echo@1.echo returned what is no {type_name}: {text}")
        assert (caught.value.code, caught.value.began) == (102, "yes")
        assert isinstance(caught.value, HostContractCallFailed)


def test_empty_values_may_point_to_nothing_and_cap_is_not_read() -> None:
    assert echoing("StringView")[0].unpack(words(0, 0)) == ""
    assert echoing("Array<u16>")[0].unpack(words(0, 0)) == []
    assert echoing("Array<StringView>")[0].unpack(words(0, 0)) == []
    assert echoing("Buffer")[0].unpack(words(24, 1, 0) + b"x") == b"x"


def test_result_that_changes_between_two_looks_is_refused() -> None:
    packers, _ = echoing("bool")
    result = echo("bool").host_contracts[0].functions[0].result
    error = ResultCheck(result, "host.echo@1.echo").explain(packers.pack((True,)))
    assert error.message == "host.echo@1.echo returned what is no bool: it changed while it was read"


def test_functions_of_one_contract_share_their_types() -> None:
    api = svc()
    types = HostTypes(api)
    packers = compile_contract(api, api.host_contracts[0], types)
    assert list(packers) == ["scale", "upper", "mix", "open"]
    access = types.enums["Access"]
    assert packers["open"].unpack(struct.pack("<I", 3)) is access(3)
    alone = compile_function(api, api.host_contracts[0], api.host_contracts[0].functions[3])
    assert alone.unpack(struct.pack("<I", 3)) == 3
    assert isinstance(api.structs[0], Struct)


def test_time_of_a_record_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    packers, types = record_api()
    record, point = types.structs["Record"], types.structs["Point"]
    args = (record(True, 2**64 - 1, "label", point(1.5, 2.5), types.enums["Mode"](1), b"hello"),)
    payload = packers.pack(args)
    count = 2_000
    pack_us = min(timeit.repeat(lambda: packers.pack(args), number=count, repeat=5)) / count * 1e6
    unpack_us = min(timeit.repeat(lambda: packers.unpack(payload), number=count, repeat=5)) / count * 1e6
    with capsys.disabled():
        print(f"\na record of 9 fields: packed in {pack_us:.2f} us, unpacked in {unpack_us:.2f} us")
    assert packers.unpack(payload) == args[0]


EVERY = """
[[types]]
name = "Every"
fields = [{ name = "w", type = "Wide" }, { name = "b", type = "Buffer" }, { name = "a", type = "Array<bool>" },
          { name = "p", type = "Point" }, { name = "last", type = "bool" }]
"""


def test_last_field_is_found_behind_good_ones_of_every_kind() -> None:
    packers, _ = echoing("Every", FLAGS + POINT + EVERY)
    value = {"w": 1, "b": b"b", "a": [True, False], "p": {"x": 1, "s": "s"}, "last": True}
    payload = bytearray(packers.pack((value,)))
    with pytest.raises(ArgumentTypeError, match=r"value\.last: bool takes a bool, not int 1$"):
        packers.pack(({**value, "last": 1},))
    payload[packers.out_size - 8] = 9
    with pytest.raises(BadResult, match=r"returned what is no Every: last: 9 is no bool$"):
        packers.unpack(bytes(payload))
