"""What the tests of the protocol share: all message classes, and values that fit their fields or do not."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any, Final, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st

from luacell.protocol import messages
from luacell.protocol.headers import (
    CALL,
    CALL_ID,
    CALL_INLINE,
    DONE,
    EXECUTE,
    MORE,
    PIECE,
    RESULT,
    RESULT_INLINE,
    Call,
    CallInline,
    Done,
    Execute,
    More,
    Op,
    Piece,
    Result,
)

steady: Final = settings(derandomize=True, deadline=None, database=None, max_examples=40)


class CallId(NamedTuple):
    """A record of CANCEL and RELEASED."""

    call_id: int


RECORDS: Final[dict[Op, tuple[type[Any], Any]]] = {
    Op.CALL: (Call, CALL),
    Op.EXECUTE: (Execute, EXECUTE),
    Op.DONE: (Done, DONE),
    Op.RESULT: (Result, RESULT),
    Op.CANCEL: (CallId, CALL_ID),
    Op.RELEASED: (CallId, CALL_ID),
    Op.CALL_INLINE: (CallInline, CALL_INLINE),
    Op.RESULT_INLINE: (Result, RESULT_INLINE),
    Op.PIECE: (Piece, PIECE),
    Op.MORE: (More, MORE),
}
MESSAGES: Final[dict[Op, type[Any]]] = {
    item.OP: item for item in vars(messages).values() if isinstance(item, type) and hasattr(item, "OP")
}
FIELDS: Final = [(op, item.name) for op, message in MESSAGES.items() for item in fields(message)]

_INTEGER = re.compile(r"(None or )?an integer in (\d+)\.\.(\d+)")
_TEXT = re.compile(r"text of at most (\d+) characters")
_CHOICE = re.compile(r"one of .*")
_BYTES = re.compile(r"(?:(\d+)\.\.)?(\d+) bytes")
_TEXT_MAP = re.compile(r"a map of text to bytes, at most (\d+) bytes together")


def open_descriptors() -> set[tuple[str, str]]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that the listing used
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Nothing is open at the end that was not open at the beginning."""
    before = open_descriptors()
    yield
    assert open_descriptors() <= before


def wanted(op: Op, name: str) -> str:
    """What a field's declaration asks for, in words."""
    words: str = next(item for item in fields(MESSAGES[op]) if item.name == name).metadata["wanted"]
    return words


def record_strategy(op: Op) -> st.SearchStrategy[tuple[int, ...]]:
    bits = {"Q": 64, "I": 32}
    return st.tuples(*(st.integers(0, (1 << bits[kind]) - 1) for kind in RECORDS[op][1].format[1:]))


def message_strategy(op: Op) -> st.SearchStrategy[Any]:
    message = MESSAGES[op]
    return st.builds(message, **{item.name: value_strategy(item.metadata["wanted"]) for item in fields(message)})


def value_strategy(words: str) -> st.SearchStrategy[Any]:
    if match := _INTEGER.fullmatch(words):
        integers = st.integers(int(match[2]), int(match[3]))
        return st.none() | integers if match[1] else integers
    if match := _TEXT.fullmatch(words):
        return st.text(max_size=min(int(match[1]), 20))
    if _CHOICE.fullmatch(words):
        return st.sampled_from(_options(words))
    if match := _BYTES.fullmatch(words):
        low, high = _sizes(match)
        return st.binary(min_size=low, max_size=min(high, low + 20))
    if _TEXT_MAP.fullmatch(words):
        return st.dictionaries(st.text(max_size=8), st.binary(max_size=20), max_size=4)
    return {
        "None or a number": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "a bool": st.booleans(),
        "a map": st.dictionaries(st.text(max_size=8), plain_values(), max_size=4),
    }[words]


def plain_values() -> st.SearchStrategy[Any]:
    plain = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False)
    return st.recursive(
        plain | st.text(max_size=8) | st.binary(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=8,
    )


def edges(words: str) -> tuple[list[Any], list[Any]]:
    """The values at the edge of what a field takes: those that it must take, those that it must refuse."""
    if match := _INTEGER.fullmatch(words):
        low, high = int(match[2]), int(match[3])
        beyond = high + 1 if high < (1 << 64) - 1 else float(1 << 64)
        none = [None] if match[1] else []
        return [low, high, *none], [low - 1, beyond, 1.5, True, "1", b"1", [], {}, *([] if none else [None])]
    if match := _TEXT.fullmatch(words):
        length = int(match[1])
        return ["", "ä" * length], ["x" * (length + 1), b"x", 0, None, True, [], {}]
    if _CHOICE.fullmatch(words):
        return _options(words), ["other", b"no", 0, None, True, [], {}]
    if match := _BYTES.fullmatch(words):
        low, high = _sizes(match)
        shorter = [b"x" * (low - 1)] if low else []
        longer = [b"x" * (high + 1)]
        return [b"x" * low, b"x" * min(high, 1 << 20)], [
            "x" * max(low, 1),
            *shorter,
            *longer,
            0,
            None,
            [],
            {},
        ]
    if match := _TEXT_MAP.fullmatch(words):
        size = int(match[1])
        over = [{"ä": b"x" * (size - 1)}, {b"name": b"source"}, {"name": "source"}, {"name": [b"source"]}]
        return [{}, {"ä": b"x" * (size - 2)}], [*over, [], None, 0, "x", b"x"]
    others: dict[str, tuple[list[Any], list[Any]]] = {
        "None or a number": ([None, 0, 1.5, -2.0], [float("nan"), float("inf"), True, "1", b"1", [], {}]),
        "a bool": ([True, False], [0, 1, None, "true", b"", [], {}]),
        "a map": ([{}, {"a": [1, {"b": None}]}], [[], None, 0, "x", b"x", True]),
    }
    return others[words]


def _options(words: str) -> list[str]:
    return re.findall(r'"([^"]*)"', words)


def _sizes(match: re.Match[str]) -> tuple[int, int]:
    return int(match[1] or match[2]), int(match[2])
