"""Contracts that tests use, and a short way to deploy one with limits of its own."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from luacell.client import AbiErrorCode, BridgeError, CallError, LuaHostBridge

Setting = str | int | bool | list[str]
PROBE = "host.probe@1"
HEALTHY = "host.healthy@1"

# Copies args to out; both have the size that stands in args as u32, or 4 bytes where there is no more.
ECHO = """
local ffi = require("ffi")
return function(fn_id, args, out)
  ffi.copy(out, args, fn_id)
end
"""

# Doubles an i32.
DOUBLE = """
local ffi = require("ffi")
return function(fn_id, args, out)
  ffi.cast("int32_t *", out)[0] = 2 * ffi.cast("int32_t *", args)[0]
end
"""

# Counts its calls, for as long as its VM lives; fn 1 ends the process as an invalid access does.
COUNTER = """
local ffi = require("ffi")
local count = 0
return function(fn_id, args, out)
  if fn_id == 1 then ffi.cast("int *", 0)[0] = 1 end
  count = count + 1
  ffi.cast("uint32_t *", out)[0] = count
end
"""

# Leaks as many bytes as its function id says.
LEAK = """
local ffi = require("ffi")
ffi.cdef "void *malloc(size_t); void *memset(void *, int, size_t);"
return function(fn_id, args, out)
  ffi.C.memset(ffi.C.malloc(fn_id), 1, fn_id)
end
"""
LEAKED = 10 * 1024  # bytes a call, in row C98 of the catalogue


def function(body: str) -> str:
    """Return a chunk whose function has the given body, with `ffi` at hand."""
    return f'local ffi = require("ffi")\nreturn function(fn_id, args, out)\n{body}\nend\n'


# Answers 1 where what the arguments say, evaluated, is true; else 0.
EVALUATE = function("out[0] = assert(loadstring('return ' .. ffi.string(args, fn_id)))() and 1 or 0")

# Answers args with the function id in its second number; fn 3 fails with what it was given, fn 4 crashes.
NUMBERED = function("""
  local number = ffi.cast("uint32_t *", args)[0]
  if fn_id == 3 then error("failed " .. number, 0) end
  if fn_id == 4 then ffi.cast("int *", 0)[0] = 1 end
  ffi.copy(out, args, 8)
  ffi.cast("uint32_t *", out)[1] = fn_id
""")


# Answers 42 as soon as there is the file that args names; the function id is the length of its name.
GATED = 'local ffi = require("ffi")\nffi.cdef[[int usleep(unsigned); int access(const char *, int);]]\n' + function(
    "while ffi.C.access(ffi.string(args, fn_id), 0) ~= 0 do ffi.C.usleep(1000) end if out ~= nil then out[0] = 42 end"
)


def deploy(bridge: LuaHostBridge, source: str, name: str = PROBE, **settings: Setting) -> str:
    """Deploy one chunk with the given keys of `luacell.toml`; return the contract's name."""
    with tempfile.TemporaryDirectory(prefix="probe-") as directory:
        write_deployment(Path(directory), source, name, **settings)
        (deployed,) = bridge.deploy(directory)
    return deployed


def write_deployment(directory: Path, source: str, name: str = PROBE, **settings: Setting) -> None:
    (directory / "probe.lua").write_text(source)
    keys = {"source": "probe.lua", **settings}
    lines = [f'[contract."{name}"]', *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    (directory / "luacell.toml").write_text("\n".join(lines) + "\n")


def unregister_all(bridge: LuaHostBridge) -> None:
    for contract in bridge.contracts():
        bridge.unregister_host_contract(contract.id)


def failure(bridge: LuaHostBridge, contract: str | int, fn_id: int = 0, **options: object) -> CallError:
    """Call a function that must fail, and return how it did."""
    try:
        value = bridge.call(contract, fn_id, **options)  # type: ignore[arg-type]
    except CallError as error:
        return error
    raise AssertionError(f"the call returned {value!r}")


def refusal(bridge: LuaHostBridge, source: str | bytes, contract: str | int = PROBE) -> BridgeError:
    """Register a chunk that must not load, and return why it does not."""
    from luacell.client import LuaFunction

    try:
        bridge.register_host_contract(contract, LuaFunction(source))
    except BridgeError as error:
        return error
    raise AssertionError("the contract was registered")


def answers(bridge: LuaHostBridge, contract: str | int, number: int = 21) -> bool:
    """Tell whether a contract with DOUBLE gives the right answer."""
    reply = bridge.call(contract, 0, number.to_bytes(4, "little", signed=True), 4)
    return int.from_bytes(reply, "little", signed=True) == 2 * number


class Stopwatch:
    """Measures a block; `seconds` is final when the block has ended."""

    def __enter__(self) -> Stopwatch:
        self._start_s = time.monotonic()
        self.seconds = 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._start_s


CALL_FAILED = AbiErrorCode.HOST_CONTRACT_CALL_FAILED
CRASHED = AbiErrorCode.WORKER_CRASHED
DEADLINE = AbiErrorCode.DEADLINE_EXCEEDED
NO_MEMORY = AbiErrorCode.OUT_OF_MEMORY


def holds(bridge: LuaHostBridge, text: str, name: str = PROBE) -> bool:
    """Tell whether what a contract with EVALUATE is asked is true there."""
    return bridge.call(name, len(text), text.encode(), 1) == b"\1"


def rows_of_level(bridge: LuaHostBridge, level: str) -> dict[str, bool]:
    """Return which layers of a level are in force, as a service tells."""
    return {row["layer"]: row["in_force"] for row in bridge.health()["sandbox"] if row["level"] == level}
