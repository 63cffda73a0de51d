"""What hosts use: bridges to Lua host contracts, and the errors they raise.

from luacell.client import LuaFunction, LuaHostBridge

with LuaHostBridge() as bridge:
bridge.register_host_contract("host.echo@1", LuaFunction(source))
reply = bridge.call("host.echo@1", 0, b"hello", 5)
"""

from luacell.client.async_bridge import AsyncLuaHostBridge
from luacell.client.bridge import LuaHostBridge
from luacell.client.crashes import Crash, CrashInfo
from luacell.client.deployment import DeploymentError
from luacell.client.function import LuaFunction
from luacell.client.replies import ContractInfo
from luacell.client.scratch import AsyncScratchVm, ScratchVm
from luacell.client.units import NotDeployed
from luacell.protocol.errors import (
    AbiError,
    AbiErrorCode,
    BadRequest,
    BridgeClosed,
    BridgeError,
    BridgeForked,
    BridgeNotInitialized,
    BufferTooSmall,
    Busy,
    CallError,
    Cancelled,
    ContractLoadFailed,
    ContractNotFound,
    CrashNotFound,
    DeadlineExceeded,
    DuplicateContract,
    DuplicateProvider,
    FunctionNotAvailable,
    Generic,
    HostContractCallFailed,
    HostContractNotFound,
    HostContractVersionMismatch,
    InvalidPointer,
    LuacellError,
    NotFound,
    OutOfMemory,
    Panic,
    ProtocolError,
    Quarantined,
    ReentrantCall,
    StaleHandle,
    SupportedLanguage,
    TooLarge,
    TypeMismatch,
    Unauthorized,
    Unavailable,
    VmDispatchFailed,
    VmRegistrationFailed,
    WorkerCrashed,
)
from luacell.protocol.identity import GuestContractId, HostContractId

__all__ = [
    "AbiError",
    "AbiErrorCode",
    "AsyncLuaHostBridge",
    "AsyncScratchVm",
    "BadRequest",
    "BridgeClosed",
    "BridgeError",
    "BridgeForked",
    "BridgeNotInitialized",
    "BufferTooSmall",
    "Busy",
    "CallError",
    "Cancelled",
    "ContractInfo",
    "ContractLoadFailed",
    "ContractNotFound",
    "Crash",
    "CrashInfo",
    "CrashNotFound",
    "DeadlineExceeded",
    "DeploymentError",
    "DuplicateContract",
    "DuplicateProvider",
    "FunctionNotAvailable",
    "Generic",
    "GuestContractId",
    "HostContractCallFailed",
    "HostContractId",
    "HostContractNotFound",
    "HostContractVersionMismatch",
    "InvalidPointer",
    "LuaFunction",
    "LuaHostBridge",
    "LuacellError",
    "NotDeployed",
    "NotFound",
    "OutOfMemory",
    "Panic",
    "ProtocolError",
    "Quarantined",
    "ReentrantCall",
    "ScratchVm",
    "StaleHandle",
    "SupportedLanguage",
    "TooLarge",
    "TypeMismatch",
    "Unauthorized",
    "Unavailable",
    "VmDispatchFailed",
    "VmRegistrationFailed",
    "WorkerCrashed",
]
