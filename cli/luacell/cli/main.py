"""The `luacell` command.

Each verb is thin: it reads its arguments, calls the public client, and prints. Results go to stdout, errors with a
hint to stderr. Exit codes: 0 ok, 1 call failed, 2 usage, 3 no such contract, 4 deadline, 5 not allowed, 69 broker
unreachable.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from luacell.client import (
    ContractNotFound,
    DeadlineExceeded,
    LuacellError,
    LuaFunction,
    LuaHostBridge,
    Unauthorized,
    Unavailable,
)
from luacell.protocol.endpoints import parse_tcp
from luacell.protocol.identity import ID_MAX
from luacell.protocol.limits import SPARES_MAX
from luacell.protocol.paths import ENDPOINT_VARIABLE, default_run_directory

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NOT_FOUND: Final = 3
EXIT_DEADLINE: Final = 4
EXIT_NOT_ALLOWED: Final = 5
EXIT_UNREACHABLE: Final = 69

app = typer.Typer(
    help="Lua host contracts, each in a process of its own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Output(StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"


Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        envvar=ENDPOINT_VARIABLE,
        help="Run directory of the broker, or tcp://127.0.0.1:PORT; the default directory if unset.",
    ),
]
OutputFormat = Annotated[Output, typer.Option("--output", help="text or json.")]
RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", help="Directory of the sockets, mode 0700; the default one if unset."),
]
LogLevel = Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")]
Spares = Annotated[int, typer.Option("--spares", min=0, max=SPARES_MAX, help="Blank workers to keep warm.")]
Tcp = Annotated[
    str | None,
    typer.Option("--tcp", help="tcp://127.0.0.1:PORT for hosts without shared memory; port 0 lets the system choose."),
]
ContractName = Annotated[str, typer.Argument(metavar="NAME@V", help="Such as host.kv@1, or an id such as 0x04D2.")]


@contextmanager
def _reported() -> Iterator[None]:
    """Turn errors into a line on stderr and an exit code."""
    try:
        yield
    except LuacellError as error:
        _fail(str(error), _exit_code(error))
    except (ValueError, OSError) as error:
        _fail(str(error), EXIT_USAGE)


def _fail(text: str, code: int) -> None:
    typer.echo(f"luacell: {text}", err=True)
    raise typer.Exit(code)


def _exit_code(error: LuacellError) -> int:
    codes = {
        Unavailable: EXIT_UNREACHABLE,
        ContractNotFound: EXIT_NOT_FOUND,
        DeadlineExceeded: EXIT_DEADLINE,
        Unauthorized: EXIT_NOT_ALLOWED,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_FAILED)


def _contract(text: str) -> int | str:
    if not text.lower().startswith("0x"):
        return text
    value = int(text, 16)
    if value > ID_MAX:
        raise ValueError(f"contract id {text} has more than 64 bits")
    return value


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


@app.command()
def serve(run_dir: RunDir = None, tcp: Tcp = None, spares: Spares = 1, log_level: LogLevel = "info") -> None:
    """Run a whole service in the foreground: broker, worker host and their parent."""
    from luacell.cli import serve as parent

    with _reported():
        _check_tcp(tcp)
    raise typer.Exit(parent.run(_run_dir(run_dir), spares, log_level, tcp))


@app.command()
def broker(run_dir: RunDir = None, tcp: Tcp = None, spares: Spares = 1, log_level: LogLevel = "info") -> None:
    """Run a broker alone, as containers do."""
    with _reported():
        _check_tcp(tcp)
    listen = ["--tcp", tcp] if tcp is not None else []
    _become("luacell.broker", _run_dir(run_dir), "--spares", str(spares), "--log-level", log_level, *listen)


@app.command("worker-host")
def worker_host(run_dir: RunDir = None, log_level: LogLevel = "info") -> None:
    """Run a worker host alone; it serves the broker of its run directory."""
    _become("luacell.worker", _run_dir(run_dir), "--log-level", log_level)


def _run_dir(given: Path | None) -> Path:
    return given if given is not None else Path(default_run_directory(os.environ))


def _check_tcp(tcp: str | None) -> None:
    """Refuse an endpoint that a broker would refuse, before anything is started."""
    if tcp is not None:
        parse_tcp(tcp, may_choose=True)


def _become(module: str, run_dir: Path, *options: str) -> None:
    """Replace this process by one that has not imported what only the command line needs."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, "--run-dir", str(run_dir), *options])


