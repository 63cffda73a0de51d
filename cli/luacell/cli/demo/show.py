"""The demo from its start to its exit code: what is seen while it runs, and the report in the end."""

import queue
import sysconfig
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from luacell.cli.demo.books import Books
from luacell.cli.demo.callers import Caller
from luacell.cli.demo.counting import CONTRACT, CONTRACT_DIRECTORY, source_files
from luacell.cli.demo.faults import Bridge, Fault, FaultPlan
from luacell.client import LuaHostBridge

CALLERS_COUNT = 4
LOST_AFTER_S = 10.0  # the contract's deadline is 2 s, an answer is promised 0.25 s behind it
LAST_CALLS_S = 2.5
SHOWN_EVERY_S = 0.02
PROBLEMS_SHOWN_MAX = 5


def run_demo(console: Console | None = None, *, limit: int | None = None) -> int:
    """Run the demo and print what it has shown.

    Args:
        console: Where to; None for the standard output.
        limit: Count at most so many files; None for all.

    Returns:
        The exit code: 0, or 1 if an answer was lost or wrong.

    Raises:
        LuacellError: luacell could not be started, or the contract not be deployed.
    """
    console = console or Console()
    root = Path(sysconfig.get_path("stdlib"))
    files = source_files(root, limit)
    console.print(
        f"[bold]{CONTRACT}[/], a contract written in Lua, counts the lines, words and identifiers of "
        f"{len(files):,} files in {root}.\nOn the way it is made to crash, and its workers are killed.",
        highlight=False,
    )
    if not files:
        console.print("There is nothing to count.", style="red")
        return 1
    with LuaHostBridge.with_capacity(CALLERS_COUNT) as bridge:
        bridge.deploy(CONTRACT_DIRECTORY)
        books, elapsed_s = count_files(bridge, files, console)
    books.check_answers()
    report(books, elapsed_s, console)
    return 1 if books.calls_lost or books.problems else 0


def count_files(bridge: Bridge, files: list[Path], console: Console) -> tuple[Books, float]:
    """Have all files counted by CALLERS_COUNT threads.

    Args:
        bridge: With the contract deployed.
        files: In the order of their counting.
        console: For the progress bar.

    Returns:
        The books, and the seconds it took.
    """
    books, plan, stop = Books(), FaultPlan(len(files)), threading.Event()
    todo: queue.SimpleQueue[tuple[int, Path]] = queue.SimpleQueue()
    for entry in enumerate(files):
        todo.put(entry)
    # Daemons, so that a call which is never answered cannot keep the demo from reporting it.
    threads = [
        threading.Thread(target=Caller(bridge, todo, plan, books, stop).run, daemon=True) for _ in range(CALLERS_COUNT)
    ]
    started = time.monotonic()
    try:
        with progress_bar(console) as progress:
            bar = progress.add_task("counting", total=len(files), crashes=0)
            for thread in threads:
                thread.start()
            is_working = True
            while is_working and books.longest_wait_s(time.monotonic()) < LOST_AFTER_S:
                time.sleep(SHOWN_EVERY_S)
                is_working = any(thread.is_alive() for thread in threads)
                progress.update(bar, completed=books.files_count, crashes=books.crashes_survived)
    finally:
        stop.set()
    elapsed_s = time.monotonic() - started
    for thread in threads:  # where one hangs, the others' calls are not lost, only under way
        thread.join(LAST_CALLS_S)
    return books, elapsed_s


def progress_bar(console: Console) -> Progress:
    """Return the bar: files done, crashes survived, time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[red]{task.fields[crashes]} crashes survived"),
        TimeElapsedColumn(),
        console=console,
    )


def report(books: Books, elapsed_s: float, console: Console) -> None:
    """Print the tables and what they mean."""
    console.print("", what_happened(books, elapsed_s), "", what_was_counted(books), "", sep="\n")
    for problem in books.problems[:PROBLEMS_SHOWN_MAX]:
        console.print(f"wrong: {problem}", style="red", markup=False)
    if books.calls_lost or books.problems:
        console.print("[bold red]A promise is broken:[/] each call gets one answer, and the right one.")
        return
    console.print(
        f"The contract's process died {books.crashes_survived} times. A program that runs its Lua in its own "
        "process would have died with it the first time, or hung.\n"
        "With luacell it is a worker, a process apart, that dies: the call that it was running was "
        "answered with the cause, a fresh worker took over, and all other calls went on.\n"
        f"The contract is in {CONTRACT_DIRECTORY}: change it, break it, and run this again.",
        highlight=False,
    )


def what_happened(books: Books, elapsed_s: float) -> Table:
    """Return the table of files, calls and crashes."""
    faults = ", ".join(f"{count} x {fault.value}" for fault in Fault if (count := books.survived[fault]))
    again = f"{books.calls_again:,} of them made again, after a kill or a refusal" if books.calls_again else ""
    checked = f"{len(books.to_check):,} were counted again in Python"
    recovery = f"{books.slowest_recovery_s * 1000:,.1f} ms"
    return table_of(
        "What happened",
        ("files", f"{books.files_count:,}", ""),
        ("bytes", f"{books.size:,}", ""),
        ("calls", f"{books.calls_issued:,}", again),
        ("crashes survived", f"{books.crashes_survived:,}", faults),
        ("answers lost", f"{books.calls_lost:,}", "calls made less answers received"),
        ("answers wrong", f"{len(books.problems):,}", checked),
        ("calls/s", f"{books.calls_answered / elapsed_s:,.0f}", "crashes and endless loops included"),
        ("slowest recovery", recovery, "from a failed answer to the next good one"),
    )


def what_was_counted(books: Books) -> Table:
    """Return the table of statistics."""
    longest_line, longest_in = books.longest_line
    (name, name_count), *_ = [*books.top_names.most_common(1), (b"", 0)]
    name_use = f"{name_count:,} times in the {books.top_name_files[name]:,} files that have it most"
    return table_of(
        "What the contract counted",
        ("lines", f"{books.lines:,}", f"{books.blank_lines:,} of them blank"),
        ("words", f"{books.words:,}", ""),
        ("identifiers", f"{books.identifiers:,}", "without keywords, strings and comments"),
        ("longest line", f"{longest_line:,}", f"bytes, in {longest_in}"),
        ("top identifier", name.decode(errors="replace"), name_use),
    )


def table_of(title: str, *rows: tuple[str, str, str]) -> Table:
    """Return a table of a figure per row: its name, its value, what there is to know about it."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table
