"""What a broker tells of a typed contract, and which of its versions a caller gets."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

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
DROPPED_AT_ONCE: Final = 256  # instances destroyed by one call: 2 KiB of arguments, which every slot has room for


@dataclass(frozen=True, slots=True)
class Description:
    """A typed contract, ready to be called.

    Attributes:
        contract_id: u64.
        contract: as api.toml declares it.
        api: all of it.
        types: the Python types of its structs and enums.
        functions: packers by name.
        seats: workers that its instances are spread over; 1 where it has but one.
    """

    contract_id: int
    contract: Contract
    api: Api
    types: HostTypes
    functions: dict[str, Marshaller]
    seats: int = 1

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
        functions = compile_contract(api, contract, types)
        return cls(contract_id, contract, api, types, functions, int(body.get("workers", 1)))


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

    Args:
        description: of the contract.
        dropped: where instances go that are to be destroyed, those of the bridge's other contracts too.

    Attributes:
        rooms: bytes given to the varying part of a result, by function; learned from what came.
    """

    def __init__(self, description: Description, dropped: Dropped) -> None:
        self.description = description
        self.rooms: dict[str, int] = {}
        self.dropped = dropped
        self._instances = [0] * description.seats  # that live, by seat
        self._lock = threading.Lock()

    def take_seat(self) -> int:
        """Return the seat for one more instance: one that has the fewest of this host's."""
        with self._lock:
            fewest = min(self._instances)
            seat = random.choice([seat for seat, count in enumerate(self._instances) if count == fewest])
            self._instances[seat] += 1
        return seat

    def leave_seat(self, seat: int) -> None:
        """An instance is no more."""
        with self._lock:
            self._instances[seat] -= 1

    def room(self, marshaller: Marshaller, name: str) -> int:
        """Return the bytes to offer for a result."""
        extra = self.rooms.get(name, ROOM_FIRST) if marshaller.out_varies else 0
        return marshaller.out_size + extra

    def learn(self, marshaller: Marshaller, name: str, size: int) -> None:
        """Remember how large a result was that did not fit."""
        self.rooms[name] = min(2 * (size - marshaller.out_size), ROOM_MAX)


class DroppedInstance(NamedTuple):
    """An instance whose proxy is gone."""

    shared: Shared
    seat: int
    number: int


class Dropped:
    """The instances of one bridge whose proxies are gone: they are to be destroyed.

    Proxies go when the garbage collector comes to them, in any thread and in the middle of anything; so they only leave
    a note here, and whoever next uses the bridge sends it (`take`).

    Attributes:
        notes: one for each.
    """

    def __init__(self) -> None:
        self.notes: deque[DroppedInstance] = deque(maxlen=DROPPED_MAX)

    def add(self, shared: Shared, seat: int, number: int) -> None:
        """Note an instance."""
        self.notes.append(DroppedInstance(shared, seat, number))

    def take(self) -> list[DroppedInstance]:
        """Remove and return instances that one call can destroy: of one contract, in one seat; [] where none are."""
        taken: list[DroppedInstance] = []
        try:
            while len(taken) < DROPPED_AT_ONCE:
                note = self.notes.popleft()
                if taken and note[:2] != taken[0][:2]:
                    self.notes.appendleft(note)
                    break
                taken.append(note)
        except IndexError:
            pass
        return taken

    def put_back(self, taken: list[DroppedInstance]) -> None:
        """They could not be told of now; others come first."""
        self.notes.extend(taken)


class TypedContracts:
    """The typed contracts that one bridge has proxies of.

    Attributes:
        dropped: their instances that are to be destroyed.
    """

    def __init__(self) -> None:
        self.dropped = Dropped()
        self._known: dict[tuple[int, tuple[type[Any], ...]], tuple[tuple[bytes, int], Shared]] = {}

    def of(self, contract_id: int, body: Mapping[str, Any], given: Iterable[type[Any]] = ()) -> Shared:
        """Return what proxies of a contract share; made anew when its description has changed.

        Raises:
            TypeMismatch: it is a raw contract.
            ApiError: the description is malformed.
            TypeError: a given class does not fit.
        """
        text, key = bytes(body["api"]), (contract_id, tuple(given))
        mark = text, int(body.get("workers", 1))
        known = self._known.get(key)
        if known is None or known[0] != mark:
            # Contracts of one api.toml share its types: what one returns, another takes.
            others = (
                shared.description
                for (_, classes), ((other, _), shared) in list(self._known.items())
                if other == text and classes == key[1]
            )
            same = next(((other.api, other.types) for other in others), None)
            while len(self._known) >= KNOWN_MAX:
                del self._known[next(iter(self._known))]
            shared = Shared(Description.from_reply(contract_id, body, key[1], same), self.dropped)
            known = self._known[key] = mark, shared
        return known[1]
