"""Values that hold real pointers, as code in one process passes them, and payloads, which travel.

In a payload a pointer is an offset from its start (see `packing`). `gather` makes a payload of a value whose pointers
are addresses: it reads what they point to and puts it behind the value. `settle` turns a payload into such a value,
at the address where it lies. Reading and keeping memory is the affair of whoever has it.

    | text: 0x7f…10, 5 |  ── gather ──>  | text: 16, 5 | hello + 3 |  ── settle ──>  | text: address + 16, 5 | hello |
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from luacell.client.typed.packing import too_large
from luacell.protocol.api.layout import FunctionLayout, layout_of
from luacell.protocol.api.model import (
    ARRAY_ITEMS_MAX,
    Array,
    Buffer,
    Function,
    ResultType,
    StringView,
    Struct,
    ValueType,
    Void,
)
from luacell.protocol.errors import BadResult, InvalidPointer, TooLarge
from luacell.protocol.limits import PAYLOAD_MAX

_PLACE: Final = struct.Struct("<QQ")  # pointer and count, the first words of all that lie elsewhere
_WORD: Final = struct.Struct("<Q")
_CAPACITY_AT: Final = _PLACE.size  # of a Buffer
_ALIGN: Final = 8  # bytes; of whatever lies behind a value

Read = Callable[[int, int], bytes]  # address or offset, bytes


@dataclass(frozen=True, slots=True)
class Pointer:
    """A pointer in a value.

    Attributes:
        path: parameter or field, as errors name it.
        offset: bytes from the start of the value; the count of items follows.
        item_size: bytes.
        has_capacity: whether the words of a Buffer stand here.
        is_array: whether items have an alignment, and a bound on their count.
        inside: the pointers in each item.
    """

    path: str
    offset: int
    item_size: int
    has_capacity: bool
    is_array: bool
    inside: tuple[Pointer, ...]


def pointers_of_arguments(function: Function) -> tuple[Pointer, ...]:
    """Return the pointers in a function's arguments."""
    params, layout = function.params, FunctionLayout.of(function).args
    offsets = (0,) if len(params) == 1 or layout is None else layout.offsets
    return tuple(
        pointer
        for param, offset in zip(params, offsets, strict=False)
        for pointer in _pointers(param.type, param.name, offset)
    )


def pointers_of_result(type_: ResultType) -> tuple[Pointer, ...]:
    """Return the pointers in what a function returns."""
    return () if isinstance(type_, Void) else tuple(_pointers(type_, "result", 0))


def _pointers(type_: ValueType, path: str, offset: int) -> Iterable[Pointer]:
    if isinstance(type_, StringView | Buffer):
        yield Pointer(path, offset, 1, isinstance(type_, Buffer), False, ())
    elif isinstance(type_, Array):
        inside = tuple(_pointers(type_.item, f"{path}[]", 0))
        yield Pointer(path, offset, layout_of(type_.item).size, False, True, inside)
    elif isinstance(type_, Struct):
        for field, at in zip(type_.fields, layout_of(type_).offsets, strict=True):
            yield from _pointers(field.type, f"{path}.{field.name}", offset + at)


def gather(value: bytes, pointers: tuple[Pointer, ...], read: Read, title: str) -> bytes:
    """Return the payload of a value.

    Args:
        value: as it lies in memory.
        pointers: in it.
        read: returns what lies at an address.
        title: contract and function, for errors.

    Raises:
        InvalidPointer: a pointer is NULL, but its count is not 0.
        TooLarge: the payload is over the limit, or an array has too many items.
    """
    if not pointers:
        return value
    gathering = _Gathering(bytearray(value), read, title)
    gathering.follow(gathering.pieces[0], 0, pointers)
    return b"".join(gathering.pieces)


