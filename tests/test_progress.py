"""A step leaves one line that says what it was and how fast, whoever reads it."""

import io
import logging
import re

import pytest
from rich.console import Console

from lrbo import progress
from lrbo.progress import LineHandler, Reporter

LINE = r"Dense \[model\] on text: 8,192 tokens in 2\.0 s \(4,096 tokens/s\)"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each look at the clock find it two seconds later."""
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))


def plain(width: int = 80) -> tuple[Reporter, io.StringIO]:
    out = io.StringIO()
    return Reporter(Console(file=out, width=width, force_terminal=False, highlight=False)), out


def terminal() -> tuple[Reporter, io.StringIO]:
    out = io.StringIO()
    console = Console(
        file=out, width=80, force_terminal=True, highlight=False, legacy_windows=False
    )
    return Reporter(console), out


def screen(written: str) -> list[str]:
    """Return the lines that stand on a terminal in the end: obey its control sequences."""
    lines, row, column = [""], 0, 0
    for match in re.finditer(r"\x1b\[(\??\d*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n])", written):
        count, code, back, down, letter = match.groups()
        if code == "A":
            row = max(0, row - int(count or 1))
        elif code == "K":
            assert count == "2"  # the whole line; rich uses no other
            lines[row] = ""
        elif back:
            column = 0
        elif down:
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif letter:
            lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


def test_without_a_terminal_a_step_is_one_line_with_its_rate(clock: None) -> None:
    reporter, out = plain()
    with reporter.step("Dense [model] on text", 8192, "tokens") as advance:
        for _ in range(4):
            advance(2048)
        assert out.getvalue() == ""  # a log file is no place for a bar
    assert re.fullmatch(LINE + "\n", out.getvalue())


def test_on_a_terminal_the_bar_gives_way_to_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, out = terminal()
    with reporter.step("Calibration", 8192, "tokens") as advance:
        advance(4096)
        advance(4096)
    assert "8,192/8,192 tokens" in out.getvalue()
    (line,) = screen(out.getvalue())
    assert re.fullmatch(r"Calibration: 8,192 tokens in \d+\.\d s \([\d,]+ tokens/s\)", line)


def test_lines_said_during_a_step_stay_above_its_line() -> None:
    reporter, out = terminal()
    reporter.say("before")
    with reporter.step("Factorization", 14, "layers") as advance:
        advance(7)
        reporter.say("in between")
        advance(7)
    lines = screen(out.getvalue())
    assert lines[:2] == ["before", "in between"]
    assert len(lines) == 3
    assert lines[2].startswith("Factorization: 14 layers in ")


def test_a_bar_shows_what_is_done_of_how_much() -> None:
    reporter, out = terminal()
    with reporter.step("Calibration", 8192, "tokens") as advance:
        advance(1024)
    assert "1,024/8,192 tokens" in out.getvalue()


def test_the_description_on_a_bar_is_no_markup() -> None:
    reporter, out = terminal()
    with reporter.step("Dense [model] on text", 8, "tokens") as advance:
        advance(8)
    assert out.getvalue().count("Dense ") > 1  # the bar, and what it leaves
    for shown in out.getvalue().split("Dense ")[1:]:
        assert shown.startswith("[model] on text")


# The last one could name a text of the hub: rich draws a calendar for its configuration.
@pytest.mark.parametrize(
    "message", ["a [red]b[/red] c", "[/nothing] open", "[x", "diary:date:train:text"]
)
def test_brackets_and_colons_in_a_message_are_no_markup(message: str) -> None:
    for reporter, out in (plain(), terminal()):
        reporter.say(message)
        assert screen(out.getvalue()) == [message]


def test_a_long_message_stays_one_line_for_those_who_search_a_log() -> None:
    reporter, out = plain(width=20)
    message = "a path " + "/".join(["folder"] * 20)
    reporter.say(message)
    assert out.getvalue() == message + "\n"


@pytest.mark.parametrize("make", [plain, terminal])
def test_an_error_inside_a_step_comes_through_and_claims_no_end(make) -> None:
    reporter, out = make()
    with pytest.raises(ZeroDivisionError), reporter.step("Calibration", 8192, "tokens"):
        raise ZeroDivisionError
    assert screen(out.getvalue()) == []  # on a terminal, the bar is taken away


def test_a_step_too_short_to_measure_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.time, "perf_counter", lambda: 1.0)
    reporter, out = plain()
    with reporter.step("Nothing", 0, "layers"):
        pass
    assert out.getvalue() == "Nothing: 0 layers in 0.0 s (0 layers/s)\n"


def test_the_default_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter().say("to be read by people")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "to be read by people\n"


def log_to(reporter: Reporter, message: str) -> None:
    handler = LineHandler(reporter)
    record = logging.LogRecord("lrbo", logging.WARNING, "file.py", 1, "%s", (message,), None)
    handler.handle(record)


def test_a_log_record_is_one_line_without_markup_or_place() -> None:
    reporter, out = plain(width=40)
    message = "layer [bold]q[/bold]: " + "the second moment is singular, " * 5
    log_to(reporter, message)
    assert out.getvalue() == f"WARNING  {message}\n"


def test_a_log_record_stands_above_the_bar(clock: None) -> None:
    reporter, out = terminal()
    with reporter.step("Calibration", 4, "blocks") as advance:
        advance(1)
        log_to(reporter, "few tokens")
        advance(3)
    lines = screen(out.getvalue())
    assert lines[0] == "WARNING  few tokens"
    assert lines[1].startswith("Calibration: 4 blocks in 2.0 s")
    assert len(lines) == 2


def test_a_kernel_of_a_notebook_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich would make an output per line there, or move a cursor that does not exist."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert Console().is_jupyter
    console = Reporter().console
    assert not console.is_jupyter
    assert not console.is_terminal
    assert console.stderr
