"""A range of budgets: each point is one of the space inside, under the budget that it names."""

import math
from pathlib import Path
from typing import Any

import pytest

from lrbo.allocation.transfer import Donor, DonorTrial
from lrbo.layers.options import DENSE, Budget, Option
from lrbo.optimization.budgets import KEEP_RATIO, FrontSpace
from lrbo.optimization.loop import SearchLoop, SearchSettings
from lrbo.optimization.proposals import Observation, SearchClient
from lrbo.optimization.space import STARTS, Space, sobol_point
from lrbo.study.front import hypervolume
from lrbo.study.journal import Study
from lrbo.tracking.tracker import NullTracker
from lrbo.trials.records import TrialRecord
from tests.optimization.test_loop import Search, assert_same_search
from tests.support.fakes import FakeClient, FakeExecutor, FakeWorker, Fuse, Killed, make_front_space

TOLERANCES = {
    "constraint": 1e-6,  # the optimizer of the acquisition function keeps constraints to 1e-8
    "parameters": 2.0,  # budgets are whole numbers, and so are both ends of the constraint
    "repeat": 1e-6,  # two fits of the same surrogates
}

# Of the constraint, by ratios of allocations whose budget is not quite used up.
MISSED_BY_ROUNDING = 0.02

both = pytest.mark.parametrize("kind", ["weights", "ratios"])


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrbo.study.journal.os.fsync", lambda _: None)


def size(space: FrontSpace) -> int:
    """Return the parameters of all units while they are dense, by their shapes."""
    return sum(unit.out_features * unit.in_features for unit in space.problem.units)


def slack(space: FrontSpace, point: dict[str, float]) -> float:
    """Return by how many parameters a point misses the constraint, which is an equality here."""
    constraint = space.constraint
    if constraint is None:
        return 0.0
    assert constraint.is_equality
    missed = sum(w * point[name] for name, w in constraint.weights.items()) - constraint.bound
    return missed * size(space)


@both
def test_a_point_is_that_of_the_space_inside_at_its_budget(kind: str) -> None:
    space = make_front_space(kind)
    assert isinstance(space, Space)
    assert space.names == (*space.inside.names, KEEP_RATIO)
    assert space.bounds[KEEP_RATIO] == (0.5, 0.8)
    used = set()
    for index in range(12):
        point = sobol_point(space, index, seed=1)
        assert all(low <= point[name] <= high for name, (low, high) in space.bounds.items())
        assert slack(space, point) == pytest.approx(0.0, abs=TOLERANCES["parameters"])
        allocation = space.allocate(point)
        one = space.at(point[KEEP_RATIO])
        assert allocation == one.allocate({name: point[name] for name in space.inside.names})
        assert allocation.cost.parameters <= point[KEEP_RATIO] * size(space)
        used.add(allocation.cost.parameters)
        realised = space.realised(allocation, point)
        # Options are discrete: the surrogate is told what was kept, and that meets the constraint.
        assert slack(space, dict(realised)) == pytest.approx(0.0, abs=TOLERANCES["parameters"])
        assert set(realised) == set(space.names)
    assert len(used) > 8


@both
def test_points_beyond_the_range_are_taken_to_its_ends(kind: str) -> None:
    space = make_front_space(kind)
    point = sobol_point(space, 0, 0)
    assert space.project(point | {KEEP_RATIO: 0.1})[KEEP_RATIO] == 0.5
    assert space.project(point | {KEEP_RATIO: 0.95})[KEEP_RATIO] == 0.8
    assert space.problem.budget == Budget("parameters", math.floor(0.8 * size(space)))


@both
def test_a_search_begins_with_baselines_over_the_whole_range(kind: str) -> None:
    space = make_front_space(kind)
    starts = space.warm_starts(STARTS)
    origins = ["uniform"] * 4 + (["analytic"] * 4 if kind == "weights" else ["start"] * 4)
    assert [start.origin for start in starts] == origins
    ratios = (0.8, 0.7, 0.6, 0.5)
    for start, ratio in zip(starts, ratios * 2, strict=True):
        one = space.at(ratio)
        expected = one.problem.uniform() if start.origin == "uniform" else None
        if start.origin == "analytic":
            expected = one.problem.by_loss()
            assert start.point == {**dict.fromkeys(space.inside.names, 0.0), KEEP_RATIO: ratio}
        assert expected is None or start.allocation == expected
        if start.point:
            assert slack(space, dict(start.point)) == pytest.approx(
                0.0, abs=MISSED_BY_ROUNDING * size(space)
            )
    assert space.problem.uniform() == starts[0].allocation


