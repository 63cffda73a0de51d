"""The values of typed contracts as JSON, both ways.

    integers, Ptr        a number, exact to 64 bits
    f32, f64             a number; "NaN", "Infinity" and "-Infinity", for which JSON has no number
    bool, StringView     true or false, a text
    Buffer               a text in base64; taken as {"hex": "…"} and {"text": "…"} too
    an enum              the name of its variant; a number is taken
    a bitflag            a list of names; one name and a number are taken; a number where names do not cover it
    a struct, Array<T>   an object, a list
    Void                 null

Only what JSON writes differently is turned here; the packers check everything, and name what they refuse.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from enum import IntEnum, IntFlag
from typing import Any, Final

from luacell.protocol.api import Array, Buffer, Enum, Function, Scalar, Struct
from luacell.protocol.api.model import ResultType, ValueType

_SPECIAL: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonError(ValueError):
    """A text is no JSON, or says what no value of its type can be; the text names the place."""


def read_arguments(function: Function, text: str, title: str) -> dict[str, Any]:
    """Read the arguments of a call.

    Args:
        function: which takes them.
        text: a JSON object with a member for each parameter; "" is one without members.
        title: contract and function.

    Raises:
        JsonError: it is no such object.
    """
    try:
        given = json.loads(text or "{}", object_pairs_hook=_distinct)
    except JsonError as error:
        raise JsonError(f"{title}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise JsonError(f"{title}: the arguments are no JSON: {error}") from None
    names = [param.name for param in function.params]
    if not isinstance(given, dict):
        raise JsonError(f"{title}: the arguments are no JSON object; it takes {_listed(names)}")
    unknown = [name for name in given if name not in names]
    missing = [name for name in names if name not in given]
    if unknown or missing:
        wrong = f"has no parameter {unknown[0]!r}" if unknown else f"lacks {_listed(missing)}"
        raise JsonError(f"{title}: {wrong}; it takes {_listed(names)}")
    return {param.name: _read(param.type, given[param.name], f"{title}: {param.name}") for param in function.params}


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonError(f"{twice!r} is given twice")
    return made


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _read(type_: ValueType, value: Any, where: str) -> Any:
    """Return what a packer takes; what is of the wrong kind is passed on, for the packer to refuse."""
    if isinstance(type_, Struct) and isinstance(value, dict):
        types = {field.name: field.type for field in type_.fields}
        return {
            name: _read(types[name], item, f"{where}.{name}") if name in types else item for name, item in value.items()
        }
    if isinstance(type_, Array) and isinstance(value, list):
        return [_read(type_.item, item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(type_, Buffer):
        return _read_bytes(value, where)
    if isinstance(type_, Enum):
        return _read_enum(type_, value, where)
    if isinstance(type_, Scalar) and type_.kind == "float" and isinstance(value, str):
        return _SPECIAL.get(value, value)
    return value


def _read_bytes(value: Any, where: str) -> Any:
    form, text = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else ("base64", value)
    if isinstance(text, str):
        try:
            if form == "base64":
                return base64.b64decode(text, validate=True)
            if form == "hex":
                return bytes.fromhex(text)
            if form == "text":
                return text.encode()
        except (binascii.Error, ValueError) as error:
            raise JsonError(f"{where}: no {form}: {error}") from None
    raise JsonError(f'{where}: Buffer takes a text in base64, {{"hex": "…"}} or {{"text": "…"}}')


def _read_enum(type_: Enum, value: Any, where: str) -> Any:
    if isinstance(value, str):
        return _variant(type_, value, where)
    if type_.bitflag and isinstance(value, list):
        bits = 0
        for name in value:
            bits |= _variant(type_, name, where)
        return bits
    return value


def _variant(type_: Enum, name: Any, where: str) -> int:
    for variant in type_.variants:
        if variant.name == name:
            return variant.value
    known = _listed([variant.name for variant in type_.variants])
    raise JsonError(f"{where}: {type_.name} has no variant {name!r}; it has {known}")


def json_of(type_: ResultType, value: Any) -> Any:
    """Return what `json.dumps` writes for a result."""
    if isinstance(type_, Struct):
        return {field.name: json_of(field.type, getattr(value, field.name)) for field in type_.fields}
    if isinstance(type_, Array):
        return [json_of(type_.item, item) for item in value]
    if isinstance(type_, Buffer):
        return base64.b64encode(value).decode()
    if isinstance(value, IntFlag):
        return _flags(type_, value)
    if isinstance(value, IntEnum):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _flags(type_: ResultType, value: IntFlag) -> list[str] | int:
    """Name the variants that make up a combination: those of several bits only where single ones do not suffice."""
    assert isinstance(type_, Enum)
    left, names = int(value), []
    for variant in sorted(type_.variants, key=lambda variant: variant.value.bit_count()):
        if variant.value and variant.value & ~int(value) == 0 and variant.value & left:
            names.append(variant.name)
            left &= ~variant.value
    return int(value) if left else names
