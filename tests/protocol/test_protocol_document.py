"""docs/protocol.md says what the code does: every operation, field, offset, bound, code and limit."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from luacell.protocol import limits
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.headers import PREAMBLE, PREAMBLE_SIZE, VERSION, Op
from luacell.protocol.paths import BROKER_SOCKET, DESCRIPTOR_SOCKET, ENDPOINT_VARIABLE
from luacell.protocol.slots import ARGS_STRIDE_MIN, OUT_STRIDE_MIN, PAYLOAD_OFFSET, WITHDRAWN_OFFSET
from tests.protocol.golden import read_golden_frames
from tests.protocol.support import FIELDS, MESSAGES, RECORDS, wanted

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
Row = list[str]


def section(title: str) -> str:
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,3}} |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert match, f"the document has no section {title!r}"
    return match[2]


def section_of(op: Op) -> str:
    return section(f"{op.name} ({int(op)})")


def rows(text: str) -> list[Row]:
    """The cells of every row of every table, without headings and rules."""
    found = []
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("|--"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            found.append([cell.strip().replace("\\|", "|") for cell in cells])
    return found


def test_every_operation_is_listed_with_number_channel_and_body() -> None:
    listed = {row[1]: row for row in rows(section("Operations"))[1:]}
    assert list(listed) == [op.name for op in Op]
    for op in Op:
        number, _, _, _, channel, body = listed[op.name]
        assert int(number) == op
        assert body.startswith("records" if op in RECORDS else "map")
        assert channel in ("ZeroMQ", "`fd.sock`", "socketpair", "both")
        assert ("2 descriptors" in body) == ("descriptors" in section_of(op).split("\n\n|")[0])


@pytest.mark.parametrize("op", Op, ids=lambda op: op.name)
def test_section_of_an_operation_has_its_fields_and_no_other(op: Op) -> None:
    named = re.findall(r"^\|(?: \d+ \| \w+ \|)? `(\w+)` \|", section_of(op), re.MULTILINE)
    if op in RECORDS:
        assert tuple(named) == RECORDS[op][0]._fields
    else:
        assert named == [item.name for item in fields(MESSAGES[op])]


@pytest.mark.parametrize(("op", "name"), FIELDS, ids=lambda part: str(getattr(part, "name", part)))
def test_field_is_described_with_its_bounds(op: Op, name: str) -> None:
    bounds = next(row[1] for row in rows(section_of(op)) if row[0] == f"`{name}`")
    words = wanted(op, name).replace("None", "nil")
    words = re.sub(rf"\b{2**64 - 1}\b", "2^64-1", words)
    assert bounds == re.sub(rf"\b{2**32 - 1}\b", "2^32-1", words)


@pytest.mark.parametrize("op", RECORDS, ids=lambda op: op.name)
def test_record_is_described_byte_by_byte(op: Op) -> None:
    record, layout = RECORDS[op]
    offset = 0
    for name, kind in zip(record._fields, layout.format[1:], strict=True):
        row = next(row for row in rows(section_of(op)) if f"`{name}`" in row)
        assert row[:2] == [str(offset), {"Q": "u64", "I": "u32"}[kind]]
        offset += {"Q": 8, "I": 4}[kind]
    assert f"record of {offset} bytes" in section_of(op)


def test_preamble_is_described_byte_by_byte() -> None:
    described = rows(section("Preamble"))[1:]
    assert [(row[0], row[1]) for row in described] == [
        ("0", "2 bytes"),
        ("2", "u8"),
        ("3", "u8"),
        ("4", "u16"),
        ("6", "u16"),
    ]
    assert (PREAMBLE.format, PREAMBLE_SIZE) == ("<2sBBHH", 8)
    assert described[1][3] == str(VERSION)


def test_slot_is_described_byte_by_byte() -> None:
    described = [(row[0], row[1], row[2].split(",")[0]) for row in rows(section("Slots")) if row[0].isdigit()]
    assert described == [
        ("0", "u64", "generation"),
        (str(WITHDRAWN_OFFSET), "u64", "withdrawn"),
        (str(PAYLOAD_OFFSET), "bytes", "the arguments"),
        ("0", "u64", "begun"),
        ("8", "u64", "done"),
        ("16", "u32", "code"),
        ("20", "u32", "out_size"),
        ("24", "u32", "error_size"),
        ("28", "u32", "flags"),
        ("32", "u64", "cpu_us"),
        (str(PAYLOAD_OFFSET), "bytes", "the results"),
    ]


def test_every_code_is_described() -> None:
    listed = {row[1]: int(row[0]) for row in rows(section("7. Errors"))[1:]}
    assert listed == {code.name: int(code) for code in AbiErrorCode}


def test_limits_are_those_of_the_code() -> None:
    listed = {row[2].strip("`"): int(row[1]) for row in rows(section("10. Limits"))[1:]}
    assert listed == {name: getattr(limits, name) for name in listed}
    assert f"never below {ARGS_STRIDE_MIN} (*args*) or {OUT_STRIDE_MIN} (*out*)" in DOCUMENT


def test_every_frame_that_is_shown_is_a_golden_one() -> None:
    golden = {frame["hex"] for frames in read_golden_frames().values() for frame in frames}
    shown = re.findall(r"```hex\n(.*?)```", DOCUMENT, re.DOTALL)
    assert shown
    assert {re.sub(r"\s", "", frame) for frame in shown} <= golden


def test_files_are_named() -> None:
    for name in (BROKER_SOCKET, DESCRIPTOR_SOCKET, ENDPOINT_VARIABLE):
        assert name in DOCUMENT
