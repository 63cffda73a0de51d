r"""Records that contracts write by `luacell.log`: found among what they print to stderr.

Each is a line of its own form: 0x1E, `log`, a level, a function id or `-`, and the text, in which backslash, line break
and 0x1E are escaped (`\\`, `\n`, `\e`). It may come in several pieces. What only begins like one is what the contract
has printed. A contract can write such lines by itself: they are its word either way, and nobody else's.

This finds them; what becomes of them is for others to decide.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

MARK: Final = b"\x1e"
LINE_MAX: Final = 4096  # bytes of one line, 0x1E and line break included: PIPE_BUF, so that it is written in one
_LINE: Final = re.compile(rb"\x1elog (debug|info|warning|error) (-|\d{1,10}) ([^\x1e\n]*)\n")
_ESCAPED: Final = re.compile(rb"\\(.)", re.DOTALL)
_MEANT: Final = {b"n": b"\n", b"e": MARK}


class Line(NamedTuple):
    """One record of a contract.

    Attributes:
        level: "debug", "info", "warning" or "error".
        function: id of the function that ran, as the worker says; None while the contract was loading.
        text: as it was given, any bytes.
    """

    level: str
    function: int | None
    text: bytes


class LineFinder:
    """The stderr of one worker."""

    def __init__(self) -> None:
        self._begun = b""  # a line that is not complete yet, LINE_MAX bytes at most

    def feed(self, data: bytes) -> list[bytes | Line]:
        """Take what came and return what it is, in order: prints as they are, and records."""
        found: list[bytes | Line] = []
        data, self._begun = self._begun + data, b""
        prints, *rests = data.split(MARK)
        if prints:
            found.append(prints)
        for number, rest in enumerate(rests, 1):
            marked = MARK + rest
            if number == len(rests) and b"\n" not in rest and len(marked) < LINE_MAX:
                self._begun = marked
                break
            match = _LINE.match(marked)
            if match is not None:
                found.append(_line_of(match))
                marked = marked[match.end() :]
            if marked:
                found.append(marked)
        return found

    def end(self) -> bytes:
        """Return what only began like a record: nothing more comes."""
        begun, self._begun = self._begun, b""
        return begun


def readable(data: bytes) -> bytes:
    """Return output with its records in the form that people read: level and text."""
    finder = LineFinder()
    found = [*finder.feed(data), finder.end()]
    return b"".join(
        part if isinstance(part, bytes) else b"%b: %b\n" % (part.level.encode(), part.text) for part in found
    )


def _line_of(match: re.Match[bytes]) -> Line:
    level, function, escaped = match.groups()
    text = _ESCAPED.sub(lambda found: _MEANT.get(found[1], found[1]), escaped)
    return Line(level.decode(), None if function == b"-" else int(function), text)
