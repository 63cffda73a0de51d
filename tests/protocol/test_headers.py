"""The hot records: their layout to the byte, as Python, ctypes and the worker's LuaJIT see it."""

import ctypes
import re
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lupa import luajit21 as lupa

from luacell.protocol import headers, messages
from luacell.protocol.errors import ProtocolError
from luacell.protocol.fields import encode, size_of
from luacell.protocol.headers import (
    DONE,
    EXECUTE,
    PREAMBLE,
    PREAMBLE_SIZE,
    VERSION,
    VERSION_MIN,
    Op,
    encode_inline,
    encode_records,
    head,
    inline_size,
    parse_inline,
    parse_preamble,
    parse_records,
)
from luacell.protocol.limits import CALLS_PER_MESSAGE_MAX, ERROR_TEXT_MAX, INLINE_PIECE, MESSAGE_MAX
from luacell.protocol.slots import _ANSWER, PAYLOAD_OFFSET, WITHDRAWN_OFFSET, Answer
from tests.protocol.support import MESSAGES, RECORDS, record_strategy, steady

U64, U32 = ctypes.c_uint64, ctypes.c_uint32

OPERATIONS = {
    "HELLO": 1,
    "CALL": 2,
    "CANCEL": 3,
    "MAPPED": 4,
    "GIVE_BACK": 5,
    "BYE": 6,
    "REGISTER": 7,
    "UNREGISTER": 8,
    "LIST": 9,
    "HEALTH": 10,
    "LEASE": 11,
    "CALL_INLINE": 12,
    "DESCRIBE": 13,
    "COMMIT": 14,
    "REVIVE": 15,
    "CRASHES": 16,
    "CRASH": 17,
    "WELCOME": 32,
    "RESULT": 33,
    "FAILURE": 34,
    "RELEASED": 35,
    "REPLY": 36,
    "SEGMENT": 37,
    "RESULT_INLINE": 38,
    "PROBE": 39,
    "LOAD": 64,
    "EXECUTE": 65,
    "UNMAP": 66,
    "MAP": 67,
    "SAVE": 68,
    "RESTORE": 69,
    "FORGET": 70,
    "READY": 96,
    "LOADED": 97,
    "DONE": 98,
    "SAVED": 99,
    "RESTORED": 100,
    "START": 128,
    "KILL": 129,
    "END": 130,
    "INSPECT": 131,
    "STARTED": 160,
    "EXITED": 161,
    "LEAVING": 162,
    "OUTPUT": 163,
    "INSPECTED": 164,
    "PIECE": 192,
    "MORE": 193,
}


class Preamble(ctypes.LittleEndianStructure):
    _fields_ = (
        ("magic", ctypes.c_char * 2),
        ("version", ctypes.c_uint8),
        ("op", ctypes.c_uint8),
        ("count", ctypes.c_uint16),
        ("reserved", ctypes.c_uint16),
    )


class CallRecord(ctypes.LittleEndianStructure):
    _fields_ = (
        ("call_id", U64),
        ("contract_id", U64),
        ("fn_id", U32),
        ("budget_us", U32),
        ("arena", U32),
        ("slot", U32),
        ("generation", U32),
        ("flags", U32),
        ("args_size", U32),
        ("out_size", U32),
    )


class ExecuteRecord(ctypes.LittleEndianStructure):
    _fields_ = (
        ("sequence", U64),
        ("deadline_ns", U64),
        ("fn_id", U32),
        ("limit_us", U32),
        ("arena", U32),
        ("slot", U32),
        ("generation", U32),
        ("flags", U32),
        ("args_size", U32),
        ("out_size", U32),
        ("reserved", U64),
    )


class DoneRecord(ctypes.LittleEndianStructure):
    _fields_ = (("sequence", U64), ("code", U32), ("out_size", U32), ("error_size", U32), ("flags", U32))


class ResultRecord(ctypes.LittleEndianStructure):
    _fields_ = (("call_id", U64), ("code", U32), ("out_size", U32), ("error_size", U32), ("flags", U32))


class CallInlineRecord(ctypes.LittleEndianStructure):
    _fields_ = (
        ("call_id", U64),
        ("contract_id", U64),
        ("fn_id", U32),
        ("budget_us", U32),
        ("flags", U32),
        ("args_size", U32),
        ("out_size", U32),
        ("api_sum", U32),
    )


