"""The verb explain: of a contract that a service or a directory describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luacell.cli.console import print_json, reported
from luacell.cli.options import ContractName, Endpoint, Output, OutputFormat


def explain(
    contract: ContractName,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Read it from a directory with a luacell.toml; no service is asked.")
    ] = None,
    endpoint: Endpoint = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Explain a typed contract: documentation, signatures in Lua and Python, and layouts."""
    with reported(contract):
        from luacell.cli.explanation import as_dict, as_lines
        from luacell.cli.sources import described, described_in

        api, found = described_in(directory, contract) if directory is not None else described(endpoint, contract)
        if output is Output.JSON:
            print_json(as_dict(found))
        else:
            typer.echo("\n".join(as_lines(api, found)))
