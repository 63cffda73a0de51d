"""What hosts, contracts and processes do so that every handler of the broker has its turn, in steps that may fail."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from luacell.client import AsyncLuaHostBridge, LuaFunction, LuaHostBridge
from luacell.protocol import messages
from luacell.protocol.limits import INLINE_PIECE
from luacell.protocol.paths import BROKER_SOCKET
from tests.support.contracts import ECHO, PROBE, deploy, failure, function, write_deployment
from tests.support.peers import InlinePeer, Peer
from tests.support.processes import Processes
from tests.support.typed_contracts import COUNTER_LUA, counter_api, deploy_typed
from tests.support.waiting import LIMIT_S

VICTIM: Final = "host.victim@1"
CALLER: Final = "host.caller@1"
FRAIL: Final = "host.frail@1"
UNIT: Final = "host.unit@1"
TOGETHER: Final = 24  # calls of one iteration of an event loop
GIVES_UP: Final = 50  # calls at most, until one is given up while it runs
ANSWER_MS: Final = 1000  # what an answer is waited for that may not come
LATE_S: Final = 0.15  # a call that its process is asked about, and killed for

# 1 crashes, 2 never ends, 3 prints, 4 copies four bytes, 5 takes 30 ms.
SOURCE: Final = """
local ffi = require("ffi")
ffi.cdef[[int usleep(unsigned);]]
return function(fn_id, args, out)
  if fn_id == 1 then ffi.cast("int *", 0)[0] = 1 end
  if fn_id == 2 then while true do end end
  if fn_id == 3 then print("a line") end
  if fn_id == 4 then ffi.copy(out, args, 4) end
  if fn_id == 5 then ffi.C.usleep(30000) end
end
"""
CALLS_VICTIM: Final = function(f'ffi.copy(out, luacell.call("{VICTIM}", 4, "1234", 4), 4)')
SAVING: Final = COUNTER_LUA.replace(
    "return Counter\n",
    """
function Counter:save() return tostring(self.n) end
function Counter:restore(text) self.n = assert(tonumber(text)) end
return Counter
""",
)

Step = Callable[[], Any]
Scene = Callable[["Stage"], Iterator[Step]]


class Stage:
    """Where the scenes are played: hosts of a service, which leave at the end of the block.

    Args:
        run_directory: of the service.
        directory: for files of contracts.
    """

    def __init__(self, run_directory: Path, directory: Path) -> None:
        self.run_directory = run_directory
        self.directory = directory
        self.stack = ExitStack()

    def host(self) -> LuaHostBridge:
        """Return a host of its own that has connected."""
        return self.stack.enter_context(LuaHostBridge.connect(self.run_directory))

    def service(self) -> Processes:
        """Find the service's processes as they are now."""
        with LuaHostBridge.connect(self.run_directory) as bridge:
            return self.stack.enter_context(Processes.of(bridge))

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def life(stage: Stage) -> Iterator[Step]:
    """A host comes, does what hosts do, and goes."""
    bridge = stage.host()
    yield lambda: bridge.register_host_contract(VICTIM, LuaFunction(SOURCE), replace=True)
    yield lambda: bridge.call(VICTIM, 4, b"1234", 4)
    yield bridge.contracts
    yield bridge.health
    yield lambda: bridge.contract(VICTIM)
    yield lambda: bridge.revive(VICTIM)
    yield lambda: _deploy_unit(bridge, stage.directory / "unit")
    yield lambda: bridge.call(VICTIM, 3)
    yield lambda: failure(bridge, VICTIM, 1)
    yield lambda: bridge.crash(bridge.crashes()[0].id)
    yield lambda: bridge.call(VICTIM, 4, b"1234", 4)
    yield lambda: bridge.unregister_host_contract(VICTIM)
    yield bridge.health  # what is sent last may come behind the end of the channel
    yield bridge.close


def farewell(stage: Stage) -> Iterator[Step]:
    """A host takes leave before its channel ends."""
    peer = stage.stack.enter_context(Peer(stage.run_directory))
    yield lambda: peer.tell(messages.Bye())
    yield lambda: peer.dealer.poll(ANSWER_MS)


def together(stage: Stage) -> Iterator[Step]:
    """An event loop calls many times at once, and gives one of its calls up."""

    async def play() -> None:
        async with AsyncLuaHostBridge.connect(stage.run_directory) as bridge:
            await bridge.register_host_contract(VICTIM, LuaFunction(SOURCE), replace=True)
            for _ in range(3):
                calls = [bridge.call(VICTIM, 4, b"1234", 4) for _ in range(TOGETHER)]
                await asyncio.gather(*calls)
            before = (await bridge.health())["slots_in_flight"]
            for _ in range(GIVES_UP):  # on a busy machine a call may be over before it was seen in flight
                given_up = asyncio.create_task(bridge.call(VICTIM, 5))
                while not given_up.done() and (await bridge.health())["slots_in_flight"] == before:
                    await asyncio.sleep(0)
                if given_up.cancel():
                    break
            with suppress(asyncio.CancelledError):
                await given_up
            await bridge.call(VICTIM, 4, b"1234", 4)

    yield lambda: asyncio.run(play())


def vanishing(stage: Stage) -> Iterator[Step]:
    """A host's channel ends without a farewell."""
    peer = stage.stack.enter_context(Peer(stage.run_directory))
    yield peer.channel.close


