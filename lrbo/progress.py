"""Progress on stderr: bars on a terminal, one line per step elsewhere; names as they are."""

from __future__ import annotations

import importlib
import logging
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

Advance = Callable[[int], None]
# Takes the number of ended trials, the best result, and the estimated seconds left.
ShowTrials = Callable[[int, str, float | None], None]
NARROW = 60  # columns, below which there is no room for a bar
NAME, BAR, LEFT = 9, 9, 9  # columns of "Trial 100", of a short bar and of "1:02:03" with its blanks
_QUIET = threading.RLock()  # the level of logging belongs to the process
LINE_SECONDS, LINE_SHARE = 60.0, 0.1  # least time and progress between two lines about a step


class PlainConsole(Console):
    """A console that takes names from files literally: no ``[red]``, no ``:smile:``.

    Control characters in them could overwrite the terminal. Rich's own are separate segments.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does, without control characters in texts."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def printable(text: str) -> str:
    """Remove control characters except line ends and tabs."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def imported(name: str) -> Any:
    """Import a slow module where it is needed, without its log messages: Ax writes some."""
    with _QUIET:
        before = logging.root.manager.disable
        logging.disable(max(before, logging.INFO))
        try:
            return importlib.import_module(name)
        finally:
            logging.disable(before)


def wrapped(message: str, width: int) -> str:
    """Break a message at words, and indent what continues a line or a list item.

    Other indented lines are commands to copy and stay whole, as do words longer than a line.
    """
    lines = []
    for line in message.splitlines():
        indent = line[: len(line) - len(line.lstrip(" -"))]
        if indent and "-" not in indent:
            lines.append(line)
            continue
        wrapper = textwrap.TextWrapper(max(width, 20), break_long_words=False)
        wrapper.subsequent_indent, wrapper.break_on_hyphens = " " * (len(indent) or 2), False
        lines += wrapper.wrap(line) or [""]
    return "\n".join(lines)


def _rate(rate: float, unit: str) -> str:
    """Write a rate in units per second, or, below one, in seconds per unit."""
    if rate >= 1:
        return f"{rate:,.{0 if rate >= 10 else 1}f} {unit}/s"
    return f"{_seconds(1 / rate)} per {unit.removesuffix('s')}"


def _seconds(seconds: float) -> str:
    """Write a duration with the digits that matter."""
    if seconds < 0.001:
        return "<0.001 s"
    return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:,.1f} s"


class _Cell(ProgressColumn):
    """A column of a bar: a line of text about a task."""

    def __init__(self, text: Callable[[Task], str], column: Column) -> None:
        self.text = text
        super().__init__(column)

    def render(self, task: Task) -> Text:
        return Text(self.text(task))


def _done(task: Task) -> str:
    """Return for example ``8,192/32,768 tokens, 1,210/s``, and the note of the task."""
    if task.total is None:
        return str(task.fields["note"])
    speed, unit = task.finished_speed or task.speed, task.fields["unit"]
    count = f"{task.completed:,.0f}/{task.total:,.0f} {unit}"
    if speed and "left_s" not in task.fields:
        count += f", {_rate(speed, unit)}".replace(f" {unit}/s", "/s")
    return "  ".join(filter(None, [count, task.fields.get("note")]))


def _left(task: Task) -> str:
    """Return the time left, ``h:mm:ss``; of a task without a total the time elapsed."""
    seconds = task.elapsed or 0.0 if task.total is None else task.time_remaining
    if "left_s" in task.fields:
        left, since = task.fields["left_s"]
        seconds = None if left is None else max(0.0, left - (task.get_time() - since))
    return "-:--:--" if seconds is None else str(timedelta(seconds=int(seconds)))


