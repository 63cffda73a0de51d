"""`luacell dev`: a directory is deployed, and again at every save, until Ctrl-C.

It looks at the files by name, size and time of change; what is wrong is said and does not end it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from luacell.cli.console import UsageError, connected, meaning_of, printable, reported
from luacell.cli.options import Endpoint
from luacell.protocol.errors import LuacellError

LOOK_INTERVAL_S: Final = 0.1  # between looks; a look at 1000 files takes 5 ms
FILES_MAX: Final = 4000  # that are looked at; a deployment has 1000 modules at most

Look = dict[str, tuple[int, int]]  # by path: size, and when it was changed in ns


def dev(
    directory: Annotated[Path, typer.Argument(help="Directory with a luacell.toml.")],
    endpoint: Endpoint = None,
) -> None:
    """Deploy a directory, and again at every save, until Ctrl-C; the contracts stay deployed."""
    with reported(), connected(endpoint) as bridge:
        seen: Look | None = None
        while True:
            look = look_at(directory)
            if look != seen:
                seen = look  # as it was before it was read: what is saved meanwhile is seen by the next look
                try:
                    typer.echo(f"deployed {', '.join(bridge.deploy(directory))}")
                except LuacellError as error:
                    _, hint = meaning_of(error)
                    typer.echo(f"luacell: {printable(str(error))}" + (f"\nhint: {hint}" if hint else ""), err=True)
            time.sleep(LOOK_INTERVAL_S)


def look_at(directory: Path) -> Look:
    """Return the size and the time of change of each file, hidden ones left out.

    Raises:
        UsageError: there are too many.
    """
    look: Look = {}
    for parent, names, files in os.walk(directory):
        names[:] = [name for name in names if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                continue
            path = os.path.join(parent, name)
            try:
                status = os.stat(path)
            except OSError:  # removed between two breaths, or a link to nowhere
                continue
            look[path] = status.st_size, status.st_mtime_ns
            if len(look) > FILES_MAX:
                raise UsageError(
                    f"{directory} holds more than {FILES_MAX} files", "`dev` is for a directory of its own"
                )
    return look
