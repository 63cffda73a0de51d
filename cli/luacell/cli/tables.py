"""Tables for people: drawn by rich on a terminal, plain aligned columns where the output goes anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

Rows = Sequence[Sequence[str]]


def is_terminal() -> bool:
    """Whether a person looks at the output."""
    return sys.stdout is not None and sys.stdout.isatty()


def print_table(columns: Sequence[str], rows: Rows, title: str = "") -> None:
    """Print a table; the columns' names head it.

    Args:
        columns: names.
        rows: a text for each column.
        title: printed above it.
    """
    if is_terminal():
        _draw(columns, rows, title)
        return
    if title:
        typer.echo(title)
    typer.echo("\n".join(_aligned([columns, *rows])))


def print_pairs(rows: Rows) -> None:
    """Print names and values without a head."""
    if is_terminal():
        _draw((), rows, "")
    elif rows:
        typer.echo("\n".join(_aligned(rows)))


def _aligned(rows: Rows) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _draw(columns: Sequence[str], rows: Rows, title: str) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, show_header=bool(columns), title=Text(title, "bold") if title else None)
    table.title_justify = "left"
    for column in columns or rows[0]:
        table.add_column(Text(column), style="" if columns else None, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
