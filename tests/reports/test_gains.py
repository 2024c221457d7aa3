"""What a search adds is the paired difference to the analytic trial, and none where it is noise."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lrbo.optimization.space import sobol_point
from lrbo.reports.gains import Difference, gains
from lrbo.tasks.metrics import with_error
from tests.support.journal import Journal

HARD = [4.0, 2.0, 3.5, 2.5]  # windows differ by more than trials do


def lost(nll: float, *off: float) -> list[float]:
    """Return losses of windows whose mean is ``nll``."""
    return [nll + hard - 3.0 + shift for hard, shift in zip(HARD, off or [0.0] * 4, strict=True)]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "mine")


@given(st.lists(st.tuples(*[st.floats(1.0, 9.0)] * 2), min_size=2, max_size=40))
def test_a_difference_is_paired_by_window(pairs: list[tuple[float, float]]) -> None:
    mine, other = (np.array(losses) for losses in zip(*pairs, strict=True))
    difference = Difference.paired(mine.tolist(), other.tolist(), math.nan)
    assert difference.mean == pytest.approx((mine - other).mean(), abs=1e-12)
    assert difference.error == pytest.approx(stats.sem(mine - other), abs=1e-12)
    assert difference.is_measurable == (abs(difference.mean) > 2 * difference.error)


@given(
    st.floats(-100, 100).filter(lambda value: abs(value) > 1e-6),
    st.floats(-6, 1).map(lambda power: 10**power),
)
def test_a_number_has_the_digits_that_its_error_leaves(value: float, error: float) -> None:
    shown_value, shown_error = with_error(value, error).split(" +- ")
    digits = len(shown_error.partition(".")[2])
    assert float(shown_error) == float(f"{error:.1e}") or digits == 0
    assert len(shown_value.partition(".")[2]) == digits
    assert float(shown_value) == round(value, digits)


def test_a_difference_within_two_errors_is_printed_as_none() -> None:
    assert str(Difference(-0.00123, 0.00207)) == "no measurable difference: -0.0012 +- 0.0021"
    assert str(Difference(-0.0058, 0.0021)) == "-0.0058 +- 0.0021"
    assert str(Difference(0.0, 0.0)) == "no measurable difference: 0 +- 0"
    assert str(Difference(-0.0058, None)) == "-0.0058, its error is not known"


def test_the_best_is_compared_with_the_analytic_trial_on_both_texts(journal: Journal) -> None:
    journal.complete(0, 3.0, "uniform", windows=lost(3.0))
    journal.complete(1, 2.5, "analytic", windows=lost(2.5))
    journal.complete(2, 2.25, "model", windows=lost(2.25, 0.125, -0.125, 0.0, 0.0))
    journal.tested("analytic", 1, 2.0, lost(2.0))
    (gain,) = gains(journal.study.state)
    assert (gain.best.request.trial_index, gain.analytic.request.trial_index) == (2, 1)
    assert gain.differences["validation"].mean == -0.25
    assert gain.differences["validation"].error == pytest.approx(
        stats.sem([0.125, -0.125, 0.0, 0.0])
    )
    assert gain.differences["validation"].is_measurable
    assert "test" not in gain.differences
    assert list(gain.lines) == ["validation"]
    journal.tested("best", 2, 2.0625, lost(2.0625, 0.25, -0.25, 0.25, -0.25))
    (gain,) = gains(journal.study.state)
    assert gain.differences["test"].mean == 0.0625
    assert not gain.differences["test"].is_measurable
    assert gain.lines["test"].startswith("no measurable difference: 0.06 +- 0.14")


def test_an_analytic_trial_that_is_the_best_says_that_nothing_was_added(journal: Journal) -> None:
    journal.complete(1, 2.0, "analytic", windows=lost(2.0))
    journal.complete(2, 2.25, "model", windows=lost(2.25))
    (gain,) = gains(journal.study.state)
    assert gain.lines == {"any": "none: the best trial is the analytic one"}


def test_without_an_analytic_trial_there_is_nothing_to_compare_with(journal: Journal) -> None:
    journal.complete(0, 3.0, "uniform", windows=lost(3.0))
    journal.complete(1, 2.0, windows=lost(2.0))
    assert gains(journal.study.state) == []


def test_an_older_study_has_a_difference_without_its_error(journal: Journal) -> None:
    journal.complete(1, 2.5, "analytic")
    journal.complete(2, 2.25, "model")
    (gain,) = gains(journal.study.state)
    assert gain.differences["validation"] == Difference(-0.25, None)
    assert gain.to_dict()["validation"]["is_measurable"] is None


def test_on_a_front_each_analytic_trial_has_the_best_of_its_own_budget(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "mine", "budget=front")
    spaces = {
        keep: Journal(tmp_path / f"{keep}", f"budget.keep_ratio={keep}").space
        for keep in (0.6, 0.8)
    }
    for index, (keep, nll, origin) in enumerate(
        [(0.8, 2.5, "analytic"), (0.6, 3.0, "analytic"), (0.6, 2.75, "model"), (0.8, 2.25, "model")]
    ):
        allocation = spaces[keep].allocate(sobol_point(spaces[keep], index, 0))
        journal.complete(index, nll, origin, allocation, windows=lost(nll))
    by_budget = gains(journal.study.state)
    numbers = [(g.best.request.trial_index, g.analytic.request.trial_index) for g in by_budget]
    assert numbers == [(3, 0), (2, 1)]
    assert [g.differences["validation"].mean for g in by_budget] == [-0.25, -0.25]
