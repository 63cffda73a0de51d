"""Deployment units without a broker: which questions are asked, and which contract succeeds which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luacell.client import VmRegistrationFailed
from luacell.client.deployment import Deployment
from luacell.client.units import deploying, difference, undeploying
from luacell.protocol import messages
from luacell.protocol.api import Contract, parse
from luacell.protocol.errors import ContractNotFound
from luacell.protocol.messages import Commit, Message, Register, Reply, Unregister
from tests.support.contracts import DOUBLE, write_deployment

TYPES = """
[[types]]
name = "Point"
fields = [{ name = "x", type = "f32" }, { name = "mode", type = "Mode" }]
[[enum]]
name = "Mode"
repr = "u8"
variants = [{ name = "Off", value = "0" }]
[[host_contract]]
name = "host.svc"
version = "1.0"
"""
MOVE = (
    '{ name = "move", params = [{ name = "to", type = "Point" }, { name = "all", type = "Array<Point>" }],'
    ' return = "StringView" }'
)
STOP = '{ name = "stop" }'


def contract(*functions: str, types: str = TYPES) -> Contract:
    (found,) = parse(f"{types}functions = [{', '.join(functions)}]\n", "api.toml").host_contracts
    return found


@pytest.mark.parametrize(
    "new",
    [
        contract(MOVE, STOP),
        contract(MOVE, STOP, '{ name = "more" }'),
        contract(MOVE.replace('"to"', '"target"'), STOP),
        contract(MOVE, STOP, types=TYPES.replace('"0" }', '"0", docs = "off" }, { name = "On", value = "1" }')),
    ],
    ids=["the same", "one more at the end", "a parameter's name", "a variant more"],
)
def test_what_hosts_read_alike_succeeds(new: Contract) -> None:
    assert difference(contract(MOVE, STOP), new) == ""


def test_singletons_stay_what_they_are() -> None:
    old = contract(STOP, types=f"{TYPES}singleton = true\n")
    assert difference(old, old) == ""
    assert difference(old, contract(STOP)) == "it was one instance for all callers"


@pytest.mark.parametrize(
    ("new", "told"),
    [
        (contract(MOVE), "function 1 'stop' is gone"),
        (contract(MOVE, STOP, types=f"{TYPES}singleton = true\n"), "it had an instance for each caller"),
        (contract(STOP, MOVE), "function 0 was 'move' and is 'stop'"),
        (contract(MOVE.replace("StringView", "Buffer"), STOP), "function 0 'move' has other"),
        (contract(MOVE.replace("Array<Point>", "Array<u8>"), STOP), "function 0 'move' has other"),
        (contract(MOVE, STOP.replace("}", ', return = "u8" }')), "function 1 'stop' has other"),
        (contract(MOVE, STOP, types=TYPES.replace('"f32"', '"u32"')), "function 0 'move' has other"),
        (contract(MOVE, STOP, types=TYPES.replace('"x"', '"y"')), "function 0 'move' has other"),
        (contract(MOVE, STOP, types=TYPES.replace('"u8"', '"u16"')), "function 0 'move' has other"),
        (contract(MOVE, STOP, types=TYPES.replace('"Off"', '"No"')), "function 0 'move' has other"),
    ],
)
def test_what_hosts_would_misread_does_not(new: Contract, told: str) -> None:
    assert difference(contract(MOVE, STOP), new).startswith(told)


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    write_deployment(tmp_path, DOUBLE, "host.one@1")
    with (tmp_path / "luacell.toml").open("a") as manifest:
        manifest.write('[contract."host.two@1"]\nsource = "probe.lua"\n')
    return Deployment.read(tmp_path)


def asked(question: Any) -> Message:
    return question.request(7)  # type: ignore[no-any-return]


def test_nothing_is_served_before_all_have_loaded(deployment: Deployment) -> None:
    questions = deploying(deployment)
    next(questions)
    registers = [asked(questions.send(Reply(7, body={"contracts": [], "total": 0}))), asked(questions.send(Reply(7)))]
    assert [(each.name, each.hold) for each in registers if isinstance(each, Register)] == [
        ("host.one", True),
        ("host.two", True),
    ]
    commit = asked(questions.send(Reply(7)))
    assert commit == Commit(7, b"".join(messages.id_bytes(unit.ref.id) for unit in deployment.units), serve=True)
    with pytest.raises(StopIteration) as ended:
        questions.send(Reply(7))
    assert ended.value.value == [unit.ref for unit in deployment.units]


@pytest.mark.parametrize(
    ("error", "count"), [(VmRegistrationFailed(1, "why"), 1), (KeyboardInterrupt(), 2)], ids=["refused", "interrupted"]
)
def test_what_was_loaded_is_dropped_after_a_failure(deployment: Deployment, error: BaseException, count: int) -> None:
    questions = deploying(deployment)
    next(questions)
    questions.send(Reply(7, body={"contracts": [], "total": 0}))
    questions.send(Reply(7))
    dropped = asked(questions.throw(error))
    ids = b"".join(messages.id_bytes(unit.ref.id) for unit in deployment.units[:count])
    assert dropped == Commit(7, ids, serve=False)
    with pytest.raises(type(error)):
        questions.send(Reply(7))


def test_a_unit_is_removed_by_one_request() -> None:
    rows = [
        {
            "id": messages.id_bytes(number),
            "name": f"host.n{number}",
            "version": "1.0.0",
            "deadline_us": 1,
            "stateless": False,
            "workers": 1,
            "unit": "unit" if number < 3 else "",
        }
        for number in (1, 2, 3)
    ]
    questions = undeploying("unit")
    next(questions)
    removal = asked(questions.send(Reply(7, body={"contracts": rows, "total": 3})))
    assert removal == Unregister(7, messages.id_bytes(1), messages.id_bytes(2))
    with pytest.raises(StopIteration) as ended:
        questions.throw(ContractNotFound(1))
    assert [ref.id for ref in ended.value.value] == [1, 2]
