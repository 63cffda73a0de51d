"""Bindings of typed contracts whose implementation is a raw function, as it was written for the in-process bridge.

Such a function finds in `args` the C struct of its parameters with pointers that it can follow, and leaves in `out` the
C struct of its result with pointers of its own. On the way between processes pointers are offsets; the generated Lua
rebases those of the arguments, in a copy of the struct, and gathers what those of the result name.

It generates text and knows no VM; what the text stands on is `lua/typed.lua`.
"""

from __future__ import annotations

from collections.abc import Iterator

from luacell.protocol.api.layout import FunctionLayout, Layout, layout_of
from luacell.protocol.api.model import (
    ARRAY_ITEMS_MAX,
    Array,
    Buffer,
    Contract,
    Function,
    StringView,
    Struct,
    ValueType,
    Void,
)
from luacell.protocol.limits import PAYLOAD_MAX
from luacell.worker.binding import quoted

_Member = tuple[str, ValueType, int]  # its path, type and offset


def raw_binding_source(contract: Contract) -> str:
    """Return the Lua chunk that binds a raw function.

    It is called with typed.lua's table and returns a function that is given the implementation and returns what the
    worker calls.

    Args:
        contract: which the worker serves.
    """
    functions = "\n".join(_Generator(contract, function).text() for function in contract.functions)
    is_singleton = "true" if contract.singleton else "false"
    return f"""local typed = ...
local functions, arrays = {{}}, {{}}
{functions}
return function(implementation)
  return typed.bind_raw(implementation, {is_singleton}, functions, {len(contract.functions)}, {quoted(str(contract))})
end
"""


class _Generator:
    """The text of one function."""

    def __init__(self, contract: Contract, function: Function) -> None:
        self._where = f"{contract} {function.name}"
        self._function = function
        self._layout = FunctionLayout.of(function)
        self._arrays: list[str] = []

    def text(self) -> str:
        """Return an assignment to `functions`, and those to `arrays` that it needs."""
        lines = ["typed.begin_raw()", *self._arguments(), *self._call()]
        head = f"functions[{self._function.id}] = function(callable, arena, payload, args_size, out, out_size)"
        return "\n".join([*self._arrays, head, *(f"  {line}" for line in lines), "end"])

    def _arguments(self) -> Iterator[str]:
        layout = self._layout.args
        if layout is None:
            yield "local args"
            return
        yield f"if args_size < {layout.size} then"
        yield f'  error("{self._where}: " .. args_size .. " bytes of arguments, not {layout.size}", 0)'
        yield "end"
        pointers = [line for member in self._parameters(layout) for line in self._rebase(*member, "args")]
        yield f"local args = typed.memory({layout.size}, payload)" if pointers else "local args = payload"
        yield from pointers

    def _call(self) -> Iterator[str]:
        function, layout = self._function, self._layout.result
        if layout is None or isinstance(function.result, Void):
            yield f"callable({function.id}, args, nil)"
            yield "return 0"
            return
        yield f"local fixed = typed.memory({layout.size})"
        yield f"callable({function.id}, args, fixed)"
        yield f"local tail = typed.tail({layout.size})"
        yield from self._gather(f"{self._where}: result", function.result, 0, "fixed")
        yield f"return typed.deliver(arena, out, out_size, tail, fixed, {layout.size}, {quoted(self._where)})"

    def _parameters(self, layout: Layout) -> Iterator[_Member]:
        params = self._function.params
        offsets = (0,) if len(params) == 1 else layout.offsets
        for param, offset in zip(params, offsets, strict=True):
            yield f"{self._where}: {param.name}", param.type, offset

    # -- arguments ------------------------------------------------------------------------------------------------
    def _rebase(self, where: str, type_: ValueType, at: int, base: str) -> Iterator[str]:
        """Yield statements that make pointers of the offsets in what lies `at` bytes behind `base`."""
        place = f"{base} + {at}"
        if isinstance(type_, StringView | Buffer):
            yield f"typed.rebase(payload, args_size, {place}, 1, {quoted(where)}, {PAYLOAD_MAX})"
        elif isinstance(type_, Struct):
            for member in _fields(type_, where, at):
                yield from self._rebase(*member, base)
        elif isinstance(type_, Array):
            size = layout_of(type_.item).size
            limits = f"{size}, {quoted(where)}, {ARRAY_ITEMS_MAX}"
            inner = list(self._rebase(f"{where}[]", type_.item, 0, "item"))
            if not inner:
                yield f"typed.rebase(payload, args_size, {place}, {limits})"
                return
            name = self._array(
                "payload, args_size, place", f"typed.rebase_items(payload, args_size, place, {limits})", size, inner
            )
            yield f"arrays[{name}](payload, args_size, {place})"

    # -- the result -----------------------------------------------------------------------------------------------
    def _gather(self, where: str, type_: ValueType, at: int, base: str) -> Iterator[str]:
        """Yield statements that make offsets of the pointers in what lies `at` bytes behind `base`."""
        place = f"{base} + {at}"
        if isinstance(type_, StringView | Buffer):
            yield f"typed.gather(tail, {place}, 1, {quoted(where)}, {PAYLOAD_MAX})"
            if isinstance(type_, Buffer):
                yield f"typed.close({place})"
        elif isinstance(type_, Struct):
            for member in _fields(type_, where, at):
                yield from self._gather(*member, base)
        elif isinstance(type_, Array):
            size = layout_of(type_.item).size
            limits = f"{size}, {quoted(where)}, {ARRAY_ITEMS_MAX}"
            inner = list(self._gather(f"{where}[]", type_.item, 0, "item"))
            if not inner:
                yield f"typed.gather(tail, {place}, {limits})"
                return
            name = self._array("tail, place", f"typed.gather(tail, place, {limits})", size, inner)
            yield f"arrays[{name}](tail, {place})"

    def _array(self, parameters: str, items: str, size: int, inner: list[str]) -> str:
        """Write a function that goes through the items of an array; return its key."""
        name = f'"{self._function.id}.{len(self._arrays)}"'
        body = "\n".join(f"    {line}" for line in inner)
        self._arrays.append(f"""arrays[{name}] = function({parameters})
  local items, count = {items}
  for index = 0, count - 1 do
    local item = items + index * {size}
{body}
  end
end""")
        return name


def _fields(struct: Struct, where: str, at: int) -> Iterator[_Member]:
    for field, offset in zip(struct.fields, layout_of(struct).offsets, strict=True):
        yield f"{where}.{field.name}", field.type, at + offset