class _Bars(Progress):
    """The bars of all tasks, each one line at any width."""

    def __init__(self, console: Console) -> None:
        self.name = Column(no_wrap=True, overflow="ellipsis", min_width=NAME)
        self.count = Column(no_wrap=True, overflow="ellipsis")
        name, count = _Cell(lambda task: task.description, self.name), _Cell(_done, self.count)
        left = _Cell(_left, Column(no_wrap=True, justify="right"))
        self.narrow: tuple[ProgressColumn, ...] = (name, count, left)
        self.wide: tuple[ProgressColumn, ...] = (name, BarColumn(None), count, left)
        self.height, self.screen = 0, console
        # stdout holds results, which may be piped elsewhere.
        super().__init__(
            *self.wide, console=console, transient=True, expand=True, redirect_stdout=False
        )

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """Return the lines; their number never falls, or the screen would jump between trials."""
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


class Reporter:
    """Writes to stderr, so that stdout holds results only.

    Bars need a terminal that can move its cursor. A file, a pipe and ``TERM=dumb`` get plain
    lines: one when a step ends, and before that at most one a minute and ten in all.
    """

    def __init__(self, console: Console | None = None) -> None:
        # FORCE_COLOR may ask for colours in a log. Bars would fill it with control characters.
        bars = None if sys.stderr.isatty() else False
        self.console = console or PlainConsole(stderr=True, force_interactive=bars)
        if console is None and self.console.is_jupyter:
            # Rich makes each line an output cell, and a kernel's stderr claims to be a terminal.
            self.console = PlainConsole(stderr=True, force_jupyter=False, force_terminal=False)
        self._bars: _Bars | None = None

    def say(self, message: str) -> None:
        """Write a line, wrapped at words on a terminal only."""
        if self.console.is_terminal:
            message = wrapped(message, self.console.width)
        self.console.print(message, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def trials(self, total: int) -> Iterator[ShowTrials]:
        """Show a line about a search of ``total`` trials, above the bar of its current step."""
        with self._task("Search", total, "trials", note="", left_s=(None, 0.0)) as (bars, task):

            def show(done: int, note: str, left_s: float | None) -> None:
                if bars is not None:
                    left = (left_s, bars.get_time())
                    bars.update(task, completed=done, note=note, left_s=left)

            yield show

    @contextmanager
    def waiting(self, description: str, note: str = "") -> Iterator[None]:
        """Show a task of unknown length; nothing remains on the screen."""
        with self._task(description, None, "", note=note):
            yield

    @contextmanager
    def step(
        self, description: str, total: int, unit: str, *, leaves_line: bool = True
    ) -> Iterator[Advance]:
        """Show a step, and leave a line with its duration if ``leaves_line``.

        Yields a function to call with each finished amount of ``total``, a plural ``unit``.
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
        rate = f" ({_rate(total / seconds, unit)})" if total and seconds else ""
        self.say(f"{description}: {total:,} {unit} in {_seconds(seconds)}{rate}")

    def _lines(self, description: str, total: int, unit: str, start: float) -> Advance:
        """Return a function that reports a long step in lines."""
        done, last_done, last_time = 0, 0, start

        def advance(amount: int) -> None:
            nonlocal done, last_done, last_time
            done += amount
            now = time.perf_counter()
            is_due = now - last_time >= LINE_SECONDS and done - last_done >= LINE_SHARE * total
            if is_due and done < total:
                left = timedelta(seconds=int((now - start) * (total - done) / done))
                self.say(f"{description}: {done:,} of {total:,} {unit}, {left} left")
                last_done, last_time = done, now

        return advance

    @contextmanager
    def _task(
        self, description: str, total: int | None, unit: str, **fields: Any
    ) -> Iterator[tuple[_Bars | None, TaskID]]:
        """Add a bar below the others; the first one restores the screen at its end."""
        if not self.console.is_interactive:
            yield None, TaskID(0)
            return
        first = self._bars is None
        bars = self._bars = self._bars or _Bars(self.console)
        task = bars.add_task(description, total=total, unit=unit, **fields)
        try:
            if first:  # inside: an interrupt may come while the cursor is being hidden
                bars.start()
            yield bars, task
        finally:
            if first:
                bars.stop()
                self._bars = None
            bars.remove_task(task)


class LineHandler(logging.Handler):
    """Shows each log record as a line above the bars, on the console that they share."""

    def __init__(self, reporter: Reporter) -> None:
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
        except Exception:  # as every handler does
            self.handleError(record)
