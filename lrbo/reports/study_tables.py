"""How results are printed, and kept as lines of a file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lrbo.strict_json import to_json
from lrbo.tabular import is_piped, lines_of, print_piped
from lrbo.terminal import PlainConsole
from lrbo.versions import versions


def console() -> PlainConsole:
    """Return what writes to stdout."""
    return PlainConsole()


def table(*columns: str) -> Table:
    """Return an empty table: the name to the left, numbers to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left", no_wrap=True)
    return made


def print_table(title: str, made: Table, notes: Sequence[str]) -> None:
    """Print a table, over it what it is of and under it remarks."""
    out = console()
    out.print(title, markup=False, emoji=False, soft_wrap=True)
    if is_piped(out):
        for line in lines_of(made):
            print_piped(out, line)
    else:
        out.print(made, width=max(out.width, out.measure(made).maximum))
    for note in notes:
        out.print(note, markup=False, emoji=False, soft_wrap=True)


def record(file: Path, found: Mapping[str, Any]) -> None:
    """Add a result to a file of results, a line of JSON each, and see it onto the disk.

    Args:
        file: Made if it is not there.
        found: What :func:`lrbo.strict_json.to_json` takes; time and versions are added.
    """
    line = {"time": time.time(), **found, "versions": versions()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as opened:
        opened.write(f"{to_json(line)}\n")
        opened.flush()
        os.fsync(opened.fileno())