def test_a_donor_adds_only_what_the_baselines_do_not_have() -> None:
    """It lends the analytic allocations of all ratios but one, and a point of its own there."""
    space = make_front_space("weights")
    starts = space.warm_starts(["analytic"])
    points = [dict(start.point) for start in starts]
    points[1] |= {name: 0.5 * (-1) ** i for i, name in enumerate(space.inside.names)}
    total = size(space)
    ratios = [start.allocation.cost.parameters / total for start in starts]
    trials = [DonorTrial(ratio, point, {}) for ratio, point in zip(ratios, points, strict=True)]
    donor = Donor("study:other", tuple(trials))
    assert space.allocate(points[1]).options != starts[1].allocation.options
    after = space.warm_starts(["analytic", donor, donor])
    assert [start.origin for start in after] == ["analytic"] * 4 + ["transfer"]
    assert after[-1].allocation == space.allocate(points[1])
    before = space.warm_starts([donor, "analytic"])  # the baseline stays, wherever it is named
    assert [start.origin for start in before] == ["transfer"] + ["analytic"] * 4


@both
def test_a_front_that_is_killed_at_any_moment_equals_the_uninterrupted_one(
    tmp_path: Path, kind: str
) -> None:
    options: dict[str, Any] = {"space": make_front_space(kind), "size": "keep_ratio"}
    options |= {"trials": 11, "initial": 9}
    whole = Fuse()
    uninterrupted = Search(tmp_path / "whole", **options)
    uninterrupted.run(whole)
    assert_same_search(uninterrupted, uninterrupted)
    records = uninterrupted.study.state.records
    assert [r.request.origin for r in records[8:]] == ["sobol", "model", "model"]
    for at in range(0, len(whole.moments), 23):
        search = Search(tmp_path / f"killed-{at}", **options)
        with pytest.raises(Killed):
            search.run(Fuse(at))
        search.run()
        assert_same_search(search, uninterrupted)
    observations, reference = (
        uninterrupted.client.observations[10],
        uninterrupted.client.references[10],
    )
    expected = [r for r in records[:10] if r.request.variables]
    assert [(o.loss, o.size) for o in observations] == [
        (r.metrics["objective"], r.metrics["keep_ratio"]) for r in expected
    ]
    assert reference is not None
    assert reference[1] > 0.8
    assert reference[0] > max(r.metrics["objective"] for r in records[4:8])


def test_a_measured_size_is_told_with_its_error(tmp_path: Path) -> None:
    times = {
        index: {"prefill_latency_ratio": 1.0 - index / 20, "prefill_latency_ratio_sem": index / 99}
        for index in range(10)
    }
    search = Search(
        tmp_path,
        trials=10,
        initial=8,
        space=make_front_space(),
        size="prefill_latency_ratio",
        outcomes=times,
    )
    search.run()
    observations, reference = search.client.observations[9], search.client.references[9]
    records = search.study.state.records[:9]
    expected = [r.request.trial_index for r in records if r.request.variables]
    assert len(expected) >= 5
    assert [(o.size, o.size_error) for o in observations] == [
        (1.0 - index / 20, index / 99) for index in expected
    ]
    # A tenth beyond the slowest of the analytic allocations, which are trials 4 to 7.
    assert reference is not None
    assert reference[1] == pytest.approx(0.8 + 0.1 * 0.15)


def test_proposals_stay_in_range_repeat_and_fill_the_front() -> None:
    """One variable decides the loss, and the middle of the front is missing."""
    space = make_front_space("weights", knots=0, exponent=False)
    name, *_ = space.names

    def observe(point: dict[str, float]) -> Observation:
        ratio = point[KEEP_RATIO]
        return Observation(point, 4 * (1 - ratio) + (point[name] - 0.3) ** 2, ratio)

    observations = [observe(sobol_point(space, index, 0)) for index in range(10)]
    client, reference = SearchClient(space, seed=0), (2.5, 0.82)
    point = client.ask(10, observations, reference)
    repeat = client.ask(10, observations, reference)
    assert list(point) == list(space.names)
    assert max(abs(point[n] - repeat[n]) for n in space.names) < TOLERANCES["repeat"]
    before = hypervolume([(o.loss, o.size) for o in observations], reference)
    gains = []
    for index in range(10, 14):
        point = client.ask(index, observations, reference)
        assert all(low <= point[n] <= high for n, (low, high) in space.bounds.items())
        observations.append(observe(point))
        gains.append(hypervolume([(o.loss, o.size) for o in observations], reference) - before)
    assert gains == sorted(gains)
    randomly = observations[:10] + [observe(sobol_point(space, index, 5)) for index in range(4)]
    assert gains[-1] > hypervolume([(o.loss, o.size) for o in randomly], reference) - before


