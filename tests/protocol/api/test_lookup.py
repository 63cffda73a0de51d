"""Contracts of a description, looked up by id or by name."""

from __future__ import annotations

import pytest

from luacell.protocol.api import parse
from luacell.protocol.api.lookup import contracts_named, find_contract
from luacell.protocol.errors import ApiError
from luacell.protocol.identity import HostContractId
from tests.support.apis import SVC

API = parse(SVC, "api.toml")


def test_contract_is_found_by_its_id_and_by_its_name() -> None:
    found = find_contract(API, int(HostContractId("host.svc", 1)))
    assert str(found) == "host.svc@1"
    assert contracts_named(API, "host.svc") == [found]
    assert contracts_named(API, "host.nope") == []


@pytest.mark.parametrize(("text", "declared"), [(SVC, "host.svc@1"), ("", "none")])
def test_unknown_id_is_refused_with_what_is_declared(text: str, declared: str) -> None:
    with pytest.raises(ApiError, match=f"declares no host contract of id 0x0000000000000007; declared: {declared}"):
        find_contract(parse(text, "api.toml"), 7)
