"""The dispatcher's simulation for a million steps; seeds of worlds in which a rule was broken are printed and kept.

Kept seeds are replayed by `tests/broker/test_simulation.py` for ever after.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Final

from tests.broker.auditor import Violation
from tests.broker.simulation import simulate
from tests.soak.report import Report

STEPS: Final = 1_000_000
STEPS_PER_WORLD: Final = 10_000
KEPT: Final = Path(__file__).parents[1] / "broker" / "kept_seeds.txt"  # "SEED STEPS" a line


def kept() -> list[tuple[int, int]]:
    """Return the seeds that were kept, each with its number of steps."""
    lines = (line.split() for line in KEPT.read_text().splitlines() if line and not line.startswith("#"))
    return [(int(seed), int(steps)) for seed, steps in lines]


def run(seed: int, steps: int = STEPS) -> Report:
    """Simulate worlds until they have made `steps` steps."""
    rng = random.Random(seed)
    done = worlds = 0
    answers, deaths = Counter[str](), Counter[str]()
    violations: list[str] = []
    while done < steps:
        world_seed = rng.randrange(1 << 32)
        worlds += 1
        try:
            world = simulate(world_seed, STEPS_PER_WORLD)
        except Violation as violation:
            violations.append(str(violation))
            done += STEPS_PER_WORLD
            with KEPT.open("a") as file:
                file.write(f"{world_seed} {STEPS_PER_WORLD}\n")
            continue
        done += world.steps
        answers += world.auditor.answers
        deaths += world.auditor.deaths
    return Report(
        "the dispatcher simulated",
        {
            "steps": f"{done} in {worlds} worlds",
            "answers": str(answers.total()),
            "deaths of workers": str(deaths.total()),
        },
        violations,
    )
