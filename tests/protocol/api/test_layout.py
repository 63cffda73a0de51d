"""Layouts are those of C: polyplug's own figures, and what ctypes, gcc and LuaJIT make of random descriptions."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import lupa.luajit21 as lupa
import pytest
from hypothesis import given, settings

from luacell.protocol.api import (
    Api,
    Array,
    Buffer,
    Enum,
    Function,
    FunctionLayout,
    Layout,
    Ptr,
    StringView,
    Struct,
    Void,
    layout_of,
    parse,
)
from luacell.protocol.api.layout import words_of
from tests.protocol.support import steady
from tests.support.apis import apis, svc

C_NAMES = {
    "u8": "uint8_t",
    "u16": "uint16_t",
    "u32": "uint32_t",
    "u64": "uint64_t",
    "i8": "int8_t",
    "i16": "int16_t",
    "i32": "int32_t",
    "i64": "int64_t",
    "f32": "float",
    "f64": "double",
    "bool": "bool",
}
CTYPES = {
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "f32": ctypes.c_float,
    "f64": ctypes.c_double,
    "bool": ctypes.c_bool,
}
WORDS = """
typedef struct { const uint8_t *ptr; size_t len; } StringView;
typedef struct { uint8_t *ptr; size_t len; size_t cap; } Buffer;
typedef struct { void *items; size_t len; } Items;
"""


def c_name(type_: Any) -> str:
    if isinstance(type_, Enum):
        return C_NAMES[type_.repr.name]
    if isinstance(type_, Ptr):
        return "void *"
    return "Items" if isinstance(type_, Array) else C_NAMES.get(type_.name, type_.name)


def ordered(api: Api) -> list[Struct]:
    """Structs, those first that others hold."""
    done: dict[str, Struct] = {}

    def visit(struct: Struct) -> None:
        for field in struct.fields:
            if isinstance(field.type, Struct):
                visit(field.type)
        done.setdefault(struct.name, struct)

    for struct in api.structs:
        visit(struct)
    return list(done.values())


def args_of(api: Api) -> list[tuple[str, Function, Layout]]:
    functions = [function for contract in api.host_contracts for function in contract.functions]
    laid_out = [(f"args_{function.name}", function, FunctionLayout.of(function).args) for function in functions]
    return [(name, function, layout) for name, function, layout in laid_out if layout and len(function.params) > 1]


def declarations(api: Api) -> str:
    lines = [WORDS]
    for struct in ordered(api):
        members = " ".join(f"{c_name(field.type)} {field.name};" for field in struct.fields)
        lines.append(f"typedef struct {{ {members} }} {struct.name};")
    for name, function, _ in args_of(api):
        members = " ".join(f"{c_name(param.type)} {param.name};" for param in function.params)
        lines.append(f"typedef struct {{ {members} }} {name};")
    return "\n".join(lines)


def expected(api: Api) -> dict[str, int]:
    """Every size and offset that luacell computes, by the C expression for it."""
    layouts = [(struct.name, layout_of(struct)) for struct in api.structs]
    layouts += [(name, layout) for name, _, layout in args_of(api)]
    facts: dict[str, int] = {}
    for name, layout in layouts:
        facts[f"sizeof({name})"] = layout.size
        facts[f"_Alignof({name})"] = layout.align
        facts |= {f"offsetof({name}, {leaf.path})": leaf.offset for leaf in layout.leaves}
    return facts


def from_ctypes(type_: Any) -> Any:
    if isinstance(type_, Struct):
        return structure([(field.name, field.type) for field in type_.fields])
    if isinstance(type_, Enum):
        return CTYPES[type_.repr.name]
    if isinstance(type_, Ptr):
        return ctypes.c_void_p
    if isinstance(type_, StringView | Buffer | Array):
        fields = [(word, ctypes.c_size_t if index else ctypes.c_void_p) for index, word in enumerate(words_of(type_))]
        return type("Words", (ctypes.Structure,), {"_fields_": fields})
    return CTYPES[type_.name]


def structure(members: list[tuple[str, Any]]) -> Any:
    return type("Members", (ctypes.Structure,), {"_fields_": [(name, from_ctypes(item)) for name, item in members]})


def leaves_of(made: Any, path: str = "", at: int = 0) -> list[tuple[str, int, int]]:
    if not issubclass(made, ctypes.Structure):
        return [(path, at, ctypes.sizeof(made))]
    found = []
    for name, item in made._fields_:
        inner = f"{path}.{name}" if path else name
        found += leaves_of(item, inner, at + getattr(made, name).offset)
    return found


def assert_matches(layout: Layout, made: Any) -> None:
    assert (layout.size, layout.align) == (ctypes.sizeof(made), ctypes.alignment(made))
    assert [(leaf.path, leaf.offset, leaf.size) for leaf in layout.leaves] == leaves_of(made)
    if layout.offsets:
        assert list(layout.offsets) == [getattr(made, name).offset for name, _ in made._fields_]


def check_with_ctypes(api: Api) -> None:
    for struct in api.structs:
        assert_matches(layout_of(struct), from_ctypes(struct))
    for function in api.host_contracts[0].functions:
        layout = FunctionLayout.of(function)
        params = [(param.name, param.type) for param in function.params]
        if layout.args is None:
            assert not params
        elif len(params) == 1:
            assert_matches(layout.args, from_ctypes(params[0][1]))
        else:
            assert_matches(layout.args, structure(params))
        if layout.result is None:
            assert isinstance(function.result, Void)
        else:
            assert_matches(layout.result, from_ctypes(function.result))


def check_with_luajit(api: Api) -> None:
    ffi = lupa.LuaRuntime(encoding="utf-8")
    ffi.execute("ffi = require('ffi'); ffi.cdef(...)", declarations(api))
    layouts = [(struct.name, layout_of(struct)) for struct in api.structs]
    for name, layout in layouts + [(name, layout) for name, _, layout in args_of(api)]:
        assert ffi.eval("ffi.sizeof(...)", name) == layout.size
        assert ffi.eval("ffi.alignof(...)", name) == layout.align
        for path, offset in {leaf.path.split(".")[0]: leaf.offset for leaf in reversed(layout.leaves)}.items():
            assert ffi.eval("ffi.offsetof(...)", name, path) == offset


def test_layouts_of_the_known_contract_are_polyplugs() -> None:
    functions = {function.name: FunctionLayout.of(function) for function in svc().host_contracts[0].functions}

    def leaves(layout: Layout | None) -> tuple[int, str]:
        assert layout is not None
        return layout.size, " ".join(f"{leaf.path}@{leaf.offset}" for leaf in layout.leaves)

    assert leaves(functions["scale"].args) == (24, "k@0 v@8 on@16")
    assert leaves(functions["scale"].result) == (8, "@0")
    assert leaves(functions["upper"].args) == (16, "ptr@0 len@8")
    assert leaves(functions["upper"].result) == (16, "ptr@0 len@8")
    assert leaves(functions["mix"].args) == (48, "mode@0 p.x@4 p.y@8 data.ptr@16 data.len@24 data.cap@32 tag@40")
    record = "flag@0 id@8 label.ptr@16 label.len@24 at.x@32 at.y@36 mode@40 blob.ptr@48 blob.len@56 blob.cap@64"
    assert leaves(functions["mix"].result) == (72, record)
    assert leaves(functions["open"].args) == (16, "acc@0 small@4 big@8")
    assert leaves(functions["open"].result) == (4, "@0")


def test_format_has_the_size_of_its_layout_and_every_leaf() -> None:
    layout = FunctionLayout.of(svc().host_contracts[0].functions[2])
    assert layout.args is not None
    assert layout.args.format == "<B3xff4xQQQH6x"


def test_layouts_of_the_known_contract_are_those_of_ctypes_and_luajit() -> None:
    check_with_ctypes(svc())
    check_with_luajit(svc())


@steady
@given(apis())
def test_layouts_of_random_descriptions_are_those_of_ctypes_and_luajit(text: str) -> None:
    api = parse(text, "drawn.toml")
    check_with_ctypes(api)
    check_with_luajit(api)


def check_with_gcc(api: Api, directory: Path) -> None:
    checks = "\n".join(
        f'_Static_assert({expression} == {value}, "{expression}");' for expression, value in expected(api).items()
    )
    source = directory / "layout.c"
    source.write_text(
        f"#include <stdbool.h>\n#include <stddef.h>\n#include <stdint.h>\n{declarations(api)}\n{checks}\n"
    )
    compiled = subprocess.run(
        ["gcc", "-std=c11", "-fsyntax-only", str(source)], capture_output=True, text=True, timeout=60, check=False
    )
    assert compiled.returncode == 0, compiled.stderr


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_layouts_are_those_of_gcc(tmp_path: Path) -> None:
    check_with_gcc(svc(), tmp_path)

    @settings(steady, max_examples=20)
    @given(apis())
    def random_ones(text: str) -> None:
        check_with_gcc(parse(text, "drawn.toml"), tmp_path)

    random_ones()
