"""Tables as data: columns, cells and notes, which a terminal, a page and Markdown render."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column: its head, and how a terminal shows it."""

    head: str
    short: str = ""  # head on a terminal; empty for the same
    is_text: bool = False  # cells are aligned to the left, as numbers are not
    folds: bool = False  # long cells are wrapped where there is no room
    is_extra: bool = False  # left out on a terminal

    @property
    def narrow(self) -> str:
        """Its head on a terminal."""
        return self.short or self.head


@dataclass(frozen=True)
class Table:
    """A table of cells that are text already, as many in each row as there are columns."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()  # below it, a sentence each
    bold: str = ""  # first cell of the rows that stand out
    # Columns that a narrow terminal leaves out, in this order: half a number is worse than none.
    expendable: Sequence[str] = ()
    # What the rows after the first ten are, which a terminal only counts; empty to show all.
    further: str = ""


def columns(*heads: str | Column) -> list[Column]:
    """Columns of which the first names the row, unless that is a number of a trial."""
    return [
        head if isinstance(head, Column) else Column(head, is_text=not index and head != "trial")
        for index, head in enumerate(heads)
    ]
