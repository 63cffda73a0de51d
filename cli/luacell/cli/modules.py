"""Python source for typed contracts: enums, dataclasses, and for each contract a Protocol of its proxies.

    Access, Point             the types, as api.toml names them
    Shapes, AsyncShapes       host.shapes, as both bridges give it; with the major behind it where there are several
    shapes(bridge)            its proxy; async_shapes(bridge) is awaited

The text depends on the description alone. Names that an api.toml uses itself are not taken: what the text needs under
such a name it imports, or names, with an underscore behind it.
"""

from __future__ import annotations

import enum
import keyword
import re
from collections.abc import Iterable, Iterator
from typing import Final

from luacell.cli.explanation import types_of
from luacell.protocol.api import (
    Api,
    Array,
    Buffer,
    Contract,
    Enum,
    Function,
    Ptr,
    Scalar,
    StringView,
    Struct,
    Void,
)
from luacell.protocol.api.model import ResultType

_IMPORTS: Final = {
    "builtins": ("bool", "bytearray", "bytes", "float", "int", "list", "memoryview", "str", "tuple"),
    "dataclasses": ("dataclass",),
    "enum": ("IntEnum", "IntFlag"),
    "typing": ("Protocol", "TypeAlias", "cast"),
    "luacell.client.typed.values": ("Flags",),
    "luacell.client": ("AsyncLuaHostBridge", "LuaHostBridge"),
}
_ENUM_NAMES: Final = frozenset(dir(enum.IntFlag)) | frozenset(dir(enum.IntEnum)) | {"name", "value"}
_WORD: Final = re.compile(r"[^\W_]+")
_INDENT: Final = "    "


def python_module(api: Api, contracts: Iterable[Contract], *, is_stub: bool) -> str:
    """Write a module.

    Args:
        api: which declares the types.
        contracts: of it, which are to have proxies.
        is_stub: whether it is to be a .pyi, which only type checkers read.
    """
    return _Module(api, list(contracts), is_stub).text()


