"""Packers: a function of its own, in Python source, for the arguments of each function of a contract.

A payload is the fixed struct of the arguments and behind it, each at a multiple of 8, what its strings, buffers and
arrays hold. In the struct their pointers are offsets from the start of the payload; whoever maps it adds its address.

    | mode | p.x p.y | data: 48, 5, 5 | tag |  48: b"hello" + 3 |

The code checks while it packs and raises at the first bad value; `refusals` then tells which.
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
    Function,
    Scalar,
    StringView,
    Struct,
    ValueType,
)
from luacell.protocol.errors import ArgumentError, TooLarge
from luacell.protocol.limits import PAYLOAD_MAX

_PADS: Final = tuple(bytes(-size % 8) for size in range(8))  # by size modulo 8
_BOOLS: Final = {bool}


def make_packer(
    function: Function, layout: Layout | None, types: HostTypes, title: str, explain: Callable[[Any], ArgumentError]
) -> Callable[[tuple[Any, ...]], bytes]:
    """Write and compile the packer of a function.

    Args:
        function: whose arguments.
        layout: of its arguments; None without parameters.
        types: the Python types of its Api.
        title: contract and function.
        explain: tells what is wrong with arguments that the packer refused.
    """
    packing = _Packing(types)
    source = packing.source
    source.constants |= {"explain": explain}
    names = [source.fresh("a") for _ in function.params]
    with source.block("try:"):
        source.add(f"[{', '.join(names)}] = args", "tail = [b'']", f"o = {layout.size if layout else 0}")
        values = [
            part for name, param in zip(names, function.params, strict=True) for part in packing.value(name, param.type)
        ]
        packing.refuse_bools()
        if packing.has_tail:
            source.add(f"if o > {PAYLOAD_MAX}: raise too_large(o)")
        if layout is None:
            source.add("return b''")
        else:
            pack = source.constant("p", struct.Struct(layout.format).pack)
            source.add(
                f"tail[0] = {pack}({', '.join(values)})",
                "return b''.join(tail)" if packing.has_tail else "return tail[0]",
            )
    source.add("except EXPECTED: pass", "raise explain(args)")  # outside, so that nothing holds on to the values
    return source.compile(f"packer of {title}")


class _Packing:
    """Writes the code for values, and says with which expressions the struct is packed."""

    def __init__(self, types: HostTypes) -> None:
        self.source = Source("pack", "args")
        self.has_tail = False
        self._types = types
        self._numbers: list[str] = []  # variables that must not be bools
        self.source.constants |= {
            "PADS": _PADS,
            "BOOLS": _BOOLS,
            "encode": str.encode,
            "bytes_of": bytes_of,
            "pack_many": struct.pack,
            "too_large": too_large,
        }

    def refuse_bools(self) -> None:
        if self._numbers:
            classes = "".join(f"{name}.__class__, " for name in self._numbers)
            self.source.add(f"if bool in ({classes}): raise TypeError")
            self._numbers.clear()

    def value(self, name: str, type_: ValueType) -> list[str]:
        """Write what a value needs; return what goes into the struct, by offset."""
        if isinstance(type_, Struct):
            return self._struct(name, type_)
        if isinstance(type_, Enum):
            return self._enum(name, type_)
        if isinstance(type_, StringView):
            piece = self.source.fresh("b")
            self.source.add(f"{piece} = encode({name})")
            return self._piece(piece)
        if isinstance(type_, Buffer):
            piece = self.source.fresh("b")
            self.source.add(f"{piece} = {name} if {name}.__class__ is bytes else bytes_of({name})")
            offset, size = self._piece(piece)
            return [offset, size, size]
        if isinstance(type_, Array):
            return self._array(name, type_)
        if isinstance(type_, Scalar) and type_.kind == "bool":
            self.source.add(f"if {name} is not True and {name} is not False: raise TypeError")
        else:
            self._numbers.append(name)
        return [name]

    def _struct(self, name: str, type_: Struct) -> list[str]:
        source = self.source
        made = source.constant("S", self._types.structs[type_.name])
        names = [source.fresh("f") for _ in type_.fields]
        fields = list(zip(names, type_.fields, strict=True))
        with source.block(f"if isinstance({name}, {made}):"):
            source.add(*(f"{part} = {name}.{field.name}" for part, field in fields))
        with source.block(f"elif isinstance({name}, dict) and len({name}) == {len(fields)}:"):
            source.add(*(f"{part} = {name}['{field.name}']" for part, field in fields))
        source.add("else: raise TypeError")
        return [value for part, field in fields for value in self.value(part, field.type)]

    def _enum(self, name: str, type_: Enum) -> list[str]:
        made = self.source.constant("E", self._types.enums[type_.name])
        if type_.bitflag:
            wrong = f"{name}.__index__() & {~type_.mask}"
        else:
            values = self.source.constant("V", frozenset(variant.value for variant in type_.variants))
            wrong = f"{name} not in {values}"
        self.source.add(
            f"if {name}.__class__ is not {made} and ({name}.__class__ is bool or {wrong}): raise ValueError"
        )
        return [name]

    def _array(self, name: str, type_: Array) -> list[str]:
        source, item = self.source, type_.item
        count, piece = source.fresh("n"), source.fresh("b")
        source.add(
            f"if not isinstance({name}, (list, tuple)) or len({name}) > {ARRAY_ITEMS_MAX}: raise TypeError",
            f"{name} = tuple({name})",  # nobody else changes it meanwhile
            f"{count} = len({name})",
        )
        if isinstance(item, Scalar):
            if item.kind == "bool":
                source.add(f"if not BOOLS.issuperset(map(type, {name})): raise TypeError")
            else:
                source.add(f"if bool in map(type, {name}): raise TypeError")
            source.add(f"{piece} = pack_many('<%d{item.code}' % {count}, *{name})")
            return [self._piece(piece)[0], count]
        return [self._items(name, type_, count), count]

    def _items(self, name: str, type_: Array, count: str) -> str:
        """Write the loop over items that are more than plain numbers; return the offset of the first."""
        source, layout = self.source, layout_of(type_.item)
        self.has_tail = True
        self.refuse_bools()  # before the loop, for what stands outside
        offset, place, block, item = (source.fresh(prefix) for prefix in "okbi")
        pack = source.constant("p", struct.Struct(layout.format).pack)
        source.add(
            f"{offset} = o",
            f"o += {count} * {layout.size} + 7 & -8",
            f"{place} = len(tail)",
            "tail.append(b'')",  # before what its items hold
            f"{block} = []",
        )
        with source.block(f"for {item} in {name}:"):
            values = self.value(item, type_.item)
            self.refuse_bools()
            source.add(f"{block}.append({pack}({', '.join(values)}))")
        source.add(f"{block}.append(PADS[{count} * {layout.size} & 7])", f"tail[{place}] = b''.join({block})")
        return offset

    def _piece(self, piece: str) -> list[str]:
        """Write the code that puts bytes behind the struct; return their offset and size."""
        self.has_tail = True
        offset, size = self.source.fresh("o"), self.source.fresh("n")
        self.source.add(
            f"{offset} = o",
            f"{size} = len({piece})",
            f"o += {size} + 7 & -8",
            f"tail.append({piece})",
            f"if {size} & 7: tail.append(PADS[{size} & 7])",
        )
        return [offset, size]


def bytes_of(value: object) -> bytes | memoryview:
    """Return what a buffer holds, as plain bytes, without a copy where its memory is in one piece.

    Raises:
        TypeError: it is no buffer.
    """
    view = memoryview(value)  # type: ignore[arg-type]
    return view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes()


def too_large(size: int) -> TooLarge:
    """Return the error about arguments that no slot takes."""
    text = f"args of {size} bytes are over the limit of {PAYLOAD_MAX}"
    return TooLarge(text, began="no", limit=f"{PAYLOAD_MAX} bytes")
