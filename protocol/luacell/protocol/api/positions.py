"""Where in a TOML text each key and value stands; `tomllib` reads values, but not their places.

It takes text that tomllib has accepted and checks nothing again.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from typing import Final, NamedTuple

Path = tuple[str | int, ...]

_BLANKS: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_STRING: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{1,2})?'  # up to two quotes may stand before the closing three
    r"|'''.*?'''(?:'{1,2})?"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'",
    re.DOTALL,
)
_PLAIN: Final = re.compile(r"[^,\]}#\n]+")  # a number, a bool or a date, which may hold a blank


class Position(NamedTuple):
    """Line and column, from 1; the column counts characters."""

    line: int
    column: int


class Positions:
    """The places of a text's keys and values.

    Args:
        text: valid TOML.
    """

    def __init__(self, text: str) -> None:
        self._keys: dict[Path, int] = {}
        self._values: dict[Path, int] = {}
        self._lines = [0, *(match.end() for match in re.finditer("\n", text))]
        _Scan(text, self._keys, self._values).document()

    def key(self, path: Path) -> Position:
        """Return where a key is written, or where its table begins when it is not there."""
        return self._at(self._keys, path)

    def value(self, path: Path) -> Position:
        """Return where a value begins, or where its table does when it is not there."""
        return self._at(self._values, path)

    def _at(self, places: dict[Path, int], path: Path) -> Position:
        while path and path not in places:
            path = path[:-1]
            places = self._values
        offset = places.get(path, 0)
        line = bisect_right(self._lines, offset)
        return Position(line, offset - self._lines[line - 1] + 1)


class _Scan:
    """One pass over a text."""

    def __init__(self, text: str, keys: dict[Path, int], values: dict[Path, int]) -> None:
        self._text = text
        self._keys = keys
        self._values = values
        self._at = 0
        self._counts: dict[Path, int] = {}  # of the tables in each array that [[headers]] make

    def document(self) -> None:
        table: Path = ()
        while self._next():
            if self._text.startswith("[", self._at):
                table = self._header()
            else:
                self._pair(table)

    def _next(self) -> str:
        """Pass over blanks and comments; return the character there, "" at the end."""
        match = _BLANKS.match(self._text, self._at)
        assert match is not None  # it matches nothing, too
        self._at = match.end()
        return self._text[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        return match[0]

    def _header(self) -> Path:
        start = self._at
        brackets = 2 if self._text.startswith("[[", start) else 1
        self._at += brackets
        table: Path = ()
        for last, name, at in self._names():
            table = (*table, name)
            self._keys.setdefault(table, at)
            self._values.setdefault(table, start)
            if last and brackets == 2:
                self._counts[table] = self._counts.get(table, 0) + 1
            if table in self._counts:
                table = (*table, self._counts[table] - 1)
                self._values.setdefault(table, start)
        self._next()
        self._at += brackets
        return table

    def _names(self) -> list[tuple[bool, str, int]]:
        """Read a dotted key: for each part whether it is the last, its name and its place."""
        names: list[tuple[str, int]] = []
        while True:
            self._next()
            at = self._at
            names.append((self._name(), at))
            if self._next() != ".":
                return [(index == len(names), name, at) for index, (name, at) in enumerate(names, 1)]
            self._at += 1

    def _name(self) -> str:
        bare = self._take(_BARE)
        if bare is not None:
            return bare
        quoted = self._take(_STRING)
        return next(iter(tomllib.loads(f"{quoted} = 0")))

    def _pair(self, table: Path) -> None:
        for last, name, at in self._names():
            table = (*table, name)
            self._keys.setdefault(table, at)
            if not last:
                self._values.setdefault(table, at)
        self._at += 1  # the equals sign
        self._value(table)

    def _value(self, path: Path) -> None:
        opening = self._next()
        self._values[path] = self._at
        if opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline_table(path)
        elif self._take(_STRING) is None:
            self._take(_PLAIN)

    def _array(self, path: Path) -> None:
        self._at += 1
        index = 0
        while (character := self._next()) != "]":
            if character == ",":
                self._at += 1
            else:
                self._value((*path, index))
                index += 1
        self._at += 1

    def _inline_table(self, path: Path) -> None:
        self._at += 1
        while (character := self._next()) != "}":
            if character == ",":
                self._at += 1
            else:
                self._pair(path)
        self._at += 1
