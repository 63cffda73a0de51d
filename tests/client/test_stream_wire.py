"""ZMTP on a socket: messages in any pieces, in both directions, and interrupts between any two lines."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from types import FrameType
from typing import Any

import pytest

from luacell.client import stream_wire
from luacell.client.pending import Pending
from luacell.client.stream_wire import LOOK_SIZE, UNSENT_MAX, StreamWire
from luacell.client.wire import HIGH_WATER_MARK, WireFull
from luacell.protocol import headers, zmtp
from luacell.protocol.errors import ProtocolError
from luacell.protocol.headers import SLOT_FREE, Op
from luacell.protocol.limits import MESSAGE_MAX
from tests.support.waiting import LIMIT_S, eventually

COMMAND = b"\x04\x05\x04PING"
LONG = bytes(range(256)) * (4 * LOOK_SIZE // 256)
MESSAGES = [bytes([number]) * size for number, size in enumerate((8, 0, 255, 256, 1, 40_000, 9), start=1)] + [LONG]


class Pair:
    """A wire, and the broker's end of its socket."""

    def __init__(self) -> None:
        self.broker, stream = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.broker.settimeout(LIMIT_S)
        self.wire = StreamWire(stream)
        self.taken: list[bytes] = []

    def say(self, *pieces: bytes) -> threading.Thread:
        """Send pieces while others read; return the thread that does."""

        def run() -> None:
            for piece in pieces:
                self.broker.sendall(piece)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def read(self, count: int) -> list[bytes]:
        """Read, when the descriptor tells, until so many messages have been taken."""
        poll = select.poll()
        poll.register(self.wire.fileno(), select.POLLIN)
        while len(self.taken) < count:
            assert poll.poll(LIMIT_S * 1000)
            self.wire.read(self.taken.append)
        return self.taken

    def hear(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            data += self.broker.recv(size - len(data))
        return bytes(data)

    def look(self) -> None:
        self.wire.read(self.taken.append)

    def is_in_step(self) -> None:
        """The wire takes the next message as what it is."""
        self.broker.sendall(zmtp.frame(b"in step"))
        self.look()
        assert self.taken[-1] == b"in step"

    def send_all(self) -> None:
        """Send what waits for room, as there is some."""
        poll = select.poll()
        poll.register(self.wire.fileno(), select.POLLOUT)
        while self.wire.has_unsent:
            assert poll.poll(LIMIT_S * 1000)
            self.wire.flush()

    def close(self) -> None:
        self.broker.close()
        self.wire.close(is_lost=True)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def result(call_id: int, flags: int = SLOT_FREE) -> bytes:
    return headers.encode_records(Op.RESULT, [(call_id, 0, 4, 0, flags)])


def called(call_id: int) -> Pending:
    pending = Pending()
    pending.call_id = call_id
    return pending


# -- receiving ----
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, LOOK_SIZE, 1 << 22])
def test_messages_come_whole_from_pieces_of_any_size(pair: Pair, size: int) -> None:
    messages = MESSAGES if size > 7 else MESSAGES[:5]
    data = b"".join(map(zmtp.frame, messages))
    speaker = pair.say(*(data[start : start + size] for start in range(0, len(data), size)))
    assert pair.read(len(messages)) == messages
    speaker.join()


def test_reading_has_a_bound(pair: Pair) -> None:
    pair.broker.sendall(b"".join(zmtp.frame(bytes([number])) for number in range(5)))
    assert pair.wire.read(pair.taken.append, 2)
    assert pair.wire.read(pair.taken.append, 2)
    assert not pair.wire.read(pair.taken.append, 2)
    assert pair.taken == [bytes([number]) for number in range(5)]


