"""ZMTP as it stands in RFC 37, and as libzmq speaks it."""

from __future__ import annotations

import pytest
import zmq

from luacell.protocol import zmtp
from luacell.protocol.errors import ProtocolError

# By hand, from the grammar: signature, version 3.1, mechanism, as-server, filler.
GREETING = bytes.fromhex("ff00000000000000007f0301") + b"NULL" + bytes(16) + b"\0" + bytes(31)
READY = b"\x04\x2b\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\x02id"


def test_greeting_is_that_of_the_specification() -> None:
    assert GREETING == zmtp.GREETING
    assert len(zmtp.GREETING) == zmtp.GREETING_SIZE
    zmtp.check_greeting(zmtp.GREETING)


@pytest.mark.parametrize("version", [b"\x03\0", b"\x03\x02", b"\x04\0"])
def test_greeting_of_another_minor_or_later_version_will_do(version: bytes) -> None:
    zmtp.check_greeting(GREETING[:10] + version + GREETING[12:])


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n".ljust(64), "no ZMTP greeting: 48545450"),
        (b"\xff" + bytes(63), "no ZMTP greeting"),
        (GREETING[:10] + b"\x02" + GREETING[11:], "ZMTP version 2, 3 is the least"),
        (GREETING[:12] + b"CURVE".ljust(20, b"\0") + GREETING[32:], "ZMTP mechanism b'CURVE', only NULL"),
    ],
)
def test_other_greetings_are_refused(greeting: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        zmtp.check_greeting(greeting)


def test_ready_is_that_of_the_specification() -> None:
    said = zmtp.ready(b"id")
    assert said == READY[:1] + bytes([len(READY) - 2]) + READY[2:]
    assert zmtp.ready_size(said[:2]) == len(said) - 2
    zmtp.check_ready(said[2:])


@pytest.mark.parametrize("header", [b"\0\x10", b"\x02\x10", b"\x06\x10"])
def test_frames_are_no_ready(header: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"a frame with flags {header[0]} in place of READY"):
        zmtp.ready_size(header)


def test_an_error_is_no_ready() -> None:
    with pytest.raises(ProtocolError, match=r"ERROR.* in place of READY"):
        zmtp.check_ready(b"\x05ERROR\x07no way")


@pytest.mark.parametrize(
    ("size", "head"),
    [
        (0, b"\0\0"),
        (1, b"\0\x01"),
        (255, b"\0\xff"),
        (256, b"\x02\0\0\0\0\0\0\x01\0"),
        (70_000, b"\x02\0\0\0\0\0\x01\x11\x70"),
    ],
)
def test_frames_tell_their_size(size: int, head: bytes) -> None:
    message = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert zmtp.frame(message) == head + message


def test_libzmq_is_new_enough() -> None:
    assert zmq.zmq_version_info() >= (4, 3), "from there on it speaks version 3.1"
