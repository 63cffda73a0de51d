"""What a broker tells of a typed contract, and which of its versions a caller gets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from luacell.client.replies import ContractInfo
from luacell.client.typed.marshaller import Marshaller, compile_contract
from luacell.client.typed.values import HostTypes
from luacell.protocol.api import Api, Contract, find_contract, parse
from luacell.protocol.errors import AbiErrorCode, HostContractNotFound, HostContractVersionMismatch, TypeMismatch
from luacell.protocol.identity import Version

ROOM_FIRST: Final = 1024  # bytes for what the strings and buffers of a result hold, at first
ROOM_MAX: Final = 1 << 20  # as learned; larger results are fetched
KNOWN_MAX: Final = 1024  # contracts, each time with other classes, that a bridge remembers
DROPPED_MAX: Final = 1 << 17  # instances whose proxies are gone and that were not told yet


@dataclass(frozen=True, slots=True)
class Description:
    """A typed contract, ready to be called.

    Attributes:
        contract_id: u64.
        contract: as api.toml declares it.
        api: all of it.
        types: the Python types of its structs and enums.
        functions: packers by name.
    """

    contract_id: int
    contract: Contract
    api: Api
    types: HostTypes
    functions: dict[str, Marshaller]

    @classmethod
    def from_reply(
        cls,
        contract_id: int,
        body: Mapping[str, Any],
        given: Iterable[type[Any]] = (),
        same: tuple[Api, HostTypes] | None = None,
    ) -> Description:
        """Read what the broker tells.

        Args:
            contract_id: u64.
            body: of the reply.
            given: classes for its structs and enums, by name.
            same: this very description and these types, where another contract has brought them.

        Raises:
            TypeMismatch: it is a raw contract, without an api.toml.
            ApiError: the description is malformed.
            TypeError: a given class does not fit.
        """
        if not body["api"]:
            raise TypeMismatch(contract_id, "a typed contract", "a raw one, registered without an api.toml")
        if same is None:
            api = parse(bytes(body["api"]).decode("utf-8", "replace"), "api.toml")
            same = api, HostTypes(api, given)
        api, types = same
        contract = find_contract(api, contract_id)
        return cls(contract_id, contract, api, types, compile_contract(api, contract, types))


def choose(name: str, min_version: str | None, registered: Iterable[ContractInfo]) -> ContractInfo:
    """Return the registered contract that a caller means.

    Args:
        name: `host.svc`, `host.svc@1`, or `host.svc@1.3`.
        min_version: the least version that will do, such as "1.3"; None for any.
        registered: what there is.

    Raises:
        HostContractNotFound: nothing of that name is registered.
        HostContractVersionMismatch: what is registered is another major version, or older.
        ValueError: a version is malformed, or they contradict each other.
        TypeError: name or version is no text.
    """
    for what, value in (("a typed contract's name", name), ("a version", min_version)):
        if not isinstance(value, str) and not (value is None and what == "a version"):
            raise TypeError(f"{what} is text, not {type(value).__name__}")
    plain, at, given = name.partition("@")
    wanted = Version.parse(given) if at else None
    least = Version.parse(min_version) if min_version is not None else wanted
    if wanted is not None and least is not None and wanted.major != least.major:
        raise ValueError(f"contract {name!r} and version {min_version!r} are of different majors")
    found = [(Version.parse(info.version), info) for info in registered if info.name == plain and info.version]
    if not found:
        raise HostContractNotFound(
            f"host contract not found: {name}", code=AbiErrorCode.HOST_CONTRACT_NOT_FOUND, began="no"
        )
    fitting = [(version, info) for version, info in found if least is None or version.satisfies(least)]
    if fitting:
        return max(fitting, key=lambda each: each[0])[1]
    versions = ", ".join(str(version) for version, _ in found)
    raise HostContractVersionMismatch(
        f"{plain}: version {least} is required, {versions} is registered",
        code=AbiErrorCode.HOST_CONTRACT_VERSION_MISMATCH,
        began="no",
    )


class Shared:
    """What all proxies of one contract on one bridge share.

    Attributes:
        rooms: bytes given to the varying part of a result, by function; learned from what came.
        dropped: numbers of instances whose proxies are gone.
    """

    def __init__(self, description: Description) -> None:
        self.description = description
        self.rooms: dict[str, int] = {}
        self.dropped: deque[int] = deque(maxlen=DROPPED_MAX)

    def next_dropped(self) -> int | None:
        """Return the number of an instance that is to be destroyed, or None; each is given to one thread."""
        try:
            return self.dropped.popleft()
        except IndexError:
            return None

    def room(self, marshaller: Marshaller, name: str) -> int:
        """Return the bytes to offer for a result."""
        extra = self.rooms.get(name, ROOM_FIRST) if marshaller.out_varies else 0
        return marshaller.out_size + extra

    def learn(self, marshaller: Marshaller, name: str, size: int) -> None:
        """Remember how large a result was that did not fit."""
        self.rooms[name] = min(2 * (size - marshaller.out_size), ROOM_MAX)


class TypedContracts:
    """The typed contracts that one bridge has proxies of."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[type[Any], ...]], tuple[bytes, Shared]] = {}

    def of(self, contract_id: int, body: Mapping[str, Any], given: Iterable[type[Any]] = ()) -> Shared:
        """Return what proxies of a contract share; made anew when its description has changed.

        Raises:
            TypeMismatch: it is a raw contract.
            ApiError: the description is malformed.
            TypeError: a given class does not fit.
        """
        text, key = bytes(body["api"]), (contract_id, tuple(given))
        known = self._known.get(key)
        if known is None or known[0] != text:
            # Contracts of one api.toml share its types: what one returns, another takes.
            others = (
                shared.description
                for (_, classes), (other, shared) in list(self._known.items())
                if other == text and classes == key[1]
            )
            same = next(((other.api, other.types) for other in others), None)
            while len(self._known) >= KNOWN_MAX:
                del self._known[next(iter(self._known))]
            known = self._known[key] = text, Shared(Description.from_reply(contract_id, body, key[1], same))
        return known[1]