class _Module:
    def __init__(self, api: Api, contracts: list[Contract], is_stub: bool) -> None:
        self._api = api
        self._contracts = contracts
        self._is_stub = is_stub
        types = {each.name for each in api.structs} | {each.name for each in api.enums}
        self._members = {field.name for struct in api.structs for field in struct.fields}
        self._members |= {function.name for contract in contracts for function in contract.functions}
        self._taken = types | self._members  # at the top level, members hide what is there
        self._bridge = self._free("bridge")
        self._imported: dict[str, str] = {}
        self._modules: dict[str, set[str]] = {}
        self._aliases: dict[str, str] = {}

    def text(self) -> str:
        """Return the whole."""
        blocks = [list(self._enum(each)) for each in self._api.enums]
        blocks += [list(self._struct(each)) for each in self._api.structs]
        for contract in self._contracts:
            blocks += self._contract(contract)
        alias = self._use("TypeAlias") if self._aliases else ""
        aliases = [f"{short}: {alias} = {name}" for name, short in sorted(self._aliases.items())]
        blocks += [aliases] if aliases else []
        names = ", ".join(map(str, self._contracts))
        head = [
            f'"""Typed contracts: {names}. Written by `luacell stubs`; changes are lost when it is written anew."""'
        ]
        head += ["", "from __future__ import annotations", "", *self._import_lines()]
        return "\n".join(head) + "\n" + "".join("\n\n" + "\n".join(block) + "\n" for block in blocks)

    def _free(self, name: str) -> str:
        """Return a name that nothing else has."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def _use(self, name: str) -> str:
        """Import a name, once; return what it is called here."""
        if name not in self._imported:
            self._imported[name] = self._free(name)
            module = next(module for module, names in _IMPORTS.items() if name in names)
            self._modules.setdefault(module, set()).add(name)
        return self._imported[name]

    def _import_lines(self) -> Iterator[str]:
        is_own = False
        for module in sorted(self._modules, key=lambda module: (module.startswith("luacell"), module)):
            names = [(name, self._imported[name]) for name in sorted(self._modules[module])]
            if module == "builtins":  # they are there, where nothing hides them
                names = [(name, here) for name, here in names if name != here]
            if names:
                if module.startswith("luacell") and not is_own:
                    is_own = True
                    yield ""
                parts = (name if name == here else f"{name} as {here}" for name, here in names)
                yield f"from {module} import {', '.join(parts)}"

    def _type(self, type_: ResultType, *, taken: bool = False) -> str:
        """Write a type: of a value that is given, or, where `taken` is set, of one that is accepted."""
        if isinstance(type_, Void):
            return "None"
        if isinstance(type_, Struct | Enum):
            if type_.name not in self._members:
                return type_.name
            if type_.name not in self._aliases:
                self._aliases[type_.name] = self._free(type_.name)
            return self._aliases[type_.name]
        if isinstance(type_, Buffer):
            kinds = ("bytes", "bytearray", "memoryview") if taken else ("bytes",)
            return " | ".join(map(self._use, kinds))
        if isinstance(type_, Array):
            item = self._type(type_.item, taken=taken)
            one = f"{self._use('list')}[{item}]"
            return f"{one} | {self._use('tuple')}[{item}, ...]" if taken else one
        if isinstance(type_, Scalar):
            return self._use(type_.kind)
        return self._use({StringView: "str", Ptr: "int"}[type(type_)])

    # -- types ----------------------------------------------------------------------------------------------------
    def _enum(self, type_: Enum) -> Iterator[str]:
        if any(variant.name in _ENUM_NAMES for variant in type_.variants):  # no class body can have those
            made = self._use("IntFlag" if type_.bitflag else "IntEnum")
            members = ", ".join(f'("{variant.name}", {variant.value})' for variant in type_.variants)
            yield f'{type_.name} = {made}("{type_.name}", [{members}])'
            return
        base = self._use("Flags" if type_.bitflag else "IntEnum")
        yield f"class {type_.name}({base}):"
        yield from _docstring(type_.docs or f"{type_.name}, as its api.toml declares it.", 1)
        yield ""
        for variant in type_.variants:
            yield f"{_INDENT}{variant.name} = {variant.value}"
            yield from _docstring(variant.docs, 1) if variant.docs else ()

    def _struct(self, type_: Struct) -> Iterator[str]:
        yield f"@{self._use('dataclass')}(slots=True)"
        yield f"class {type_.name}:"
        yield from _docstring(type_.docs or f"{type_.name}, as its api.toml declares it.", 1)
        yield ""
        for field in type_.fields:
            yield f"{_INDENT}{field.name}: {self._type(field.type)}"
            yield from _docstring(field.docs, 1) if field.docs else ()

    # -- contracts ------------------------------------------------------------------------------------------------
    def _contract(self, contract: Contract) -> list[list[str]]:
        words = _WORD.findall(contract.name.rpartition(".")[2]) or ["Contract"]
        major = str(contract.version.major) if self._has_namesakes(contract) else ""
        title = "".join(word[:1].upper() + word[1:] for word in words) + major
        plain = "_".join(word.lower() for word in words) + major
        sync, awaited = self._free(_fit(title)), self._free(f"Async{title}")
        make, make_async = self._free(_fit(plain)), self._free(f"async_{plain}")
        return [
            list(self._protocol(contract, sync, "")),
            list(self._protocol(contract, awaited, "async ")),
            list(self._maker(contract, make, sync, "LuaHostBridge", "")),
            list(self._maker(contract, make_async, awaited, "AsyncLuaHostBridge", "async ")),
        ]

    def _has_namesakes(self, contract: Contract) -> bool:
        last = contract.name.rpartition(".")[2]
        return sum(each.name.rpartition(".")[2] == last for each in self._contracts) > 1

    def _protocol(self, contract: Contract, name: str, prefix: str) -> Iterator[str]:
        yield f"class {name}({self._use('Protocol')}):"
        yield from _docstring(contract.docs or f"{contract.name} {contract.version}.", 1)
        for function in contract.functions:
            yield ""
            yield from self._method(function, prefix)
        if contract.function("with_options") is None:
            limit = self._use("float")
            yield ""
            yield f"{_INDENT}def with_options(self, *, timeout: {limit} | None = None) -> {name}:"
            yield from _docstring("Return a proxy of the same instance whose calls have a timeout, in seconds.", 2)
            yield f"{_INDENT * 2}..."

    def _method(self, function: Function, prefix: str) -> Iterator[str]:
        params = ", ".join(["self", *(f"{each.name}: {self._type(each.type, taken=True)}" for each in function.params)])
        yield f"{_INDENT}{prefix}def {function.name}({params}) -> {self._type(function.result)}:"
        docs = [function.docs or f"{function.name}, as its api.toml declares it."]
        told = [f"{_INDENT}{each.name}: {_joined(each.docs)}" for each in function.params if each.docs]
        docs += ["\n".join(["Args:", *told])] if told else []
        docs += [f"Returns:\n{_INDENT}{_joined(function.result_docs)}"] if function.result_docs else []
        yield from _docstring("\n\n".join(docs), 2)
        yield f"{_INDENT * 2}..."

    def _maker(self, contract: Contract, name: str, made: str, bridge: str, prefix: str) -> Iterator[str]:
        wait = "await " if prefix else ""
        yield f"{prefix}def {name}({self._bridge}: {self._use(bridge)}) -> {made}:"
        yield from _docstring(f"Return a proxy of {contract}, of version {contract.version} at least.", 1)
        if self._is_stub:
            yield f"{_INDENT}..."
            return
        names = [each.name for each in types_of(contract)]
        given = f"{names[0]}," if len(names) == 1 else ", ".join(names)
        asked = f'{wait}{self._bridge}.contract("{contract.name}", "{contract.version}", types=({given}))'
        yield f"{_INDENT}return {self._use('cast')}({made}, {asked})"


def _fit(name: str) -> str:
    """Make a name an identifier that is no keyword."""
    return f"{name}_" if keyword.iskeyword(name) or not name.isidentifier() else name


def _joined(text: str) -> str:
    return " ".join(text.split())


def _docstring(text: str, depth: int) -> Iterator[str]:
    """Write a docstring; what would end it or steer it is escaped."""
    indent = _INDENT * depth
    text = text.replace("\\", "\\\\")
    if '"""' in text or text.endswith('"'):
        text = text.replace('"', '\\"')
    lines = text.splitlines()
    if len(lines) == 1:
        yield f'{indent}"""{text}"""'
        return
    yield f'{indent}"""{lines[0]}'
    yield from (f"{indent}{line}".rstrip() for line in lines[1:])
    yield f'{indent}"""'
