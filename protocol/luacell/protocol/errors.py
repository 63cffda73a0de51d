"""Every error luacell reports, split by whose fault it is.

    LuacellError
    ├── BridgeError                      the bridge was used in a way it cannot serve
    │   ├── DuplicateContract            the contract id is taken
    │   ├── ContractNotFound             no such contract is registered
    │   ├── TypeMismatch                 the implementation is no Lua function
    │   ├── VmRegistrationFailed         the implementation does not load
    │   ├── VmDispatchFailed             a registered contract no longer loads
    │   ├── BridgeNotInitialized         the runtime behind the bridge did not come up
    │   ├── CrashNotFound                no such crash is on record
    │   ├── BridgeClosed                 the bridge was closed
    │   └── BridgeForked                 the bridge belongs to the parent of this process
    ├── CallError                        a call got no value; one child per code
    │   ├── Generic, BufferTooSmall, Panic, NotFound, StaleHandle, FunctionNotAvailable,
    │   │   DuplicateProvider, InvalidPointer, ReentrantCall       polyplug's, from the contract or a handle
    │   ├── HostContractNotFound (also a ContractNotFound), HostContractVersionMismatch
    │   ├── HostContractCallFailed       the contract raised
    │   │   ├── ContractLoadFailed       (also a VmDispatchFailed)
    │   │   └── BadResult                it returned what is not of its declared type
    │   ├── DeadlineExceeded, WorkerCrashed, OutOfMemory                what befell the contract
    │   ├── Busy, Quarantined, Unavailable, Cancelled                   what befell the service
    │   └── Unauthorized, BadRequest, TooLarge                          what is wrong with the request
    ├── ApiError                         an api.toml is not right
    ├── ArgumentError                    a typed call was given a value that its contract does not take
    │   └── ArgumentTypeError, ArgumentValueError, ArgumentOverflowError         each also the built-in one
    └── ProtocolError                    a peer sent something that is not of this protocol

Codes below 256 and the texts of BridgeError are polyplug's, so that code written for its bridge reads the
same.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Final, Literal, Self

from luacell.protocol.identity import format_id

Began = Literal["no", "yes", "unknown"]

CONTRACT_CODE_MIN: Final = 1024  # from here on codes belong to contracts


class AbiErrorCode(IntEnum):
    """The code of an answer. polyplug's up to 102, luacell's own from 256, a contract's own from 1024."""

    OK = 0
    GENERIC = 1
    BUFFER_TOO_SMALL = 2
    PANIC = 3
    NOT_FOUND = 4
    STALE_HANDLE = 5
    FUNCTION_NOT_AVAILABLE = 6
    DUPLICATE_PROVIDER = 7
    INVALID_POINTER = 8
    REENTRANT_CALL = 9
    HOST_CONTRACT_NOT_FOUND = 100
    HOST_CONTRACT_VERSION_MISMATCH = 101
    HOST_CONTRACT_CALL_FAILED = 102
    DEADLINE_EXCEEDED = 256
    WORKER_CRASHED = 257
    OUT_OF_MEMORY = 258
    BUSY = 259
    QUARANTINED = 260
    UNAVAILABLE = 261
    UNAUTHORIZED = 262
    BAD_REQUEST = 263
    TOO_LARGE = 264
    CANCELLED = 265

    @classmethod
    def _missing_(cls, value: object) -> AbiErrorCode:
        """Keep a contract's own code; read any other unknown code as GENERIC, as polyplug does."""
        if not isinstance(value, int) or not CONTRACT_CODE_MIN <= value < 1 << 32:
            return cls.GENERIC
        member = int.__new__(cls, value)
        member._name_ = f"CONTRACT_{value}"
        member._value_ = value
        return member


class SupportedLanguage(IntEnum):
    """The languages of polyplug's runtimes."""

    RUST = 0
    CPP = 1
    DOTNET = 2
    PYTHON = 3
    LUA = 4
    JAVASCRIPT = 5


@dataclass(frozen=True, slots=True)
class AbiError:
    """The answer of `call_host_contract`: a code and, where it is not OK, what happened.

    Attributes:
        code: OK, or why there is no value.
        message: for people; empty when OK, never None.
    """

    code: AbiErrorCode
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether the call returned."""
        return self.code == AbiErrorCode.OK


class LuacellError(Exception):
    """The root of everything luacell raises on its own account."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by state: constructors here take facts and make the text of them."""
        return _restored, (type(self), self.args), self.__dict__


def _restored(cls: type[LuacellError], args: tuple[object, ...]) -> LuacellError:
    return cls.__new__(cls, *args)


class ProtocolError(LuacellError):
    """A message is not of this protocol; the text names the field, its value and the limit."""


