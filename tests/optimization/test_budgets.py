"""A range of budgets: each point is one of the space inside, under the budget that it names."""

from pathlib import Path
from typing import Any

import pytest

from lrbo.accounting import dense_parameters
from lrbo.allocation import Budget
from lrbo.optimization.base import STARTS, Space
from lrbo.optimization.client import Observation, SearchClient
from lrbo.optimization.front import hypervolume
from lrbo.optimization.front_space import KEEP_RATIO, FrontSpace
from lrbo.optimization.loop import SearchLoop, SearchSettings
from lrbo.optimization.study import Study
from lrbo.tracking import NullTracker
from lrbo.transfer import Donor, DonorTrial
from lrbo.trial import TrialRecord
from tests.fakes import FakeClient, FakeExecutor, FakeWorker, Fuse, Killed, make_front_space
from tests.test_loop import Search, assert_same_search

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
    monkeypatch.setattr("lrbo.optimization.study.os.fsync", lambda _: None)


def inside(space: FrontSpace, ratio: float) -> Space:
    return space.inside.at(Budget.from_keep_ratio(space.layers, ratio))


def slack(space: FrontSpace, point: dict[str, float]) -> float:
    """Return by how many parameters a point misses the constraint, which is an equality here."""
    constraint = space.constraint
    if constraint is None:
        return 0.0
    assert constraint.is_equality
    missed = sum(w * point[name] for name, w in constraint.weights.items()) - constraint.bound
    return missed * dense_parameters(space.layers)


@both
def test_a_point_is_that_of_the_space_inside_at_its_budget(kind: str) -> None:
    space = make_front_space(kind)
    assert isinstance(space, Space)
    assert space.names == (*space.inside.names, KEEP_RATIO)
    assert space.bounds[KEEP_RATIO] == (0.5, 0.8)
    used = set()
    for index in range(12):
        point = space.sobol_point(index, seed=1)
        assert all(low <= point[name] <= high for name, (low, high) in space.bounds.items())
        assert slack(space, point) == pytest.approx(0.0, abs=TOLERANCES["parameters"])
        found = space.allocate(point)
        one = inside(space, point[KEEP_RATIO])
        assert found == one.allocate({name: point[name] for name in space.inside.names})
        assert found.parameters <= point[KEEP_RATIO] * dense_parameters(space.layers)
        used.add(found.parameters)
        told = space.realised(found, point)
        assert told is not None
        # Ranks are integers: the surrogate is told what was kept, and that meets the constraint.
        assert slack(space, dict(told)) == pytest.approx(0.0, abs=TOLERANCES["parameters"])
        assert set(told) == set(space.names)
    assert len(used) > 8


@both
def test_points_beyond_the_range_are_taken_to_its_ends(kind: str) -> None:
    space = make_front_space(kind)
    values = list(space.sobol_point(0, 0).values())
    assert space.project([*values[:-1], 0.1])[-1] == 0.5
    assert space.project([*values[:-1], 0.95])[-1] == 0.8
    assert space.budget == Budget.from_keep_ratio(space.layers, 0.8)


@both
def test_a_search_begins_with_baselines_over_the_whole_range(kind: str) -> None:
    space = make_front_space(kind)
    starts = space.warm_starts(STARTS)
    origins = ["uniform"] * 4 + (["analytic"] * 4 if kind == "weights" else ["start"] * 4)
    assert [start.origin for start in starts] == origins
    ratios = (0.8, 0.7, 0.6, 0.5)
    for start, ratio in zip(starts, ratios * 2, strict=True):
        one = inside(space, ratio)
        expected = one.uniform() if start.origin == "uniform" else None
        if start.origin == "analytic":
            expected = one.analytic()[0]  # type: ignore[index]
            assert start.point == {**dict.fromkeys(space.inside.names, 0.0), KEEP_RATIO: ratio}
        assert expected is None or start.allocation == expected
        if start.point:
            assert slack(space, dict(start.point)) == pytest.approx(
                0.0, abs=MISSED_BY_ROUNDING * dense_parameters(space.layers)
            )
    assert space.uniform() == starts[0].allocation


