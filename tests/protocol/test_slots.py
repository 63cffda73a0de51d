"""Slots: offsets that all sides agree on, and strides that waste little."""

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luacell.protocol.limits import ERROR_TEXT_MAX, MIB, PAYLOAD_MAX, SLOTS_PER_SEGMENT_MAX
from luacell.protocol.slots import (
    ARGS_STRIDE_MIN,
    OUT_STRIDE_MIN,
    PAGE,
    PAYLOAD_OFFSET,
    SLOT_SHIFT,
    WITHDRAWN_OFFSET,
    Answer,
    SlotShape,
    read_answer,
    stride_for,
    write_generation,
    write_withdrawn,
)
from tests.protocol.support import steady


class ArgsWords(ctypes.LittleEndianStructure):
    _fields_ = (
        ("generation", ctypes.c_uint64),
        ("rest_of_line", ctypes.c_uint8 * 56),
        ("withdrawn", ctypes.c_uint64),
        ("rest_of_next_line", ctypes.c_uint8 * 56),
        ("payload", ctypes.c_uint8 * 0),
    )


class OutWords(ctypes.LittleEndianStructure):
    _fields_ = (
        ("begun", ctypes.c_uint64),
        ("done", ctypes.c_uint64),
        ("code", ctypes.c_uint32),
        ("out_size", ctypes.c_uint32),
        ("error_size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu_us", ctypes.c_uint64),
        ("rest_of_lines", ctypes.c_uint8 * 88),
        ("payload", ctypes.c_uint8 * 0),
    )


def test_words_of_the_host_and_of_the_broker_lie_in_lines_of_their_own() -> None:
    assert ArgsWords.generation.offset == 0
    assert ArgsWords.withdrawn.offset == WITHDRAWN_OFFSET == 64
    assert ArgsWords.payload.offset == PAYLOAD_OFFSET == 128


def test_payload_lies_behind_the_workers_words() -> None:
    assert OutWords.payload.offset == PAYLOAD_OFFSET


U64 = st.integers(0, 2**64 - 1)


@steady
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 3))
def test_host_and_broker_write_their_words_and_nothing_else(generation: int, sequence: int, position: int) -> None:
    stride = 2 * ctypes.sizeof(ArgsWords)
    memory = bytearray(b"\xee" * 4 * stride)
    offset = position * stride
    write_generation(memoryview(memory), offset, generation)
    write_withdrawn(memoryview(memory), offset, sequence)
    words = ArgsWords.from_buffer_copy(memory, offset)
    assert (words.generation, words.withdrawn) == (generation, sequence)
    memory[offset : offset + 8] = memory[offset + 64 : offset + 72] = b"\xee" * 8
    assert memory == b"\xee" * len(memory)


@steady
@given(
    st.tuples(*2 * [st.integers(0, 2**64 - 1)], *4 * [st.integers(0, 2**32 - 1)], st.integers(0, 2**64 - 1)),
    st.integers(0, 100),
)
def test_answer_is_read_where_the_worker_wrote_it(values: tuple[int, ...], offset: int) -> None:
    memory = bytes(offset) + bytes(OutWords(*values)) + b"\xee"
    assert read_answer(memoryview(memory), offset) == Answer(*values)


@steady
@given(st.integers(0, PAYLOAD_MAX), st.sampled_from([ARGS_STRIDE_MIN, OUT_STRIDE_MIN]))
def test_stride_holds_the_payload_in_whole_pages_and_wastes_an_eighth_at_most(size: int, stride_min: int) -> None:
    stride = stride_for(size, stride_min)
    assert stride >= size + PAYLOAD_OFFSET
    assert stride >= stride_min
    assert stride % PAGE == 0
    least = max(size + PAYLOAD_OFFSET, stride_min)
    assert stride - least < max(PAGE, least / 8)


@pytest.mark.parametrize(
    ("size", "stride"),
    [
        (0, PAGE),
        (PAGE - PAYLOAD_OFFSET, PAGE),
        (PAGE - PAYLOAD_OFFSET + 1, 2 * PAGE),
        (64 * 1024, 72 * 1024),
        (64 * 1024 - PAYLOAD_OFFSET, 64 * 1024),
        (PAYLOAD_MAX - PAYLOAD_OFFSET, 64 * MIB),
        (PAYLOAD_MAX, 72 * MIB),
    ],
)
def test_strides_at_the_edges(size: int, stride: int) -> None:
    assert stride_for(size, ARGS_STRIDE_MIN) == stride


def test_slots_of_about_the_same_size_share_a_stride() -> None:
    strides = {stride_for(size, ARGS_STRIDE_MIN) for size in range(64 * 1024, 128 * 1024 - 128, 97)}
    assert len(strides) == 8


def test_smallest_out_slot_holds_the_longest_error_text() -> None:
    assert SlotShape.for_payloads(0, 0, 1).out_capacity >= ERROR_TEXT_MAX


@steady
@given(st.integers(0, PAYLOAD_MAX), st.integers(0, PAYLOAD_MAX), st.integers(1, SLOTS_PER_SEGMENT_MAX))
def test_shape_adds_up(args_size: int, out_size: int, count: int) -> None:
    shape = SlotShape.for_payloads(args_size, out_size, count)
    assert shape.args_capacity >= args_size
    assert shape.out_capacity >= out_size
    assert shape.args_bytes == count * shape.args_stride
    assert shape.out_bytes == count * shape.out_stride
    assert shape.total_bytes == shape.args_bytes + shape.out_bytes
    assert shape.args_stride < 1 << 32
    assert shape.out_stride < 1 << 32


@pytest.mark.parametrize("count", [0, SLOTS_PER_SEGMENT_MAX + 1])
def test_shape_of_no_slots_or_too_many_is_a_mistake(count: int) -> None:
    with pytest.raises(AssertionError):
        SlotShape.for_payloads(0, 0, count)


def test_slot_number_holds_pair_and_position() -> None:
    assert SLOTS_PER_SEGMENT_MAX <= 1 << SLOT_SHIFT
    assert 65535 << SLOT_SHIFT | (1 << SLOT_SHIFT) - 1 == 2**32 - 1
