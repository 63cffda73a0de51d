"""How verbs speak: results to stdout as text or JSON, errors to stderr with a hint, and what the exit code says.

0 ok · 1 call failed · 2 usage · 3 no such contract · 4 deadline · 5 not allowed · 69 broker unreachable
130 interrupted · 141 nobody reads the output
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import typer

from luacell.cli.__main__ import EXIT_INTERRUPTED, EXIT_NO_READER, abandon_stdout
from luacell.protocol import errors
from luacell.protocol.errors import LuacellError

if TYPE_CHECKING:
    from luacell.client import LuaHostBridge

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NOT_FOUND: Final = 3
EXIT_DEADLINE: Final = 4
EXIT_NOT_ALLOWED: Final = 5
EXIT_UNREACHABLE: Final = 69

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_STDIN: Final = "-"

# The first that fits an error, most exact first: exit code and hint.
_MEANINGS: Final[tuple[tuple[type[LuacellError], int, str], ...]] = (
    (errors.ContractNotFound, EXIT_NOT_FOUND, "`luacell ls` shows what is registered"),
    (errors.CrashNotFound, EXIT_NOT_FOUND, ""),
    (
        errors.DeadlineExceeded,
        EXIT_DEADLINE,
        "a contract's deadline and run_limit stand in its luacell.toml; --timeout can only shorten them",
    ),
    (errors.HostContractVersionMismatch, EXIT_NOT_FOUND, "`luacell ls` shows what is registered"),
    (errors.ApiError, EXIT_USAGE, ""),
    (errors.ArgumentError, EXIT_USAGE, "`luacell explain` shows what a function takes"),
    (errors.Unauthorized, EXIT_NOT_ALLOWED, ""),
    (errors.Unavailable, EXIT_UNREACHABLE, "`luacell health` shows whether the service is there"),
    (errors.DuplicateContract, EXIT_FAILED, "--replace takes its place; `luacell unregister` removes it"),
    (errors.TypeMismatch, EXIT_FAILED, "the file must evaluate to function(fn_id, args, out)"),
    (errors.VmDispatchFailed, EXIT_FAILED, "register it anew with --replace"),
    (errors.BadRequest, EXIT_USAGE, ""),
    (errors.TooLarge, EXIT_USAGE, ""),
    (errors.WorkerCrashed, EXIT_FAILED, "the next call gets a fresh worker"),
    (errors.OutOfMemory, EXIT_FAILED, "`memory` in luacell.toml sets the limit"),
    (errors.Busy, EXIT_FAILED, "try again; `luacell health` shows queues and workers"),
)


class UsageError(Exception):
    """What the user gave cannot be used; the text says why."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


@contextlib.contextmanager
def reported(subject: str = "") -> Iterator[None]:
    """Turn whatever goes wrong in the block into a message on stderr and an exit code.

    Args:
        subject: what it is about, as the user named it.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        abandon_stdout()
        raise typer.Exit(EXIT_NO_READER) from None
    except UsageError as error:
        fail(str(error), EXIT_USAGE, error.hint)
    except LuacellError as error:
        code, hint = meaning_of(error)
        text = str(error)
        fail(text if not subject or text.startswith(subject) else f"{subject}: {text}", code, hint)
    except ValueError as error:
        fail(str(error), EXIT_USAGE)
    except OSError as error:
        fail(str(error), EXIT_FAILED)


def fail(text: str, code: int, hint: str = "") -> NoReturn:
    """Say what is wrong and what to do, and end with an exit code."""
    typer.echo(f"luacell: {printable(text)}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)
    raise typer.Exit(code)


def meaning_of(error: LuacellError) -> tuple[int, str]:
    """Return the exit code and the hint of an error."""
    from luacell.client import DeploymentError, NotDeployed

    if isinstance(error, NotDeployed):
        return EXIT_NOT_FOUND, "`luacell ls --output json` shows the unit of each contract"
    if isinstance(error, DeploymentError):
        return EXIT_USAGE, ""
    return next(((code, hint) for kind, code, hint in _MEANINGS if isinstance(error, kind)), (EXIT_FAILED, ""))


def printable(text: str) -> str:
    """Write out control characters: what a contract says must not steer the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


@contextlib.contextmanager
def connected(endpoint: str | None) -> Iterator[LuaHostBridge]:
    """Connect to the broker of an endpoint for the length of the block."""
    from luacell.client import LuaHostBridge

    try:
        bridge = LuaHostBridge.connect(endpoint)
    except errors.Unavailable as error:
        if isinstance(error.__context__, PermissionError):
            fail(str(error), EXIT_NOT_ALLOWED, "a run directory is its owner's alone: run as the user who serves there")
        hint = "--endpoint or LUACELL_ENDPOINT names the run directory of a service that runs"
        fail(str(error), EXIT_UNREACHABLE, hint)
    with bridge:
        yield bridge


def read_input(path: Path) -> bytes:
    """Return the bytes of a file, or those of stdin for `-`.

    Raises:
        UsageError: it cannot be read.
    """
    if os.fspath(path) == _STDIN:
        return sys.stdin.buffer.read()
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def print_json(value: Any) -> None:
    """Print a value for programs."""
    typer.echo(json.dumps(value, indent=2))


def print_bytes(value: bytes) -> None:
    """Write bytes to stdout as they are."""
    if sys.stdout is not None:
        sys.stdout.flush()
        rest = memoryview(value)
        while rest:  # where Python does not buffer, a write may be a part of it
            rest = rest[sys.stdout.buffer.write(rest) :]
        sys.stdout.buffer.flush()
