"""Real pointers become offsets and back, and nothing that a pointer says is believed."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luacell.client.typed import HostTypes, compile_function
from luacell.client.typed.pointers import gather, pointers_of_arguments, pointers_of_result, settle
from luacell.protocol.api import Struct, parse
from luacell.protocol.api.layout import FunctionLayout
from luacell.protocol.api.model import ARRAY_ITEMS_MAX, Field
from luacell.protocol.errors import BadResult, InvalidPointer, TooLarge
from luacell.protocol.limits import PAYLOAD_MAX
from tests.protocol.support import steady
from tests.support.apis import apis, bits, echo, values

BASE = 0x7F00_0000_1000
TITLE = "host.echo@1.echo"
RECORD = '[[types]]\nname = "R"\nfields = [{ name = "s", type = "StringView" }, { name = "b", type = "Buffer" }]\n'


def words(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def reading(memory: bytes) -> Any:
    def read(address: int, size: int) -> bytes:
        assert 0 <= address - BASE <= len(memory) - size
        return memory[address - BASE : address - BASE + size]

    return read


def pointers(type_name: str, declarations: str = "") -> Any:
    function = echo(type_name, declarations).host_contracts[0].functions[0]
    assert pointers_of_arguments(function)[0].offset == pointers_of_result(function.result)[0].offset
    return pointers_of_result(function.result)


def refused_settling(payload: bytes, size: int, type_name: str, declarations: str = "") -> str:
    with pytest.raises(BadResult) as caught:
        settle(payload, size, pointers(type_name, declarations), TITLE).place(BASE)
    return caught.value.message


@steady
@given(apis(), st.data())
def test_values_survive_the_way_through_real_pointers(text: str, data: st.DataObject) -> None:
    api = parse(text, "drawn.toml")
    function = api.host_contracts[0].functions[0]
    arguments = Struct("Arguments", tuple(Field(param.name, param.type) for param in function.params))
    types = HostTypes(replace(api, structs=(*api.structs, arguments)))
    taking = compile_function(api, api.host_contracts[0], function, types)
    args = tuple(data.draw(values(param.type, types)) for param in function.params)
    payload, pointers = taking.pack(args), pointers_of_arguments(function)
    layout = FunctionLayout.of(function).args
    if layout is None:
        assert (payload, pointers) == (b"", ())
        return
    settled = settle(payload, layout.size, pointers, TITLE)
    settled.place(BASE)
    memory = bytes(settled.memory)
    again = gather(memory[: layout.size], pointers, reading(memory), TITLE)
    returning = compile_function(api, api.host_contracts[0], replace(function, result=arguments), types)
    assert bits(returning.unpack(again)) == bits(list(args))


def test_value_without_pointers_is_its_own_payload() -> None:
    assert gather(b"\1\2", (), reading(b""), TITLE) == b"\1\2"
    assert pointers_of_result(parse(VOID, "void.toml").host_contracts[0].functions[0].result) == ()


VOID = '[[host_contract]]\nname = "host.v"\nversion = "1"\n[[host_contract.functions]]\nname = "f"\n'


def test_strings_lie_behind_the_value_at_multiples_of_8() -> None:
    memory = b"hello, world"
    value = words(BASE, 5, BASE + 7, 5, 99)
    payload = gather(value, pointers("R", RECORD), reading(memory), TITLE)
    assert payload == words(40, 5, 48, 5, 5) + b"hello\0\0\0world\0\0\0"


def test_empty_string_gets_an_address_that_is_not_null() -> None:
    payload = gather(words(0, 0), pointers("StringView"), reading(b""), TITLE)
    assert payload == words(16, 0)
    settled = settle(payload, 16, pointers("StringView"), TITLE)
    settled.place(BASE)
    assert settled.memory == words(BASE, 0)


def test_buffer_is_lent_without_a_capacity() -> None:
    settled = settle(words(24, 3, 3) + b"abc", 24, pointers("Buffer"), TITLE)
    settled.place(BASE)
    assert settled.memory == words(BASE + 24, 3, 0) + b"abc"


def test_null_with_a_length_is_refused() -> None:
    with pytest.raises(InvalidPointer, match=r"echo: value\[\]\.s is NULL with a length of 3"):
        gather(words(BASE, 1), pointers_of_arguments(_array()), reading(words(0, 3, 0, 0, 0)), TITLE)


def _array() -> Any:
    return echo("Array<R>", RECORD).host_contracts[0].functions[0]


@pytest.mark.parametrize("count", [PAYLOAD_MAX, 1 << 63, (1 << 64) - 1])
def test_what_no_slot_takes_is_refused_before_it_is_read(count: int) -> None:
    with pytest.raises(TooLarge, match="over the limit"):
        gather(words(BASE, count), pointers("StringView"), reading(b""), TITLE)


def test_array_of_too_many_items_is_refused() -> None:
    with pytest.raises(TooLarge, match=f"of {ARRAY_ITEMS_MAX + 1} items is over the limit"):
        gather(words(BASE, ARRAY_ITEMS_MAX + 1), pointers("Array<u8>"), reading(b""), TITLE)


def test_range_outside_a_result_is_refused() -> None:
    assert "result of 9 bytes at 16 is outside the result of 24" in refused_settling(
        words(16, 9) + b"12345678", 16, "StringView"
    )
    assert "are outside the result's 16" in refused_settling(words(16, 1), 16, "Array<u8>")
    assert "result is NULL with a length of 1" in refused_settling(words(0, 1), 16, "Array<u8>")
    assert "has 8 bytes, not 16" in refused_settling(words(16), 16, "StringView")


def test_items_that_name_the_same_bytes_twice_are_refused() -> None:
    item = words(8, 40, 0, 0, 0)  # the array's items name the whole result, themselves included
    assert "are outside the result's" in refused_settling(words(16, 1) + item, 16, "Array<R>", RECORD)


def test_items_over_the_value_itself_are_laid_out_anew() -> None:
    settled = settle(words(8, 2, 77), 16, pointers("Array<u64>"), TITLE)
    settled.place(BASE)
    assert settled.memory == words(BASE + 16, 2, 2, 77)
