"""Typed contracts that tests use: the one whose layouts are known, an echo of any type, and one that counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from luacell.client import LuaHostBridge
from luacell.protocol.api import FunctionLayout, parse

SVC_LUA: Final = """
local Svc = {}
function Svc:scale(k, v, on) return on and k * v or -v end
function Svc:upper(text) return text:upper() end
function Svc:mix(mode, p, data, tag)
  return { flag = mode == luacell.enums.Mode.Fast, id = 18446744073709551615ULL, label = "tag " .. tag,
    at = { x = p.y, y = p.x }, mode = mode, blob = data .. data }
end
function Svc:open(acc, small, big)
  if small == -128 and big == -9223372036854775807LL - 1 then return luacell.enums.Access.Write end
  return acc
end
return Svc
"""

RAW_SVC_LUA: Final = """
local ffi = require("ffi")
ffi.cdef [[
typedef struct { uint8_t k; double v; bool on; } ScaleArgs;
typedef struct { const uint8_t *ptr; size_t len; } StringView;
typedef struct { uint8_t *ptr; size_t len, cap; } Buffer;
typedef struct { float x, y; } Point;
typedef struct { uint8_t mode; Point p; Buffer data; uint16_t tag; } MixArgs;
typedef struct { bool flag; uint64_t id; StringView label; Point at; uint8_t mode; Buffer blob; } Record;
typedef struct { uint32_t acc; int8_t small; int64_t big; } OpenArgs;
]]
local borrowed -- until the next call
local functions = {
  [0] = function(args, out)
    local given = ffi.cast("ScaleArgs *", args)
    ffi.cast("double *", out)[0] = given.on and given.k * given.v or -given.v
  end,
  function(args, out)
    local given, result = ffi.cast("StringView *", args), ffi.cast("StringView *", out)
    borrowed = ffi.string(given.ptr, given.len):upper()
    result.ptr, result.len = ffi.cast("const uint8_t *", borrowed), #borrowed
  end,
  function(args, out)
    local given, result = ffi.cast("MixArgs *", args), ffi.cast("Record *", out)
    local data = ffi.string(given.data.ptr, given.data.len)
    borrowed = { "tag " .. given.tag, ffi.new("uint8_t[?]", 2 * #data) }
    ffi.copy(borrowed[2], data .. data, 2 * #data)
    result.flag, result.id = given.mode == 1, 18446744073709551615ULL
    result.label.ptr, result.label.len = ffi.cast("const uint8_t *", borrowed[1]), #borrowed[1]
    result.at.x, result.at.y, result.mode = given.p.y, given.p.x, given.mode
    result.blob.ptr, result.blob.len = borrowed[2], 2 * #data
  end,
  function(args, out)
    local given = ffi.cast("OpenArgs *", args)
    local is_least = given.small == -128 and given.big == -9223372036854775807LL - 1
    ffi.cast("uint32_t *", out)[0] = is_least and 2 or given.acc
  end,
}
return function(fn_id, args, out) functions[fn_id](args, out) end
"""

COUNTER_API: Final = """
[[host_contract]]
name = "host.counter"
version = "1.0"
{singleton}
[[host_contract.functions]]
name = "add"
params = [{{ name = "amount", type = "u32" }}]
return = "u32"
[[host_contract.functions]]
name = "destroyed"
return = "u32"
[[host_contract.functions]]
name = "grow"
params = [{{ name = "text", type = "StringView" }}]
return = "StringView"
[[host_contract.functions]]
name = "crash"
[[host_contract.functions]]
name = "heap"
return = "f64"
"""

COUNTER_LUA: Final = """
local Counter = {}; Counter.__index = Counter
local destroyed = 0
function Counter.new() return setmetatable({ n = 0 }, Counter) end
function Counter:add(amount) self.n = self.n + amount; return self.n end
function Counter:destroyed() return destroyed end
function Counter:grow(text) self.n = self.n + 1; return text end
function Counter:crash() require("ffi").cast("int *", 0)[0] = 1 end
function Counter:heap() collectgarbage(); collectgarbage(); return collectgarbage("count") * 1024 end
function Counter:destroy() destroyed = destroyed + 1 end
return Counter
"""


def counter_api(*, singleton: bool = False) -> str:
    return COUNTER_API.format(singleton="singleton = true" if singleton else "")


def echoes(text: str) -> str:
    """Return an implementation, for an api.toml, whose functions return the first argument of the result's type."""
    lines = ["local Echo = {}"]
    for function in parse(text, "api.toml").host_contracts[0].functions:
        names = [f"p{index}" for index in range(len(function.params))]
        found = [name for name, param in zip(names, function.params, strict=True) if param.type == function.result]
        result = f"return {found[0]}" if found else ""
        lines.append(f"function Echo:{function.name}({', '.join(names)}) {result} end")
    return "\n".join([*lines, "return Echo"])


def raw_echoes(text: str) -> str:
    """Return a raw function that returns the first argument of the result's type, by copying its memory."""
    moves = []
    for function in parse(text, "api.toml").host_contracts[0].functions:
        layout = FunctionLayout.of(function)
        for index, param in enumerate(function.params):
            if param.type == function.result and layout.args is not None and layout.result is not None:
                offset = layout.args.offsets[index] if len(function.params) > 1 else 0
                moves.append(f"[{function.id}] = {{ {offset}, {layout.result.size} }}")
                break
    return f"""
local ffi = require("ffi")
local moves = {{ {", ".join(moves)} }}
return function(fn_id, args, out)
  local move = moves[fn_id]
  if move then ffi.copy(out, args + move[1], move[2]) end
end"""


def deploy_typed(bridge: LuaHostBridge, directory: Path, text: str, source: str, **settings: str | int) -> Any:
    """Deploy the only contract of an api.toml; return a proxy."""
    (name,) = bridge.deploy(write_typed(directory, text, source, **settings))
    return bridge.contract(name)


def write_typed(directory: Path, text: str, source: str, **settings: str | int) -> Path:
    """Write a directory that can be deployed."""
    directory.mkdir(exist_ok=True)
    name = parse(text, "api.toml").host_contracts[0].name
    (directory / "api.toml").write_text(text)
    (directory / "contract.lua").write_text(source)
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (directory / "luacell.toml").write_text(f'api = "api.toml"\n[contract."{name}"]\nsource = "contract.lua"\n{keys}')
    return directory