class ApiError(LuacellError):
    """An api.toml is not right; where more than one thing is wrong, each has a line of the text.

    Attributes:
        filename: as the reader named it.
        line: from 1.
        column: in characters, from 1.
        reason: names the key or value, what is wrong, and where it helps what was probably meant.
        others: what else is wrong; line, column and reason are those of the first.
    """

    def __init__(self, filename: str, line: int, column: int, reason: str, others: tuple[ApiError, ...] = ()) -> None:
        super().__init__("\n".join((f"{filename}:{line}:{column}: {reason}", *map(str, others))))
        self.filename = filename
        self.line = line
        self.column = column
        self.reason = reason
        self.others = others


class ArgumentError(LuacellError):
    """A typed call was given a value that its contract does not take; nothing was sent.

    Attributes:
        function: contract and function, as in "host.logger@1.log".
        path: the parameter and the way into it, as in "items[3].x"; "" for the arguments as a whole.
        reason: the type, the value, and what is taken.
    """

    def __init__(self, function: str, path: str, reason: str) -> None:
        super().__init__(f"{function}: {path}: {reason}" if path else f"{function}: {reason}")
        self.function = function
        self.path = path
        self.reason = reason


class ArgumentTypeError(ArgumentError, TypeError):
    """The value is of the wrong kind."""


class ArgumentValueError(ArgumentError, ValueError):
    """The value is of the right kind, but none of those that are taken."""


class ArgumentOverflowError(ArgumentError, OverflowError):
    """The number is out of range."""


class BridgeError(LuacellError):
    """The bridge was asked for something it cannot do."""


class DuplicateContract(BridgeError):
    """A contract of this id is registered; the first one stays."""

    def __init__(self, contract_id: int) -> None:
        super().__init__(f"duplicate host contract registration: contract_id={format_id(contract_id)}")
        self.contract_id = contract_id


class ContractNotFound(BridgeError):
    """No contract of this id is registered."""

    def __init__(self, contract_id: int) -> None:
        super().__init__(f"host contract not found: contract_id={format_id(contract_id)}")
        self.contract_id = contract_id


class TypeMismatch(BridgeError):
    """The implementation is not what a host contract needs."""

    def __init__(self, contract_id: int, expected: str, got: str) -> None:
        super().__init__(
            f"implementation type mismatch for contract_id={format_id(contract_id)}: expected {expected}, got {got}"
        )
        self.contract_id = contract_id
        self.expected = expected
        self.got = got

    @classmethod
    def of_lua(cls, contract_id: int, reason: str) -> Self:
        """Return the error for a chunk that gives a wrong type, as a worker tells it.

        Args:
            contract_id: u64.
            reason: the type that it gives, behind "table " where the contract is typed and wants a table.
        """
        expected, _, got = reason.rpartition(" ")
        return cls(contract_id, f"Lua {expected or 'function'}", f"Lua {got}")


class VmRegistrationFailed(BridgeError):
    """The implementation does not load; nothing was registered."""

    def __init__(self, contract_id: int, reason: str) -> None:
        super().__init__(f"VM registration failed for contract_id={format_id(contract_id)}: {reason}")
        self.contract_id = contract_id
        self.reason = reason


class VmDispatchFailed(BridgeError):
    """A registered contract no longer loads, so that its calls cannot be dispatched."""

    def __init__(self, contract_id: int, fn_id: int, reason: str) -> None:
        super().__init__(f"VM dispatch failed for contract_id={format_id(contract_id)} fn_id={fn_id}: {reason}")
        self.contract_id = contract_id
        self.fn_id = fn_id
        self.reason = reason


class BridgeNotInitialized(BridgeError):
    """The runtime behind the bridge did not come up."""

    def __init__(self, runtime: str, reason: str = "") -> None:
        text = f"host runtime bridge not initialized for runtime={runtime}"
        super().__init__(f"{text}: {reason}" if reason else text)
        self.runtime = runtime
        self.reason = reason


class CrashNotFound(BridgeError):
    """No such crash is on record.

    Attributes:
        crash_id: as it was asked for.
    """

    def __init__(self, crash_id: str) -> None:
        super().__init__(f"crash {crash_id!r} is not on record, or no longer; `luacell crash ls` lists those that are")
        self.crash_id = crash_id


class BridgeClosed(BridgeError):
    """The bridge was closed and serves no more calls."""


class BridgeForked(BridgeError):
    """The bridge was made by the parent of this process; create or connect one after the fork."""


