"""From the text of an api.toml to the Api that it declares.

Everything that is wrong is told in one ApiError, each with file, line, column, the key or value, and what was probably
meant. What follows from something wrong is not told again: what refers to a broken declaration is taken as it is. It
reads no file and lays out no memory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from luacell.protocol.api.expressions import ExpressionError, evaluate
from luacell.protocol.api.model import (
    BUILT_IN,
    CONTRACTS_MAX,
    FIELDS_MAX,
    FUNCTIONS_MAX,
    LEAVES_MAX,
    NESTING_MAX,
    PARAMS_MAX,
    REPRS,
    TYPES_MAX,
    U64,
    VARIANTS_MAX,
    VOID,
    Api,
    Array,
    Buffer,
    Contract,
    Enum,
    Field,
    Function,
    Param,
    ResultType,
    Scalar,
    StringView,
    Struct,
    ValueType,
    Variant,
    Void,
)
from luacell.protocol.api.tables import Names, Table, meant, shown
from luacell.protocol.identity import GuestContractId, HostContractId, Version

_ANYWHERE: Final = ("docs", "langs")
_TOP_KEYS: Final = ("types", "enum", "host_contract", "guest_contract", "plugin_contract", *_ANYWHERE)
_TYPE_KEYS: Final = ("name", "fields", *_ANYWHERE)
_MEMBER_KEYS: Final = ("name", "type", *_ANYWHERE)
_ENUM_KEYS: Final = ("name", "repr", "bitflag", "variants", *_ANYWHERE)
_VARIANT_KEYS: Final = ("name", "value", *_ANYWHERE)
_GUEST_KEYS: Final = ("name", "version", "functions", *_ANYWHERE)
_HOST_KEYS: Final = ("singleton", *_GUEST_KEYS)
_FUNCTION_KEYS: Final = ("name", "params", "return", *_ANYWHERE)
_RETURN_KEYS: Final = ("type", *_ANYWHERE)

_RESERVED_TYPES: Final = frozenset((*BUILT_IN, "Array"))
_RESERVED_PARAMS: Final = frozenset(("self",))  # what methods call their instance, in Python and in Lua
_RESERVED_VARIANTS: Final = frozenset(("mro",))  # no Python enum can have it
_ARRAY: Final = re.compile(r"Array<[ ]*([^<>]*?)[ ]*>")


def parse(text: str, filename: str) -> Api:
    """Read an api.toml.

    Args:
        text: its content.
        filename: for errors.

    Raises:
        ApiError: what is wrong, and where; of a text that is no TOML the first.
    """
    top = Table.read(text, filename)
    top.allow(_TOP_KEYS)
    types = _Types(top)
    ids = Names("contract")
    host_contracts = _contracts(top, ("host_contract",), types, ids, guest=False)
    guest_contracts = _contracts(top, ("guest_contract", "plugin_contract"), types, ids, guest=True)
    docs = top.docs()
    top.check()
    return Api(types.structs, types.enums, host_contracts, guest_contracts, docs)


class _Types:
    """The types of a file, resolved by name; structs may refer to later ones."""

    def __init__(self, top: Table) -> None:
        self._known: dict[str, ResultType] = dict(BUILT_IN)
        self._unread: dict[str, Table] = {}
        self._open: list[str] = []  # structs that are being read, outermost first
        self._weights: dict[str, _Weight] = {}
        names, again = Names("type"), list[Table]()
        for table in top.tables("types", TYPES_MAX):
            table.allow(_TYPE_KEYS)
            name = _claimed(table, names, _RESERVED_TYPES)
            if name in self._unread:
                again.append(table)
            else:
                self._unread[name] = table
        self.enums = tuple(_enum(table, names) for table in top.tables("enum", TYPES_MAX))
        self._known.update((enum.name, enum) for enum in self.enums)
        self.structs = tuple(self._struct(name) for name in list(self._unread))
        for table in again:  # whose names were taken: what else is wrong with them
            self._fields(table)

    def members(
        self,
        table: Table,
        key: str,
        count_max: int,
        kind: str,
        reserved: Collection[str] = (),
        *,
        required: bool = False,
    ) -> list[tuple[str, ValueType, str]]:
        """Return name, type and docs of the fields of a struct, or the parameters of a function, that can be read."""
        names = Names(kind)
        found: list[tuple[str, ValueType, str]] = []
        for item in table.tables(key, count_max, required=required):
            item.allow(_MEMBER_KEYS)
            name = _claimed(item, names, reserved)
            with item.noting():
                found.append((name, self._member(item, kind), item.docs()))
        return found

    def _member(self, table: Table, kind: str) -> ValueType:
        """Resolve the type of a field or parameter."""
        resolved = self.named(table)
        if isinstance(resolved, Void):
            raise table.error("type", f"type {shown(table.text('type'))} is only for returns, not for a {kind}")
        return resolved

    def named(self, table: Table, key: str = "type") -> ResultType:
        """Resolve the type that a key names."""
        written = table.text(key)
        match = _ARRAY.fullmatch(written)
        if match is None:
            return self._resolve(table, key, written)
        item = self._resolve(table, key, match[1])
        if isinstance(item, Void):
            raise table.error(key, f"type {shown(written)}: an array holds no Void")
        if self.weight(item).arrays:
            raise table.error(key, f"type {shown(written)}: its items hold an Array; arrays are of one level")
        assert not isinstance(item, Array)  # it has no name of its own
        return Array(item)

    def weight(self, type_: ResultType) -> _Weight:
        """Return what a type adds to what holds it."""
        if isinstance(type_, Struct):
            return self._weights[type_.name]
        if isinstance(type_, Array):
            item = self.weight(type_.item)
            return _Weight(item.leaves + 2, item.depth, True)
        leaves = 3 if isinstance(type_, Buffer) else 2 if isinstance(type_, StringView) else 1
        return _Weight(leaves, 0, False)

    def _resolve(self, table: Table, key: str, name: str) -> ResultType:
        if name in self._known:
            return self._known[name]
        if name in self._open:
            circle = " -> ".join((*self._open[self._open.index(name) :], name))
            raise table.error(key, f"type {shown(name)} makes a struct recursive: {circle}")
        if name in self._unread:
            if len(self._open) >= NESTING_MAX:
                raise table.error(key, f"more than {NESTING_MAX} structs are nested")
            return self._struct(name)
        if "<" in name:
            raise table.error(key, f"type {shown(name)} is malformed; write Array<T> with the name of a type")
        raise table.error(key, f"unknown type {shown(name)}{meant(name, {*self._known, *self._unread})}")

    def _struct(self, name: str) -> Struct:
        known = self._known.get(name)
        if isinstance(known, Struct):
            return known
        table = self._unread[name]
        self._open.append(name)
        fields = self._fields(table)
        struct = Struct(name, fields, table.docs())
        self._weights[name] = _weigh(table, [self.weight(field.type) for field in fields])
        self._open.pop()
        self._known[name] = struct
        return struct

    def _fields(self, table: Table) -> tuple[Field, ...]:
        members = self.members(table, "fields", FIELDS_MAX, "field", required=True)
        return tuple(Field(*member) for member in members)


class _Weight:
    """What a type adds to what holds it: scalars and pointers, levels of structs, and whether it has arrays."""

    def __init__(self, leaves: int, depth: int, arrays: bool) -> None:
        self.leaves = leaves
        self.depth = depth
        self.arrays = arrays


_NO_WEIGHT: Final = _Weight(0, 0, False)


def _weigh(table: Table, parts: list[_Weight]) -> _Weight:
    """Add up the parts of a struct, or of a function's parameters; what is too heavy is noted and weighs nothing."""
    leaves = sum(part.leaves for part in parts)
    if leaves > LEAVES_MAX:
        table.note(table.error("name", f"{leaves} scalars and pointers in all; the limit is {LEAVES_MAX}"))
        return _NO_WEIGHT
    depth = 1 + max((part.depth for part in parts), default=0)
    if depth > NESTING_MAX:
        table.note(table.error("name", f"{depth} structs are nested; the limit is {NESTING_MAX}"))
        return _NO_WEIGHT
    return _Weight(leaves, depth, any(part.arrays for part in parts))


