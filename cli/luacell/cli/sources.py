"""Where the verbs about typed contracts find a description: in a service, or in a directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luacell.cli.console import UsageError, connected
from luacell.cli.options import contract_of
from luacell.protocol.api import Api, Contract, contracts_named
from luacell.protocol.errors import ContractNotFound

if TYPE_CHECKING:
    from luacell.client import LuaHostBridge
    from luacell.client.deployment import Deployment


def read_directory(directory: Path) -> Deployment:
    """Read a deployment directory, whole.

    Raises:
        DeploymentError: it is not right.
    """
    from luacell.client.deployment import Deployment

    return Deployment.read(directory)


def api_in(directory: Path) -> tuple[Deployment, Api]:
    """Read a deployment directory and its description.

    Raises:
        DeploymentError: it is not right.
        UsageError: it has no description: its contracts are raw.
    """
    found = read_directory(directory)
    if found.api is None:
        raise UsageError(f"{directory}: luacell.toml names no api; its contracts are raw", 'add api = "api.toml"')
    return found, found.api


def described_in(directory: Path, contract: str) -> tuple[Api, Contract]:
    """Return a contract that a directory describes.

    Raises:
        DeploymentError, UsageError: the directory is not right, or describes no such contract.
    """
    _, api = api_in(directory)
    name, at, version = contract.partition("@")
    major = version.partition(".")[0]
    found = [each for each in contracts_named(api, name) if not at or str(each.version.major) == major]
    if len(found) != 1:
        declared = ", ".join(map(str, api.host_contracts)) or "none"
        problem = "names several versions" if found else "is not declared"
        raise UsageError(f"{contract} {problem} in {directory}; declared: {declared}")
    return api, found[0]


def name_of(bridge: LuaHostBridge, contract: str) -> str:
    """Return the name of a contract that may be given by its id.

    Raises:
        ContractNotFound: no contract of that id, with a name, is registered.
        ValueError: it is no id.
    """
    target = contract_of(contract)
    if isinstance(target, str):
        return target
    for info in bridge.contracts():
        if info.id == target and info.name:
            return str(info)
    raise ContractNotFound(target)


def described(endpoint: str | None, contract: str) -> tuple[Api, Contract]:
    """Return a contract that a service describes.

    Raises:
        ContractNotFound: it is not registered.
        TypeMismatch: it is a raw one.
    """
    with connected(endpoint) as bridge:
        found = bridge.describe(name_of(bridge, contract))
    return found.api, found.contract
