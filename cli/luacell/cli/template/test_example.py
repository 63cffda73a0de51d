"""Tests of host.example: run them with `pytest`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from luacell.client import LuaHostBridge


@pytest.fixture(scope="module")
def bridge() -> Iterator[LuaHostBridge]:
    """A service of this test's own, with this directory deployed."""
    with LuaHostBridge() as bridge:
        bridge.deploy(Path(__file__).parent)
        yield bridge


def test_notes_come_back_in_order(bridge: LuaHostBridge) -> None:
    """What was noted is numbered, and comes back whole."""
    notes = bridge.contract("host.example", "1.0")
    assert notes.add(0, "one") == 1
    assert notes.add(1, "zwei: äöü") == 2
    assert [(note.number, note.level.name, note.text) for note in notes.all()] == [
        (1, "Info", "one"),
        (2, "Warning", "zwei: äöü"),
    ]


def test_callers_have_notes_of_their_own(bridge: LuaHostBridge) -> None:
    """One proxy does not see the notes of another."""
    bridge.contract("host.example").add(0, "mine")
    assert bridge.contract("host.example").all() == []


def test_bad_values_are_refused_before_they_travel(bridge: LuaHostBridge) -> None:
    """Level has no third variant."""
    with pytest.raises(ValueError, match="level"):
        bridge.contract("host.example").add(2, "?")
