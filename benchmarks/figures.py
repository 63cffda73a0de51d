"""What is measured: groups of figures, each taken in one interleaved run with what it is compared with.

The targets stand beside what they are targets of. `docs/performance.md` tells what each figure means.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from benchmarks.idle import add_contracts, add_idle_workers, idle_hosts, objection
from benchmarks.measure import Figure, Series, Target, compare, interleave, latency, plus, rate
from benchmarks.peers import bare_relay, in_process_lua, pipe_ping_pong, plain_copies
from benchmarks.pipelined import pipelined_host
from benchmarks.sandbox import calls as sandboxed_calls
from benchmarks.sandbox import starts
from benchmarks.service import ECHO, MIB, TAKE, served
from benchmarks.typed import RECORD_LIMIT_US, record_round_trip, scaling
from luacell.client import AsyncLuaHostBridge, LuaHostBridge

SMALL = 64
KIB = 1024
IN_FLIGHT = (1, 8, 32, 128)
LARGE = 16 * MIB
SIZES = (SMALL, 4 * KIB, 64 * KIB, MIB, LARGE, 64 * MIB)
BYTES_PER_BATCH = 256 * MIB  # of calls with large payloads
TASKS = 50
THREADS = 16

SEQUENTIAL = Target(1.5, 1.25)
ONE_PER_MESSAGE = Target(0.25, 0.5, at_least=True)
SEVERAL_PER_MESSAGE = Target(0.4, 1.0, at_least=True)
IDLE = Target(1.25, 1.1)
ARGUMENT = Target(1.5, 1.2)
LARGE_ECHO = Target(1.4, 1.1)
TYPED = Target(1.3, 1.15)
RECORD = Target(1.0, 0.5)  # of RECORD_LIMIT_US


@dataclass
class Scale:
    """How much is measured.

    Attributes:
        calls: round trips per batch.
        rate_calls: calls of one run with many in flight.
        left_out: what could not be measured here, and why; filled on the way.
    """

    batches: int = 15
    calls: int = 400
    rate_calls: int = 4000
    hosts: int = 500
    workers: int = 200
    contracts: int = 1000
    left_out: list[str] = field(default_factory=list)

    def calls_of(self, size: int) -> int:
        """Return how many round trips of a payload make a batch."""
        return max(2, min(self.calls, BYTES_PER_BATCH // size // self.batches))


def quick() -> Scale:
    return Scale(batches=2, calls=10, rate_calls=300, hosts=4, workers=3, contracts=5)


def _echo(bridge: LuaHostBridge, size: int = SMALL) -> Callable[[], object]:
    """Return one call that takes and gives `size` bytes; a large answer goes to a buffer that is there."""
    payload = bytes(range(64)) * (size // 64)
    if size == SMALL:
        return lambda: bridge.call(ECHO, size, payload, size)
    out = bytearray(size)
    bridge.call(ECHO, size, payload, out=out)
    assert out == payload
    return lambda: bridge.call(ECHO, size, payload, out=out)


def sequential(scale: Scale) -> list[Figure]:
    """One call of 64 bytes after another, beside its floors."""
    payload = bytes(range(SMALL))
    with ExitStack() as stack:
        relay = stack.enter_context(bare_relay())
        pipe = stack.enter_context(pipe_ping_pong(payload))
        lua = stack.enter_context(in_process_lua(payload))
        bridge, _ = stack.enter_context(served())
        ways = {"lupa": lua, "pipe": pipe, "relay": relay.round_trip, "brokered": _echo(bridge)}
        taken = interleave({name: latency(way, scale.calls) for name, way in ways.items()}, scale.batches)
    relayed = "bare relay"

    def figure(name: str, key: str, target: Target | None = None) -> Figure:
        return compare("sequential", name, "us", taken[key], relayed, taken["relay"], target)

    return [
        figure("in-process lupa, 64 B", "lupa"),
        figure("pipe ping-pong, 64 B", "pipe"),
        figure("brokered, 64 B", "brokered", SEQUENTIAL),
    ]


def in_flight(scale: Scale) -> list[Figure]:
    """Calls per second of one host with many calls under way."""
    figures = []
    with ExitStack() as stack:
        relay = stack.enter_context(bare_relay())
        _, run_directory = stack.enter_context(served())
        host = stack.enter_context(pipelined_host(run_directory, ECHO, bytes(range(SMALL)), max(IN_FLIGHT)))
        for count in IN_FLIGHT:
            calls = scale.rate_calls if count > 1 else scale.rate_calls // 4
            taken = interleave(
                {
                    "relay": rate(partial(relay.run, calls, count)),
                    "one": rate(partial(host.run, calls, count, together=False)),
                    "several": rate(partial(host.run, calls, count, together=True)),
                },
                scale.batches,
            )
            has_target = count == max(IN_FLIGHT)
            for key, words, target in (
                ("one", "one call per message", ONE_PER_MESSAGE),
                ("several", "several per message", SEVERAL_PER_MESSAGE),
            ):
                name = f"{count} in flight, {words}"
                beside = f"bare relay, {count} in flight"
                figures.append(
                    compare(
                        "in-flight", name, "calls/s", taken[key], beside, taken["relay"], target if has_target else None
                    )
                )
    return figures


def idle(scale: Scale) -> list[Figure]:
    """The sequential call with a crowd that does nothing, beside the same without; each crowd has its own service."""
    crowds: list[tuple[str, str]] = [
        (f"with {scale.hosts} idle hosts", objection(hosts=scale.hosts)),
        (f"with {scale.workers} idle workers", objection(workers=scale.workers)),
        (f"with {scale.contracts} registered contracts", ""),
    ]
    scale.left_out.extend(f"{name}: {why}" for name, why in crowds if why)
    figures = []
    for number, (name, why) in enumerate(crowds):
        if why:
            continue
        with ExitStack() as stack:
            alone, _ = stack.enter_context(served())
            crowded, run_directory = stack.enter_context(served())
            if number == 0:
                stack.enter_context(idle_hosts(crowded, run_directory, scale.hosts))
            elif number == 1:
                add_idle_workers(crowded, scale.workers)
            else:
                add_contracts(crowded, scale.contracts)
            ways = {"alone": latency(_echo(alone), scale.calls), "crowded": latency(_echo(crowded), scale.calls)}
            taken = interleave(ways, scale.batches)
        figures.append(compare("idle", name, "us", taken["crowded"], "without", taken["alone"], IDLE))
    return figures


def argument(scale: Scale) -> list[Figure]:
    """A megabyte that the contract reads, beside a small call and the two copies that this takes at least."""
    payload = bytes(MIB)
    with served() as (bridge, _):
        ways = {
            "call": lambda: bridge.call(TAKE, MIB, payload, SMALL),
            "small": _echo(bridge),
            "copies": plain_copies(MIB, 2),
        }
        taken = interleave({name: latency(way, scale.calls_of(MIB)) for name, way in ways.items()}, scale.batches)
    beside = "64 B call + 2 memcpys"
    other = plus(taken["small"], taken["copies"])
    return [compare("argument", "1 MiB argument", "us", taken["call"], beside, other, ARGUMENT, MIB)]


def sizes(scale: Scale) -> list[Figure]:
    """Echoes of each size into a buffer of the caller's, beside the three copies that this takes at least.

    Below LARGE the small call is part of what it takes at least.
    """
    figures = []
    with served() as (bridge, _):
        small = latency(_echo(bridge), scale.calls_of(SMALL))
        for size in SIZES:
            calls = scale.calls_of(size)
            ways = {"echo": latency(_echo(bridge, size), calls), "copies": latency(plain_copies(size, 3), calls)}
            taken = interleave(ways if size >= LARGE else {**ways, "small": small}, scale.batches)
            beside, other = "3 memcpys", taken["copies"]
            if size < LARGE:
                beside, other = "64 B call + 3 memcpys", plus(taken["small"], taken["copies"])
            target = LARGE_ECHO if size == LARGE else None
            figures.append(
                compare("sizes", f"echo of {size_text(size)}", "us", taken["echo"], beside, other, target, size)
            )
    return figures


def callers(scale: Scale) -> list[Figure]:
    """Tasks and threads that share a bridge, beside a bare relay with as many messages in flight."""
    calls = scale.rate_calls // 2
    with ExitStack() as stack:
        relay = stack.enter_context(bare_relay())
        bridge, run_directory = stack.enter_context(served())
        runner = stack.enter_context(asyncio.Runner())
        run_tasks = stack.enter_context(_asyncio_caller(runner, str(run_directory)))
        taken = interleave(
            {
                "relay 1": rate(lambda: relay.run(calls // 4, 1)),
                "1 task": rate(lambda: run_tasks(calls // 4, 1)),
                "relay 50": rate(lambda: relay.run(calls, TASKS)),
                "50 tasks": rate(lambda: run_tasks(calls, TASKS)),
                "relay 16": rate(lambda: relay.run(calls, THREADS)),
                "16 threads": rate(lambda: _run_threads(bridge, calls, THREADS)),
            },
            scale.batches,
        )

    def figure(name: str, key: str, count: int) -> Figure:
        return compare(
            "callers", name, "calls/s", taken[key], f"bare relay, {count} in flight", taken[f"relay {count}"]
        )

    return [
        figure("asyncio bridge, 1 task", "1 task", 1),
        figure("asyncio bridge, 50 tasks", "50 tasks", TASKS),
        figure("bridge, 16 threads", "16 threads", THREADS),
    ]


@contextmanager
def _asyncio_caller(runner: asyncio.Runner, endpoint: str) -> Iterator[Callable[[int, int], float]]:
    async def opened() -> AsyncLuaHostBridge:
        return await AsyncLuaHostBridge.connect(endpoint)

    bridge = runner.run(opened())
    payload = bytes(range(SMALL))

    async def caller(calls: int) -> None:
        for _ in range(calls):
            await bridge.call(ECHO, SMALL, payload, SMALL)

    async def run(calls: int, tasks: int) -> float:
        start_s = time.perf_counter()
        await asyncio.gather(*(caller(calls // tasks) for _ in range(tasks)))
        return calls // tasks * tasks / (time.perf_counter() - start_s)

    try:
        yield lambda calls, tasks: runner.run(run(calls, tasks))
    finally:
        runner.run(bridge.close())


def _run_threads(bridge: LuaHostBridge, calls: int, count: int) -> float:
    call = _echo(bridge)
    start = threading.Barrier(count + 1)

    def caller() -> None:
        start.wait()
        for _ in range(calls // count):
            call()

    threads = [threading.Thread(target=caller) for _ in range(count)]
    for thread in threads:
        thread.start()
    start.wait()
    start_s = time.perf_counter()
    for thread in threads:
        thread.join()
    return calls // count * count / (time.perf_counter() - start_s)


def inline(scale: Scale) -> list[Figure]:
    """A host without shared memory, over loopback TCP, beside one that has it."""
    figures = []
    with served("--tcp", "tcp://127.0.0.1:0") as (bridge, _), LuaHostBridge.connect(bridge.health()["tcp"]) as remote:
        for size in (SMALL, MIB):
            ways = {"tcp": _echo(remote, size), "shared": _echo(bridge, size)}
            taken = interleave({name: latency(way, scale.calls_of(size)) for name, way in ways.items()}, scale.batches)
            name = f"inline over TCP, echo of {size_text(size)}"
            figures.append(compare("inline", name, "us", taken["tcp"], "shared memory", taken["shared"], None, size))
    return figures


def typed(scale: Scale) -> list[Figure]:
    """A call by values beside one with the bytes at hand; and what values of a record cost their host."""
    with served() as (bridge, _):
        ways = {name: latency(way, scale.calls) for name, way in scaling(bridge).items()}
        taken = interleave({**ways, "record": latency(record_round_trip(), scale.calls)}, scale.batches)
    limit = Series((RECORD_LIMIT_US,) * scale.batches, RECORD_LIMIT_US)
    return [
        compare("typed", "typed (u8, f64, bool) -> f64", "us", taken["typed"], "raw call", taken["raw"], TYPED),
        compare("typed", "record of 9 fields to bytes and back", "us", taken["record"], "limit", limit, RECORD),
    ]


def size_text(size: int) -> str:
    for unit, factor in (("MiB", MIB), ("KiB", KIB)):
        if size >= factor:
            return f"{size // factor} {unit}"
    return f"{size} B"


def sandbox(scale: Scale) -> list[Figure]:
    return [*starts(scale.batches, max(2, scale.calls // 20)), *sandboxed_calls(scale.batches, scale.calls)]


GROUPS: dict[str, Callable[[Scale], list[Figure]]] = {
    "sequential": sequential,
    "in-flight": in_flight,
    "idle": idle,
    "argument": argument,
    "sizes": sizes,
    "callers": callers,
    "inline": inline,
    "typed": typed,
    "sandbox": sandbox,
}
