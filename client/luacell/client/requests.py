"""What a bridge asks of its broker besides calls: the messages, made from what users give, and their answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from luacell.client.function import LuaFunction
from luacell.client.replies import ContractInfo
from luacell.protocol import messages
from luacell.protocol.errors import TypeMismatch
from luacell.protocol.identity import ContractRef
from luacell.protocol.messages import Message, Settings, id_bytes

Request = Callable[[int], Message]  # makes a message from its request id


def checked_function(ref: ContractRef, implementation: object) -> LuaFunction:
    """Return an implementation that is one.

    Raises:
        TypeMismatch: it is of another type.
    """
    if not isinstance(implementation, LuaFunction):
        raise TypeMismatch(ref.id, "LuaFunction", type(implementation).__name__)
    return implementation


def registration(
    ref: ContractRef,
    function: LuaFunction,
    settings: Settings | None = None,
    modules: dict[str, bytes] | None = None,
    *,
    replace: bool = False,
    private: bool = False,
    hold: bool = False,
) -> Request:
    """Return the request that registers a contract.

    Raises:
        TypeError: `replace` is neither True nor False.
    """
    if type(replace) is not bool:
        raise TypeError(f"replace is True or False, not {replace!r}")
    version = ref.version
    packed = version.major << 32 | version.minor << 16 | version.patch if version is not None else 0
    return lambda number: messages.Register(
        request_id=number,
        contract=id_bytes(ref.id),
        name=ref.name,
        version=packed,
        source=function.source,
        chunk_name=function.chunk_name or f"={ref}",
        modules=modules or {},
        replace=replace,
        private=private,
        hold=hold,
        **(settings or Settings()).as_fields(),
    )


def commitment(contract_ids: Iterable[int], *, serve: bool) -> Request:
    """Return the request that has contracts served, or dropped, which were registered with `hold`."""
    raw = b"".join(map(id_bytes, contract_ids))
    return lambda number: messages.Commit(request_id=number, contracts=raw, serve=serve)


def unregistration(contract_id: int, *others: int) -> Request:
    """Return the request that removes a contract, or several at once."""
    more = b"".join(map(id_bytes, others))
    return lambda number: messages.Unregister(request_id=number, contract=id_bytes(contract_id), others=more)


def revival(contract_id: int) -> Request:
    """Return the request that ends a contract's quarantine."""
    return lambda number: messages.Revive(request_id=number, contract=id_bytes(contract_id))


def description(contract_id: int) -> Request:
    """Return the request for a contract's name, version and api.toml."""
    return lambda number: messages.Describe(request_id=number, contract=id_bytes(contract_id))


def health(number: int) -> Message:
    """Ask how the service is."""
    return messages.Health(request_id=number)


class Listing:
    """The registered contracts, page by page: send `request` until `is_complete`, and `add` each answer.

    Attributes:
        found: the contracts so far, in order of id.
        is_complete: there are no more.
    """

    def __init__(self) -> None:
        self.found: list[ContractInfo] = []
        self.is_complete = False

    def request(self, number: int) -> Message:
        """Ask for the next page."""
        return messages.List(request_id=number, first=len(self.found))

    def add(self, reply: messages.Reply) -> None:
        """Take a page."""
        body: Any = reply.body
        self.found.extend(ContractInfo.from_listing(row) for row in body["contracts"])
        self.is_complete = len(self.found) >= body["total"] or not body["contracts"]


def random_id() -> int:
    """Return the id of a contract that nobody else is to find."""
    return int.from_bytes(os.urandom(8), "little")
