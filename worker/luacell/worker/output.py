"""What contracts print: read from their pipes, cut to a rate, and passed on without ever delaying the worker host.

Each worker's stdout and stderr are pipes whose write ends do not block. A stream that becomes readable is given a
moment to gather, then read: what a flood writes faster than that is refused to it by the kernel. All work is done in
turns of a bounded number of reads, so that forks and kills between two turns are never late.

    quiet ──readable──> gathering ──read, pipe was not full──> quiet
                            └──read, pipe was full──> read again, at once at first, then with rests
"""

from __future__ import annotations

import contextlib
import heapq
import os
import select
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from luacell.protocol import messages
from luacell.protocol.limits import (
    KIB,
    MIB,
    NS_PER_MS,
    NS_PER_S,
    OUTPUT_PER_CALL_MAX,
    OUTPUT_PIECE_MAX,
    STDERR_TAIL_MAX,
)

READ_SIZE: Final = 64 * KIB  # what a pipe holds
READS_PER_TURN: Final = 8  # about 100 us
READS_AT_END: Final = 2  # of each stream of a dead worker: a full pipe and its end of file
GATHER_NS: Final = 1 * NS_PER_MS
REST_NS: Final = 5 * NS_PER_MS
WORKER_RATE: Final = 256 * KIB  # bytes a second that are passed on
HOST_RATE: Final = 1 * MIB  # the same for all workers together
HASTE: Final = 4 * MIB  # bytes of one worker that are read without rests, so that they are counted, not refused
BACKLOG_MAX: Final = 256  # messages of 3 KiB that wait for room in the channel; beyond, output is cut
HASTE_RATE: Final = 1 * MIB  # bytes a second by which that grows back


class Bucket:
    """A bound on a rate: full at first, refilled as time passes.

    Args:
        size: what it holds.
        rate: what it gains in a second.
    """

    def __init__(self, size: int, rate: int) -> None:
        self._size = size
        self._rate = rate
        self._level = size
        self._at_ns = 0

    def level(self, now_ns: int) -> int:
        """Return what is in it."""
        gained = (now_ns - self._at_ns) * self._rate // NS_PER_S
        if gained:
            self._level = min(self._size, self._level + gained)
            self._at_ns = now_ns
        return self._level

    def take(self, wanted: int) -> None:
        """Take from it what is there of `wanted`."""
        self._level -= min(self._level, wanted)


class Printer:
    """A worker as one that prints.

    Attributes:
        tail: the end of its stderr.
        cut: bytes that were thrown away and not told yet.
    """

    def __init__(self, worker: int) -> None:
        self.worker = worker
        self.rate = Bucket(OUTPUT_PER_CALL_MAX, WORKER_RATE)
        self.haste = Bucket(HASTE, HASTE_RATE)
        self.tail = b""
        self.cut = 0

    def may_hurry(self, now_ns: int) -> bool:
        """Whether its output is to be read as fast as it comes; what is not read in time the kernel refuses."""
        return self.haste.level(now_ns) >= READ_SIZE


@dataclass(slots=True, eq=False)
class Stream:
    """One pipe of a worker; closed when `descriptor` is -1."""

    printer: Printer
    name: str
    descriptor: int


