"""What Ax proposes: inside bounds and budget, repeatable, aware of running trials, and useful."""

import random
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from botorch.acquisition.multi_objective import logei

from lrbo.optimization.proposals import CappedSingleTaskGP, Observation, SearchClient
from lrbo.optimization.space import sobol_point
from lrbo.optimization.variables import RatioSpace
from tests.support.fakes import make_layers, make_space, make_weight_space

LOWER, UPPER = 0.2, 1.0  # bounds of the fake space
TOLERANCES = {
    "budget": 1e-6,  # the optimizer of the acquisition function keeps constraints to 1e-8
    "repeat": 1e-6,  # two fits of the same surrogate; 4e-10 was measured
}


def space_of(variables: int, keep_ratio: float = 0.6) -> RatioSpace:
    """Build a space with this many variables, one per layer."""
    if variables == 1:
        return make_space(keep_ratio, make_layers(1, {"q_proj": (24, 24)}), start={}, dense=[])
    layers = make_layers(variables // 5)  # five searched layers and the pinned values
    return make_space(keep_ratio, layers, granularity="layer")


def loss(point: Mapping[str, float]) -> float:
    """Fall in every ratio, in some much faster than in others."""
    weights = [4.0, 0.1, 1.0, 0.02, 0.5]
    return sum(weights[i % 5] * (1 - x) ** 2 for i, x in enumerate(point.values())) / len(point)


def observe(space: RatioSpace, number: int) -> list[Observation]:
    points = [sobol_point(space, index, 0) for index in range(number)]
    return [Observation(point, loss(point)) for point in points]


def used(space: RatioSpace, point: Mapping[str, float]) -> float:
    return sum(share * point[name] for name, share in space.shares.items())


def distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return max(abs(one[name] - other[name]) for name in one)


@pytest.mark.parametrize(
    ("variables", "keep_ratio"),
    [
        (1, 0.6),
        (5, 0.9),
        (5, 0.35),
        (20, 0.45),
        pytest.param(210, 0.6, marks=pytest.mark.slow),
    ],
)
def test_a_proposal_keeps_bounds_and_meets_the_budget(variables: int, keep_ratio: float) -> None:
    space = space_of(variables, keep_ratio)
    assert len(space.names) == variables
    point = SearchClient(space, seed=0).ask(6, observe(space, 6))
    assert list(point) == list(space.names)
    assert all(LOWER <= value <= UPPER for value in point.values())
    # Below it would be scaled up to another point, of which the surrogate thought nothing.
    assert used(space, point) == pytest.approx(space.room, abs=TOLERANCES["budget"])


def test_weights_are_proposed_within_bounds_and_nothing_else() -> None:
    layers = make_layers(1, {"q_proj": (24, 24), "o_proj": (24, 24)})
    space = make_weight_space(0.6, layers, knots=0, exponent=False)
    points = [sobol_point(space, index, 0) for index in range(10)]
    observations = [Observation(point, -sum(point.values())) for point in points]
    client = SearchClient(space, seed=0)
    point = client.ask(10, observations)
    assert list(point) == list(space.names)
    assert all(low <= point[name] <= high for name, (low, high) in space.bounds.items())
    # Both may rise at once: there is no budget between them, as there is between ratios.
    assert sum(point.values()) > max(sum(other.values()) for other in points)
    assert distance(client.ask(10, observations), point) < TOLERANCES["repeat"]


def test_a_budget_for_everything_leaves_the_whole_box() -> None:
    space = space_of(5, 1.0)
    point = SearchClient(space, seed=0).ask(6, observe(space, 6))
    assert all(LOWER <= value <= UPPER for value in point.values())


@pytest.mark.parametrize("slack", [0.0, 1e-6, 1e-3])
def test_a_budget_that_leaves_hardly_any_room_has_a_proposal(slack: float) -> None:
    """At the smallest feasible budget the space is one point, which was tried: not an error."""
    free = space_of(5)
    pinned = free.problem.price(free.problem.dense)
    total = free.problem.dense_cost.parameters
    keep_ratio = (pinned + (LOWER + slack) * (total - pinned)) / total + 1 / total
    space = space_of(5, keep_ratio)
    assert space.room - LOWER < slack + 2 / total
    point = SearchClient(space, seed=0).ask(3, observe(space, 3))
    assert used(space, point) <= space.room + TOLERANCES["budget"]
    assert all(LOWER <= value <= UPPER for value in point.values())


def test_the_same_observations_give_the_same_proposal_and_touch_no_random_state() -> None:
    space = space_of(5)
    first = SearchClient(space, seed=4).ask(7, observe(space, 7))
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  the global state is what is meant
    states = torch.random.get_rng_state(), np.random.get_state()  # noqa: NPY002
    second = SearchClient(space, seed=4).ask(7, observe(space, 7))
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1][1])  # noqa: NPY002
    assert distance(first, second) < TOLERANCES["repeat"]


