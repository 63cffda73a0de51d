"""Records of contracts, found in what they print."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from luacell.broker.contract_log import LINE_MAX, Line, LineFinder, readable

FRAME = b"\x1elog warning 7 disk full\n"
LINE = Line("warning", 7, b"disk full")


def found(*pieces: bytes) -> list[bytes | Line]:
    """Feed pieces to one finder; what it finds, with prints that follow each other joined."""
    finder = LineFinder()
    parts = [part for piece in pieces for part in finder.feed(piece)]
    joined: list[bytes | Line] = []
    for part in [*parts, finder.end()]:
        if isinstance(part, bytes) and joined and isinstance(joined[-1], bytes):
            joined[-1] += part
        elif part:
            joined.append(part)
    return joined


def test_records_are_told_from_prints_in_their_order() -> None:
    assert found(b"before" + FRAME + b"after\n" + FRAME * 2) == [b"before", LINE, b"after\n", LINE, LINE]


def test_a_record_of_a_contract_that_loads_has_no_function() -> None:
    assert found(b"\x1elog debug - \n") == [Line("debug", None, b"")]


def test_what_was_escaped_is_as_it_was_given() -> None:
    assert found(rb"log" + b"\x1elog info 1 a\\nb\\\\n\\ec\\\n") == [b"log", Line("info", 1, b"a\nb\\n\x1ec\\")]


@given(st.lists(st.integers(0, 2 * len(FRAME) + 4), max_size=6))
def test_a_record_may_come_in_pieces(cuts: list[int]) -> None:
    data, places = b"ab" + FRAME + b"cd" + FRAME, sorted(cuts)
    pieces = [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]
    assert found(*pieces) == [b"ab", LINE, b"cd", LINE]


@given(st.lists(st.sampled_from([b"\x1e", b"log ", b"info ", b"7 ", b"\n", b"x", FRAME]), max_size=12))
def test_whatever_is_no_record_is_a_print(pieces: list[bytes]) -> None:
    """Nothing is lost: records written again are what came."""
    written = [
        part
        if isinstance(part, bytes)
        else b"\x1elog %b %d %b\n" % (part.level.encode(), part.function or 0, part.text)
        for part in found(*pieces)
    ]
    assert b"".join(written) == b"".join(pieces)


def test_a_line_that_does_not_end_is_a_print_before_it_is_long() -> None:
    finder = LineFinder()
    assert finder.feed(FRAME[:-1]) == []
    endless = b"x" * LINE_MAX
    assert finder.feed(endless) == [FRAME[:-1] + endless]
    assert finder.end() == b""


def test_a_record_that_was_cut_is_a_print_and_the_next_one_is_not() -> None:
    assert found(FRAME[:9] + FRAME) == [FRAME[:9], LINE]


def test_people_read_level_and_text() -> None:
    assert readable(b"panic: " + FRAME + b"\x1elog in") == b"panic: warning: disk full\n\x1elog in"
