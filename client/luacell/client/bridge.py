"""LuaHostBridge: register Lua host contracts and call them, each in a process of its own.

It checks what it is given and says what is asked for; how calls are made is `calls`' business, the connection the
session's. Safe from any thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from luacell.client.calls import Calls
from luacell.client.deployment import Deployment
from luacell.client.embedded import EmbeddedService
from luacell.client.endpoint import inline_address_of, run_directory_of
from luacell.client.function import LuaFunction
from luacell.client.inline import InlineCalls, InlineSession
from luacell.client.replies import Buffer, ContractInfo, as_error, raise_for_reply
from luacell.client.scratch import ScratchVm, implementation
from luacell.client.session import Session
from luacell.protocol import messages
from luacell.protocol.errors import (
    AbiError,
    AbiErrorCode,
    BridgeClosed,
    BridgeError,
    BridgeForked,
    CallError,
    SupportedLanguage,
    TooLarge,
    TypeMismatch,
)
from luacell.protocol.identity import FN_ID_MAX, ContractRef, HostContractId
from luacell.protocol.limits import DEADLINE_MAX_US, PAYLOAD_MAX, SPARES_MAX, US_PER_S
from luacell.protocol.messages import Settings, id_bytes

Contract = int | str | HostContractId

_IDS_MAX: Final = 4096  # contract names whose id is remembered


class LuaHostBridge:
    """A bridge to Lua host contracts.

    `LuaHostBridge()` runs a private service and ends it with `close()`; `LuaHostBridge.connect()` uses a running one.
    Use it in a `with` statement. Two embedded bridges share nothing.

    Raises:
        BridgeNotInitialized: the embedded service did not come up.
    """

    def __init__(self) -> None:
        self._embed(spares=1)

    @classmethod
    def with_capacity(cls, capacity: int) -> Self:
        """Return an embedded bridge that keeps `capacity` VMs warm.

        Raises:
            ValueError: `capacity` is outside 0..64.
            BridgeNotInitialized: the embedded service did not come up.
        """
        if not 0 <= capacity <= SPARES_MAX:
            raise ValueError(f"capacity {capacity} is outside 0..{SPARES_MAX}")
        bridge = cls.__new__(cls)
        bridge._embed(spares=capacity)
        return bridge

    @classmethod
    def connect(cls, endpoint: str | os.PathLike[str] | None = None) -> Self:
        """Return a bridge to a running broker.

        Args:
            endpoint: its run directory, or `ipc://` and that; without shared memory `tcp://127.0.0.1:PORT`, or
                `ipc+inline://` and the run directory; None takes `$LUACELL_ENDPOINT`, else the default place.

        Raises:
            Unavailable: nobody serves there.
            ValueError: the endpoint is malformed.
        """
        bridge = cls.__new__(cls)
        bridge._open(None, inline_address_of(endpoint) or run_directory_of(endpoint))
        return bridge

    def _embed(self, spares: int) -> None:
        service = EmbeddedService(spares)
        try:
            self._open(service, service.run_directory)
        except BaseException:
            service.stop()
            raise

    def _open(self, service: EmbeddedService | None, place: Path | str) -> None:
        self._session: Session
        self._calls: Calls | InlineCalls
        if isinstance(place, str):
            self._session = session = InlineSession.reach(place)
            self._calls = InlineCalls(session)
        else:
            self._session = Session.connect(place)
            self._calls = Calls(self._session)
        self._service = service
        self._state: type[BridgeError] | None = None
        self._ids: dict[str, int] = {}
        self._scratch_lock = threading.Lock()
        self._scratch: ScratchVm | None = None
        self._finalizer = weakref.finalize(self, _clean_up, self._session, self._calls, service, os.getpid())
        _bridges.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = "connected" if self._service is None else "embedded"
        state = "open" if self._state is None else self._state.__name__
        return f"<{type(self).__name__} {kind} {state} broker_pid={self._session.broker_pid}>"

    def close(self) -> None:
        """Leave the broker, and end it where it is this bridge's own. Idempotent; running calls get Unavailable."""
        if self._state is BridgeForked:
            return
        self._state = BridgeClosed
        self._finalizer()
        _bridges.discard(self)

    # -- contracts ------------------------------------------------------------------------------------------------
    def register_host_contract(self, contract: Contract, implementation: LuaFunction, *, replace: bool = False) -> None:
        """Register a contract; it has been loaded in a worker when this returns.

        Args:
            contract: a u64 id, `"host.name@1"`, `"host.name@1.2.0"` or a HostContractId.
            implementation: the Lua function.
            replace: take the place of a registered contract without a failed call.

        Raises:
            TypeMismatch: `implementation` is no LuaFunction, or its chunk gives no function.
            DuplicateContract: the id is taken; the first contract stays.
            VmRegistrationFailed: it does not parse, raises, crashes or hangs while it loads.
            Unavailable: the broker is gone.
        """
        self._check()
        ref = ContractRef.of(contract)
        if not isinstance(implementation, LuaFunction):
            raise TypeMismatch(ref.id, "LuaFunction", type(implementation).__name__)
        self._register(ref, implementation, Settings(), {}, replace=replace)

    def unregister_host_contract(self, contract: Contract) -> None:
        """Remove a contract: its running calls end, queued ones fail with code 100.

        Raises:
            ContractNotFound: there is none.
        """
        ref = ContractRef.of(contract)
        self._request(
            lambda number: messages.Unregister(request_id=number, contract=id_bytes(ref.id)),
            contract_id=ref.id,
        )
        self._calls.memory.forget(ref.id)

    def contracts(self) -> list[ContractInfo]:
        """Return the registered contracts in order of id."""
        found: list[ContractInfo] = []
        while True:
            first = len(found)
            body = self._request(lambda number: messages.List(request_id=number, first=first)).body  # noqa: B023
            found.extend(ContractInfo.from_listing(row) for row in body["contracts"])
            if len(found) >= body["total"] or not body["contracts"]:
                return found

    def deploy(self, directory: str | os.PathLike[str]) -> list[str]:
        """Register all contracts of a directory with a `luacell.toml`, or none.

        Returns:
            The names of the contracts, as `host.name@major`.

        Raises:
            DeploymentError: the directory or its `luacell.toml` is not right; names file, table and key.
            BridgeError: a contract does not load, or its id is taken.
        """
        self._check()
        deployment = Deployment.read(Path(directory))
        done: list[ContractRef] = []
        try:
            for unit in deployment.units:
                self._register(unit.ref, unit.function, unit.settings, deployment.modules, replace=False)
                done.append(unit.ref)
        except BaseException:
            for ref in done:
                with contextlib.suppress(BridgeError, CallError):
                    self.unregister_host_contract(ref.id)
            raise
        return [str(ref) for ref in done]

    def _register(
        self,
        ref: ContractRef,
        function: LuaFunction,
        settings: Settings,
        modules: dict[str, bytes],
        *,
        replace: bool,
        private: bool = False,
    ) -> None:
        version = ref.version
        packed = version.major << 32 | version.minor << 16 | version.patch if version is not None else 0
        self._request(
            lambda number: messages.Register(
                request_id=number,
                contract=id_bytes(ref.id),
                name=ref.name,
                version=packed,
                source=function.source,
                chunk_name=function.chunk_name or f"={ref}",
                modules=modules,
                replace=replace,
                private=private,
                **settings.as_fields(),
            ),
            contract_id=ref.id,
        )
        if replace:
            self._calls.memory.forget(ref.id)

    # -- calls ----------------------------------------------------------------------------------------------------
    def call_host_contract(
        self,
        contract: Contract,
        fn_id: int,
        args: Buffer | None,
        out: Buffer | None,
        *,
        timeout: float | None = None,
    ) -> AbiError:
        """Call a function of a contract the way polyplug's bridge does; never raises for what a contract does.

        Args:
            contract: a u64 id, `"host.name@1"` or a HostContractId.
            fn_id: u32.
            args: bytes the function reads, or None (NULL).
            out: writable buffer that is filled on success and untouched otherwise, or None (NULL).
            timeout: seconds, over 0 and at most 60; None is the contract's deadline, and the smaller of both holds.

        Returns:
            Code and message; `.ok` when the function returned.

        Raises:
            BridgeClosed, BridgeForked: the bridge cannot be used.
            ValueError, TypeError: an argument is malformed.
        """
        try:
            target = None if out is None else memoryview(out).cast("B")
            if target is not None and target.readonly:
                raise TypeError(f"out must be a writable buffer, not {type(out).__name__}")
            source = args if args is None or type(args) is bytes else memoryview(args).cast("B")
            self._call(contract, fn_id, source, target, 0 if target is None else target.nbytes, timeout)
        except CallError as error:
            return as_error(error)
        return AbiError(AbiErrorCode.OK)

    def call(
        self,
        contract: Contract,
        fn_id: int,
        args: Buffer | None = b"",
        out_size: int = 0,
        *,
        out: Buffer | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """Call a function of a contract and return what it wrote.

        Args:
            contract: a u64 id, `"host.name@1"` or a HostContractId.
            fn_id: u32.
            args: bytes the function reads; empty or None is NULL.
            out_size: bytes the function may write; 0 is NULL.
            out: a writable buffer to fill in place of returning bytes; its size is then the out size.
            timeout: seconds, over 0 and at most 60; None is the contract's deadline, and the smaller of both holds.

        Returns:
            `out_size` bytes (zero where the function wrote nothing), or `b""` with `out`.

        Raises:
            CallError: one child per code; `.began` says whether the function was entered.
            BridgeClosed, BridgeForked: the bridge cannot be used.
            ValueError, TypeError: an argument is malformed.
        """
        if type(args) is bytes and type(contract) is str and out is None and timeout is None and self._state is None:
            contract_id = self._ids.get(contract)  # what happens most, without the detours
            if (
                contract_id is not None
                and type(fn_id) is int
                and 0 <= fn_id <= FN_ID_MAX
                and 0 <= out_size <= PAYLOAD_MAX
                and len(args) <= PAYLOAD_MAX
            ):
                return self._calls.call(contract_id, fn_id, args or None, None, out_size, 0)
        target = None if out is None else memoryview(out).cast("B")
        if target is not None and target.readonly:
            raise TypeError(f"out must be a writable buffer, not {type(out).__name__}")
        source = args if args is None or type(args) is bytes else memoryview(args).cast("B")
        if source is not None and not len(source):
            source = None
        return self._call(contract, fn_id, source, target, out_size if target is None else target.nbytes, timeout)

    def _call(
        self,
        contract: Contract,
        fn_id: int,
        args: bytes | memoryview | None,
        out: memoryview | None,
        out_size: int,
        timeout: float | None,
    ) -> bytes:
        if self._state is not None:
            self._check()
        contract_id = self._ids.get(contract) if type(contract) is str else None
        if contract_id is None:
            contract_id = self._resolve(contract)
        if type(fn_id) is not int or not 0 <= fn_id <= FN_ID_MAX:
            raise ValueError(f"fn_id {fn_id!r} is no integer in 0..2**32-1")
        if not 0 <= out_size <= PAYLOAD_MAX or (args is not None and len(args) > PAYLOAD_MAX):
            _check_sizes(0 if args is None else len(args), out_size)
        timeout_us = 0 if timeout is None else _microseconds(timeout)
        return self._calls.call(contract_id, fn_id, args, out, out_size, timeout_us)

    def _resolve(self, contract: Contract) -> int:
        """Return the id of a contract; hashing a name takes longer than anything else here, so it is remembered."""
        contract_id = ContractRef.of(contract).id
        if isinstance(contract, str) and len(self._ids) < _IDS_MAX:
            self._ids[contract] = contract_id
        return contract_id

    # -- the rest -------------------------------------------------------------------------------------------------
    def health(self) -> dict[str, Any]:
        """Return how the service is: version, hosts, contracts, workers (pid, contract, state), queues, deaths."""
        return dict(self._request(lambda number: messages.Health(request_id=number)).body)

    def runtime_type(self) -> SupportedLanguage:
        """Return SupportedLanguage.LUA."""
        return SupportedLanguage.LUA

    def lua(self) -> ScratchVm:
        """Return access to this bridge's scratch VM, in a worker of its own."""
        self._check()
        with self._scratch_lock:
            if self._scratch is None:
                scratch_id = int.from_bytes(os.urandom(8), "little")
                self._register(ContractRef(scratch_id), implementation(), Settings(), {}, replace=False, private=True)
                self._scratch = ScratchVm(lambda args, size: self.call(scratch_id, 0, args, size))
        return self._scratch

    def _request(self, make: Callable[[int], messages.Message], contract_id: int = 0) -> messages.Reply:
        self._check()
        answer = self._session.request(make).answer
        assert isinstance(answer, messages.Reply)
        raise_for_reply(answer, contract_id)
        return answer

    def _check(self) -> None:
        if self._state is not None:
            if self._state is BridgeForked:
                raise BridgeForked("this bridge belongs to the parent process; create or connect one after the fork")
            raise BridgeClosed("this bridge was closed; create or connect another one")

    def _leave_in_child(self) -> None:
        self._state = BridgeForked
        self._finalizer.detach()
        self._session.leave_in_child()
        self._calls.memory.leave_in_child()


_bridges: weakref.WeakSet[LuaHostBridge] = weakref.WeakSet()


def _clean_up(session: Session, calls: Calls | InlineCalls, service: EmbeddedService | None, owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return
    session.close()
    with session.lock:
        calls.close()
    if service is not None:
        service.stop()


def _leave_all_in_child() -> None:
    for bridge in list(_bridges):
        bridge._leave_in_child()


os.register_at_fork(after_in_child=_leave_all_in_child)


def _check_sizes(args_size: int, out_size: int) -> None:
    if out_size < 0:
        raise ValueError(f"out_size {out_size} is negative")
    name, size = ("args", args_size) if args_size > PAYLOAD_MAX else ("out", out_size)
    raise TooLarge(
        f"{name} of {size} bytes is over the limit of {PAYLOAD_MAX}", began="no", limit=f"{PAYLOAD_MAX} bytes"
    )


def _microseconds(timeout: float | None) -> int:
    if timeout is None:
        return 0
    if not 0 < timeout <= DEADLINE_MAX_US / US_PER_S:
        raise ValueError(f"timeout {timeout!r} s is not over 0 and at most {DEADLINE_MAX_US // US_PER_S} s")
    return max(1, int(timeout * US_PER_S))
