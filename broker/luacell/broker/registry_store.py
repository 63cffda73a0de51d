"""The registry on disk: contracts, their sources, modules, versions and settings, in one SQLite database.

It reads all of them once, at the start, and then writes one change at a time, whole or not at all. It decides nothing
and knows no calls; private contracts never come here. A source is kept once, under its SHA-256, however many contracts
use it, and is checked against it when it is read: SQLite has no checksums of its own.

It belongs to one thread at a time; a lock on the state directory keeps other brokers away.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from luacell.broker.registry import ContractRecord
from luacell.protocol.errors import LuacellError
from luacell.protocol.identity import HostContractId, Version, format_id
from luacell.protocol.limits import CONTRACTS_MAX, MIB
from luacell.protocol.messages import Settings

log = logging.getLogger("luacell.broker")

BUSY_LIMIT_S: Final = 2.0  # somebody with a sqlite3 shell may read; a writer among them must not hold us up for long
WAL_KEPT_MAX: Final = 16 * MIB  # bytes the write-ahead log is cut back to after a checkpoint: four largest contracts
APPLICATION_ID: Final = 0x6C636C6C  # "lcll", in the file's header: this database is a registry of luacell
PAGE_MIN: Final = 512  # bytes; no database is smaller, but for one that is empty
SQLITE_MIN: Final = (3, 37, 0)  # the first with STRICT tables

# Each entry takes a database from the version of its index to the next; never edited once released.
MIGRATIONS: Final = (
    """
    CREATE TABLE sources (
        digest BLOB NOT NULL PRIMARY KEY CHECK (length(digest) = 32),
        source BLOB NOT NULL
    ) STRICT;
    CREATE TABLE contracts (
        id BLOB NOT NULL PRIMARY KEY CHECK (length(id) = 8),  -- big-endian, so that rows are in order of id
        name TEXT NOT NULL,
        version TEXT CHECK ((version IS NULL) = (name = '')),
        chunk_name TEXT NOT NULL,
        digest BLOB NOT NULL REFERENCES sources (digest)
    ) STRICT;
    CREATE INDEX contracts_by_digest ON contracts (digest);
    CREATE TABLE modules (
        contract BLOB NOT NULL REFERENCES contracts (id) ON DELETE CASCADE,
        name TEXT NOT NULL,
        digest BLOB NOT NULL REFERENCES sources (digest),
        PRIMARY KEY (contract, name)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX modules_by_digest ON modules (digest);
    CREATE TABLE settings (  -- a row each, so that a setting which is added needs no migration
        contract BLOB NOT NULL REFERENCES contracts (id) ON DELETE CASCADE,
        name TEXT NOT NULL,
        value ANY NOT NULL,
        PRIMARY KEY (contract, name)
    ) STRICT, WITHOUT ROWID;
    """,
)
SCHEMA_VERSION: Final = len(MIGRATIONS)
_TABLES: Final = {"sources", "contracts", "modules", "settings"}

_DEFAULTS: Final = Settings()
_NO_SPACE: Final = ("SQLITE_FULL", "SQLITE_IOERR_WRITE")  # the latter where a quota or a limit on file sizes is hit


class StoreError(LuacellError):
    """The registry cannot be read or written; the text names the file, the reason and what to do."""


class RegistryStore:
    """The registry in one file.

    Args:
        path: of the database; made where it is missing, in a directory that is ours alone.
        durable: whether a change must survive a loss of power; without, it survives the death of every process.

    Raises:
        StoreError: it is damaged, of a newer luacell, no registry, or cannot be written.
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self.path = path
        if sqlite3.sqlite_version_info < SQLITE_MIN:
            wanted = ".".join(map(str, SQLITE_MIN[:2]))
            raise StoreError(f"{path} needs SQLite {wanted} or newer; this Python has {sqlite3.sqlite_version}")
        with self._translated("open"):
            self._make_file()
            self._database = sqlite3.connect(
                path, timeout=BUSY_LIMIT_S, isolation_level=None, check_same_thread=False, cached_statements=64
            )
        try:
            with self._translated("open"):
                self._prepare(durable)
        except BaseException:
            self._database.close()
            raise

    def _make_file(self) -> None:
        """Make the file where it is missing, for us alone, and refuse a stump: SQLite would take it for a new one."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
        if 0 < size < PAGE_MIN:
            raise self._damaged(f"it has {size} bytes")

    def _prepare(self, durable: bool) -> None:
        execute = self._database.execute
        execute("PRAGMA trusted_schema = OFF")
        execute("PRAGMA cell_size_check = ON")
        version = self._check_identity()
        (mode,) = execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreError(f"{self.path} cannot have a write-ahead log (its journal is {mode!r}); use a local disk")
        execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        execute(f"PRAGMA journal_size_limit = {WAL_KEPT_MAX}")
        self._migrate(version)
        execute("PRAGMA foreign_keys = ON")
        self._check_content()
        self._try_to_write()

    def _try_to_write(self) -> None:
        """Refuse a registry that may not be written now, not at the first registration.

        A disk that is full is no reason not to serve what is there: space can be made, and changes are refused until
        then.
        """
        try:
            with self._transaction():
                self._database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname not in _NO_SPACE:
                raise
            log.warning("registry cannot be written now", extra={"fields": {"path": self.path, "reason": str(error)}})

    def _check_identity(self) -> int:
        """Return the schema version of a database that is ours, or new."""
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        (application,) = self._database.execute("PRAGMA application_id").fetchone()
        (tables,) = self._database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        is_new = version == application == tables == 0
        if not is_new and application != APPLICATION_ID:
            raise StoreError(f"{self.path} is a database, but no registry of luacell; move it away")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} has schema version {version}, from a newer luacell; this one knows {SCHEMA_VERSION}: "
                f"use the newer luacell, or move the file away to start with an empty registry"
            )
        return int(version)

    def _migrate(self, version: int) -> None:
        for number in range(version, SCHEMA_VERSION):
            with self._transaction():
                for statement in _statements(MIGRATIONS[number]):
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._database.execute(f"PRAGMA user_version = {number + 1}")

    def _check_content(self) -> None:
        (verdict,) = self._database.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise self._damaged(verdict)
        found = {name for (name,) in self._database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if missing := sorted(_TABLES - found):
            raise self._damaged(f"it lacks the table {missing[0]!r}")
        if self._database.execute("PRAGMA foreign_key_check").fetchone() is not None:
            raise self._damaged("a row refers to one that is not there")
        (count,) = self._database.execute("SELECT count(*) FROM contracts").fetchone()
        if count > CONTRACTS_MAX:
            raise StoreError(f"{self.path} holds {count} contracts; the limit is {CONTRACTS_MAX}: move it away")

    # -- reading --------------------------------------------------------------------------------------------------
    def records(self) -> list[ContractRecord]:
        """Return all contracts in order of id.

        Raises:
            StoreError: a row is not what was written.
        """
        with self._translated("read"):
            sources = self._read_sources()
            modules: dict[bytes, dict[str, bytes]] = {}
            for contract, name, digest in self._database.execute("SELECT contract, name, digest FROM modules"):
                modules.setdefault(contract, {})[name] = sources[digest]
            settings: dict[bytes, dict[str, Any]] = {}
            for contract, name, value in self._database.execute("SELECT contract, name, value FROM settings"):
                settings.setdefault(contract, {})[name] = value
            rows = self._database.execute("SELECT id, name, version, chunk_name, digest FROM contracts ORDER BY id")
            return [
                ContractRecord(
                    id=self._checked_id(raw_id, name, version),
                    name=name,
                    version=Version.parse(version) if version else None,
                    source=sources[digest],
                    chunk_name=chunk_name,
                    modules=modules.get(raw_id, {}),
                    settings=self._read_settings(raw_id, settings.get(raw_id, {})),
                )
                for raw_id, name, version, chunk_name, digest in rows
            ]

    def _read_sources(self) -> dict[bytes, bytes]:
        sources: dict[bytes, bytes] = {}
        for digest, source in self._database.execute("SELECT digest, source FROM sources"):
            if sha256(source).digest() != digest:
                raise self._damaged(f"source {digest.hex()[:16]}… is not what was written")
            sources[digest] = source
        return sources

    def _checked_id(self, raw_id: bytes, name: str, version: str | None) -> int:
        contract_id = int.from_bytes(raw_id, "big")
        try:
            if name and int(HostContractId(name, Version.parse(version or "").major)) != contract_id:
                raise ValueError(f"{name}@{version} has another id")
        except ValueError as error:
            raise self._damaged(f"contract {format_id(contract_id)}: {error}") from None
        return contract_id

    def _read_settings(self, raw_id: bytes, values: dict[str, Any]) -> Settings:
        title = format_id(int.from_bytes(raw_id, "big"))
        fields = _DEFAULTS.as_fields()
        for name, value in values.items():
            if name not in fields:
                raise StoreError(
                    f"{self.path}: contract {title} has the setting {name!r}, which this luacell does not know: "
                    "use the newer luacell"
                )
            kind = type(fields[name])
            if not isinstance(value, str if kind is str else int):
                raise self._damaged(f"contract {title}: {name} = {value!r} is no {kind.__name__}")
            fields[name] = kind(value)
        return Settings(**fields)

    # -- writing --------------------------------------------------------------------------------------------------
    def put(self, *records: ContractRecord) -> None:
        """Write contracts, each in place of the one of its id, all or none; on return they are there for good.

        Raises:
            StoreError: they could not be written; what was there is there.
        """
        with self._translated("write"), self._transaction():
            for record in records:
                self._put(record)

    def _put(self, record: ContractRecord) -> None:
        assert record.owner is None, "private contracts are never stored"
        raw_id = _key(record.id)
        execute = self._database.execute
        sources = {sha256(source).digest(): source for source in (record.source, *record.modules.values())}
        before = self._digests_of(raw_id)
        execute("DELETE FROM contracts WHERE id = ?", (raw_id,))
        for digest, source in sources.items():
            execute("INSERT OR IGNORE INTO sources VALUES (?, ?)", (digest, source))
        execute(
            "INSERT INTO contracts (id, name, version, chunk_name, digest) VALUES (?, ?, ?, ?, ?)",
            (
                raw_id,
                record.name,
                str(record.version) if record.version else None,
                record.chunk_name,
                sha256(record.source).digest(),
            ),
        )
        self._database.executemany(
            "INSERT INTO modules VALUES (?, ?, ?)",
            [(raw_id, name, sha256(source).digest()) for name, source in record.modules.items()],
        )
        self._database.executemany(
            "INSERT INTO settings VALUES (?, ?, ?)",
            [(raw_id, name, value) for name, value in record.settings.as_fields().items()],
        )
        self._forget_sources(before - sources.keys())

    def remove(self, *contract_ids: int) -> None:
        """Remove contracts, those that are there, all or none.

        Raises:
            StoreError: they could not be removed; they are there.
        """
        with self._translated("write"), self._transaction():
            for raw_id in map(_key, contract_ids):
                before = self._digests_of(raw_id)
                self._database.execute("DELETE FROM contracts WHERE id = ?", (raw_id,))
                self._forget_sources(before)

    def close(self) -> None:
        """Close the file; what was written is in it."""
        with contextlib.suppress(sqlite3.Error):
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._database.close()

    def _digests_of(self, raw_id: bytes) -> set[bytes]:
        rows = self._database.execute(
            "SELECT digest FROM contracts WHERE id = ?1 UNION SELECT digest FROM modules WHERE contract = ?1", (raw_id,)
        )
        return {digest for (digest,) in rows}

    def _forget_sources(self, digests: set[bytes]) -> None:
        """Remove those that no contract uses any more."""
        self._database.executemany(
            "DELETE FROM sources WHERE digest = ?1"
            " AND NOT EXISTS (SELECT 1 FROM contracts WHERE digest = ?1)"
            " AND NOT EXISTS (SELECT 1 FROM modules WHERE digest = ?1)",
            [(digest,) for digest in digests],
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # SQLite itself ends it where the disk is full or broken
                self._database.execute("ROLLBACK")
            raise

    # -- errors ---------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _translated(self, verb: str) -> Iterator[None]:
        """Raise StoreError for whatever SQLite or the system reports."""
        try:
            yield
        except OSError as error:
            raise StoreError(f"cannot {verb} {self.path}: {error.strerror}") from None
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")  # the module's own errors have none
            if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_SCHEMA")):
                raise self._damaged(str(error)) from None
            raise StoreError(f"cannot {verb} {self.path}: {error}") from None

    def _damaged(self, reason: str) -> StoreError:
        return StoreError(
            f"{self.path} is damaged: {reason}; put a copy of it back, or move it and {self.path.name}-wal away to "
            "start with an empty registry"
        )


def _key(contract_id: int) -> bytes:
    return contract_id.to_bytes(8, "big")


def _statements(script: str) -> Iterator[str]:
    """Split a script; `executescript` would commit the transaction that a migration runs in."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
