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
_EXACT: Final = 1 << 53  # integers up to here are exact as Lua numbers


def binding_source(contract: Contract, enums: tuple[Enum, ...] = ()) -> str:
    """Return the Lua chunk that binds an implementation.

    It is called with typed.lua's table and returns two values: the enums that the implementation may look up, and a
    function that is given the implementation and returns what the worker calls, or nil and a reason.

    Args:
        contract: which the worker serves.
        enums: those of its api.toml.
    """
    texts = [_Generator(contract, function).text() for function in contract.functions]
    names = "".join(f"  [{function.id}] = {quoted(function.name)},\n" for function in contract.functions)
    types = "".join(f"local {_type_name(name)} = ffi.typeof('{c_name} *')\n" for name, c_name in _C_NAMES.items())
    tables = "".join(f"  [{quoted(enum.name)}] = {_enum_table(enum)},\n" for enum in enums)
    is_singleton = "true" if contract.singleton else "false"
    functions = "\n".join(texts)
    return f"""local typed = ...
local ffi = require("ffi")
local cast, fill, new = ffi.cast, ffi.fill, ffi.new
{types}local functions, arrays = {{}}, {{}}
{functions}
local names = {{
{names}}}
local enums = {{
{tables}}}
return enums, function(implementation)
  return typed.bind(implementation, {is_singleton}, functions, names, {len(texts)}, {quoted(str(contract))})
end
"""


def caller_source(contract: Contract) -> str:
    """Return the Lua chunk by which other contracts call a typed one.

    It is called with typed.lua's table and returns a table by the functions' names: `id`; `count` of arguments; `pack`,
    which makes a payload of them; `size` of the fixed part of a result and whether it `varies`; and `unpack`, which
    reads a result, or nil where there is none.

    Args:
        contract: which is called.
    """
    texts = [_Generator(contract, function).caller_text() for function in contract.functions]
    types = "".join(f"local {_type_name(name)} = ffi.typeof('{c_name} *')\n" for name, c_name in _C_NAMES.items())
    functions = "\n".join(texts)
    return f"""local typed = ...
local ffi = typed.ffi
local cast, new = ffi.cast, ffi.new
{types}local functions, arrays = {{}}, {{}}
{functions}
return functions
"""


def _type_name(scalar: str) -> str:
    return f"{scalar}_pointer"


def _enum_table(enum: Enum) -> str:
    """Return a table with the values by name and the names by value, where that is exact as a number."""
    values = "".join(f"[{quoted(each.name)}] = {_number(each.value)}, " for each in enum.variants)
    by_value = {each.value: each.name for each in reversed(enum.variants) if each.value <= _EXACT}
    return f"{{ {values}{''.join(f'[{value}] = {quoted(name)}, ' for value, name in by_value.items())}}}"


def _number(value: int) -> str:
    return str(value) if value <= _EXACT else f"{value}ULL"


