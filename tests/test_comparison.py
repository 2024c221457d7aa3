"""Studies beside each other have the numbers of their own reports."""

import io
import math
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from lrbo import comparison, plots
from lrbo.report import print_comparison
from tests.journal import Journal
from tests.test_plots import assert_inside, headings, legend, lines, points
from tests.test_report import part, with_everything


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
    return pd.DataFrame(rows, columns=columns).assign(space="weights")


def test_a_comparison_has_a_line_per_method_through_the_means_of_seeds(
    sweep: pd.DataFrame,
) -> None:
    figure = plots.comparison(sweep, about="several")
    (axes,) = figure.axes
    drawn = lines(axes)
    assert legend(figure) == ["bolaco weights", "svd_llm weights", "uniform", "dense"]
    assert points(drawn["bolaco weights"]) == [(0.7998, 30.0), (0.8, 32.0), (0.6, 70.0)]
    assert points(drawn["svd_llm weights"]) == [(0.8, 50.0)]
    every = [points(line) for line in axes.lines]
    assert [(0.6, 70.0), (pytest.approx(0.7999), 31.0)] in every
    assert [(0.7998, 40.0), (0.8, 40.0), (0.6, 90.0)] in every
    assert headings(figure) == ["Best perplexity of 4 studies", "several"]
    assert_inside(figure)


def test_several_studies_have_a_line_each(tmp_path: Path) -> None:
    first, second = Journal(tmp_path / "first"), Journal(tmp_path / "second", "seed=3")
    with_everything(first)
    second.complete(0, 2.5, "uniform")
    begun = Journal(tmp_path / "begun", "method=svd_llm")
    table = comparison.compared([first.study, second.study, begun.study])
    assert list(table["study"]) == ["first", "second", "begun"]
    assert list(table["method"]) == ["bolaco", "bolaco", "svd_llm"]
    assert list(table["seed"]) == [0, 3, 0]
    assert list(table["trials"]) == [4, 1, 0]
    assert table["best"][0] == pytest.approx(math.exp(2.25))
    assert table["test"][0] == pytest.approx(math.exp(2.375))
    assert table[["test"]].isna()["test"].tolist() == [False, True, True]
    out = io.StringIO()
    print_comparison(table, Console(width=80, file=out, highlight=False))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    found = part(text, "Perplexity of 3 studies")
    kept = f"{100 * table['keep_ratio'][0]:.1f}%"
    assert "first" not in text
    assert found[1] == ["bolaco", "per_kind", kept, "0", "4", "20.09", "9.49", "10.75"]
    assert found[3] == ["svd_llm", "per_kind", "-", "0", "0", "-", "-", "-"]


def test_studies_that_differ_in_something_else_are_called_by_their_names(tmp_path: Path) -> None:
    names = ["one", "a_long_name_of_a_study_that_goes_on_and_on_until_it_does_not_fit_any_more"]
    studies = [with_everything(Journal(tmp_path / name)) for name in names]
    out = io.StringIO()
    print_comparison(comparison.compared(studies), Console(width=80, file=out, highlight=False))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    found = part(out.getvalue(), "Perplexity of 2 studies")
    assert found[0] == ["study", "kept", "trials", "uniform", "best", "test"]
    assert found[1][0] == "one"
    assert found[2][0] + found[3][0] == names[1]
