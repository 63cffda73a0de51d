"""The verbs about crash records: `luacell crash ls | show | replay | export`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luacell.cli.console import EXIT_FAILED, UsageError, connected, print_json, printable, read_input, reported
from luacell.cli.options import Endpoint, Output, OutputFormat
from luacell.cli.tables import print_pairs, print_table
from luacell.protocol.identity import format_id

if TYPE_CHECKING:
    from luacell.client import Crash, CrashInfo

app = typer.Typer(
    help="Calls that crashed their workers: look at them, make them again, turn them into tests.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

CrashId = Annotated[str, typer.Argument(metavar="ID", help="As `luacell crash ls` shows it.")]


@app.command("ls")
def list_crashes(endpoint: Endpoint = None, output: OutputFormat = Output.TEXT) -> None:
    """List the calls on record that crashed, were stopped at a limit, or ran out of memory, newest first."""
    with reported():
        with connected(endpoint) as bridge:
            found = bridge.crashes()
        if output is Output.JSON:
            print_json([_facts(info) for info in found])
            return
        print_table(
            ("id", "time", "contract", "function", "code", "cause"),
            [
                (info.id, _when(info), info.contract, _function(info), str(info.code), printable(info.cause))
                for info in found
            ],
        )


@app.command()
def show(crash_id: CrashId, endpoint: Endpoint = None, output: OutputFormat = Output.TEXT) -> None:
    """Show all that is known of a crash, its arguments included."""
    with reported():
        crash = _crash(crash_id, endpoint)
        from luacell.cli.crash_arguments import decoded, dumped

        values, info = decoded(crash), crash.info
        if output is Output.JSON:
            args = None if crash.args is None else crash.args.hex()
            circumstances = {"sandbox": crash.sandbox or None, "c_modules": crash.c_modules, "budget": crash.budget}
            settings = crash.settings.as_fields()
            print_json({**_facts(info), "args": args, "arguments": values, "settings": settings, **circumstances})
            return
        print_pairs([(name, printable(text)) for name, text in _told(crash)])
        if values is not None:
            import json

            print_pairs([(f"  {name}", json.dumps(value, ensure_ascii=False)) for name, value in values.items()])
        if crash.args:
            typer.echo("\n".join(["arguments", *(f"  {line}" for line in dumped(crash.args))]))
        if info.stderr:
            typer.echo("\n".join(["stderr", *(f"  {printable(line)}" for line in info.stderr.splitlines())]))


@app.command()
def replay(
    crash_id: CrashId,
    source: Annotated[
        Path | None, typer.Option("--source", help="A Lua file to try in place of the recorded source; - is stdin.")
    ] = None,
    endpoint: Endpoint = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Make the call again in a fresh worker, away from the service; exit code 0 when it succeeds, 1 when it fails."""
    with reported():
        from luacell.cli.replay import replay as make_again
        from luacell.cli.reproduction import Reproduction

        tried = None if source is None else read_input(source)
        crash = _crash(crash_id, endpoint)
        outcome = make_again(Reproduction.of(crash), tried)
        info, error, is_same = crash.info, outcome.error, outcome.is_as_recorded(crash.info)
        if output is Output.JSON:
            print_json({"crash": info.id, "outcome": outcome.as_dict(), "as_recorded": is_same})
        else:
            rows = [("crash", f"{info.id}  {info.contract} {_function(info)}"), ("recorded", _ended(info))]
            if error is None:
                rows.append(("now", f"succeeds{', and writes ' + outcome.out.hex() if outcome.out else ''}"))
            else:
                rows += [("now", f"code {int(error.code)}: {printable(error.message)}"), ("began", error.began)]
            print_pairs([*rows, ("as recorded", "yes" if is_same else "no")])
        if error is not None:
            raise typer.Exit(EXIT_FAILED)


@app.command()
def export(
    crash_id: CrashId,
    pytest: Annotated[bool, typer.Option("--pytest", help="As a regression test for pytest.")] = False,
    file: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where to write it; a file that is there is not touched.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--source", help="The contract's Lua file, which the test then reads; else it holds the source."),
    ] = None,
    endpoint: Endpoint = None,
) -> None:
    """Write a crash as a regression test, which fails for as long as the contract crashes."""
    with reported():
        if not pytest:
            raise UsageError("a crash is exported as a test", "--pytest writes one for pytest")
        if source is not None and not source.is_file():
            raise UsageError(f"--source {source} is no file")
        from luacell.cli.regression import regression_test
        from luacell.cli.reproduction import Reproduction

        crash = _crash(crash_id, endpoint)
        test_file = file or Path(f"test_crash_{crash.info.id}.py")
        text = regression_test(crash.info, Reproduction.of(crash), test_file, source)
        if file is None:
            typer.echo(text, nl=False)
            return
        try:
            with file.open("x", encoding="utf-8") as made:
                made.write(text)
        except FileExistsError:
            raise UsageError(f"{file} is there already", "remove it, or name another file") from None
        typer.echo(str(file))


def _crash(crash_id: str, endpoint: str | None) -> Crash:
    with connected(endpoint) as bridge:
        return bridge.crash(crash_id)


def _facts(info: CrashInfo) -> dict[str, Any]:
    return {**asdict(info), "contract_id": format_id(info.contract_id)}


def _function(info: CrashInfo) -> str:
    return info.function or f"fn {info.fn_id}"


def _when(info: CrashInfo) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.time))


def _ended(info: CrashInfo) -> str:
    return f"code {info.code}: {printable(info.cause)}"


def _told(crash: Crash) -> list[tuple[str, str]]:
    """Return the facts that there are, in words."""
    info = crash.info
    kept = "" if info.args_kept == info.args_size else f", of which {info.args_kept} are on record"
    rows = [
        ("crash", info.id),
        ("time", _when(info)),
        ("contract", f"{info.contract}  {info.version}".rstrip()),
        ("function", _function(info)),
        ("code", str(info.code)),
        ("cause", info.cause),
        ("signal", "" if info.signal is None else str(info.signal)),
        ("exit code", "" if info.exit_code is None else str(info.exit_code)),
        ("began", info.began),
        *((name, _seconds(value)) for name, value in (("queued", info.queued), ("ran", info.ran), ("cpu", info.cpu))),
        ("budget", _seconds(crash.budget)),
        ("sandbox", crash.sandbox),
        ("args", f"{info.args_size} bytes{kept}"),
        ("out", f"{info.out_size} bytes"),
        ("source", f"sha256 {info.source_digest}"),
        ("host", info.host),
    ]
    return [(name, text) for name, text in rows if text]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.6f} s"
