"""The verb doctor: which layers of the sandbox are in force, level by level, or why not.

A service that runs is asked for the levels that it uses; the others are tried here and now, in throwaway processes that
confine themselves as workers do. It changes nothing.
"""

from __future__ import annotations

import os
from typing import Any, Final

import typer

from luacell.cli.console import EXIT_FAILED, connected, fail, print_json, reported
from luacell.cli.options import Endpoint, Output, OutputFormat
from luacell.cli.tables import print_pairs, print_table
from luacell.protocol.confinement import SANDBOX_LEVELS, Layer
from luacell.protocol.errors import Unavailable

_COLUMNS: Final = ("level", "layer", "in force", "what it does, or why it is not")


def doctor(endpoint: Endpoint = None, output: OutputFormat = Output.TEXT) -> None:
    """Show which layers of the sandbox are in force at each level, or why not."""
    with reported():
        report = _report(endpoint)
        if output is Output.JSON:
            print_json(report)
        else:
            _show(report)
        lacking = [name for name, level in report["levels"].items() if not level["available"]]
    if lacking:
        fail(
            f"sandbox levels that cannot be had: {', '.join(lacking)}", EXIT_FAILED, "the table says which layer lacks"
        )


def _report(endpoint: str | None) -> dict[str, Any]:
    tried = {level: _tried(level) for level in SANDBOX_LEVELS}  # first: a bridge has threads, and no fork after that
    health = _health(endpoint)
    levels = tried | (_told(health) if health is not None else {})
    kernel = os.uname()
    return {
        "service": health is not None,
        "floor": None if health is None else health["posture"]["level"],
        "kernel": f"{kernel.sysname} {kernel.release} {kernel.machine}",
        "levels": {name: levels[name] for name in SANDBOX_LEVELS},
    }


def _tried(level: str) -> dict[str, Any]:
    from luacell.worker.sandbox.levels import trial

    layers, problem = trial(level)
    return {"available": not problem, "problem": problem, "by": "trial", "layers": [_row(layer) for layer in layers]}


def _health(endpoint: str | None) -> dict[str, Any] | None:
    """Return what a service tells, or None where there is none and none was named."""
    from luacell.client import LuaHostBridge

    if endpoint is not None:
        with connected(endpoint) as bridge:
            return bridge.health()
    try:
        with LuaHostBridge.connect() as bridge:
            return bridge.health()
    except Unavailable:
        return None


def _told(health: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the levels that a service uses, as its workers have told them."""
    levels: dict[str, dict[str, Any]] = {}
    for row in health["sandbox"]:
        level = levels.setdefault(row["level"], {"available": True, "problem": "", "by": "service", "layers": []})
        level["layers"].append(_row(Layer(row["layer"], row["in_force"], row["detail"])))
    return levels


def _row(layer: Layer) -> dict[str, Any]:
    return {"layer": layer.name, "in_force": layer.in_force, "detail": layer.detail}


def _show(report: dict[str, Any]) -> None:
    asked = "asked; levels that it does not use were tried" if report["service"] else "none runs; every level was tried"
    pairs = [("kernel", report["kernel"]), ("service", asked)]
    if report["floor"] is not None:
        pairs.append(("floor", report["floor"]))
    pairs += [(f"level {name}", level["problem"] or "available") for name, level in report["levels"].items()]
    print_pairs(pairs)
    typer.echo()
    rows = [
        (name, layer["layer"], "yes" if layer["in_force"] else "no", layer["detail"])
        for name, level in report["levels"].items()
        for layer in level["layers"]
    ]
    print_table(_COLUMNS, rows)
