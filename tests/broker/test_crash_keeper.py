"""The crash keeper: bounded, in order, and never in the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, cast

import pytest

from luacell.broker.crash_files import CrashedCall
from luacell.broker.crash_keeper import QUESTIONS_MAX, WAITING_BYTES_MAX, WAITING_MAX, Body, CrashKeeper
from luacell.broker.crash_store import CrashStore, CrashStoreError
from luacell.broker.model import Call, RecordCrash
from luacell.protocol.limits import CRASH_ARGS_MAX
from tests.broker.bench import Bench
from tests.broker.crash_samples import crash_on
from tests.support.waiting import LIMIT_S, eventually


class HeldStore:
    """A store whose disk answers when the test lets it."""

    is_recording = True

    def __init__(self) -> None:
        self.may_go_on = threading.Semaphore(0)
        self.is_writing = threading.Event()
        self.added: list[CrashedCall] = []
        self.problem = ""

    def open(self) -> None:
        if self.problem:
            raise CrashStoreError(self.problem)

    def add(self, crashed: CrashedCall) -> None:
        self.is_writing.set()
        assert self.may_go_on.acquire(timeout=LIMIT_S)
        if self.problem:
            raise CrashStoreError(self.problem)
        self.added.append(crashed)

    def page(self, first: int) -> dict[str, Any]:
        if self.problem:
            raise CrashStoreError(self.problem)
        return {"total": len(self.added)}

    def part(self, crash_id: str, part: str) -> dict[str, Any] | None:
        return None


@pytest.fixture
def store() -> Iterator[HeldStore]:
    store = HeldStore()
    yield store
    store.may_go_on.release(1000)


@pytest.fixture
def keeper(store: HeldStore, inbox: SimpleQueue[Callable[[], None]]) -> Iterator[CrashKeeper]:
    keeper = CrashKeeper(cast(CrashStore, store), read_args, inbox.put)
    yield keeper
    store.may_go_on.release(1000)
    keeper.stop()


def read_args(call: Call, size: int) -> bytes:
    return bytes(size)


@pytest.fixture
def crash() -> RecordCrash:
    return crash_on(Bench())


def tell(inbox: SimpleQueue[Callable[[], None]]) -> None:
    """Do in the loop what the thread has delivered."""
    inbox.get(timeout=LIMIT_S)()


def test_who_asks_after_a_crash_finds_it(
    keeper: CrashKeeper, store: HeldStore, inbox: SimpleQueue[Callable[[], None]], crash: RecordCrash
) -> None:
    answers: list[tuple[Body | None, str]] = []
    keeper.start()
    keeper.record(crash)
    assert keeper.list(0, lambda body, problem: answers.append((body, problem)))
    assert keeper.read("0" * 12, "args", lambda body, problem: answers.append((body, problem)))
    store.may_go_on.release()
    tell(inbox)
    tell(inbox)
    assert answers == [({"total": 1}, ""), (None, "")]
    (added,) = store.added
    assert (added.crash, added.args, len(added.id)) == (crash, bytes(8), 12)


def test_a_crash_waits_in_its_place_for_the_last_words_of_its_worker(
    keeper: CrashKeeper, store: HeldStore, inbox: SimpleQueue[Callable[[], None]], crash: RecordCrash
) -> None:
    answers: list[Body | None] = []
    store.may_go_on.release(1000)
    keeper.record(crash._replace(stderr=None))
    keeper.record(crash)
    assert keeper.list(0, lambda body, problem: answers.append(body))
    assert crash.call.worker is not None
    keeper.worker_ended(crash.call.worker.id + 1, "another's")
    keeper.worker_ended(crash.call.worker.id, "no more memory\n")
    keeper.worker_ended(crash.call.worker.id, "too late")
    keeper.start()
    tell(inbox)
    assert answers == [{"total": 2}]
    assert [added.crash.stderr for added in store.added] == ["no more memory\n", "bye\n"]


def test_a_worker_that_does_not_die_holds_up_no_record(
    keeper: CrashKeeper, store: HeldStore, crash: RecordCrash
) -> None:
    store.may_go_on.release(1000)
    keeper.start()
    keeper.record(crash._replace(stderr=None))
    eventually(lambda: store.added, "it is written without last words")
    assert store.added[0].crash.stderr is None


def test_last_words_that_come_while_the_thread_waits_for_them_are_written_at_once(
    keeper: CrashKeeper, store: HeldStore, crash: RecordCrash, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luacell.broker.crash_keeper.LAST_WORDS_WAIT_S", LIMIT_S * 10)
    store.may_go_on.release(1000)
    keeper.start()
    keeper.record(crash._replace(stderr=None))
    assert crash.call.worker is not None
    keeper.worker_ended(crash.call.worker.id, "bye\n")
    eventually(lambda: store.added, "it is written")
    keeper.record(crash._replace(stderr=None))
    keeper.stop()
    assert [added.crash.stderr for added in store.added] == ["bye\n", None]


def test_what_is_too_much_is_dropped_and_counted(
    keeper: CrashKeeper, store: HeldStore, crash: RecordCrash, caplog: pytest.LogCaptureFixture
) -> None:
    keeper.start()
    for _ in range(WAITING_MAX + 3):
        keeper.record(crash)
    store.may_go_on.release(WAITING_MAX)
    eventually(lambda: len(store.added) == WAITING_MAX, "what fits is written")
    told = eventually(lambda: [each for each in caplog.records if "not recorded" in each.message], "drops are told")
    assert [each.__dict__["fields"]["count"] for each in told] == [3]


def test_arguments_that_wait_are_bounded(keeper: CrashKeeper, store: HeldStore, crash: RecordCrash) -> None:
    crash.call.header = crash.call.header._replace(args_size=CRASH_ARGS_MAX)
    for _ in range(WAITING_BYTES_MAX // CRASH_ARGS_MAX + 1):
        keeper.record(crash)
    crash.call.header = crash.call.header._replace(args_size=0, flags=0)
    keeper.record(crash)
    keeper.start()
    store.may_go_on.release(1000)
    eventually(lambda: store.added and store.added[-1].args is None, "all are written")
    assert len(store.added) == WAITING_BYTES_MAX // CRASH_ARGS_MAX + 1


def test_questions_are_bounded_until_they_were_answered(
    keeper: CrashKeeper, inbox: SimpleQueue[Callable[[], None]]
) -> None:
    answers: list[Body | None] = []
    for _ in range(QUESTIONS_MAX):
        assert keeper.list(0, lambda body, problem: answers.append(body))
    assert not keeper.list(0, lambda body, problem: answers.append(body))
    keeper.start()
    tell(inbox)
    assert keeper.list(0, lambda body, problem: answers.append(body))
    for _ in range(QUESTIONS_MAX):
        tell(inbox)
    assert len(answers) == QUESTIONS_MAX + 1


def test_a_disk_that_takes_nothing_is_told(
    keeper: CrashKeeper,
    store: HeldStore,
    inbox: SimpleQueue[Callable[[], None]],
    crash: RecordCrash,
    caplog: pytest.LogCaptureFixture,
) -> None:
    problems: list[str] = []
    store.problem = "no space"
    store.may_go_on.release(1000)
    keeper.start()
    keeper.record(crash)
    keeper.list(0, lambda body, problem: problems.append(problem))
    tell(inbox)
    assert problems == ["no space"]
    assert [record.message for record in caplog.records] == ["crash records are off", "crash was not recorded"]


def test_what_waits_is_written_at_the_end(keeper: CrashKeeper, store: HeldStore, crash: RecordCrash) -> None:
    store.may_go_on.release(1000)
    for _ in range(5):
        keeper.record(crash)
    keeper.start()
    keeper.stop()
    assert len(store.added) == 5


def test_a_disk_that_hangs_does_not_hold_up_the_end(keeper: CrashKeeper, store: HeldStore, crash: RecordCrash) -> None:
    keeper.start()
    keeper.record(crash)
    assert store.is_writing.wait(LIMIT_S)
    keeper.stop()
    assert store.added == []


def test_nothing_is_copied_where_nothing_is_recorded(store: HeldStore, crash: RecordCrash) -> None:
    def must_not(call: Call, size: int) -> bytes:
        raise AssertionError("arguments were read")

    store.is_recording = False
    keeper = CrashKeeper(cast(CrashStore, store), must_not, lambda tell: None)
    keeper.record(crash)
    keeper.start()
    keeper.stop()
    assert store.added == []
