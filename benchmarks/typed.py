"""Typed contracts to be measured: one function by values and by bytes, and a record that goes to memory and back."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from luacell.client import LuaFunction, LuaHostBridge
from luacell.client.typed.marshaller import compile_contract
from luacell.client.typed.values import HostTypes
from luacell.protocol.api import parse

RAW = "host.raw_scale@1"
RECORD_LIMIT_US = 6.0
API = """
[[enum]]
name = "Mode"
repr = "u8"
variants = [{ name = "Slow", value = "0" }, { name = "Fast", value = "1" }]
[[types]]
name = "Record"
fields = [{ name = "flag", type = "bool" }, { name = "id", type = "u64" }, { name = "label", type = "StringView" },
          { name = "x", type = "f32" }, { name = "y", type = "f64" }, { name = "mode", type = "Mode" },
          { name = "blob", type = "Buffer" }, { name = "small", type = "i8" }, { name = "tag", type = "u16" }]
[[host_contract]]
name = "host.scaled"
version = "1.0"
[[host_contract.functions]]
name = "scale"
params = [{ name = "k", type = "u8" }, { name = "v", type = "f64" }, { name = "on", type = "bool" }]
return = "f64"
[[host_contract.functions]]
name = "keep"
params = [{ name = "record", type = "Record" }]
return = "Record"
"""
TYPED_LUA = """
local Scaled = {}
function Scaled:scale(k, v, on) return on and k * v or -v end
function Scaled:keep(record) return record end
return Scaled
"""
RAW_LUA = """
local ffi = require("ffi")
ffi.cdef "typedef struct { uint8_t k; double v; uint8_t on; } bench_scale;"
local given, result = ffi.typeof("bench_scale *"), ffi.typeof("double *")
return function(fn_id, args, out)
  local value = ffi.cast(given, args)
  ffi.cast(result, out)[0] = value.on ~= 0 and value.k * value.v or -value.v
end
"""


def scaling(bridge: LuaHostBridge) -> dict[str, Callable[[], object]]:
    """Return the call by values, and that of the same function with its bytes at hand."""
    with tempfile.TemporaryDirectory(prefix="luacell-bench-") as directory:
        path = Path(directory)
        (path / "api.toml").write_text(API)
        (path / "scaled.lua").write_text(TYPED_LUA)
        (path / "luacell.toml").write_text('api = "api.toml"\n[contract."host.scaled"]\nsource = "scaled.lua"\n')
        bridge.deploy(path)
    bridge.register_host_contract(RAW, LuaFunction(RAW_LUA))
    proxy = bridge.contract("host.scaled")
    args = bridge.describe("host.scaled").functions["scale"].pack((3, 2.5, True))
    assert struct.pack("<d", proxy.scale(3, 2.5, True)) == bridge.call(RAW, 0, args, 8)
    return {"typed": lambda: proxy.scale(3, 2.5, True), "raw": lambda: bridge.call(RAW, 0, args, 8)}


def record_round_trip() -> Callable[[], object]:
    """Return what packs a record of 9 fields and unpacks it, as a host does in a call."""
    api = parse(API, "api.toml")
    types = HostTypes(api)
    marshaller = compile_contract(api, api.host_contracts[0], types)["keep"]
    args = (types.structs["Record"](True, 2**64 - 1, "label", 1.5, 2.5, types.enums["Mode"](1), b"hello", -1, 9),)
    assert marshaller.unpack(marshaller.pack(args)) == args[0]
    return lambda: marshaller.unpack(marshaller.pack(args))
