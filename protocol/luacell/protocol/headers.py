"""The hot messages: fixed little-endian records, any number of them in one message.

A message is one ZeroMQ frame: the preamble, then either `count` records of the operation's fixed size (this
module) or one msgpack map (`luacell.protocol.messages`). Nothing here allocates more than the tuple that
struct returns. Where a host has no shared memory, one record is followed by a piece of its bytes.

    offset  0    2        3    4      6
            'LC' version  op   count  reserved (0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple

from luacell.protocol.errors import ProtocolError
from luacell.protocol.limits import CALLS_PER_MESSAGE_MAX, INLINE_PIECE, MESSAGE_MAX

MAGIC: Final = b"LC"
VERSION: Final = 1
VERSION_MIN: Final = 1


class Op(IntEnum):
    """What a message is. Numbers are never reused; the ranges tell the direction."""

    # host to broker
    HELLO = 1
    CALL = 2
    CANCEL = 3
    MAPPED = 4
    GIVE_BACK = 5
    BYE = 6
    REGISTER = 7
    UNREGISTER = 8
    LIST = 9
    HEALTH = 10
    LEASE = 11
    CALL_INLINE = 12
    DESCRIBE = 13
    COMMIT = 14
    REVIVE = 15
    CRASHES = 16
    CRASH = 17
    # broker to host
    WELCOME = 32
    RESULT = 33
    FAILURE = 34
    RELEASED = 35
    REPLY = 36
    SEGMENT = 37
    RESULT_INLINE = 38
    PROBE = 39
    # broker to worker
    LOAD = 64
    EXECUTE = 65
    UNMAP = 66
    MAP = 67
    SAVE = 68
    RESTORE = 69
    FORGET = 70
    # worker to broker
    READY = 96
    LOADED = 97
    DONE = 98
    SAVED = 99
    RESTORED = 100
    # broker to worker host
    START = 128
    KILL = 129
    END = 130
    INSPECT = 131
    # worker host to broker
    STARTED = 160
    EXITED = 161
    LEAVING = 162
    OUTPUT = 163
    INSPECTED = 164
    # between host and broker, either way
    PIECE = 192
    MORE = 193


PREAMBLE: Final = Struct("<2sBBHH")
PREAMBLE_SIZE: Final = PREAMBLE.size

# flags of CALL and EXECUTE
HAS_ARGS: Final = 1
HAS_OUT: Final = 2
AHEAD: Final = 4  # EXECUTE only: the worker holds others, so more may follow; answers may be gathered

# flags of RESULT
SLOT_FREE: Final = 1

# flags of DONE
RETIRE: Final = 1  # the worker must not be used again
NOT_BEGUN: Final = 2  # the call was past its deadline or withdrawn, and was not run
RECYCLE: Final = 4  # the worker has served its calls, or its memory is beyond its limit: another should follow it
PROCESS_FULL: Final = 8  # with RETIRE and OUT_OF_MEMORY: its process could have no more memory; else its Lua heap


class Call(NamedTuple):
    """One call as its host sends it (48 bytes).

    Attributes:
        call_id: chosen by the host, never reused in its session.
        contract_id: u64.
        fn_id: u32.
        budget_us: microseconds from arrival at the broker; 0 means the contract's own deadline.
        arena, slot, generation: the handle.
        flags: HAS_ARGS, HAS_OUT.
        args_size, out_size: bytes.
    """

    call_id: int
    contract_id: int
    fn_id: int
    budget_us: int
    arena: int
    slot: int
    generation: int
    flags: int
    args_size: int
    out_size: int


class Execute(NamedTuple):
    """One call as the broker hands it to a worker (56 bytes).

    Attributes:
        sequence: number of this hand-over, from 1; no two of a broker's life share one, for slots outlive workers.
        deadline_ns: CLOCK_MONOTONIC; a worker never begins a call that is past it.
        limit_us: microseconds the call may run before the worker must die, by its own timer if need be.
    """

    sequence: int
    deadline_ns: int
    fn_id: int
    limit_us: int
    arena: int
    slot: int
    generation: int
    flags: int
    args_size: int
    out_size: int
    reserved: int = 0


class Done(NamedTuple):
    """A worker's answer (24 bytes): the slot of `sequence` holds `out` or the error's text."""

    sequence: int
    code: int
    out_size: int
    error_size: int
    flags: int


class Result(NamedTuple):
    """The broker's answer to a host (24 bytes). `flags`: SLOT_FREE when the slot may be used again."""

    call_id: int
    code: int
    out_size: int
    error_size: int
    flags: int


