"""How processes of luacell write their log records: one line each, to stderr, and never at the price of waiting.

Records are events with fields, given as `extra={"fields": {...}}`; successful calls write none. On a terminal they are
made for reading, anywhere else they are JSON. Whoever reads stderr may stop doing so: a process with one thread writes
what fits and drops the rest (`configure_logging`), one with many leaves the writing to a thread behind a bounded queue
(`configure_queued_logging`). Both count what they drop and say so when they can write again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import stat
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

STDERR: Final = 2
LEVELS: Final = ("debug", "info", "warning", "error", "critical")
RECORDS_MAX: Final = 1024  # waiting for the writer thread; a record has 3 KiB of a contract's text at most
WRITE_LIMIT_MS: Final = 1000  # for one line, where the descriptor refuses to block
CLOSE_LIMIT_S: Final = 0.5  # for what still waits when a process ends


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON line: at (wall clock, seconds), level, logger, event, then its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return json.dumps(values_of(record), default=str, ensure_ascii=False)


class ReadableFormatter(logging.Formatter):
    """Formats a record for people: time, level, logger, event, then its fields as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        values = values_of(record)
        del values["at"]
        head = (self.formatTime(record, "%H:%M:%S"), values.pop("level"), values.pop("logger"), values.pop("event"))
        return " ".join(["{:8} {:8} {:19} {}".format(*head), *(f"{key}={value!r}" for key, value in values.items())])


def values_of(record: logging.LogRecord) -> dict[str, object]:
    """Return what a record's line says, in its order."""
    values: dict[str, object] = {
        "at": round(record.created, 3),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": record.getMessage(),
        **getattr(record, "fields", {}),
    }
    if record.exc_info:
        values["exception"] = logging.Formatter().formatException(record.exc_info)
    return values


def plain_formatter(*, readable: bool) -> logging.Formatter:
    """Return the formatter of processes that must start fast."""
    return ReadableFormatter() if readable else JsonFormatter()


def _dropped_record(count: int) -> logging.LogRecord:
    record = logging.LogRecord("luacell.logs", logging.WARNING, "", 0, f"{count} records dropped", None, None)
    record.fields = {"dropped": count}
    return record


class LineWriter:
    """Writes whole lines to a descriptor, and refuses those for which it would have to wait.

    A pipe or terminal is opened anew, because O_NONBLOCK belongs to what all holders of a descriptor share.

    Args:
        descriptor: stays the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._socket: socket.socket | None = None
        self._is_torn = False
        self._is_own = False
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(descriptor))
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
            with contextlib.suppress(OSError):  # no /proc, or another user's terminal: then it may have to wait
                self._descriptor = os.open(f"/proc/self/fd/{descriptor}", flags)
                self._is_own = True

    def write(self, line: str) -> bool:
        """Write one line; tell whether it could be done."""
        data = line.encode("utf-8", "replace") + b"\n"
        if self._is_torn:
            data = b"\n" + data
        try:
            if self._socket is not None:
                written = self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            else:
                written = os.write(self._descriptor, data)
        except OSError:
            return False
        self._is_torn = written < len(data)
        return not self._is_torn

    def close(self) -> None:
        """Close what was opened."""
        if self._socket is not None:
            self._socket.close()
        elif self._is_own:
            os.close(self._descriptor)


class DirectHandler(logging.Handler):
    """Writes each record at once, or drops and counts it.

    Args:
        descriptor: to write to.
        formatter: makes the lines.
    """

    def __init__(self, descriptor: int, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._writer = LineWriter(descriptor)
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, and before it how many were dropped."""
        if self._dropped and self._writer.write(self.format(_dropped_record(self._dropped))):
            self._dropped = 0
        if self._dropped or not self._writer.write(self.format(record)):
            self._dropped += 1

    def close(self) -> None:
        """Write no more."""
        self._writer.close()
        super().close()


class QueuedHandler(logging.Handler):
    """Leaves records to a thread of its own, which makes lines of them and may wait for their reader.

    Args:
        descriptor: to write to.
        make_formatter: called in the thread, at the first record: what it imports delays nobody.
    """

    def __init__(self, descriptor: int, make_formatter: Callable[[], logging.Formatter]) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._make_formatter = make_formatter
        self._records: deque[logging.LogRecord] = deque()
        self._dropped = 0
        self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="luacell-logs", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record, or drop and count it."""
        if len(self._records) >= RECORDS_MAX:
            self._dropped += 1
        else:
            self._records.append(record)
            self._wake.set()

    def close(self) -> None:
        """Give the thread a little time for what still waits, and let it be."""
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_LIMIT_S)
        super().close()

    # -- the thread -----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._records:
                self._write(self._records.popleft())
                if dropped := self._take_dropped():
                    self._write(_dropped_record(dropped))
            if self._closing:
                return

    def _take_dropped(self) -> int:
        if not self._dropped or len(self._records) >= RECORDS_MAX // 2:  # told once it is over, not for each gap
            return 0
        with self.lock or contextlib.nullcontext():
            dropped, self._dropped = self._dropped, 0
        return dropped

    def _write(self, record: logging.LogRecord) -> None:
        if self.formatter is None:
            self.setFormatter(self._make_formatter())
        try:
            data = self.format(record).encode("utf-8", "replace") + b"\n"
        except Exception:  # its fields may be anything; one that has no text must not be the last record
            self._dropped += 1
            return
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # somebody who shares it has made it so
                if not _is_writable(self._descriptor):
                    break
            except OSError:  # nobody will ever read it
                break
        if data:
            with self.lock or contextlib.nullcontext():
                self._dropped += 1


def _is_writable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(WRITE_LIMIT_MS))


def configure_logging(level: str) -> None:
    """Send the records of this process to stderr, at once.

    Args:
        level: "debug", "info", "warning", "error" or "critical".

    Raises:
        ValueError: it is none of these.
    """
    _install(DirectHandler(STDERR, plain_formatter(readable=os.isatty(STDERR))), level)


def configure_queued_logging(level: str, make_formatter: Callable[..., logging.Formatter]) -> QueuedHandler:
    """Send the records of this process to stderr, through a thread.

    Args:
        level: as for `configure_logging`.
        make_formatter: is told by `readable` for whom.

    Returns:
        The handler, to be closed at the end of the process.

    Raises:
        ValueError: the level is unknown.
    """
    readable = os.isatty(STDERR)
    handler = QueuedHandler(STDERR, lambda: make_formatter(readable=readable))
    _install(handler, level)
    return handler


def _install(handler: logging.Handler, level: str) -> None:
    root = logging.getLogger()
    root.setLevel(level.upper())
    root.handlers[:] = [handler]
