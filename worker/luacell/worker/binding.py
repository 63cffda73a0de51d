"""Bindings of typed contracts: Lua source that turns a function's memory into values, calls it, and writes its result.

Generated once, when a contract is loaded; LuaJIT compiles it like anything else, so that no description is interpreted
in a call. It generates text and knows no VM; what the text stands on is `lua/typed.lua`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from luacell.protocol.api.layout import FunctionLayout, Layout, layout_of
from luacell.protocol.api.model import (
    ARRAY_ITEMS_MAX,
    Array,
    Buffer,
    Contract,
    Enum,
    Function,
    Ptr,
    Scalar,
    StringView,
    Struct,
    ValueType,
    Void,
)

_C_NAMES: Final = {
    **{f"u{bits}": f"uint{bits}_t" for bits in (8, 16, 32, 64)},
    **{f"i{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
    "bool": "uint8_t",
}
_WORD: Final = 8


def binding_source(contract: Contract) -> str:
    """Return the Lua chunk that binds an implementation.

    It is called with typed.lua's table and the implementation, and returns what the worker calls, or nil and a reason.
    """
    functions = "\n".join(_Generator(contract, function).text() for function in contract.functions)
    names = ", ".join(f"[{function.id}] = {_quoted(function.name)}" for function in contract.functions)
    is_singleton = "true" if contract.singleton else "false"
    return f"""local typed, implementation = ...
