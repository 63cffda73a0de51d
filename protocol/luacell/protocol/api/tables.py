"""Tables of a TOML text, read strictly: what is unknown, missing or of the wrong type is an ApiError with its place.

It knows TOML, names and places; what the tables mean is `parse`'s affair. What is wrong is raised where there is
nothing to go on with, else noted, so that a text is told everything that is wrong with it at once.
"""

from __future__ import annotations

import difflib
import keyword
import re
import tomllib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from luacell.protocol.api.model import API_SIZE_MAX, IDENTIFIER_MAX
from luacell.protocol.api.positions import Path, Position, Positions
from luacell.protocol.errors import ApiError

_LUA_WORDS: Final = (
    "and break do else elseif end false for function goto if in local nil not or repeat return then true until while"
)
LUA_KEYWORDS: Final = frozenset(_LUA_WORDS.split())
PYTHON_KEYWORDS: Final = frozenset(keyword.kwlist)

_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PLACE: Final = re.compile(r"(.*) \(at line ([0-9]+), column ([0-9]+)\)", re.DOTALL)
_SHOWN_MAX: Final = 60  # characters of a value in an error text
PROBLEMS_MAX: Final = 100  # that are told of one text; more than a terminal shows
_KINDS: Final[dict[type, str]] = {
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    str: "a text",
    list: "an array",
    dict: "a table",
}


@dataclass(frozen=True, slots=True)
class _Text:
    """What the tables of one text share: its name for errors, its places, and what was noted."""

    filename: str
    positions: Positions
    problems: list[ApiError] = field(default_factory=list)