class PieceRecord(ctypes.LittleEndianStructure):
    _fields_ = (("call_id", U64), ("offset", U32), ("size", U32))


class MoreRecord(ctypes.LittleEndianStructure):
    _fields_ = (("call_id", U64), ("offset", U32), ("reserved", U32))


class CallIdRecord(ctypes.LittleEndianStructure):
    _fields_ = (("call_id", U64),)


C_RECORDS: dict[Op, type[ctypes.LittleEndianStructure]] = {
    Op.CALL: CallRecord,
    Op.EXECUTE: ExecuteRecord,
    Op.DONE: DoneRecord,
    Op.RESULT: ResultRecord,
    Op.CANCEL: CallIdRecord,
    Op.RELEASED: CallIdRecord,
    Op.CALL_INLINE: CallInlineRecord,
    Op.RESULT_INLINE: ResultRecord,
    Op.PIECE: PieceRecord,
    Op.MORE: MoreRecord,
}


def offsets(structure: type[ctypes.Structure]) -> dict[str, tuple[int, int]]:
    descriptors = {name: getattr(structure, name) for name, *_ in structure._fields_}
    return {name: (descriptor.offset, descriptor.size) for name, descriptor in descriptors.items()}


def test_operations_keep_their_numbers() -> None:
    assert {op.name: int(op) for op in Op} == OPERATIONS


def test_preamble_is_eight_bytes_as_c_lays_them_out() -> None:
    assert PREAMBLE_SIZE == ctypes.sizeof(Preamble) == 8
    seen = Preamble.from_buffer_copy(head(Op.CALL, 0x0102))
    assert (seen.magic, seen.version, seen.op, seen.count, seen.reserved) == (b"LC", 1, 2, 0x0102, 0)
    assert head(Op.CALL, 0x0102) == bytes.fromhex("4c43 01 02 0201 0000")


@pytest.mark.parametrize("op", RECORDS, ids=lambda op: op.name)
def test_record_has_the_names_and_the_size_that_c_gives_it(op: Op) -> None:
    record_class, layout = RECORDS[op]
    assert tuple(offsets(C_RECORDS[op])) == record_class._fields
    assert layout.size == ctypes.sizeof(C_RECORDS[op])


@pytest.mark.parametrize("op", RECORDS, ids=lambda op: op.name)
def test_record_lies_in_memory_as_c_lays_it_out(op: Op) -> None:
    @steady
    @given(record_strategy(op))
    def agrees(values: tuple[int, ...]) -> None:
        data = encode_records(op, [values])
        seen = C_RECORDS[op].from_buffer_copy(data, PREAMBLE_SIZE)
        assert tuple(getattr(seen, name) for name in RECORDS[op][0]._fields) == values

    agrees()


@pytest.mark.parametrize(
    ("op", "size"),
    [
        (Op.CALL, 48),
        (Op.EXECUTE, 56),
        (Op.DONE, 24),
        (Op.RESULT, 24),
        (Op.CANCEL, 8),
        (Op.CALL_INLINE, 40),
        (Op.PIECE, 16),
        (Op.MORE, 16),
    ],
)
def test_record_sizes_are_what_their_descriptions_say(op: Op, size: int) -> None:
    assert RECORDS[op][1].size == size


@pytest.mark.parametrize("op", RECORDS, ids=lambda op: op.name)
def test_records_survive_encoding(op: Op) -> None:
    @steady
    @given(st.lists(record_strategy(op), min_size=1, max_size=8))
    def survive(records: list[tuple[int, ...]]) -> None:
        data = encode_records(op, records)
        assert parse_preamble(data) == (op, len(records))
        assert list(parse_records(op, len(records), data)) == records

    survive()


def test_a_message_holds_at_most_1024_records() -> None:
    records: list[tuple[int, ...]] = [(number,) for number in range(CALLS_PER_MESSAGE_MAX)]
    data = encode_records(Op.CANCEL, records)
    assert list(parse_records(*parse_preamble(data), data)) == records
    with pytest.raises(AssertionError):
        encode_records(Op.CANCEL, [*records, (0,)])
    with pytest.raises(AssertionError):
        encode_records(Op.CANCEL, [])


# -- the worker's LuaJIT -------------------------------------------------------------------------------------
PRELUDE = "".join(
    item.read_text() for item in files("luacell.worker").joinpath("lua").iterdir() if item.name.endswith(".lua")
)


