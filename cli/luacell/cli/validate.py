"""The verb validate: whether a directory can be deployed, as far as reading it tells; on request, as far as loading."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luacell.cli.console import UsageError, print_json, reported
from luacell.cli.options import Output, OutputFormat
from luacell.protocol.errors import BridgeError, CallError, Unavailable


def validate(
    directory: Annotated[Path, typer.Argument(help="Directory with a luacell.toml.")],
    load: Annotated[
        bool, typer.Option("--load", help="Load its contracts too, in a service of its own that ends at once.")
    ] = False,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Check a directory: its luacell.toml, its api.toml, and that its sources are there."""
    with reported():
        from luacell.cli.sources import read_directory
        from luacell.protocol.api import contracts_named

        found = read_directory(directory)
        if load:
            _load(directory)
        rows = []
        for unit in found.units:
            declared = contracts_named(found.api, unit.ref.name or "") if found.api is not None else []
            contract = next((each for each in declared if int(each.id) == unit.ref.id), None)
            count = None if contract is None else len(contract.functions)
            source = unit.function.chunk_name.removeprefix("@")
            rows.append({"contract": str(unit.ref), "source": source, "functions": count})
        if output is Output.JSON:
            print_json({"valid": True, "loaded": load, "contracts": rows})
            return
        for row in rows:
            kind = "raw" if row["functions"] is None else f"{row['functions']} functions"
            typer.echo(f"{row['contract']}  {row['source']}  {kind}")
        typer.echo(f"{directory} is valid" + (" and loads" if load else ""))


def _load(directory: Path) -> None:
    """Deploy a directory in a service of our own.

    Raises:
        UsageError: a contract does not load; the text is that of Lua.
        Unavailable: the service does not come up.
    """
    from luacell.client import LuaHostBridge

    with LuaHostBridge() as bridge:
        try:
            bridge.deploy(directory)
        except Unavailable:
            raise
        except (BridgeError, CallError) as error:
            raise UsageError(f"{directory} does not load: {error}") from None