@app.command()
def deploy(
    directory: Annotated[Path, typer.Argument(help="Directory with a luacell.toml.")],
    endpoint: Endpoint = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Register all contracts of a directory, or none."""
    with _reported(), LuaHostBridge.connect(endpoint) as bridge:
        names = bridge.deploy(directory)
        _print_json({"deployed": names}) if output is Output.JSON else typer.echo("\n".join(names))


@app.command()
def register(
    contract: ContractName,
    file: Annotated[Path, typer.Argument(help="A Lua file that evaluates to the function.")],
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of a registered contract.")] = False,
    endpoint: Endpoint = None,
) -> None:
    """Register one contract from one file."""
    with _reported():
        function = LuaFunction.from_file(file)
        with LuaHostBridge.connect(endpoint) as bridge:
            bridge.register_host_contract(_contract(contract), function, replace=replace)


@app.command()
def unregister(contract: ContractName, endpoint: Endpoint = None) -> None:
    """Remove a contract; its running calls end first."""
    with _reported(), LuaHostBridge.connect(endpoint) as bridge:
        bridge.unregister_host_contract(_contract(contract))


@app.command()
def call(
    contract: ContractName,
    function: Annotated[int, typer.Argument(metavar="FUNCTION", min=0, help="Function id.")],
    args_hex: Annotated[str | None, typer.Option("--args-hex", help="Arguments as hex digits.")] = None,
    args_file: Annotated[Path | None, typer.Option("--args-file", help="File with the arguments.")] = None,
    out_size: Annotated[int, typer.Option("--out-size", min=0, help="Bytes the function may write.")] = 0,
    timeout: Annotated[
        float | None, typer.Option("--timeout", help="Seconds; the contract's deadline if unset.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Write the bytes themselves to stdout.")] = False,
    endpoint: Endpoint = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Call a function by id with raw bytes; prints what it wrote as hex digits."""
    with _reported():
        if args_hex is not None and args_file is not None:
            raise ValueError("--args-hex and --args-file exclude each other")
        args = bytes.fromhex(args_hex) if args_hex is not None else args_file.read_bytes() if args_file else b""
        with LuaHostBridge.connect(endpoint) as bridge:
            result = bridge.call(_contract(contract), function, args, out_size, timeout=timeout)
    if raw:
        sys.stdout.buffer.write(result)
    elif output is Output.JSON:
        _print_json({"out": result.hex()})
    elif result:
        typer.echo(result.hex())


@app.command("ls")
def list_contracts(endpoint: Endpoint = None, output: OutputFormat = Output.TEXT) -> None:
    """List the registered contracts."""
    with _reported(), LuaHostBridge.connect(endpoint) as bridge:
        found = bridge.contracts()
    if output is Output.JSON:
        _print_json([{**_fields(info), "id": f"{info.id:016X}"} for info in found])
        return
    for info in found:
        kind = f"stateless, {info.workers} workers" if info.stateless else "stateful"
        typer.echo(f"{info.id:016X}  {info.name or '-'}  {info.version or '-'}  {info.deadline:g} s  {kind}")


def _fields(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__dataclass_fields__}


@app.command()
def health(endpoint: Endpoint = None, output: OutputFormat = Output.TEXT) -> None:
    """Show how the service is."""
    with _reported(), LuaHostBridge.connect(endpoint) as bridge:
        state = bridge.health()
    if output is Output.JSON:
        _print_json(state)
        return
    for key, value in state.items():
        if key != "workers":
            typer.echo(f"{key}: {value}")
    for worker in state["workers"]:
        typer.echo(f"worker {worker['pid']}  {worker['state']}  {worker['contract'] or '-'}  {worker['served']} calls")


@app.command()
def demo() -> None:
    """Show what luacell is for: a service that is crashed on purpose and loses nothing."""
    from luacell.cli.demo import run_demo

    raise typer.Exit(run_demo())
