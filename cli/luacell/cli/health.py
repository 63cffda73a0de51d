"""The verb health: how the service is, for people, for programs, and for whoever waits for it to be ready.

What the broker tells grows with it; this shows whatever is there by its shape: single values as a list, maps and lists
of maps as tables. Units are in the names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import typer

from luacell.cli.console import EXIT_UNREACHABLE, connected, fail, print_json, reported
from luacell.cli.options import Endpoint, Output, OutputFormat
from luacell.cli.tables import print_pairs, print_table
from luacell.protocol.errors import Unavailable

WAIT_MAX_S: Final = 3600.0
LOOK_EVERY_S: Final = 0.05
_SERVING: Final = ("blank", "loading", "idle", "busy")  # states of a worker that prove its worker host

Wait = Annotated[
    float, typer.Option("--wait", min=0, max=WAIT_MAX_S, help="With --ready: seconds to wait until it is.")
]


def health(
    ready: Annotated[
        bool, typer.Option("--ready", help="Only tell whether calls can be served: exit 0, else 69.")
    ] = False,
    wait: Wait = 0.0,
    endpoint: Endpoint = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Show how the service is."""
    with reported():
        if ready:
            _tell_readiness(endpoint, wait, output)
            return
        with connected(endpoint) as bridge:
            state = bridge.health()
        if output is Output.JSON:
            print_json(state)
        else:
            show(state)


# -- readiness ------------------------------------------------------------------------------------------------
def _tell_readiness(endpoint: str | None, wait_s: float, output: Output) -> None:
    until_s = time.monotonic() + wait_s
    while True:
        reason = _look(endpoint)
        left_s = until_s - time.monotonic()
        if not reason or left_s <= 0:
            break
        time.sleep(min(LOOK_EVERY_S, left_s))
    if output is Output.JSON:
        print_json({"ready": not reason, "reason": reason})
    elif not reason:
        typer.echo("ready")
    if reason:
        fail(f"not ready: {reason}", EXIT_UNREACHABLE, "" if wait_s else "--wait SECONDS waits for it")


def _look(endpoint: str | None) -> str:
    from luacell.client import LuaHostBridge

    try:
        with LuaHostBridge.connect(endpoint) as bridge:
            return unreadiness(bridge.health())
    except Unavailable as error:
        return str(error)


def unreadiness(state: Mapping[str, Any]) -> str:
    """Tell why a service cannot serve a call now, or "" where it can."""
    if state.get("state") == "draining":
        return "it is draining: it finishes the calls that it has and takes no new ones"
    if not state.get("worker_host", True):
        return "the broker is there, its worker host is not"
    if state.get("spares_wanted", 1) and not any(worker["state"] in _SERVING for worker in state["workers"]):
        return "broker and worker host are there, no worker is up yet"
    return ""


# -- for people -----------------------------------------------------------------------------------------------
def show(state: Mapping[str, Any]) -> None:
    """Print a state: single values first, then a table for each that has more to it."""
    pairs: list[tuple[str, str]] = []
    tables: list[tuple[str, Sequence[str], list[list[str]]]] = []
    for key, value in state.items():
        rows = _rows_of(value)
        if rows:
            columns = list(dict.fromkeys(name for row in rows for name in row))
            cells = [[shown(name, row[name]) if name in row else "" for name in columns] for row in rows]
            tables.append((label(key), [label(name) if name else label(key) for name in columns], cells))
        elif isinstance(value, Mapping) and value:
            pairs += [(f"{label(key)}: {label(name)}", shown(name, each)) for name, each in value.items()]
        else:
            pairs.append((label(key), shown(key, value)))
    print_pairs(pairs)
    for title, heads, cells in tables:
        typer.echo()
        print_table(heads, cells, title)


def _rows_of(value: object) -> list[dict[str, Any]]:
    """Return the rows of what is a table: a list of maps, or a map of maps, whose keys become the first column."""
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        return [dict(row) for row in value]
    if isinstance(value, Mapping) and value and all(isinstance(row, Mapping) for row in value.values()):
        return [{"": name, **row} for name, row in value.items()]
    return []


_UNITS: Final = {"_us": "us", "_ms": "ms", "_s": "s"}


def label(key: str) -> str:
    """Return a key as people read it, without the unit."""
    for suffix in (*_UNITS, "_bytes"):
        key = key.removesuffix(suffix)
    return key.replace("_", " ")


def shown(key: str, value: object) -> str:
    """Return a value as people read it, with the unit that its key names."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _with_unit(key, value)
    if isinstance(value, Mapping):
        return ", ".join(f"{label(str(name))} {shown(str(name), each)}" for name, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(shown(key, each) for each in value) or "none"
    return str(value) or "-"


def _with_unit(key: str, value: float) -> str:
    if key.endswith("_bytes"):
        for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if abs(value) >= size:
                return f"{value / size:.1f} {unit}"
        return f"{value:g} B"
    for suffix, unit in _UNITS.items():
        if key.endswith(suffix):
            return f"{value:g} {unit}"
    return str(value) if isinstance(value, int) else f"{value:g}"
