"""A host that is interrupted in its calls: `python -m tests.support.interrupted ROUNDS THREADS`.

It prints "calling" before each call of the main thread, which lasts 30 ms and is to be ended by SIGINT; other threads
call meanwhile. In the end it prints what became of it all.
"""

from __future__ import annotations

import sys
import threading
import time

from luacell.client import LuaHostBridge
from tests.support.contracts import HEALTHY, PROBE, answers, deploy, function
from tests.support.waiting import settles

SPIN = "local ends = luacell.deadline() - {} while luacell.deadline() > ends do end "
DOUBLE = 'ffi.cast("int32_t *", out)[0] = 2 * ffi.cast("int32_t *", args)[0]'


def main() -> None:
    rounds, threads = int(sys.argv[1]), int(sys.argv[2])
    is_over = threading.Event()
    wrong: list[object] = []

    def call() -> None:
        number = 0
        try:
            while not is_over.is_set():
                number += 1
                if not answers(bridge, HEALTHY, number):
                    wrong.append(number)
        except Exception as error:
            wrong.append(error)

    with LuaHostBridge() as bridge:
        deploy(bridge, function(SPIN.format(0.03)))
        deploy(bridge, function(SPIN.format(0.01) + DOUBLE), HEALTHY)
        bridge.call(PROBE, 0)
        assert answers(bridge, HEALTHY)
        others = [threading.Thread(target=call) for _ in range(threads)]
        for other in others:
            other.start()
        first, memory = interrupted_calls(bridge, rounds, threads)
        second, more_memory = interrupted_calls(bridge, rounds, threads)
        is_over.set()
        for other in others:
            other.join()
        assert answers(bridge, HEALTHY)
    print("interrupted", first, second, "wrong", wrong, "more memory", more_memory - memory, flush=True)


def interrupted_calls(bridge: LuaHostBridge, rounds: int, threads: int) -> tuple[int, int]:
    """Call as often as told; return how many calls were interrupted, and the memory in use afterwards."""
    interrupted = 0
    for _ in range(rounds):
        try:
            print("calling", flush=True)
            bridge.call(PROBE, 0)
            time.sleep(20)  # the signal is on its way
        except KeyboardInterrupt:
            interrupted += 1
    for _ in range(3):
        bridge.call(PROBE, 0)
    settles(lambda: bridge.health()["slots_in_flight"] <= threads, True, "slots come back")
    return interrupted, bridge.health()["memory_bytes"]


if __name__ == "__main__":
    main()
