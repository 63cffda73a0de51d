"""The codec: plain values only, and bounds that hold before memory is taken."""

import struct
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luacell.protocol.codec import pack, size_of, unpack
from luacell.protocol.errors import ProtocolError
from luacell.protocol.limits import MIB, NODES_MAX
from tests.protocol.support import plain_values, steady

MEMORY_MAX = 10 * MIB  # bytes that any message of at most 4 MiB may cost beyond itself
EMPTY_MAPS_1_MIB = (
    b"\xdd" + struct.pack(">I", 1 << 20) + b"\x80" * (1 << 20),
    b"\xdc\x04\x00" + (b"\xdc\x03\xfc" + b"\x80" * 1020) * 1024,
    b"\xde\x04\x00" + b"".join(b"\xcd%c%c\xdc\x03\xfc" % divmod(i, 256) + b"\x80" * 1020 for i in range(1024)),
)
BOMBS = {
    **{
        f"header of 2**32-1 ({mark:#x})": bytes([mark]) + b"\xff\xff\xff\xff" for mark in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)
    },
    **{
        f"header of 2**32-1 ({mark:#x}) with a little behind it": bytes([mark]) + b"\xff" * 4 + b"\x00" * 4096
        for mark in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)
    },
    **{f"header of 2**16-1 ({mark:#x})": bytes([mark]) + b"\xff\xff" for mark in (0xC5, 0xC8, 0xDA, 0xDC, 0xDE)},
    "100,000 nested arrays": b"\x91" * 100_000 + b"\x00",
    "100,000 nested maps": b"\x81\xa1k" * 100_000 + b"\x00",
    "100,000 nested arrays of 1024": b"\xdc\x04\x00" * 100_000,
    "1,000 nested arrays of 1024": b"\xdc\x04\x00" * 1000,
    "1,000 nested arrays of 4096": b"\xdc\x10\x00" * 1000,
    "1,000 nested maps of 4096": b"\xde\x10\x00\xa1k" * 1000,
    **{f"1 MiB of empty maps, way {way}": bomb for way, bomb in enumerate(EMPTY_MAPS_1_MIB)},
    "1 MiB of one-item arrays": b"\xdc\x04\x00" + (b"\xdc\x01\xfe" + b"\x91\xc0" * 510) * 1024,
    "more values than allowed": b"\xdc\x00\x14" + (b"\xdc\x04\x00" + b"\xc0" * 1024) * 20,
}


@steady
@given(plain_values())
def test_plain_values_survive(value: Any) -> None:
    assert unpack(pack(value)) == value


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", b"1", None, [1], {"1": 1}])
def test_types_survive(value: object) -> None:
    assert type(unpack(pack(value))) is type(value)


def test_a_memoryview_is_decoded_like_bytes() -> None:
    assert unpack(memoryview(pack({"a": b"b"}))) == {"a": b"b"}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_bomb_is_refused_before_it_costs_memory(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            unpack(bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_MAX


def test_nesting_that_is_too_deep_is_named() -> None:
    with pytest.raises(ProtocolError, match="nested too deep"):
        unpack(b"\x91" * 100_000)


def test_values_are_counted_over_all_containers() -> None:
    row = [None] * 999
    assert unpack(pack([row] * 19)) == [row] * 19
    with pytest.raises(ProtocolError, match=f"more than {NODES_MAX} values in one message"):
        unpack(pack([row] * 20))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x00\x00",
        b"\xa5abc",
        b"\xa2\xff\xfe",
        b"\xa3\xed\xa0\x80",
        b"\x81\x01\x02",
        b"\x81\xc0\x02",
        b"\x81\x90\x02",
        b"\xd4\x05\x00",
        b"\xc7\x00\x05",
        b"\xc7\x00\xff",
        b"\xd6\xff\x00\x00\x00\x00",
        b"\xd7\xff" + b"\xff" * 8,
        b"\xc7\x0c\xff" + b"\xff" * 12,
    ],
    ids=[
        "nothing",
        "a byte that msgpack never uses",
        "trailing bytes",
        "a short text",
        "a text that is not UTF-8",
        "a lone surrogate",
        "an integer as key",
        "nil as key",
        "an array as key",
        "an extension",
        "an empty extension",
        "an empty timestamp",
        "a timestamp of 4 bytes",
        "a timestamp of 8 bytes",
        "a timestamp of 12 bytes",
    ],
)
def test_malformed_data_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed msgpack"):
        unpack(data)


@steady
@given(st.binary(max_size=200))
def test_random_bytes_give_a_value_or_a_protocol_error(data: bytes) -> None:
    try:
        unpack(data)
    except ProtocolError as error:
        assert len(str(error)) < 300


@steady
@given(plain_values(), st.data())
def test_truncated_data_is_refused(value: Any, data: st.DataObject) -> None:
    packed = pack(value)
    with pytest.raises(ProtocolError):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])


# -- the size of a value in a buffer that holds more ---------------------------------------------------------
@steady
@given(plain_values(), st.binary(max_size=50))
def test_size_of_a_value_is_known_whatever_lies_behind_it(value: Any, rest: bytes) -> None:
    assert size_of(pack(value) + rest) == len(pack(value))


@steady
@given(plain_values(), st.data())
def test_value_that_is_cut_off_has_no_size(value: Any, data: st.DataObject) -> None:
    packed = pack(value)
    with pytest.raises(ProtocolError, match="malformed msgpack"):
        size_of(packed[: data.draw(st.integers(0, len(packed) - 1))])


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_finding_a_size_costs_no_memory(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with suppress(ProtocolError):
            assert size_of(bomb) <= len(bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_MAX
