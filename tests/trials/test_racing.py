"""A trial is given up only where it is worse, and what is said of its loss then holds."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lrbo.optimization.proposals import Observation, SearchClient
from lrbo.optimization.space import sobol_point
from lrbo.tasks.perplexity import measure_dense
from lrbo.trials.racing import MIN_WINDOWS, Race, paired_difference, spread_order
from lrbo.trials.records import TrialRequest, TrialResult
from lrbo.trials.worker import Worker
from tests.optimization.test_loop import Search, assert_same_search
from tests.support.fakes import Fuse, Killed, make_space, make_weight_space
from tests.support.tiny import token_ids
from tests.trials.test_worker import make_worker, numbers, request_for

TOLERANCES = {
    "sum": 1e-12,  # sums of a dozen float64 numbers in another order
    "mean": 1e-9,  # of losses that were summed token by token
    "share": 0.015,  # of 4,000 draws: three standard errors of a share of 0.05 to 0.1
    "variance": 0.08,  # relative, of 4,000 draws: three standard errors
}
MANY = token_ids(11, 7)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrbo.study.journal.os.fsync", lambda _: None)


def test_the_difference_and_its_error_are_those_of_a_sample_without_replacement() -> None:
    """Over all samples of some windows, the error is the spread of the mean, on average."""
    generator = np.random.default_rng(0)
    rival = generator.normal(3.0, 1.0, 16)
    mine = rival + generator.normal(0.05, 0.1, 16)
    whole = float((mine - rival).mean())
    estimates = []
    for _ in range(4000):
        sample = generator.permutation(16)[:6]
        estimates.append(paired_difference(list(mine[sample]), list(rival[sample]), 16))
    means, errors = np.array(estimates).T
    assert means.mean() == pytest.approx(whole, abs=4 * means.std() / 4000**0.5)
    assert (errors**2).mean() == pytest.approx(means.var(), rel=TOLERANCES["variance"])
    all_of_them = paired_difference(list(mine), list(rival), 16)
    assert all_of_them == pytest.approx((whole, 0.0), abs=TOLERANCES["sum"])
    assert paired_difference([1.0], [0.0], 16)[1] == math.inf


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_one_look_gives_an_equal_up_as_often_as_it_says(confidence: float) -> None:
    generator = np.random.default_rng(1)
    race = Race(confidence)
    lost = 0
    for _ in range(4000):
        differences = list(generator.normal(0.0, 0.3, 5))
        lost += race.is_lost(differences, [0.0] * 5, windows=10**9, looks=1)
    assert lost / 4000 == pytest.approx(1 - confidence, abs=TOLERANCES["share"])
    quantile = stats.t(4).ppf(confidence)  # by its definition, from another module
    even = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    error = even.std(ddof=1) / 5**0.5
    for share in (0.99, 1.01):
        mine = list(even - even.mean() + share * quantile * error)
        assert race.is_lost(mine, [0.0] * 5, 10**9, 1) is (share > 1)


def test_an_equal_is_given_up_no_more_often_than_it_says_however_often_it_is_looked_at() -> None:
    """Over all windows the trial is no worse; looking after each batch must not find it so."""
    generator = np.random.default_rng(2)
    race, windows, batch, lost = Race(0.9), 64, 4, 0
    for _ in range(1500):
        differences = generator.normal(0.0, 0.3, windows)
        differences -= differences.mean()
        looked = range(batch, windows, batch)
        lost += any(
            race.is_lost(list(differences[:count]), [0.0] * count, windows, len(looked))
            for count in looked
        )
    assert 0 < lost / 1500 <= 0.1


def test_nothing_is_said_of_too_few_windows_nor_after_the_last() -> None:
    race = Race(0.9)
    worse, rival = [9.0 + 0.01 * i for i in range(8)], [1.0] * 8
    for count in range(1, 9):
        assert race.is_lost(worse[:count], rival[:count], 8, looks=7) is (MIN_WINDOWS <= count < 8)


@pytest.mark.parametrize("count", [1, 2, 7, 32, 100])
def test_every_beginning_of_the_order_is_spread_over_the_whole(count: int) -> None:
    order = spread_order(count)
    assert sorted(order) == list(range(count))
    for first in range(2, count):
        positions = [0, *sorted(order[:first]), count]
        widest = max(b - a for a, b in pairwise(positions))
        assert widest <= 3 * count / first + 1


# --- the worker --------------------------------------------------------------------------------


def racing_worker(confidence: float | None, kl_weight: float = 0.0) -> Worker:
    worker = make_worker(batch_windows=2)
    worker.windows = MANY
    worker.dense = measure_dense(worker.model, MANY, top=16)
    worker.race = None if confidence is None else Race(confidence, kl_weight)
    return worker


def against(request: TrialRequest, losses: Any) -> TrialRequest:
    fields = {**vars(request), "rival": 0, "rival_losses": tuple(losses)}
    return TrialRequest(**fields)


def test_a_race_that_is_not_lost_changes_no_number() -> None:
    plain = racing_worker(None)
    without = plain(request_for(plain))
    worker = racing_worker(0.999)
    request = request_for(worker)
    alone = worker(request)
    beside = worker(against(request, [9.0] * len(MANY)))
    assert alone.outcome == beside.outcome == "completed"
    assert numbers(alone) == numbers(beside) == numbers(without)
    assert len(without.example_losses) == len(MANY)
    assert alone.example_losses == beside.example_losses
    for metric, means in (
        ("nll", without.example_losses),
        ("nll", alone.example_losses),
        ("kl_dense_to_compressed", without.example_divergences),
    ):
        assert np.mean(means) == pytest.approx(alone.metrics[metric], abs=TOLERANCES["mean"])


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_a_lost_race_ends_early_with_an_estimate(kl_weight: float) -> None:
    worker = racing_worker(0.9, kl_weight)
    request = request_for(worker)
    whole = worker(request)
    losses = np.array(whole.example_losses) + kl_weight * np.array(whole.example_divergences)
    mean = whole.metrics["nll"] + kl_weight * whole.metrics["kl_dense_to_compressed"]
    assert losses.mean() == pytest.approx(mean, abs=TOLERANCES["mean"])
    rival = losses - 0.5 - (0.01 * np.arange(len(losses))) % 0.03
    before = torch.cat([p.flatten() for p in worker.model.parameters()])
    result: TrialResult = worker(against(request, rival))
    assert torch.equal(before, torch.cat([p.flatten() for p in worker.model.parameters()]))
    assert result.outcome == "stopped"
    assert result.example_losses == result.example_divergences == ()
    windows: list[int] = []
    for batch in spread_order(6):  # of two windows; the last one has one
        if len(windows) < MIN_WINDOWS:
            windows += range(2 * batch, min(2 * batch + 2, len(MANY)))
    assert result.metrics["tokens"] == len(windows) * (MANY.shape[1] - 1)
    gap, error = paired_difference(list(losses[windows]), list(rival[windows]), len(MANY))
    estimate = float(rival.mean() + gap)
    assert result.metrics["objective"] == pytest.approx(estimate, abs=TOLERANCES["mean"])
    assert result.metrics["objective_sem"] == pytest.approx(error, abs=TOLERANCES["mean"])
    # Never as if it had been scored whole.
    assert not {"nll", "perplexity", "kl_dense_to_compressed"} & set(result.metrics)
    assert result.metrics["keep_ratio"] == whole.metrics["keep_ratio"]


# --- the search --------------------------------------------------------------------------------


def test_a_race_that_is_killed_at_any_moment_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"trials": 9, "initial": 4, "race": Race(0.95)}
    options["space"] = make_weight_space()
    whole = Fuse()
    uninterrupted = Search(tmp_path / "whole", **options)
    uninterrupted.run(whole)
    assert_same_search(uninterrupted, uninterrupted)
    state = uninterrupted.study.state
    assert state.stopped
    assert len(state.stopped) + len(state.completed) == 9
    for at in range(0, len(whole.moments), 17):
        search = Search(tmp_path / f"killed-{at}", **options)
        with pytest.raises(Killed):
            search.run(Fuse(at))
        search.run()
        assert_same_search(search, uninterrupted)


def test_the_best_is_scored_whole_and_the_same_as_without_a_race(tmp_path: Path) -> None:
    options: dict[str, Any] = {"trials": 12, "initial": 12, "space": make_space()}
    plain = Search(tmp_path / "plain", **options)
    plain.run()
    racing = Search(tmp_path / "race", **options, race=Race(0.99))
    racing.run()
    state = racing.study.state
    best, expected = state.best(), plain.study.state.best()
    assert best is not None
    assert expected is not None
    assert best.request.trial_index == expected.request.trial_index
    assert best.metrics["nll"] == pytest.approx(expected.metrics["nll"], abs=TOLERANCES["sum"])
    assert state.stopped
    for record in state.records:
        rival = record.request.rival
        assert (rival is None) == (record.request.origin in ("uniform", "start"))
        if record.is_stopped:
            assert record.metrics["objective"] > state.trials[rival].metrics["objective"]
    # What the rival lost window by window is in its own trial, not in every other.
    events = [json.loads(line) for line in racing.study.journal.read_text().splitlines()]
    assert not any("rival_losses" in event for event in events)


def test_the_surrogate_is_told_an_estimate_with_its_error(tmp_path: Path) -> None:
    search = Search(tmp_path, trials=8, initial=7, space=make_weight_space(), race=Race(0.95))
    search.run()
    observations = {tuple(o.point.values()): o for o in search.client.observations[7]}
    stopped = [r for r in search.study.state.stopped if r.request.trial_index < 7]
    assert stopped
    for record in stopped:
        observation = observations[tuple(record.request.variables.values())]
        assert observation.loss == record.metrics["objective"]
        assert observation.error == record.metrics["objective_sem"]


def test_a_rough_estimate_moves_the_proposal_less_than_a_sure_one() -> None:
    space = make_weight_space(knots=0, exponent=False)
    points = [sobol_point(space, index, 0) for index in range(8)]
    observations = [
        Observation(point, sum(value**2 for value in point.values())) for point in points
    ]
    client = SearchClient(space, seed=0)
    before = client.ask(8, observations)
    low = min(o.loss for o in observations if o.loss is not None) - 0.5

    def moved(error: float) -> float:
        after = client.ask(8, [Observation(points[0], low, error=error), *observations[1:]])
        return max(abs(after[name] - before[name]) for name in space.names)

    assert moved(0.0) > moved(50.0)
