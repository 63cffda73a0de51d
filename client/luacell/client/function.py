"""Implementations of contracts, as hosts give them to a bridge."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from luacell.protocol.limits import SOURCE_MAX

CHUNK_NAME_MAX: Final = 512  # characters; what a registration carries


class LuaFunction:
    """A Lua chunk that evaluates to `function(fn_id, args, out)`.

    Both `function(fn_id, args, out) … end` and `return function(fn_id, args, out) … end` are accepted. It is loaded
    in a worker, never in this process.

    Args:
        source: Lua source; a str is encoded as UTF-8.
        chunk_name: shown in error messages, in Lua's form (`@file` or `=name`); the contract's name by default.

    Raises:
        TypeError: `source` is neither str nor bytes.
        ValueError: it is larger than 4 MiB.
    """

    __slots__ = ("_chunk_name", "_source")

    def __init__(self, source: str | bytes, *, chunk_name: str = "") -> None:
        if not isinstance(source, str | bytes):
            raise TypeError(f"Lua source is str or bytes, not {type(source).__name__}")
        self._source = source.encode() if isinstance(source, str) else source
        self._chunk_name = _sendable(chunk_name)
        if len(self._source) > SOURCE_MAX:
            raise ValueError(f"Lua source of {len(self._source)} bytes is over the limit of {SOURCE_MAX}")

    @property
    def source(self) -> bytes:
        """The chunk."""
        return self._source

    @property
    def chunk_name(self) -> str:
        """What error messages call it, in Lua's form; "" for the contract's name."""
        return self._chunk_name

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> LuaFunction:
        """Read that one file; errors in it are reported with its name and line.

        Raises:
            OSError: it cannot be read.
        """
        return cls(Path(path).read_bytes(), chunk_name=f"@{os.fspath(path)}")

    def __repr__(self) -> str:
        return f"LuaFunction({self.chunk_name or 'source'!s}, {len(self.source)} bytes)"


def _sendable(chunk_name: str) -> str:
    """Keep the end of a long name, as Lua does where it shows one; paths need not be UTF-8."""
    name = chunk_name.encode("utf-8", "backslashreplace").decode()
    return name if len(name) <= CHUNK_NAME_MAX else f"{name[0]}...{name[4 - CHUNK_NAME_MAX :]}"
