"""What contracts print, as the worker host reads it: real pipes, time by hand."""

import os
import select
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luacell.protocol import messages
from luacell.protocol.limits import NS_PER_MS, NS_PER_S, OUTPUT_PER_CALL_MAX, OUTPUT_PIECE_MAX, STDERR_TAIL_MAX
from luacell.worker.output import (
    BACKLOG_MAX,
    HASTE,
    HOST_RATE,
    READ_SIZE,
    READS_PER_TURN,
    REST_NS,
    Bucket,
    Outputs,
    pieces,
)


class Bench:
    """Outputs with workers whose write ends this test holds."""

    def __init__(self) -> None:
        self.now_ns = 10**12
        self.sent: list[messages.Output] = []
        self.is_full = False
        self.outputs = Outputs(self._send)
        self.writers: dict[int, tuple[int, int]] = {}

    def _send(self, output: messages.Output) -> bool:
        if not self.is_full:
            self.sent.append(output)
        return not self.is_full

    def add(self, worker: int) -> None:
        pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(2)]
        self.outputs.add(worker, *(reader for reader, _ in pipes))
        self.writers[worker] = pipes[0][1], pipes[1][1]

    def write(self, worker: int, data: bytes, stream: int = 0) -> int:
        return os.write(self.writers[worker][stream], data)

    def turn(self, after_ms: float = 2) -> None:
        """Notice what is readable, and read it after a while."""
        self.outputs.turn(self.now_ns)
        self.now_ns += int(after_ms * NS_PER_MS)
        self.outputs.turn(self.now_ns)

    def text(self, stream: str = "stdout") -> bytes:
        return b"".join(each.data for each in self.sent if each.stream == stream)

    @property
    def cut(self) -> int:
        return sum(each.cut for each in self.sent)

    def close_writers(self, worker: int) -> None:
        for descriptor in self.writers.pop(worker):
            os.close(descriptor)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.add(1)
    yield bench
    bench.outputs.close()
    for worker in list(bench.writers):
        bench.close_writers(worker)


def test_what_is_written_in_one_go_is_one_message(bench: Bench) -> None:
    for part in (b"a", b"\t", b"b\n"):
        bench.write(1, part)
    bench.turn()
    assert bench.sent == [messages.Output(worker=1, stream="stdout", data=b"a\tb\n", cut=0)]


def test_streams_are_told_apart(bench: Bench) -> None:
    bench.write(1, b"out")
    bench.write(1, b"err", 1)
    bench.turn()
    assert (bench.text("stdout"), bench.text("stderr")) == (b"out", b"err")


def test_nothing_is_read_before_it_had_time_to_gather(bench: Bench) -> None:
    bench.write(1, b"x")
    bench.outputs.turn(bench.now_ns)
    assert not bench.sent
    next_ns = bench.outputs.next_ns()
    assert next_ns is not None
    assert 0 < next_ns - bench.now_ns <= REST_NS


def test_a_quiet_stream_asks_for_nothing(bench: Bench) -> None:
    bench.write(1, b"x")
    bench.turn()
    assert bench.outputs.next_ns() is None
    assert not is_readable(bench.outputs.descriptor)
    bench.write(1, b"y")
    assert is_readable(bench.outputs.descriptor)


def is_readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def test_what_exceeds_the_rate_is_read_away_and_counted(bench: Bench) -> None:
    written = 0
    for _ in range(20):
        written += bench.write(1, bytes(READ_SIZE))
        bench.turn(6)
        bench.turn(6)
    bench.turn()
    assert len(bench.text()) + bench.cut == written
    assert OUTPUT_PER_CALL_MAX <= len(bench.text()) < 2 * OUTPUT_PER_CALL_MAX
    bench.now_ns += NS_PER_S
    bench.write(1, b"again")
    bench.turn()
    assert bench.text().endswith(b"again")