def _claimed(table: Table, names: Names, reserved: Collection[str] = ()) -> str:
    """Return the name of a table, which none of its kind has had; where it is wrong, note that."""
    with table.noting():
        name = table.identifier(reserved)
        names.add(table, name)
    return str(table.values.get("name"))


def _enum(table: Table, types: Names) -> Enum:
    table.allow(_ENUM_KEYS)
    name = _claimed(table, types, _RESERVED_TYPES)
    holder = U64  # the widest, where it is not known
    with table.noting():
        holder = _repr(table)
    names = Names("variant")
    values: dict[str, int] = {}
    variants: list[Variant] = []
    for item in table.tables("variants", VARIANTS_MAX, required=True):
        item.allow(_VARIANT_KEYS)
        variant = _claimed(item, names, _RESERVED_VARIANTS)
        if variant.startswith("_") and variant.endswith("_"):
            item.note(item.error("name", f"name {variant!r} is reserved: no Python enum can have it"))
        value = 0  # where it cannot be read: others may refer to it
        with item.noting():
            value = _variant_value(item, values, holder)
        values[variant] = value
        variants.append(Variant(variant, value, item.docs()))
    return Enum(name, holder, table.boolean("bitflag"), tuple(variants), table.docs())


def _repr(table: Table) -> Scalar:
    written = table.text("repr")
    if written not in REPRS:
        raise table.error("repr", f"repr {shown(written)} is none of {', '.join(REPRS)}")
    return REPRS[written]


