"""Crash records on a real disk: bounds, restarts, damage, and disks that take nothing."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from luacell.broker.crash_shelf import CRASH_BYTES_MAX
from luacell.broker.crash_store import LOOKED_AT_MAX, CrashStore, CrashStoreError
from luacell.protocol.limits import CRASH_ARGS_MAX
from tests.broker.bench import record_of
from tests.broker.crash_samples import crashed_call


def opened(path: Path, *, is_recording: bool = True) -> CrashStore:
    store = CrashStore(path, is_recording=is_recording)
    store.open()
    return store


def named(number: int) -> str:
    return f"{number:012x}"


def ids(store: CrashStore) -> list[str]:
    return [row["id"] for row in store.page(0)["crashes"]]


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def test_files_stay_within_64_mib_over_restarts(tmp_path: Path) -> None:
    store = opened(tmp_path)
    args = bytes(CRASH_ARGS_MAX)
    for number in range(20):
        store.add(crashed_call(named(number), args, record_of(number // 5 + 1), time=number))
    assert CRASH_BYTES_MAX - CRASH_ARGS_MAX < size_of(tmp_path) <= CRASH_BYTES_MAX
    assert ids(store) == [named(number) for number in range(19, 4, -1)]
    again = opened(tmp_path)
    assert ids(again) == ids(store)
    found = again.part(named(19), "args")
    assert found is not None and found["args"] == args


def test_sources_are_there_once_and_go_with_the_last_crash_on_them(tmp_path: Path) -> None:
    store = opened(tmp_path)
    other = replace(record_of(), source=b"return g")
    for number in range(10):
        store.add(crashed_call(named(number)))
    assert len(list(tmp_path.glob("*.sources"))) == 1
    for number in range(10, 20):
        store.add(crashed_call(named(number), record=other))
    (left,) = tmp_path.glob("*.sources")
    found = store.part(named(19), "sources")
    assert found == {"source": b"return g", "modules": {}}
    assert store.page(0)["crashes"][0]["source_digest"] == left.stem


def test_what_is_not_ours_stays_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(tmp_path)
    for number in range(5):
        store.add(crashed_call(named(number), record=record_of(number, memory=number + 1)))
    (sources,) = tmp_path.glob("*.sources")
    crash = {number: tmp_path / f"{named(number)}.crash" for number in range(6)}
    crash[0].write_bytes(b"")
    crash[1].write_bytes(crash[2].read_bytes())  # the content of another
    os.truncate(crash[3], 1 << 30)
    crash[5].symlink_to(crash[4])
    os.mkfifo(tmp_path / f"{named(6)}.crash")
    (tmp_path / "README").write_text("mine")
    (tmp_path / ".partial").write_bytes(b"half")
    (tmp_path / ("0" * 64 + ".sources")).write_bytes(sources.read_bytes())
    again = opened(tmp_path)
    assert ids(again) == [named(4), named(2)]
    (told,) = [record for record in caplog.records if record.message == "crash records skipped"]
    assert told.__dict__["fields"]["files"] == 7
    assert not (tmp_path / ".partial").exists()
    assert (tmp_path / "README").exists() and crash[0].exists()


def test_calls_without_their_sources_and_sources_without_calls(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(crashed_call(named(1)))
    store.add(crashed_call(named(2), record=replace(record_of(), source=b"return g")))
    (needed,) = [path for path in tmp_path.glob("*.sources") if b"return f" in path.read_bytes()]
    needed.unlink()
    (tmp_path / f"{named(2)}.crash").unlink()
    again = opened(tmp_path)
    assert ids(again) == []
    assert list(tmp_path.glob("*.sources")) == []
    again.add(crashed_call(named(3)))
    assert ids(again) == [named(3)]


def test_no_more_files_are_looked_at_than_there_may_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(LOOKED_AT_MAX + 1):
        (tmp_path / f"{number}").touch()
    opened(tmp_path)
    (told,) = caplog.records
    assert told.__dict__["fields"]["files"] == LOOKED_AT_MAX + 1
    assert len(told.__dict__["fields"]["such_as"]) == 8


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.mkdir(mode=0o755), lambda path: path.symlink_to("/")])
def test_a_directory_that_is_not_ours_alone_is_not_used(tmp_path: Path, make: object) -> None:
    path = tmp_path / "crashes"
    make(path)  # type: ignore[operator]
    store = CrashStore(path, is_recording=True)
    for use in (store.open, lambda: store.add(crashed_call(named(1))), lambda: store.page(0)):
        with pytest.raises(CrashStoreError, match=str(path)):
            use()


def test_a_disk_that_takes_nothing_costs_that_crash_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(CrashStoreError, match="No space left"):
            store.add(crashed_call(named(1)))
    assert list(tmp_path.iterdir()) == []
    store.add(crashed_call(named(2)))
    assert ids(store) == [named(2)]


def test_a_file_that_was_taken_away_is_told(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(crashed_call(named(1)))
    (tmp_path / f"{named(1)}.crash").unlink()
    with pytest.raises(CrashStoreError, match=named(1)):
        store.part(named(1), "args")
    assert store.part(named(2), "args") is None


def test_what_is_there_is_read_where_nothing_is_recorded(tmp_path: Path) -> None:
    assert opened(tmp_path / "none", is_recording=False).page(0) == {"crashes": [], "total": 0, "recording": False}
    assert not (tmp_path / "none").exists()
    opened(tmp_path).add(crashed_call(named(1)))
    assert ids(opened(tmp_path, is_recording=False)) == [named(1)]
