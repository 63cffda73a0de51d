"""How values lie in memory: C rules, 64 bits, little-endian.

Computed once per function and then only read. It knows sizes and offsets; it moves no values.

Source: System V ABI for x86-64 and AArch64: natural alignment, trailing padding to the largest of a struct.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from luacell.protocol.api.model import (
    Array,
    Buffer,
    Enum,
    Function,
    Ptr,
    ResultType,
    Scalar,
    StringView,
    Struct,
    ValueType,
    Void,
)

_WORD: Final = 8  # bytes of a pointer and of a size_t


@dataclass(frozen=True, slots=True)
class Leaf:
    """A scalar, or one word of a string, buffer or array.

    Attributes:
        path: from the outermost value, as in "p.x" or "data.len"; "" for a value that is a scalar itself.
        offset: bytes from the start.
        size: bytes; also its alignment.
        code: its letter in Python's `struct`.
    """

    path: str
    offset: int
    size: int
    code: str


@dataclass(frozen=True, slots=True)
class Layout:
    """One value, or the struct of a function's arguments.

    Attributes:
        size: bytes, trailing padding included.
        align: bytes.
        offsets: of the direct members, in order; empty for anything but a struct.
        leaves: all scalars and words, by offset.
    """

    size: int
    align: int
    offsets: tuple[int, ...]
    leaves: tuple[Leaf, ...]

    @property
    def format(self) -> str:
        """The format of Python's `struct` that reads and writes all leaves; padding is written as zeros."""
        parts, at = ["<"], 0
        for leaf in self.leaves:
            if leaf.offset > at:
                parts.append(f"{leaf.offset - at}x")
            parts.append(leaf.code)
            at = leaf.offset + leaf.size
        if self.size > at:
            parts.append(f"{self.size - at}x")
        return "".join(parts)


@dataclass(frozen=True, slots=True)
class FunctionLayout:
    """What the two pointers of a call point to.

    Attributes:
        args: None without parameters (the pointer is NULL); one parameter is the value itself; more are a struct.
        result: None for Void.
    """

    args: Layout | None
    result: Layout | None

    @classmethod
    def of(cls, function: Function) -> FunctionLayout:
        """Lay out a function."""
        params = function.params
        if not params:
            args = None
        elif len(params) == 1:
            args = layout_of(params[0].type)
        else:
            args = _struct((param.name, param.type) for param in params)
        return cls(args, result_layout(function.result))


def layout_of(type_: ValueType) -> Layout:
    """Lay out one value."""
    if isinstance(type_, Struct):
        return _struct((field.name, field.type) for field in type_.fields)
    if isinstance(type_, Scalar):
        return _scalar(type_.size, type_.code)
    if isinstance(type_, Enum):
        return _scalar(type_.repr.size, type_.repr.code)
    if isinstance(type_, Ptr):
        return _scalar(_WORD, "Q")
    return _words(words_of(type_))


def result_layout(type_: ResultType) -> Layout | None:
    """Lay out what a function returns; None for Void."""
    return None if isinstance(type_, Void) else layout_of(type_)


def words_of(type_: StringView | Buffer | Array) -> tuple[str, ...]:
    """Name the words of a value that lies elsewhere."""
    if isinstance(type_, StringView):
        return ("ptr", "len")
    return ("ptr", "len", "cap") if isinstance(type_, Buffer) else ("items", "len")


def _scalar(size: int, code: str) -> Layout:
    return Layout(size, size, (), (Leaf("", 0, size, code),))


def _words(names: tuple[str, ...]) -> Layout:
    leaves = tuple(Leaf(name, index * _WORD, _WORD, "Q") for index, name in enumerate(names))
    return Layout(len(names) * _WORD, _WORD, (), leaves)


def _struct(members: Iterable[tuple[str, ValueType]]) -> Layout:
    at, align = 0, 1
    offsets: list[int] = []
    leaves: list[Leaf] = []
    for name, type_ in members:
        member = layout_of(type_)
        at = _aligned(at, member.align)
        offsets.append(at)
        leaves += (
            Leaf(f"{name}.{leaf.path}" if leaf.path else name, at + leaf.offset, leaf.size, leaf.code)
            for leaf in member.leaves
        )
        at += member.size
        align = max(align, member.align)
    return Layout(_aligned(at, align), align, tuple(offsets), tuple(leaves))


def _aligned(at: int, align: int) -> int:
    return (at + align - 1) & -align
