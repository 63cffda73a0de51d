"""LuaHostBridge: register Lua host contracts and call them, each in a process of its own.

It checks what it is given and says what is asked for; how calls are made is `calls`' business, the connection the
session's. Safe from any thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from luacell.client.arguments import Arguments, Contract, Names, checked_capacity, without_emptiness
from luacell.client.calls import Calls
from luacell.client.crashes import Crash, CrashInfo, listing_crashes, reading_crash
from luacell.client.deployment import Deployment
from luacell.client.description import Description, Shared, TypedContracts, choose
from luacell.client.embedded import EmbeddedService
from luacell.client.function import LuaFunction
from luacell.client.interrupts import uninterrupted
from luacell.client.lifecycle import Bridge
from luacell.client.link import Budget, Link, Place, may_look_again, place_of
from luacell.client.proxy import destruction, make_proxy
from luacell.client.replies import Buffer, ContractInfo, as_error, raise_for_reply
from luacell.client.requests import (
    Listing,
    Request,
    checked_function,
    description,
    health,
    random_id,
    registration,
    revival,
    unregistration,
)
from luacell.client.scratch import ATTEMPTS, ScratchVm, implementation
from luacell.client.units import Questions, deploying, undeploying
from luacell.protocol import messages
from luacell.protocol.errors import (
    AbiError,
    AbiErrorCode,
    BridgeClosed,
    BridgeForked,
    CallError,
    DuplicateContract,
    HostContractNotFound,
    Unavailable,
)
from luacell.protocol.identity import FN_ID_MAX, ContractRef
from luacell.protocol.limits import PAYLOAD_MAX

if TYPE_CHECKING:
    from luacell.client.inline import InlineCalls

T = TypeVar("T")


class LuaHostBridge(Bridge):
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
        checked_capacity(capacity)
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
        bridge._open(place_of(endpoint))
        return bridge

    def _embed(self, spares: int) -> None:
        service = EmbeddedService(spares)
        try:
            self._open(Place(service.run_directory, service))
        except BaseException:
            service.stop()
            raise

    def _open(self, place: Place) -> None:
        self._link = Link(place)
        self._names = Names()
        self._ids = self._names.ids
        self._typed = TypedContracts()
        self._dropped = self._typed.dropped.notes
        self._scratch_lock = threading.Lock()
        self._scratch: ScratchVm | None = None
        self._finalizer: weakref.finalize[..., object] = weakref.finalize(self, _clean_up, self._link, os.getpid())
        self._joined()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return self._described(self._link.calls.session.broker_pid)

    def _way(self) -> Link:
        return self._link

    def close(self) -> None:
        """Leave the broker, and end it where it is this bridge's own. Idempotent; running calls get Unavailable."""
        if self._state is BridgeForked:
            return
        self._parted(BridgeClosed)
        self._finalizer()

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
        function = checked_function(ref, implementation)
        self._request(registration(ref, function, replace=replace), ref.id)
        if replace:
            self._link.calls.forget(ref.id)

    def unregister_host_contract(self, contract: Contract) -> None:
        """Remove a contract: its running calls end, queued ones fail with code 100.

        Raises:
            ContractNotFound: there is none.
        """
        ref = ContractRef.of(contract)
        self._request(unregistration(ref.id), ref.id)
        self._link.calls.forget(ref.id)

    def revive(self, contract: Contract) -> bool:
        """End a contract's quarantine, and the wait for its next load after a failed one.

        Returns:
            Whether it rested.

        Raises:
            ContractNotFound: there is none.
        """
        ref = ContractRef.of(contract)
        reply = self._request(revival(ref.id), ref.id)
        return bool(reply.body["was_resting"])

    def contracts(self) -> list[ContractInfo]:
        """Return the registered contracts in order of id."""
        listing = Listing()
        while not listing.is_complete:
            listing.add(self._request(listing.request))
        return listing.found

    def crashes(self) -> list[CrashInfo]:
        """Return what calls have crashed their workers lately, ran out of time or of memory, newest first.

        Raises:
            Unauthorized: the bridge is connected over TCP; records hold the arguments of others' calls.
        """
        return self._follow(listing_crashes())

    def crash(self, crash_id: str) -> Crash:
        """Return one of them with its arguments, and with the sources that its worker had loaded.

        Raises:
            CrashNotFound: it is not on record, or no longer.
            Unauthorized: as `crashes`.
        """
        return self._follow(reading_crash(crash_id))

    def deploy(self, directory: str | os.PathLike[str]) -> list[str]:
        """Register all contracts of a directory with a `luacell.toml`, or none, in place of what it was before.

        All of them are served from one moment on; calls in flight end on what they began on, and none fails for it.

        Returns:
            The names of the contracts, as `host.name@major`.

        Raises:
            DeploymentError: the directory or its `luacell.toml` is not right (names file, table and key), requires
                what is not there, or is no successor of what is deployed (names both versions).
            DuplicateContract: an id is taken by a contract that did not come from this unit.
            BridgeError: a contract does not load.
        """
        self._check()
        deployment = Deployment.read(Path(directory))
        return self._named(self._follow(deploying(deployment)))

    def undeploy(self, unit: str | os.PathLike[str]) -> list[str]:
        """Remove all contracts of a unit; as `unregister_host_contract` for each.

        Args:
            unit: its name, or else its directory.

        Returns:
            The names of the contracts, as `host.name@major`.

        Raises:
            NotDeployed: there is no such unit.
            DeploymentError: another unit requires one of its contracts; names both.
        """
        self._check()
        return self._named(self._follow(undeploying(unit)))

    def _named(self, changed: list[ContractRef]) -> list[str]:
        """Forget what was known of contracts that have changed, and return their names."""
        for ref in changed:
            self._link.calls.forget(ref.id)
        return [str(ref) for ref in changed]

    def _follow(self, questions: Questions[T]) -> T:
        """Ask what is to be asked, and return what came of it."""
        try:
            question = next(questions)
            while True:
                try:
                    reply = self._request(*question)
                except BaseException as error:
                    question = questions.throw(error)
                else:
                    question = questions.send(reply)
        except StopIteration as end:
            result: T = end.value
            return result

    def contract(self, name: str, min_version: str | None = None, *, types: Iterable[type[Any]] = ()) -> Any:
        """Return a proxy of a typed contract: an object whose methods are the contract's functions.

        Args:
            name: `host.svc`, or with a version `host.svc@1`.
            min_version: the least version that will do, such as "1.3"; None for any.
            types: classes for its structs and enums, by name, as `luacell stubs` writes them; made where not given.

        Returns:
            The proxy. It has an instance of its own, made when it is first called, unless the contract is a singleton.
            `with_options(timeout=…, views=True)` gives one of the same instance whose calls have a timeout, and whose
            results have memoryviews in place of bytes.

        Raises:
            HostContractNotFound: nothing of that name is registered.
            HostContractVersionMismatch: what is registered is of another major version, or older.
            TypeMismatch: it is a raw contract.
            ValueError: a version is malformed.
            TypeError: a class is not what the contract has under its name.
        """
        return make_proxy(self._shared(name, min_version, types), self._call_typed)

    def describe(self, name: str, min_version: str | None = None) -> Description:
        """Return what the broker tells of a typed contract: its api.toml, Python types and packers.

        Args and Raises: as `contract` has them.
        """
        return self._shared(name, min_version).description

    def _shared(self, name: str, min_version: str | None, types: Iterable[type[Any]] = ()) -> Shared:
        self._check()
        info = choose(name, min_version, self.contracts())
        return self._shared_of(info.id, types)

    def _shared_of(self, contract_id: int, types: Iterable[type[Any]] = ()) -> Shared:
        return self._typed.of(contract_id, self._request(description(contract_id), contract_id).body, types)

    def _call_typed(self, contract_id: int, fn_id: int, args: bytes, out_size: int, timeout: float | None) -> bytes:
        if timeout is not None or self._state is not None or len(args) > PAYLOAD_MAX:
            return self.call(contract_id, fn_id, args, out_size, timeout=timeout)
        if self._dropped:  # as `call`, of what packers and descriptions have checked
            self._destroy_dropped()
        calls = self._link.calls
        try:
            return calls.call(contract_id, fn_id, args or None, None, out_size, 0)
        except CallError as error:
            return self._after(error, calls, Arguments(contract_id, fn_id, args or None, None, out_size, 0))

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
            self._call(self._names.check(contract, fn_id, args, out, 0, timeout))
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
        if self._dropped:
            self._destroy_dropped()
        if type(args) is bytes and type(contract) is str and out is None and timeout is None and self._state is None:
            contract_id = self._ids.get(contract)  # what happens most, without the detours
            if (
                contract_id is not None
                and type(fn_id) is int
                and 0 <= fn_id <= FN_ID_MAX
                and type(out_size) is int
                and 0 <= out_size <= PAYLOAD_MAX
                and len(args) <= PAYLOAD_MAX
            ):
                calls = self._link.calls
                try:
                    return calls.call(contract_id, fn_id, args or None, None, out_size, 0)
                except CallError as error:
                    return self._after(error, calls, Arguments(contract_id, fn_id, args or None, None, out_size, 0))
        if self._state is not None:
            self._check()
        return self._call(self._names.check(contract, fn_id, without_emptiness(args), out, out_size, timeout))

    def _destroy_dropped(self) -> None:
        """Have instances destroyed whose proxies are gone; nobody waits for that."""
        dropped = self._typed.dropped
        taken = dropped.take()
        if not taken or self._state is not None:
            return
        with contextlib.suppress(Unavailable):  # where the broker is gone, they are
            if not self._link.calls.post(*destruction(taken)):
                dropped.put_back(taken)

    def _call(self, arguments: Arguments) -> bytes:
        if self._state is not None:
            self._check()
        calls = self._link.calls
        try:
            return calls.call(*arguments)
        except CallError as error:
            return self._after(error, calls, arguments)

    def _after(self, error: CallError, calls: Calls | InlineCalls, arguments: Arguments) -> bytes:
        """A call has failed: where it found the broker gone and was never sent, look for the broker and call again.

        Raises:
            CallError: it failed for another reason, or again.
            BridgeClosed: the bridge was closed meanwhile.
        """
        place = self._link.place
        place.read_log()
        budget = Budget.of(arguments, place)
        while isinstance(error, Unavailable) and may_look_again(error, calls.session.is_open):
            self._check()
            calls = self._renew(calls, budget)
            try:
                return calls.call(*arguments._replace(timeout_us=budget.left_us()))
            except Unavailable as again:
                error = again
        raise error

    def _renew(self, lost: Calls | InlineCalls, budget: Budget) -> Calls | InlineCalls:
        """Return the calls of another session than the lost one."""
        return uninterrupted(lambda: self._link.renew(lost, budget.until_s), is_within=lost.session.is_within())

    # -- the rest -------------------------------------------------------------------------------------------------
    def health(self) -> dict[str, Any]:
        """Return how the service is: version, hosts, contracts, workers (pid, contract, state), queues, deaths."""
        return dict(self._request(health).body)

    def lua(self) -> ScratchVm:
        """Return access to this bridge's scratch VM, in a worker of its own."""
        self._check()
        with self._scratch_lock:
            if self._scratch is None:
                scratch_id = random_id()
                self._register_scratch(scratch_id)
                self._scratch = ScratchVm(lambda args, size: self._call_scratch(scratch_id, args, size))
        return self._scratch

    def _register_scratch(self, scratch_id: int) -> None:
        self._request(registration(ContractRef(scratch_id), implementation(), private=True), scratch_id)

    def _call_scratch(self, scratch_id: int, args: bytes, size: int) -> bytes:
        """Call the scratch VM; it is private to a session, so that a new session needs a new one."""
        for _ in range(ATTEMPTS):
            try:
                return self.call(scratch_id, 0, args, size)
            except HostContractNotFound:
                with contextlib.suppress(DuplicateContract):  # another thread has done it
                    self._register_scratch(scratch_id)
        return self.call(scratch_id, 0, args, size)

    def _request(self, make: Request, contract_id: int = 0) -> messages.Reply:
        self._check()
        if self._dropped:
            self._destroy_dropped()
        link, budget = self._link, Budget()
        link.place.read_log()
        calls = link.calls
        while True:
            try:
                answer = calls.session.request(make).answer
            except Unavailable as error:
                link.place.read_log()
                if not may_look_again(error, calls.session.is_open):
                    raise
            else:
                break
            self._check()
            calls = self._renew(calls, budget)
        assert isinstance(answer, messages.Reply)
        raise_for_reply(answer, contract_id)
        return answer


def _clean_up(link: Link, owner_pid: int) -> None:
    if os.getpid() == owner_pid:
        link.close()
