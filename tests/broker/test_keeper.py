"""The keeper: changes are made in order and reported in order, and a disk that hangs holds up nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import cast

import pytest

from luacell.broker import keeper as keeper_module
from luacell.broker.keeper import Keeper
from luacell.broker.registry import ContractRecord
from luacell.broker.registry_store import RegistryStore, StoreError
from luacell.protocol.messages import Settings
from tests.support.waiting import LIMIT_S, eventually


def record_of(contract_id: int) -> ContractRecord:
    return ContractRecord(contract_id, "", None, b"return f", "=f", {}, Settings())


class HeldStore:
    """A store whose disk answers when the test lets it, and fails where the test says so."""

    path = Path("/state/registry.db")

    def __init__(self) -> None:
        self.may_go_on = threading.Semaphore(0)
        self.is_writing = threading.Event()
        self.written: list[int] = []
        self.full: set[int] = set()
        self.is_closed = False

    def put(self, record: ContractRecord) -> None:
        self.is_writing.set()
        assert self.may_go_on.acquire(timeout=LIMIT_S)
        if record.id in self.full:
            raise StoreError(f"cannot write {self.path}: database or disk is full")
        self.written.append(record.id)

    def remove(self, contract_id: int) -> None:
        self.put(record_of(contract_id))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def store() -> Iterator[HeldStore]:
    store = HeldStore()
    yield store
    store.may_go_on.release(1000)


@pytest.fixture
def keeper(store: HeldStore, inbox: SimpleQueue[Callable[[], None]]) -> Iterator[Keeper]:
    keeper = Keeper(cast(RegistryStore, store), inbox.put)
    keeper.start()
    yield keeper
    store.may_go_on.release(1000)
    keeper.stop()


def test_changes_are_made_and_reported_in_the_order_they_were_asked_for(
    keeper: Keeper, store: HeldStore, inbox: SimpleQueue[Callable[[], None]]
) -> None:
    reports: list[tuple[int, str]] = []

    def note(number: int, problem: str) -> None:
        reports.append((number, problem))

    store.full = {3}
    for number in range(6):
        report = partial(note, number)
        keeper.remove([number], report) if number % 2 else keeper.put(record_of(number), report)
    store.may_go_on.release(6)
    for _ in range(6):
        inbox.get(timeout=LIMIT_S)()
    assert [number for number, _ in reports] == list(range(6))
    assert {number: problem for number, problem in reports if problem} == {
        3: "cannot write /state/registry.db: database or disk is full"
    }
    assert store.written == [0, 1, 2, 4, 5]


def test_nothing_is_reported_before_it_is_written(
    keeper: Keeper, store: HeldStore, inbox: SimpleQueue[Callable[[], None]]
) -> None:
    keeper.put(record_of(1), lambda problem: None)
    assert store.is_writing.wait(LIMIT_S)
    assert inbox.empty()
    store.may_go_on.release()
    inbox.get(timeout=LIMIT_S)
    assert store.written == [1]


def test_changes_that_wait_are_bounded(keeper: Keeper, store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "CHANGES_MAX", 3)
    keeper.put(record_of(0), lambda problem: None)
    assert store.is_writing.wait(LIMIT_S)
    for number in range(3):
        assert not keeper.is_full
        keeper.put(record_of(number), lambda problem: None)
    assert keeper.is_full


def test_end_closes_the_store_and_reports_nothing_more(
    store: HeldStore, inbox: SimpleQueue[Callable[[], None]]
) -> None:
    keeper = Keeper(cast(RegistryStore, store), inbox.put)
    keeper.start()
    keeper.put(record_of(1), lambda problem: None)
    keeper.put(record_of(2), lambda problem: None)
    assert store.is_writing.wait(LIMIT_S)
    releasing = threading.Thread(target=_release_once_it_stops, args=(keeper, store))
    releasing.start()
    keeper.stop()
    releasing.join()
    assert store.is_closed
    assert store.written == [1], "what had begun is written, the rest is not"
    assert inbox.empty()


def _release_once_it_stops(keeper: Keeper, store: HeldStore) -> None:
    eventually(lambda: keeper._is_stopping, "the keeper is told to end")
    store.may_go_on.release()


def test_disk_that_hangs_does_not_hold_up_the_end(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "STOP_LIMIT_S", 0.05)
    keeper = Keeper(cast(RegistryStore, store), lambda tell: None)
    keeper.start()
    keeper.put(record_of(1), lambda problem: None)
    assert store.is_writing.wait(LIMIT_S)
    keeper.stop()
    assert not store.is_closed


def test_keeper_that_was_never_started_closes_its_store(store: HeldStore) -> None:
    Keeper(cast(RegistryStore, store), lambda tell: None).stop()
    assert store.is_closed