def unexplained(stage: Stage) -> Iterator[Step]:
    """A worker dies, and the worker host, which would tell of what, is stopped."""
    service = stage.service()
    (worker, *_) = service.look_again()

    def play() -> None:
        with service.worker_host.stopped():
            worker.kill()
            service.broker.ends_within(ANSWER_MS / 1000)

    yield play


def late(stage: Stage) -> Iterator[Step]:
    """A call is past its time, and its worker is killed."""
    bridge = stage.host()
    yield lambda: bridge.register_host_contract(VICTIM, LuaFunction(SOURCE), replace=True)
    yield lambda: bridge.call(VICTIM, 5)
    yield lambda: failure(bridge, VICTIM, 2, timeout=LATE_S)
    yield lambda: bridge.call(VICTIM, 4, b"1234", 4)


def late_and_nobody_looks(stage: Stage) -> Iterator[Step]:
    """A call is past its time while the worker host, which would look at its process, is stopped."""
    bridge = stage.host()
    service = stage.service()
    yield lambda: bridge.register_host_contract(VICTIM, LuaFunction(SOURCE), replace=True)

    def play() -> None:
        with service.worker_host.stopped():
            failure(bridge, VICTIM, 2, timeout=LATE_S / 2)

    yield play


def slow(stage: Stage) -> Iterator[Step]:
    """Calls wait behind one that takes its time."""
    bridge = stage.host()
    yield lambda: bridge.register_host_contract(VICTIM, LuaFunction(SOURCE), replace=True)

    async def play() -> None:
        async with AsyncLuaHostBridge.connect(stage.run_directory) as other:
            await asyncio.gather(*(other.call(VICTIM, 5) for _ in range(2)))

    yield lambda: asyncio.run(play())


def inline(stage: Stage) -> Iterator[Step]:
    """A host without shared memory sends and gets much, gives a call up, and goes."""
    bridge = stage.host()
    yield lambda: bridge.register_host_contract(PROBE, LuaFunction(ECHO), replace=True)
    size = 2 * INLINE_PIECE
    remote = stage.stack.enter_context(LuaHostBridge.connect(f"ipc+inline://{stage.run_directory}"))
    yield lambda: remote.call(PROBE, size, bytes(size), size)
    peer = stage.stack.enter_context(InlinePeer(_address(stage), greet=False))
    yield lambda: peer.tell(messages.Hello(role="inline"))
    yield lambda: peer.dealer.poll(ANSWER_MS)
    yield lambda: peer.cancel(1)
    yield lambda: peer.dealer.poll(ANSWER_MS)
    yield peer.close


def stranger(stage: Stage) -> Iterator[Step]:
    """Somebody speaks who has not said who he is."""
    peer = stage.stack.enter_context(InlinePeer(_address(stage), greet=False))
    yield lambda: peer.tell(messages.Health(request_id=1))


def nested(stage: Stage) -> Iterator[Step]:
    """A contract calls another."""
    bridge = stage.host()
    yield lambda: bridge.register_host_contract(VICTIM, LuaFunction(SOURCE), replace=True)
    yield lambda: bridge.register_host_contract(CALLER, LuaFunction(CALLS_VICTIM), replace=True)
    yield lambda: bridge.call(CALLER, 0, None, 4)


def carried(stage: Stage) -> Iterator[Step]:
    """A singleton's state is carried to its successor."""
    bridge = stage.host()
    for _ in range(2):
        yield lambda: deploy_typed(bridge, stage.directory / "carried", counter_api(singleton=True), SAVING).add(1)


def frail(stage: Stage) -> Iterator[Step]:
    """A contract is to have another worker, where it does not load again; its calls wait meanwhile."""
    bridge = stage.host()
    files = stage.directory / "files"
    files.mkdir(exist_ok=True)
    needed = files / "needed"
    needed.touch()
    source = f'assert(io.open("{needed}"), "it is not there")\n{SOURCE}'
    yield lambda: deploy(bridge, source, FRAIL, read=[str(files)], stateless=True, workers=2)
    yield lambda: bridge.call(FRAIL, 5)
    yield needed.unlink

    async def play() -> None:
        async with AsyncLuaHostBridge.connect(stage.run_directory) as other:
            await asyncio.gather(*(other.call(FRAIL, 5) for _ in range(12)))

    yield lambda: asyncio.run(play())
    yield lambda: bridge.unregister_host_contract(FRAIL)


def spare_taken(stage: Stage) -> Iterator[Step]:
    """A contract takes a spare, which is replaced a moment later."""
    bridge = stage.host()
    yield lambda: bridge.register_host_contract(VICTIM, LuaFunction(SOURCE), replace=True)
    yield lambda: bridge.call(VICTIM, 5)


def worker_host_leaves(stage: Stage) -> Iterator[Step]:
    """The worker host is told to end alone."""
    worker_host = stage.service().worker_host
    yield lambda: worker_host.send(signal.SIGTERM)
    yield lambda: worker_host.ends_within(LIMIT_S)


def signalled(stage: Stage) -> Iterator[Step]:
    """The broker is told to end alone."""
    broker = stage.service().broker
    yield lambda: broker.send(signal.SIGTERM)


def _deploy_unit(bridge: LuaHostBridge, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    write_deployment(directory, SOURCE, UNIT)
    bridge.deploy(directory)


def _address(stage: Stage) -> str:
    return f"ipc://{os.fspath(stage.run_directory / BROKER_SOCKET)}"
