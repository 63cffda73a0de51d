"""The `luacell` command: its verbs, and those that run the processes of a service.

Each verb is thin: it reads its arguments, calls the public client, and prints. What only some verbs need is imported
when they run, so that the command is there at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from luacell.cli import bench, contracts, crashes, dev, doctor, explain, health, new, stubs, validate
from luacell.cli.options import CModules, CrashRecords, Floor, Level, LogLevel, RunDir, Sandbox, Spares, StateDir, Tcp
from luacell.protocol.paths import STATE_DIRECTORY, default_run_directory, default_state_directory
from luacell.protocol.release import __version__
from luacell.protocol.startup import without_secrets

app = typer.Typer(
    help="Lua host contracts, each in a process of its own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"luacell {__version__}")
        raise typer.Exit


@app.callback()
def luacell(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Lua host contracts, each in a process of its own."""


@app.command()
def serve(
    run_dir: RunDir = None,
    state_dir: StateDir = None,
    tcp: Tcp = None,
    spares: Spares = 1,
    crash_records: CrashRecords = True,
    sandbox: Floor = Sandbox.DEFAULT,
    c_module: CModules = None,
    log_level: Level = LogLevel.INFO,
) -> None:
    """Run a whole service in the foreground: broker, worker host and their parent."""
    own = [
        *_broker_options(run_dir, state_dir, tcp, spares, crash_records, log_level),
        *_worker_options(sandbox, c_module),
    ]
    _become("luacell.cli.serve", _run_dir(run_dir), *own)


@app.command()
def broker(
    run_dir: RunDir = None,
    state_dir: StateDir = None,
    tcp: Tcp = None,
    spares: Spares = 1,
    crash_records: CrashRecords = True,
    log_level: Level = LogLevel.INFO,
) -> None:
    """Run a broker alone, as containers do."""
    _become(
        "luacell.broker", _run_dir(run_dir), *_broker_options(run_dir, state_dir, tcp, spares, crash_records, log_level)
    )


@app.command("worker-host")
def worker_host(
    run_dir: RunDir = None,
    state_dir: StateDir = None,
    sandbox: Floor = Sandbox.DEFAULT,
    c_module: CModules = None,
    log_level: Level = LogLevel.INFO,
) -> None:
    """Run a worker host alone; it serves the broker of its run directory, and grants nobody the state directory."""
    own = [*_worker_options(sandbox, c_module), "--state-dir", str(_state_dir(run_dir, state_dir))]
    environment = without_secrets(os.environ)
    _become("luacell.worker", _run_dir(run_dir), "--log-level", log_level, *own, environment=environment)


def _run_dir(given: Path | None) -> Path:
    return given.absolute() if given is not None else Path(default_run_directory(os.environ))


def _state_dir(run_dir: Path | None, given: Path | None) -> Path:
    """Return the state directory: what belongs to a place of its own stays there."""
    if given is not None:
        return given.absolute()
    if run_dir is not None:
        return run_dir.absolute() / STATE_DIRECTORY
    return Path(default_state_directory(os.environ, os.path.expanduser("~"), is_root=os.geteuid() == 0))


def _broker_options(
    run_dir: Path | None,
    state_dir: Path | None,
    tcp: str | None,
    spares: int,
    crash_records: bool,
    log_level: LogLevel,
) -> list[str]:
    own = ["--state-dir", str(_state_dir(run_dir, state_dir)), "--spares", str(spares), "--log-level", log_level]
    own += [] if crash_records else ["--no-crash-records"]
    return [*own, *(["--tcp", tcp] if tcp is not None else [])]


def _worker_options(sandbox: Sandbox, c_modules: list[str] | None) -> list[str]:
    own = ["--sandbox", sandbox]
    for path in c_modules or ():
        own += ["--c-module", os.path.abspath(path)]
    return own


def _become(module: str, run_dir: Path, *options: str, environment: Mapping[str, str] | None = None) -> None:
    """Replace this process by one that has not imported what only the command line needs."""
    sys.stdout.flush()
    command = [sys.executable, "-P", "-m", module, "--run-dir", str(run_dir), *options]
    os.execve(sys.executable, command, os.environ if environment is None else environment)


app.command()(contracts.deploy)
app.command()(contracts.undeploy)
app.command()(dev.dev)
app.command()(contracts.register)
app.command()(contracts.unregister)
app.command()(contracts.revive)
app.command()(contracts.call)
app.command()(explain.explain)
app.command()(validate.validate)
app.command()(stubs.stubs)
app.command()(new.new)
app.command("ls")(contracts.list_contracts)
app.command()(health.health)
app.add_typer(crashes.app, name="crash")
app.command()(doctor.doctor)


@app.command()
def demo() -> None:
    """Show what luacell is for: a service that is crashed on purpose and loses nothing."""
    from luacell.cli.demo import run_demo

    raise typer.Exit(run_demo())


app.command()(bench.bench)
