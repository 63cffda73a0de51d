"""What a broker tells of typed contracts, and which version a caller gets; no process, no connection."""

from __future__ import annotations

import pytest

from luacell.client import ContractInfo, HostContractId, HostContractNotFound, HostContractVersionMismatch, TypeMismatch
from luacell.client.description import ROOM_FIRST, ROOM_MAX, Description, TypedContracts, choose
from luacell.protocol.api import ApiError
from tests.support.apis import SVC

SVC_ID = int(HostContractId("host.svc", 1))
OTHER = SVC + '\n[[host_contract]]\nname = "host.other"\nversion = "1"\n'


def info(name: str, version: str) -> ContractInfo:
    major = int(version.partition(".")[0])
    return ContractInfo(int(HostContractId(name, major)), name, version, 5.0, False, 1)


REGISTERED = [
    info("host.svc", "1.3.0"),
    info("host.svc", "2.0.0"),
    info("host.kv", "1.0.0"),
    ContractInfo(7, "", "", 5.0, False, 1),
]


@pytest.mark.parametrize(
    ("name", "least", "version"),
    [
        ("host.svc", None, "2.0.0"),
        ("host.svc@1", None, "1.3.0"),
        ("host.svc@1.2", None, "1.3.0"),
        ("host.svc@1", "1.3", "1.3.0"),
        ("host.svc", "1.0", "1.3.0"),
        ("host.svc", "2", "2.0.0"),
    ],
)
def test_caller_gets_the_newest_that_satisfies_it(name: str, least: str | None, version: str) -> None:
    assert choose(name, least, REGISTERED) == info("host.svc", version)


@pytest.mark.parametrize(("name", "least"), [("host.svc", "1.4"), ("host.svc@3", None), ("host.svc@1.4", None)])
def test_mismatch_tells_both_versions(name: str, least: str | None) -> None:
    with pytest.raises(HostContractVersionMismatch, match=r"is required, 1\.3\.0, 2\.0\.0 is registered") as raised:
        choose(name, least, REGISTERED)
    assert raised.value.began == "no"


def test_unknown_name_is_not_found() -> None:
    with pytest.raises(HostContractNotFound, match=r"host\.nope"):
        choose("host.nope", None, REGISTERED)


def test_malformed_requests_are_refused() -> None:
    with pytest.raises(TypeError, match="name is text, not int"):
        choose(7, None, REGISTERED)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name is text, not NoneType"):
        choose(None, None, REGISTERED)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="version is text, not float"):
        choose("host.svc", 1.3, REGISTERED)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="different majors"):
        choose("host.svc@1", "2.0", REGISTERED)
    with pytest.raises(ValueError):
        choose("host.svc@x", None, REGISTERED)


def test_raw_contract_has_no_description() -> None:
    with pytest.raises(TypeMismatch, match="expected a typed contract"):
        Description.from_reply(SVC_ID, {"api": b""})
    with pytest.raises(ApiError):
        Description.from_reply(SVC_ID, {"api": b"\xff"})


def test_description_is_read_once_until_it_changes() -> None:
    typed = TypedContracts()
    first = typed.of(SVC_ID, {"api": SVC.encode()})
    assert typed.of(SVC_ID, {"api": SVC.encode()}) is first
    assert typed.of(SVC_ID, {"api": OTHER.encode()}) is not first


def test_descriptions_beyond_the_bound_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luacell.client.description.KNOWN_MAX", 1)
    typed = TypedContracts()
    first = typed.of(SVC_ID, {"api": SVC.encode()})
    typed.of(int(HostContractId("host.other", 1)), {"api": OTHER.encode()})
    assert typed.of(SVC_ID, {"api": SVC.encode()}) is not first


def test_contracts_of_one_description_share_their_types() -> None:
    typed = TypedContracts()
    svc = typed.of(SVC_ID, {"api": OTHER.encode()}).description
    other = typed.of(int(HostContractId("host.other", 1)), {"api": OTHER.encode()}).description
    assert other.types is svc.types
    assert (str(svc.contract), str(other.contract)) == ("host.svc@1", "host.other@1")


def test_room_for_results_is_learned_and_bounded() -> None:
    shared = TypedContracts().of(SVC_ID, {"api": SVC.encode()})
    functions = shared.description.functions
    assert shared.room(functions["scale"], "scale") == 8
    assert shared.room(functions["upper"], "upper") == 16 + ROOM_FIRST
    shared.learn(functions["upper"], "upper", 16 + 5000)
    assert shared.room(functions["upper"], "upper") == 16 + 10_000
    shared.learn(functions["upper"], "upper", 1 << 24)
    assert shared.room(functions["upper"], "upper") == 16 + ROOM_MAX