def _variant_value(table: Table, earlier: Mapping[str, int], holder: Scalar) -> int:
    expression = table.text("value")
    try:
        return evaluate(expression, earlier, holder)
    except ExpressionError as error:
        raise table.error("value", f"value {shown(expression)}: {error}", offset=error.offset) from None


def _contracts(top: Table, keys: tuple[str, ...], types: _Types, ids: Names, *, guest: bool) -> tuple[Contract, ...]:
    found: list[Contract] = []
    for table in (each for key in keys for each in top.tables(key, CONTRACTS_MAX)):
        table.allow(_GUEST_KEYS if guest else _HOST_KEYS)
        functions = _functions(table, types)
        singleton, docs = table.boolean("singleton"), table.docs()
        with table.noting():
            name, version = _named(table, ids, guest=guest)
            found.append(Contract(name, version, singleton, functions, guest, docs))
    return tuple(found)


def _named(table: Table, ids: Names, *, guest: bool) -> tuple[str, Version]:
    """Read what makes up the id of a contract, which no other one of the file has."""
    version = Version(1)
    with table.noting():
        version = _version(table)
    name = table.text("name")
    try:
        contract_id = (GuestContractId if guest else HostContractId)(name, version.major)
    except ValueError as error:
        raise table.error("name", str(error)) from None
    ids.add(table, f"{name}@{version.major}", int(contract_id))
    return name, version


def _version(table: Table) -> Version:
    try:
        return Version.parse(table.text("version"))
    except ValueError as error:
        raise table.error("version", str(error)) from None


def _functions(table: Table, types: _Types) -> tuple[Function, ...]:
    names = Names("function")
    functions: list[Function] = []
    for index, item in enumerate(table.tables("functions", FUNCTIONS_MAX)):
        item.allow(_FUNCTION_KEYS)
        name = _claimed(item, names)
        params = tuple(
            Param(*member) for member in types.members(item, "params", PARAMS_MAX, "parameter", _RESERVED_PARAMS)
        )
        _weigh(item, [types.weight(param.type) for param in params])
        with item.noting():
            result, result_docs = _result(item, types)
            functions.append(Function(name, index, params, result, item.docs(), result_docs))
    return tuple(functions)


def _result(table: Table, types: _Types) -> tuple[ResultType, str]:
    if "return" not in table.values:
        return VOID, ""
    value = table.values["return"]
    if type(value) is str:
        return types.named(table, "return"), ""
    if type(value) is not dict:
        raise table.mismatch("return", value, 'the name of a type or { type = "...", docs = "..." }')
    result = table.table("return")
    result.allow(_RETURN_KEYS)
    return types.named(result), result.docs()
