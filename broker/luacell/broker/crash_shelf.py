"""The shelf of crash records: which are kept, and which go when others come.

It counts and decides, oldest first; the files behind it are `crash_store`'s. Sources stay for as long as a crash on the
shelf ran on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from luacell.broker.crash_files import Row
from luacell.protocol.limits import CRASHES_MAX, LISTED_CRASHES_MAX, MIB
from luacell.protocol.paths import CRASH_SOURCES_SUFFIX, CRASH_SUFFIX

CRASHES_PER_CONTRACT_MAX: Final = 10
CRASH_BYTES_MAX: Final = 64 * MIB  # of all files: seven calls with 4 MiB of arguments on sources of as much


class CrashShelf:
    """The crashes that are on record.

    Args:
        per_contract: how many there may be of one contract.
        count: how many in all.
        size: bytes of all files; one crash with its sources is kept even where they have more.
    """

    def __init__(
        self,
        per_contract: int = CRASHES_PER_CONTRACT_MAX,
        count: int = CRASHES_MAX,
        size: int = CRASH_BYTES_MAX,
    ) -> None:
        self._per_contract = per_contract
        self._count = count
        self._size_max = size
        self._rows: dict[str, Row] = {}  # by id, oldest first
        self._sizes: dict[str, int] = {}  # of files, by name
        self._of_contract: Counter[bytes] = Counter()
        self._on_sources: Counter[str] = Counter()
        self.size = 0

    def __len__(self) -> int:
        return len(self._rows)

    def has_sources(self, digest: str) -> bool:
        """Whether sources are there already."""
        return digest in self._on_sources

    def add(self, row: Row, call_size: int, sources_size: int) -> list[str]:
        """Take a crash that is newer than all others.

        Args:
            row: what a list shows of it.
            call_size: bytes of its own file.
            sources_size: bytes of the file with its sources.

        Returns:
            The names of the files that are to go, never those of this crash.
        """
        digest, contract = row["source_digest"], row["contract_id"]
        self._rows[row["id"]] = row
        self._of_contract[contract] += 1
        self._on_sources[digest] += 1
        self._note(row["id"] + CRASH_SUFFIX, call_size)
        self._note(digest + CRASH_SOURCES_SUFFIX, sources_size)
        gone: list[str] = []
        if self._of_contract[contract] > self._per_contract:
            gone += self._remove(next(each for each in self._rows.values() if each["contract_id"] == contract))
        while len(self._rows) > 1 and (len(self._rows) > self._count or self.size > self._size_max):
            gone += self._remove(next(iter(self._rows.values())))
        return gone

    def get(self, crash_id: str) -> Row | None:
        """Return what a list shows of a crash, or None."""
        return self._rows.get(crash_id)

    def page(self, first: int) -> dict[str, Any]:
        """Return crashes from position `first` on, newest first, and how many there are in all."""
        rows = list(reversed(self._rows.values()))
        return {"crashes": rows[first : first + LISTED_CRASHES_MAX], "total": len(rows)}

    def _note(self, name: str, size: int) -> None:
        self.size += size - self._sizes.get(name, 0)
        self._sizes[name] = size

    def _remove(self, row: Row) -> Iterator[str]:
        digest, contract = row["source_digest"], row["contract_id"]
        del self._rows[row["id"]]
        self._of_contract -= Counter((contract,))
        yield self._drop(row["id"] + CRASH_SUFFIX)
        self._on_sources -= Counter((digest,))
        if not self._on_sources[digest]:
            yield self._drop(digest + CRASH_SOURCES_SUFFIX)

    def _drop(self, name: str) -> str:
        self.size -= self._sizes.pop(name)
        return name