class _Gathering:
    """A payload that is being put together."""

    def __init__(self, value: bytearray, read: Read, title: str) -> None:
        self.pieces = [value]
        self._size = len(value)
        self._read = read
        self._title = title
        self._pad(value)

    def follow(self, piece: bytearray, start: int, pointers: tuple[Pointer, ...]) -> None:
        """Take in what the pointers of a value point to, which stands at `start` of a piece."""
        for pointer in pointers:
            at = start + pointer.offset
            address, count = _PLACE.unpack_from(piece, at)
            size = count * pointer.item_size
            if pointer.is_array and count > ARRAY_ITEMS_MAX:
                text = f"{self._title}: {pointer.path} of {count} items is over the limit of {ARRAY_ITEMS_MAX}"
                raise TooLarge(text, began="no", limit=f"{ARRAY_ITEMS_MAX} items")
            if self._size + size > PAYLOAD_MAX:
                raise too_large(self._size + size)
            if size and not address:
                raise InvalidPointer(f"{self._title}: {pointer.path} is NULL with a length of {count}", began="no")
            _PLACE.pack_into(piece, at, self._size, count)
            if pointer.has_capacity:
                _WORD.pack_into(piece, at + _CAPACITY_AT, count)
            if size:
                self._take(bytearray(self._read(address, size)), count, pointer)

    def _take(self, piece: bytearray, count: int, pointer: Pointer) -> None:
        self.pieces.append(piece)
        self._size += len(piece)
        self._pad(piece)
        if pointer.inside:
            for index in range(count):
                self.follow(piece, index * pointer.item_size, pointer.inside)

    def _pad(self, piece: bytearray) -> None:
        padding = -self._size % _ALIGN
        if padding:
            self.pieces.append(bytearray(padding))
            self._size += padding


def settle(payload: bytes, size: int, pointers: tuple[Pointer, ...], title: str) -> Settled:
    """Return a result ready to be put where its pointers become addresses.

    Nothing is believed of where a contract says that its strings are: ranges are checked, and where arrays could lie
    in each other's way, all is laid out anew.

    Args:
        payload: of the result.
        size: bytes of the result itself, with which the payload begins.
        pointers: in it.
        title: contract and function, for errors.

    Raises:
        BadResult: something lies outside the payload, or more than it holds is named.
    """
    if len(payload) < size:
        raise BadResult(f"{title}: the result has {len(payload)} bytes, not {size}", began="yes")
    if any(pointer.is_array for pointer in pointers):
        try:
            payload = gather(payload[:size], pointers, _ranges_of(payload, title), title)
        except (InvalidPointer, TooLarge) as error:  # by the contract, not by who called it
            raise BadResult(error.message, began="yes") from None
    return Settled(bytearray(payload), pointers, title)


def _ranges_of(payload: bytes, title: str) -> Read:
    """Return what reads ranges of a payload, and no more of them than it has bytes."""
    left = len(payload)

    def read(offset: int, size: int) -> bytes:
        nonlocal left
        left -= size
        if left < 0 or offset + size > len(payload):
            raise BadResult(f"{title}: {size} bytes at {offset} are outside the result's {len(payload)}", began="yes")
        return payload[offset : offset + size]

    return read


class Settled:
    """A result whose pointers are offsets until `place` makes them addresses.

    Attributes:
        memory: the result and all that it points to.
    """

    def __init__(self, memory: bytearray, pointers: tuple[Pointer, ...], title: str) -> None:
        self.memory = memory
        self._pointers = pointers
        self._title = title

    def place(self, address: int) -> None:
        """Make all offsets addresses.

        A Buffer gets the capacity 0: it is lent, and whoever frees it by its capacity frees nothing.

        Args:
            address: of `memory`.

        Raises:
            BadResult: something lies outside of it.
        """
        self._place(address, 0, self._pointers)

    def _place(self, address: int, start: int, pointers: tuple[Pointer, ...]) -> None:
        for pointer in pointers:
            at = start + pointer.offset
            offset, count = _PLACE.unpack_from(self.memory, at)
            size = count * pointer.item_size
            if not size:
                offset = 0  # any address that is not NULL
            elif offset + size > len(self.memory):
                text = f"{self._title}: {pointer.path} of {size} bytes at {offset} is outside the result"
                raise BadResult(f"{text} of {len(self.memory)}", began="yes")
            _PLACE.pack_into(self.memory, at, address + offset, count)
            if pointer.has_capacity:
                _WORD.pack_into(self.memory, at + _CAPACITY_AT, 0)
            if pointer.inside:
                for index in range(count):
                    self._place(address, offset + index * pointer.item_size, pointer.inside)
