"""A step leaves one line that says what it was and how fast, whoever reads it."""

import io
import logging
import re

import pytest
from rich.console import Console

from lrbo import progress
from lrbo.progress import LineHandler, Reporter, imported, wrapped

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
    for match in re.finditer(r"\x1b\[(\??[\d;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n])", written):
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
    assert re.fullmatch(
        LINE.replace("2\\.0", "10\\.0").replace("4,096", "819") + "\n", out.getvalue()
    )


def test_on_a_terminal_the_bar_gives_way_to_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, out = terminal()
    with reporter.step("Calibration", 8192, "tokens") as advance:
        advance(4096)
        advance(4096)
    assert "8,192/8,192 tokens" in out.getvalue()
    (line,) = screen(out.getvalue())
    assert re.fullmatch(r"Calibration: 8,192 tokens in [<\d.]+ s \([\d,]+ tokens/s\)", line)


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


def test_what_a_search_has_found_stands_above_what_it_does(clock: None) -> None:
    reporter, out = terminal()
    with reporter.trials(30) as show:
        show(12, "best 35.764 at keep ratio 0.8", 3725.0)
        with reporter.waiting("Trial 13", "proposing"):
            pass
        with reporter.step("Trial 13", 8192, "tokens", leaves_line=False) as advance:
            advance(4096)
            reporter._bars.refresh()
            *_, search, trial = screen(out.getvalue())
        reporter.say("Trial  13 (14/30) model")
        reporter._bars.refresh()
        lines = screen(out.getvalue())
    assert re.fullmatch(
        r"Search +\S+ 12/30 trials  best 35\.764 at keep ratio 0\.8 1:02:0\d", search
    )
    assert re.fullmatch(r"Trial 13 +\S+ 4,096/8,192 tokens.* [\d:-]+", trial)
    assert lines[0] == "Trial  13 (14/30) model"  # what ended scrolls above
    assert lines[1].startswith("Search")
    assert screen(out.getvalue()) == ["Trial  13 (14/30) model"]


def test_lines_of_a_search_do_not_come_and_go() -> None:
    reporter, _ = terminal()
    with reporter.trials(30):
        for _ in range(3):
            with reporter.step("Trial 1", 8, "tokens", leaves_line=False):
                pass
            assert reporter._bars.height == 2
            assert reporter._bars.make_tasks_table(reporter._bars.tasks).row_count == 2


@pytest.mark.parametrize("width", [24, 40, 59, 60, 80, 200])
def test_every_bar_is_one_line_at_any_width(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, legacy_windows=False)
    reporter = Reporter(console)
    with reporter.trials(1000) as show:
        show(999, "best 35.764 at keep ratio 0.8", None)
        with reporter.step("Dense model on validation text", 10**9, "tokens") as advance:
            advance(10**8)
            reporter._bars.refresh()
            lines = screen(out.getvalue())
    assert len(lines) == 2
    assert max(map(len, lines)) <= width - 3  # a terminal echoes ^C behind the last one
    assert ("━" in lines[0]) == (width >= progress.NARROW)


@pytest.mark.parametrize(
    "options", [{"force_terminal": False}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}]
)
def test_where_nothing_can_move_there_are_no_control_characters(options) -> None:
    out = io.StringIO()
    reporter = Reporter(Console(file=out, width=80, highlight=False, **options))
    with reporter.trials(30) as show, reporter.waiting("Starting"):
        show(1, "best", 5.0)
        with reporter.step("Calibration", 8, "blocks") as advance:
            advance(8)
    assert re.fullmatch(r"Calibration: 8 blocks in .*\n", out.getvalue())


def test_no_color_is_respected() -> None:
    out = io.StringIO()
    environment = {"NO_COLOR": "1", "TERM": "xterm-256color"}
    reporter = Reporter(Console(file=out, width=80, force_terminal=True, _environ=environment))
    with reporter.step("Calibration", 8, "blocks") as advance:
        advance(4)
    assert "4/8 blocks" in out.getvalue()
    assert not re.search(r"\x1b\[[\d;]*[34]\d", out.getvalue())


def test_a_log_gets_a_line_a_minute_of_a_long_step_and_ten_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    for seconds, expected in ((0.5, 0), (30.0, 9), (3.0, 4)):
        reporter, out = plain()
        with reporter.step("Calibration", 100, "blocks") as advance:
            for _ in range(100):
                now += seconds
                advance(1)
        *told, last = out.getvalue().splitlines()
        assert len(told) == expected, seconds
        assert last.startswith("Calibration: 100 blocks in ")
    assert told[0] == "Calibration: 20 of 100 blocks, 0:04:00 left"


def test_a_terminal_breaks_lines_at_words_and_leaves_commands_whole() -> None:
    path = "/a/path/that-is-longer/than-any-line-may-be/and-is-not-broken"
    command = "  lrbo search " + " ".join(["search.trials=100"] * 5)
    message = "\n".join(
        [
            "error: 2 problems:",
            "  - the first one is too long for a line and goes on in the next one below",
            f"  - {path} is not there",
            "Go on with:",
            command,
        ]
    )
    lines = wrapped(message, 40).splitlines()
    assert lines == [
        "error: 2 problems:",
        "  - the first one is too long for a line",
        "    and goes on in the next one below",
        f"  - {path}" if len(lines) == 7 else "  -",
        *lines[4:-2],
        "Go on with:",
        command,
    ]
    assert path in " ".join(lines)
    out = io.StringIO()
    Reporter(Console(file=out, width=40, force_terminal=True, highlight=False)).say(message)
    assert out.getvalue().splitlines() == lines
    log_to(Reporter(Console(file=out, width=40, force_terminal=True, color_system=None)), message)
    assert max(map(len, out.getvalue().split("Go on")[0].splitlines())) >= 40


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


def test_an_interrupt_while_a_bar_is_put_up_leaves_the_cursor_visible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reporter, out = terminal()
    start = progress._Bars.start

    def interrupted(bars: progress._Bars) -> None:
        start(bars)
        raise KeyboardInterrupt

    monkeypatch.setattr(progress._Bars, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), reporter.waiting("Starting"):
        pytest.fail("it was not put up")
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l") >= 0


def test_a_slow_step_says_how_long_each_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 50.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    reporter, out = plain()
    with reporter.step("Calibration", 4, "blocks"):
        pass
    assert out.getvalue() == "Calibration: 4 blocks in 50.0 s (12.5 s per block)\n"


def test_rates_and_durations_have_the_digits_that_matter() -> None:
    rates = [progress._rate(*each) for each in ((1210.4, "tokens"), (2.46, "layers"))]
    assert rates == ["1,210 tokens/s", "2.5 layers/s"]
    seconds = [progress._seconds(each) for each in (1234.5, 2.345, 0.0123)]
    assert seconds == ["1,234.5 s", "2.3 s", "0.012 s"]


def test_a_step_too_short_to_measure_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.time, "perf_counter", lambda: 1.0)
    reporter, out = plain()
    with reporter.step("Nothing", 0, "layers"):
        pass
    assert out.getvalue() == "Nothing: 0 layers in <0.001 s\n"


@pytest.mark.parametrize("level", [logging.NOTSET, logging.ERROR])
def test_an_import_leaves_silent_what_a_program_silenced(level: int) -> None:
    logging.disable(level)
    try:
        assert imported("logging") is logging
        assert logging.root.manager.disable == level
    finally:
        logging.disable(logging.NOTSET)


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
