"""The verb stubs: the typed contracts of a directory as a Python module, for editors and type checkers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from luacell.cli.console import UsageError, print_json, reported
from luacell.cli.options import Output, OutputFormat

ENDINGS: Final = (".py", ".pyi")


def stubs(
    directory: Annotated[Path, typer.Argument(help="Directory with a luacell.toml and an api.toml.")],
    file: Annotated[Path, typer.Option("--out", "-o", help="File to write: NAME.py or NAME.pyi.")],
    output: OutputFormat = Output.TEXT,
) -> None:
    """Write the contracts of a directory as a typed Python module."""
    with reported():
        if file.suffix not in ENDINGS:
            raise UsageError(f"-o {file} ends neither with .py nor with .pyi")
        from luacell.cli.modules import python_module
        from luacell.cli.sources import api_in

        deployment, api = api_in(directory)
        deployed = {unit.ref.id for unit in deployment.units}
        contracts = [contract for contract in api.host_contracts if int(contract.id) in deployed]
        text = python_module(api, contracts, is_stub=file.suffix == ".pyi")
        try:
            file.write_text(text, "utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {file}: {error.strerror}") from None
        if output is Output.JSON:
            print_json({"file": str(file), "contracts": [str(contract) for contract in contracts]})
        else:
            typer.echo(f"{file}: {', '.join(map(str, contracts))}")
