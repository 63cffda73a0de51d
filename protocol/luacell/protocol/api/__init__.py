"""Typed contracts: what an api.toml declares, and how its values lie in memory.

    text ── parse ──> Api (model) ── layout ──> sizes and offsets of every function's args and result

It reads no files and moves no values: packers are the affair of whoever has values.
"""

from luacell.protocol.api.layout import FunctionLayout, Layout, Leaf, layout_of
from luacell.protocol.api.lookup import contracts_named, find_contract
from luacell.protocol.api.model import (
    Api,
    Array,
    Buffer,
    Contract,
    Enum,
    Field,
    Function,
    Param,
    Ptr,
    Scalar,
    StringView,
    Struct,
    Variant,
    Void,
)
from luacell.protocol.api.parse import parse
from luacell.protocol.errors import ApiError

__all__ = [
    "Api",
    "ApiError",
    "Array",
    "Buffer",
    "Contract",
    "Enum",
    "Field",
    "Function",
    "FunctionLayout",
    "Layout",
    "Leaf",
    "Param",
    "Ptr",
    "Scalar",
    "StringView",
    "Struct",
    "Variant",
    "Void",
    "contracts_named",
    "find_contract",
    "layout_of",
    "parse",
]