class Outputs:
    """The output of all workers of one worker host.

    Args:
        send: passes a message on; tells whether it could, and never waits. What it refuses is offered again.

    Attributes:
        descriptor: readable when `turn` has something to do.
    """

    def __init__(self, send: Callable[[messages.Output], bool]) -> None:
        self._send = send
        self._epoll = select.epoll()
        self.descriptor = self._epoll.fileno()
        self._streams: dict[int, Stream] = {}
        self._of_worker: dict[int, tuple[Printer, list[Stream]]] = {}
        self._due: list[tuple[int, int, Stream]] = []  # heap by time; a stream is in it once at most
        self._count = 0
        self._rate = Bucket(HOST_RATE, HOST_RATE)
        self._backlog: deque[messages.Output] = deque()
        self._offer_ns = 0  # when to offer it again

    def add(self, worker: int, stdout: int, stderr: int) -> None:
        """Read a worker's output from now on.

        Args:
            worker: its number.
            stdout: non-blocking read end of a pipe; owned by this object from now on.
            stderr: another one.
        """
        printer = Printer(worker)
        streams = [Stream(printer, "stdout", stdout), Stream(printer, "stderr", stderr)]
        self._of_worker[worker] = printer, streams
        for stream in streams:
            self._streams[stream.descriptor] = stream
            self._epoll.register(stream.descriptor, select.EPOLLIN | select.EPOLLONESHOT)

    def next_ns(self) -> int | None:
        """Return when `turn` has something to do without a sign from the descriptor, or None."""
        times = [self._due[0][0]] if self._due else []
        if self._backlog:
            times.append(self._offer_ns)
        return min(times, default=None)

    def turn(self, now_ns: int) -> None:
        """Do what is due, within the bounds of a turn."""
        if self._backlog and now_ns >= self._offer_ns:
            self._offer(now_ns)
        for descriptor, _ in self._epoll.poll(0, READS_PER_TURN):
            stream = self._streams[descriptor]
            self._schedule(stream, now_ns + (GATHER_NS if stream.printer.may_hurry(now_ns) else REST_NS))
        for _ in range(READS_PER_TURN):
            if not self._due or self._due[0][0] > now_ns:
                return
            _, _, stream = heapq.heappop(self._due)
            if stream.descriptor >= 0:
                self._read(stream, now_ns)

    def end(self, worker: int, now_ns: int) -> bytes:
        """Read what a dead worker has left, pass it on, and close its pipes; return the end of its stderr."""
        printer, streams = self._of_worker.pop(worker)
        self._offer(now_ns)
        for stream in streams:
            for _ in range(READS_AT_END):
                if stream.descriptor >= 0:
                    self._take(stream, now_ns)
            self._close(stream)
        self._tell_cut(printer, "stdout")
        return printer.tail

    def close(self) -> None:
        """Close all pipes."""
        for stream in list(self._streams.values()):
            self._close(stream)
        self._epoll.close()

    # -- inner workings -------------------------------------------------------------------------------------------
    def _schedule(self, stream: Stream, when_ns: int) -> None:
        self._count += 1
        heapq.heappush(self._due, (when_ns, self._count, stream))

    def _read(self, stream: Stream, now_ns: int) -> None:
        """Read a stream once and decide when to look at it again."""
        size = self._take(stream, now_ns)
        if stream.descriptor < 0:
            return
        if size < READ_SIZE:
            self._tell_cut(stream.printer, stream.name)
            self._epoll.modify(stream.descriptor, select.EPOLLIN | select.EPOLLONESHOT)
        else:
            self._schedule(stream, now_ns if stream.printer.may_hurry(now_ns) else now_ns + REST_NS)

    def _take(self, stream: Stream, now_ns: int) -> int:
        """Read what a pipe holds and pass it on; return its bytes, 0 for none."""
        try:
            data = os.read(stream.descriptor, READ_SIZE)
        except BlockingIOError:
            return 0
        if not data:
            self._close(stream)
            return 0
        printer = stream.printer
        printer.haste.take(len(data))
        if stream.name == "stderr":
            printer.tail = (printer.tail + data[-STDERR_TAIL_MAX:])[-STDERR_TAIL_MAX:]
        size = min(len(data), printer.rate.level(now_ns), self._rate.level(now_ns))
        printer.rate.take(size)
        self._rate.take(size)
        printer.cut += len(data) - size
        for piece in pieces(data[:size]):
            self._pass_on(messages.Output(worker=printer.worker, stream=stream.name, data=piece), printer, now_ns)
        return len(data)

    def _pass_on(self, output: messages.Output, printer: Printer, now_ns: int) -> None:
        """Send a piece, behind those that wait; let it wait, or cut it."""
        if not self._backlog and self._send(output):
            return
        if len(self._backlog) < BACKLOG_MAX:
            self._offer_ns = self._offer_ns if self._backlog else now_ns + GATHER_NS
            self._backlog.append(output)
        else:
            printer.cut += len(output.data)

    def _offer(self, now_ns: int) -> None:
        """Send what waits, as far as there is room for it."""
        while self._backlog and self._send(self._backlog[0]):
            self._backlog.popleft()
        self._offer_ns = now_ns + GATHER_NS

    def _tell_cut(self, printer: Printer, name: str) -> None:
        if printer.cut and self._send(messages.Output(worker=printer.worker, stream=name, data=b"", cut=printer.cut)):
            printer.cut = 0

    def _close(self, stream: Stream) -> None:
        if stream.descriptor < 0:
            return
        del self._streams[stream.descriptor]
        with contextlib.suppress(OSError):  # there was no room for it
            self._epoll.unregister(stream.descriptor)
        os.close(stream.descriptor)
        stream.descriptor = -1


def pieces(data: bytes) -> Iterator[bytes]:
    """Cut output into pieces that fit a message: behind a line break where there is one, else between characters."""
    start = 0
    while len(data) - start > OUTPUT_PIECE_MAX:
        end = data.rfind(b"\n", start + OUTPUT_PIECE_MAX // 2, start + OUTPUT_PIECE_MAX) + 1
        if not end:
            end = start + OUTPUT_PIECE_MAX
            for back in range(4):  # the bytes of a character at most
                if data[end - back] & 0xC0 != 0x80:
                    end -= back
                    break
        yield data[start:end]
        start = end
    if start < len(data):
        yield data[start:]
