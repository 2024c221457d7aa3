"""What is printed is read: names from files neither command the terminal nor mean markup."""

import io
import logging
import re
from pathlib import Path

from rich.progress import BarColumn, Progress
from rich.table import Table
from rich.text import Text

import lrbo
from lrbo.progress import LineHandler, PlainConsole, Reporter
from lrbo.reports.terminal import print_report
from tests.support.journal import Journal

HOSTILE = "a\x1b]0;title\x07\x1b[31m\x1b[2Jb\rc\x08\x9b1mz [red]:smile:[/red] [link=x]é"
SHOWN = "a]0;title[31m[2Jbc1mz [red]:smile:[/red] [link=x]é"


def terminal() -> tuple[PlainConsole, io.StringIO]:
    out = io.StringIO()
    return PlainConsole(file=out, force_terminal=True, width=120, color_system="truecolor"), out


def styles_left_out(text: str) -> str:
    """Leave out what rich itself puts around texts: colours and weights."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_names_are_shown_as_they_are_wherever_they_stand() -> None:
    console, out = terminal()
    table = Table(HOSTILE)
    table.add_row(HOSTILE)
    for shown in (HOSTILE, Text(HOSTILE, style="bold"), table):
        console.print(shown)
    reporter = Reporter(console)
    line = HOSTILE.replace("\r", "")  # which ends a line of a message
    reporter.say(line)
    record = logging.LogRecord("lrbo", logging.WARNING, "", 0, "%s", (line,), None)
    LineHandler(reporter).emit(record)
    text = styles_left_out(out.getvalue())
    assert text.count(SHOWN) == 6
    assert "\x1b" in out.getvalue()  # the bold line is bold
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_controls_of_rich_itself_still_reach_the_terminal() -> None:
    console, out = terminal()
    with Progress("{task.description}", BarColumn(), console=console) as bars:
        bars.add_task(HOSTILE, total=2)
    assert "\x1b[?25l" in out.getvalue()  # the cursor is hidden
    assert "\x1b]0;" not in out.getvalue()


def test_a_report_of_a_hostile_study_commands_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "\x1b[2J[red]mine")
    journal.score_dense(2.0)
    journal.complete(0, 3.0, "uniform")
    journal.fail(1, HOSTILE.replace("\r", ""))
    console, out = terminal()
    print_report(journal.study, console)
    text = styles_left_out(out.getvalue())
    assert "[2J[red]mine" in text
    assert "[red]:smile:[/red]" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_nothing_writes_to_a_console_of_another_kind() -> None:
    package = Path(lrbo.__file__).parent
    sources = {path.name: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert len(sources) > 50
    assert [name for name, text in sources.items() if re.search(r"\bConsole\(", text)] == []
