"""Field checks for control messages: each message declares its fields once, and both directions follow.

A message is a frozen dataclass whose fields carry a check; `decode` refuses missing, extra and ill-typed
fields and names them. It knows nothing of the messages themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from functools import cache
from math import isfinite
from typing import Any, ClassVar, Final, Protocol, TypeVar

from luacell.protocol import codec
from luacell.protocol.errors import ProtocolError, TooLarge
from luacell.protocol.headers import PREAMBLE_SIZE, Op, head, inline_size, parse_preamble, records_size
from luacell.protocol.limits import MESSAGE_MAX

U32_MAX: Final = (1 << 32) - 1
U64_MAX: Final = (1 << 64) - 1

_SHOWN_MAX: Final = 60  # characters of a value in an error text
_UNKNOWN_SHOWN_MAX: Final = 5

Check = Callable[[Any], bool]


class Message(Protocol):
    """A control message: a dataclass with an operation."""

    OP: ClassVar[Op]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


M = TypeVar("M", bound=Message)


def _declared(check: Check, wanted: str, default: Any = MISSING) -> Any:
    metadata = {"check": check, "wanted": wanted}
    if type(default) is dict:
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def integer(low: int = 0, high: int = U32_MAX, default: Any = MISSING) -> Any:
    """Declare an integer field within `low..high`."""
    return _declared(lambda value: type(value) is int and low <= value <= high, f"an integer in {low}..{high}", default)


def optional_integer(low: int, high: int, default: Any = MISSING) -> Any:
    """Declare an integer field that may be None."""
    return _declared(
        lambda value: value is None or (type(value) is int and low <= value <= high),
        f"None or an integer in {low}..{high}",
        default,
    )


def optional_number(default: Any = MISSING) -> Any:
    """Declare a finite float field that may be None."""
    return _declared(
        lambda value: value is None or (type(value) in (int, float) and isfinite(value)),
        "None or a number",
        default,
    )


def boolean(default: Any = MISSING) -> Any:
    """Declare a bool field."""
    return _declared(lambda value: type(value) is bool, "a bool", default)


def text(length_max: int, default: Any = MISSING) -> Any:
    """Declare a str field of at most `length_max` characters."""
    return _declared(
        lambda value: type(value) is str and len(value) <= length_max,
        f"text of at most {length_max} characters",
        default,
    )


def choice(options: tuple[str, ...], default: Any = MISSING) -> Any:
    """Declare a str field that is one of `options`."""
    listed = ", ".join(f'"{option}"' for option in options)
    return _declared(lambda value: type(value) is str and value in options, f"one of {listed}", default)


def blob(size_min: int, size_max: int, default: Any = MISSING) -> Any:
    """Declare a bytes field of `size_min..size_max` bytes."""
    sizes = f"{size_max}" if size_min == size_max else f"{size_min}..{size_max}"
    return _declared(
        lambda value: type(value) is bytes and size_min <= len(value) <= size_max, f"{sizes} bytes", default
    )


def contract_id(default: Any = MISSING) -> Any:
    """Declare a contract id: eight raw bytes, little-endian."""
    return blob(8, 8, default)


def text_map(total_max: int, default: Any = MISSING) -> Any:
    """Declare a map of str to bytes: keys (in UTF-8) and values have at most `total_max` bytes together."""

    def check(value: Any) -> bool:
        return (
            type(value) is dict
            and all(type(key) is str and type(item) is bytes for key, item in value.items())
            and sum(len(key.encode()) + len(item) for key, item in value.items()) <= total_max
        )

    return _declared(check, f"a map of text to bytes, at most {total_max} bytes together", default)


def plain_map(default: Any = MISSING) -> Any:
    """Declare a map of plain values whose reader checks it further."""
    return _declared(lambda value: type(value) is dict, "a map", default)


@cache
def _checks(message_class: type[Any]) -> dict[str, tuple[Check, str]]:
    return {item.name: (item.metadata["check"], item.metadata["wanted"]) for item in fields(message_class)}


def encode(message: Message) -> bytes:
    """Encode a control message: preamble and one msgpack map of its fields.

    Raises:
        TooLarge: no peer would take it; libzmq would drop the connection without a word.
    """
    data = head(message.OP) + codec.pack({name: getattr(message, name) for name in _checks(type(message))})
    if len(data) > MESSAGE_MAX:
        text = f"{message.OP.name} of {len(data)} bytes is over the limit of {MESSAGE_MAX}"
        raise TooLarge(text, began="no", limit=f"{MESSAGE_MAX} bytes")
    return data


def decode(message_class: type[M], data: bytes) -> M:
    """Decode and check a control message.

    Args:
        message_class: of the message's operation.
        data: the whole message.

    Raises:
        ProtocolError: names the field that is missing, extra or wrong, or the operation that came instead.
    """
    name = message_class.OP.name
    op, count = parse_preamble(data)
    if op is not message_class.OP:
        raise ProtocolError(f"operation {op.name} in place of {name}")
    if count != 1:
        raise ProtocolError(f"{name} has count {count}; a control message has 1")
    values = codec.unpack(memoryview(data)[PREAMBLE_SIZE:])
    if type(values) is not dict:
        raise ProtocolError(f"{name} carries {type(values).__name__}, not a map")
    checks = _checks(message_class)
    if values.keys() != checks.keys():
        missing = [key for key in checks if key not in values]
        unknown = [key for key in values if key not in checks]
        shown = ", ".join(_shown(key) for key in unknown[:_UNKNOWN_SHOWN_MAX])
        more = ", ..." if len(unknown) > _UNKNOWN_SHOWN_MAX else ""
        raise ProtocolError(f"{name} has missing fields {missing} and unknown fields [{shown}{more}]")
    for key, (check, wanted) in checks.items():
        if not check(values[key]):
            raise ProtocolError(f"{name}.{key} is {_shown(values[key])}, not {wanted}")
    return message_class(**values)


def size_of(view: memoryview) -> int:
    """Return the bytes of the message at the start of a buffer that may hold more.

    Args:
        view: at most MESSAGE_MAX bytes.

    Raises:
        ProtocolError: there is no whole message of this protocol.
    """
    op, count = parse_preamble(view)
    size = inline_size(op, view) or records_size(op, count)
    return PREAMBLE_SIZE + codec.size_of(view[PREAMBLE_SIZE:]) if size is None else size


def _shown(value: Any) -> str:
    """Write a value of any size or depth for an error text, without writing all of it first."""
    if type(value) in (list, dict):
        return f"a {type(value).__name__} of {len(value)} items"
    shown = repr(value[:_SHOWN_MAX] if type(value) in (str, bytes) else value)
    return shown if len(shown) <= _SHOWN_MAX else f"{shown[: _SHOWN_MAX - 3]}..."