local ffi = require("ffi")
local cast, new, fill, copy = ffi.cast, ffi.new, ffi.fill, ffi.copy
local functions = {{}}
{functions}
return typed.bind(implementation, {is_singleton}, functions, {{ {names} }}, {_quoted(str(contract))})
"""


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


class _Generator:
    """The text of one function."""

    def __init__(self, contract: Contract, function: Function) -> None:
        self._where = f"{contract} {function.name}"
        self._function = function
        self._layout = FunctionLayout.of(function)
        self._names = 0

    def text(self) -> str:
        """Return an assignment to `functions`."""
        function, layout = self._function, self._layout
        lines: list[str] = []
        arguments = ["self"]
        if layout.args is not None:
            lines.append(f"if args_size < {layout.args.size} then")
            lines.append(f'  error("{self._where}: " .. args_size .. " bytes of arguments, not {layout.args.size}", 0)')
            lines.append("end")
        for param, offset in zip(function.params, self._offsets(layout.args), strict=True):
            value = self._name()
            lines += self._read(param.type, "payload", str(offset), value, f"{self._where}: {param.name}", 0)
            arguments.append(value)
        call = f"self[{_quoted(function.name)}]({', '.join(arguments)})"
        if layout.result is None or isinstance(function.result, Void):
            lines += [f"{call}", "return 0"]
        else:
            lines.append(f"local result = {call}")
            lines.append(f"local tail = typed.tail({layout.result.size})")
            lines.append(f"local fixed = new('uint8_t[{layout.result.size}]')")
            lines += self._write(function.result, "fixed", "0", "result", f"{self._where}: result", 0)
            lines.append(f"return typed.deliver(arena, out, out_size, tail, fixed, {layout.result.size})")
        body = "\n".join(f"  {line}" for line in lines)
        return f"functions[{function.id}] = function(self, arena, payload, args_size, out, out_size)\n{body}\nend"

    def _offsets(self, layout: Layout | None) -> tuple[int, ...]:
        if layout is None:
            return ()
        return (0,) if len(self._function.params) == 1 else layout.offsets

    def _name(self) -> str:
        self._names += 1
        return f"v{self._names}"

    # -- from memory ----------------------------------------------------------------------------------------------
    def _read(self, type_: ValueType, base: str, at: str, value: str, where: str, depth: int) -> Iterator[str]:
        """Yield statements that declare `value` as what lies `at` bytes behind `base`."""
        place = f"{base} + {at}"
        if isinstance(type_, Scalar):
            yield f"local {value} = {_loaded(type_, place)}"
        elif isinstance(type_, Enum):
            yield f"local {value} = {_loaded(type_.repr, place)}"
        elif isinstance(type_, Ptr):
            yield f"local {value} = cast('uint64_t *', {place})[0]"
        elif isinstance(type_, StringView | Buffer):
            words = f"cast('uint64_t *', {place})"
            yield f"local {value} = typed.text(payload, args_size, {words}[0], {words}[1], {_quoted(where)})"
        elif isinstance(type_, Struct):
            yield f"local {value} = {{}}"
            yield "do"
            for field, offset in zip(type_.fields, layout_of(type_).offsets, strict=True):
                inner = self._name()
                path = f"{where}.{field.name}"
                yield from _indented(self._read(field.type, base, f"{at} + {offset}", inner, path, depth))
                yield f"  {value}[{_quoted(field.name)}] = {inner}"
            yield "end"
        else:
            yield from self._read_items(type_, place, value, where, depth)

    def _read_items(self, type_: Array, place: str, value: str, where: str, depth: int) -> Iterator[str]:
        item, items, count, index = self._name(), self._name(), self._name(), self._name()
        size = layout_of(type_.item).size
        words = f"cast('uint64_t *', {place})"
        yield f"local {value} = {{}}"
        yield f"if {words}[1] > 0 then"
        yield (
            f"  local {items}, {count} = typed.span(payload, args_size, {words}[0], {words}[1], {size}, "
            f"{_quoted(where)})"
        )
        yield f"  for {index} = 1, {count} do"
        inner = self._read(type_.item, items, f"({index} - 1) * {size}", item, f"{where}[]", depth + 1)
        yield from _indented(_indented(inner))
        yield f"    {value}[{index}] = {item}"
        yield "  end"
        yield "end"

    # -- into memory ----------------------------------------------------------------------------------------------
    def _write(self, type_: ValueType, base: str, at: str, value: str, where: str, depth: int) -> Iterator[str]:
        """Yield statements that write `value` so that it lies `at` bytes behind `base`."""
        place, quoted = f"{base} + {at}", _quoted(where)
        if isinstance(type_, Scalar):
            yield _stored(type_, place, _checked(type_, value, quoted))
        elif isinstance(type_, Enum):
            repr_ = type_.repr
            if repr_.size == _WORD:
                yield _stored(repr_, place, f"typed.unsigned64({value}, {quoted})")
            else:
                yield _stored(repr_, place, f"typed.integer({value}, 0, {repr_.high}, {quoted}, {_quoted(type_.name)})")
        elif isinstance(type_, Ptr):
            yield f"cast('uint64_t *', {place})[0] = typed.unsigned64({value}, {quoted})"
        elif isinstance(type_, StringView | Buffer):
            words, text = self._name(), self._name()
            yield f"local {text} = typed.bytes({value}, {quoted}, {_quoted(type_.name)})"
            yield f"local {words} = cast('uint64_t *', {place})"
            yield f"{words}[0], {words}[1] = tail:bytes({text}), #{text}"
            if isinstance(type_, Buffer):
                yield f"{words}[2] = #{text}"
        elif isinstance(type_, Struct):
            yield f"typed.record({value}, {quoted}, {_quoted(type_.name)})"
            for field, offset in zip(type_.fields, layout_of(type_).offsets, strict=True):
                yield "do"
                inner = f"{value}[{_quoted(field.name)}]"
                path = f"{where}.{field.name}"
                yield from _indented(self._write(field.type, base, f"{at} + {offset}", inner, path, depth))
                yield "end"
        else:
            yield from self._write_items(type_, place, value, where, depth)

    def _write_items(self, type_: Array, place: str, value: str, where: str, depth: int) -> Iterator[str]:
        words, memory, index, items = self._name(), self._name(), self._name(), self._name()
        size = layout_of(type_.item).size
        yield f"local {items} = typed.list({value}, {_quoted(where)}, {_quoted(type_.name)}, {ARRAY_ITEMS_MAX})"
        yield f"local {memory} = new('uint8_t[?]', #{items} * {size})"
        yield f"local {words} = cast('uint64_t *', {place})"
        yield f"{words}[0], {words}[1] = tail:room({memory}, #{items} * {size}), #{items}"
        yield f"for {index} = 1, #{items} do"
        inner = self._write(type_.item, memory, f"({index} - 1) * {size}", f"{items}[{index}]", f"{where}[]", depth + 1)
        yield from _indented(inner)
        yield "end"


def _indented(lines: Iterator[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)


def _loaded(scalar: Scalar, place: str) -> str:
    memory = f"cast('{_C_NAMES[scalar.name]} *', {place})[0]"
    if scalar.kind == "bool":
        return f"{memory} ~= 0"
    if scalar.size == _WORD and scalar.kind == "int":
        return f"typed.number64{'' if scalar.code.islower() else 'u'}({memory})"
    return memory


def _stored(scalar: Scalar, place: str, value: str) -> str:
    return f"cast('{_C_NAMES[scalar.name]} *', {place})[0] = {value}"


def _checked(scalar: Scalar, value: str, where: str) -> str:
    if scalar.kind == "bool":
        return f"typed.boolean({value}, {where})"
    if scalar.kind == "float":
        return f"typed.float({value}, {where}, {_quoted(scalar.name)})"
    if scalar.size == _WORD:
        return f"typed.{'signed64' if scalar.code.islower() else 'unsigned64'}({value}, {where})"
    return f"typed.integer({value}, {scalar.low}, {scalar.high}, {where}, {_quoted(scalar.name)})"
