"""The verb new: a directory with a typed contract that works, a host that calls it, and a test of it.

The directory is a copy of `template/`, in which a name is put in the place of `example`.
"""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import Annotated, Final

import typer

from luacell.cli.console import UsageError, print_json, reported
from luacell.cli.options import Output, OutputFormat

TEMPLATE: Final = Path(__file__).parent / "template"
EXAMPLE: Final = "example"
NAME_MAX: Final = 64  # characters
FILES: Final = ("luacell.toml", "api.toml", "example.lua", "use_example.py", "test_example.py")
_NAME: Final = re.compile(r"[a-z][a-z0-9_]*")


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the contract and its directory, such as shapes.")],
    parent: Annotated[Path, typer.Option("--in", help="Directory to make it in.")] = Path(),
    output: OutputFormat = Output.TEXT,
) -> None:
    """Write a working directory: luacell.toml, api.toml, Lua, a Python host and a test."""
    with reported():
        if len(name) > NAME_MAX or not _NAME.fullmatch(name) or keyword.iskeyword(name):
            raise UsageError(
                f"name {name[:NAME_MAX]!r} is not a lower-case identifier of at most {NAME_MAX} characters"
            )
        directory = parent / name
        written = _write(directory, name)
        if output is Output.JSON:
            print_json({"directory": str(directory), "contract": f"host.{name}@1", "files": written})
            return
        for file in written:
            typer.echo(directory / file)


def _write(directory: Path, name: str) -> list[str]:
    """Write all files; return their names.

    Raises:
        UsageError: the directory is there already, or cannot be made.
    """
    try:
        directory.mkdir()
    except FileExistsError:
        raise UsageError(f"{directory} is there already; nothing was written") from None
    except OSError as error:
        raise UsageError(f"cannot make {directory}: {error.strerror}") from None
    written = []
    for file in FILES:
        target = file.replace(EXAMPLE, name)
        (directory / target).write_text((TEMPLATE / file).read_text("utf-8").replace(EXAMPLE, name), "utf-8")
        written.append(target)
    return written
