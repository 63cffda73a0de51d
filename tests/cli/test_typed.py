"""Calls by name: JSON in, JSON out, and what is refused before anything travels."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luacell.client import LuaHostBridge
from tests.support.command import Command
from tests.support.contracts import HEALTHY
from tests.support.typed_directory import NAME, write_typed

RECORD = {
    "id": 18446744073709551615,
    "at": {"x": 0.5, "y": -1e300},
    "mode": "On",
    "access": ["Read", "Write"],
    "label": "größe\n☃",
    "blob": base64.b64encode(bytes(range(256))).decode(),
}


@pytest.fixture(scope="module", autouse=True)
def kinds(endpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    directory = write_typed(tmp_path_factory.mktemp("kinds"))
    with LuaHostBridge.connect(endpoint) as bridge:
        bridge.deploy(directory)
        yield
        bridge.unregister_host_contract(NAME)


def called(luacell: Command, function: str, arguments: dict[str, Any]) -> Any:
    ended = luacell("call", NAME, function, json.dumps(arguments))
    assert (ended.code, ended.errors) == (0, "")
    return ended.json


def record(**changes: Any) -> dict[str, Any]:
    return {"record": {**RECORD, **changes}}


def test_every_kind_of_value_comes_back_as_it_was_given(luacell: Command) -> None:
    assert called(luacell, "same", {"record": RECORD}) == RECORD


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"mode": 0}, {"mode": "Off"}),
        ({"access": "Write"}, {"access": ["Write"]}),
        ({"access": 0}, {"access": []}),
        ({"access": 3}, {"access": ["Read", "Write"]}),
        ({"access": ["Both", "Pair"]}, {"access": ["Read", "Write", "Pair"]}),
        ({"access": 0x10}, {"access": 0x10}),
        ({"blob": {"hex": "00ff"}}, {"blob": "AP8="}),
        ({"blob": {"text": "ä"}}, {"blob": "w6Q="}),
        ({"at": {"x": "NaN", "y": "-Infinity"}}, {"at": {"x": "NaN", "y": "-Infinity"}}),
        ({"at": {"x": "Infinity", "y": 1}}, {"at": {"x": "Infinity", "y": 1.0}}),
    ],
    ids=str,
)
def test_what_may_be_written_in_several_ways_is_shown_in_one(
    luacell: Command, given: dict[str, Any], shown: dict[str, Any]
) -> None:
    assert called(luacell, "same", record(**given)) == {**RECORD, **shown}


def test_arrays_are_lists(luacell: Command) -> None:
    points = [{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 4.0}]
    assert called(luacell, "points", {"points": points}) == points
    assert called(luacell, "points", {"points": []}) == []


def test_result_of_no_value_prints_nothing(luacell: Command) -> None:
    ended = luacell("call", NAME, "nothing")
    assert (ended.code, ended.out, ended.errors) == (0, "", "")
    ended = luacell("call", NAME, "nothing", "--output", "json")
    assert ended.json == {"contract": NAME, "function": "nothing", "result": None}


def test_arguments_come_from_stdin_and_the_contract_by_its_id(luacell: Command) -> None:
    (row,) = [row for row in luacell("ls", "--output", "json").json if row["name"] == "host.kinds"]
    ended = luacell("call", row["id"], "scale", "-", stdin=b'{"k": 3, "v": 2.5, "on": true}')
    assert ended.out == "7.5\n"


def test_what_is_no_text_is_not_sent_as_another_one(luacell: Command) -> None:
    ended = luacell("call", NAME, "scale", "-", stdin=b'{"k": 3, "\xff": 2.5}')
    assert (ended.code, ended.out) == (2, "")
    assert "stdin is no UTF-8: invalid start byte at byte 10" in ended.errors


def test_function_id_still_takes_raw_bytes(luacell: Command) -> None:
    args = "03" + "00" * 7 + "0000000000000440" + "01" + "00" * 7  # 3, 2.5, true
    assert luacell("call", NAME, "1", "--args-hex", args, "--out-size", "8").out == "0000000000001e40\n"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("same", '{"record": '), 2, "host.kinds@1.same: the arguments are no JSON"),
        (("same", "[" * 100_000), 2, "no JSON"),
        (("same", "[]"), 2, "no JSON object; it takes record"),
        (("same", '{"record": 1, "record": 2}'), 2, "'record' is given twice"),
        (("same", "{}"), 2, "lacks record"),
        (("nothing", '{"x": 1}'), 2, "has no parameter 'x'; it takes none"),
        (("same", json.dumps(record(mode="Onn"))), 2, "record.mode: Mode has no variant 'Onn'; it has Off, On"),
        (("same", json.dumps(record(mode=7))), 2, "Mode has no value int 7"),
        (("same", json.dumps(record(access=["Read", 1]))), 2, "record.access: Access has no variant 1"),
        (("same", json.dumps(record(blob="?"))), 2, "record.blob: no base64"),
        (("same", json.dumps(record(blob={"hex": "0"}))), 2, "record.blob: no hex"),
        (("same", json.dumps(record(blob=[1]))), 2, "record.blob: Buffer takes a text in base64"),
        (("same", json.dumps(record(at={"x": 1}))), 2, "Point lacks y"),
        (("same", json.dumps(record(id=1 << 64))), 2, "out of range of u64"),
        (("scale", '{"k": 256, "v": 1, "on": true}'), 2, "k: int 256 is out of range of u8: 0..255"),
        (("scale", '{"k": 1, "v": "x", "on": true}'), 2, "v: f64 takes"),
        (("scael",), 2, "host.kinds@1 has no function 'scael'; did you mean 'scale'?"),
        (("scale", "{}", "--args-hex", "00"), 2, "is called by name"),
        (("0", "{}"), 2, "function 0 is called by id"),
        (("spin", "--timeout", "0.2"), 4, "luacell: host.kinds@1"),
    ],
    ids=lambda part: " ".join(part)[:50] if isinstance(part, tuple) else "",
)
def test_what_cannot_be_called_is_told(luacell: Command, words: tuple[str, ...], code: int, told: str) -> None:
    ended = luacell("call", NAME, *words)
    assert ended.code == code, ended
    assert told in ended.errors
    assert ended.out == ""


def test_raw_contract_has_no_names(luacell: Command) -> None:
    ended = luacell("call", HEALTHY, "double", "{}")
    assert ended.code == 2
    assert "host.healthy@1 is a raw contract" in ended.errors
    assert "hint: call a function by its id" in ended.errors


def test_other_version_and_other_name_are_no_such_contract(luacell: Command) -> None:
    ended = luacell("call", "host.kinds@2", "nothing")
    assert ended.code == 3
    assert "version 2.0.0 is required, 1.2.0 is registered" in ended.errors
    assert luacell("call", "host.nope@1", "nothing").code == 3
    assert luacell("call", "0x04D2", "nothing").code == 3


def test_completion_knows_the_functions(luacell: Command) -> None:
    words = f"luacell call {NAME} s"
    ended = luacell(_LUACELL_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD="3")
    assert ended.out.split() == ["same", "scale", "spin"]
