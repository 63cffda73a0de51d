"""Crash records on disk: files in one directory, written whole or not at all, and found again by the next broker.

It belongs to one thread, `crash_keeper`'s; the lock on the state directory keeps other brokers away. What is on disk is
never believed: names, sizes, checksums and fields are looked at, and what is not ours stays where it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from pathlib import Path
from typing import Any, Final

from luacell.broker.crash_files import (
    FILE_MAX,
    CrashedCall,
    DamagedFile,
    digest_of,
    packed_call,
    packed_sources,
    row_of,
    unpacked,
)
from luacell.broker.crash_shelf import CRASH_BYTES_MAX, CrashShelf
from luacell.broker.directories import DirectoryError, make_private
from luacell.protocol.errors import LuacellError
from luacell.protocol.limits import CRASHES_MAX
from luacell.protocol.messages import CRASH_ID_LENGTH
from luacell.protocol.paths import CRASH_PARTIAL, CRASH_SOURCES_SUFFIX, CRASH_SUFFIX

log = logging.getLogger("luacell.broker")

LOOKED_AT_MAX: Final = 3 * CRASHES_MAX  # entries of the directory at the start: calls, sources, and as many of others
TOLD_MAX: Final = 8  # names in one log record
_NAME: Final = re.compile(rf"[0-9a-f]{{{CRASH_ID_LENGTH}}}\{CRASH_SUFFIX}|[0-9a-f]{{64}}\{CRASH_SOURCES_SUFFIX}")


class CrashStoreError(LuacellError):
    """Crash records cannot be read or written; the text names the file and the reason."""


class CrashStore:
    """The crash records of one broker.

    Args:
        directory: made where it is missing and something is to be written.
        is_recording: whether crashes are added.
    """

    def __init__(self, directory: Path, *, is_recording: bool) -> None:
        self.directory = directory
        self.is_recording = is_recording
        self._shelf = CrashShelf()
        self._problem = "they were not read yet"

    def open(self) -> None:
        """Find what is there; what is damaged, or not ours, is told once and left alone.

        Raises:
            CrashStoreError: the directory cannot be used.
        """
        try:
            if self.is_recording or self.directory.exists():
                make_private(self.directory, "directory of crash records", DirectoryError)
                self._read_all()
        except (OSError, DirectoryError) as error:
            self._problem = str(error)
            raise CrashStoreError(self._problem) from None
        self._problem = ""

    def add(self, crashed: CrashedCall) -> None:
        """Write a crash, and have others go where there are too many.

        Raises:
            CrashStoreError: it could not be written.
        """
        self._check()
        sources = packed_sources(crashed.record)
        digest = digest_of(sources)
        row = row_of(crashed, digest)
        call = packed_call(crashed, row)
        try:
            if not self._shelf.has_sources(digest):
                self._write(digest + CRASH_SOURCES_SUFFIX, sources)
            self._write(crashed.id + CRASH_SUFFIX, call)
        except OSError as error:
            raise CrashStoreError(f"cannot write to {self.directory}: {error.strerror}") from None
        self._remove(self._shelf.add(row, len(call), len(sources)))

    def page(self, first: int) -> dict[str, Any]:
        """Return a page of the list, as CRASHES is answered.

        Raises:
            CrashStoreError: the directory cannot be used.
        """
        self._check()
        return self._shelf.page(first) | {"recording": self.is_recording}

    def part(self, crash_id: str, part: str) -> dict[str, Any] | None:
        """Return a part of a crash, as CRASH is answered; None where it is not on record.

        Raises:
            CrashStoreError: its file cannot be read.
        """
        self._check()
        row = self._shelf.get(crash_id)
        if row is None:
            return None
        name = crash_id + CRASH_SUFFIX if part == "args" else row["source_digest"] + CRASH_SOURCES_SUFFIX
        try:
            return self._read(name)
        except (OSError, DamagedFile) as error:
            raise CrashStoreError(f"cannot read {self.directory / name}: {error}") from None

    def _check(self) -> None:
        if self._problem:
            raise CrashStoreError(f"crash records are not to be had: {self._problem}")

    # -- files ----------------------------------------------------------------------------------------------------
    def _read_all(self) -> None:
        """Put on the shelf what was written in other lives; calls whose sources are gone, or damaged, do not count."""
        self._remove([CRASH_PARTIAL])  # left by a broker that was killed
        sizes, foreign = self._found()
        sources = {name: size for name, size in sizes.items() if name.endswith(CRASH_SOURCES_SUFFIX)}
        good: dict[str, int] = {}
        calls: list[tuple[dict[str, Any], int]] = []
        for name, size in sizes.items():
            try:
                found = self._read(name)
            except (OSError, DamagedFile) as error:
                foreign.append(f"{name} ({error})")
                continue
            if name in sources:
                good[name] = size
            else:
                calls.append((found["crash"], size))
        calls.sort(key=lambda call: (call[0]["time"], call[0]["id"]))
        for row, size in calls:
            name = row["source_digest"] + CRASH_SOURCES_SUFFIX
            if name in good:
                self._remove(self._shelf.add(row, size, good[name]))
            else:
                foreign.append(f"{row['id']}{CRASH_SUFFIX} (its sources are not there)")
        self._remove([name for name in good if not self._shelf.has_sources(name.removesuffix(CRASH_SOURCES_SUFFIX))])
        if foreign:
            fields = {"path": self.directory, "files": len(foreign), "such_as": sorted(foreign)[:TOLD_MAX]}
            log.warning("crash records skipped", extra={"fields": fields})

    def _found(self) -> tuple[dict[str, int], list[str]]:
        """Return the sizes of files that may be ours, within the bound on all of them, and what else is there."""
        sizes: dict[str, int] = {}
        foreign: list[str] = []
        total = 0
        with os.scandir(self.directory) as entries:
            for count, entry in enumerate(entries):
                if count >= LOOKED_AT_MAX:
                    foreign.append(f"what comes after {LOOKED_AT_MAX} files")
                    break
                about = entry.stat(follow_symlinks=False)
                is_ours = stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid() and _NAME.fullmatch(entry.name)
                if is_ours and about.st_size <= FILE_MAX and total + about.st_size <= CRASH_BYTES_MAX + FILE_MAX:
                    sizes[entry.name] = about.st_size
                    total += about.st_size
                else:
                    foreign.append(entry.name)
        return sizes, foreign

    def _read(self, name: str) -> dict[str, Any]:
        """Read a file that is ours.

        Raises:
            OSError: it cannot be read.
            DamagedFile: it is not what its name says.
        """
        descriptor = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            data = file.read(FILE_MAX + 1)
        stem, suffix = os.path.splitext(name)
        found = unpacked(suffix, data)
        own = found["crash"]["id"] if suffix == CRASH_SUFFIX else digest_of(data)
        if own != stem:
            raise DamagedFile("its content is another's")
        return found

    def _write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        partial = self.directory / CRASH_PARTIAL
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
            os.replace(partial, self.directory / name)
        except OSError:
            self._remove([CRASH_PARTIAL])
            raise

    def _remove(self, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(self.directory / name)