class CallError(LuacellError):
    """A call got no value.

    Attributes:
        code: why.
        message: for people.
        began: whether the contract had begun to run the call: "no", "yes" or "unknown".
        signal: the number of the signal that ended the worker, or None.
        exit_code: the worker's exit code where it exited, or None.
        limit: the bound that was hit, in words, or None.
        queued: seconds between arrival at the broker and hand-over to a worker, or None.
        ran: seconds between hand-over and the end, or None.
        cpu: seconds of CPU time that it took, up to 10 ms of calls right before it included, or None.
        state: of the worker's process while it ran the call, such as "R (running)" or "S (sleeping)", or None.
        wchan: the kernel's function in which that process waited, or None.
        retry_after: seconds after which another call may fare better, an estimate; or None.
    """

    CODE: ClassVar[AbiErrorCode] = AbiErrorCode.GENERIC

    def __init__(
        self,
        message: str,
        *,
        code: AbiErrorCode | None = None,
        began: Began = "unknown",
        signal: int | None = None,
        exit_code: int | None = None,
        limit: str | None = None,
        queued: float | None = None,
        ran: float | None = None,
        cpu: float | None = None,
        state: str | None = None,
        wchan: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        Exception.__init__(self, message)
        self.code = self.CODE if code is None else code
        self.message = message
        self.began = began
        self.signal = signal
        self.exit_code = exit_code
        self.limit = limit
        self.queued = queued
        self.ran = ran
        self.cpu = cpu
        self.state = state
        self.wchan = wchan
        self.retry_after = retry_after


class Generic(CallError):
    """An error with no code of its own, or with a code that belongs to the contract (see `.code`)."""


class BufferTooSmall(CallError):
    """The contract needs a larger out buffer."""

    CODE = AbiErrorCode.BUFFER_TOO_SMALL


class Panic(CallError):
    """The implementation gave up."""

    CODE = AbiErrorCode.PANIC


class NotFound(CallError):
    """The contract did not find what it was asked for."""

    CODE = AbiErrorCode.NOT_FOUND


class StaleHandle(CallError):
    """The handle names something that is gone."""

    CODE = AbiErrorCode.STALE_HANDLE


class FunctionNotAvailable(CallError):
    """The contract has no function of this id."""

    CODE = AbiErrorCode.FUNCTION_NOT_AVAILABLE


class DuplicateProvider(CallError):
    """There is another provider already."""

    CODE = AbiErrorCode.DUPLICATE_PROVIDER


class InvalidPointer(CallError):
    """A pointer or buffer that the function needs is absent."""

    CODE = AbiErrorCode.INVALID_POINTER


class ReentrantCall(CallError):
    """The call would wait for itself."""

    CODE = AbiErrorCode.REENTRANT_CALL


class HostContractNotFound(CallError, ContractNotFound):
    """No contract of this id is registered; `contract_id` is 0 until whoever made the call sets it."""

    CODE = AbiErrorCode.HOST_CONTRACT_NOT_FOUND
    contract_id = 0


class HostContractVersionMismatch(CallError):
    """The registered version does not serve the required one."""

    CODE = AbiErrorCode.HOST_CONTRACT_VERSION_MISMATCH


class HostContractCallFailed(CallError):
    """The contract raised an error."""

    CODE = AbiErrorCode.HOST_CONTRACT_CALL_FAILED


class ContractLoadFailed(HostContractCallFailed, VmDispatchFailed):
    """A registered contract no longer loads; its call was not begun.

    `contract_id`, `fn_id` and `reason` are empty until whoever made the call sets them.
    """

    contract_id = 0
    fn_id = 0
    reason = ""


class BadResult(HostContractCallFailed):
    """The contract returned what is not of its declared type."""


class DeadlineExceeded(CallError):
    """The call was not finished by its deadline."""

    CODE = AbiErrorCode.DEADLINE_EXCEEDED


class WorkerCrashed(CallError):
    """The worker that held the call died."""

    CODE = AbiErrorCode.WORKER_CRASHED


class OutOfMemory(CallError):
    """The contract ran into its memory limit."""

    CODE = AbiErrorCode.OUT_OF_MEMORY


class Busy(CallError):
    """A bound was hit (see `.limit`); the call was refused at once, and may fare better in `.retry_after` seconds."""

    CODE = AbiErrorCode.BUSY


class Quarantined(CallError):
    """The contract has crashed too often and rests for `.retry_after` seconds."""

    CODE = AbiErrorCode.QUARANTINED


class Unavailable(CallError):
    """The broker or its workers cannot be reached."""

    CODE = AbiErrorCode.UNAVAILABLE


class Unauthorized(CallError):
    """The host may not do this."""

    CODE = AbiErrorCode.UNAUTHORIZED


class BadRequest(CallError):
    """The request is malformed."""

    CODE = AbiErrorCode.BAD_REQUEST


class TooLarge(CallError):
    """A size is over its limit."""

    CODE = AbiErrorCode.TOO_LARGE


class Cancelled(CallError):
    """The call was withdrawn by its caller."""

    CODE = AbiErrorCode.CANCELLED


def _children(cls: type[CallError]) -> list[type[CallError]]:
    return [child for direct in cls.__subclasses__() for child in (direct, *_children(direct))]


_BY_CODE: Final = {child.CODE: child for child in reversed(_children(CallError))}


def call_error_class(code: AbiErrorCode) -> type[CallError]:
    """Return the exception class for a code; Generic where the code has none of its own."""
    return _BY_CODE.get(code, Generic)
