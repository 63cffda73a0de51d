"""A host of `chaos` in a process of its own: `python -m tests.soak.chaos_host RUN_DIRECTORY SEED RATE COPIES TIMEOUT`.

Its threads call until stdin ends. Each call is written to stdout as it is made and as it ends, a line each, so that
what a host was told is known even if it is killed:

    sent NUMBER CONTRACT TIME TIMEOUT
    ended NUMBER OUTCOME TIME
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from contextlib import suppress

from luacell.client import LuaHostBridge, Unavailable
from tests.soak.history import Entry
from tests.soak.hostile import HEALTHY_NAMES, HOSTILE, name_of
from tests.soak.load import NUMBER_SIZE, arguments, judge
from tests.support.waiting import eventually

THREADS = 4
HOSTILE_SHARE = 0.05
HOSTILE_TIMEOUT_S = 0.4


def main(run_directory: str, seed: int, rate: float, copies: int, timeout_s: float) -> None:
    is_over = threading.Event()
    with eventually(lambda: _connected(run_directory), "there is a broker") as bridge:
        threads = [
            threading.Thread(
                target=_work, args=(bridge, random.Random(seed * THREADS + n), n, rate, copies, timeout_s, is_over)
            )
            for n in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        is_over.set()
        for thread in threads:
            thread.join()


def _connected(run_directory: str) -> LuaHostBridge | None:
    with suppress(Unavailable):  # the broker was killed, and is not back yet
        return LuaHostBridge.connect(run_directory)
    return None


def _work(
    bridge: LuaHostBridge,
    rng: random.Random,
    place: int,
    rate: float,
    copies: int,
    timeout_s: float,
    is_over: threading.Event,
) -> None:
    pause_s = THREADS / rate
    number = place
    due_s = time.monotonic() + rng.uniform(0, pause_s)
    while not is_over.wait(max(0.0, due_s - time.monotonic())):
        is_hostile = rng.random() < HOSTILE_SHARE
        name = name_of(rng.choice(list(HOSTILE)), rng.randrange(copies)) if is_hostile else rng.choice(HEALTHY_NAMES)
        _call(bridge, Entry(number, name, time.monotonic(), HOSTILE_TIMEOUT_S if is_hostile else timeout_s))
        number += THREADS
        due_s = max(due_s + pause_s, time.monotonic() - 1.0)  # what was missed is made up for, within reason


def _call(bridge: LuaHostBridge, entry: Entry) -> None:
    _tell("sent", entry.number, entry.contract, entry.sent_s, entry.timeout_s)
    try:
        outcome = judge(entry, bridge.call(entry.contract, 0, arguments(entry), NUMBER_SIZE, timeout=entry.timeout_s))
    except Exception as error:
        outcome = type(error).__name__
    _tell("ended", entry.number, outcome, time.monotonic())


def _tell(*words: object) -> None:
    os.write(1, "\t".join(map(str, words)).encode() + b"\n")  # under PIPE_BUF: lines of threads never mix


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
