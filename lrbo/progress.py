"""What a person sees while it runs: bars on a terminal, one line per step elsewhere."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[[int], None]


def imported(name: str) -> Any:
    """Import a module where it is needed, without a report: Ax tells of its database meanwhile.

    For what takes seconds that not every command must cost.
    """
    logging.disable(logging.INFO)
    try:
        return importlib.import_module(name)
    finally:
        logging.disable(logging.NOTSET)


class _Rate(ProgressColumn):
    """Done of total, and units per second."""

    def render(self, task: Task) -> Text:
        """Return for example ``8,192/32,768 tokens  1,210 tokens/s``."""
        unit = task.fields["unit"]
        speed = task.finished_speed or task.speed
        rate = f"  {speed:,.0f} {unit}/s" if speed else ""
        return Text(f"{task.completed:,.0f}/{task.total or 0:,.0f} {unit}{rate}")


class Reporter:
    """Writes to stderr, so that stdout holds results only."""

    def __init__(self, console: Console | None = None) -> None:
        """Take the console to write to; the default is stderr."""
        self.console = console or Console(stderr=True, highlight=False)
        if console is None and self.console.is_jupyter:
            # Rich makes an output of its own of each line there, and a kernel's stderr says that
            # it is a terminal, which cannot move its cursor.
            self.console = Console(
                stderr=True, highlight=False, force_jupyter=False, force_terminal=False
            )

    def say(self, message: str) -> None:
        """Write one line."""
        self.console.print(message, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def step(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """Show a step of known length; what it took stays as one line.

        Args:
            description: What is done.
            total: How much there is to do.
            unit: Of ``total``, in the plural.

        Yields:
            A function to call with the amount that was done.
        """
        start = time.perf_counter()
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                _Rate(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(description, total=total, unit=unit)
                yield lambda amount: bar.advance(task, amount)
        else:
            yield lambda _: None
        seconds = time.perf_counter() - start
        rate = total / seconds if seconds else 0.0
        self.say(f"{description}: {total:,} {unit} in {seconds:.1f} s ({rate:,.0f} {unit}/s)")


class LineHandler(logging.Handler):
    """Shows log records as a line each, above a bar that is on the screen.

    A console of its own would write into the bar, and break lines at a width that a log file
    does not have.
    """

    def __init__(self, reporter: Reporter) -> None:
        """Take the reporter on whose console the bars are."""
        super().__init__()
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Write the level and the message."""
        try:
            level = (f"{record.levelname:<8} ", f"logging.level.{record.levelname.lower()}")
            line = Text.assemble(level, self.format(record))
            self.reporter.console.print(line, soft_wrap=True, highlight=False)
        except Exception:  # as every handler: logging decides what becomes of it
            self.handleError(record)
