"""From the text of an api.toml to the Api that it declares.

Everything that is wrong is an ApiError, with file, line, column, the key or value, and what was probably meant. It
reads no file and lays out no memory.
"""

from __future__ import annotations

import re
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
        ApiError: what is wrong first, and where.
    """
    top = Table.read(text, filename)
    top.allow(_TOP_KEYS)
    types = _Types(top)
    ids = Names("contract")
    host_contracts = tuple(
        _contract(table, types, ids, guest=False) for table in top.tables("host_contract", CONTRACTS_MAX)
    )
    guest_contracts = tuple(
        _contract(table, types, ids, guest=True)
        for key in ("guest_contract", "plugin_contract")
        for table in top.tables(key, CONTRACTS_MAX)
    )
    return Api(types.structs, types.enums, host_contracts, guest_contracts, top.docs())


class _Types:
    """The types of a file, resolved by name; structs may refer to later ones."""

    def __init__(self, top: Table) -> None:
        self._known: dict[str, ResultType] = dict(BUILT_IN)
        self._unread: dict[str, Table] = {}
        self._open: list[str] = []  # structs that are being read, outermost first
        self._weights: dict[str, _Weight] = {}
        names = Names("type")
        for table in top.tables("types", TYPES_MAX):
            table.allow(_TYPE_KEYS)
            name = table.identifier(_RESERVED_TYPES)
            names.add(table, name)
            self._unread[name] = table
        enums = [_enum(table, names) for table in top.tables("enum", TYPES_MAX)]
        self.enums = tuple(enums)
        self._known.update((enum.name, enum) for enum in enums)
        self.structs = tuple(self._struct(name) for name in list(self._unread))

    def member(self, table: Table, kind: str) -> ValueType:
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
        names = Names("field")
        fields: list[Field] = []
        for item in table.tables("fields", FIELDS_MAX, required=True):
            item.allow(_MEMBER_KEYS)
            field = Field(item.identifier(), self.member(item, "field"), item.docs())
            names.add(item, field.name)
            fields.append(field)
        struct = Struct(name, tuple(fields), table.docs())
        self._weights[name] = _weigh(table, [self.weight(field.type) for field in fields])
        self._open.pop()
        self._known[name] = struct
        return struct


class _Weight:
    """What a type adds to what holds it: scalars and pointers, levels of structs, and whether it has arrays."""

    def __init__(self, leaves: int, depth: int, arrays: bool) -> None:
        self.leaves = leaves
        self.depth = depth
        self.arrays = arrays


def _weigh(table: Table, parts: list[_Weight]) -> _Weight:
    """Add up the parts of a struct, or of a function's parameters."""
    leaves = sum(part.leaves for part in parts)
    if leaves > LEAVES_MAX:
        raise table.error("name", f"{leaves} scalars and pointers in all; the limit is {LEAVES_MAX}")
    depth = 1 + max((part.depth for part in parts), default=0)
    if depth > NESTING_MAX:
        raise table.error("name", f"{depth} structs are nested; the limit is {NESTING_MAX}")
    return _Weight(leaves, depth, any(part.arrays for part in parts))


def _enum(table: Table, types: Names) -> Enum:
    table.allow(_ENUM_KEYS)
    name = table.identifier(_RESERVED_TYPES)
    types.add(table, name)
    written = table.text("repr")
    if written not in REPRS:
        raise table.error("repr", f"repr {shown(written)} is none of {', '.join(REPRS)}")
    holder = REPRS[written]
    names = Names("variant")
    values: dict[str, int] = {}
    variants: list[Variant] = []
    for item in table.tables("variants", VARIANTS_MAX, required=True):
        item.allow(_VARIANT_KEYS)
        variant = item.identifier(_RESERVED_VARIANTS)
        if variant.startswith("_") and variant.endswith("_"):
            raise item.error("name", f"name {variant!r} is reserved: no Python enum can have it")
        names.add(item, variant)
        expression = item.text("value")
        try:
            values[variant] = evaluate(expression, values, holder)
        except ExpressionError as error:
            raise item.error("value", f"value {shown(expression)}: {error}", offset=error.offset) from None
        variants.append(Variant(variant, values[variant], item.docs()))
    return Enum(name, holder, table.boolean("bitflag"), tuple(variants), table.docs())


def _contract(table: Table, types: _Types, ids: Names, *, guest: bool) -> Contract:
    table.allow(_GUEST_KEYS if guest else _HOST_KEYS)
    name = table.text("name")
    version = _version(table)
    try:
        contract_id = (GuestContractId if guest else HostContractId)(name, version.major)
    except ValueError as error:
        raise table.error("name", str(error)) from None
    ids.add(table, f"{name}@{version.major}", int(contract_id))
    names = Names("function")
    functions: list[Function] = []
    for index, item in enumerate(table.tables("functions", FUNCTIONS_MAX)):
        item.allow(_FUNCTION_KEYS)
        function = _function(item, index, types)
        names.add(item, function.name)
        functions.append(function)
    return Contract(name, version, table.boolean("singleton"), tuple(functions), guest, table.docs())


def _version(table: Table) -> Version:
    try:
        return Version.parse(table.text("version"))
    except ValueError as error:
        raise table.error("version", str(error)) from None


def _function(table: Table, index: int, types: _Types) -> Function:
    name = table.identifier()
    names = Names("parameter")
    params: list[Param] = []
    for item in table.tables("params", PARAMS_MAX):
        item.allow(_MEMBER_KEYS)
        param = Param(item.identifier(_RESERVED_PARAMS), types.member(item, "parameter"), item.docs())
        names.add(item, param.name)
        params.append(param)
    _weigh(table, [types.weight(param.type) for param in params])
    result, result_docs = _result(table, types)
    return Function(name, index, tuple(params), result, table.docs(), result_docs)


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