def test_commands_are_passed_over(pair: Pair) -> None:
    speaker = pair.say(COMMAND + zmtp.frame(b"a"), COMMAND[:3], COMMAND[3:], zmtp.frame(b"b"))
    assert pair.read(2) == [b"a", b"b"]
    speaker.join()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x01\x01a", "a message of several frames"),
        (b"\x03" + (70_000).to_bytes(8, "big"), "a message of several frames"),
        (b"\x02" + (MESSAGE_MAX + 1).to_bytes(8, "big"), f"{MESSAGE_MAX + 1} bytes, {MESSAGE_MAX} is the limit"),
    ],
)
def test_what_no_broker_sends_is_an_error(pair: Pair, data: bytes, reason: str) -> None:
    pair.broker.sendall(zmtp.frame(b"first") + data)
    with pytest.raises(ProtocolError, match=reason):
        pair.wire.read(pair.taken.append)
    assert pair.taken == [b"first"]


@pytest.mark.parametrize("rest", [b"", b"\0", b"\x02\0\0", b"\0\x05abc"], ids=["whole", "1", "3", "body"])
def test_what_came_before_the_end_counts(pair: Pair, rest: bytes) -> None:
    pair.broker.sendall(zmtp.frame(b"last words") + rest)
    pair.broker.close()
    assert not pair.wire.read(pair.taken.append)
    assert pair.taken == [b"last words"]
    assert pair.wire.is_at_end
    assert not pair.wire.may_speak()
    assert not pair.wire.read(pair.taken.append)


# -- the result of one call ----
def test_result_of_the_call_alone_is_taken_at_once(pair: Pair) -> None:
    pending, calls = called(7), {7: called(7), 8: called(8)}
    speaker = pair.say(zmtp.frame(result(7)))
    assert eventually(lambda: pair.wire.read_result(pending, calls, pair.taken.append), "it came")
    speaker.join()
    assert pending.is_done
    assert pending.answer == (7, 0, 4, 0, SLOT_FREE)
    assert list(calls) == [8]
    assert not pair.wire.read(pair.taken.append)
    assert pair.taken == []


@pytest.mark.parametrize(
    "messages",
    [[result(8)], [result(7, 0)], [result(7), result(8)], [b"x" * len(result(7))], [b"short"], [LONG]],
    ids=["of another", "slot kept", "and another", "no result", "short", "long"],
)
def test_anything_else_is_left_to_be_read(pair: Pair, messages: list[bytes]) -> None:
    pending, calls = called(7), {7: called(7)}
    speaker = pair.say(b"".join(map(zmtp.frame, messages)))
    assert pair.wire.fileno() in select.select([pair.wire.fileno()], [], [], LIMIT_S)[0]
    if len(messages) == 2:
        speaker.join()
    assert not pair.wire.read_result(pending, calls, pair.taken.append)
    assert not pending.is_done
    assert pair.read(len(messages)) == messages
    speaker.join()


def test_no_result_is_none(pair: Pair) -> None:
    assert not pair.wire.read_result(called(1), {}, pair.taken.append)
    pair.broker.close()
    assert not pair.wire.read_result(called(1), {}, pair.taken.append)


# -- sending ----
def test_messages_arrive_in_order_whatever_their_size(pair: Pair) -> None:
    for message in MESSAGES * 2:
        pair.wire.send(message)
    assert pair.wire.has_unsent
    expected = b"".join(map(zmtp.frame, MESSAGES * 2))
    heard = bytearray()
    while pair.wire.has_unsent:
        heard += pair.broker.recv(1 << 20)
        pair.wire.flush()
    assert bytes(heard) + pair.hear(len(expected) - len(heard)) == expected


def test_what_waits_to_be_sent_has_a_bound(pair: Pair) -> None:
    with pytest.raises(WireFull) as full:
        for _ in range(HIGH_WATER_MARK * 2):
            pair.wire.send(bytes(255))
    assert full.value.is_slow
    assert len(pair.wire._unsent) == HIGH_WATER_MARK