def test_one_flood_does_not_silence_another_worker_for_long(bench: Bench) -> None:
    bench.add(2)
    for _ in range(3 * HOST_RATE // READ_SIZE):
        bench.write(1, bytes(READ_SIZE))
        bench.turn(6)
    bench.write(2, b"heard")
    bench.turn()
    assert [each.data for each in bench.sent if each.worker == 2] == [b"heard"]


def test_a_turn_has_a_bound(bench: Bench) -> None:
    for worker in range(2, 2 + 3 * READS_PER_TURN):
        bench.add(worker)
        bench.write(worker, b"x")
    for _ in range(4):
        bench.outputs.turn(bench.now_ns)
    bench.now_ns += 10 * NS_PER_MS
    bench.outputs.turn(bench.now_ns)
    assert len(bench.sent) == READS_PER_TURN
    for _ in range(4):
        bench.outputs.turn(bench.now_ns)
    assert len(bench.sent) == 3 * READS_PER_TURN


def test_a_flood_that_goes_on_is_read_with_rests(bench: Bench) -> None:
    written, waited_ns = 0, 0
    while waited_ns < REST_NS:
        written += bench.write(1, bytes(READ_SIZE))
        bench.outputs.turn(bench.now_ns)
        next_ns = bench.outputs.next_ns()
        assert next_ns is not None
        waited_ns = next_ns - bench.now_ns
        bench.now_ns = next_ns
        bench.outputs.turn(bench.now_ns)
        assert written < 2 * HASTE
    assert HASTE <= written <= HASTE + 4 * READ_SIZE


def test_output_waits_for_room_in_the_channel_and_keeps_its_order(bench: Bench) -> None:
    bench.is_full = True
    bench.write(1, b"x" * 5000)
    bench.turn()
    bench.write(1, b"y")
    bench.turn()
    assert not bench.sent
    next_ns = bench.outputs.next_ns()
    assert next_ns is not None and next_ns > bench.now_ns, "it is offered again, but not at once"
    bench.is_full = False
    bench.turn()
    assert (bench.text(), bench.cut) == (b"x" * 5000 + b"y", 0)
    assert bench.outputs.next_ns() is None


def test_a_channel_that_stays_full_costs_output_and_it_is_counted(bench: Bench) -> None:
    bench.is_full = True
    written = 0
    for worker in range(2, 22):
        bench.add(worker)
        written += bench.write(worker, bytes(OUTPUT_PER_CALL_MAX))
    for _ in range(20):
        bench.turn()
    bench.is_full = False
    for worker in range(2, 22):
        written += bench.write(worker, b"y")
    for _ in range(20):
        bench.turn()
    assert bench.cut > 0
    assert sum(len(each.data) for each in bench.sent) + bench.cut == written
    assert len(bench.sent) < BACKLOG_MAX + 2 * 21


def test_a_dead_worker_s_last_words_are_passed_on_and_kept(bench: Bench) -> None:
    bench.write(1, b"a" * 3000 + b"z" * 10, 1)
    bench.write(1, b"out")
    bench.close_writers(1)
    tail = bench.outputs.end(1, bench.now_ns)
    assert tail == (b"a" * 3000 + b"z" * 10)[-STDERR_TAIL_MAX:]
    assert bench.text() == b"out"
    assert bench.text("stderr") == b"a" * 3000 + b"z" * 10


def test_a_worker_that_closes_its_streams_is_forgotten_in_silence(bench: Bench) -> None:
    bench.write(1, b"x")
    bench.close_writers(1)
    for _ in range(3):
        bench.turn()
    assert bench.text() == b"x"
    assert bench.outputs.next_ns() is None
    assert bench.outputs.end(1, bench.now_ns) == b""


# -- pieces ----
@given(st.text(max_size=9000))
def test_pieces_fit_and_are_cut_between_characters(text: str) -> None:
    cut = list(pieces(text.encode()))
    assert b"".join(cut) == text.encode()
    assert all(0 < len(piece) <= OUTPUT_PIECE_MAX for piece in cut)
    assert "".join(piece.decode() for piece in cut) == text


@given(st.binary(max_size=9000))
def test_pieces_of_any_bytes_fit(data: bytes) -> None:
    cut = list(pieces(data))
    assert b"".join(cut) == data
    assert all(0 < len(piece) <= OUTPUT_PIECE_MAX for piece in cut)


def test_long_characters_are_not_cut() -> None:
    for shift in range(4):
        text = "x" * shift + "\N{PILE OF POO}" * 2000
        assert "".join(piece.decode() for piece in pieces(text.encode())) == text


def test_lines_are_kept_whole_where_they_fit() -> None:
    line = b"x" * 999 + b"\n"
    assert all(piece.endswith(b"\n") for piece in pieces(line * 50))


# -- buckets ----
def test_a_bucket_is_full_at_first_and_refills_with_time() -> None:
    bucket = Bucket(100, 10)
    assert bucket.level(0) == 100
    bucket.take(1000)
    assert bucket.level(0) == 0
    assert bucket.level(NS_PER_S // 2) == 5
    assert bucket.level(100 * NS_PER_S) == 100
