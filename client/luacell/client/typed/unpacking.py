"""Unpackers: a function of its own, in Python source, for the result of each function of a contract.

A result lies as arguments do: the fixed value, and somewhere in the same payload what its strings, buffers and arrays
hold, at offsets from the payload's start. A contract wrote all of it, so nothing is believed: a range must lie within
the payload, and all ranges together may name no more bytes than it has, or a few bytes would become gigabytes of
objects. A buffer's `cap` is not read.

The code raises at the first bad value; `refusals` then tells which.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

from luacell.client.typed.source import Source
from luacell.client.typed.values import HostTypes
from luacell.protocol.api.layout import Layout, layout_of
from luacell.protocol.api.model import (
    ARRAY_ITEMS_MAX,
    Array,
    Buffer,
    Enum,
    ResultType,
    Scalar,
    StringView,
    Struct,
    ValueType,
    Void,
)
from luacell.protocol.errors import BadResult

_BOOLS: Final = (False, True)
_BOOL_BYTES: Final = bytes((0, 1))


def make_unpacker(
    type_: ResultType,
    layout: Layout | None,
    types: HostTypes,
    title: str,
    explain: Callable[[Any], BadResult],
    *,
    views: bool,
) -> Callable[[bytes | memoryview], Any]:
    """Write and compile the unpacker of a result.

    Args:
        type_: of the result.
        layout: of the result; None for Void.
        types: the Python types of its Api.
        title: contract and function.
        explain: tells what is wrong with a result that the unpacker refused.
        views: whether buffers become memoryviews into the payload, without a copy, rather than bytes.
    """
    if isinstance(type_, Void) or layout is None:
        return _nothing
    unpacking = _Unpacking(types, views=views)
    source = unpacking.source
    source.constants |= {"explain": explain, "unpack_from": struct.unpack_from, "BOOLS": _BOOLS, "BITS": _BOOL_BYTES}
    with source.block("try:"):
        unpack = source.constant("u", struct.Struct(layout.format).unpack_from)
        names = [source.fresh("x") for _ in layout.leaves]
        source.add("view = memoryview(out)", "left = size = len(view)", f"[{', '.join(names)}] = {unpack}(view)")
        value, rest = unpacking.value(names, type_)
        assert not rest
        source.add(f"return {value}")
    source.add("except EXPECTED: pass", "raise explain(out)")
    return source.compile(f"unpacker of {title}")


def _nothing(out: bytes | memoryview) -> None:
    """Return what a function without a result returns."""


class _Unpacking:
    """Writes the code for values."""

    def __init__(self, types: HostTypes, *, views: bool) -> None:
        self.source = Source("unpack", "out")
        self._types = types
        self._views = views

    def value(self, names: list[str], type_: ValueType) -> tuple[str, list[str]]:
        """Write what a value needs; return an expression for it, and the leaves that are left.

        Args:
            names: of the variables that hold the leaves from this value on.
            type_: of the value.
        """
        source = self.source
        if isinstance(type_, Struct):
            parts = []
            for field in type_.fields:
                part, names = self.value(names, field.type)
                parts.append(part)
            made = source.constant("S", self._types.structs[type_.name])
            return f"{made}({', '.join(parts)})", names
        if isinstance(type_, Enum):
            return self._enum(names[0], type_), names[1:]
        if isinstance(type_, Scalar) and type_.kind == "bool":
            return f"BOOLS[{names[0]}]", names[1:]
        if isinstance(type_, StringView):
            return f"str({self._range(names[0], names[1])}, 'utf-8')", names[2:]
        if isinstance(type_, Buffer):
            part = self._range(names[0], names[1])
            return part if self._views else f"bytes({part})", names[3:]
        if isinstance(type_, Array):
            return self._array(names[0], names[1], type_), names[2:]
        return names[0], names[1:]

    def _enum(self, name: str, type_: Enum) -> str:
        made = self._types.enums[type_.name]
        members = self.source.constant("V", {member.value: member for member in made})
        if not type_.bitflag:
            return f"{members}[{name}]"
        return f"({members}[{name}] if {name} in {members} else {self.source.constant('E', made)}({name}))"

    def _range(self, offset: str, size: str) -> str:
        """Write the check of a range; return an expression for its bytes."""
        self.source.add(f"left -= {size}", f"if left < 0 or {offset} + {size} > size: raise ValueError")
        return f"view[{offset}:{offset} + {size}]"

    def _array(self, offset: str, count: str, type_: Array) -> str:
        source, item, layout = self.source, type_.item, layout_of(type_.item)
        items, size = source.fresh("i"), source.fresh("n")
        source.add(f"if {count} > {ARRAY_ITEMS_MAX}: raise ValueError", f"{size} = {count} * {layout.size}")
        part = self._range(offset, size)
        if isinstance(item, Scalar) and item.kind == "bool":
            source.add(f"{items} = bytes({part})", f"if {items}.translate(None, BITS): raise ValueError")
            return f"list(map(bool, {items}))"
        if isinstance(item, Scalar):
            return f"list(unpack_from('<%d{item.code}' % {count}, {part}))"
        names = [source.fresh("y") for _ in layout.leaves]
        unpack = source.constant("u", struct.Struct(layout.format).iter_unpack)
        source.add(f"{items} = []")
        with source.block(f"for [{', '.join(names)}] in {unpack}({part}):"):
            value, _ = self.value(names, item)
            source.add(f"{items}.append({value})")
        return items
