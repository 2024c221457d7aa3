"""Reports ask the task for its metrics: another one, with a table of its own, needs no change."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from lrbo.errors import StudyError
from lrbo.reports import comparison, mlflow_view, plots, results
from lrbo.reports.page import study_page
from lrbo.reports.search_progress import LiveSearch
from lrbo.reports.studies import StudyResults
from lrbo.reports.terminal import print_comparison, print_report
from lrbo.study.journal import Study
from lrbo.tasks import metrics
from lrbo.tasks.metrics import Metric, Task
from tests.reports.test_page import traces
from tests.reports.test_search_progress import watched
from tests.support.journal import TOKENS, Journal

OTHER = Task(
    "classification",
    (
        Metric("squared_error", "squared error", "error", unit="squared units"),
        Metric("accuracy", "accuracy", lower_is_better=False, spec=".4f"),
        Metric("distance", "distance from dense", unit="squared units", dense=0.0),
    ),
    shown="accuracy",
    divergence="distance",
    hub_tag="image-classification",
)
WORDS_OF_LANGUAGE_MODELS = ("perplexity", "ppl", "nll", "nats")


def scores(error: float) -> dict[str, float]:
    return {
        "squared_error": error, "accuracy": 1 - error, "distance": error / 2, "tokens": TOKENS,
    }  # fmt: skip


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """A front of four trials, one without a value, of which the best is the third."""
    monkeypatch.setitem(metrics.TASKS, metrics.CAUSAL_LM.name, OTHER)
    journal = Journal(tmp_path / "mine", "budget=front", "search.size=keep_ratio")
    journal.study.record("dense", metrics=scores(0.125))
    for index, (error, keep_ratio) in enumerate([(0.5, 0.6), (0.375, 0.7), (0.25, 0.8)]):
        origin = "analytic" if index == 1 else "model"
        journal.complete(
            index, origin=origin, keep_ratio=keep_ratio, objective=error, **scores(error)
        )
    journal.fail(3, "loss is nan")
    for label, trial, error in (("dense", None, 0.25), ("best", 2, 0.3125)):
        journal.study.record(
            "tested", label=label, trial=trial, text="words[test]", metrics=scores(error),
            example_losses=[error] * 4,
        )  # fmt: skip
    return journal


def assert_of_the_other_task(text: str, *wanted: str) -> None:
    for words in wanted:
        assert words in text
    for word in WORDS_OF_LANGUAGE_MODELS:
        assert word not in text


def printed(study: Study) -> str:
    out = io.StringIO()
    print_report(study, Console(file=out))
    return out.getvalue()


def test_its_metrics_are_in_summary_and_frame(journal: Journal) -> None:
    summary = results.summary(journal.study)
    assert summary["dense"] == {"squared_error": 0.125, "accuracy": 0.875}
    assert summary["best"]["accuracy"] == 0.75
    assert summary["test"]["best"]["squared_error"] == 0.3125
    table = results.frame(journal.study)
    assert list(table["best_accuracy"]) == [0.5, 0.625, 0.75, 0.75]
    assert not {*WORDS_OF_LANGUAGE_MODELS} & set(table.columns)


def test_its_metrics_are_in_every_report(journal: Journal) -> None:
    assert_of_the_other_task(
        printed(journal.study),
        "error\taccuracy\tdistance from dense\tkept",
        "What the search adds, squared units",
        "trial\taccuracy\tsquared error\tkept",
        "best\t2\t0.2500\t0.7500",
    )
    page = study_page(journal.study)
    assert_of_the_other_task(page[page.index("<h1>") : page.index("<h2>Loss against")])
    assert "validation accuracy" in page
    point = traces(page, "Trials in order")["surrogate model"]
    assert point["y"] == [0.5, 0.75]
    assert "accuracy %{customdata[1]:.4f}" in point["hovertemplate"]
    assert_of_the_other_task(
        mlflow_view.presentation(journal.study).note, "| validation accuracy |", "squared units"
    )
    out = io.StringIO()
    print_comparison([journal.study], comparison.compared([journal.study]), Console(file=out))
    assert_of_the_other_task(out.getvalue(), "Accuracy of 1 studies")
    assert_of_the_other_task(repr(StudyResults(journal.study)), "best accuracy 0.7500")


def test_its_figures_have_its_axes_and_lost_trials_on_the_worse_side(journal: Journal) -> None:
    drawn = plots.figures(journal.study)
    (axes,) = drawn["convergence"].axes
    assert (axes.get_ylabel(), axes.get_yscale()) == ("validation accuracy", "linear")
    lost = next(line for line in axes.lines if line.get_label() == "no value")
    assert list(lost.get_ydata()) == [0.03]
    assert drawn["front"].texts[0].get_text() == "Accuracy against size"


def test_a_search_shows_it_trial_by_trial(journal: Journal) -> None:
    live: LiveSearch
    live, lines, _ = watched(journal)
    live.ended(journal.study.state.trials[2])
    assert "accuracy    0.7500 at 80.0%" in lines[0]


def test_studies_of_several_tasks_are_not_compared(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(metrics.TASKS, metrics.CAUSAL_LM.name, metrics.CAUSAL_LM)
    other = Journal(tmp_path / "other").study
    with pytest.raises(StudyError, match=r"mine \(classification\), other \(causal_lm"):
        comparison.common_task([journal.study, other])
