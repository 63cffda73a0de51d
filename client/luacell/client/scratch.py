"""The scratch VM of a bridge: a private contract that evaluates Lua text in a worker of its own."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Final

from luacell.client.function import LuaFunction
from luacell.protocol.errors import TooLarge
from luacell.protocol.limits import MIB

VALUE_MAX: Final = MIB  # bytes of a string that eval returns
SOURCE_MAX: Final = MIB
ATTEMPTS: Final = 3  # at registering it anew; the broker may go again meanwhile

Call = Callable[[bytes, int], bytes]
AsyncCall = Callable[[bytes, int], Awaitable[bytes]]
Value = bool | int | float | str | None


def implementation() -> LuaFunction:
    """Return the contract that evaluates text."""
    source = files("luacell.client").joinpath("scratch.lua").read_bytes()
    return LuaFunction(source, chunk_name="=scratch")


class ScratchVm:
    """Access to a bridge's scratch VM; it ends with the bridge.

    What one `eval` defines the next one sees, until the VM crashes: then it starts afresh.
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    def eval(self, source: str) -> Value:
        """Evaluate Lua source: an expression, or statements that `return` a value.

        Returns:
            None, bool, int (a number without a fraction, or a 64-bit integer), float or str.

        Raises:
            HostContractCallFailed: it raised, does not parse, or gave a value of another type.
            CallError: any other failure of a call.
            TooLarge: the source or the value is over 1 MiB.
        """
        return _value(self._call(*_arguments(source)))


class AsyncScratchVm:
    """Access to the scratch VM of an asyncio bridge; it ends with the bridge."""

    def __init__(self, call: AsyncCall) -> None:
        self._call = call

    async def eval(self, source: str) -> Value:
        """Evaluate Lua source, as ScratchVm does.

        Raises:
            HostContractCallFailed: it raised, does not parse, or gave a value of another type.
            CallError: any other failure of a call.
            TooLarge: the source or the value is over 1 MiB.
        """
        return _value(await self._call(*_arguments(source)))


def _arguments(source: str) -> tuple[bytes, int]:
    text = source.encode()
    if len(text) > SOURCE_MAX:
        raise TooLarge(f"source of {len(text)} bytes is over the limit of {SOURCE_MAX}", began="no")
    return struct.pack("<II", len(text), VALUE_MAX) + text, VALUE_MAX


def _value(reply: bytes) -> Value:
    tag, size = struct.unpack_from("<cI", reply)
    return _decoded(tag, reply[5 : 5 + size])


def _decoded(tag: bytes, raw: bytes) -> Value:
    if tag == b"n":
        return None
    if tag == b"b":
        return raw == b"1"
    if tag == b"s":
        return raw.decode("utf-8", "replace")
    if tag == b"i":
        return int(raw)
    value = float(raw)
    return int(value) if value.is_integer() else value
