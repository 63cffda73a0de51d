"""The registry: which contracts there are and what each consists of.

It keeps records; it loads nothing and dispatches nothing. A private contract belongs to one host's session
and appears in no listing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luacell.protocol.identity import HostContractId, Version, format_id
from luacell.protocol.limits import LISTED_CONTRACTS_MAX
from luacell.protocol.messages import (
    API_MODULE,
    FUNCTION_MASK,
    IN_INSTANCE,
    OF_INSTANCES,
    UNIT_MODULE,
    UNIT_NAME_MAX,
    Register,
    Settings,
    id_of,
)


@dataclass(frozen=True, slots=True)
class ContractRecord:
    """A contract as it was registered.

    Attributes:
        id: u64.
        name: dotted, or "".
        version: None when only the id is known.
        source: the chunk.
        chunk_name: in Lua's form.
        modules: by `require` name.
        settings: limits and kind.
        owner: the session a private contract belongs to, or None.
    """

    id: int
    name: str
    version: Version | None
    source: bytes
    chunk_name: str
    modules: Mapping[str, bytes]
    settings: Settings
    owner: bytes | None = None

    @classmethod
    def from_message(cls, message: Register, session: bytes) -> ContractRecord:
        """Read a registration that the codec has checked.

        Raises:
            ValueError: the name is malformed, or the id is not that of the name and version.
        """
        contract_id = id_of(message.contract)
        return cls(
            id=contract_id,
            name=message.name,
            version=_checked_version(contract_id, message) if message.name else None,
            source=message.source,
            chunk_name=message.chunk_name,
            modules=message.modules,
            settings=Settings.from_message(message),
            owner=session if message.private else None,
        )

    @property
    def title(self) -> str:
        """The contract as messages name it."""
        if self.version is None:
            return format_id(self.id)
        return f"{self.name}@{self.version.major}"

    def title_of(self, fn_id: int) -> str:
        """A call of a function as messages name it; a typed one says in the id that it is an instance's."""
        if self.is_typed and fn_id >= IN_INSTANCE and fn_id & FUNCTION_MASK < OF_INSTANCES:
            fn_id &= FUNCTION_MASK
        return f"{self.title} fn {fn_id}"

    @property
    def is_typed(self) -> bool:
        """Whether it was registered with an api.toml."""
        return API_MODULE in self.modules

    @property
    def seats(self) -> int:
        """In how many workers the instances of a typed contract live; 0 where its calls may go to any worker."""
        return self.settings.workers if self.is_typed and self.settings.workers > 1 else 0

    @property
    def unit(self) -> str:
        """The deployment that it belongs to, or ""."""
        return self.modules.get(UNIT_MODULE, b"").decode("utf-8", "replace")[:UNIT_NAME_MAX]

    def as_listed(self) -> dict[str, Any]:
        """Return what a listing shows."""
        return {
            "id": self.id.to_bytes(8, "little"),
            "name": self.name,
            "version": str(self.version) if self.version else "",
            "deadline_us": self.settings.deadline_us,
            "stateless": self.settings.stateless,
            "workers": self.settings.workers,
            "unit": self.unit,
        }


def _checked_version(contract_id: int, message: Register) -> Version:
    """Read the version of a named contract; a name that is not the id's would blame another contract."""
    packed = message.version
    version = Version(packed >> 32, packed >> 16 & 0xFFFF, packed & 0xFFFF)
    named = HostContractId(message.name, version.major)
    if int(named) != contract_id:
        raise ValueError(f"contract id {format_id(contract_id)} is not that of {named}")
    return version


class Registry:
    """Contract records by id."""

    def __init__(self) -> None:
        self._records: dict[int, ContractRecord] = {}

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: ContractRecord) -> None:
        """Add a record, or replace the one of its id."""
        self._records[record.id] = record

    def remove(self, contract_id: int) -> ContractRecord | None:
        """Remove and return a record, or None."""
        return self._records.pop(contract_id, None)

    def owned_by(self, session: bytes) -> list[ContractRecord]:
        """Return the private contracts of a session."""
        return [record for record in self._records.values() if record.owner == session]

    def page(self, first: int) -> tuple[list[dict[str, Any]], int]:
        """Return listed contracts from position `first` in order of id, and how many there are in all."""
        listed = sorted((record for record in self._records.values() if record.owner is None), key=lambda r: r.id)
        return [record.as_listed() for record in listed[first : first + LISTED_CONTRACTS_MAX]], len(listed)
