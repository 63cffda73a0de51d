"""The registry's file: what was written is read again, whole; what is not right is refused by name."""

from __future__ import annotations

import os
import resource
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from luacell.broker import registry_store
from luacell.broker.registry import ContractRecord
from luacell.broker.registry_store import SCHEMA_VERSION, RegistryStore, StoreError
from luacell.protocol.identity import ContractRef
from luacell.protocol.limits import MEMORY_MIN
from luacell.protocol.messages import Settings

SETTINGS = Settings(
    deadline_us=250_000, run_limit_us=1_000_000, memory=MEMORY_MIN, workers=3, stateless=True, idempotent=True
)
SOURCE = b"return function() end -- \x00\xff\r\n"


def record_of(name: str | int = "host.kv@1.2.3", source: bytes = SOURCE, **fields: object) -> ContractRecord:
    ref = ContractRef.of(name)
    record = ContractRecord(ref.id, ref.name, ref.version, source, "@kv.lua", {}, SETTINGS)
    return replace(record, **fields)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


@pytest.fixture
def store(path: Path) -> Iterator[RegistryStore]:
    store = RegistryStore(path)
    yield store
    store.close()


def reread(path: Path) -> list[ContractRecord]:
    store = RegistryStore(path, durable=False)
    try:
        return store.records()
    finally:
        store.close()


def refusal(path: Path) -> str:
    """Open and read a file that must be refused; return why."""
    with pytest.raises(StoreError) as caught:
        reread(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def changed(path: Path, *statements: str) -> None:
    """Change a registry behind luacell's back."""
    database = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        database.execute(statement)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


def filled(path: Path) -> None:
    store = RegistryStore(path, durable=False)
    store.put(record_of())
    store.put(record_of(5, b"return f" * 4000, modules={"a.b": b"module", "c": SOURCE}))
    store.close()


# -- what was written is there ------------------------------------------------------------------------------
def test_new_registry_is_empty_and_for_its_owner_alone(path: Path) -> None:
    assert reread(path) == []
    assert path.stat().st_mode & 0o777 == 0o600


def test_contracts_are_read_as_they_were_written_in_order_of_id(path: Path) -> None:
    named = record_of(modules={"kv.codec": b"return 1", "kv": SOURCE, "ünïcode": b""})
    plain = record_of(1 << 63, b"", chunk_name="=0x8000", settings=Settings())
    first = record_of(0)
    store = RegistryStore(path)
    for record in (named, plain, first):
        store.put(record)
    assert store.records() == sorted((named, plain, first), key=lambda record: record.id)
    store.close()
    assert reread(path) == sorted((named, plain, first), key=lambda record: record.id)


def test_what_put_has_returned_for_needs_no_close(path: Path, store: RegistryStore) -> None:
    store.put(record_of())
    copy = path.with_name("copy.db")
    for suffix in ("", "-wal"):  # what a power cut would leave: the files without the process
        copy.with_name(copy.name + suffix).write_bytes(path.with_name(path.name + suffix).read_bytes())
    assert reread(copy) == [record_of()]


def test_put_replaces_all_of_the_contract(store: RegistryStore) -> None:
    store.put(record_of(modules={"a": b"1", "b": b"2"}))
    second = record_of("host.kv@1.9.0", b"second", modules={"b": b"3"}, settings=Settings())
    store.put(second)
    assert store.records() == [second]


def test_remove_leaves_the_others(store: RegistryStore) -> None:
    store.put(record_of(1, modules={"shared": b"shared"}))
    store.put(record_of(2, modules={"shared": b"shared"}))
    store.remove(1)
    store.remove(7)
    assert store.records() == [record_of(2, modules={"shared": b"shared"})]


def test_several_are_removed_at_once_or_none(store: RegistryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        store.put(record_of(number))
    forget = store._forget_sources
    seen: list[object] = []

    def fail_at_the_second(digests: set[bytes]) -> None:
        seen.append(digests)
        if len(seen) == 2:
            raise sqlite3.OperationalError("disk full")
        forget(digests)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_forget_sources", fail_at_the_second)
        with pytest.raises(StoreError):
            store.remove(1, 3)
    assert [record.id for record in store.records()] == [1, 2, 3]
    store.remove(1, 3)
    assert [record.id for record in store.records()] == [2]


def count_of(path: Path, table: str) -> int:
    database = sqlite3.connect(path)
    try:
        return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
    finally:
        database.close()


def test_source_is_kept_once_and_no_longer_than_it_is_used(path: Path, store: RegistryStore) -> None:
    store.put(record_of(1, SOURCE, modules={"a": b"shared", "b": SOURCE}))
    store.put(record_of(2, SOURCE, modules={"a": b"shared"}))
    assert count_of(path, "sources") == 2
    store.put(record_of(1, b"other"))
    assert count_of(path, "sources") == 3
    store.remove(2)
    assert count_of(path, "sources") == 1
    store.remove(1)
    assert [count_of(path, table) for table in ("sources", "contracts", "modules", "settings")] == [0] * 4


def test_settings_that_were_not_known_when_it_was_written_have_their_defaults(path: Path) -> None:
    filled(path)
    changed(path, "DELETE FROM settings WHERE name = 'idempotent'")
    assert {record.settings.idempotent for record in reread(path)} == {False}


@pytest.mark.parametrize("durable", [True, False])
def test_log_is_folded_in_at_the_end(path: Path, durable: bool) -> None:
    store = RegistryStore(path, durable=durable)
    store.put(record_of())
    store.close()
    assert os.listdir(path.parent) == [path.name]
    assert reread(path) == [record_of()]


names = st.sampled_from(["host.a@1", "host.a@2", "host.b@1.2", 0, 7, 2**64 - 1])
sources = st.sampled_from([b"", b"a", b"b", bytes(range(256))]) | st.binary(max_size=50)
limits = st.integers(1, 60_000_000)
records = st.builds(
    lambda name, source, modules, chunk, deadline, workers, flags: record_of(
        name,
        source,
        modules=modules,
        chunk_name=chunk,
        settings=Settings(deadline_us=deadline, workers=workers, stateless=flags[0], idempotent=flags[1]),
    ),
    names,
    sources,
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), sources, max_size=4),
    st.text(st.characters(codec="utf-8"), max_size=20),
    limits,
    st.integers(1, 64),
    st.tuples(st.booleans(), st.booleans()),
)


