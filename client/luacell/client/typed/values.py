"""The Python types of an api.toml: a dataclass for each struct, an IntEnum or IntFlag for each enum.

    u8 … u64, i8 … i64, Ptr   int                 StringView   str
    f32, f64                  float               Buffer       bytes
    bool                      bool                Array<T>     list

A Ptr is an address in the process that made it and means nothing in another one. Nothing here moves values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from enum import STRICT, IntEnum, IntFlag
from types import GenericAlias
from typing import Any, Final, cast

from luacell.protocol.api.model import Api, Array, Buffer, Enum, Ptr, ResultType, Scalar, StringView, Struct, Void

COMBINATIONS_MAX: Final = 1024  # combinations of flags that an enum class remembers

_SCALARS: Final = {"int": int, "float": float, "bool": bool}


class Flags(IntFlag, boundary=STRICT):
    """The root of generated flags: a combination of variants, and nothing else.

    Python remembers every combination it meets for ever; what a contract returns must not fill a host's memory.
    """

    @classmethod
    def _missing_(cls, value: object) -> Any:
        member = super()._missing_(value)
        if len(cls._value2member_map_) > COMBINATIONS_MAX:
            cls._value2member_map_.pop(value, None)
        return member


class HostTypes:
    """The Python types of one Api, made once.

    Args:
        api: its structs and enums.
        given: classes to use in place of made ones, by their names: dataclasses and enums, as `luacell stubs` writes.

    Raises:
        TypeError: a given class is not what the description has under its name.

    Attributes:
        structs: dataclasses by name, with slots; fields in declaration order.
        enums: enum classes by name.
    """

    def __init__(self, api: Api, given: Iterable[type[Any]] = ()) -> None:
        own = {made.__name__: made for made in given}
        self.enums: dict[str, type[IntEnum] | type[IntFlag]] = {
            enum.name: _checked(enum, own[enum.name]) if enum.name in own else _enum_class(enum) for enum in api.enums
        }
        self.structs: dict[str, type[Any]] = {
            struct.name: _checked(struct, own[struct.name]) for struct in api.structs if struct.name in own
        }
        self._declared = {struct.name: struct for struct in api.structs}
        for struct in api.structs:
            self._struct_class(struct)

    def of(self, type_: ResultType) -> Any:
        """Return the Python type of a value; None for Void."""
        if isinstance(type_, Scalar):
            return _SCALARS[type_.kind]
        if isinstance(type_, Enum):
            return self.enums[type_.name]
        if isinstance(type_, Struct):
            return self._struct_class(type_)
        if isinstance(type_, Array):
            return GenericAlias(list, (self.of(type_.item),))
        return {StringView: str, Buffer: bytes, Ptr: int, Void: None}[type(type_)]

    def _struct_class(self, struct: Struct) -> type[Any]:
        made = self.structs.get(struct.name)
        if made is None:
            fields = [(field.name, self.of(field.type)) for field in struct.fields]
            made = dataclasses.make_dataclass(struct.name, fields, slots=True, namespace={"__doc__": _docs(struct)})
            made.__module__ = __name__
            self.structs[struct.name] = made
        return made


def _checked(type_: Struct | Enum, given: type[Any]) -> type[Any]:
    if isinstance(type_, Enum):
        base: type[Any] = IntFlag if type_.bitflag else IntEnum
        wanted = {variant.name: variant.value for variant in type_.variants}
        fits = issubclass(given, base) and {name: int(each) for name, each in given.__members__.items()} == wanted
    else:
        names = [field.name for field in type_.fields]
        fits = dataclasses.is_dataclass(given) and [each.name for each in dataclasses.fields(given)] == names
    if not fits:
        raise TypeError(f"{given.__module__}.{given.__qualname__} is not {type_.name} as the api.toml declares it")
    return given


def _enum_class(enum: Enum) -> type[IntEnum] | type[IntFlag]:
    members = [(variant.name, variant.value) for variant in enum.variants]
    # mypy reads the functional form with literals only.
    made: Any = (
        Flags(enum.name, members, module=__name__)  # type: ignore[call-arg, arg-type]
        if enum.bitflag
        else IntEnum(enum.name, members, module=__name__)
    )
    made.__doc__ = _docs(enum)
    return cast(type[IntEnum] | type[IntFlag], made)


def _docs(type_: Struct | Enum) -> str:
    return type_.docs or f"{type_.name}, as its api.toml declares it."
