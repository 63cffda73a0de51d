"""Field checks for control messages: each message declares its fields once, and both directions follow.

A message is a frozen dataclass whose fields carry a check; `decode` refuses missing, extra and ill-typed fields and
names them. It knows nothing of the messages themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from functools import cache
from typing import Any, ClassVar, Final, Protocol, TypeVar

from luacell.protocol import codec
from luacell.protocol.errors import ProtocolError
from luacell.protocol.headers import PREAMBLE_SIZE, Op, head

U32_MAX: Final = (1 << 32) - 1
U64_MAX: Final = (1 << 64) - 1

Check = Callable[[Any], bool]


class Message(Protocol):
    """A control message: a dataclass with an operation."""

    OP: ClassVar[Op]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


M = TypeVar("M", bound=Message)


def _declared(check: Check, wanted: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"check": check, "wanted": wanted})


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
    """Declare a float field that may be None."""
    return _declared(lambda value: value is None or type(value) in (int, float), "None or a number", default)


def boolean(default: Any = MISSING) -> Any:
    """Declare a bool field."""
    return _declared(lambda value: type(value) is bool, "a bool", default)


def text(length_max: int, default: Any = MISSING) -> Any:
    """Declare a str field of at most `length_max` characters."""
    return _declared(
        lambda value: type(value) is str and len(value) <= length_max, f"text of at most {length_max} characters", default
    )


def blob(size_min: int, size_max: int, default: Any = MISSING) -> Any:
    """Declare a bytes field of `size_min..size_max` bytes."""
    return _declared(
        lambda value: type(value) is bytes and size_min <= len(value) <= size_max,
        f"{size_min}..{size_max} bytes",
        default,
    )


def contract_id(default: Any = MISSING) -> Any:
    """Declare a contract id: eight raw bytes, little-endian."""
    return blob(8, 8, default)


def text_map(total_max: int, default: Any = MISSING) -> Any:
    """Declare a map of str to str or bytes whose keys and values have at most `total_max` bytes together."""

    def check(value: Any) -> bool:
        return (
            type(value) is dict
            and all(type(key) is str and type(item) in (str, bytes) for key, item in value.items())
            and sum(len(key) + len(item) for key, item in value.items()) <= total_max
        )

    return _declared(check, f"a map of texts of at most {total_max} bytes together", default)


def plain_map(default: Any = MISSING) -> Any:
    """Declare a map of plain values whose reader checks it further."""
    return _declared(lambda value: type(value) is dict, "a map", default)


@cache
def _checks(message_class: type[Any]) -> dict[str, tuple[Check, str]]:
    return {item.name: (item.metadata["check"], item.metadata["wanted"]) for item in fields(message_class)}


def encode(message: Message) -> bytes:
    """Encode a control message: preamble and one msgpack map of its fields."""
    return head(message.OP) + codec.pack({name: getattr(message, name) for name in _checks(type(message))})


def decode(message_class: type[M], data: bytes) -> M:
    """Decode and check a control message whose preamble was read already.

    Raises:
        ProtocolError: names the field that is missing, extra or wrong.
    """
    name = message_class.OP.name
    values = codec.unpack(memoryview(data)[PREAMBLE_SIZE:])
    if type(values) is not dict:
        raise ProtocolError(f"{name} carries {type(values).__name__}, not a map")
    checks = _checks(message_class)
    if values.keys() != checks.keys():
        missing, extra = sorted(checks.keys() - values.keys()), sorted(values.keys() - checks.keys())
        raise ProtocolError(f"{name} has missing fields {missing} and unknown fields {extra}"[:300])
    for key, (check, wanted) in checks.items():
        if not check(values[key]):
            raise ProtocolError(f"{name}.{key} is {_shown(values[key])}, not {wanted}")
    return message_class(**values)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