class StoreAgainstDict(RuleBasedStateMachine):
    """Any sequence of changes and restarts leaves what a dict would hold, and no source that nobody uses."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="store-")
        self.path = Path(self.directory.name) / "registry.db"
        self.store = RegistryStore(self.path, durable=False)
        self.model: dict[int, ContractRecord] = {}

    @rule(target=ids, record=records)
    def put(self, record: ContractRecord) -> int:
        self.store.put(record)
        self.model[record.id] = record
        return record.id

    @rule(contract_id=consumes(ids))
    def remove(self, contract_id: int) -> None:
        self.store.remove(contract_id)
        self.model.pop(contract_id, None)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = RegistryStore(self.path, durable=False)

    @invariant()
    def holds_the_same(self) -> None:
        assert self.store.records() == [self.model[contract_id] for contract_id in sorted(self.model)]
        used = {source for record in self.model.values() for source in (record.source, *record.modules.values())}
        assert count_of(self.path, "sources") == len(used)

    def teardown(self) -> None:
        self.store.close()
        self.directory.cleanup()


StoreAgainstDict.TestCase.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
test_store_against_dict = StoreAgainstDict.TestCase


# -- writes that fail ---------------------------------------------------------------------------------------
@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Limit the size of every file that this process writes; SQLite sees a disk that takes no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_write_that_fails_names_the_file_and_changes_nothing(
    path: Path, store: RegistryStore, small_disk: Callable[[int], None]
) -> None:
    store.put(record_of())
    small_disk(256 * 1024)
    for _ in range(3):
        with pytest.raises(StoreError, match=f"cannot write {path}: "):
            store.put(record_of(source=os.urandom(1 << 20)))
        assert store.records() == [record_of()]
    small_disk(resource.RLIM_INFINITY)
    assert reread(path) == [record_of()]
    store.put(record_of(2))
    assert [record.id for record in reread(path)] == sorted([2, record_of().id])


def test_contracts_written_together_are_there_all_or_none(
    path: Path, store: RegistryStore, small_disk: Callable[[int], None]
) -> None:
    store.put(record_of(1), record_of(2))
    small_disk(256 * 1024)
    with pytest.raises(StoreError, match=f"cannot write {path}: "):
        store.put(record_of(1, b"newer"), record_of(3, source=os.urandom(1 << 20)))
    small_disk(resource.RLIM_INFINITY)
    assert store.records() == [record_of(1), record_of(2)]
    store.put(record_of(1, b"newer"), record_of(3))
    assert reread(path) == [record_of(1, b"newer"), record_of(2), record_of(3)]


def test_full_disk_is_no_reason_not_to_serve_what_is_there(
    path: Path, store: RegistryStore, small_disk: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(20):
        store.put(record_of(number, os.urandom(5000)))
    expected = store.records()
    copy, log = path.with_name("copy.db"), path.with_name("copy.db-wal")
    copy.write_bytes(path.read_bytes())  # as it is after kill -9
    log.write_bytes(path.with_name("registry.db-wal").read_bytes())
    small_disk(log.stat().st_size)
    full = RegistryStore(copy)
    assert full.records() == expected
    assert "registry cannot be written now" in caplog.messages
    with pytest.raises(StoreError, match="cannot write"):
        full.put(record_of())
    small_disk(resource.RLIM_INFINITY)
    full.put(record_of())
    assert record_of() in full.records()
    full.close()


def test_writer_with_a_shell_holds_us_up_no_longer_than_the_limit(
    path: Path, store: RegistryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store._database.execute("PRAGMA busy_timeout = 50")
    shell = sqlite3.connect(path, isolation_level=None)
    shell.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        store.put(record_of())
    shell.execute("ROLLBACK")
    shell.close()
    store.put(record_of())
    assert store.records() == [record_of()]


def test_private_contract_is_never_stored(store: RegistryStore) -> None:
    with pytest.raises(AssertionError, match="private"):
        store.put(record_of(owner=b"h" * 16))


# -- files that are refused ---------------------------------------------------------------------------------
def overwritten(path: Path, offset: int, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * size)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"this is no database, " * 1000),
        lambda path: overwritten(path, 0, 16),
        lambda path: overwritten(path, 100, 4000),
        lambda path: overwritten(path, 4096, 4096),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: changed(path, "DROP TABLE modules"),
        lambda path: changed(path, "DROP TABLE settings"),
        lambda path: changed(path, "DELETE FROM sources"),
        lambda path: changed(path, "UPDATE contracts SET version = '2.0.0' WHERE name != ''"),
        lambda path: changed(path, "UPDATE contracts SET name = 'no name' WHERE name != ''"),
        lambda path: changed(path, "UPDATE settings SET value = 'many' WHERE name = 'workers'"),
        lambda path: changed(path, "UPDATE sources SET source = CAST(source || 'x' AS BLOB)"),
    ],
    ids=[
        "no database",
        "header",
        "schema page",
        "another page",
        "cut",
        "no modules",
        "no settings",
        "no sources",
        "version",
        "name",
        "setting",
        "source",
    ],
)
def test_damaged_file_is_refused_with_what_to_do(path: Path, damage: Callable[[Path], None]) -> None:
    filled(path)
    damage(path)
    reason = refusal(path)
    assert f"{path} is damaged: " in reason
    assert "move it" in reason
    assert "copy" in reason


def test_every_flipped_byte_is_noticed_or_harmless(path: Path) -> None:
    filled(path)
    whole, expected = path.read_bytes(), reread(path)
    step = max(1, len(whole) // 200)
    noticed = 0
    for offset in range(0, len(whole), step):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x41]) + whole[offset + 1 :])
        try:
            found = reread(path)
        except StoreError:
            noticed += 1
            continue
        sources = {(record.id, record.source, tuple(record.modules.items())) for record in found}
        assert sources == {(record.id, record.source, tuple(record.modules.items())) for record in expected}, offset
    assert noticed > 50


def test_file_of_a_newer_luacell_is_refused_and_left_alone(path: Path) -> None:
    filled(path)
    changed(path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    before = path.read_bytes()
    reason = refusal(path)
    assert f"schema version {SCHEMA_VERSION + 1}" in reason
    assert "use the newer luacell" in reason
    assert path.read_bytes() == before


def test_setting_of_a_newer_luacell_is_refused(path: Path) -> None:
    filled(path)
    changed(path, "UPDATE settings SET name = 'colour' WHERE name = 'sandbox'")
    assert "'colour'" in refusal(path)
    assert "use the newer luacell" in refusal(path)


def test_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    changed(path, "CREATE TABLE people (name TEXT)")
    before = path.read_bytes()
    assert "no registry of luacell" in refusal(path)
    assert path.read_bytes() == before


def test_more_contracts_than_the_limit_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    monkeypatch.setattr(registry_store, "CONTRACTS_MAX", 1)
    assert "holds 2 contracts; the limit is 1" in refusal(path)


def test_old_sqlite_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_store, "SQLITE_MIN", (99, 1, 0))
    assert "needs SQLite 99.1 or newer" in refusal(path)


def test_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "registry.db"
    assert f"cannot open {path}: No such file or directory" in refusal(path)


def test_file_without_a_write_ahead_log_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    # what a network file system without shared memory does, here by SQLite's own in-memory database
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(":memory:", **options))
    assert "use a local disk" in refusal(path)


# -- migrations ---------------------------------------------------------------------------------------------
def test_older_file_is_migrated_and_keeps_its_contracts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    expected = reread(path)
    added = "ALTER TABLE contracts ADD COLUMN note TEXT;\nCREATE TABLE notes (text TEXT) STRICT;\n"
    monkeypatch.setattr(registry_store, "MIGRATIONS", (*registry_store.MIGRATIONS, added))
    monkeypatch.setattr(registry_store, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    assert reread(path) == expected
    assert count_of(path, "notes") == 0
    monkeypatch.undo()
    assert f"schema version {SCHEMA_VERSION + 1}" in refusal(path)


def test_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    expected = reread(path)
    broken = "CREATE TABLE notes (text TEXT) STRICT;\nCREATE TABLE notes (text TEXT) STRICT;\n"
    with monkeypatch.context() as newer:
        newer.setattr(registry_store, "MIGRATIONS", (*registry_store.MIGRATIONS, broken))
        newer.setattr(registry_store, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
        assert "already exists" in refusal(path)
    assert reread(path) == expected


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(0, 20_000))
def test_any_cut_of_a_file_is_refused_or_empty(path: Path, size: int) -> None:
    path.unlink(missing_ok=True)
    filled(path)
    os.truncate(path, min(size, path.stat().st_size - 1))
    if path.stat().st_size == 0:
        assert reread(path) == []
    else:
        assert "is damaged" in refusal(path)
