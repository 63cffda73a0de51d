"""What an embedded service writes to its stderr, as records of the stdlib logger `luacell`.

The service writes into a pipe that never blocks it; what does not fit is lost. Whoever uses the bridge reads the other
end by the way: there is no thread for it. Lines in the form of `luacell.protocol.logs` become records of the logger,
level and time that they name, anything else a warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections import deque
from typing import Any, Final, NamedTuple

from luacell.protocol.limits import KIB

ROOT: Final = "luacell"
OTHER: Final = "luacell.service"  # the logger of whatever names none
PIPE_SIZE: Final = 256 * KIB  # bytes that wait to be read; some thousand records
LINE_MAX: Final = 64 * KIB  # bytes; a longer line is cut into pieces
READING_MAX_S: Final = 0.1  # a pipe's fill takes a few milliseconds
LAST_LINES_MAX: Final = 20  # remembered for an error text
_TEXT_MAX: Final = 4 * KIB  # characters of one line in a record or error text
_COMMON: Final = ("at", "level", "logger", "event")
_LEVELS: Final = ("debug", "info", "warning", "error", "critical")

logging.getLogger(ROOT).addHandler(logging.NullHandler())  # a library prints nothing unless it is asked to


class Line(NamedTuple):
    """One line of the service.

    Attributes:
        logger: `luacell` or a name below it.
        level: of the logging module.
        text: event and fields.
        at_s: wall clock, or None where the line does not say.
    """

    logger: str
    level: int
    text: str
    at_s: float | None


def read_line(raw: bytes) -> Line:
    """Understand one line, whatever it is."""
    text = raw.decode("utf-8", "replace")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("level") not in _LEVELS or "event" not in values:
        return Line(OTHER, logging.WARNING, text[:_TEXT_MAX], None)
    name, at_s = str(values.get("logger", OTHER)), values.get("at")
    fields = "".join(f" {key}={_shown(value)}" for key, value in values.items() if key not in _COMMON)
    return Line(
        logger=name if name == ROOT or name.startswith(f"{ROOT}.") else OTHER,
        level=logging.getLevelNamesMapping()[str(values["level"]).upper()],
        text=f"{values['event']}{fields}"[:_TEXT_MAX],
        at_s=float(at_s) if isinstance(at_s, int | float) else None,
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value and " " not in value else json.dumps(value, ensure_ascii=False)


class Splitter:
    """Cuts a stream of bytes into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take what came and return the lines that it completes, without empty ones."""
        *lines, rest = (self._rest + data).split(b"\n")
        while len(rest) > LINE_MAX:
            lines.append(rest[:LINE_MAX])
            rest = rest[LINE_MAX:]
        self._rest = rest
        return [line for line in lines if line.strip()]

    def end(self) -> list[bytes]:
        """Return what has no end of line."""
        return self.feed(b"\n")


class ServiceLog:
    """The reading end of a service's stderr.

    Attributes:
        writer: the other end, for the service; `close_writer` when it has it.
        descriptor: readable when there is something to read; -1 when closed.
    """

    def __init__(self) -> None:
        self.descriptor, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with contextlib.suppress(OSError):  # over the user's limit: then fewer records wait
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self._splitter = Splitter()
        self._last: deque[str] = deque(maxlen=LAST_LINES_MAX)
        self._reading = threading.Lock()
        self._since_s = 0.0  # when the last reading began

    def close_writer(self) -> None:
        """Close our copy of the service's end. Idempotent."""
        writer, self.writer = self.writer, -1
        if writer >= 0:
            os.close(writer)

    def read(self) -> bool:
        """Turn what has come into records; without waiting, at most one pipe's fill.

        Returns:
            Whether more may come.
        """
        reading = self._reading
        if not reading.acquire(blocking=False):  # another thread does, or a handler of the logger asks for us
            if time.monotonic() - self._since_s > READING_MAX_S:  # or an interrupt came before it could be released
                self._reading = threading.Lock()
            return True
        try:
            self._since_s = time.monotonic()
            return self.descriptor >= 0 and self._read()
        finally:
            reading.release()

    def _read(self) -> bool:
        for _ in range(PIPE_SIZE // LINE_MAX):
            try:
                data = os.read(self.descriptor, LINE_MAX)
            except BlockingIOError:
                return True
            for raw in self._splitter.feed(data) if data else self._splitter.end():
                self._write(read_line(raw))
            if not data:
                return False
        return True

    def _write(self, line: Line) -> None:
        self._last.append(line.text)
        logger = logging.getLogger(line.logger)
        if logger.isEnabledFor(line.level):
            record = logger.makeRecord(line.logger, line.level, "", 0, "%s", (line.text,), None)
            if line.at_s is not None:
                record.created = line.at_s
            logger.handle(record)

    def last_words(self) -> str:
        """Return the last lines that were read."""
        return "\n".join(self._last)[-_TEXT_MAX:]

    def close(self) -> None:
        """Read what is left and close. Idempotent."""
        self.read()
        has_ended = self._reading.acquire(timeout=READING_MAX_S)
        descriptor, self.descriptor = self.descriptor, -1
        if has_ended:
            self._reading.release()
        if descriptor >= 0:
            os.close(descriptor)
        self.close_writer()

    def leave_in_child(self) -> None:
        """Close, in a forked child, what is the parent's; its locks may be held by threads that are not here."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def wanted_level() -> str:
    """Return the least level of records that somebody here listens to."""
    threshold = logging.getLogger(ROOT).getEffectiveLevel()
    mapping = logging.getLevelNamesMapping()
    return next((name for name in _LEVELS if mapping[name.upper()] >= threshold), _LEVELS[-1])
