"""ZMTP, ZeroMQ's protocol on the wire, as far as a DEALER beside a ROUTER needs it.

A worker and a host that shares memory speak it themselves, over a Unix socket: libzmq would have two threads beside
theirs, each message would wake both, and what has not left such a thread dies with its process. The ROUTER is libzmq's
and cannot tell the difference. Version 3.1 with the NULL mechanism: <https://rfc.zeromq.org/spec/37/>.

    greeting ──▶ READY ──▶ frames, each: flags, size, body
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from luacell.protocol.errors import ProtocolError

GREETING_SIZE: Final = 64
COMMAND_HEADER_SIZE: Final = 2  # of READY, which is short
MORE: Final = 1  # flags of a frame: another one of the same message follows
LONG: Final = 2  # its size has 8 bytes, not 1
COMMAND: Final = 4  # it is not part of a message
SHORT_MAX: Final = 255  # bytes of body whose size fits into one byte
SHORT_HEADER_SIZE: Final = 2
LONG_HEADER_SIZE: Final = 9

_SIGNATURE: Final = b"\xff" + bytes(8) + b"\x7f"
_MAJOR, _MINOR = 3, 1
_MAJOR_AT: Final = len(_SIGNATURE)
_MECHANISM: Final = b"NULL".ljust(20, b"\0")
_MECHANISM_AT: Final = _MAJOR_AT + 2
GREETING: Final = (_SIGNATURE + bytes((_MAJOR, _MINOR)) + _MECHANISM).ljust(GREETING_SIZE, b"\0")
_READY: Final = b"\x05READY"
_long_header: Final = Struct(">BQ").pack
_size_of_value: Final = Struct(">I").pack


def ready(routing_id: bytes) -> bytes:
    """Return what a DEALER says after the greetings: its kind, and the id that the ROUTER is to know it by.

    Args:
        routing_id: 1 to 200 bytes.
    """
    body = _READY + _property(b"Socket-Type", b"DEALER") + _property(b"Identity", routing_id)
    assert len(body) <= SHORT_MAX, len(body)
    return bytes((COMMAND, len(body))) + body


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + _size_of_value(len(value)) + value


def check_greeting(greeting: bytes) -> None:
    """Check the other end's greeting.

    Raises:
        ProtocolError: it does not speak ZMTP 3, or wants a mechanism other than NULL.
    """
    if greeting[0] != _SIGNATURE[0] or greeting[len(_SIGNATURE) - 1] != _SIGNATURE[-1]:
        raise ProtocolError(f"no ZMTP greeting: {greeting[: len(_SIGNATURE)].hex()}")
    if greeting[_MAJOR_AT] < _MAJOR:
        raise ProtocolError(f"ZMTP version {greeting[_MAJOR_AT]}, {_MAJOR} is the least")
    if greeting[_MECHANISM_AT : _MECHANISM_AT + len(_MECHANISM)] != _MECHANISM:
        mechanism = bytes(greeting[_MECHANISM_AT : _MECHANISM_AT + len(_MECHANISM)]).rstrip(b"\0")
        raise ProtocolError(f"ZMTP mechanism {mechanism!r}, only NULL is spoken over a Unix socket")


def ready_size(header: bytes) -> int:
    """Return how many bytes follow the first two of the other end's READY.

    Raises:
        ProtocolError: it is something else.
    """
    flags, size = header
    if flags != COMMAND:
        raise ProtocolError(f"a frame with flags {flags} in place of READY")
    return size


def check_ready(body: bytes) -> None:
    """Check the other end's READY.

    Raises:
        ProtocolError: it is something else, such as an ERROR.
    """
    if not body.startswith(_READY):
        raise ProtocolError(f"{body[:32]!r} in place of READY")


def frame(message: bytes) -> bytes:
    """Return a message as one frame."""
    size = len(message)
    if size <= SHORT_MAX:
        return bytes((0, size)) + message
    return _long_header(LONG, size) + message
