"""Why a value was refused: a second, slower walk over arguments or a result that a packer or unpacker would not take.

It finds the first thing that is wrong and names it: function, path (`p.x`, `items[3].label`), type, value, and what
would be taken.
"""

from __future__ import annotations

import struct
from operator import index
from typing import Any, Final

from luacell.client.typed.packing import bytes_of
from luacell.client.typed.values import HostTypes
from luacell.protocol.api.layout import Layout, layout_of
from luacell.protocol.api.model import (
    ARRAY_ITEMS_MAX,
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
from luacell.protocol.errors import (
    ArgumentError,
    ArgumentOverflowError,
    ArgumentTypeError,
    ArgumentValueError,
    BadResult,
)

_SHOWN_MAX: Final = 60  # characters of a value in an error text
_NAMES_MAX: Final = 8  # variants or fields in an error text
_NUMBERS: Final = (int, float, bool, str, bytes, type(None))  # whose repr is short, or can be cut before it is made
_PTR: Final = Scalar("Ptr", "int", 8, "Q")


class ArgumentCheck:
    """Finds what is wrong with the arguments of one function.

    Args:
        function: whose arguments.
        types: the Python types of its Api.
        title: contract and function.
    """

    def __init__(self, function: Function, types: HostTypes, title: str) -> None:
        self._function = function
        self._types = types
        self._title = title

    def explain(self, args: Any) -> ArgumentError:
        """Return the error about arguments that a packer refused."""
        params = self._function.params
        if not isinstance(args, (tuple, list)) or len(args) != len(params):
            given = len(args) if isinstance(args, (tuple, list)) else shown(args)
            names = ", ".join(param.name for param in params)
            count = f"{len(params)} argument{'' if len(params) == 1 else 's'}"
            return self._kind("", f"takes {count} ({names or 'none'}), not {given}")
        for param, value in zip(params, args, strict=True):
            found = self._value(param.name, param.type, value)
            if found is not None:
                return found
        return self._kind("", "an argument changed while it was read")

    def _kind(self, path: str, reason: str) -> ArgumentError:
        return ArgumentTypeError(self._title, path, reason)

    def _not(self, path: str, type_: ValueType, value: object, wanted: str) -> ArgumentError:
        return self._kind(path, f"{type_.name} takes {wanted}, not {shown(value)}")

    def _value(self, path: str, type_: ValueType, value: object) -> ArgumentError | None:
        if isinstance(type_, Struct):
            return self._struct(path, type_, value)
        if isinstance(type_, Enum):
            return self._enum(path, type_, value)
        if isinstance(type_, StringView):
            return self._text(path, type_, value)
        if isinstance(type_, Buffer):
            return self._buffer(path, type_, value)
        if isinstance(type_, Array):
            return self._array(path, type_, value)
        if isinstance(type_, Ptr):
            return self._integer(path, _PTR, value)
        if type_.kind == "int":
            return self._integer(path, type_, value)
        if type_.kind == "float":
            return self._float(path, type_, value)
        return None if isinstance(value, bool) else self._not(path, type_, value, "a bool")

    def _struct(self, path: str, type_: Struct, value: object) -> ArgumentError | None:
        names = [field.name for field in type_.fields]
        if isinstance(value, self._types.structs[type_.name]):
            values = {name: getattr(value, name) for name in names if hasattr(value, name)}
        elif isinstance(value, dict):
            values = dict(value)
        else:
            return self._not(path, type_, value, f"{_a(type_.name)} or a dict of its fields")
        missing = [name for name in names if name not in values]
        unknown = [name for name in values if name not in names]
        if missing or unknown:
            lacks = f"lacks {_listed(missing)}" if missing else f"has no {_listed(unknown)}"
            return self._kind(path, f"{type_.name} {lacks}; its fields are {_listed(names)}")
        for field in type_.fields:
            found = self._value(f"{path}.{field.name}", field.type, values[field.name])
            if found is not None:
                return found
        return None

    def _enum(self, path: str, type_: Enum, value: object) -> ArgumentError | None:
        number = _index(value)
        if number is None:
            return self._not(path, type_, value, f"{_a(type_.name)} or its int")
        if is_of(type_, number):
            return None
        names = _listed([variant.name for variant in type_.variants])
        wanted = f"combinations of {names}" if type_.bitflag else names
        return ArgumentValueError(self._title, path, f"{type_.name} has no value {shown(number)}; it takes {wanted}")

    def _integer(self, path: str, type_: Scalar, value: object) -> ArgumentError | None:
        number = _index(value)
        if number is None:
            return self._not(path, type_, value, "an int")
        if type_.low <= number <= type_.high:
            return None
        return self._range(path, type_, number, f"{type_.low}..{type_.high}")

    def _float(self, path: str, type_: Scalar, value: object) -> ArgumentError | None:
        try:
            if isinstance(value, bool):
                raise TypeError
            struct.pack(f"<{type_.code}", value)
        except OverflowError:
            return self._range(path, type_, value, "inf, nan and what its exponent holds")
        except (TypeError, ValueError, struct.error):
            return self._not(path, type_, value, "a float")
        return None

    def _range(self, path: str, type_: Scalar, value: object, wanted: str) -> ArgumentError:
        return ArgumentOverflowError(self._title, path, f"{shown(value)} is out of range of {type_.name}: {wanted}")

    def _text(self, path: str, type_: StringView, value: object) -> ArgumentError | None:
        if not isinstance(value, str):
            return self._not(path, type_, value, "a str")
        try:
            str.encode(value)
        except UnicodeEncodeError as error:
            lone = f"U+{ord(value[error.start]):04X}"
            return ArgumentValueError(
                self._title, path, f"{type_.name} is UTF-8, which has no {lone} (character {error.start})"
            )
        return None

    def _buffer(self, path: str, type_: Buffer, value: object) -> ArgumentError | None:
        try:
            bytes_of(value)
        except (TypeError, ValueError):  # a released memoryview
            return self._not(path, type_, value, "bytes or another buffer")
        return None

    def _array(self, path: str, type_: Array, value: object) -> ArgumentError | None:
        if not isinstance(value, (list, tuple)):
            return self._not(path, type_, value, "a list or tuple")
        if len(value) > ARRAY_ITEMS_MAX:
            text = f"{type_.name} of {len(value)} items; the limit is {ARRAY_ITEMS_MAX}"
            return ArgumentValueError(self._title, path, text)
        for number, item in enumerate(value):
            found = self._value(f"{path}[{number}]", type_.item, item)
            if found is not None:
                return found
        return None


class ResultCheck:
    """Finds what is wrong with a result.

    Args:
        type_: of the result.
        title: contract and function.
    """

    def __init__(self, type_: ResultType, title: str) -> None:
        self._type = type_
        self._title = title

    def explain(self, out: bytes | memoryview) -> BadResult:
        """Return the error about a result that an unpacker refused."""
        assert not isinstance(self._type, Void)  # nothing is read of those
        layout = layout_of(self._type)
        if len(out) < layout.size:
            reason = f"it has {len(out)} bytes, but {self._type.name} has {layout.size}"
        else:
            reason = _Walk(memoryview(out)).value("", self._type, 0, layout) or "it changed while it was read"
        return BadResult(f"{self._title} returned what is no {self._type.name}: {reason}", began="yes")


class _Walk:
    """One walk over a result; each method returns what is wrong, or ""."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._left = len(view)

    def value(self, path: str, type_: ValueType, at: int, layout: Layout) -> str:
        if isinstance(type_, Struct):
            for field, offset in zip(type_.fields, layout.offsets, strict=True):
                inner = f"{path}.{field.name}" if path else field.name
                found = self.value(inner, field.type, at + offset, layout_of(field.type))
                if found:
                    return found
            return ""
        words = [struct.unpack_from(f"<{leaf.code}", self._view, at + leaf.offset)[0] for leaf in layout.leaves]
        where = f"{path}: " if path else ""
        if isinstance(type_, Enum):
            return "" if is_of(type_, words[0]) else f"{where}{words[0]} is no value of {type_.name}"
        if isinstance(type_, Scalar) and type_.kind == "bool":
            return "" if words[0] <= 1 else f"{where}{words[0]} is no bool"
        if isinstance(type_, Array):
            return self._array(path, where, type_, words)
        if isinstance(type_, (StringView, Buffer)):
            return self._range(where, type_.name, words[0], words[1]) or (
                self._text(where, words) if isinstance(type_, StringView) else ""
            )
        return ""

    def _range(self, where: str, name: str, offset: int, size: int) -> str:
        payload = len(self._view)
        if offset + size > payload:
            return f"{where}{name} of {size} bytes at offset {offset} is outside the {payload} bytes of the result"
        self._left -= size
        return "" if self._left >= 0 else f"{where}{name} of {size} bytes: ranges name more than {payload} bytes in all"

    def _text(self, where: str, words: list[int]) -> str:
        try:
            str(self._view[words[0] : words[0] + words[1]], "utf-8")
        except UnicodeDecodeError as error:
            return f"{where}StringView is no UTF-8: {error.reason} at byte {error.start}"
        return ""

    def _array(self, path: str, where: str, type_: Array, words: list[int]) -> str:
        offset, count = words
        if count > ARRAY_ITEMS_MAX:
            return f"{where}{type_.name} of {count} items; the limit is {ARRAY_ITEMS_MAX}"
        layout = layout_of(type_.item)
        found = self._range(where, type_.name, offset, count * layout.size)
        number = 0
        while not found and number < count:
            found = self.value(f"{path}[{number}]", type_.item, offset + number * layout.size, layout)
            number += 1
        return found


def is_of(type_: Enum, value: int) -> bool:
    """Tell whether an enum has a value."""
    if type_.bitflag:
        return value & ~type_.mask == 0
    return any(variant.value == value for variant in type_.variants)


def shown(value: object) -> str:
    """Write a value of any size for an error text: its type, and itself where that is short."""
    name = type(value).__name__
    if type(value) not in _NUMBERS:
        return f"a value of type {name}"
    if isinstance(value, int) and value.bit_length() > 256:  # longer ones may not even have a decimal form
        return f"an int of {value.bit_length()} bits"
    text = repr(value[:_SHOWN_MAX] if isinstance(value, (str, bytes)) else value)
    cut = "..." if isinstance(value, (str, bytes)) and len(value) > _SHOWN_MAX else ""
    return "None" if value is None else f"{name} {text}{cut}"


def _index(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"


def _listed(names: list[str]) -> str:
    more = ", ..." if len(names) > _NAMES_MAX else ""
    return ", ".join(str(name)[:_SHOWN_MAX] for name in names[:_NAMES_MAX]) + more
