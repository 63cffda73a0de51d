"""Options and arguments that several verbs have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from luacell.protocol.endpoints import parse_tcp
from luacell.protocol.identity import ID_MAX
from luacell.protocol.limits import SPARES_MAX
from luacell.protocol.paths import ENDPOINT_VARIABLE


class Output(StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """The least grave records that are told."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


class Sandbox(StrEnum):
    """Levels of the sandbox, each stricter than those before it."""

    DEFAULT = "default"
    HARDENED = "hardened"
    UNTRUSTED = "untrusted"


def contract_of(text: str) -> int | str:
    """Read a contract as the command line names it: `host.name@1`, or its id in hex.

    Raises:
        ValueError: the id has more than 64 bits, or is no hex number.
    """
    if not text.lower().startswith("0x"):
        return text
    value = int(text, 16)
    if value > ID_MAX:
        raise ValueError(f"contract id {text} has more than 64 bits")
    return value


def registered_names(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a contract with those that are registered, where a service is there to be asked."""
    from luacell.client import LuacellError, LuaHostBridge

    try:
        with LuaHostBridge.connect(context.params.get("endpoint")) as bridge:
            return [name for name in map(str, bridge.contracts()) if name.startswith(incomplete)]
    except (LuacellError, ValueError, OSError):
        return []


def _directory(text: str) -> Path:
    """Refuse no directory at all: a variable of a shell that is not set."""
    if not text:
        raise typer.BadParameter("the path is empty")
    return Path(text)


def _tcp(text: str) -> str:
    """Refuse an endpoint that a broker would refuse, before anything is started."""
    return str(parse_tcp(text, may_choose=True))


ContractName = Annotated[
    str,
    typer.Argument(
        metavar="NAME@V", help="Such as host.kv@1, or an id such as 0x04D2.", autocompletion=registered_names
    ),
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        envvar=ENDPOINT_VARIABLE,
        help="Run directory of the broker, or tcp://127.0.0.1:PORT; the default directory if unset.",
    ),
]
OutputFormat = Annotated[Output, typer.Option("--output", help="How to print: text for people, json for programs.")]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        parser=_directory,
        metavar="PATH",
        help="Directory of the sockets, mode 0700; the default one if unset.",
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        parser=_directory,
        metavar="PATH",
        help="Directory of the registry, mode 0700; if unset RUN_DIR/state, or the default one.",
    ),
]
Tcp = Annotated[
    str | None,
    typer.Option(
        "--tcp",
        parser=_tcp,
        metavar="tcp://127.0.0.1:PORT",
        help="Where hosts without shared memory may connect; port 0 lets the system choose.",
    ),
]
CrashRecords = Annotated[
    bool,
    typer.Option(
        "--crash-records/--no-crash-records",
        help="Keep the arguments of calls that crash their workers, in the state directory.",
    ),
]
Level = Annotated[LogLevel, typer.Option("--log-level", help="The least grave records that are told.")]
Spares = Annotated[int, typer.Option("--spares", min=0, max=SPARES_MAX, help="Blank workers to keep warm.")]
Floor = Annotated[
    Sandbox, typer.Option("--sandbox", help="The level that every contract gets at least, whatever it asks for.")
]
CModules = Annotated[
    list[str] | None,
    typer.Option("--c-module", metavar="PATH", help="A C module that hardened contracts may require; repeatable."),
]
