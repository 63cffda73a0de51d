"""A host that forks while its event loop runs: `python -m tests.support.async_fork RUN_DIRECTORY CONTRACT`.

Parent and child each write a JSON line with what a call gives them; then both wait.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

from luacell.client import AsyncLuaHostBridge, BridgeError, CallError


async def main(run_directory: str, contract: str) -> None:
    async with AsyncLuaHostBridge.connect(run_directory) as bridge:
        assert await outcome(bridge, contract) == "ok"
        if os.fork() == 0:
            tell(child=await outcome(bridge, contract), pid=os.getpid())
            await bridge.close()
            while True:
                signal.pause()
        tell(parent=await outcome(bridge, contract))
        await asyncio.Event().wait()


async def outcome(bridge: AsyncLuaHostBridge, contract: str) -> str:
    try:
        await bridge.call(contract, 0, bytes(4), 4)
    except (CallError, BridgeError) as error:
        return type(error).__name__
    return "ok"


def tell(**values: object) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