def test_large_messages_that_wait_have_a_bound_in_bytes(pair: Pair) -> None:
    large = bytes(UNSENT_MAX // 10)
    with pytest.raises(WireFull) as full:
        for _ in range(20):
            pair.wire.send(large)
    assert full.value.is_slow
    assert len(pair.wire._unsent) == 9
    pair.wire.send(bytes(255))  # a farewell, say


def test_who_is_gone_takes_nothing(pair: Pair) -> None:
    pair.wire.send(LONG)
    pair.broker.close()
    pair.wire.flush()
    assert not pair.wire.has_unsent
    with pytest.raises(WireFull) as full:
        pair.wire.send(b"x")
    assert not full.value.is_slow


def test_what_was_sent_last_still_leaves(pair: Pair) -> None:
    pair.wire.send(LONG[: 2 * LOOK_SIZE])
    pair.wire.send(b"goodbye")
    pair.wire.close(is_lost=False)
    expected = zmtp.frame(LONG[: 2 * LOOK_SIZE]) + zmtp.frame(b"goodbye")
    assert pair.hear(len(expected)) == expected
    assert pair.broker.recv(1) == b""


# -- interrupts ----
class Interrupted(Exception):
    """What a signal handler raises."""


def interrupted(line: int, act: Callable[[], object] | None, work: Callable[[], object]) -> bool:
    """Do something, and in the middle of it, before the n-th line of the wire's code, what a signal handler does.

    Args:
        line: from 1.
        act: a call of the handler's; None where it raises.
        work: to be interrupted.

    Returns:
        Whether there was such a line.
    """
    lines = itertools.count(1)
    is_reached = False

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal is_reached
        if frame.f_code.co_filename != stream_wire.__file__:
            return None
        if event == "line" and next(lines) == line:
            is_reached = True
            if act is None:
                raise Interrupted
            act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(Interrupted):
            work()
    finally:
        sys.settrace(before)
    return is_reached


def survives_reading(line: int, way: str) -> bool:
    """Interrupt the reading of several messages at one line; all of them are taken, some of them again."""
    messages = [b"a", result(1), b"b" * 300, bytes(LOOK_SIZE + 1), b"c"]
    data = b"".join(map(zmtp.frame, messages))
    pair = Pair()
    with closing(pair):
        pair.broker.sendall(data)
        act = pair.look if way == "reads" else None
        is_reached = interrupted(line, act, lambda: pair.read(len(messages)))
        pair.look()
        assert list(dict.fromkeys(pair.taken)) == messages, f"line {line}"
        pair.is_in_step()
    return is_reached


def survives_a_result(line: int, way: str) -> bool:
    """Interrupt the reading of one result; it is taken, perhaps again."""
    pair, pending = Pair(), called(7)
    with closing(pair):
        pair.broker.sendall(zmtp.frame(result(7)))
        act = pair.look if way == "reads" else None
        calls = {7: pending}
        is_reached = interrupted(line, act, lambda: pair.wire.read_result(pending, calls, pair.taken.append))
        pair.look()
        assert pending.is_done or pair.taken == [result(7)], f"line {line}"
        pair.is_in_step()
    return is_reached


def survives_sending(line: int, way: str) -> bool:
    """Interrupt the sending of more than there is room for; all of it leaves, once."""
    pair = Pair()
    with closing(pair):
        pair.wire.send(LONG)
        expected = zmtp.frame(LONG)
        heard: list[bytes] = []
        listener = threading.Thread(target=lambda: heard.append(pair.hear(len(expected))))
        listener.start()
        is_reached = interrupted(line, None if way == "raises" else pair.wire.flush, pair.send_all)
        pair.send_all()
        listener.join()
        assert heard == [expected], f"line {line}"
    return is_reached


@pytest.mark.parametrize("way", ["raises", "reads"])
@pytest.mark.parametrize("survives", [survives_reading, survives_a_result, survives_sending])
def test_interrupts_at_any_line_lose_nothing(survives: Callable[[int, str], bool], way: str) -> None:
    lines = next(line for line in range(1, 2000) if not survives(line, way))
    assert lines > 12
