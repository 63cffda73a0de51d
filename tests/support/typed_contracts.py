"""Typed contracts that tests use: the one whose layouts are known, an echo of any type, and one that counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from luacell.client import LuaHostBridge
from luacell.protocol.api import parse

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
