"""A host with many calls under way, to be killed: `python -m tests.support.crowd RUN_DIRECTORY CONTRACT CALLS`.

It tells "ready" once they are all in flight at the same time, and ends when that does not come about.
"""

from __future__ import annotations

import asyncio
import sys
import time

from luacell.client import AsyncLuaHostBridge
from tests.support.waiting import LIMIT_S

STAYS_S = 60.0  # far longer than any test waits before it kills the host


async def main(run_directory: str, contract: str, count: int) -> None:
    async with AsyncLuaHostBridge.connect(run_directory) as bridge:
        # Tasks, not threads: they are all on their way within a moment, even on a busy machine.
        calls = [asyncio.create_task(bridge.call(contract, 1, bytes(8), 8)) for _ in range(count)]
        give_up_s = time.monotonic() + LIMIT_S
        while (await bridge.health())["slots_in_flight"] < count:
            if time.monotonic() > give_up_s:
                raise SystemExit(f"never {count} calls in flight at the same time")
            await asyncio.sleep(0.005)
        print("ready", flush=True)
        await asyncio.wait(calls, timeout=STAYS_S, return_when=asyncio.ALL_COMPLETED)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