def test_running_trials_are_taken_as_pending() -> None:
    space = space_of(5)
    client, observations = SearchClient(space, seed=0), observe(space, 8)
    first = client.ask(8, observations)
    second = client.ask(8, [*observations, Observation(first, None)])
    # The same seed: ignored, the running trial would leave the proposal where it was.
    assert distance(first, second) > 0.01


def test_ax_is_told_how_sure_each_objective_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from lrbo.optimization import proposals as module

    tables, make = [], module.Data

    def watched(*, df):
        tables.append(df)
        return make(df=df)

    monkeypatch.setattr(module, "Data", watched)
    space = space_of(5)
    points = [sobol_point(space, index, 0) for index in range(4)]
    errors = [0.01, 0.02, 0.03, 0.04]
    observations = [
        Observation(p, loss(p), 0.5 + index / 10, size_error=error)
        for index, (p, error) in enumerate(zip(points, errors, strict=True))
    ]
    SearchClient(space, seed=0).ask(4, observations, (3.0, 1.0))
    (table,) = tables
    sizes = table[table["metric_name"] == module.SIZE]
    assert list(sizes["sem"]) == errors
    assert list(sizes["mean"]) == [0.5, 0.6, 0.7, 0.8]
    assert set(table[table["metric_name"] == module.METRIC]["sem"]) == {0.0}


def test_nothing_is_compiled_for_a_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that a killed process left in the folder of compiled kernels would stop the search."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "logei_fused_ext").mkdir()
    (tmp_path / "logei_fused_ext" / "lock").touch()
    space = make_weight_space()
    points = [sobol_point(space, index, 0) for index in range(5)]
    observations = [Observation(point, 1.0 + i, 5.0 - i) for i, point in enumerate(points)]
    assert set(SearchClient(space, seed=0).ask(5, observations, (7.0, 6.0))) == set(space.names)
    assert logei._C is None


def test_observations_outside_the_bounds_count() -> None:
    """Rounding to options realises points a little below the lower bound."""
    space = space_of(5)
    client, observations = SearchClient(space, seed=0), observe(space, 6)
    below = {**observations[0].point, space.names[0]: LOWER - 0.04}
    outside = [client.ask(6, [*observations, Observation(below, value)]) for value in (0.0, 3.0)]
    assert distance(*outside) > 0.01


def test_a_proposal_needs_a_value() -> None:
    space = space_of(5)
    client = SearchClient(space, seed=0)
    open_trials = [Observation(sobol_point(space, 0, 0), None)]
    for observations in ([], open_trials):
        with pytest.raises(ValueError, match="at least one trial with a value"):
            client.ask(1, observations)


def test_one_value_is_enough() -> None:
    space = space_of(5)
    point = SearchClient(space, seed=0).ask(1, observe(space, 1))
    assert used(space, point) <= space.room + TOLERANCES["budget"]


def test_the_same_point_twice_is_no_error() -> None:
    """Where the space has no more allocations, a trial repeats one."""
    space = space_of(5)
    observations = observe(space, 4)
    point = SearchClient(space, seed=0).ask(5, [*observations, observations[1]])
    assert used(space, point) <= space.room + TOLERANCES["budget"]


def test_fitting_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap goes through a private function of botorch: it must still arrive there."""
    from lrbo.optimization import proposals as module

    given = []
    fit = module._fit_fallback

    def watched(mll, **options):
        given.append(options["optimizer_kwargs"]["options"]["maxiter"])
        return fit(mll, **options)

    monkeypatch.setattr(module, "_fit_fallback", watched)
    space = space_of(5)
    SearchClient(space, seed=0).ask(3, observe(space, 3))
    assert given
    assert set(given) == {CappedSingleTaskGP.STEPS}


@pytest.mark.slow
def test_proposals_beat_random_points_under_a_tight_budget() -> None:
    space = space_of(5, 0.4)
    observations = observe(space, 4)
    client = SearchClient(space, seed=0)
    for index in range(4, 16):
        point = client.ask(index, observations)
        observations.append(Observation(point, loss(point)))
    proposed = min(each.loss for each in observations if each.loss is not None)
    chooser = random.Random(0)

    def draw() -> float:
        return loss(space.project({name: chooser.uniform(LOWER, UPPER) for name in space.names}))

    best_of_12 = sorted(min(draw() for _ in range(12)) for _ in range(40))
    # Not only the typical dozen of random points, but nearly every one.
    assert proposed < best_of_12[2]


@pytest.mark.slow
def test_210_variables_and_a_hundred_trials_take_seconds() -> None:
    """Ax's own settings take 30 to 90 s here, more than a trial."""
    space = space_of(210)
    observations = observe(space, 100)
    start = time.process_time()
    SearchClient(space, seed=0).ask(100, observations)
    assert time.process_time() - start < 30
