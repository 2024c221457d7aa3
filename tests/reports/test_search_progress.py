"""A search shows each trial in one line, what is best so far and how long the rest will take."""

import io
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from lrbo.commands import search
from lrbo.errors import StudyError
from lrbo.progress import Reporter
from lrbo.reports.search_progress import LiveSearch, seconds_left
from lrbo.study.journal import Study
from lrbo.tracking.tracker import NullTracker
from lrbo.trials.records import TrialRecord
from tests.reports.test_gains import lost
from tests.support.journal import SECONDS, Journal
from tests.test_progress import screen, terminal

WHOLE = sum(SECONDS.values())


def watched(journal: Journal, trials: int = 8) -> tuple[LiveSearch, list[str], list[tuple]]:
    """Return a view of a study, the lines that it says, and what it shows of the whole."""
    lines: list[str] = []
    shown: list[tuple] = []

    class LineReporter(Reporter):
        def say(self, message: str) -> None:
            lines.append(message)

    def show(*values: object) -> None:
        shown.append(values)

    live = LiveSearch(LineReporter(), journal.study, trials, show, lambda: 1)
    return live, lines, shown


def test_a_search_tells_of_trials_and_keeps_best_and_time_up_to_date(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "mine")
    live, lines, shown = watched(journal)
    live.update()
    live.ended(journal.complete(0, 3.0, "uniform"))
    live.ended(journal.complete(1, 3.5, "start"))
    live.ended(journal.fail(2, "NonFiniteError: loss is nan\nin window 3"))
    live.ended(journal.complete(3, 2.0, "model"))
    assert lines == [
        "Trial   0 (1/8) uniform  perplexity    20.086  best    20.086    2.9 s *",
        "Trial   1 (2/8) start    perplexity    33.115  best    20.086    2.9 s",
        "Trial   2 (3/8) sobol    abandoned: NonFiniteError: loss is nan",
        "Trial   3 (4/8) model    perplexity     7.389  best     7.389    2.9 s *",
    ]
    assert shown == [
        (0, "", None),
        (1, "best 20.086 at keep ratio 0.8", 7 * WHOLE),
        (2, "best 20.086 at keep ratio 0.8", 6 * WHOLE),
        (3, "best 20.086 at keep ratio 0.8", 5 * WHOLE),
        (4, "best 7.389 at keep ratio 0.8", 4 * WHOLE),
    ]


def test_the_line_of_the_search_says_what_it_adds(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "mine")
    live, _, shown = watched(journal)
    live.ended(journal.complete(1, 2.5, "analytic", windows=lost(2.5)))
    live.ended(journal.complete(2, 2.25, windows=lost(2.25, 0.125, -0.125, 0.0, 0.0)))
    assert [note for _, note, _ in shown] == [
        "best 12.182 at keep ratio 0.8",
        "best 9.488 at keep ratio 0.8, best - analytic -0.250 +- 0.051",
    ]


def test_a_front_has_no_best_but_trials_that_are_on_it(tmp_path: Path) -> None:
    front = ["budget.lowest=0.5", "budget.keep_ratio=0.9"]
    journal = Journal(tmp_path / "mine", *front)
    live, lines, shown = watched(journal)
    for index, (ratio, nll) in enumerate([(0.5, 3.0), (0.9, 2.0), (0.75, 2.5), (0.8, 2.75)]):
        live.ended(journal.complete(index, nll, "model", keep_ratio=ratio))
    ends = [line.partition(" at ")[2].split("%")[0] for line in lines]
    assert ends == ["50.0", "90.0", "75.0", "80.0"]
    assert [line.endswith(" *") for line in lines] == [True, True, True, False]
    assert not any("best" in line for line in lines)
    assert [note for _, note, _ in shown] == [
        "front of 1",
        "front of 2",
        "front of 3",
        "front of 3",
    ]