def quoted(text: str) -> str:
    """Write a text as Lua does."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


class _Generator:
    """The text of one function."""

    def __init__(self, contract: Contract, function: Function) -> None:
        self._where = f"{contract} {function.name}"
        self._function = function
        self._layout = FunctionLayout.of(function)
        self._names = 0
        self._arrays: list[str] = []

    def text(self) -> str:
        """Return assignments to `functions`, and to `arrays` where the function takes some."""
        function, layout = self._function, self._layout
        lines: list[str] = []
        arguments = ["self"]
        if layout.args is not None:
            lines.append(f"if args_size < {layout.args.size} then")
            lines.append(f'  error("{self._where}: " .. args_size .. " bytes of arguments, not {layout.args.size}", 0)')
            lines.append("end")
        for param, offset in zip(function.params, self._offsets(layout.args), strict=True):
            arguments.append(self._read(param.type, "payload", offset, f"{self._where}: {param.name}"))
        call = f"self[{quoted(function.name)}]({', '.join(arguments)})"
        if layout.result is None or isinstance(function.result, Void):
            lines += [call, "return 0"]
        else:
            lines.append(f"local result = {call}")
            size, where = layout.result.size, quoted(self._where)
            if _varies(function.result):
                lines += [f"local tail = typed.tail({size})", f"local fixed = new('uint8_t[{size}]')"]
            else:  # written where it goes, if there is room: nothing is allocated
                lines += [f"local fits = out_size >= {size}", f"local fixed = fits and out or new('uint8_t[{size}]')"]
                if isinstance(function.result, Struct):
                    lines.append(f"fill(fixed, {size})")
            lines += self._write(function.result, "fixed", "0", "result", f"{self._where}: result")
            if not _varies(function.result):
                lines += [f"if fits then return {size} end", f"local tail = typed.tail({size})"]
            lines.append(f"return typed.deliver(arena, out, out_size, tail, fixed, {size}, {where})")
        body = "\n".join(f"  {line}" for line in lines)
        head = f"functions[{function.id}] = function(self, arena, payload, args_size, out, out_size)"
        return "\n".join([*self._arrays, head, body, "end"])

    def caller_text(self) -> str:
        """Return an assignment to `functions`, and to `arrays` where it returns some."""
        function, layout = self._function, self._layout
        names = [f"p{index}" for index in range(len(function.params))]
        packing = ["return nil"]
        if layout.args is not None:
            size = layout.args.size
            packing = [f"local tail, fixed = typed.tail({size}), new('uint8_t[{size}]')"]
            for name, param, offset in zip(names, function.params, self._offsets(layout.args), strict=True):
                where = f"{self._where}: {param.name}"
                packing += ["do", *_indented(self._write(param.type, "fixed", str(offset), name, where)), "end"]
            packing.append(f"return typed.packed(tail, fixed, {size})")
        lines = ["  " + line for line in packing]
        unpack, size, varies = "nil", 0, "false"
        if layout.result is not None and not isinstance(function.result, Void):
            size = layout.result.size
            varies = "true" if _varies(function.result) else "false"
            value = self._read(function.result, "payload", 0, f"{self._where}: result")
            unpack = f"""function(bytes)
  local args_size = #bytes
  if args_size < {size} then error("{self._where}: a result of " .. args_size .. " bytes, not {size}", 0) end
  local payload = cast(u8_pointer, bytes)
  return {value}
end"""
        body = "\n".join(lines)
        head = f"functions[{quoted(function.name)}] = {{ id = {function.id}, count = {len(names)}, size = {size}"
        rest = f"varies = {varies}, pack = function({', '.join(names)})\n{body}\nend, unpack = {unpack} }}"
        return "\n".join([*self._arrays, f"{head}, {rest}"])

    def _offsets(self, layout: Layout | None) -> tuple[int, ...]:
        if layout is None:
            return ()
        return (0,) if len(self._function.params) == 1 else layout.offsets

    def _name(self) -> str:
        self._names += 1
        return f"v{self._names}"

    # -- from memory ----------------------------------------------------------------------------------------------
    # Expressions, not statements: a function has at most 200 locals, a struct may have more fields.
    def _read(self, type_: ValueType, base: str, at: int, where: str) -> str:
        """Return an expression for what lies `at` bytes behind `base`."""
        place = f"{base} + {at}" if at else base
        if isinstance(type_, Scalar):
            return _loaded(type_, place)
        if isinstance(type_, Enum):
            return _loaded(type_.repr, place)
        if isinstance(type_, Ptr):
            return f"cast(u64_pointer, {place})[0]"
        if isinstance(type_, StringView | Buffer):
            return f"typed.text(payload, args_size, {place}, {quoted(where)})"
        if isinstance(type_, Struct):
            fields = zip(type_.fields, layout_of(type_).offsets, strict=True)
            parts = (
                f"[{quoted(field.name)}] = {self._read(field.type, base, at + offset, f'{where}.{field.name}')}"
                for field, offset in fields
            )
            return f"{{ {', '.join(parts)} }}"
        return f"arrays[{quoted(self._read_items(type_, where))}](payload, args_size, {place})"

    def _read_items(self, type_: Array, where: str) -> str:
        """Write a function that reads an array; return its name."""
        size = layout_of(type_.item).size
        name = f"{self._function.id}.{self._name()}"
        item = self._read(type_.item, "item", 0, f"{where}[]")
        self._arrays.append(f"""arrays[{quoted(name)}] = function(payload, args_size, place)
  local items, count = typed.items(payload, args_size, place, {size}, {quoted(where)}, {ARRAY_ITEMS_MAX})
  local values = typed.new_table(count, 0)
  for index = 1, count do
    local item = items + (index - 1) * {size}
    values[index] = {item}
  end
  return values
