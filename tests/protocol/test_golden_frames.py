"""The bytes of the wire: what was pinned is what is written and read today."""

from typing import Any

import pytest

from luacell.protocol.fields import decode, encode, size_of
from luacell.protocol.headers import Op, encode_inline, encode_records, parse_inline, parse_preamble, parse_records
from tests.protocol.golden import EXAMPLES, PATH, described, from_json, read_golden_frames, to_json
from tests.protocol.support import MESSAGES, RECORDS

FRAMES = [
    pytest.param(Op[name], frame, id=f"{name}-{frame['what']}")
    for name, frames in read_golden_frames().items()
    for frame in frames
]


def test_every_operation_has_a_golden_frame_and_is_either_records_or_a_map() -> None:
    assert list(read_golden_frames()) == [op.name for op in Op]
    assert RECORDS.keys() | MESSAGES.keys() == set(Op)
    assert not RECORDS.keys() & MESSAGES.keys()


@pytest.mark.parametrize(("op", "frame"), FRAMES)
def test_golden_frame_is_encoded_byte_by_byte(op: Op, frame: dict[str, Any]) -> None:
    if op in RECORDS:
        records = [tuple(from_json(record).values()) for record in frame["records"]]
        piece = from_json(frame.get("piece"))
        data = encode_records(op, records) if piece is None else encode_inline(op, records[0], piece)
        assert data.hex() == frame["hex"]
    else:
        assert encode(MESSAGES[op](**from_json(frame["fields"]))).hex() == frame["hex"]


@pytest.mark.parametrize(("op", "frame"), FRAMES)
def test_golden_frame_is_decoded_field_by_field(op: Op, frame: dict[str, Any]) -> None:
    data = bytes.fromhex(frame["hex"])
    found, count = parse_preamble(data)
    assert found is op
    if op in RECORDS:
        record_class = RECORDS[op][0]
        if "piece" in frame:
            record, piece = parse_inline(op, count, data)
            assert bytes(piece) == from_json(frame["piece"])
            found_records = [record]
        else:
            found_records = list(parse_records(op, count, data))
        records = [record_class._make(record)._asdict() for record in found_records]
        assert records == [from_json(record) for record in frame["records"]]
    else:
        assert count == 1
        assert decode(MESSAGES[op], data) == MESSAGES[op](**from_json(frame["fields"]))


@pytest.mark.parametrize(("op", "frame"), FRAMES)
def test_golden_frame_ends_where_it_ends_in_a_larger_buffer(op: Op, frame: dict[str, Any]) -> None:
    data = bytes.fromhex(frame["hex"])
    assert size_of(memoryview(data + bytes(100))) == len(data)


def test_golden_file_holds_the_examples_it_is_made_of() -> None:
    assert read_golden_frames() == {
        op.name: [described(op, what, example) for what, example in EXAMPLES[op].items()] for op in Op
    }


def test_golden_file_is_not_written_by_reading_it() -> None:
    before = PATH.stat().st_mtime_ns
    read_golden_frames()
    assert PATH.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "value",
    [
        b"\x00\xff",
        2**53 - 1,
        2**64 - 1,
        -1,
        True,
        None,
        0.25,
        "text",
        {"bytes": 1},
        {"bytes": "00", "more": b"\x01"},
        {"integer": [2**60]},
        [{"id": b""}],
    ],
)
def test_golden_notation_loses_nothing(value: Any) -> None:
    assert from_json(to_json(value)) == value
    assert type(from_json(to_json(value))) is type(value)
