"""AsyncLuaHostBridge: LuaHostBridge for an event loop, every method awaitable.

It has no thread of its own either: the loop reads. Only what would hold the loop up (starting and ending the embedded
service, connecting, copies of a megabyte and more) is done in a thread of the loop's executor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from luacell.client.arguments import Arguments, Contract, Names, checked_capacity, without_emptiness
from luacell.client.async_link import AsyncLink
from luacell.client.crashes import Crash, CrashInfo, listing_crashes, reading_crash
from luacell.client.deployment import Deployment
from luacell.client.description import Description, Shared, TypedContracts, choose
from luacell.client.embedded import EmbeddedService
from luacell.client.endpoint import inline_address_of, run_directory_of
from luacell.client.function import LuaFunction
from luacell.client.lifecycle import Bridge
from luacell.client.link import Budget, Place, may_look_again
from luacell.client.proxy import destruction, make_async_proxy
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
from luacell.client.scratch import ATTEMPTS, AsyncScratchVm, implementation
from luacell.client.threads import done_in_thread, made_in_thread, uncancelled
from luacell.client.units import Questions, deploying, undeploying
from luacell.protocol import messages
from luacell.protocol.errors import (
    AbiError,
    AbiErrorCode,
    BridgeClosed,
    BridgeError,
    BridgeForked,
    BridgeNotInitialized,
    CallError,
    DuplicateContract,
    HostContractNotFound,
    LuacellError,
    Unavailable,
)
from luacell.protocol.identity import ContractRef
from luacell.protocol.paths import ENDPOINT_VARIABLE

T = TypeVar("T")


class AsyncLuaHostBridge(Bridge):
    """A bridge to Lua host contracts for asyncio, bound to the event loop in which it is opened.

    `async with AsyncLuaHostBridge() as bridge` runs a private service and ends it;
    `async with AsyncLuaHostBridge.connect() as bridge` uses a running one. Awaiting either opens it without the block:
    `bridge = await AsyncLuaHostBridge.connect()`, and then `close()` is yours to await.

    A task that is cancelled in a call withdraws the call; its slot rests until nobody can touch it.
    """

    def __init__(self) -> None:
        self._make_place: Callable[[], Awaitable[Place]] = lambda: _embedded(spares=1)
        self._link: AsyncLink | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._names = Names()
        self._typed = TypedContracts()
        self._dropped = self._typed.dropped.notes
        self._destroying: set[asyncio.Task[None]] = set()
        self._scratch: AsyncScratchVm | None = None
        self._opening = asyncio.Lock()
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    def with_capacity(cls, capacity: int) -> Self:
        """Return an embedded bridge that will keep `capacity` VMs warm; open it by `async with` or `await`.

        Raises:
            ValueError: `capacity` is outside 0..64.
        """
        spares = checked_capacity(capacity)
        bridge = cls()
        bridge._make_place = lambda: _embedded(spares)
        return bridge

    @classmethod
    def connect(cls, endpoint: str | os.PathLike[str] | None = None) -> Self:
        """Return a bridge to a running broker; open it by `async with` or `await`, which raises Unavailable.

        Args:
            endpoint: its run directory, or `ipc://` and that; None takes `$LUACELL_ENDPOINT`, else the default place.

        Raises:
            ValueError: the endpoint is malformed, or is one for hosts without shared memory (`tcp://…`,
                `ipc+inline://…`): those have a `LuaHostBridge`.
        """
        if inline_address_of(endpoint) is not None:
            given = os.fspath(endpoint or os.environ[ENDPOINT_VARIABLE])
            raise ValueError(
                f"endpoint {given!r} is for hosts without shared memory, which AsyncLuaHostBridge does not serve; "
                "LuaHostBridge does, in a thread: asyncio.to_thread"
            )
        place = Place(run_directory_of(endpoint), None)

        async def known() -> Place:
            return place

        bridge = cls()
        bridge._make_place = known
        return bridge

    def __await__(self) -> Generator[Any, None, Self]:
        """Open the bridge and return it.

        Raises:
            Unavailable: nobody serves at its endpoint.
            BridgeNotInitialized: the embedded service did not come up.
        """
        return self._opened().__await__()

    async def __aenter__(self) -> Self:
        return await self._opened()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return self._described(0 if self._link is None else self._link.calls.session.broker_pid)

    def _way(self) -> AsyncLink | None:
        return self._link

    async def _opened(self) -> Self:
        async with self._opening:
            if self._state is None and self._link is None:
                place = await self._make_place()
                try:
                    self._link = await AsyncLink.open(place)
                except BaseException:
                    if place.service is not None:
                        await done_in_thread(place.service.stop)
                    raise
                self._loop = asyncio.get_running_loop()
                self._finalizer = weakref.finalize(self, _clean_up, self._link, os.getpid())
                self._joined()
        self._opened_link()
        return self

    async def close(self) -> None:
        """Leave the broker, and end it where it is this bridge's own. Idempotent; running calls get Unavailable."""
        if self._state is BridgeForked:
            return
        if self._closing is None:
            link = self._link
            if link is not None and self._state is None:
                self._check_loop()
            self._parted(BridgeClosed)
            if link is None:
                return
            if self._finalizer is not None:
                self._finalizer.detach()
            self._closing = asyncio.get_running_loop().create_task(link.close())
        await asyncio.shield(self._closing)

    # -- contracts ------------------------------------------------------------------------------------------------
    async def register_host_contract(
        self, contract: Contract, implementation: LuaFunction, *, replace: bool = False
    ) -> None:
        """Register a contract; arguments and errors are those of LuaHostBridge.

        Raises:
            BridgeError: the implementation is no LuaFunction or does not load, or the id is taken.
            Unavailable: the broker is gone.
        """
        link = self._opened_link()
        ref = ContractRef.of(contract)
        await self._request(registration(ref, checked_function(ref, implementation), replace=replace), ref.id)
        if replace:
            link.calls.forget(ref.id)

    async def unregister_host_contract(self, contract: Contract) -> None:
        """Remove a contract: its running calls end, queued ones fail with code 100.

        Raises:
            ContractNotFound: there is none.
        """
        ref = ContractRef.of(contract)
        await self._request(unregistration(ref.id), ref.id)
        self._opened_link().calls.forget(ref.id)

    async def revive(self, contract: Contract) -> bool:
        """End a contract's quarantine, and the wait for its next load after a failed one.

        Returns:
            Whether it rested.

        Raises:
            ContractNotFound: there is none.
        """
        ref = ContractRef.of(contract)
        reply = await self._request(revival(ref.id), ref.id)
        return bool(reply.body["was_resting"])

    async def contracts(self) -> list[ContractInfo]:
        """Return the registered contracts in order of id."""
        listing = Listing()
        while not listing.is_complete:
            listing.add(await self._request(listing.request))
        return listing.found

    async def crashes(self) -> list[CrashInfo]:
        """Return what calls have crashed their workers lately, ran out of time or of memory, newest first.

        Raises:
            Unauthorized: the bridge is connected over TCP; records hold the arguments of others' calls.
        """
        return await self._follow(listing_crashes())

    async def crash(self, crash_id: str) -> Crash:
        """Return one of them with its arguments, and with the sources that its worker had loaded.

        Raises:
            CrashNotFound: it is not on record, or no longer.
            Unauthorized: as `crashes`.
        """
        return await self._follow(reading_crash(crash_id))

    async def deploy(self, directory: str | os.PathLike[str]) -> list[str]:
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
        self._opened_link()
        deployment = await done_in_thread(lambda: Deployment.read(Path(directory)))
        return self._named(await self._follow(deploying(deployment)))

    async def undeploy(self, unit: str | os.PathLike[str]) -> list[str]:
        """Remove all contracts of a unit; as `unregister_host_contract` for each.

        Args:
            unit: its name, or else its directory.

        Returns:
            The names of the contracts, as `host.name@major`.

        Raises:
            NotDeployed: there is no such unit.
            DeploymentError: another unit requires one of its contracts; names both.
        """
        self._opened_link()
        return self._named(await self._follow(undeploying(unit)))

    def _named(self, changed: list[ContractRef]) -> list[str]:
        """Forget what was known of contracts that have changed, and return their names."""
        for ref in changed:
            self._opened_link().calls.forget(ref.id)
        return [str(ref) for ref in changed]

    async def _follow(self, questions: Questions[T]) -> T:
        """Ask what is to be asked, and return what came of it; what is asked after a failure is asked to the end."""
        try:
            question, is_undoing = next(questions), False
            while True:
                asking = self._request(*question)
                try:
                    reply = await (uncancelled(asking) if is_undoing else asking)
                except BaseException as error:
                    question, is_undoing = questions.throw(error), True
                else:
                    question = questions.send(reply)
        except StopIteration as end:
            result: T = end.value
            return result

    async def contract(self, name: str, min_version: str | None = None, *, types: Iterable[type[Any]] = ()) -> Any:
        """Return a proxy of a typed contract, whose methods are awaited; as `LuaHostBridge.contract`.

        Raises:
            HostContractNotFound: nothing of that name is registered.
            HostContractVersionMismatch: what is registered is of another major version, or older.
            TypeMismatch: it is a raw contract.
            ValueError: a version is malformed.
            TypeError: a class is not what the contract has under its name.
        """
        return make_async_proxy(await self._shared(name, min_version, types), self._call_typed)

    async def describe(self, name: str, min_version: str | None = None) -> Description:
        """Return what the broker tells of a typed contract: its api.toml, Python types and packers.

        Args and Raises: as `contract` has them.
        """
        return (await self._shared(name, min_version)).description

    async def _shared(self, name: str, min_version: str | None, types: Iterable[type[Any]] = ()) -> Shared:
        info = choose(name, min_version, await self.contracts())
        body = (await self._request(description(info.id), info.id)).body
        return self._typed.of(info.id, body, types)

    async def _call_typed(
        self, contract_id: int, fn_id: int, args: bytes, out_size: int, timeout: float | None
    ) -> bytes:
        return await self.call(contract_id, fn_id, args, out_size, timeout=timeout)

    # -- calls ----------------------------------------------------------------------------------------------------
    async def call_host_contract(
        self,
        contract: Contract,
        fn_id: int,
        args: Buffer | None,
        out: Buffer | None,
        *,
        timeout: float | None = None,
    ) -> AbiError:
        """Call a function of a contract the way polyplug's bridge does; never raises for what a contract does.

        Arguments and answer are those of LuaHostBridge; the buffers must stay as they are until it has returned.

        Raises:
            BridgeClosed, BridgeForked: the bridge cannot be used.
            ValueError, TypeError: an argument is malformed.
        """
        try:
            await self._call(self._names.check(contract, fn_id, args, out, 0, timeout))
        except CallError as error:
            return as_error(error)
        return AbiError(AbiErrorCode.OK)

    async def call(
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

        Arguments and answer are those of LuaHostBridge; the buffers must stay as they are until it has returned.

        Raises:
            CallError: one child per code; `.began` says whether the function was entered.
            BridgeClosed, BridgeForked: the bridge cannot be used.
            ValueError, TypeError: an argument is malformed.
        """
        return await self._call(self._names.check(contract, fn_id, without_emptiness(args), out, out_size, timeout))

    async def _call(self, arguments: Arguments) -> bytes:
        link = self._opened_link()
        if self._dropped:
            self._destroy_dropped(link)
        calls, budget = link.calls, None
        while True:
            try:
                return await calls.call(*arguments)
            except Unavailable as error:
                if not may_look_again(error, calls.session.is_open):
                    raise
            self._check()
            budget = budget or Budget.of(arguments, link.place)
            calls = await link.renew(calls, budget.until_s)
            arguments = arguments._replace(timeout_us=budget.left_us())

    def _destroy_dropped(self, link: AsyncLink) -> None:
        """Have instances destroyed whose proxies are gone; nobody waits for that."""
        contract_id, fn_id, args = destruction(self._typed.dropped.take())

        async def destroy() -> None:
            with contextlib.suppress(LuacellError):  # where they cannot be reached, they are gone
                await link.calls.call(contract_id, fn_id, args, None, 0, 0)

        task = asyncio.get_running_loop().create_task(destroy())
        self._destroying.add(task)
        task.add_done_callback(self._destroying.discard)

    # -- the rest -------------------------------------------------------------------------------------------------
    async def health(self) -> dict[str, Any]:
        """Return how the service is: hosts, contracts, workers (pid, contract, state), queues, memory, deaths."""
        return dict((await self._request(health)).body)

    async def lua(self) -> AsyncScratchVm:
        """Return access to this bridge's scratch VM, in a worker of its own."""
        self._opened_link()
        if self._scratch is None:
            scratch_id = random_id()
            await self._register_scratch(scratch_id)
            if self._scratch is None:  # another task may have been faster; the broker drops what nobody calls
                self._scratch = AsyncScratchVm(lambda args, size: self._call_scratch(scratch_id, args, size))
        return self._scratch

    async def _register_scratch(self, scratch_id: int) -> None:
        await self._request(registration(ContractRef(scratch_id), implementation(), private=True), scratch_id)

    async def _call_scratch(self, scratch_id: int, args: bytes, size: int) -> bytes:
        """Call the scratch VM; it is private to a session, so that a new session needs a new one."""
        for _ in range(ATTEMPTS):
            try:
                return await self.call(scratch_id, 0, args, size)
            except HostContractNotFound:
                with contextlib.suppress(DuplicateContract):  # another task has done it
                    await self._register_scratch(scratch_id)
        return await self.call(scratch_id, 0, args, size)

    async def _request(self, make: Request, contract_id: int = 0) -> messages.Reply:
        link, budget = self._opened_link(), Budget()
        if self._dropped:
            self._destroy_dropped(link)
        calls = link.calls
        while True:
            try:
                answer = (await calls.session.request(make)).answer
            except Unavailable as error:
                if not may_look_again(error, calls.session.is_open):
                    raise
            else:
                break
            self._check()
            calls = await link.renew(calls, budget.until_s)
        assert isinstance(answer, messages.Reply)
        raise_for_reply(answer, contract_id)
        return answer

    def _opened_link(self) -> AsyncLink:
        if self._state is not None:
            self._check()
        if self._link is None:
            raise BridgeNotInitialized("Lua", "open the bridge first, by `async with` or `await`")
        self._check_loop()
        return self._link

    def _check_loop(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is not self._loop:
            raise BridgeError("this bridge is bound to another event loop; open one in each loop that needs it")


async def _embedded(spares: int) -> Place:
    service = await made_in_thread(lambda: EmbeddedService(spares), undo=EmbeddedService.stop)
    return Place(service.run_directory, service)


def _clean_up(link: AsyncLink, owner_pid: int) -> None:
    if os.getpid() == owner_pid:
        link.abandon()