end""")
        return name

    # -- into memory ----------------------------------------------------------------------------------------------
    def _write(self, type_: ValueType, base: str, at: str, value: str, where: str) -> Iterator[str]:
        """Yield statements that write `value` so that it lies `at` bytes behind `base`."""
        place, shown = f"{base} + {at}", quoted(where)
        if isinstance(type_, Scalar):
            yield _stored(type_, place, _checked(type_, value, shown))
        elif isinstance(type_, Enum):
            repr_ = type_.repr
            if repr_.size == _WORD:
                yield _stored(repr_, place, f"typed.unsigned64({value}, {shown}, {quoted(type_.name)})")
            else:
                yield _stored(repr_, place, f"typed.integer({value}, 0, {repr_.high}, {shown}, {quoted(type_.name)})")
        elif isinstance(type_, Ptr):
            yield f"cast(u64_pointer, {place})[0] = typed.unsigned64({value}, {shown}, 'Ptr')"
        elif isinstance(type_, StringView | Buffer):
            words, text = self._name(), self._name()
            yield f"local {text} = typed.bytes({value}, {shown}, {quoted(type_.name)})"
            yield f"local {words} = cast(u64_pointer, {place})"
            yield f"{words}[0], {words}[1] = tail:add({text}, #{text}), #{text}"
            if isinstance(type_, Buffer):
                yield f"{words}[2] = #{text}"
        elif isinstance(type_, Struct):
            yield f"typed.record({value}, {shown}, {quoted(type_.name)})"
            for field, offset in zip(type_.fields, layout_of(type_).offsets, strict=True):
                yield "do"
                inner = f"{value}[{quoted(field.name)}]"
                path = f"{where}.{field.name}"
                yield from _indented(self._write(field.type, base, f"{at} + {offset}", inner, path))
                yield "end"
        else:
            yield from self._write_items(type_, place, value, where)

    def _write_items(self, type_: Array, place: str, value: str, where: str) -> Iterator[str]:
        words, memory, index, items, count = (self._name() for _ in range(5))
        size = layout_of(type_.item).size
        limits = f"{quoted(where)}, {quoted(type_.name)}, {ARRAY_ITEMS_MAX}"
        yield f"local {items}, {count} = typed.list({value}, {limits})"
        yield f"local {memory} = new('uint8_t[?]', {count} * {size})"
        yield f"local {words} = cast(u64_pointer, {place})"
        yield f"{words}[0], {words}[1] = tail:add({memory}, {count} * {size}), {count}"
        yield f"for {index} = 1, {count} do"
        inner = self._write(type_.item, memory, f"({index} - 1) * {size}", f"{items}[{index}]", f"{where}[]")
        yield from _indented(inner)
        yield "end"


def _varies(type_: ValueType) -> bool:
    """Whether values of a type have something behind their fixed part."""
    if isinstance(type_, Struct):
        return any(_varies(field.type) for field in type_.fields)
    return isinstance(type_, StringView | Buffer | Array)


def _indented(lines: Iterator[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)


def _loaded(scalar: Scalar, place: str) -> str:
    memory = f"cast({_type_name(scalar.name)}, {place})[0]"
    if scalar.kind == "bool":
        return f"({memory} ~= 0)"
    if scalar.size == _WORD and scalar.kind == "int":
        return f"typed.number64{'' if scalar.code.islower() else 'u'}({memory})"
    return memory


def _stored(scalar: Scalar, place: str, value: str) -> str:
    return f"cast({_type_name(scalar.name)}, {place})[0] = {value}"


def _checked(scalar: Scalar, value: str, where: str) -> str:
    if scalar.kind == "bool":
        return f"typed.boolean({value}, {where})"
    if scalar.kind == "float":
        check = "float" if scalar.size == _WORD else "float32"
        return f"typed.{check}({value}, {where}, {quoted(scalar.name)})"
    if scalar.size == _WORD:
        check = "signed64" if scalar.code.islower() else "unsigned64"
        return f"typed.{check}({value}, {where}, {quoted(scalar.name)})"
    return f"typed.integer({value}, {scalar.low}, {scalar.high}, {where}, {quoted(scalar.name)})"
