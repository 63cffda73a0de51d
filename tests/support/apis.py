"""Contract descriptions for tests: the one whose layouts are known, and random ones with their values."""

from __future__ import annotations

import json
import math
import struct
from typing import Any, Final

from hypothesis import strategies as st

from luacell.protocol.api import Api, Array, Buffer, Enum, Ptr, Scalar, StringView, Struct, parse

SVC: Final = """
[[types]]
name = "Record"
fields = [{ name = "flag", type = "bool" }, { name = "id", type = "u64" }, { name = "label", type = "StringView" },
          { name = "at", type = "Point" }, { name = "mode", type = "Mode" }, { name = "blob", type = "Buffer" }]

[[types]]
name = "Point"
fields = [{ name = "x", type = "f32" }, { name = "y", type = "f32" }]

[[enum]]
name = "Mode"
repr = "u8"
variants = [{ name = "Slow", value = "0" }, { name = "Fast", value = "1" }]

[[enum]]
name = "Access"
repr = "u32"
bitflag = true
variants = [{ name = "Read", value = "1" }, { name = "Write", value = "Read << 1" }]

[[host_contract]]
name = "host.svc"
version = "1.3.0"

[[host_contract.functions]]
name = "scale"
params = [{ name = "k", type = "u8" }, { name = "v", type = "f64" }, { name = "on", type = "bool" }]
return = "f64"

[[host_contract.functions]]
name = "upper"
params = [{ name = "text", type = "StringView" }]
return = "StringView"

[[host_contract.functions]]
name = "mix"
params = [{ name = "mode", type = "Mode" }, { name = "p", type = "Point" },
          { name = "data", type = "Buffer" }, { name = "tag", type = "u16" }]
return = "Record"

[[host_contract.functions]]
name = "open"
params = [{ name = "acc", type = "Access" }, { name = "small", type = "i8" }, { name = "big", type = "i64" }]
return = "Access"
"""
SCALARS: Final = ("u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64", "f32", "f64", "bool", "Ptr")


def svc() -> Api:
    return parse(SVC, "svc.toml")


def echo(type_name: str, declarations: str = "") -> Api:
    """Describe a contract with one function `echo`, which takes one value and returns one of the same type."""
    text = f"""{declarations}
[[host_contract]]
name = "host.echo"
version = "1"
[[host_contract.functions]]
name = "echo"
params = [{{ name = "value", type = "{type_name}" }}]
return = "{type_name}"
"""
    return parse(text, "echo.toml")


@st.composite
def apis(draw: st.DrawFn) -> str:
    """Draw the text of an api.toml: enums of all widths, nested structs, arrays, functions with and without."""
    lines: list[str] = []
    names = [*SCALARS, "StringView", "Buffer"]
    for number in range(draw(st.integers(0, 3))):
        width = draw(st.sampled_from((8, 16, 32, 64)))
        values = draw(st.lists(st.integers(0, (1 << width) - 1), min_size=1, max_size=4))
        variants = ", ".join(f'{{ name = "V{index}", value = "{value:#x}" }}' for index, value in enumerate(values))
        lines += ["[[enum]]", f'name = "E{number}"', f'repr = "u{width}"', f"variants = [{variants}]"]
        lines.append(f"bitflag = {json.dumps(draw(st.booleans()))}")
        names.append(f"E{number}")
    flat = list(names)
    for number in range(draw(st.integers(0, 4))):
        arrays = draw(st.booleans())
        choices = [*names, *(f"Array<{name}>" for name in flat)] if arrays else flat
        types = draw(st.lists(st.sampled_from(choices), min_size=1, max_size=6))
        fields = ", ".join(f'{{ name = "f{index}", type = "{name}" }}' for index, name in enumerate(types))
        lines += ["[[types]]", f'name = "S{number}"', f"fields = [{fields}]"]
        names.append(f"S{number}")
        if not arrays:
            flat.append(f"S{number}")
    lines += ["[[host_contract]]", 'name = "host.drawn"', 'version = "2.1"']
    choices = [*names, *(f"Array<{name}>" for name in flat)]
    for number in range(draw(st.integers(1, 3))):
        types = draw(st.lists(st.sampled_from(choices), max_size=6))
        params = ", ".join(f'{{ name = "p{index}", type = "{name}" }}' for index, name in enumerate(types))
        lines += ["[[host_contract.functions]]", f'name = "call{number}"', f"params = [{params}]"]
        lines.append(f'return = "{draw(st.sampled_from([*choices, "Void"]))}"')
    return "\n".join(lines)


def values(type_: Any, types: Any) -> st.SearchStrategy[Any]:
    """Draw values of a type, as a host gives them; `types` is the Api's HostTypes."""
    if isinstance(type_, Struct):
        return st.builds(types.structs[type_.name], *(values(field.type, types) for field in type_.fields))
    if isinstance(type_, Enum):
        made = types.enums[type_.name]
        if type_.bitflag:
            return st.lists(st.sampled_from(list(made) or [made(0)])).map(lambda flags: _union(made, flags))
        return st.sampled_from(list(made))
    if isinstance(type_, StringView):
        return st.text(st.characters(codec="utf-8"), max_size=20)
    if isinstance(type_, Buffer):
        return st.binary(max_size=20)
    if isinstance(type_, Array):
        return st.lists(values(type_.item, types), max_size=5)
    if isinstance(type_, Ptr):
        return st.integers(0, (1 << 64) - 1)
    assert isinstance(type_, Scalar)
    if type_.kind == "bool":
        return st.booleans()
    if type_.kind == "float":
        return st.floats(width=32 if type_.size == 4 else 64)
    edges = st.sampled_from((type_.low, type_.high))
    return edges | st.integers(type_.low, type_.high)


def _union(made: Any, flags: list[Any]) -> Any:
    union = made(0)
    for flag in flags:
        union |= flag
    return union


def bits(value: Any) -> Any:
    """Make values comparable in which floats may be NaN."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("<d", value)
    if isinstance(value, list):
        return [bits(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return [bits(getattr(value, name)) for name in value.__dataclass_fields__]
    return (type(value), value)
