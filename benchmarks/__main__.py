"""`make bench`: the sequential call of 64 bytes beside its floors, interleaved in one run on one CPU.

Prints a table, the ratio to the bare relay beside its target, and with `--profile` where the broker's time goes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.measure import Figure, interleave
from benchmarks.peers import bare_relay, in_process_lua, pipe_ping_pong
from benchmarks.profile import profile_broker
from luacell.client import LuaFunction, LuaHostBridge

ECHO = """
local ffi = require("ffi")
return function(fn_id, args, out) ffi.copy(out, args, 64) end
"""
CONTRACT = "host.echo@1"
RATIO_MUST, RATIO_GOAL = 1.5, 1.25


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--batches", type=int, default=9)
    parser.add_argument("--calls", type=int, default=1000, help="round trips per batch")
    parser.add_argument("--free", action="store_true", help="let the scheduler place the processes")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--profile", action="store_true", help="also show where the broker's time goes")
    options = parser.parse_args()
    if not options.free:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    figures = _measure(options.batches, options.calls)
    _print(figures, placement="free" if options.free else "all processes on one CPU")
    if options.json:
        options.json.write_text(json.dumps({name: vars(figure) for name, figure in figures.items()}, indent=2))
    if options.profile:
        profile_broker(ECHO, CONTRACT)
    return 0


def _measure(batches: int, calls: int) -> dict[str, Figure]:
    payload = bytes(range(64))
    with ExitStack() as stack:
        relay = stack.enter_context(bare_relay())
        pipe = stack.enter_context(pipe_ping_pong(payload))
        lua = stack.enter_context(in_process_lua(payload))
        bridge = stack.enter_context(LuaHostBridge())
        bridge.register_host_contract(CONTRACT, LuaFunction(ECHO))
        assert bridge.call(CONTRACT, 0, payload, 64) == payload
        ways = {
            "in-process lupa": lua,
            "pipe ping-pong": pipe,
            "bare relay": relay,
            "luacell brokered": lambda: bridge.call(CONTRACT, 0, payload, 64),
        }
        return interleave(ways, batches, calls)


def _print(figures: dict[str, Figure], placement: str) -> None:
    print(f"64 B, sequential, {placement}; Python {platform.python_version()}, {platform.release()}")
    print(f"{'way':<20}{'p50 us':>10}{'p99 us':>10}   medians of the batches")
    for figure in figures.values():
        batches = " ".join(f"{median:.0f}" for median in figure.batches_us)
        print(f"{figure.name:<20}{figure.p50_us:>10.1f}{figure.p99_us:>10.1f}   {batches}")
    ratio = figures["luacell brokered"].p50_us / figures["bare relay"].p50_us
    verdict = "goal" if ratio <= RATIO_GOAL else "must" if ratio <= RATIO_MUST else "missed"
    print(f"brokered / bare relay: {ratio:.2f} (must <= {RATIO_MUST}, goal <= {RATIO_GOAL}): {verdict}")


if __name__ == "__main__":
    sys.exit(main())
