"""A host with many calls under way, to be killed: `python -m tests.support.crowd RUN_DIRECTORY CONTRACT CALLS`."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress

from luacell.client import CallError, LuaHostBridge


def main(run_directory: str, contract: str, count: int) -> None:
    bridge = LuaHostBridge.connect(run_directory)

    def call() -> None:
        with suppress(CallError):
            bridge.call(contract, 1, bytes(8), 8)

    for _ in range(count):
        threading.Thread(target=call, daemon=True).start()
    while bridge.health()["slots_in_flight"] < count:
        time.sleep(0.005)
    print("ready", flush=True)
    time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
