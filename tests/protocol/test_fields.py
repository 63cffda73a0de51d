"""Control messages on the wire: what is declared is what is taken, and anything else is a ProtocolError."""

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luacell.protocol import messages
from luacell.protocol.codec import pack, unpack
from luacell.protocol.errors import ProtocolError, TooLarge
from luacell.protocol.fields import decode, encode
from luacell.protocol.headers import PREAMBLE, PREAMBLE_SIZE, Op, head
from luacell.protocol.limits import CALLS_PER_MESSAGE_MAX, MESSAGE_MAX, MIB, SOURCE_MAX
from tests.protocol.golden import EXAMPLES
from tests.protocol.support import FIELDS, MESSAGES, edges, message_strategy, steady, wanted


def example(op: Op) -> Any:
    return next(iter(EXAMPLES[op].values()))


def values_of(op: Op) -> dict[str, Any]:
    values: dict[str, Any] = unpack(encode(example(op))[PREAMBLE_SIZE:])
    return values


def message_with(op: Op, values: object, count: int = 1) -> bytes:
    return head(op, count) + pack(values)


@pytest.mark.parametrize("op", MESSAGES, ids=lambda op: op.name)
def test_message_survives_encoding(op: Op) -> None:
    @steady
    @given(message_strategy(op))
    def survives(message: Any) -> None:
        assert decode(type(message), encode(message)) == message

    survives()


@pytest.mark.parametrize(("op", "name"), FIELDS, ids=lambda part: str(getattr(part, "name", part)))
def test_field_takes_what_its_declaration_says_and_nothing_else(op: Op, name: str) -> None:
    words = wanted(op, name)
    accepted, refused = edges(words)
    for value in accepted:
        if len(pack(value)) < MESSAGE_MAX - 64 * 1024:
            data = message_with(op, values_of(op) | {name: value})
            assert getattr(decode(MESSAGES[op], data), name) == value
    for value in refused:
        data = message_with(op, values_of(op) | {name: value})
        with pytest.raises(ProtocolError) as caught:
            decode(MESSAGES[op], data)
        assert str(caught.value).startswith(f"{op.name}.{name} is ")
        assert str(caught.value).endswith(f", not {words}")
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(("op", "name"), FIELDS, ids=lambda part: str(getattr(part, "name", part)))
def test_missing_field_is_named(op: Op, name: str) -> None:
    values = values_of(op)
    del values[name]
    with pytest.raises(ProtocolError) as caught:
        decode(MESSAGES[op], message_with(op, values))
    assert str(caught.value) == f"{op.name} has missing fields ['{name}'] and unknown fields []"


@pytest.mark.parametrize("op", MESSAGES, ids=lambda op: op.name)
def test_unknown_field_is_named(op: Op) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(MESSAGES[op], message_with(op, values_of(op) | {"colour": 1}))
    assert str(caught.value) == f"{op.name} has missing fields [] and unknown fields ['colour']"


def test_unknown_fields_of_both_key_types_are_named() -> None:
    with pytest.raises(ProtocolError, match=r"unknown fields \[b'x', 'y'\]"):
        decode(messages.Bye, message_with(Op.BYE, {b"x": 1, "y": 2}))


def test_a_few_of_many_unknown_fields_are_named() -> None:
    values = {f"field_{number}": number for number in range(4000)}
    with pytest.raises(ProtocolError, match=r"\['field_0', .*, 'field_4', \.\.\.\]$") as caught:
        decode(messages.Bye, message_with(Op.BYE, values))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("values", [None, 1, "role", b"", [], ["role", "host"]])
def test_message_that_carries_no_map_is_refused(values: object) -> None:
    with pytest.raises(ProtocolError, match=f"HELLO carries {type(values).__name__}, not a map"):
        decode(messages.Hello, message_with(Op.HELLO, values))


def test_message_of_another_operation_is_refused() -> None:
    with pytest.raises(ProtocolError, match="operation MAPPED in place of GIVE_BACK"):
        decode(messages.GiveBack, encode(messages.Mapped(arena=1, index=2)))


