"""From the broker's answers to values and exceptions; the one place where wire failures become Python errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from luacell.client.arena import Slot
from luacell.protocol import errors, messages
from luacell.protocol.errors import AbiError, AbiErrorCode, CallError, call_error_class
from luacell.protocol.identity import format_id


class Buffer(Protocol):
    """Anything with the buffer protocol: bytes, bytearray, memoryview, array, numpy arrays, ctypes objects."""

    def __buffer__(self, flags: int, /) -> memoryview:
        """Return a view (PEP 688)."""


@dataclass(frozen=True, slots=True)
class ContractInfo:
    """A registered contract.

    Attributes:
        id: u64.
        name: dotted name, or "" where only the id is known.
        version: "1.2.0", or "".
        deadline: seconds, the default for callers.
        stateless: whether it may have several workers.
        workers: how many it may have.
        unit: the deployment that it belongs to, or "".
    """

    id: int
    name: str
    version: str
    deadline: float
    stateless: bool
    workers: int
    unit: str = ""

    @classmethod
    def from_listing(cls, row: dict[str, Any]) -> ContractInfo:
        """Read a row of the broker's listing."""
        return cls(
            id=messages.id_of(row["id"]),
            name=row["name"],
            version=row["version"],
            deadline=row["deadline_us"] / 1e6,
            stateless=row["stateless"],
            workers=row["workers"],
            unit=row["unit"],
        )

    def __str__(self) -> str:
        return f"{self.name}@{self.version.partition('.')[0]}" if self.name else format_id(self.id)


def as_error(error: CallError) -> AbiError:
    """Return the answer of `call_host_contract` for a failed call."""
    return AbiError(error.code, error.message)


def raise_not_found(contract_id: int) -> NoReturn:
    """Raise for a contract that is not registered.

    Raises:
        HostContractNotFound: always.
    """
    error = errors.HostContractNotFound(f"host contract not found: contract_id={format_id(contract_id)}", began="no")
    error.contract_id = contract_id
    raise error


def raise_for(failure: messages.Failure, contract_id: int, fn_id: int) -> NoReturn:
    """Raise what a failed call deserves.

    Raises:
        CallError: the child that fits the code.
    """
    code = AbiErrorCode(failure.code)
    error_class = errors.ContractLoadFailed if failure.kind == "ContractLoadFailed" else call_error_class(code)
    began: errors.Began = "yes" if failure.began == "yes" else "no" if failure.began == "no" else "unknown"
    error = error_class(
        failure.message,
        code=code,
        began=began,
        signal=failure.signal,
        exit_code=failure.exit_code,
        limit=failure.limit or None,
        queued=failure.queued,
        ran=failure.ran,
        cpu=failure.cpu,
        state=failure.state or None,
        wchan=failure.wchan or None,
        retry_after=failure.retry_after,
    )
    if isinstance(error, errors.ContractNotFound):
        error.contract_id = contract_id
    if isinstance(error, errors.VmDispatchFailed):
        prefix = f"VM dispatch failed for contract_id={format_id(contract_id)} fn_id={fn_id}: "
        error.contract_id, error.fn_id, error.reason = contract_id, fn_id, failure.message.removeprefix(prefix)
    raise error


def raise_from_slot(code_number: int, text: bytes) -> NoReturn:
    """Raise what a contract answered with a code other than OK.

    Raises:
        CallError: the child that fits the code.
    """
    code = AbiErrorCode(code_number)
    raise call_error_class(code)(text.decode("utf-8", "replace") or code.name, code=code, began="yes")


def value_size(slot: Slot, contract_id: int, fn_id: int, answer: object) -> int:
    """Return how many bytes the answer to a call has in its slot.

    Raises:
        CallError: it is no value.
    """
    if isinstance(answer, messages.Failure):
        raise_for(answer, contract_id, fn_id)
    assert isinstance(answer, tuple)
    _, code, out_size, error_size, _ = answer
    if code != 0:
        raise_from_slot(code, slot.read(error_size))
    return int(out_size)


def raise_for_reply(reply: messages.Reply, contract_id: int) -> None:
    """Raise what a refused control request deserves; return when it was not refused.

    Raises:
        BridgeError: by the kind of the reply.
        CallError: by its code, where it has no such kind.
    """
    if not reply.kind:
        return
    if reply.kind == "DuplicateContract":
        raise errors.DuplicateContract(contract_id)
    if reply.kind == "ContractNotFound":
        raise errors.ContractNotFound(contract_id)
    if reply.kind == "TypeMismatch":
        raise errors.TypeMismatch.of_lua(contract_id, reply.reason)
    if reply.kind == "VmRegistrationFailed":
        raise errors.VmRegistrationFailed(contract_id, reply.reason)
    if reply.kind == "CrashNotFound":
        raise errors.CrashNotFound(reply.reason)
    code = AbiErrorCode(reply.code)
    raise call_error_class(code)(reply.reason, code=code, began="no")