@pytest.mark.parametrize("origin", ["uniform", "analytic", "transfer"])
def test_a_trial_is_one_line_of_80_columns(tmp_path: Path, origin: str) -> None:
    journal = Journal(tmp_path / "mine")
    live, lines, _ = watched(journal, 200)
    live.ended(journal.complete(0, 9.0, origin))
    assert len(lines[0]) <= 80
    assert "8103.084" in lines[0]


def test_time_is_judged_by_the_last_trials_and_by_how_many_run_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "mine")
    ended: list[TrialRecord] = [journal.complete(index, 2.0, "model") for index in range(12)]
    assert seconds_left([], 5, lambda: 1) is None
    assert seconds_left(ended, 5, lambda: 1) == 5 * WHOLE
    # Two at once are scored in half of the time, and chosen one after the other as before.
    assert seconds_left(ended, 5, lambda: 2) == 5 * (WHOLE - SECONDS["scoring"] / 2)
    slow = TrialRecord(ended[0].request, ended[0].result, seconds={"scoring": 1000.0})
    assert seconds_left([slow, slow, *ended[2:]], 5, lambda: 1) == 5 * WHOLE
    assert seconds_left(ended, 0, lambda: 1) == 0.0


def test_it_is_gone_from_the_screen_when_the_search_is_over(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "mine")
    reporter, out = terminal()
    with reporter.trials(8) as show:
        live = LiveSearch(reporter, journal.study, 8, show, lambda: 1)
        live.update()
        with live.proposing(0):
            reporter._bars.refresh()
            search, trial = screen(out.getvalue())
    assert "0/8 trials" in search
    assert trial.startswith("Trial 0 ")
    assert "proposing" in trial
    assert screen(out.getvalue()) == []


class Finished(NullTracker):
    """Notes how a run was closed."""

    completed: bool | None = None

    def finish(self, *, completed: bool) -> None:
        self.completed = completed


@pytest.mark.parametrize(
    ("error", "drawn", "completed"),
    [(None, 1, True), (StudyError("stuck"), 1, False), (KeyboardInterrupt(), 0, False)],
)
def test_a_run_is_closed_however_its_search_ends_and_an_interrupt_draws_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException | None,
    drawn: int,
    completed: bool,
) -> None:
    journal, tracker = Journal(tmp_path / "mine"), Finished()
    journal.score_dense(2.0)
    journal.complete(0, 3.0, "uniform")
    drawings: list[Study] = []
    monkeypatch.setattr(search, "show_if_possible", lambda study, _: drawings.append(study))
    out = io.StringIO()
    reporter = Reporter(Console(file=out, width=80))
    with pytest.raises(type(error)) if error else nullcontext():  # noqa: SIM117
        with search._closing(journal.study, tracker, 8, reporter):
            if error is not None:
                raise error
    assert (len(drawings), tracker.completed) == (drawn, completed)
    assert ("Stopping: 1 of 8 trials" in out.getvalue()) == isinstance(error, KeyboardInterrupt)


def test_an_interrupt_while_figures_are_drawn_closes_the_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    journal, tracker = Journal(tmp_path / "mine"), Finished()
    journal.score_dense(2.0)
    monkeypatch.setattr(search, "show_if_possible", interrupted)
    reporter = Reporter(Console(file=io.StringIO()))
    with pytest.raises(KeyboardInterrupt), search._closing(journal.study, tracker, 8, reporter):
        pass
    assert tracker.completed is True


def test_in_a_log_there_are_the_lines_of_trials_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "mine")
    out = io.StringIO()
    reporter = Reporter(Console(file=out, width=40, highlight=False))
    with reporter.trials(8) as show:
        live = LiveSearch(reporter, journal.study, 8, show, lambda: 1)
        with live.proposing(0):
            live.ended(journal.complete(0, 3.0, "uniform"))
    (line,) = out.getvalue().splitlines()
    assert line.startswith("Trial   0 (1/8) uniform ")
