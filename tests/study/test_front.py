"""The front is what no other trial beats, found in any order and among failures."""

import dataclasses

import pytest
import torch
from botorch.utils.multi_objective.hypervolume import Hypervolume
from hypothesis import given
from hypothesis import strategies as st

from lrbo.allocation.allocate import Allocation
from lrbo.layers.options import Budget
from lrbo.study.front import hypervolume, pareto_front, reference_point
from lrbo.trials.records import TrialRecord, TrialRequest, TrialResult

# No tolerances: only comparisons of the numbers that were given.


def trial(index: int, nll: float, parameters: int) -> TrialRecord:
    allocation = Allocation({}, {}, Budget("parameters", 99))
    request = TrialRequest(index, "sobol", {}, allocation, index)
    metrics = {"objective": nll, "parameters": float(parameters)}
    return TrialRecord(request, TrialResult(index, "completed", metrics))


def without_value(index: int, outcome: str | None) -> TrialRecord:
    record = trial(index, -1.0, 0)  # would beat all others if it counted
    if outcome is None:
        return dataclasses.replace(record, result=None)
    return dataclasses.replace(record, result=TrialResult(index, outcome, {}, 1.0, "why"))


def beats(one: TrialRecord, other: TrialRecord) -> bool:
    mine = (one.metrics["objective"], one.metrics["parameters"])
    theirs = (other.metrics["objective"], other.metrics["parameters"])
    return mine[0] <= theirs[0] and mine[1] <= theirs[1] and mine != theirs


def front_by_pairs(trials: list[TrialRecord]) -> list[int]:
    """Compare every pair; of equal ones keep the lowest number."""
    indices = []
    for one in trials:
        values = one.metrics
        earlier = [
            other
            for other in trials
            if other.metrics == values and other.request.trial_index < one.request.trial_index
        ]
        if not earlier and not any(beats(other, one) for other in trials):
            indices.append(one.request.trial_index)
    return indices


# Few values, so that ties in one number and in both are common.
VALUES = st.lists(
    st.tuples(st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0]), st.integers(1, 6)), max_size=14
)


@given(VALUES, st.randoms(use_true_random=False))
def test_equals_the_comparison_of_all_pairs_in_any_order(values, chooser) -> None:
    trials = [trial(index, *value) for index, value in enumerate(values)]
    shuffled = chooser.sample(trials, len(trials))
    front = pareto_front(iter(shuffled))
    assert sorted(t.request.trial_index for t in front) == front_by_pairs(trials)


@given(VALUES)
def test_runs_from_small_to_large_and_from_high_loss_to_low(values) -> None:
    front = pareto_front(trial(index, *value) for index, value in enumerate(values))
    sizes = [t.metrics["parameters"] for t in front]
    losses = [t.metrics["objective"] for t in front]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)
    assert bool(front) == bool(values)


@given(VALUES)
def test_every_trial_is_matched_or_beaten_by_the_front(values) -> None:
    trials = [trial(index, *value) for index, value in enumerate(values)]
    front = pareto_front(trials)
    for one in trials:
        assert any(beats(best, one) or best.metrics == one.metrics for best in front)


@given(VALUES, st.data())
def test_trials_without_a_value_change_nothing(values, data) -> None:
    trials = [trial(index, *value) for index, value in enumerate(values)]
    mixed = list(trials)
    for number, outcome in enumerate(["failed", "abandoned", None, "failed"]):
        position = data.draw(st.integers(0, len(mixed)))
        mixed.insert(position, without_value(100 + number, outcome))
    assert pareto_front(mixed) == pareto_front(trials)


def test_of_equal_trials_the_first_is_kept() -> None:
    equal = [trial(index, 2.0, 3) for index in (5, 1, 4)]
    assert [t.request.trial_index for t in pareto_front(equal)] == [1]


AREAS = 1e-12  # sums of a dozen products of small numbers
NUMBERS = st.floats(0.0, 4.0, allow_nan=False)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12), st.tuples(NUMBERS, NUMBERS))
def test_the_area_is_botorch_s_and_grows_with_every_point(points, reference) -> None:
    area = hypervolume(points, reference)
    inside = [p for p in points if p[0] < reference[0] and p[1] < reference[1]]
    expected = 0.0
    if inside:
        maximised = -torch.tensor(inside, dtype=torch.float64)
        other = Hypervolume(-torch.tensor(reference, dtype=torch.float64))
        expected = other.compute(maximised)
    assert area == pytest.approx(expected, abs=AREAS)
    assert hypervolume([*points, (1.0, 1.0)], reference) >= area - AREAS


def ended(index: int, origin: str, loss: float, keep_ratio: float) -> TrialRecord:
    record = trial(index, loss, 1)
    request = dataclasses.replace(record.request, origin=origin)
    metrics = {"objective": loss, "keep_ratio": keep_ratio}
    return TrialRecord(request, TrialResult(index, "completed", metrics))


def test_the_reference_is_a_tenth_beyond_the_ends_of_what_the_search_begins_with() -> None:
    uniform = [ended(0, "uniform", 3.0, 0.9), ended(1, "uniform", 7.0, 0.5)]
    analytic = [ended(2, "analytic", 2.5, 0.9), ended(3, "analytic", 4.5, 0.5)]
    from_model = [ended(4, "model", 9.0, 0.99)]
    assert reference_point([], "keep_ratio", {}) is None
    assert reference_point(from_model, "keep_ratio", {}) is None
    assert reference_point([*uniform, *from_model], "keep_ratio", {}) == pytest.approx((7.4, 0.94))
    every = [*uniform, *analytic, *from_model]
    assert reference_point(every, "keep_ratio", {}) == pytest.approx((4.7, 0.94))
    given_loss = reference_point(every, "keep_ratio", {"loss": 4.0})
    assert given_loss == pytest.approx((4.0, 0.94))
    assert reference_point([], "keep_ratio", {"loss": 4.0, "keep_ratio": 0.8}) == (4.0, 0.8)
