"""A host that calls one contract far faster than it answers.

python -m tests.support.flood RUN_DIRECTORY CONTRACT TASKS

So many tasks call over and over until standard input ends; then it writes how many calls ended in which way, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter

from luacell.client import AsyncLuaHostBridge, CallError


async def main(run_directory: str, contract: str, tasks: int) -> None:
    outcomes: Counter[str] = Counter()
    is_over = asyncio.Event()

    async def call(bridge: AsyncLuaHostBridge) -> None:
        while not is_over.is_set():
            try:
                await bridge.call(contract, 0, bytes(4), 4)
                outcomes["ok"] += 1
            except CallError as error:
                outcomes[type(error).__name__] += 1

    async with AsyncLuaHostBridge.connect(run_directory) as bridge:
        flooding = asyncio.gather(*(call(bridge) for _ in range(tasks)))
        while not outcomes["Busy"]:
            await asyncio.sleep(0.01)
        print("flooding", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        is_over.set()
        await flooding
    print(json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
