"""`make test-soak`: long runs against real processes, each with its figures in one line. See docs/testing.md."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from types import FrameType

from tests.soak import (
    catalogue,
    chaos,
    crashes,
    crowds,
    failures,
    fuzz,
    kills,
    late_writes,
    leaky,
    million,
    recovery,
    reloads,
    simulation,
    starts,
    storm,
    strangers,
)
from tests.soak.report import Report

RUNS: dict[str, Callable[[int], Report]] = {
    "kills": kills.run,
    "crashes": crashes.run,
    "crowds": crowds.run,
    "chaos": chaos.run,
    "million": million.run,
    "reloads": reloads.run,
    "failures": failures.run,
    "fuzz": fuzz.run,
    "late_writes": late_writes.run,
    "leaky": leaky.run,
    "recovery": recovery.run,
    "simulation": simulation.run,
    "starts": starts.run,
    "catalogue": catalogue.run,
    "storm": storm.run,
    "strangers": strangers.run,
}
LIMIT_S = 1800  # for all runs together; what is under way then is cleaned up, and counts as failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("runs", nargs="*", choices=[*RUNS, []], help="all of them if none is named")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="of all chance")
    parser.add_argument("--seconds", type=int, default=chaos.LASTS_S, help="how long chaos goes on")
    options = parser.parse_args()
    print(f"seed {options.seed}, {os.cpu_count()} CPUs", flush=True)
    runs: dict[str, Callable[[int], Report]] = {**RUNS, "chaos": partial(chaos.run, lasts_s=options.seconds)}
    limit_s = LIMIT_S + max(0, options.seconds - chaos.LASTS_S)
    reports = []
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(limit_s)
    for name in options.runs or RUNS:
        if not signal.getitimer(signal.ITIMER_REAL)[0]:
            reports.append(Report(name, {}, ["there was no time left for it"]))
            continue
        started_s = time.monotonic()
        print(f"{name} …", flush=True)
        try:
            report = runs[name](options.seed)
        except Exception as error:
            report = Report(name, {}, [f"{type(error).__name__}: {error}"])
        reports.append(report)
        print(f"{name} took {time.monotonic() - started_s:.0f} s, {len(report.violations)} violations", flush=True)
    signal.alarm(0)
    print(f"\nseed {options.seed}", *reports, sep="\n")
    return 1 if any(report.violations for report in reports) else 0


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("all runs together took too long")


if __name__ == "__main__":
    sys.exit(main())
