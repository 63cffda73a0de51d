"""What a typed contract is, does and takes, and how its values lie in memory: as text, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luacell.protocol.api import (
    Api,
    Array,
    Buffer,
    Contract,
    Enum,
    Function,
    FunctionLayout,
    Layout,
    Ptr,
    Scalar,
    StringView,
    Struct,
    layout_of,
)
from luacell.protocol.api.model import ResultType, ValueType, Void
from luacell.protocol.identity import format_id

INDENT = "    "


# -- text ----
def as_lines(api: Api, contract: Contract) -> list[str]:
    """Write a contract for people."""
    kind = "singleton: one instance for all callers" if contract.singleton else "an instance for each caller"
    lines = [f"{contract.name} {contract.version}  {format_id(int(contract.id))}  {kind}", *_indented(contract.docs)]
    for function in contract.functions:
        layout = FunctionLayout.of(function)
        lines += ["", f"{function.id}  {function.name}", *_indented(function.docs)]
        lines += [f"{INDENT}Lua     {lua_signature(function)}", f"{INDENT}Python  {python_signature(function)}"]
        for param in function.params:
            lines += _indented(f"{param.name}: {param.docs}") if param.docs else []
        lines += _indented(f"returns {function.result_docs}") if function.result_docs else []
        lines += _layout_lines("args", layout.args, [(param.name, param.type) for param in function.params])
        lines += _layout_lines("result", layout.result, _result_members(function.result))
    for type_ in types_of(contract):
        lines += ["", *_type_lines(type_)]
    return lines


def _indented(text: str) -> list[str]:
    return [f"{INDENT}{line}".rstrip() for line in text.splitlines()]


def _layout_lines(title: str, layout: Layout | None, members: list[tuple[str, ValueType]]) -> list[str]:
    if layout is None:
        return [f"{INDENT}{title:<7} none"]
    offsets = layout.offsets if len(members) > 1 else (0,)  # one parameter is passed as it is
    lines = [f"{INDENT}{title:<7} {layout.size} bytes, aligned to {layout.align}"]
    rows = [
        (str(offset), str(layout_of(type_).size), type_.name, name)
        for offset, (name, type_) in zip(offsets, members, strict=True)
    ]
    return lines + _columns(rows)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align offset, size, type and name."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{INDENT}  @{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}".rstrip()
        for row in rows
    ]


def _result_members(type_: ResultType) -> list[tuple[str, ValueType]]:
    return [] if isinstance(type_, Void) else [("", type_)]


def _type_lines(type_: Struct | Enum) -> list[str]:
    if isinstance(type_, Enum):
        kind = "flags" if type_.bitflag else "enum"
        lines = [f"{kind} {type_.name}: {type_.repr.name}", *_indented(type_.docs)]
        width = max(len(variant.name) for variant in type_.variants)
        for variant in type_.variants:
            value = f"{variant.value:#x}" if type_.bitflag else str(variant.value)
            docs = f"  {' '.join(variant.docs.split())}" if variant.docs else ""
            lines.append(f"{INDENT}  {variant.name:<{width}}  {value}{docs}")
        return lines
    layout = layout_of(type_)
    lines = [f"struct {type_.name}: {layout.size} bytes, aligned to {layout.align}", *_indented(type_.docs)]
    rows = [
        (str(offset), str(layout_of(field.type).size), field.type.name, field.name)
        for offset, field in zip(layout.offsets, type_.fields, strict=True)
    ]
    return lines + _columns(rows)


def lua_signature(function: Function) -> str:
    """Write a function as its Lua author does, types behind it."""
    names = ", ".join(param.name for param in function.params)
    kinds = ", ".join(f"{param.name}: {lua_type(param.type)}" for param in function.params)
    result = "" if isinstance(function.result, Void) else f" -> {lua_type(function.result)}"
    types = f"  -- {kinds}{result}" if kinds or result else ""
    return f"function Service:{function.name}({names}){types}"


def lua_type(type_: ValueType) -> str:
    """Say what a value is in Lua."""
    if isinstance(type_, Scalar):
        wide = {"u64": "number or uint64_t", "i64": "number or int64_t"}  # cdata where a number is not exact
        return "boolean" if type_.kind == "bool" else wide.get(type_.name, "number")
    if isinstance(type_, StringView | Buffer):
        return "string"
    if isinstance(type_, Array):
        return f"{{{lua_type(type_.item)}, ...}}"
    return "uint64_t" if isinstance(type_, Ptr) else type_.name


def python_signature(function: Function) -> str:
    """Write a function as the method of its proxy."""
    params = ", ".join(f"{param.name}: {python_type(param.type)}" for param in function.params)
    return f"{function.name}({params}) -> {python_type(function.result)}"


def python_type(type_: ResultType) -> str:
    """Name the Python type of a value."""
    if isinstance(type_, Scalar):
        return type_.kind
    if isinstance(type_, Array):
        return f"list[{python_type(type_.item)}]"
    if isinstance(type_, Struct | Enum):
        return type_.name
    if isinstance(type_, Void):
        return "None"
    return "str" if isinstance(type_, StringView) else "bytes" if isinstance(type_, Buffer) else "int"


def types_of(contract: Contract) -> list[Struct | Enum]:
    """Return the structs and enums that a contract uses, each before those that it holds."""
    found: dict[str, Struct | Enum] = {}

    def add(type_: ResultType) -> None:
        if isinstance(type_, Array):
            add(type_.item)
        elif isinstance(type_, Struct | Enum) and type_.name not in found:
            found[type_.name] = type_
            for field in type_.fields if isinstance(type_, Struct) else ():
                add(field.type)

    for function in contract.functions:
        for param in function.params:
            add(param.type)
        add(function.result)
    return list(found.values())


# -- JSON ----
def as_dict(contract: Contract) -> dict[str, Any]:
    """Write a contract for programs."""
    return {
        "name": contract.name,
        "version": str(contract.version),
        "id": format_id(int(contract.id)),
        "singleton": contract.singleton,
        "docs": contract.docs,
        "functions": [_function_dict(function) for function in contract.functions],
        "types": [_type_dict(type_) for type_ in types_of(contract)],
    }


def _function_dict(function: Function) -> dict[str, Any]:
    layout = FunctionLayout.of(function)
    return {
        "id": function.id,
        "name": function.name,
        "docs": function.docs,
        "lua": lua_signature(function),
        "python": python_signature(function),
        "params": [{"name": each.name, "type": each.type.name, "docs": each.docs} for each in function.params],
        "return": {"type": function.result.name, "docs": function.result_docs},
        "args": _layout_dict(layout.args),
        "result": _layout_dict(layout.result),
    }


def _layout_dict(layout: Layout | None) -> dict[str, Any] | None:
    if layout is None:
        return None
    leaves = [{"path": leaf.path, "offset": leaf.offset, "size": leaf.size} for leaf in layout.leaves]
    return {"size": layout.size, "align": layout.align, "leaves": leaves}


def _type_dict(type_: Struct | Enum) -> dict[str, Any]:
    head = {"name": type_.name, "kind": "struct" if isinstance(type_, Struct) else "enum", "docs": type_.docs}
    if isinstance(type_, Enum):
        variants = [{"name": each.name, "value": each.value, "docs": each.docs} for each in type_.variants]
        return {**head, "repr": type_.repr.name, "bitflag": type_.bitflag, "variants": variants}
    fields = [
        {"name": field.name, "type": field.type.name, "offset": offset, "docs": field.docs}
        for field, offset in zip(type_.fields, layout_of(type_).offsets, strict=True)
    ]
    layout = layout_of(type_)
    return {**head, "size": layout.size, "align": layout.align, "fields": fields}
