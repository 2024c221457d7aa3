"""Tables and reports on a terminal, at most 80 columns wide; into a pipe, whole with tabs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from lrbo.files.tables import Column, Table
from lrbo.progress import PlainConsole, printable
from lrbo.reports.comparison import comparison_tables
from lrbo.reports.results import described
from lrbo.reports.study_tables import detail_tables, head_tables
from lrbo.study.study_record import StudyRecord

WIDTH, INDENT = 80, 2
FOLDED = 16  # characters that a column which folds should have at least
SHOWN = 10  # rows of a long table; what is left out is counted

_Cells = tuple[Column, *tuple[str, ...]]  # a column, and its cells


def print_report(study: StudyRecord, console: Console) -> None:
    """Print the report of a study."""
    lines = {"Study": study.name, **described(study)}
    if _is_piped(console):
        for line in lines.items():
            _print_line(console, *line)
    else:
        grid = RichTable.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in lines.items():
            grid.add_row(name, Text(text))
        console.print(grid, width=min(console.width, WIDTH), highlight=False)
    tables = head_tables(study)
    if not tables:
        _print_paragraph(console, "No trial has a value yet.")
    for table in (*tables, *detail_tables(study)):
        _print(console, table)


def print_comparison(studies: Sequence[StudyRecord], frame: pd.DataFrame, console: Console) -> None:
    """Print several studies, one line each, from the frame of :func:`comparison.compared`."""
    for table in comparison_tables(studies, frame):
        _print(console, table)


def print_table(table: Table) -> None:
    """Print a table of measurements to stdout, as wide as it is."""
    width = max(PlainConsole().width, _width_of([*zip(table.columns, *table.rows, strict=True)], 1))
    _print(PlainConsole(width=width), table, width)


def _print(console: Console, table: Table, width: int = WIDTH) -> None:
    """Print a table under its title, and its notes below; into a file or pipe a line per row."""
    _print_paragraph(console, table.title, "bold")
    if _is_piped(console):
        heads = [column.narrow for column in table.columns]
        for cells in (heads, *table.rows, *([note] for note in table.notes)):
            _print_line(console, *cells)
        return
    width = min(console.width, width)
    columns, notes = _fitting(table, width)
    gap = 1 if _width_of(columns, 1) <= width else 0
    body = RichTable(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False)
    for column, *_ in columns:
        body.add_column(
            Text(column.narrow),
            justify="left" if column.is_text else "right",
            no_wrap=not column.folds,
            overflow="fold" if column.folds else "ellipsis",
        )
    for row in zip(*(cells for _, *cells in columns), strict=True):
        body.add_row(*map(Text, row), style="bold" if table.bold and row[0] == table.bold else "")
    parts: list[RichTable | Text] = [body]
    for part in (*parts, *(Text(note, style="dim") for note in notes)):
        indented = Padding(part, (0, 0, 0, INDENT), expand=False)
        console.print(indented, width=width, highlight=False)


def _fitting(table: Table, width: int) -> tuple[list[_Cells], list[str]]:
    """Leave out columns and rows that there is no room for, with notes on what they were."""
    rows, notes = table.rows, [*table.notes]
    if table.further and len(rows) > SHOWN:
        notes.insert(0, f"and {len(rows) - SHOWN} {table.further}")
        rows = rows[:SHOWN]
    columns = [cells for cells in zip(table.columns, *rows, strict=True) if not cells[0].is_extra]
    omitted = []
    for name in table.expendable:
        if _width_of(columns, 0, folded=FOLDED) <= width:
            break
        omitted.append(name)
        columns = [cells for cells in columns if cells[0].narrow != name]
    if omitted:
        notes.insert(0, f"no room here for {', '.join(omitted)}")
    return columns, notes


def _width_of(columns: Sequence[_Cells], gap: int, folded: int | None = None) -> int:
    """Width of a table with blanks beside the one between columns; those that fold may be cut."""
    widths = []
    for column, *cells in columns:
        end = folded if column.folds else None
        widths.append(max(map(cell_len, (column.narrow, *(cell[:end] for cell in cells)))))
    return INDENT + sum(widths) + (1 + gap) * (len(widths) - 1)


def _is_piped(console: Console) -> bool:
    """Tell a file or pipe, which has no width to pad, break or cut lines at."""
    return not (console.is_terminal or console.is_jupyter)


def _print_paragraph(console: Console, text: str, style: str = "") -> None:
    console.print()
    if _is_piped(console):
        _print_line(console, text)
    else:
        console.print(Text(text, style=style), width=min(console.width, WIDTH))


def _print_line(console: Console, *cells: str) -> None:
    """Print texts as they are, with tabs between them; rich would break lines and expand tabs."""
    console.file.write(printable("\t".join(" ".join(cell.split()) for cell in cells)) + "\n")