def test_proposals_of_ratios_meet_the_budget_that_they_name() -> None:
    space = make_front_space("ratios")
    observations = []
    for index in range(8):
        point = sobol_point(space, index, 0)
        loss = sum((1 - value) ** 2 for value in point.values())
        observations.append(Observation(point, loss, point[KEEP_RATIO]))
    point = SearchClient(space, seed=0).ask(8, observations, (3.0, 0.82))
    missed = slack(space, point) / size(space)
    assert missed == pytest.approx(0.0, abs=TOLERANCES["constraint"])
    assert 0.5 <= point[KEEP_RATIO] <= 0.8


@both
def test_between_two_points_is_on_their_line_at_the_ratio(kind: str) -> None:
    space = make_front_space(kind)
    points = [dict(start.point) for start in space.warm_starts(STARTS) if start.point]
    points += [sobol_point(space, index, 0) for index in range(4)]
    ratios = sorted(point[KEEP_RATIO] for point in points)
    middle = (ratios[2] + ratios[3]) / 2
    small = next(point for point in points if point[KEEP_RATIO] == ratios[2])
    large = next(point for point in points if point[KEEP_RATIO] == ratios[3])
    point = space.between(small, large, middle)
    assert point[KEEP_RATIO] == middle
    if kind == "weights":  # ratios are moved onto the budget after it
        for name in space.inside.names:
            assert point[name] == pytest.approx((small[name] + large[name]) / 2)
    assert slack(space, dict(point)) == pytest.approx(0.0, abs=TOLERANCES["parameters"])
    assert space.between(small, large, ratios[3] + 0.01) == {}
    assert space.between(small, large, ratios[2] - 0.01) == {}
    assert space.between({}, large, middle) == {}


@both
def test_between_two_baselines_each_unit_keeps_a_mean_of_both(kind: str) -> None:
    """The uniform baseline stands at no point of the space of weights."""
    space = make_front_space(kind)
    large, small = (space.at(ratio).problem.uniform() for ratio in (0.8, 0.6))
    allocation = space.between_allocations(small, large, 0.7)
    total = size(space)
    assert 0.69 < allocation.cost.parameters / total <= 0.7

    def rank(option: Option) -> int:
        return 10**9 if option == DENSE else option.level[0]

    for name, option in allocation.options.items():
        low, high = rank(small.options[name]), rank(large.options[name])
        assert low - 1 <= rank(option) <= high + 1


def one_more(study: Study, space: FrontSpace, trials: int, point: dict[str, float]) -> TrialRecord:
    """Evaluate a point of one's own, in a loop that would give out ``trials`` numbers."""
    return SearchLoop(
        study=study,
        client=FakeClient(space, seed=3),
        worker=FakeWorker(space),
        executor=FakeExecutor(1, (2,), Fuse()),
        tracker=NullTracker(),
        settings=SearchSettings(trials=trials, initial=trials),
        poll_s=0.0,
    ).evaluate("between", point, space.allocate(point))


def test_a_point_of_one_s_own_becomes_a_trial_like_all_others(tmp_path: Path) -> None:
    space = make_front_space()
    search = Search(tmp_path, trials=9, initial=9, space=space, size="keep_ratio")
    search.run()
    points = [record.request.variables for record in search.study.state.records]
    large, small = (point for point in points if point and point[KEEP_RATIO] in (0.7, 0.6))
    point = dict(space.between(small, large, 0.65))
    assert point
    study = search.study
    with study.locked():
        record = one_more(study, space, 9, point)
    assert record.is_completed
    assert record.request.origin == "between"
    assert record.request.allocation == space.allocate(point)
    second_search = Search(tmp_path, trials=10, initial=9, space=space, size="keep_ratio")
    second_search.run()  # the tenth trial is there already
    assert second_search.study.state.trials[9] == record
    assert len(second_search.study.state.trials) == 10


def test_a_point_of_one_s_own_takes_no_number_that_the_search_gives(tmp_path: Path) -> None:
    """What a search begins with is told by its number."""
    space = make_front_space(highest=0.76666)
    search = Search(tmp_path, trials=6, initial=6, space=space, size="keep_ratio")
    search.run()
    study = search.study
    with study.locked():
        record = one_more(study, space, 6, sobol_point(space, 0, 0))
    assert record.request.trial_index == 8
    second_search = Search(tmp_path, trials=9, initial=8, space=space, size="keep_ratio")
    second_search.run()
    records = second_search.study.state.records
    origins = [record.request.origin for record in records]
    assert origins == ["uniform"] * 4 + ["analytic"] * 4 + ["between"]
    # Neither is the ceiling rounded up.
    assert records[0].request.allocation.cost.parameters <= space.problem.budget.limit
    assert records[4].request.variables["keep_ratio"] == 0.76666