@pytest.fixture(scope="module")
def layout_of() -> Any:
    """A function that gives LuaJIT's size and offsets of one of the prelude's C structures."""
    lua = lupa.LuaRuntime()
    declarations = re.findall(r"ffi\.cdef \[\[(.*?)\]\]", PRELUDE, re.DOTALL)
    lua.execute("require('ffi').cdef(...)", "\n".join(declarations))
    return lua.eval(
        """function(name, fields)
             local ffi, found = require('ffi'), {}
             for field in fields:gmatch('%S+') do
               local offset = ffi.offsetof(name, field)
               local value = offset and ffi.new(name)[field]
               found[field] = offset and (offset .. ' ' .. (type(value) == 'cdata' and 8 or 4)) or 'missing'
             end
             return ffi.sizeof(name), found
           end"""
    )


@pytest.mark.parametrize(("name", "structure"), [("luacell_execute", ExecuteRecord), ("luacell_done", DoneRecord)])
def test_worker_lays_records_out_as_the_broker_does(
    layout_of: Any, name: str, structure: type[ctypes.LittleEndianStructure]
) -> None:
    size, found = layout_of(name, " ".join(offsets(structure)))
    assert size == ctypes.sizeof(structure)
    assert dict(found) == {field: f"{offset} {width}" for field, (offset, width) in offsets(structure).items()}


def test_worker_lays_answers_out_as_the_broker_reads_them(layout_of: Any) -> None:
    size, found = layout_of("luacell_answer", " ".join(Answer._fields))
    assert size == _ANSWER.size == 40
    assert dict(found) == {
        "begun": "0 8",
        "done": "8 8",
        "code": "16 4",
        "out_size": "20 4",
        "error_size": "24 4",
        "flags": "28 4",
        "cpu_us": "32 8",
    }
    assert _ANSWER.format == "<QQIIIIQ"


def test_worker_knows_the_same_numbers() -> None:
    known: dict[str, int] = {}
    for names, values in re.findall(r"^local ([A-Z_, ]+) = ([0-9, ]+)(?: --.*)?$", PRELUDE, re.MULTILINE):
        known |= dict(zip(names.split(", "), map(int, values.split(", ")), strict=True))
    expected = {
        "RETIRE": headers.RETIRE,
        "NOT_BEGUN": headers.NOT_BEGUN,
        "RECYCLE": headers.RECYCLE,
        "HAS_ARGS": headers.HAS_ARGS,
        "HAS_OUT": headers.HAS_OUT,
        "PAYLOAD": PAYLOAD_OFFSET,
        "WITHDRAWN": WITHDRAWN_OFFSET,
        "ERROR_TEXT_MAX": ERROR_TEXT_MAX,
    }
    assert {name: known.get(name) for name in expected} == expected


def test_execute_and_done_have_the_formats_that_the_worker_copies() -> None:
    assert (EXECUTE.format, DONE.format) == ("<QQIIIIIIIIQ", "<QIIII")


# -- records with a piece behind them ------------------------------------------------------------------------
PIECES = [
    (Op.CALL_INLINE, (1, 2, 3, 4, 1, 5, 0, 0), b"12345"),
    (Op.CALL_INLINE, (1, 2, 3, 4, 0, 0, 0, 0), b""),
    (Op.CALL_INLINE, (1, 2, 3, 4, 1, INLINE_PIECE + 1, 0, 0), bytes(INLINE_PIECE)),
    (Op.RESULT_INLINE, (1, 0, 3, 0, 0), b"123"),
    (Op.RESULT_INLINE, (1, 102, 0, 4, 0), b"text"),
    (Op.RESULT_INLINE, (1, 0, 64 << 20, 0, 0), bytes(INLINE_PIECE)),
    (Op.PIECE, (1, INLINE_PIECE, 2), b"ab"),
]


@pytest.mark.parametrize(("op", "record", "piece"), PIECES)
def test_piece_survives_encoding(op: Op, record: tuple[int, ...], piece: bytes) -> None:
    message = encode_inline(op, record, piece)
    found, data = parse_inline(*parse_preamble(message), message)
    assert (found, bytes(data)) == (record, piece)
    assert inline_size(op, message + b"rest") == size_of(memoryview(message + b"rest")) == len(message)


