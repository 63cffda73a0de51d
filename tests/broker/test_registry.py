from typing import Any

import pytest

from luacell.broker.registry import ContractRecord, Registry
from luacell.protocol.identity import HostContractId
from luacell.protocol.limits import LISTED_CONTRACTS_MAX
from luacell.protocol.messages import Register, Settings, id_bytes
from tests.broker.bench import HOST, OTHER_HOST, record_of

COUNTER = HostContractId("host.counter", 3)


def registration(**changes: Any) -> Register:
    fields = {
        "request_id": 1,
        "contract": id_bytes(int(COUNTER)),
        "name": "host.counter",
        "version": 3 << 32 | 2 << 16 | 1,
        "source": b"return f",
        "chunk_name": "@counter.lua",
        "modules": {"lib": b"return {}"},
        "replace": False,
        "private": False,
        **Settings(deadline_us=7, run_limit_us=8).as_fields(),
    }
    return Register(**{**fields, **changes})


def test_a_record_holds_what_was_registered() -> None:
    record = ContractRecord.from_message(registration(), HOST)
    assert record.id == int(COUNTER)
    assert str(record.version) == "3.2.1"
    assert record.settings == Settings(deadline_us=7, run_limit_us=8)
    assert (record.source, record.chunk_name, dict(record.modules)) == (
        b"return f",
        "@counter.lua",
        {"lib": b"return {}"},
    )
    assert record.owner is None


def test_a_private_contract_belongs_to_the_session() -> None:
    assert ContractRecord.from_message(registration(private=True), HOST).owner == HOST


def test_a_contract_may_have_an_id_only() -> None:
    record = ContractRecord.from_message(registration(name="", version=0, contract=id_bytes(0xAB)), HOST)
    assert (record.id, record.version) == (0xAB, None)


def test_the_title_is_name_and_major_version_or_the_id() -> None:
    assert ContractRecord.from_message(registration(), HOST).title == "host.counter@3"
    assert record_of(0xAB).title == "0x00000000000000AB"


@pytest.mark.parametrize(
    "changes",
    [
        {"contract": id_bytes(5)},
        {"version": 4 << 32},
        {"name": "host.other"},
        {"name": "counter"},
        {"name": "host.coun ter"},
    ],
)
def test_a_name_that_is_not_that_of_the_id_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="contract"):
        ContractRecord.from_message(registration(**changes), HOST)


def test_a_record_is_replaced_by_one_of_the_same_id() -> None:
    registry = Registry()
    registry.put(record_of(1, workers=1))
    registry.put(record_of(1, workers=2, stateless=True))
    assert len(registry) == 1
    removed = registry.remove(1)
    assert removed is not None
    assert removed.settings.workers == 2


def test_what_is_not_there_is_not_removed() -> None:
    assert Registry().remove(1) is None


def test_a_listing_is_in_order_of_id_and_shows_no_private_contract() -> None:
    registry = Registry()
    registry.put(ContractRecord.from_message(registration(), HOST))
    for contract_id in (9, 2):
        registry.put(record_of(contract_id))
    registry.put(record_of(5, HOST))
    page, count = registry.page(0)
    assert count == 3
    assert [int.from_bytes(row["id"], "little") for row in page] == sorted((2, 9, int(COUNTER)))
    (counter,) = [row for row in page if row["name"]]
    assert (counter["name"], counter["version"], counter["deadline_us"]) == ("host.counter", "3.2.1", 7)
    assert {row["version"] for row in page if not row["name"]} == {""}


def test_long_listings_come_in_pages() -> None:
    registry = Registry()
    for contract_id in range(LISTED_CONTRACTS_MAX + 2):
        registry.put(record_of(contract_id))
    first, count = registry.page(0)
    second, _ = registry.page(len(first))
    assert (len(first), len(second), count) == (LISTED_CONTRACTS_MAX, 2, LISTED_CONTRACTS_MAX + 2)
    assert registry.page(count) == ([], count)


def test_private_contracts_are_found_by_their_owner() -> None:
    registry = Registry()
    mine, public, foreign = record_of(1, HOST), record_of(2), record_of(3, OTHER_HOST)
    for record in (mine, public, foreign):
        registry.put(record)
    assert registry.owned_by(HOST) == [mine]