@pytest.mark.parametrize("count", [2, CALLS_PER_MESSAGE_MAX])
def test_control_message_with_a_count_is_refused(count: int) -> None:
    with pytest.raises(ProtocolError, match=f"BYE has count {count}; a control message has 1"):
        decode(messages.Bye, message_with(Op.BYE, {}, count))


@pytest.mark.parametrize("op", MESSAGES, ids=lambda op: op.name)
def test_truncated_message_is_refused_at_every_byte(op: Op) -> None:
    data = encode(example(op))
    for size in range(len(data)):
        with pytest.raises(ProtocolError):
            decode(MESSAGES[op], data[:size])
    with pytest.raises(ProtocolError):
        decode(MESSAGES[op], data + b"\x00")


@steady
@given(st.sampled_from(list(MESSAGES)), st.binary(max_size=100))
def test_random_bytes_give_a_protocol_error(op: Op, data: bytes) -> None:
    for message in (data, head(op) + data):
        try:
            decode(MESSAGES[op], message)
        except ProtocolError:
            continue
        assert op is Op.BYE
        assert data == b"\x80"


@steady
@given(st.sampled_from(list(MESSAGES)), st.data())
def test_a_flipped_bit_gives_a_valid_message_or_a_protocol_error(op: Op, data: st.DataObject) -> None:
    message = bytearray(encode(example(op)))
    bit = data.draw(st.integers(0, 8 * len(message) - 1))
    message[bit // 8] ^= 1 << bit % 8
    try:
        decoded = decode(MESSAGES[op], bytes(message))
    except ProtocolError:
        return
    assert decode(MESSAGES[op], encode(decoded)) == decoded


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"role": "\x00" * (4 * MIB), "version": 1},
        lambda: {"role": "host", "version": 1, "\x00" * (4 * MIB): 1},
        lambda: {"role": [[""] * 1000] * 15, "version": 1},
    ],
    ids=["a large value", "a large key", "many values"],
)
def test_refusing_a_large_message_costs_little_more_than_decoding_it(make: Callable[[], Any]) -> None:
    data = message_with(Op.HELLO, make())
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError) as caught:
            decode(messages.Hello, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(data) + MIB
    assert len(str(caught.value)) < 250


def test_refusing_a_deep_value_does_not_recurse_through_it() -> None:
    def from_depth(depth: int, data: bytes) -> Any:
        return from_depth(depth - 1, data) if depth else decode(messages.Hello, data)

    nested: list[Any] = []
    for _ in range(500):
        nested = [nested]
    data = message_with(Op.HELLO, {"role": nested, "version": 1})
    depth = sys.getrecursionlimit() - len(_frames()) - 60
    with pytest.raises(ProtocolError, match=r"HELLO\.role is a list of 1 items, not text"):
        from_depth(depth, data)


def _frames() -> list[Any]:
    frame, frames = sys._getframe(), []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return frames


@pytest.mark.parametrize("version", [0, 2, 255])
def test_message_of_another_version_is_refused(version: int) -> None:
    data = PREAMBLE.pack(b"LC", version, Op.BYE, 1, 0) + pack({})
    with pytest.raises(ProtocolError, match=rf"protocol version {version} is outside 1\.\.1"):
        decode(messages.Bye, data)


def test_message_that_no_peer_would_take_is_not_sent() -> None:
    register = replace(EXAMPLES[Op.REGISTER]["by its id alone"], source=b"x" * SOURCE_MAX)
    assert len(encode(register)) <= MESSAGE_MAX
    both = replace(register, modules={"all": b"x" * (SOURCE_MAX - 3)})
    with pytest.raises(TooLarge, match=f"REGISTER of .* bytes is over the limit of {MESSAGE_MAX}") as caught:
        encode(both)
    assert caught.value.began == "no"
    assert caught.value.limit == f"{MESSAGE_MAX} bytes"