@pytest.mark.parametrize(("op", "record", "piece"), PIECES)
def test_piece_of_another_length_is_refused(op: Op, record: tuple[int, ...], piece: bytes) -> None:
    message = encode_inline(op, record, piece)
    for changed in (message + b"x", message[:-1]):
        with pytest.raises(ProtocolError, match=rf"{op.name} has {len(changed)} bytes"):
            parse_inline(op, 1, changed)
    with pytest.raises(ProtocolError, match=f"{op.name} has count 2"):
        parse_inline(op, 2, message)
    with pytest.raises(AssertionError):
        encode_inline(op, record, piece + b"x")


@pytest.mark.parametrize("op", {op for op, _, _ in PIECES}, ids=lambda op: op.name)
def test_record_that_is_cut_off_is_refused(op: Op) -> None:
    for size in range(RECORDS[op][1].size):
        with pytest.raises(ProtocolError, match="less than its record's"):
            parse_inline(op, 1, head(op) + bytes(size))


def test_other_operations_have_no_piece() -> None:
    assert {op for op in Op if inline_size(op, head(op) + bytes(64)) is not None} == {op for op, _, _ in PIECES}


# -- malformed messages --------------------------------------------------------------------------------------
@pytest.mark.parametrize("op", Op, ids=lambda op: op.name)
def test_every_operation_is_recognised(op: Op) -> None:
    assert parse_preamble(head(op)) == (op, 1)


@pytest.mark.parametrize("size", [*range(PREAMBLE_SIZE), MESSAGE_MAX + 1])
def test_message_of_an_impossible_size_is_refused(size: int) -> None:
    message = (head(Op.CALL) + bytes(max(0, size - PREAMBLE_SIZE)))[:size]
    with pytest.raises(ProtocolError, match=rf"message of {size} bytes is outside 8\.\.{MESSAGE_MAX}"):
        parse_preamble(message)


@pytest.mark.parametrize("magic", [b"CL", b"lc", b"L\x00", b"GE", b"\x16\x03"])
def test_message_with_another_magic_is_refused(magic: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a luacell peer"):
        parse_preamble(magic + head(Op.CALL)[2:])


@pytest.mark.parametrize("version", sorted({0, VERSION_MIN - 1, VERSION + 1, 255}))
def test_other_versions_are_refused_with_the_supported_range(version: int) -> None:
    with pytest.raises(ProtocolError, match=rf"^protocol version {version} is outside {VERSION_MIN}\.\.{VERSION}$"):
        parse_preamble(PREAMBLE.pack(b"LC", version, Op.CALL, 1, 0))


def test_unknown_operations_are_refused() -> None:
    for op in set(range(256)) - {int(op) for op in Op}:
        with pytest.raises(ProtocolError, match=f"^unknown operation {op}$"):
            parse_preamble(PREAMBLE.pack(b"LC", VERSION, op, 1, 0))


@pytest.mark.parametrize("count", [0, CALLS_PER_MESSAGE_MAX + 1, 65535])
def test_record_count_outside_its_bounds_is_refused(count: int) -> None:
    with pytest.raises(ProtocolError, match=rf"^record count {count} is outside 1\.\.1024$"):
        parse_preamble(PREAMBLE.pack(b"LC", VERSION, Op.CALL, count, 0))


def test_reserved_bytes_must_be_zero() -> None:
    with pytest.raises(ProtocolError, match="reserved bytes of the preamble hold 258, not 0"):
        parse_preamble(PREAMBLE.pack(b"LC", VERSION, Op.CALL, 1, 258))


@pytest.mark.parametrize("op", RECORDS, ids=lambda op: op.name)
@pytest.mark.parametrize("change", [-1, 1])
def test_records_that_do_not_fit_their_count_are_refused(op: Op, change: int) -> None:
    size = RECORDS[op][1].size
    data = head(op, 2) + bytes(2 * size + change)
    with pytest.raises(ProtocolError, match=f"{op.name} of 2 records has .* bytes, not {8 + 2 * size}"):
        parse_records(op, 2, data)


@pytest.mark.parametrize("op", MESSAGES, ids=lambda op: op.name)
def test_control_operation_carries_no_records(op: Op) -> None:
    with pytest.raises(ProtocolError, match=f"operation {op.name} carries no records"):
        parse_records(op, 1, encode(messages.Bye()))


@steady
@given(st.binary(max_size=120))
def test_random_bytes_give_records_or_a_protocol_error(data: bytes) -> None:
    for message in (data, b"LC\x01" + data):
        try:
            op, count = parse_preamble(message)
            assert len(list(parse_records(op, count, message))) == count
        except ProtocolError:
            continue
