"""How figures are shown: a table for people, JSON for programs; both say where and how they were taken."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from typing import Any

import zmq

from benchmarks.measure import Figure, Target

TITLES = ("figure", "value", "", "beside", "value", "ratio", "half within", "must", "goal", "verdict", "GB/s")
IS_LEFT = (True, False, True, True, False, False, False, False, False, True, False)


def surroundings(placement: str) -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "placement": placement,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
        "kernel": platform.release(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def headline(facts: dict[str, Any]) -> str:
    load = " ".join(f"{each:.2f}" for each in facts["load_average"])
    return (
        f"{facts['placement']}, machine of {facts['cpus']} CPUs; Python {facts['python']}, libzmq {facts['libzmq']}, "
        f"kernel {facts['kernel']}; load before the run {load}"
    )


def table(figures: Sequence[Figure]) -> str:
    rows = [TITLES, *(_row(figure) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(TITLES))]
    lines = []
    for row in rows:
        cells = zip(row, widths, IS_LEFT, strict=True)
        lines.append(
            "  ".join(cell.ljust(width) if left else cell.rjust(width) for cell, width, left in cells).rstrip()
        )
    return "\n".join(lines)


def _row(figure: Figure) -> tuple[str, ...]:
    return (
        figure.name,
        _number(figure.value),
        figure.unit,
        figure.beside,
        _number(figure.beside_value),
        f"{figure.ratio:.2f}",
        "{:.2f}-{:.2f}".format(*figure.quartiles),
        *_bounds(figure.target),
        figure.verdict,
        f"{figure.gb_per_s:.2f}" if figure.gb_per_s else "",
    )


def _bounds(target: Target | None) -> tuple[str, str]:
    if target is None:
        return "", ""
    sign = ">=" if target.at_least else "<="
    return f"{sign} {target.must:g}", f"{sign} {target.goal:g}"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def as_json(facts: dict[str, Any], figures: Sequence[Figure], left_out: Sequence[str]) -> dict[str, Any]:
    """Return everything there is to tell, batches included."""
    return {
        **facts,
        "figures": [
            {**dataclasses.asdict(figure), "ratio": figure.ratio, "verdict": figure.verdict} for figure in figures
        ],
        "left_out": list(left_out),
    }
