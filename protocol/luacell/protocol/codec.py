"""The only door to msgpack: bounded decoding, no surprises in types.

It knows bytes and plain values, not messages. msgpack ships no types, so it is imported here and nowhere
else.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

import msgpack

from luacell.protocol.errors import ProtocolError
from luacell.protocol.limits import MESSAGE_MAX, NODES_MAX, WORKERS_MAX

# msgpack allocates an array when it has read its length, up to 1024 levels deep: 1024 x 1024 x 8 bytes are
# 8 MiB. The longest array of this protocol is a list of workers. Maps grow as they are filled.
_ARRAY_LENGTH_MAX: Final = WORKERS_MAX
_MAP_LENGTH_MAX: Final = 4096


def pack(value: object) -> bytes:
    """Encode a plain value (None, bool, int, float, str, bytes, list, dict with str keys)."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


class _NodeBudget:
    """Counts what a message makes us build, so that a small message cannot become a large object graph."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = NODES_MAX

    def spend(self, container: Any) -> Any:
        self.left -= 1 + len(container)
        if self.left < 0:
            raise ValueError(f"more than {NODES_MAX} values in one message")
        return container


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}; this protocol has none")


def size_of(data: bytes | memoryview) -> int:
    """Return how many bytes the value at the start of `data` takes, which need not end there.

    Raises:
        ProtocolError: malformed or cut off.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=len(data))
    unpacker.feed(data)
    try:
        unpacker.skip()
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"malformed msgpack ({type(error).__name__}: {str(error)[:200]})") from None
    size: int = unpacker.tell()
    return size


def unpack(data: bytes | memoryview) -> Any:
    """Decode one value.

    Raises:
        ProtocolError: malformed, trailing bytes, nested too deep, or over a limit.
    """
    budget = _NodeBudget()
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            use_list=True,
            object_hook=budget.spend,
            list_hook=budget.spend,
            ext_hook=_refuse_extension,
            max_str_len=MESSAGE_MAX,
            max_bin_len=MESSAGE_MAX,
            max_array_len=_ARRAY_LENGTH_MAX,
            max_map_len=_MAP_LENGTH_MAX,
            max_ext_len=0,
        )
    except (msgpack.exceptions.StackError, RecursionError):
        raise ProtocolError("malformed msgpack (nested too deep)") from None
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"malformed msgpack ({type(error).__name__}: {str(error)[:200]})") from None
