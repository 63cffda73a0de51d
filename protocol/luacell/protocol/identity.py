"""Contract identity: names, versions and the 64-bit ids made of them.

An id is FNV-1a 64 over `host_contract:<name>@<major>` (or `guest_contract:…`), as polyplug computes it, so
both sides agree on ids without talking. Ids travel as eight raw bytes or sixteen hex digits, never as a JSON
number or a Lua number: a double holds only 53 bits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

ID_MAX: Final = (1 << 64) - 1
FN_ID_MAX: Final = (1 << 32) - 1
VERSION_PART_MAX: Final = (1 << 32) - 1
VERSION_MINOR_MAX: Final = 65535  # minor and patch: a look-up packs (major << 16) | minor
NAME_LENGTH_MAX: Final = 255  # characters; a registry row and an error message stay readable

_FNV_OFFSET: Final = 0xCBF29CE484222325
_FNV_PRIME: Final = 0x100000001B3
_NAME: Final = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_VERSION: Final = re.compile(r"[0-9]{1,10}(?:\.[0-9]{1,10}){0,2}")


def fnv1a64(text: str) -> int:
    """Hash `text` with FNV-1a, 64 bits.

    Args:
        text: any string; its UTF-8 bytes are hashed.

    Returns:
        An unsigned 64-bit integer.

    Source: http://www.isthe.com/chongo/tech/comp/fnv/ (parameters); polyplug uses it for every id.
    """
    value = _FNV_OFFSET
    for byte in text.encode():
        value = ((value ^ byte) * _FNV_PRIME) & ID_MAX
    return value


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """major.minor.patch of a contract; `1` and `1.2` read as `1.0.0` and `1.2.0`."""

    major: int
    minor: int = 0
    patch: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            TypeError: a part is no integer.
            ValueError: a part is negative or too large for polyplug's packed form.
        """
        bounds = (
            ("major", self.major, VERSION_PART_MAX),
            ("minor", self.minor, VERSION_MINOR_MAX),
            ("patch", self.patch, VERSION_MINOR_MAX),
        )
        for part, value, limit in bounds:
            if type(value) is not int:  # True and 1.0 equal 1, but hash to another id
                raise TypeError(f"version {part} {value!r} is no int")
            if not 0 <= value <= limit:
                raise ValueError(f"version {part} {value} is outside 0..{limit}")

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read `1`, `1.2` or `1.2.3`.

        Raises:
            ValueError: `text` is no version.
        """
        if not _VERSION.fullmatch(text):
            raise ValueError(f"version {text!r} is not of the form MAJOR[.MINOR[.PATCH]]")
        return cls(*(int(part) for part in text.split(".")))

    def satisfies(self, required: Version) -> bool:
        """Tell whether a provider of this version serves a caller who requires `required`."""
        return self.major == required.major and self.minor >= required.minor

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


def _checked_name(name: str) -> str:
    if len(name) > NAME_LENGTH_MAX:
        raise ValueError(f"contract name has {len(name)} characters; the limit is {NAME_LENGTH_MAX}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"contract name {name!r} is not dotted identifiers such as 'host.logger'")
    return name


def _checked_major(major: int) -> int:
    return Version(major).major


class HostContractId:
    """The id of a host contract: `int(HostContractId("host.logger", 1))`.

    Args:
        name: dotted, with the mandatory `host.` prefix.
        major: the major version, 0 to 2**32 - 1.

    Raises:
        TypeError: `major` is no int.
        ValueError: the name or the version is malformed.
    """

    __slots__ = ("_id", "major", "name")
    _KIND = "host_contract"
    _PREFIX = "host."

    def __init__(self, name: str, major: int) -> None:
        self.name = _checked_name(name)
        self.major = _checked_major(major)
        if not name.startswith(self._PREFIX):
            raise ValueError(f"host contract name {name!r} lacks the prefix {self._PREFIX!r}")
        self._id = fnv1a64(f"{self._KIND}:{name}@{major}")

    def __int__(self) -> int:
        return self._id

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and int(other) == self._id

    def __hash__(self) -> int:
        return self._id

    def __str__(self) -> str:
        return f"{self.name}@{self.major}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.major})"


class GuestContractId(HostContractId):
    """The id of a contract that plugins offer; its name needs no prefix."""

    __slots__ = ()
    _KIND = "guest_contract"
    _PREFIX = ""


@dataclass(frozen=True, slots=True)
class ContractRef:
    """A contract as a caller named it: its id, and name and version where they were given.

    Attributes:
        id: unsigned 64-bit id.
        name: dotted name, or "" when only an id was given.
        version: as given, or None when only an id was given.
    """

    id: int
    name: str = ""
    version: Version | None = None

    @classmethod
    def of(cls, contract: int | str | HostContractId) -> ContractRef:
        """Read a u64 id, `"host.name@1"`, `"host.name@1.2.0"` or a HostContractId.

        Raises:
            TypeError: `contract` is of another type, or names a guest contract.
            ValueError: the id is out of range, or the text is malformed.
        """
        if isinstance(contract, GuestContractId):
            raise TypeError(f"guest contract {contract} is offered by a plugin; only host contracts can be called here")
        if isinstance(contract, HostContractId):
            return cls(int(contract), contract.name, Version(contract.major))
        if isinstance(contract, str):
            return cls._of_text(contract)
        if isinstance(contract, int) and not isinstance(contract, bool):
            if not 0 <= contract <= ID_MAX:
                raise ValueError(f"contract id {contract} is outside 0..2**64-1")
            return cls(contract)
        raise TypeError(f"a contract is named by an int or a str, not {type(contract).__name__}")

    @classmethod
    def _of_text(cls, text: str) -> ContractRef:
        name, at, version_text = text.partition("@")
        if not at:
            raise ValueError(f"contract {text!r} lacks its version: write 'host.name@1' or 'host.name@1.2.0'")
        version = Version.parse(version_text)
        return cls(int(HostContractId(name, version.major)), name, version)

    def __str__(self) -> str:
        if self.name and self.version is not None:
            return f"{self.name}@{self.version.major}"
        return format_id(self.id)


def format_id(contract_id: int) -> str:
    """Write an id the way messages show it: `0x` and sixteen upper-case hex digits."""
    return f"0x{contract_id:016X}"
