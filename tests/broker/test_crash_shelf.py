"""Which crashes stay on the shelf, and which files go."""

from __future__ import annotations

from typing import Any

import pytest

from luacell.broker.crash_shelf import CrashShelf
from luacell.protocol.limits import LISTED_CRASHES_MAX

ONE, OTHER = b"1" * 8, b"2" * 8


def row(crash_id: str, contract: bytes = ONE, digest: str = "s") -> dict[str, Any]:
    return {"id": crash_id, "contract_id": contract, "source_digest": digest}


def ids(shelf: CrashShelf) -> list[str]:
    return [each["id"] for each in shelf.page(0)["crashes"]]


def test_the_oldest_crash_of_a_contract_makes_room_and_its_sources_stay_while_they_are_needed() -> None:
    shelf = CrashShelf(per_contract=2)
    assert shelf.add(row("a"), 10, 5) == []
    assert shelf.add(row("x", OTHER), 10, 5) == []
    assert shelf.add(row("b"), 10, 5) == []
    assert shelf.add(row("c"), 10, 5) == ["a.crash"]
    assert ids(shelf) == ["c", "b", "x"]
    assert (len(shelf), shelf.size) == (3, 35)


def test_sources_go_with_the_last_crash_on_them() -> None:
    shelf = CrashShelf(per_contract=1)
    shelf.add(row("a", digest="old"), 10, 5)
    assert shelf.has_sources("old")
    assert shelf.add(row("b", digest="new"), 10, 7) == ["a.crash", "old.sources"]
    assert not shelf.has_sources("old")
    assert (len(shelf), shelf.size) == (1, 17)


def test_the_oldest_of_all_go_where_there_are_too_many_or_too_large_ones() -> None:
    many = CrashShelf(count=2)
    for crash_id in "abc":
        gone = many.add(row(crash_id, crash_id.encode() * 8), 10, 5)
    assert (gone, ids(many)) == (["a.crash"], ["c", "b"])
    large = CrashShelf(size=40)
    for crash_id, size in (("a", 10), ("b", 10), ("c", 25)):
        gone = large.add(row(crash_id, crash_id.encode() * 8), size, 5)
    assert (gone, large.size) == (["a.crash"], 40)


def test_one_crash_is_kept_whatever_its_size() -> None:
    shelf = CrashShelf(size=40)
    shelf.add(row("a", digest="old"), 10, 5)
    assert shelf.add(row("b", digest="new"), 100, 100) == ["a.crash", "old.sources"]
    assert ids(shelf) == ["b"]


def test_the_list_comes_in_pages_newest_first() -> None:
    shelf = CrashShelf()
    for number in range(LISTED_CRASHES_MAX + 1):
        shelf.add(row(f"{number}", number.to_bytes(8, "little")), 1, 1)
    first, second = shelf.page(0), shelf.page(LISTED_CRASHES_MAX)
    assert [len(page["crashes"]) for page in (first, second)] == [LISTED_CRASHES_MAX, 1]
    assert first["total"] == second["total"] == len(shelf)
    assert first["crashes"][0]["id"] == f"{LISTED_CRASHES_MAX}"


@pytest.mark.parametrize("crash_id", ["a", "b"])
def test_a_crash_is_found_by_its_id(crash_id: str) -> None:
    shelf = CrashShelf()
    shelf.add(row("a"), 1, 1)
    assert shelf.get(crash_id) == (row("a") if crash_id == "a" else None)
