"""Finding a contract in a description: by its id, or by its name where that is enough."""

from __future__ import annotations

from luacell.protocol.api.model import Api, Contract
from luacell.protocol.errors import ApiError
from luacell.protocol.identity import format_id


def find_contract(api: Api, contract_id: int) -> Contract:
    """Return the host contract of an id.

    Raises:
        ApiError: none is declared.
    """
    for contract in api.host_contracts:
        if int(contract.id) == contract_id:
            return contract
    declared = ", ".join(map(str, api.host_contracts)) or "none"
    raise ApiError("api.toml", 1, 1, f"declares no host contract of id {format_id(contract_id)}; declared: {declared}")


def contracts_named(api: Api, name: str) -> list[Contract]:
    """Return the host contracts of a name; they differ in their major version."""
    return [contract for contract in api.host_contracts if contract.name == name]
