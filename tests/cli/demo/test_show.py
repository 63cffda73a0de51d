"""The demo as a whole against a fake bridge, and what it prints."""

import io
import re
import threading
from pathlib import Path

import pytest
from rich.console import Console

from luacell.cli.demo import counting, show
from luacell.cli.demo.books import Books
from luacell.cli.demo.faults import Fault
from tests.cli.demo.support import FakeBridge, run


def printed(books: Books) -> str:
    console = Console(file=io.StringIO(), width=200)
    show.report(books, 1.0, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_run_demo_ends_with_the_table_and_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "LuaHostBridge", FakeBridge)
    console = Console(file=io.StringIO(), width=200)
    assert show.run_demo(console, limit=80) == 0
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for row in (
        "files +│ +80 ",
        "bytes +│ +[0-9,]+ ",
        "calls +│",
        "calls/s",
        "slowest recovery +│ +[0-9.]+ ms",
    ):
        assert re.search(row, text), row
    assert re.search(r"crashes survived +│ +8 .*null dereference.*os.exit.*endless loop.*kill -9", text)
    assert re.search(r"answers lost +│ +0 ", text)
    assert re.search(r"answers wrong +│ +0 ", text)


def test_each_call_and_each_death_is_in_the_books(bridge: FakeBridge, files: list[Path]) -> None:
    books = run(bridge, files)
    assert books.problems == []
    assert books.calls_issued == books.calls_answered == bridge.calls_count
    assert books.calls_issued == len(files) + 6 + books.calls_again
    assert books.survived == dict.fromkeys(Fault, 2)
    assert books.files_count == len(files)
    assert books.size == sum(path.stat().st_size for path in files)
    assert books.top_names.most_common(1) == [(b"self", 2 * books.lines)]
    assert books.slowest_recovery_s > 0


def test_a_wrong_answer_is_found(bridge: FakeBridge, files: list[Path]) -> None:
    bridge.spoil[1] = counting.RESULT.pack(1, 2, 3, 4, 5, 6, 7, b"x")
    books = run(bridge, files[:1])
    assert len(books.problems) == 1
    assert "answers wrong" in printed(books)
    assert "promise is broken" in printed(books)


def test_a_call_that_never_returns_is_lost_and_reported(
    bridge: FakeBridge, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "LOST_AFTER_S", 0.2)
    monkeypatch.setattr(show, "LAST_CALLS_S", 0.2)
    ended = threading.Event()
    monkeypatch.setattr(bridge, "call", lambda *_args, **_kwargs: ended.wait(60) and b"")
    books, _ = show.count_files(bridge, files[:1], Console(file=io.StringIO()))
    try:
        assert books.calls_lost == 1
        assert re.search(r"answers lost +│ +1 ", printed(books))
    finally:
        ended.set()
