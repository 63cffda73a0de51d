"""What an api.toml says, once it is read: types, functions and contracts, immutable.

It holds what was declared and nothing that is derived: sizes and offsets are in `layout`, the text's rules in
`parse`. Every bound on a description stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from luacell.protocol.identity import GuestContractId, HostContractId, Version
from luacell.protocol.limits import KIB

API_SIZE_MAX: Final = 256 * KIB  # bytes of one file; a thousand functions with their docs
TYPES_MAX: Final = 1024  # structs and enums
CONTRACTS_MAX: Final = 256
FUNCTIONS_MAX: Final = 1024  # per contract
PARAMS_MAX: Final = 64  # per function
FIELDS_MAX: Final = 256  # per struct
VARIANTS_MAX: Final = 1024  # per enum
NESTING_MAX: Final = 16  # structs within structs
LEAVES_MAX: Final = 2048  # scalars and pointers in one struct or one args struct, nested ones and array items included
IDENTIFIER_MAX: Final = 128  # characters
EXPRESSION_MAX: Final = 1024  # characters of a variant's value
PARENTHESES_MAX: Final = 32  # open at once in such a value
ARRAY_ITEMS_MAX: Final = 1 << 20  # in one value; as Python objects of 64 bytes they are 64 MiB


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number or a bool.

    Attributes:
        name: as written in api.toml.
        kind: what its values are.
        size: bytes; also its alignment.
        code: its letter in Python's `struct`.
    """

    name: str
    kind: Literal["int", "float", "bool"]
    size: int
    code: str

    @property
    def low(self) -> int:
        """The least integer it holds."""
        return -(1 << (8 * self.size - 1)) if self.code.islower() else 0

    @property
    def high(self) -> int:
        """The greatest integer it holds."""
        return (1 << (8 * self.size - 1 if self.code.islower() else 8 * self.size)) - 1


@dataclass(frozen=True, slots=True)
class StringView:
    """UTF-8 text: `{const u8 *ptr; size_t len}`."""

    name: str = "StringView"


@dataclass(frozen=True, slots=True)
class Buffer:
    """Bytes: `{u8 *ptr; size_t len; size_t cap}`."""

    name: str = "Buffer"


@dataclass(frozen=True, slots=True)
class Ptr:
    """An opaque address; it means nothing in another process."""

    name: str = "Ptr"


@dataclass(frozen=True, slots=True)
class Void:
    """No value; only what a function returns."""

    name: str = "Void"


@dataclass(frozen=True, slots=True)
class Variant:
    """A named value of an enum."""

    name: str
    value: int
    docs: str = ""


@dataclass(frozen=True, slots=True)
class Enum:
    """Named integers.

    Attributes:
        repr: the unsigned scalar that holds a value.
        bitflag: whether values are combinations of variants.
        variants: in the order of the file; at least one.
    """

    name: str
    repr: Scalar
    bitflag: bool
    variants: tuple[Variant, ...]
    docs: str = ""

    @property
    def mask(self) -> int:
        """All bits that a variant has."""
        bits = 0
        for variant in self.variants:
            bits |= variant.value
        return bits


@dataclass(frozen=True, slots=True)
class Field:
    """A member of a struct."""

    name: str
    type: ValueType
    docs: str = ""


@dataclass(frozen=True, slots=True)
class Struct:
    """A C struct; fields in declaration order, at least one."""

    name: str
    fields: tuple[Field, ...]
    docs: str = ""


@dataclass(frozen=True, slots=True)
class Array:
    """Any number of values of one type: `{T *items; size_t len}`; an item holds no further Array."""

    item: ItemType

    @property
    def name(self) -> str:
        """The type as api.toml writes it."""
        return f"Array<{self.item.name}>"


ItemType = Scalar | StringView | Buffer | Ptr | Enum | Struct
ValueType = ItemType | Array
ResultType = ValueType | Void


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a function."""

    name: str
    type: ValueType
    docs: str = ""


@dataclass(frozen=True, slots=True)
class Function:
    """A function of a contract.

    Attributes:
        id: 0-based, in declaration order.
        result: what it returns.
        result_docs: what is said of that.
    """

    name: str
    id: int
    params: tuple[Param, ...]
    result: ResultType
    docs: str = ""
    result_docs: str = ""


@dataclass(frozen=True, slots=True)
class Contract:
    """A contract: a service of the host, or, where `guest` is set, of a plugin.

    Attributes:
        singleton: whether all callers share one instance.
    """

    name: str
    version: Version
    singleton: bool
    functions: tuple[Function, ...]
    guest: bool = False
    docs: str = ""

    @property
    def id(self) -> HostContractId:
        """Its id, which docs, functions and types do not affect."""
        return (GuestContractId if self.guest else HostContractId)(self.name, self.version.major)

    def function(self, name: str) -> Function | None:
        """Return the function of this name, or None."""
        return next((function for function in self.functions if function.name == name), None)

    def __str__(self) -> str:
        return f"{self.name}@{self.version.major}"


@dataclass(frozen=True, slots=True)
class Api:
    """A whole api.toml, in the order of the file."""

    structs: tuple[Struct, ...]
    enums: tuple[Enum, ...]
    host_contracts: tuple[Contract, ...]
    guest_contracts: tuple[Contract, ...]
    docs: str = ""


U8: Final = Scalar("u8", "int", 1, "B")
U16: Final = Scalar("u16", "int", 2, "H")
U32: Final = Scalar("u32", "int", 4, "I")
U64: Final = Scalar("u64", "int", 8, "Q")
VOID: Final = Void()

SCALARS: Final = (
    U8,
    U16,
    U32,
    U64,
    Scalar("i8", "int", 1, "b"),
    Scalar("i16", "int", 2, "h"),
    Scalar("i32", "int", 4, "i"),
    Scalar("i64", "int", 8, "q"),
    Scalar("f32", "float", 4, "f"),
    Scalar("f64", "float", 8, "d"),
    Scalar("bool", "bool", 1, "B"),  # not "?", which takes and gives anything for true
)
REPRS: Final = {scalar.name: scalar for scalar in (U8, U16, U32, U64)}
BUILT_IN: Final[dict[str, ResultType]] = {
    **{scalar.name: scalar for scalar in SCALARS},
    "StringView": StringView(),
    "Buffer": Buffer(),
    "Ptr": Ptr(),
    "ptr": Ptr(),
    "Void": VOID,
    "void": VOID,
}