class Table:
    """One table, and the whole text it is from.

    Args:
        values: as tomllib read them.
        path: keys and indices that lead to it.
        text: it is from.
    """

    def __init__(self, values: dict[str, Any], path: Path, text: _Text) -> None:
        self.values = values
        self.path = path
        self._text = text

    @classmethod
    def read(cls, text: str, filename: str) -> Table:
        """Read a text whole.

        Raises:
            ApiError: it is too large or no TOML.
        """
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > API_SIZE_MAX:
            raise ApiError(filename, 1, 1, f"a description of {size} bytes; the limit is {API_SIZE_MAX}")
        text = text.replace("\r\n", "\n")
        try:
            return cls(tomllib.loads(text), (), _Text(filename, Positions(text)))
        except RecursionError:
            raise ApiError(filename, 1, 1, "arrays or tables are nested too deeply") from None
        except ValueError as error:
            place = _PLACE.fullmatch(str(error))
            if place:
                raise ApiError(filename, int(place[2]), int(place[3]), f"no TOML: {place[1]}") from None
            end = Position(text.count("\n") + 1, len(text) - text.rfind("\n"))
            raise ApiError(filename, *end, f"no TOML: {error}".replace(" (at end of document)", "")) from None

    @property
    def line(self) -> int:
        """Where it begins."""
        return self._text.positions.value(self.path).line

    # -- what is wrong --------------------------------------------------------------------------------------------
    def note(self, error: ApiError) -> None:
        """Remember what is wrong with the text, to go on and find what else is."""
        self._text.problems.append(error)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what is raised within, and go on behind it."""
        try:
            yield
        except ApiError as error:
            self.note(error)

    def check(self) -> None:
        """Return where nothing was noted.

        Raises:
            ApiError: with all that was, in the order of the text.
        """
        problems = sorted(self._text.problems, key=lambda each: (each.line, each.column))
        if not problems:
            return
        first, *others = problems[:PROBLEMS_MAX]
        if len(problems) > PROBLEMS_MAX:
            left = len(problems) - PROBLEMS_MAX
            others.append(ApiError(first.filename, others[-1].line, others[-1].column, f"and {left} more"))
        raise ApiError(first.filename, first.line, first.column, first.reason, tuple(others))

    def error(self, key: str, reason: str, *, offset: int = 0) -> ApiError:
        """Return an error about the value of a key, or about the table where it lacks that key.

        Args:
            key: in this table.
            reason: what is wrong.
            offset: characters into a text value.
        """
        line, column = self._text.positions.value((*self.path, key))
        return ApiError(self._text.filename, line, column + (1 + offset if offset else 0), reason)

    def error_at_key(self, key: str, reason: str) -> ApiError:
        """Return an error about a key itself."""
        return ApiError(self._text.filename, *self._text.positions.key((*self.path, key)), reason)

    # -- what it holds --------------------------------------------------------------------------------------------
    def allow(self, known: Collection[str]) -> None:
        """Note keys that are not known, and what was probably meant."""
        for key in self.values:
            if key not in known:
                self.note(self.error_at_key(key, f"unknown key {shown(key)}{meant(key, known)}"))

    def text(self, key: str) -> str:
        """Return a text.

        Raises:
            ApiError: it is missing or none.
        """
        value = self._required(key)
        if type(value) is not str:
            raise self.mismatch(key, value, "a text")
        return value

    def boolean(self, key: str) -> bool:
        """Return a boolean; false where the key is missing, and where it is none, which is noted."""
        value = self.values.get(key, False)
        if type(value) is not bool:
            self.note(self.mismatch(key, value, "true or false"))
            return False
        return value

    def identifier(self, reserved: Collection[str] = ()) -> str:
        """Return the `name` of this table.

        Args:
            reserved: names that this place cannot have, besides keywords.

        Raises:
            ApiError: it is no identifier, or a reserved one.
        """
        name = self.text("name")
        if len(name) > IDENTIFIER_MAX:
            raise self.error("name", f"name has {len(name)} characters; the limit is {IDENTIFIER_MAX}")
        if not _IDENTIFIER.fullmatch(name):
            raise self.error("name", f"name {shown(name)} is no identifier; write letters, digits and _")
        if name.startswith("__"):
            raise self.error("name", f"name {name!r} is reserved: two underscores are for Python and Lua")
        languages = [
            language for language, words in (("Lua", LUA_KEYWORDS), ("Python", PYTHON_KEYWORDS)) if name in words
        ]
        if languages:
            raise self.error("name", f"name {name!r} is reserved: a keyword of {' and '.join(languages)}")
        if name in reserved:
            raise self.error("name", f"name {name!r} is reserved")
        return name

    def tables(self, key: str, count_max: int, *, required: bool = False) -> Iterator[Table]:
        """Yield the tables of an array; note where it is none, has too many, or none where one is required.

        What is wrong with a table, and raised while it is at hand, is its caller's to catch.
        """
        found: list[Any] = []
        with self.noting():
            found = self._array(key, count_max, required=required)
        for index, item in enumerate(found):
            if type(item) is dict:
                yield Table(item, (*self.path, key, index), self._text)
                continue
            position = self._text.positions.value((*self.path, key, index))
            self.note(ApiError(self._text.filename, *position, f"{key}[{index}] is {kind_of(item)}, not a table"))

    def _array(self, key: str, count_max: int, *, required: bool) -> list[Any]:
        value = self._required(key) if required else self.values.get(key, [])
        if type(value) is not list:
            raise self.mismatch(key, value, "an array of tables")
        if required and not value:
            raise self.error(key, f"{key} is empty; it needs at least one")
        if len(value) > count_max:
            raise self.error(key, f"{len(value)} {key}; the limit is {count_max}")
        return value

    def table(self, key: str) -> Table:
        """Return the table of a key whose value is one."""
        return Table(self.values[key], (*self.path, key), self._text)

    def docs(self) -> str:
        """Return the `docs` of this table, and look whether `langs` is a table.

        `docs` is a text, or a table whose texts follow each other as paragraphs. It is noted where either is of another
        type, or the text holds control characters, which a terminal would obey.
        """
        if type(self.values.get("langs", {})) is not dict:
            self.note(self.mismatch("langs", self.values["langs"], "a table"))
        docs = self.values.get("docs", "")
        if type(docs) is dict:
            docs = "\n\n".join(text.strip() for text in docs.values() if type(text) is str)
        if type(docs) is not str:
            self.note(self.mismatch("docs", docs, "a text or a table"))
            return ""
        control = _CONTROL.search(docs)
        if control:
            self.note(self.error("docs", f"docs hold the control character {control[0]!r}"))
        return docs.strip()

    def mismatch(self, key: str, value: object, wanted: str) -> ApiError:
        """Return an error about a value of the wrong type."""
        return self.error(key, f"{key} is {kind_of(value)}, not {wanted}")

    def _required(self, key: str) -> Any:
        if key not in self.values:
            raise self.error(key, f"lacks the key {key!r}")
        return self.values[key]


class Names:
    """Names that must differ, each with the line where it was first given."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._lines: dict[object, int] = {}

    def add(self, table: Table, name: str, identity: object = None) -> None:
        """Note a name.

        Args:
            table: which has it, under the key `name`.
            name: for the error.
            identity: what must differ, where that is not the name.

        Raises:
            ApiError: it was given before.
        """
        key = name if identity is None else identity
        if key in self._lines:
            raise table.error("name", f"duplicate {self._kind} {name!r}; the first is in line {self._lines[key]}")
        self._lines[key] = table.line


def meant(word: str, known: Collection[str]) -> str:
    """Return the end of an error text about an unknown word: what was probably meant."""
    close = difflib.get_close_matches(word[:IDENTIFIER_MAX], known, 1)
    if not close:
        close = [name for name in known if name.lower() == word.lower()]
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known)[:20])}"


def shown(text: str) -> str:
    """Write a text of any length for an error."""
    return repr(text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}...")


def kind_of(value: object) -> str:
    """Name the TOML type of a value."""
    return _KINDS.get(type(value), "a date or time")
