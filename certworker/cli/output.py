"""What commands share: JSON or text on stdout, tables, times as people read them."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import click

_PIPE_WIDTH = 10_000

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def print_json(document: object) -> None:
    """Print one JSON document."""
    click.echo(to_json(document))


def to_json(document: object) -> str:
    """Return a document as it is printed; instants as ISO 8601."""
    return json.dumps(document, indent=2, default=_plain, ensure_ascii=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table for people; long cells are folded, never cut."""
    # Slow to import, and many a command prints no table.
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*("" if cell is None else show(cell) for cell in row))
    console = Console(highlight=False, markup=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH  # nothing is folded for a program that reads it
    console.print(table)


def show(cell: object) -> str:
    """Return a value as a person reads it."""
    if isinstance(cell, datetime):
        return cell.strftime("%Y-%m-%d %H:%M:%SZ")
    if isinstance(cell, list | tuple):
        return ", ".join(map(str, cell))
    return str(cell)


def count(number: int, one: str, many: str = "") -> str:
    """Return for example `1 node` or `2 nodes`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
