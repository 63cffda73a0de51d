"""The verbs about contracts: deploy, undeploy, register, unregister, call, ls."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luacell.cli.console import UsageError, connected, print_bytes, print_json, read_input, reported
from luacell.cli.options import ContractName, Endpoint, Output, OutputFormat, contract_of
from luacell.cli.tables import print_table
from luacell.protocol.identity import FN_ID_MAX, ContractRef, format_id

if TYPE_CHECKING:
    from luacell.client import LuaFunction

ArgsHex = Annotated[str | None, typer.Option("--args-hex", help="Arguments as hex digits.")]
ArgsFile = Annotated[Path | None, typer.Option("--args-file", help="File with the arguments; - is stdin.")]
OutSize = Annotated[int, typer.Option("--out-size", min=0, help="Bytes the function may write.")]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds; the contract's deadline if unset.")]


def deploy(
    directory: Annotated[Path, typer.Argument(help="Directory with a luacell.toml.")],
    endpoint: Endpoint = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Register all contracts of a directory, or none; again, and a newer version takes their place."""
    with reported(), connected(endpoint) as bridge:
        names = bridge.deploy(directory)
        if output is Output.JSON:
            print_json({"deployed": names})
        else:
            typer.echo("\n".join(names))


def undeploy(
    unit: Annotated[str, typer.Argument(metavar="NAME_OR_DIR", help="A deployed unit, or its directory.")],
    endpoint: Endpoint = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Remove all contracts of a deployed directory; refused while another one requires them."""
    with reported(), connected(endpoint) as bridge:
        names = bridge.undeploy(unit)
        if output is Output.JSON:
            print_json({"undeployed": names})
        else:
            typer.echo("\n".join(names))


def register(
    contract: ContractName,
    file: Annotated[Path, typer.Argument(help="A Lua file that evaluates to function(fn_id, args, out); - is stdin.")],
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of a registered contract.")] = False,
    endpoint: Endpoint = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Register one contract from one file; it is there again after any restart."""
    with reported(contract):
        ref = ContractRef.of(contract_of(contract))
        function = _function(file)
        with connected(endpoint) as bridge:
            bridge.register_host_contract(contract_of(contract), function, replace=replace)
        if output is Output.JSON:
            print_json({"registered": str(ref), "id": format_id(ref.id)})
        else:
            typer.echo(f"{ref} registered")


def _function(file: Path) -> LuaFunction:
    from luacell.client import LuaFunction

    return LuaFunction(read_input(file), chunk_name="=stdin" if str(file) == "-" else f"@{file}")


def unregister(contract: ContractName, endpoint: Endpoint = None, output: OutputFormat = Output.TEXT) -> None:
    """Remove a contract; its running calls end first."""
    with reported(contract):
        ref = ContractRef.of(contract_of(contract))
        with connected(endpoint) as bridge:
            bridge.unregister_host_contract(ref.id)
        if output is Output.JSON:
            print_json({"unregistered": str(ref), "id": format_id(ref.id)})
        else:
            typer.echo(f"{ref} unregistered")


def revive(contract: ContractName, endpoint: Endpoint = None, output: OutputFormat = Output.TEXT) -> None:
    """End a contract's quarantine: its calls are let through again."""
    with reported(contract):
        ref = ContractRef.of(contract_of(contract))
        with connected(endpoint) as bridge:
            was_resting = bridge.revive(ref.id)
        if output is Output.JSON:
            print_json({"revived": str(ref), "was_resting": was_resting})
        else:
            typer.echo(f"{ref} revived" if was_resting else f"{ref} was not in quarantine")


def _function_names(context: typer.Context, incomplete: str) -> list[str]:
    from luacell.cli.typed import function_names

    return function_names(context, incomplete)


def call(
    contract: ContractName,
    function: Annotated[
        str,
        typer.Argument(
            metavar="FUNCTION", help="Name of a typed function, or the id of any.", autocompletion=_function_names
        ),
    ],
    arguments: Annotated[
        str | None,
        typer.Argument(metavar="[JSON]", help="Arguments of a typed function as a JSON object; - is stdin."),
    ] = None,
    args_hex: ArgsHex = None,
    args_file: ArgsFile = None,
    out_size: OutSize = 0,
    timeout: Timeout = None,
    raw: Annotated[bool, typer.Option("--raw", help="Write the bytes themselves to stdout.")] = False,
    endpoint: Endpoint = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Call a function: by name with values as JSON, or by id with raw bytes as hex digits."""
    with reported(contract):
        fn_id = _function_id(function)
        if fn_id is None:
            from luacell.cli import typed

            if args_hex is not None or args_file is not None or out_size or raw:
                raise UsageError(
                    f"{function} is called by name: it takes its arguments as JSON, and no --args-hex, --args-file, "
                    "--out-size or --raw"
                )
            typed.call(contract, function, arguments, timeout, endpoint, output)
            return
        if arguments is not None:
            raise UsageError(f"function {fn_id} is called by id: its arguments are bytes, in --args-hex or --args-file")
        target = contract_of(contract)
        args = arguments_of(args_hex, args_file)
        if raw and output is Output.JSON:
            raise UsageError("--raw and --output json exclude each other")
        with connected(endpoint) as bridge:
            result = bridge.call(target, fn_id, args, out_size, timeout=timeout)
        if raw:
            print_bytes(result)
        elif output is Output.JSON:
            print_json({"contract": contract, "function": fn_id, "out": result.hex()})
        elif result:
            typer.echo(result.hex())


def _function_id(text: str) -> int | None:
    """Read a function's id; None where it is a name.

    Raises:
        UsageError: it is neither.
    """
    if text.isidentifier():
        return None
    if not text.isdecimal() or len(text) > len(str(FN_ID_MAX)) or int(text) > FN_ID_MAX:
        raise UsageError(f"FUNCTION {text!r} is neither a name nor an id in 0..{FN_ID_MAX}")
    return int(text)


def arguments_of(args_hex: str | None, args_file: Path | None) -> bytes:
    """Return the arguments of a raw call.

    Raises:
        UsageError: both were given, or they cannot be read.
    """
    if args_hex is not None and args_file is not None:
        raise UsageError("--args-hex and --args-file exclude each other")
    if args_file is not None:
        return read_input(args_file)
    try:
        return bytes.fromhex(args_hex or "")
    except ValueError:
        shown = args_hex if args_hex is None or len(args_hex) <= 40 else f"{args_hex[:40]}…"
        raise UsageError(f"--args-hex {shown!r} is no pairs of hex digits", "21 as i32 is 15000000") from None


def list_contracts(endpoint: Endpoint = None, output: OutputFormat = Output.TEXT) -> None:
    """List the registered contracts."""
    with reported():
        with connected(endpoint) as bridge:
            found = bridge.contracts()
        if output is Output.JSON:
            print_json([{**asdict(info), "id": format_id(info.id)} for info in found])
            return
        print_table(
            ("id", "name", "version", "deadline", "workers", "kind"),
            [
                (
                    format_id(info.id),
                    info.name or "-",
                    info.version or "-",
                    f"{info.deadline:g} s",
                    str(info.workers),
                    "stateless" if info.stateless else "stateful",
                )
                for info in found
            ],
        )
