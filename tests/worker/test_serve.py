"""serve.lua takes messages from a stream of ZMTP frames, however the bytes come."""

from __future__ import annotations

import ctypes
import mmap
import socket
import threading
from collections.abc import Iterator, Sequence

import pytest

from luacell.protocol import headers, zmtp
from luacell.protocol.headers import Op
from luacell.worker.vm import LuaFailure, Vm
from tests.support.waiting import LIMIT_S

INBOX = 1 << 18
COMMAND = b"\x04\x05\x04PING"
MESSAGES = [bytes([number]) * size for number, size in enumerate((8, 0, 255, 256, 1, 40_000, 9), start=1)]


class Loop:
    """The loop of a VM without a contract, at one end of a socketpair; it gives every message to its process."""

    def __init__(self) -> None:
        self.broker, self._stream = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.broker.settimeout(LIMIT_S)
        self._inbox = mmap.mmap(-1, INBOX, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory = [ctypes.create_string_buffer(1 << 16) for _ in range(3)]
        records, reply, progress = (ctypes.addressof(each) + 64 for each in self._memory)
        vm = Vm(records, reply + headers.PREAMBLE_SIZE)
        inbox = ctypes.addressof(ctypes.c_char.from_buffer(self._inbox))
        execute = headers.head(Op.EXECUTE)
        self._loop = vm.make_loop(self._stream.fileno(), inbox, INBOX, execute, records, reply, progress, 500)

    def receive(self) -> bytes:
        address, size = self._loop.serve()
        return ctypes.string_at(int(address), int(size))

    def hears(self, pieces: Sequence[bytes], count: int) -> list[bytes]:
        """Send pieces one after the other, and return what the loop makes of them."""

        def send() -> None:
            for piece in pieces:
                self.broker.sendall(piece)

        sender = threading.Thread(target=send)
        sender.start()
        heard = [self.receive() for _ in range(count)]
        sender.join()
        return heard

    def close(self) -> None:
        self.broker.close()
        self._stream.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 20])
def test_messages_come_whole_from_pieces_of_any_size(loop: Loop, size: int) -> None:
    data = b"".join(map(zmtp.frame, MESSAGES))
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    assert loop.hears(pieces, len(MESSAGES)) == MESSAGES


def test_messages_go_on_past_the_end_of_the_inbox(loop: Loop) -> None:
    messages = [bytes([number % 256]) * 60_001 for number in range(50)]
    assert loop.hears([b"".join(map(zmtp.frame, messages))], len(messages)) == messages


def test_largest_message_that_fits(loop: Loop) -> None:
    largest = bytes(INBOX - zmtp.LONG_HEADER_SIZE)
    assert loop.hears([zmtp.frame(b"x"), zmtp.frame(largest), zmtp.frame(b"y")], 3) == [b"x", largest, b"y"]


def test_commands_are_passed_over(loop: Loop) -> None:
    assert loop.hears([COMMAND + zmtp.frame(b"a") + COMMAND * 3 + zmtp.frame(b"b")], 2) == [b"a", b"b"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x01\x01a", "a message of several frames from the broker"),
        (b"\x02" + (INBOX).to_bytes(8, "big"), f"a frame of {INBOX} bytes from the broker"),
        (b"\x02" + b"\xff" * 8, "a frame of .* bytes from the broker"),
    ],
)
def test_what_no_broker_sends_is_an_error(loop: Loop, data: bytes, reason: str) -> None:
    loop.broker.sendall(data)
    with pytest.raises(LuaFailure, match=reason):
        loop.receive()
