"""Deployment units: what is asked of a broker, in which order, to deploy a directory, to replace it, or to remove it.

A unit is the contracts of one deployment, known by its name: each registration carries it, and what the unit requires.
It decides and says what is to be asked; the bridges ask. Each function is a generator of questions that is sent the
answers, or thrown the error that came in place of one.

    list ── describe what is replaced ── register each, held back ── commit: all are served from one moment on
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from luacell.client.deployment import Deployment, DeploymentError, Unit
from luacell.client.replies import ContractInfo
from luacell.client.requests import Listing, Request, commitment, description, registration, unregistration
from luacell.protocol import messages
from luacell.protocol.api import Array, Contract, Enum, Struct, find_contract, parse
from luacell.protocol.api.model import ResultType
from luacell.protocol.errors import BridgeError, ContractNotFound, DuplicateContract, LuacellError
from luacell.protocol.identity import ContractRef, Version

T = TypeVar("T")


class Question(NamedTuple):
    """One request, and the contract that it is about, or 0."""

    request: Request
    contract_id: int = 0


Questions = Generator[Question, messages.Reply, T]


class NotDeployed(DeploymentError):
    """No unit of that name is deployed; the text names those that are."""


def deploying(deployment: Deployment) -> Questions[list[ContractRef]]:
    """Deploy a unit, in place of what it was before; return its contracts.

    Raises:
        DuplicateContract: an id is taken by what is not of this unit.
        DeploymentError: it is no successor of what is deployed, or what it requires is not there.
        LuacellError: a contract does not load, or cannot be registered; nothing has changed.
    """
    registered = yield from _listed()
    _check_contracts(deployment, registered)
    _check_required(deployment, registered)
    known = {info.id for info in registered}
    for unit in deployment.units:
        if unit.ref.id in known:
            reply = yield Question(description(unit.ref.id), unit.ref.id)
            _check_functions(deployment, unit, bytes(reply.body["api"]))
    held: list[int] = []
    try:
        for unit in deployment.units:
            held.append(unit.ref.id)
            yield Question(
                registration(
                    unit.ref,
                    unit.function,
                    unit.settings,
                    deployment.modules,
                    replace=unit.ref.id in known,
                    hold=True,
                ),
                unit.ref.id,
            )
        yield Question(commitment(held, serve=True))
    except BaseException as error:
        if isinstance(error, BridgeError):
            held.pop()  # it was refused; what is pending under its id is another's
        with contextlib.suppress(LuacellError):  # the broker drops them as well when this host leaves
            yield Question(commitment(held, serve=False))
        raise
    return [unit.ref for unit in deployment.units]


def undeploying(name_or_directory: str | os.PathLike[str]) -> Questions[list[ContractRef]]:
    """Remove a unit; return its contracts.

    Args:
        name_or_directory: the name of a deployed unit; else a directory, whose `luacell.toml` says the name.

    Raises:
        NotDeployed: there is no such unit.
        DeploymentError: another unit requires a contract of it, or the directory cannot be read.
    """
    registered = yield from _listed()
    name = _unit_name(name_or_directory, registered)
    own = [info for info in registered if info.unit == name]
    others = {info.unit: info for info in registered if info.unit not in ("", name)}
    for other in others.values():
        try:
            reply = yield Question(description(other.id), other.id)
        except ContractNotFound:  # removed meanwhile, and its needs with it
            continue
        for line in bytes(reply.body["requires"]).decode("utf-8", "replace").splitlines():
            needed = next((info for info in own if _meets(info, ContractRef.of(line))), None)
            if needed is not None:
                raise DeploymentError(
                    f"unit {name!r} cannot be removed: unit {other.unit!r} requires {line}, which is its {needed} "
                    f"({needed.version}); undeploy {other.unit!r} first"
                )
    with contextlib.suppress(ContractNotFound):  # somebody was faster
        yield Question(unregistration(*(info.id for info in own)), own[0].id)
    return [ContractRef(info.id, info.name, _version(info)) for info in own]


def _listed() -> Questions[list[ContractInfo]]:
    listing = Listing()
    while not listing.is_complete:
        listing.add((yield Question(listing.request)))
    return listing.found


def _unit_name(given: str | os.PathLike[str], registered: Iterable[ContractInfo]) -> str:
    units = sorted({info.unit for info in registered if info.unit})
    name = os.fspath(given)
    if name in units:
        return name
    directory = Path(given)
    if directory.is_dir():
        name = Deployment.name_of(directory)
    if name not in units:
        raise NotDeployed(f"no unit {name!r} is deployed; deployed are: {', '.join(units) or 'none'}")
    return name


def _version(info: ContractInfo) -> Version | None:
    return Version.parse(info.version) if info.version else None


def _meets(info: ContractInfo, required: ContractRef) -> bool:
    version = _version(info)
    assert required.version is not None
    return info.id == required.id and version is not None and version.satisfies(required.version)


# -- what may be deployed -----------------------------------------------------------------------------------------
def _check_contracts(deployment: Deployment, registered: list[ContractInfo]) -> None:
    """Refuse to take what belongs to others, to go back, and to lose a contract that somebody may call."""
    by_id = {info.id: info for info in registered}
    for unit in deployment.units:
        info = by_id.get(unit.ref.id)
        if info is None:
            continue
        if info.unit != deployment.name:
            raise DuplicateContract(info.id)
        deployed, version = _version(info), unit.ref.version
        assert deployed is not None
        assert version is not None
        if not version.satisfies(deployed):
            raise DeploymentError(
                f"{deployment.directory}: {unit.ref} {version} cannot replace {deployed}, which is deployed as unit "
                f"{deployment.name!r}: hosts may rely on it; undeploy the unit to go back"
            )
    own = {unit.ref.id for unit in deployment.units}
    lost = [info for info in registered if info.unit == deployment.name and info.id not in own]
    if lost:
        raise DeploymentError(
            f"{deployment.directory}: lacks {', '.join(map(str, lost))}, deployed as unit {deployment.name!r}: hosts "
            "may rely on it; undeploy the unit first, or give this one another name"
        )


def _check_required(deployment: Deployment, registered: list[ContractInfo]) -> None:
    there = {info.id: (info.name, _version(info)) for info in registered}
    there.update({unit.ref.id: (unit.ref.name or "", unit.ref.version) for unit in deployment.units})
    for required in deployment.requires:
        assert required.version is not None
        found = [version for name, version in there.values() if name == required.name and version is not None]
        if not any(version.satisfies(required.version) for version in found):
            what = f"{required.name} {', '.join(map(str, sorted(found)))}" if found else "nothing of that name"
            raise DeploymentError(
                f"{deployment.directory}: unit {deployment.name!r} requires {required.name} {required.version}, and "
                f"{what} is registered"
            )


def _check_functions(deployment: Deployment, unit: Unit, api_text: bytes) -> None:
    """Refuse a description by which calls of hosts that know the deployed one would be misread."""
    if not api_text:
        return
    where = f"{deployment.directory}: {unit.ref} {unit.ref.version}"
    if deployment.api is None:
        raise DeploymentError(f"{where} has no api, and what it would replace has one")
    old = find_contract(parse(api_text.decode("utf-8", "replace"), "api.toml"), unit.ref.id)
    problem = difference(old, find_contract(deployment.api, unit.ref.id))
    if problem:
        raise DeploymentError(
            f"{where} cannot replace {old.version}, which is deployed: {problem}; that needs a new major version"
        )


def difference(old: Contract, new: Contract) -> str:
    """Tell by what a contract is no successor of another one, or "": functions may only be added, at the end."""
    if old.singleton != new.singleton:
        return "it was one instance for all callers" if old.singleton else "it had an instance for each caller"
    for function in old.functions:
        if function.id >= len(new.functions):
            return f"function {function.id} {function.name!r} is gone"
        now = new.functions[function.id]
        if now.name != function.name:
            return f"function {function.id} was {function.name!r} and is {now.name!r}"
        before = [*(param.type for param in function.params), function.result]
        after = [*(param.type for param in now.params), now.result]
        if len(before) != len(after) or not all(map(_fits, before, after)):
            return f"function {function.id} {function.name!r} has other parameters or another result"
    return ""


def _fits(old: ResultType, new: ResultType) -> bool:
    """Whether values of one type are read rightly as values of another; an enum may have more variants."""
    if isinstance(old, Enum) and isinstance(new, Enum):
        variants = {(each.name, each.value) for each in new.variants}
        is_same = old.repr == new.repr and old.bitflag == new.bitflag
        return is_same and all((each.name, each.value) in variants for each in old.variants)
    if isinstance(old, Struct) and isinstance(new, Struct):
        names = [field.name for field in old.fields] == [field.name for field in new.fields]
        return names and all(_fits(a.type, b.type) for a, b in zip(old.fields, new.fields, strict=True))
    if isinstance(old, Array) and isinstance(new, Array):
        return _fits(old.item, new.item)
    return type(old) is type(new) and old.name.lower() == new.name.lower()
