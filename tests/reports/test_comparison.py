"""Studies beside each other have the numbers of their own reports."""

import io
import math
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from lrbo.reports import comparison, plots
from lrbo.reports.gains import MEANING
from lrbo.reports.terminal import print_comparison, print_report
from lrbo.tasks.metrics import CAUSAL_LM
from tests.reports.test_gains import lost
from tests.reports.test_plots import assert_inside, headings, legend, lines, points
from tests.reports.test_terminal import part, terminal, with_everything
from tests.support.journal import Journal


@pytest.fixture
def sweep() -> pd.DataFrame:
    """Two methods at two sizes, one of them with two seeds; one study has no trial yet."""
    rows = [
        ("bolaco", 0.7998, 0, 40.0, 30.0, 20.0),
        ("bolaco", 0.8, 1, 40.0, 32.0, 20.0),
        ("bolaco", 0.6, 0, 90.0, 70.0, 20.0),
        ("svd_llm", 0.8, 0, 50.0, 50.0, 20.0),
        ("svd_llm", math.nan, 1, math.nan, math.nan, math.nan),
    ]
    columns = ["method", "keep_ratio", "seed", "uniform", "best", "dense"]
    return pd.DataFrame(rows, columns=columns).assign(
        space="weights", analytic=math.nan, measure="parameters"
    )


def test_a_comparison_has_a_line_per_method_through_the_means_of_seeds(
    sweep: pd.DataFrame,
) -> None:
    figure = plots.comparison(sweep, CAUSAL_LM.headline, subtitle="several")
    (axes,) = figure.axes
    drawn = lines(axes)
    assert legend(figure) == ["bolaco weights", "svd_llm weights", "uniform", "dense"]
    assert points(drawn["bolaco weights"]) == [(0.7998, 30.0), (0.8, 32.0), (0.6, 70.0)]
    assert points(drawn["svd_llm weights"]) == [(0.8, 50.0)]
    every = [points(line) for line in axes.lines]
    assert [(0.6, 70.0), (pytest.approx(0.7999), 31.0)] in every
    assert [(0.7998, 40.0), (0.8, 40.0), (0.6, 90.0)] in every
    assert headings(figure) == ["Best perplexity of 4 studies", "several"]
    assert axes.get_xlabel() == "parameters kept in the compressible layers"
    assert_inside(figure)


def test_studies_that_count_otherwise_are_told_apart(tmp_path: Path) -> None:
    studies = []
    for measure in ("parameters", "bytes"):
        journal = Journal(tmp_path / measure, f"budget.measure={measure}")
        journal.complete(0, 2.5, "uniform")
        studies.append(journal.study)
    table = comparison.compared(studies)
    assert list(table["measure"]) == ["parameters", "bytes"]
    out = io.StringIO()
    print_comparison(studies, table, Console(file=out))
    for measure, ratio in zip(table["measure"], table["keep_ratio"], strict=True):
        assert f"{ratio:.1%} of {measure}" in out.getvalue()
    (axes,) = plots.comparison(table, CAUSAL_LM.headline).axes
    assert axes.get_xlabel() == "parameters or bytes kept in the compressible layers"


@pytest.mark.parametrize("windows", [lost(2.0), [2.0]])
def test_a_search_that_adds_nothing_is_said_to_as_in_its_own_report(
    tmp_path: Path, windows: list[float]
) -> None:
    """It was compared with itself, with an error of 0, or one that nobody knows."""
    journal, other = Journal(tmp_path / "mine", windows=len(windows)), Journal(tmp_path / "other")
    journal.complete(0, 2.0, "analytic", windows=windows)
    journal.complete(1, 2.5, "model", windows=windows)
    studies = [journal.study, other.study]
    out, own = io.StringIO(), io.StringIO()
    print_comparison(studies, comparison.compared(studies), Console(file=out))
    print_report(journal.study, Console(file=own))
    sentence = "any\tnone: the best trial is the analytic one"
    assert out.getvalue().count(sentence) == own.getvalue().count(sentence) == 1
    assert "difference" not in out.getvalue().partition(MEANING)[0]


def test_several_studies_have_a_line_each(tmp_path: Path) -> None:
    first, second = Journal(tmp_path / "first"), Journal(tmp_path / "second", "seed=3")
    with_everything(first)
    second.complete(0, 2.5, "uniform")
    begun = Journal(tmp_path / "begun", "method=svd_llm")
    studies = [first.study, second.study, begun.study]
    table = comparison.compared(studies)
    assert list(table["study"]) == ["first", "second", "begun"]
    assert list(table["method"]) == ["bolaco", "bolaco", "svd_llm"]
    assert list(table["seed"]) == [0, 3, 0]
    assert list(table["trials"]) == [4, 1, 0]
    assert table["best"][0] == pytest.approx(math.exp(2.25))
    assert table["test_best"][0] == pytest.approx(math.exp(2.375))
    assert table["test_best"].isna().tolist() == [False, True, True]
    out = io.StringIO()
    print_comparison(studies, table, terminal(out))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    rows = part(text, "Perplexity of 3 studies on the validation text")
    keep_ratio = f"{100 * table['keep_ratio'][0]:.1f}%"
    assert "first" not in text
    assert rows[0][-4:] == ["trials", "dense", "uniform", "best"]  # nobody has an analytic trial
    assert rows[1] == ["bolaco", "per_kind", keep_ratio, "0", "4", "7.39", "20.09", "9.49"]
    assert rows[3] == ["svd_llm", "per_kind", "-", "0", "0", "-", "-", "-"]
    rows = part(text, "Perplexity of 3 studies on the test text")
    assert rows[0][-2:] == ["dense", "best"]
    assert rows[1] == ["bolaco", "per_kind", keep_ratio, "0", "8.37", "10.75"]
    assert "What the searches add" not in text


