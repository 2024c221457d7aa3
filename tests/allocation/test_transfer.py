"""An allocation in another model: the same ranks in the same one, the same shares elsewhere."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrbo.allocation import Allocation, Budget, allocate
from lrbo.errors import ConfigError
from lrbo.optimization.base import BudgetSpace, known_starts
from lrbo.transfer import PAPER, Donor, DonorTrial, profile_of, transferred_ratios
from tests.fakes import factored, make_layers, make_space, make_weight_space

RATIO = 1e-12  # a quotient of integers, interpolated


def lend(allocation: Allocation, blocks: int = 2, **variables: float) -> Donor:
    profile = profile_of(make_layers(blocks), allocation, factored)
    return Donor("study:other", (DonorTrial(0.7, variables, profile),))


@given(st.integers(0, 30), st.sampled_from([0.5, 0.7, 0.9]))
def test_the_same_model_and_budget_gets_the_same_ranks_back(index: int, keep: float) -> None:
    space = make_space(keep)
    allocation = space.allocate(space.sobol_point(index, 0))
    (start,) = known_starts(space, [lend(allocation)])
    assert start.origin == "transfer"
    assert start.allocation == allocation
    assert start.point == space.realised(allocation, {})


@given(st.integers(2, 9), st.integers(0, 20))
def test_a_deeper_model_gets_the_shares_of_the_same_depth(blocks: int, index: int) -> None:
    donor = make_space(layers=make_layers(3), granularity="layer", groups={"all": ["*"]}, start={})
    allocation = donor.allocate(donor.sobol_point(index, 0))
    profile = profile_of(make_layers(3), allocation, factored)
    layers = make_layers(blocks)
    ratios = transferred_ratios("study:other", profile, layers)
    for spec in layers:
        assert spec.block is not None
        place = 2 * spec.block / (blocks - 1)
        below = min(int(place), 1)
        values = [kept for _, kept in profile[spec.kind]]
        expected = values[below] + (place - below) * (values[below + 1] - values[below])
        assert ratios[spec.name] == pytest.approx(expected, abs=RATIO)


def test_the_same_variables_are_taken_over_as_they_are() -> None:
    space = make_weight_space()
    point = space.sobol_point(3, 0)
    (start,) = known_starts(space, [lend(make_space().uniform(), **point, keep_ratio=0.7)])
    assert start.point == point
    assert start.allocation == space.allocate(point)
    far = dict.fromkeys(space.names, 3.0)
    (start,) = known_starts(space, [lend(make_space().uniform(), **far)])
    assert set(start.point.values()) == {0.5}


def test_another_budget_scales_what_is_kept() -> None:
    space = make_space(0.7)
    allocation = space.allocate(space.sobol_point(1, 0))
    smaller = make_space(0.5)
    (start,) = known_starts(smaller, [lend(allocation)])
    assert start.allocation.parameters <= smaller.budget.parameters
    ratios = transferred_ratios("x", lend(allocation).trials[0].profile, make_layers())
    expected = allocate(ratios, smaller.layers, smaller.budget, cost=factored, dense=smaller.dense)
    assert start.allocation == expected


def test_of_a_front_the_largest_that_fits_is_lent() -> None:
    trials = tuple(DonorTrial(keep, {}, {}) for keep in (0.5, 0.6, 0.8))
    donor = Donor("study:front", trials)
    found = {keep: donor.at(keep).keep_ratio for keep in (0.4, 0.5, 0.59, 0.6, 0.7, 0.95)}
    assert found == {0.4: 0.5, 0.5: 0.5, 0.59: 0.5, 0.6: 0.6, 0.7: 0.6, 0.95: 0.8}


def test_a_donor_that_lends_a_baseline_is_no_other_point() -> None:
    space = make_weight_space()
    donor = lend(space.uniform())
    for wanted in (["uniform", donor], [donor, "uniform"], ["uniform", donor, donor]):
        starts = known_starts(space, wanted)
        assert sorted(start.origin for start in starts) == ["transfer", "uniform"]
        assert [start.allocation for start in starts] == [space.uniform()] * 2


def test_kinds_that_the_donor_lacks_are_named_with_a_layer() -> None:
    layers = make_layers(shapes={"q_proj": (8, 8), "c_fc": (8, 8), "c_attn": (8, 8)})
    profile = profile_of(make_layers(), make_space().uniform(), factored)
    with pytest.raises(ConfigError) as caught:
        transferred_ratios("study:llama", profile, layers)
    (problem,) = caught.value.problems
    assert "study:llama has no layers of kind c_attn (layers.0.c_attn), c_fc (layers.0.c_fc)" in (
        problem
    )
    assert "its kinds are" in problem


def test_a_donor_goes_through_json() -> None:
    space: BudgetSpace = make_space()
    donor = lend(space.uniform(), a=0.25)
    again = Donor.from_dict(json.loads(json.dumps(donor.to_dict())))
    assert known_starts(space, [again]) == known_starts(space, [donor])
    assert again.trials[0].variables == {"a": 0.25}


def test_the_paper_keeps_what_it_says_of_its_own_model() -> None:
    """Table 8 keeps 0.7992 and 0.6989 of Llama-2-7B's linear layers (science of the project)."""
    square, wide = 4096 * 4096, 4096 * 11008
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for trial, expected in zip(PAPER.trials, (0.7992, 0.6989), strict=True):
        kept = 0.0
        for kind in kinds:
            values = [ratio for _, ratio in trial.profile[kind]]
            kept += sum(values) / len(values) * (square if kind[0] in "qkvo" else wide)
        assert kept / (4 * square + 3 * wide) == pytest.approx(expected, abs=5e-5)


def test_the_paper_s_ranks_fit_the_budget_of_another_model() -> None:
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (48, 48))
    shapes |= {"gate_proj": (96, 48), "up_proj": (96, 48), "down_proj": (48, 96)}
    layers = make_layers(6, shapes)
    for keep in (0.7, 0.8):
        space = make_weight_space(keep, layers)
        (start,) = known_starts(space, [PAPER])
        assert start.origin == "transfer"
        assert start.allocation.parameters <= Budget.from_keep_ratio(layers, keep).parameters
        ranks = start.allocation.ranks
        assert all(ranks[spec.name] is None for spec in layers if spec.kind == "v_proj")
        assert ranks["layers.5.o_proj"] < ranks["layers.0.o_proj"]  # type: ignore[operator]
