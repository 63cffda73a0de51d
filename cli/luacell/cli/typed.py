"""A typed call from the command line: JSON in, JSON out, by what the contract's api.toml says."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import typer

from luacell.cli.console import UsageError, connected, print_json, read_input
from luacell.cli.options import Output
from luacell.cli.sources import described, name_of
from luacell.protocol.api import Contract, Function, Void
from luacell.protocol.errors import TypeMismatch


def call(
    contract: str, function: str, arguments: str | None, timeout: float | None, endpoint: str | None, output: Output
) -> None:
    """Call a function by its name and print its result as JSON; nothing where it returns none.

    Args:
        contract: name or id, as the user gave it.
        function: name.
        arguments: a JSON object; None is one without members, "-" is stdin.
        timeout: seconds.
        endpoint: of the broker.
        output: JSON adds contract and function, and null where there is no result.

    Raises:
        UsageError: the contract is raw, or has no such function.
        JsonError: the arguments are not those of the function.
        LuacellError: the call failed.
    """
    from luacell.cli.values import json_of, read_arguments

    with connected(endpoint) as bridge:
        name = name_of(bridge, contract)
        try:
            found = bridge.describe(name).contract
        except TypeMismatch:
            hint = "call a function by its id, or deploy the contract with an api.toml"
            raise UsageError(f"{contract} is a raw contract: its functions have no names", hint) from None
        called = function_of(found, function)
        text = _stdin() if arguments == "-" else arguments or ""
        values = read_arguments(called, text, f"{found}.{function}")
        proxy = bridge.contract(name)
        if timeout is not None:
            if found.function("with_options") is not None:  # the proxy's own is hidden by it
                raise UsageError(f"{found} has a function with_options; its calls take no --timeout")
            proxy = proxy.with_options(timeout=timeout)
        result = json_of(called.result, getattr(proxy, function)(**values))
    if output is Output.JSON:
        print_json({"contract": str(found), "function": function, "result": result})
    elif not isinstance(called.result, Void):
        typer.echo(json.dumps(result, ensure_ascii=False))


def _stdin() -> str:
    """Read the arguments from stdin.

    Raises:
        UsageError: they are no text.
    """
    try:
        return read_input(Path("-")).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is no UTF-8: {error.reason} at byte {error.start}") from None


def function_of(contract: Contract, name: str) -> Function:
    """Return a function of a contract.

    Raises:
        UsageError: there is none of that name; the text says which was probably meant.
    """
    found = contract.function(name)
    if found is None:
        names = [function.name for function in contract.functions]
        close = difflib.get_close_matches(name, names, 1)
        meant = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names) or 'none'}"
        raise UsageError(f"{contract} has no function {name!r}; {meant}")
    return found


def function_names(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a function with those of the contract, where a service is there to be asked."""
    try:
        _, contract = described(context.params.get("endpoint"), str(context.params.get("contract")))
    except Exception:  # completion says nothing of what went wrong: typing goes on
        return []
    return [function.name for function in contract.functions if function.name.startswith(incomplete)]