class CallInline(NamedTuple):
    """One call of a host without shared memory (40 bytes); the first piece of its arguments follows.

    Fields as in Call. The first piece has INLINE_PIECE bytes, or `args_size` where that is less.

    Attributes:
        api_sum: of a worker: CRC-32 of the description that its arguments were made by, or 0; of a host 0.
    """

    call_id: int
    contract_id: int
    fn_id: int
    budget_us: int
    flags: int
    args_size: int
    out_size: int
    api_sum: int = 0


class Piece(NamedTuple):
    """The next bytes of a call's arguments or results (16 bytes), which follow.

    Attributes:
        call_id: of the call.
        offset: of the first byte in the whole.
        size: bytes of this piece: INLINE_PIECE, or what is left where that is less.
    """

    call_id: int
    offset: int
    size: int


class More(NamedTuple):
    """The receiver of pieces has taken all bytes before `offset`, and may be sent more (16 bytes)."""

    call_id: int
    offset: int
    reserved: int = 0


CALL: Final = Struct("<QQIIIIIIII")
EXECUTE: Final = Struct("<QQIIIIIIIIQ")
DONE: Final = Struct("<QIIII")
RESULT: Final = Struct("<QIIII")
CALL_ID: Final = Struct("<Q")  # a record of CANCEL and RELEASED
CALL_INLINE: Final = Struct("<QQIIIIII")
RESULT_INLINE: Final = RESULT
PIECE: Final = Struct("<QII")
MORE: Final = Struct("<QII")

_RECORDS: Final = {
    Op.CALL: CALL,
    Op.EXECUTE: EXECUTE,
    Op.DONE: DONE,
    Op.RESULT: RESULT,
    Op.CANCEL: CALL_ID,
    Op.RELEASED: CALL_ID,
    Op.CALL_INLINE: CALL_INLINE,
    Op.RESULT_INLINE: RESULT_INLINE,
    Op.PIECE: PIECE,
    Op.MORE: MORE,
}

# How many bytes follow the record, as it says itself.
_PAYLOAD_SIZE: Final[dict[Op, Callable[[tuple[int, ...]], int]]] = {
    Op.CALL_INLINE: lambda record: min(record[5], INLINE_PIECE),
    Op.RESULT_INLINE: lambda record: min(record[2] + record[3], INLINE_PIECE),
    Op.PIECE: lambda record: record[2],
}

_HEAD: Final = {op: PREAMBLE.pack(MAGIC, VERSION, op, 1, 0) for op in Op}


def head(op: Op, count: int = 1) -> bytes:
    """Return the preamble of a message."""
    return _HEAD[op] if count == 1 else PREAMBLE.pack(MAGIC, VERSION, op, count, 0)


def encode_records(op: Op, records: list[tuple[int, ...]]) -> bytes:
    """Encode a hot message of one or more records.

    Args:
        op: an operation with fixed records.
        records: 1 to CALLS_PER_MESSAGE_MAX tuples of the operation's fields.
    """
    assert 1 <= len(records) <= CALLS_PER_MESSAGE_MAX, len(records)
    pack = _RECORDS[op].pack
    return head(op, len(records)) + b"".join([pack(*record) for record in records])


