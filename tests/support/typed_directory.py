"""A deployment directory with a typed contract of every kind of value, for tests of what reads and calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

NAME: Final = "host.kinds@1"

MANIFEST: Final = 'api = "api.toml"\n\n[contract."host.kinds"]\nsource = "kinds.lua"\n'

API: Final = r"""
[[enum]]
name = "Mode"
repr = "u8"
docs = "How."
variants = [{ name = "Off", value = "0" }, { name = "On", value = "1", docs = "At last." }]

[[enum]]
name = "Access"
repr = "u32"
bitflag = true
variants = [{ name = "Read", value = "1" }, { name = "Write", value = "2" }, { name = "Both", value = "Read | Write" },
  { name = "Pair", value = "0x30" }]

[[types]]
name = "Point"
fields = [{ name = "x", type = "f32" }, { name = "y", type = "f64" }]

[[types]]
name = "Record"
fields = [{ name = "id", type = "u64" }, { name = "at", type = "Point" }, { name = "mode", type = "Mode" },
  { name = "access", type = "Access" }, { name = "label", type = "StringView" }, { name = "blob", type = "Buffer" }]

[[host_contract]]
name = "host.kinds"
version = "1.2.0"
docs = 'Every kind; a "quote" and a \backslash.'

[[host_contract.functions]]
name = "same"
docs = "Return what it is given."
params = [{ name = "record", type = "Record", docs = "any" }]
return = { type = "Record", docs = "the same" }

[[host_contract.functions]]
name = "scale"
params = [{ name = "k", type = "u8" }, { name = "v", type = "f64" }, { name = "on", type = "bool" }]
return = "f64"

[[host_contract.functions]]
name = "points"
params = [{ name = "points", type = "Array<Point>" }]
return = "Array<Point>"

[[host_contract.functions]]
name = "nothing"

[[host_contract.functions]]
name = "spin"
"""

LUA: Final = """
local Kinds = {}
Kinds.__index = Kinds
function Kinds.new() return setmetatable({}, Kinds) end
function Kinds:same(record) return record end
function Kinds:scale(k, v, on) return on and k * v or -v end
function Kinds:points(points) return points end
function Kinds:nothing() end
function Kinds:spin() while true do end end
return Kinds
"""


def write_typed(directory: Path, *, manifest: str = MANIFEST, api: str = API, lua: str = LUA) -> Path:
    """Write the directory's files; return it."""
    directory.mkdir(exist_ok=True)
    (directory / "luacell.toml").write_text(manifest)
    (directory / "api.toml").write_text(api)
    (directory / "kinds.lua").write_text(lua)
    return directory
