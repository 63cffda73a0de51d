"""Contracts for the plugins of a polyplug runtime in this process.

`provide` registers a contract of a bridge in the runtime; plugins find it there like any other, call it from any
thread, and cannot tell that it runs in a process of its own. It fills in the ABI's structures, and no exception leaves
its callbacks; the values are `guest_calls`' business. The `polyplug` extra brings what it needs.

    plugin ── function(instance, args, out, err) ──> Provided ──> Target ──> bridge ──> worker
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from contextlib import suppress
from types import ModuleType, TracebackType
from typing import Any, Final, Literal, Self

from luacell.client.arguments import Contract
from luacell.client.bridge import LuaHostBridge
from luacell.client.description import choose
from luacell.client.guest_calls import RawTarget, Sizes, Target, TypedTarget
from luacell.client.replies import ContractInfo
from luacell.protocol.errors import (
    CONTRACT_CODE_MIN,
    AbiErrorCode,
    BridgeClosed,
    CallError,
    DuplicateContract,
    HostContractNotFound,
    TypeMismatch,
)
from luacell.protocol.identity import ContractRef, Version, format_id

Dispatch = Literal["native", "vm"]

MESSAGE_MAX: Final = 8192  # bytes of an error text
SWEEP_MIN: Final = 64  # threads whose results are kept before those that have ended are looked for
_ABI_VERSION: Final = 1
_INTERFACE_SIZE: Final = 80  # bytes of a HostContractInterface
_ERROR: Final = struct.Struct("<IxxxxQQ")  # code, address and length of the text
_OK: Final = _ERROR.pack(0, 0, 0)
_CALL_FAILED: Final = int(AbiErrorCode.HOST_CONTRACT_CALL_FAILED)
_LUACELL_CODES: Final = range(256, CONTRACT_CODE_MIN)  # to a guest they would be another plugin's
_BROKEN_OFF: Final = ctypes.create_string_buffer(b"the call was broken off in the host")
_UNFINISHED: Final = _ERROR.pack(_CALL_FAILED, ctypes.addressof(_BROKEN_OFF), len(_BROKEN_OFF) - 1)


def provide(
    runtime: Any,
    bridge: LuaHostBridge,
    contract: Contract,
    *,
    dispatch: Dispatch = "native",
    sizes: Sizes | None = None,
    timeout: float | None = None,
) -> Provided:
    """Register a bridge's contract in a polyplug runtime.

    Args:
        runtime: a `polyplug.Runtime`, open.
        bridge: which serves the contract for as long as plugins call it.
        contract: `"host.svc@1"`, or with the least minor version that will do, `"host.svc@1.3"`; a u64 id or a
            HostContractId.
        dispatch: "native" is a table of functions, "vm" one entry for all of them; plugins take either.
        sizes: for a raw contract, bytes of args and of out by function id, such as `{0: (16, 8)}`; others tell theirs.
        timeout: seconds for a call; None is the contract's deadline, and the smaller of both holds.

    Returns:
        What answers the plugins; `close()` ends that.

    Raises:
        ImportError: polyplug is not installed, or is of another ABI.
        DuplicateContract: the runtime has a contract of this id.
        HostContractNotFound: the bridge has none.
        HostContractVersionMismatch: it has another version.
        TypeMismatch: a raw contract without `sizes`.
        ValueError, TypeError: an argument is malformed.
        Unavailable: the broker is gone.
    """
    abi = _abi()
    if not isinstance(bridge, LuaHostBridge):
        raise TypeError(f"polyplug's plugins wait for their results: a LuaHostBridge is needed, not {bridge!r}")
    if dispatch not in ("native", "vm"):
        raise ValueError(f"dispatch {dispatch!r} is neither 'native' nor 'vm'")
    info = _find(bridge, contract)
    target = _target(bridge, info, sizes, timeout)
    host = runtime.host
    if abi.HostApi.from_address(host).resolve_host_contract_interface(host, info.id, 0):
        raise DuplicateContract(info.id)  # before the runtime lets go of the first one, which it still points to
    provided = Provided(abi, target, info, dispatch)
    runtime.register_host_contract(provided.interface)
    return provided


def _abi() -> ModuleType:
    try:
        from polyplug_abi import abi
    except ImportError as error:
        raise ImportError("luacell.client.polyplug needs polyplug: pip install 'luacell[polyplug]'") from error
    version, size = abi.POLYPLUG_ABI_VERSION, ctypes.sizeof(abi.HostContractInterface)
    if version != _ABI_VERSION or size != _INTERFACE_SIZE:
        raise ImportError(
            f"polyplug_abi is of version {version}, with an interface of {size} bytes; luacell knows version "
            f"{_ABI_VERSION}, with {_INTERFACE_SIZE}: pip install 'luacell[polyplug]'"
        )
    module: ModuleType = abi
    return module


def _find(bridge: LuaHostBridge, contract: Contract) -> ContractInfo:
    """Return the registered contract that is meant."""
    ref, registered = ContractRef.of(contract), bridge.contracts()
    if ref.version is not None:
        return choose(ref.name, str(ref.version), registered)
    for info in registered:
        if info.id == ref.id:
            if not info.version:
                raise ValueError(f"contract {ref} was registered by its id alone: polyplug needs a version")
            return info
    raise HostContractNotFound(f"host contract not found: contract_id={format_id(ref.id)}", began="no")


def _target(bridge: LuaHostBridge, info: ContractInfo, sizes: Sizes | None, timeout: float | None) -> Target:
    try:
        shared = bridge._shared_of(info.id)
    except TypeMismatch:
        if sizes is None:
            expected = "a typed contract, or sizes of args and out by function id"
            raise TypeMismatch(info.id, expected, "a raw one without sizes") from None
        return RawTarget(str(info), info.id, bridge._call_typed, sizes, timeout)
    if sizes is not None:
        raise ValueError(f"{info} is a typed contract, whose sizes are known: give none")
    return TypedTarget(shared, bridge._call_typed, timeout)


class Provided:
    """A contract in a polyplug runtime.

    The runtime has no way to forget a contract: after `close()` plugins still find it, and all calls fail with 102.
    The runtime keeps the callbacks alive, for as long as it lives.

    Attributes:
        contract: as the bridge lists it.
        interface: the HostContractInterface that plugins get.
    """

    def __init__(self, abi: ModuleType, target: Target, info: ContractInfo, dispatch: Dispatch) -> None:
        self.contract = info
        self._target = target
        self._kept = _Kept()
        self._is_closed = False
        self.interface = self._make_interface(abi, Version.parse(info.version), dispatch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Provided {self.contract}, {'closed' if self._is_closed else 'open'}>"

    def close(self) -> None:
        """Refuse all further calls; those that run come to their end. Idempotent."""
        self._is_closed = True

    # -- the ABI's structures -------------------------------------------------------------------------------------
    def _make_interface(self, abi: ModuleType, version: Version, dispatch: Dispatch) -> Any:
        interface = abi.HostContractInterface()
        fields = dict(interface._fields_)
        interface.contract_id = self.contract.id
        interface.contract_version = abi.Version(version.major, version.minor, version.patch)
        interface.singleton = self._target.is_singleton
        create = fields["create_instance"](self._create)
        destroy = fields["destroy_instance"](self._destroy)
        interface.create_instance, interface.destroy_instance = create, destroy
        if dispatch == "vm":
            callbacks: list[Any] = [dict(abi.VmDispatch._fields_)["call"](self._vm_called)]
            interface.dispatch_type = int(abi.DispatchType.VirtualMachine)
            interface.dispatch.vm = abi.VmDispatch(callbacks[0], abi.VmLoaderData(None))
            table = None
        else:
            kind = ctypes.CFUNCTYPE(None, abi.HostContractInstance, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
            callbacks = [kind(self._native(fn_id)) for fn_id in range(self._target.function_count)]
            addresses = [ctypes.cast(callback, ctypes.c_void_p).value for callback in callbacks]
            table = (ctypes.c_void_p * len(callbacks))(*addresses)
            interface.dispatch_type = int(abi.DispatchType.Native)
            interface.dispatch.native = abi.NativeDispatch(len(callbacks), ctypes.addressof(table))
        interface._keepalive = (self, create, destroy, callbacks, table)
        return interface

    # -- callbacks ------------------------------------------------------------------------------------------------
    def _native(self, fn_id: int) -> Any:
        def called(instance: Any, args: int | None, out: int | None, error: int | None) -> None:
            self._called(instance.data or 0, fn_id, args or 0, out or 0, error or 0)

        return called

    def _vm_called(
        self,
        loader_data: Any,
        instance: Any,
        fn_id: int,
        args: int | None,
        out: int | None,
        arena: int | None,
        error: int | None,
    ) -> None:
        self._called(instance.data or 0, fn_id, args or 0, out or 0, error or 0)

    def _called(self, instance: int, fn_id: int, args: int, out: int, error: int) -> None:
        """Answer a call; whatever ends it, an interrupt too, the guest is told that it failed, or that it did not."""
        _tell(error, _UNFINISHED)
        try:
            if self._is_closed:
                raise BridgeClosed(f"{self.contract} is no longer provided")
            kept = self._target.call(instance, fn_id, args, out)
            self._kept.put(kept)  # what the thread had before, which args may lie in, goes only now
            _tell(error, _OK)
        except BaseException as failure:
            code, text = _failure(failure)
            memory = ctypes.create_string_buffer(text, len(text) or 1)
            self._kept.put(memory)
            _tell(error, _ERROR.pack(code, ctypes.addressof(memory), len(text)))

    def _create(self, interface: int | None, args: int | None, out: int | None) -> None:
        """Write the handle of an instance; 0 (NULL) is a failure."""
        if not out:
            return
        place = ctypes.c_uint64.from_address(out)
        place.value = 0
        try:
            place.value = self._target.create()
        except BaseException:
            place.value = 0

    def _destroy(self, interface: int | None, instance: Any) -> None:
        try:
            self._target.destroy(instance.data or 0)
        except BaseException:
            return


def _tell(place: int, error: bytes) -> None:
    if place:
        ctypes.memmove(place, error, _ERROR.size)


def _failure(failure: BaseException) -> tuple[int, bytes]:
    """Return the code and the text that a guest gets."""
    if isinstance(failure, CallError):
        code, text = int(failure.code), failure.message
        if code in _LUACELL_CODES:
            code, text = _CALL_FAILED, f"{failure.code.name} ({code}): {text}"
    else:
        code, text = _CALL_FAILED, f"{type(failure).__name__}: {failure}"
    return code, text.encode("utf-8", "backslashreplace")[:MESSAGE_MAX].decode("utf-8", "ignore").encode()


class _Kept:
    """What guests have been lent, by thread: it lives until the thread's next call.

    Not a `threading.local`: that of a thread which Python did not start ends with each callback. There is one entry
    for each thread that lives, and for as many as SWEEP_MIN, or as live, that have ended.
    """

    def __init__(self) -> None:
        self._by_thread: dict[int, object] = {}
        self._lock = threading.Lock()
        self._sweep_at = SWEEP_MIN

    def put(self, memory: object) -> None:
        """Keep what this thread has been lent, in place of what it had."""
        thread = threading.get_native_id()
        if thread not in self._by_thread:
            with self._lock:
                if len(self._by_thread) >= self._sweep_at:
                    self._sweep()
                self._by_thread[thread] = memory
        else:
            self._by_thread[thread] = memory

    def _sweep(self) -> None:
        with suppress(OSError):  # no descriptor is free; another time, then
            alive = set(map(int, os.listdir("/proc/self/task")))
            for thread in [each for each in self._by_thread if each not in alive]:
                del self._by_thread[thread]
        self._sweep_at = max(SWEEP_MIN, 2 * len(self._by_thread))
