"""The fault catalogue: one row for each thing that can go wrong, as data; the tests beside it throw them.

A test belongs to the rows that its parameter's id begins with (`[C08-os.exit(0)]`), else to those that its name begins
with (`test_c46_c47_…`); `test_catalogue.py` checks that each row has its tests and each test its rows. `document.py`
writes docs/faults.md from the rows and what their tests said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from tests.faults.rows import contracts, failures, memory, processes, security, wire
from tests.faults.rows.row import Row

PARTS: Final[Mapping[str, tuple[Row, ...]]] = {
    "A contract misbehaves": contracts.ROWS,
    "Processes and supervision": processes.ROWS,
    "Shared memory": memory.ROWS,
    "ZeroMQ and the wire": wire.ROWS,
    "Security": security.ROWS,
    "The n-th operation fails": failures.ROWS,
}
ROWS: Final[Mapping[str, Row]] = {row.id: row for rows in PARTS.values() for row in rows}

# Where its tests are: what is about the service as a whole stands with the other tests of that.
PLACES: Final = (
    "tests/faults",
    "tests/system/test_bad_input.py",
    "tests/system/test_drain.py",
    "tests/system/test_quarantine.py",
    "tests/system/test_recycling.py",
    "tests/system/test_supervision.py",
)

_ID: Final = re.compile(r"[A-Z]\d+[a-z]?|E")


def rows_of(node: str) -> list[str]:
    """Return the ids of the rows that a test throws, from its node id; none where it is no test of the catalogue."""
    name, _, parameters = node.rpartition("::")[2].partition("[")
    found = [word for part in parameters.rstrip("]").split("-") for word in _ids(part.split("_"))]
    return found or list(_ids(part[:1].upper() + part[1:] for part in name.removeprefix("test_").split("_")))


def _ids(words: Iterator[str] | list[str]) -> Iterator[str]:
    """Yield words as long as they are ids."""
    for word in words:
        if not _ID.fullmatch(word):
            return
        yield word
