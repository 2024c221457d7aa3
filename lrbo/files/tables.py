"""Tables for a terminal, and the same cells with tabs between them where nobody looks."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrbo.terminal import printable


def is_piped(console: Console) -> bool:
    """Tell a file or pipe, which has no width to pad, break or cut lines at."""
    return not (console.is_terminal or console.is_jupyter)


def print_piped(console: Console, text: str) -> None:
    """Print one line as it is: rich would break it, and write tabs as blanks."""
    console.file.write(f"{printable(text)}\n")


def lines_of(table: Table) -> Iterator[str]:
    """Yield heads, where it has some, and rows of a table with tabs between the cells."""
    if table.show_header:
        yield "\t".join(_plain(column.header) for column in table.columns)
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        yield "\t".join(map(_plain, cells))


def _plain(cell: object) -> str:
    """Write a cell in one line without tabs, which would divide it."""
    return " ".join((cell.plain if isinstance(cell, Text) else str(cell)).split())
