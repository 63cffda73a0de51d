"""`make bench`: what a call costs beside what it could cost at least, as ratios within one interleaved run.

Prints a table with the targets; with `--profile` also where the time of the broker goes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cpu import print_cpu
from benchmarks.figures import GROUPS, Scale, quick
from benchmarks.profile import profile_broker
from benchmarks.report import as_json, headline, surroundings, table


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=GROUPS, help="measure this group; may be given again")
    parser.add_argument("--quick", action="store_true", help="a few calls of each kind, to see that all of it works")
    parser.add_argument("--free", action="store_true", help="let the scheduler place the processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file as well")
    parser.add_argument("--profile", action="store_true", help="also show where the broker's time goes")
    options = parser.parse_args(words)
    if not options.free:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    facts = surroundings("processes placed by the scheduler" if options.free else "all processes on one CPU")
    scale = quick() if options.quick else Scale()
    start_s = time.monotonic()
    figures = []
    for name in options.only or GROUPS:
        print(f"measuring: {name} …", file=sys.stderr, flush=True)
        figures += GROUPS[name](scale)
    print(headline(facts))
    print(
        "p50 of round trips and calls per second of runs: medians over batches; ratio: median over neighbouring batches"
    )
    print(f"{scale.batches} batches of each, interleaved\n")
    print(table(figures))
    for reason in scale.left_out:
        print(f"left out: {reason}")
    print(f"\ntook {time.monotonic() - start_s:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(as_json(facts, figures, scale.left_out), indent=2) + "\n")
    if options.profile:
        print_cpu(scale.rate_calls)
        profile_broker(scale.rate_calls)
    return 0


if __name__ == "__main__":
    sys.exit(main())
