"""What the sandbox costs: at the start of a worker, and per call.

A start is a process that is forked, confines itself as a worker of the level does, tells its layers and ends, beside
one that is forked and ends: the difference is the sandbox. Calls at `hardened` are set beside those at `default`.
"""

from __future__ import annotations

import os

from benchmarks.measure import Figure, Target, compare, interleave, latency
from benchmarks.service import ECHO, SOURCES, served
from luacell.client import LuaHostBridge
from luacell.protocol.confinement import DEFAULT, HARDENED, SANDBOX_LEVELS
from luacell.worker.sandbox.levels import trial
from tests.support.contracts import deploy

SIZE = 64
PER_CALL = Target(must=1.05, goal=1.02)
BARE = "forked, not confined"


def _bare() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def starts(batches: int, count: int) -> list[Figure]:
    """Measure before any bridge is there: a process with threads should not fork."""

    def start(level: str) -> None:
        _, problem = trial(level)
        assert not problem, problem

    ways = {BARE: latency(_bare, count)}
    ways |= {level: latency(lambda level=level: start(level), count) for level in SANDBOX_LEVELS}  # type: ignore[misc]
    taken = interleave(ways, batches)
    return [compare("sandbox", f"start, {level}", "us", taken[level], BARE, taken[BARE]) for level in SANDBOX_LEVELS]


def calls(batches: int, count: int) -> list[Figure]:
    payload = b"x" * SIZE

    def echo(bridge: LuaHostBridge, name: str) -> None:
        bridge.call(name, SIZE, payload, SIZE)

    with served() as (bridge, _):
        deploy(bridge, SOURCES[ECHO], "host.hardened@1", sandbox=HARDENED)
        ways = {
            DEFAULT: latency(lambda: echo(bridge, ECHO), count),
            HARDENED: latency(lambda: echo(bridge, "host.hardened@1"), count),
        }
        taken = interleave(ways, batches)
    return [compare("sandbox", "call, hardened", "us", taken[HARDENED], "default", taken[DEFAULT], PER_CALL)]