def test_a_donor_adds_only_what_the_baselines_do_not_have() -> None:
    """It lends the analytic allocations of all ratios but one, and a point of its own there."""
    space = make_front_space("weights")
    starts = space.warm_starts(["analytic"])
    lent = [dict(start.point) for start in starts]
    lent[1] |= {name: 0.5 * (-1) ** i for i, name in enumerate(space.inside.names)}
    total = dense_parameters(space.layers)
    kept = [start.allocation.parameters / total for start in starts]
    trials = [DonorTrial(ratio, point, {}) for ratio, point in zip(kept, lent, strict=True)]
    donor = Donor("study:other", tuple(trials))
    assert space.allocate(lent[1]).ranks != starts[1].allocation.ranks
    found = space.warm_starts(["analytic", donor, donor])
    assert [start.origin for start in found] == ["analytic"] * 4 + ["transfer"]
    assert found[-1].allocation == space.allocate(lent[1])
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
    told, reference = uninterrupted.client.asked[10], uninterrupted.client.references[10]
    known = [r for r in records[:10] if r.request.variables]
    assert [(o.loss, o.size) for o in told] == [
        (r.metrics["objective"], r.metrics["keep_ratio"]) for r in known
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
    told, reference = search.client.asked[9], search.client.references[9]
    records = search.study.state.records[:9]
    known = [r.request.trial_index for r in records if r.request.variables]
    assert len(known) >= 5
    assert [(o.size, o.size_error) for o in told] == [
        (1.0 - index / 20, index / 99) for index in known
    ]
    # A tenth beyond the slowest of the analytic allocations, which are trials 4 to 7.
    assert reference is not None
    assert reference[1] == pytest.approx(0.8 + 0.1 * 0.15)


def test_proposals_stay_in_range_repeat_and_fill_the_front() -> None:
    """One variable decides the loss, and the middle of the front is missing."""
    space = make_front_space("weights", knots=0, exponent=False)
    name, *_ = space.names

    def observe(point: dict[str, float]) -> Observation:
        kept = point[KEEP_RATIO]
        return Observation(point, 4 * (1 - kept) + (point[name] - 0.3) ** 2, kept)

    seen = [observe(space.sobol_point(index, 0)) for index in range(10)]
    client, reference = SearchClient(space, seed=0), (2.5, 0.82)
    point = client.ask(10, seen, reference)
    again = client.ask(10, seen, reference)
    assert list(point) == list(space.names)
    assert max(abs(point[n] - again[n]) for n in space.names) < TOLERANCES["repeat"]
    before = hypervolume([(o.loss, o.size) for o in seen], reference)
    gains = []
    for index in range(10, 14):
        point = client.ask(index, seen, reference)
        assert all(low <= point[n] <= high for n, (low, high) in space.bounds.items())
        seen.append(observe(point))
        gains.append(hypervolume([(o.loss, o.size) for o in seen], reference) - before)
    assert gains == sorted(gains)
    randomly = seen[:10] + [observe(space.sobol_point(index, 5)) for index in range(4)]
    assert gains[-1] > hypervolume([(o.loss, o.size) for o in randomly], reference) - before


def test_proposals_of_ratios_meet_the_budget_that_they_name() -> None:
    space = make_front_space("ratios")
    seen = []
    for index in range(8):
        point = space.sobol_point(index, 0)
        loss = sum((1 - value) ** 2 for value in point.values())
        seen.append(Observation(point, loss, point[KEEP_RATIO]))
    point = SearchClient(space, seed=0).ask(8, seen, (3.0, 0.82))
    missed = slack(space, point) / dense_parameters(space.layers)
    assert missed == pytest.approx(0.0, abs=TOLERANCES["constraint"])
    assert 0.5 <= point[KEEP_RATIO] <= 0.8


@both
def test_between_two_points_is_on_their_line_at_the_ratio(kind: str) -> None:
    space = make_front_space(kind)
    points = [dict(start.point) for start in space.warm_starts(STARTS) if start.point]
    points += [space.sobol_point(index, 0) for index in range(4)]
    ratios = sorted(point[KEEP_RATIO] for point in points)
    middle = (ratios[2] + ratios[3]) / 2
    small = next(point for point in points if point[KEEP_RATIO] == ratios[2])
    large = next(point for point in points if point[KEEP_RATIO] == ratios[3])
    found = space.between(points, middle)
    assert found is not None
    assert found[KEEP_RATIO] == middle
    if kind == "weights":  # ratios are moved onto the budget after it
        for name in space.inside.names:
            assert found[name] == pytest.approx((small[name] + large[name]) / 2)
    assert slack(space, found) == pytest.approx(0.0, abs=TOLERANCES["parameters"])
    assert space.between(points, ratios[-1] + 0.01) is None
    assert space.between(points, ratios[0] - 0.01) is None


@both
def test_between_two_baselines_each_layer_keeps_a_mean_of_both(kind: str) -> None:
    """The uniform baseline stands at no point of the space of weights."""
    space = make_front_space(kind)
    large, small = (space._at(ratio).uniform() for ratio in (0.8, 0.6))
    found = space.between_allocations(small, large, 0.7)
    total = dense_parameters(space.layers)
    assert 0.69 < found.parameters / total <= 0.7
    for name, rank in found.ranks.items():
        ends = [small.ranks[name] or 10**9, large.ranks[name] or 10**9]
        assert ends[0] - 1 <= (rank or 10**9) <= ends[1] + 1


def one_more(study: Study, space: FrontSpace, trials: int, point: dict[str, float]) -> TrialRecord:
    """Evaluate a point of one's own, in a loop that would give out ``trials`` numbers."""
    return SearchLoop(
        study=study,
        client=FakeClient(space, seed=3),
        worker=FakeWorker(space),
        executor=FakeExecutor(1, (2,), Fuse()),
        tracker=NullTracker(),
        settings=SearchSettings(trials, trials, 0.0, 3, "keep_ratio"),
        poll_s=0.0,
    ).evaluate("between", point)


def test_a_point_of_one_s_own_becomes_a_trial_like_all_others(tmp_path: Path) -> None:
    space = make_front_space()
    search = Search(tmp_path, trials=9, initial=9, space=space, size="keep_ratio")
    search.run()
    starts = [record.request.variables for record in search.study.state.records]
    point = space.between([variables for variables in starts if variables], 0.65)
    assert point is not None
    study = search.study
    with study.locked():
        record = one_more(study, space, 9, point)
    assert record.is_completed
    assert record.request.origin == "between"
    assert record.request.allocation == space.allocate(point)
    again = Search(tmp_path, trials=10, initial=9, space=space, size="keep_ratio")
    again.run()  # the tenth trial is there already
    assert again.study.state.trials[9] == record
    assert len(again.study.state.trials) == 10


def test_a_point_of_one_s_own_takes_no_number_that_the_search_gives(tmp_path: Path) -> None:
    """What a search begins with is told by its number."""
    space = make_front_space(highest=0.76666)
    search = Search(tmp_path, trials=6, initial=6, space=space, size="keep_ratio")
    search.run()
    study = search.study
    with study.locked():
        record = one_more(study, space, 6, space.sobol_point(0, 0))
    assert record.request.trial_index == 8
    again = Search(tmp_path, trials=9, initial=8, space=space, size="keep_ratio")
    again.run()
    records = again.study.state.records
    origins = [record.request.origin for record in records]
    assert origins == ["uniform"] * 4 + ["analytic"] * 4 + ["between"]
    # Neither is the ceiling rounded up.
    assert records[0].request.allocation.parameters <= space.budget.parameters
    assert records[4].request.variables["keep_ratio"] == 0.76666
