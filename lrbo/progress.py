"""What a person sees while it runs: bars on a terminal, one line per step elsewhere."""

from __future__ import annotations

import importlib
import logging
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column, Table
from rich.text import Text

from lrbo.terminal import PlainConsole

Advance = Callable[[int], None]
NARROW = 60  # columns, below which there is no room for a bar
NAME, BAR, LEFT = 9, 9, 9  # columns of "Trial 100", of a short bar and of "1:02:03" with its blanks
_QUIET = threading.RLock()  # what is said meanwhile is the process's
LINE_SECONDS, LINE_SHARE = 60.0, 0.1  # between two lines about a step, where there is no bar


def imported(name: str) -> Any:
    """Import a module where it is needed, without a report: Ax tells of its database meanwhile.

    For what takes seconds that not every command must cost.
    """
    with _QUIET:
        before = logging.root.manager.disable
        logging.disable(max(before, logging.INFO))
        try:
            return importlib.import_module(name)
        finally:
            logging.disable(before)


def wrapped(message: str, width: int) -> str:
    """Break a message at words; what continues a line or a list's item stands further in.

    Left whole are indented lines that are no items, which are commands to be copied, and words
    that are longer than a line, such as paths.
    """
    found = []
    for line in message.splitlines():
        indent = line[: len(line) - len(line.lstrip(" -"))]
        if indent and "-" not in indent:
            found.append(line)
            continue
        found += textwrap.wrap(
            line,
            max(width, 20),
            subsequent_indent=" " * (len(indent) or 2),
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(found)


def rate_text(rate: float, unit: str, *, short: bool = False) -> str:
    """Write a rate as amounts per second, or, where it is below one, as seconds per amount.

    Example:
        >>> rate_text(1210.4, "tokens"), rate_text(2.46, "layers"), rate_text(0.08, "blocks")
        ('1,210 tokens/s', '2.5 layers/s', '12.5 s per block')
    """
    if rate >= 1:
        return f"{rate:,.{0 if rate >= 10 else 1}f}{'' if short else ' ' + unit}/s"
    return f"{seconds_text(1 / rate)} per {unit.removesuffix('s')}"


def seconds_text(seconds: float) -> str:
    """Write how long something took, with as many digits as matter.

    Example:
        >>> seconds_text(1234.5), seconds_text(2.345), seconds_text(0.0123)
        ('1,234.5 s', '2.3 s', '0.012 s')
    """
    if seconds < 0.001:
        return "<0.001 s"
    if seconds < 1:
        return f"{seconds:.2g} s"
    return f"{seconds:,.1f} s"


class _Cell(ProgressColumn):
    """A column of a bar: one line of text, cut at its end where the terminal is narrow."""

    def __init__(self, text: Callable[[Task], str], column: Column) -> None:
        self.text = text
        super().__init__(column)

    def render(self, task: Task) -> Text:
        """Return the text of a task."""
        return Text(self.text(task), no_wrap=True, overflow="ellipsis")


def _done(task: Task) -> str:
    """Return for example ``8,192/32,768 tokens, 1,210/s``, and what is noted of the task."""
    if task.total is None:
        return str(task.fields["note"])
    speed = task.finished_speed or task.speed
    unit = task.fields["unit"]
    rate = (
        f", {rate_text(speed, unit, short=True)}" if speed and "left_s" not in task.fields else ""
    )
    count = f"{task.completed:,.0f}/{task.total:,.0f} {unit}{rate}"
    return "  ".join([count, *filter(None, [task.fields.get("note")])])


def _left(task: Task) -> str:
    """Return how long a task will take, ``h:mm:ss``; of one without a total how long it has."""
    if task.total is None:
        return str(timedelta(seconds=int(task.elapsed or 0)))
    seconds = task.time_remaining
    if "left_s" in task.fields:
        left, since = task.fields["left_s"]
        seconds = None if left is None else max(0.0, left - (task.get_time() - since))
    return "-:--:--" if seconds is None else str(timedelta(seconds=int(seconds)))


class _Bars(Progress):
    """Bars of all that goes on, each one line at any width."""

    def __init__(self, console: Console) -> None:
        self.name = Column(no_wrap=True, overflow="ellipsis", min_width=NAME)
        self.count = Column(no_wrap=True, overflow="ellipsis")
        left = Column(no_wrap=True, justify="right")
        name = _Cell(lambda task: task.description, self.name)
        rest = (_Cell(_done, self.count), _Cell(_left, left))
        self.narrow: tuple[ProgressColumn, ...] = (name, *rest)
        self.wide: tuple[ProgressColumn, ...] = (name, BarColumn(None), *rest)
        self.height, self.screen = 0, console
        # What prints to stdout prints results, which may be piped elsewhere.
        super().__init__(
            *self.wide, console=console, transient=True, expand=True, redirect_stdout=False
        )

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """Return the lines, without bars where there is no room.

        As many as there ever were: lines that come and go between two trials would make what is
        on the screen jump.
        """
        tasks = list(tasks)
        # Terminals echo ^C behind the last line. If it did not fit, that line would stay.
        room = self.screen.width - len("^C") - 1
        bar = BAR if self.screen.width >= NARROW else 0
        self.columns = self.wide if bar else self.narrow
        longest = max((len(task.description) for task in tasks), default=0)
        self.name.max_width = max(NAME, min(longest, room // 3))
        self.count.max_width = max(room - self.name.max_width - bar - LEFT, 1)
        table = super().make_tasks_table(tasks)
        table.width = room
        self.height = max(self.height, table.row_count)
        for _ in range(self.height - table.row_count):
            table.add_row()
        return table


class Trials:
    """The line about a search as a whole, on a terminal."""

    def __init__(self, bars: _Bars | None, task: TaskID) -> None:
        """Take the bars and the task among them; ``None`` shows nothing."""
        self._bars, self._task = bars, task

    def show(self, done: int, note: str, left_s: float | None) -> None:
        """Show how far the search is.

        Args:
            done: Trials that ended.
            note: What is best so far.
            left_s: Seconds that the others will take; ``None`` while that is not known.
        """
        if self._bars is not None:
            left = (left_s, self._bars.get_time())
            self._bars.update(self._task, completed=done, note=note, left_s=left)


class Reporter:
    """Writes to stderr, so that stdout holds results only.

    Bars need a terminal that can move its cursor. A file, a pipe and ``TERM=dumb`` get plain
    lines: one when a step ends, and before that one a minute at most, ten in all.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Take the console to write to; the default is stderr."""
        # FORCE_COLOR may ask for colours in a log. Bars would fill it with control characters.
        bars = None if sys.stderr.isatty() else False
        self.console = console or PlainConsole(stderr=True, force_interactive=bars)
        if console is None and self.console.is_jupyter:
            # Rich makes an output of its own of each line there, and a kernel's stderr says that
            # it is a terminal, which cannot move its cursor.
            self.console = PlainConsole(stderr=True, force_jupyter=False, force_terminal=False)
        self._bars: _Bars | None = None

    def say(self, message: str) -> None:
        """Write a line; on a terminal it is broken at words, elsewhere it stays one line."""
        if self.console.is_terminal:
            message = wrapped(message, self.console.width)
        self.console.print(message, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def trials(self, total: int) -> Iterator[Trials]:
        """Show a line about the search above the bar of what it does; it leaves nothing.

        Args:
            total: Trials in all.
        """
        fields = {"note": "", "left_s": (None, 0.0)}
        with self._task("Search", total, "trials", **fields) as (bars, task):
            yield Trials(bars, task)

    @contextmanager
    def waiting(self, description: str, note: str = "") -> Iterator[None]:
        """Show that something goes on of which nobody knows how long it takes; leaves nothing."""
        with self._task(description, None, "", note=note):
            yield

    @contextmanager
    def step(
        self, description: str, total: int, unit: str, *, leaves_line: bool = True
    ) -> Iterator[Advance]:
        """Show a step of known length; what it took stays as one line.

        Args:
            description: What is done.
            total: How much there is to do.
            unit: Of ``total``, in the plural.
            leaves_line: ``False`` for what something else will tell of.

        Yields:
            A function to call with the amount that was done.
        """
        start = time.perf_counter()
        with self._task(description, total, unit) as (bars, task):
            if bars is not None:
                yield lambda amount: bars.advance(task, amount)
            elif leaves_line:
                yield self._lines(description, total, unit, start)
            else:
                yield lambda _: None
        if not leaves_line:
            return
        seconds = time.perf_counter() - start
        rate = f" ({rate_text(total / seconds, unit)})" if total and seconds else ""
        self.say(f"{description}: {total:,} {unit} in {seconds_text(seconds)}{rate}")

    def _lines(self, description: str, total: int, unit: str, start: float) -> Advance:
        """Return what tells of a long step where there is no bar."""
        done, told, when = 0, 0, start

        def advance(amount: int) -> None:
            nonlocal done, told, when
            done += amount
            now = time.perf_counter()
            if now - when >= LINE_SECONDS and LINE_SHARE * total <= done - told and done < total:
                left = timedelta(seconds=int((now - start) * (total - done) / done))
                self.say(f"{description}: {done:,} of {total:,} {unit}, {left} left")
                told, when = done, now

        return advance

    @contextmanager
    def _task(
        self, description: str, total: int | None, unit: str, **fields: Any
    ) -> Iterator[tuple[_Bars | None, TaskID]]:
        """Add a bar below those that are there; the first gives the screen back at its end."""
        if not self.console.is_interactive:
            yield None, TaskID(0)
            return
        first = self._bars is None
        bars = self._bars = self._bars or _Bars(self.console)
        task = bars.add_task(description, total=total, unit=unit, **fields)
        try:
            if first:  # in here: an interrupt may come while the cursor is being hidden
                bars.start()
            yield bars, task
        finally:
            if first:
                bars.stop()
                self._bars = None
            bars.remove_task(task)


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
            console = self.reporter.console
            level = (f"{record.levelname:<8} ", f"logging.level.{record.levelname.lower()}")
            message = self.format(record)
            if console.is_terminal:
                message = wrapped(message, console.width - len(level[0])).replace("\n", "\n  ")
            console.print(Text.assemble(level, message), soft_wrap=True, highlight=False)
        except Exception:  # as every handler: logging decides what becomes of it
            self.handleError(record)