def parse_preamble(message: bytes | memoryview) -> tuple[Op, int]:
    """Read operation and record count.

    Raises:
        ProtocolError: not a message of this protocol, or of a version this side does not speak.
    """
    if not PREAMBLE_SIZE <= len(message) <= MESSAGE_MAX:
        raise ProtocolError(f"message of {len(message)} bytes is outside {PREAMBLE_SIZE}..{MESSAGE_MAX}")
    magic, version, op, count, reserved = PREAMBLE.unpack_from(message)
    if magic != MAGIC:
        raise ProtocolError(f"message starts with {magic!r}, not {MAGIC!r}: not a luacell peer")
    if not VERSION_MIN <= version <= VERSION:
        raise ProtocolError(f"protocol version {version} is outside {VERSION_MIN}..{VERSION}")
    if op not in _HEAD:
        raise ProtocolError(f"unknown operation {op}")
    if not 1 <= count <= CALLS_PER_MESSAGE_MAX:
        raise ProtocolError(f"record count {count} is outside 1..{CALLS_PER_MESSAGE_MAX}")
    if reserved:
        raise ProtocolError(f"reserved bytes of the preamble hold {reserved}, not 0")
    return Op(op), count


def records_size(op: Op, count: int) -> int | None:
    """Return the bytes of a hot message without what follows its records, or None for an operation without records."""
    record = _RECORDS.get(op)
    return None if record is None else PREAMBLE_SIZE + count * record.size


def encode_inline(op: Op, record: tuple[int, ...], piece: bytes | memoryview) -> bytes:
    """Encode a record and the bytes that follow it.

    Args:
        op: CALL_INLINE, RESULT_INLINE or PIECE.
        record: the operation's fields, which say how long the piece is.
        piece: the bytes.
    """
    assert _PAYLOAD_SIZE[op](record) == len(piece), (record, len(piece))
    return b"".join((head(op), _RECORDS[op].pack(*record), piece))


def parse_inline(op: Op, count: int, message: bytes) -> tuple[tuple[int, ...], memoryview]:
    """Read a record and the bytes that follow it.

    Args:
        op: CALL_INLINE, RESULT_INLINE or PIECE, as `parse_preamble` returned it.
        count: as `parse_preamble` returned it.
        message: the whole message.

    Returns:
        The operation's fields, and a view of the bytes in `message`.

    Raises:
        ProtocolError: there is not exactly one record, or the length does not fit what it says.
    """
    if count != 1:
        raise ProtocolError(f"{op.name} has count {count}; a message with a piece has 1")
    expected = inline_size(op, message)
    if len(message) != expected:
        raise ProtocolError(f"{op.name} has {len(message)} bytes, not {expected}")
    layout = _RECORDS[op]
    return layout.unpack_from(message, PREAMBLE_SIZE), memoryview(message)[PREAMBLE_SIZE + layout.size :]


def inline_size(op: Op, message: bytes | memoryview) -> int | None:
    """Return the bytes of a message at the start of a buffer, or None for an operation that no piece follows.

    Raises:
        ProtocolError: the buffer ends within the record.
    """
    if op not in _PAYLOAD_SIZE:
        return None
    layout = _RECORDS[op]
    start = PREAMBLE_SIZE + layout.size
    if len(message) < start:
        raise ProtocolError(f"{op.name} has {len(message)} bytes, less than its record's {start}")
    return start + _PAYLOAD_SIZE[op](layout.unpack_from(message, PREAMBLE_SIZE))


def parse_records(op: Op, count: int, message: bytes) -> Iterator[tuple[int, ...]]:
    """Read the records of a hot message.

    Args:
        op: as `parse_preamble` returned it.
        count: as `parse_preamble` returned it.
        message: the whole message.

    Returns:
        An iterator of tuples, in the order of the operation's fields.

    Raises:
        ProtocolError: the operation has no records, or the length does not fit the count.
    """
    expected = records_size(op, count)
    if expected is None:
        raise ProtocolError(f"operation {op.name} carries no records")
    if len(message) != expected:
        raise ProtocolError(f"{op.name} of {count} records has {len(message)} bytes, not {expected}")
    return _RECORDS[op].iter_unpack(memoryview(message)[PREAMBLE_SIZE:])
