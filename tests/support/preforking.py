"""A server that forks before it connects: `python -m tests.support.preforking RUN_DIRECTORY CONTRACT PROCESSES CALLS`.

The parent has a bridge of its own, which its children must not use. Each child makes calls to a contract with DOUBLE
and writes how many were wrong, answered and failed.
"""

from __future__ import annotations

import os
import sys
from collections import Counter

from luacell.client import BridgeForked, CallError, LuaHostBridge, Quarantined, Unavailable, WorkerCrashed


def main(run_directory: str, contract: str, processes: int, calls: int) -> int:
    with LuaHostBridge.connect(run_directory) as bridge:
        bridge.health()
        children = [os.fork() or serve(bridge, run_directory, contract, calls, number) for number in range(processes)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        bridge.health()
    return max(codes)


def serve(parents: LuaHostBridge, run_directory: str, contract: str, calls: int, seed: int) -> int:
    """Do a child's work, and end it."""
    counted: Counter[str] = Counter()
    try:
        parents.call(contract, 0)
    except BridgeForked:
        counted["forked"] += 1
    with LuaHostBridge.connect(run_directory) as bridge:
        for number in range(seed * calls, (seed + 1) * calls):
            try:
                reply = bridge.call(contract, 0, number.to_bytes(4, "little"), 4)
            except (WorkerCrashed, Quarantined, Unavailable):
                counted["failed"] += 1
            except CallError as error:
                counted[type(error).__name__] += 1
            else:
                counted["answered" if int.from_bytes(reply, "little") == 2 * number else "wrong"] += 1
    is_right = set(counted) <= {"forked", "failed", "answered"} and counted["forked"] == 1
    os.write(1, f"wrong {counted['wrong']} {dict(counted)}\n".encode())
    os._exit(0 if is_right else 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