def test_studies_with_an_analytic_trial_show_what_their_searches_add(tmp_path: Path) -> None:
    journal, other = Journal(tmp_path / "mine"), Journal(tmp_path / "other", "seed=3")
    for one in (journal, other):
        one.score_dense(2.0)
        one.complete(1, 2.5, "analytic", windows=lost(2.5))
        one.complete(2, 2.25, "model", windows=lost(2.25, 0.125, -0.125, 0.0, 0.0))
    journal.tested("analytic", 1, 2.0, lost(2.0))
    journal.tested("best", 2, 2.0625, lost(2.0625, 0.25, -0.25, 0.25, -0.25))
    table = comparison.compared([journal.study, other.study])
    assert table["gain"].tolist() == [-0.25, -0.25]
    assert table["test_gain"][0] == 0.0625
    assert table["test_gain"].isna().tolist() == [False, True]
    out = io.StringIO()
    print_comparison([journal.study, other.study], table, terminal(out))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    lines = [" ".join(cells) for cells in part(out.getvalue(), "What the searches add")]
    assert lines[0].endswith("text best - analytic")
    assert lines[1].endswith("validation -0.250 +- 0.051")
    assert lines[2].endswith("test no measurable difference: 0.06 +- 0.14")
    assert lines[3].endswith("3 validation -0.250 +- 0.051")
    figure = plots.comparison(table, CAUSAL_LM.headline)
    assert "analytic" in legend(figure)
    assert_inside(figure)


def test_studies_that_differ_in_something_else_are_called_by_their_names(tmp_path: Path) -> None:
    names = ["one", "a_long_name_of_a_study_that_goes_on_and_on_until_it_does_not_fit_any_more"]
    studies = [with_everything(Journal(tmp_path / name)) for name in names]
    out = io.StringIO()
    print_comparison(studies, comparison.compared(studies), terminal(out))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = part(out.getvalue(), "Perplexity of 2 studies on the validation text")
    assert rows[0] == ["study", "kept", "trials", "dense", "uniform", "best"]
    assert rows[1][0] == "one"
    assert rows[2][0] + rows[3][0] == names[1]


def test_a_test_score_of_an_earlier_best_is_not_that_of_the_best(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "mine")
    journal.complete(0, 2.5)
    journal.tested("best", 0, 2.0)
    assert comparison.compared([journal.study])["test_best"].tolist() == [math.exp(2.0)]
    journal.complete(1, 2.25)
    assert comparison.compared([journal.study])["test_best"].isna().all()


def test_fronts_of_several_studies_are_lines_in_one_figure(tmp_path: Path) -> None:
    """Each of the trials that no other beats in size and loss; studies of one budget have none."""
    fronts = {
        name: Journal(tmp_path / name, "budget=front", f"method={name}", "space=per_layer")
        for name in ("bolaco", "drone")
    }
    for shift, journal in enumerate(fronts.values()):
        journal.complete(0, 3.0 + shift, "uniform", keep_ratio=0.9)
        journal.complete(1, 2.5 + shift, keep_ratio=0.75)
        journal.complete(2, 2.25 + shift, keep_ratio=0.875)
        journal.complete(3, 2.75 + shift, keep_ratio=0.8125)
    single = Journal(tmp_path / "single")
    single.complete(0, 2.0, "uniform")
    studies = [single.study, *(journal.study for journal in fronts.values())]
    table = comparison.fronts(studies)
    assert list(dict.fromkeys(table["line"])) == ["bolaco per_layer", "drone per_layer"]
    figure = plots.fronts(table, CAUSAL_LM.headline, subtitle="several")
    (axes,) = figure.axes
    assert legend(figure) == ["bolaco per_layer", "drone per_layer", "uniform"]
    for shift, line in enumerate(legend(figure)[:2]):
        assert points(lines(axes)[line]) == [
            (0.75, pytest.approx(math.exp(2.5 + shift))),
            (0.875, pytest.approx(math.exp(2.25 + shift))),
        ]
        hollow = [(0.9, pytest.approx(math.exp(3.0 + shift)))]
        assert hollow in [points(each) for each in axes.lines]
    assert axes.get_xlabel() == "parameters kept in the compressible layers"
    assert headings(figure) == ["Perplexity against size, 2 studies", "several"]
    assert_inside(figure)
    twice = comparison.fronts([studies[1], studies[1]])
    assert list(dict.fromkeys(twice["line"])) == ["bolaco"]  # called by the name of the study
    assert len(comparison.fronts([single.study])) == 0
