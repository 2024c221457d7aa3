"""A search that dies anywhere and is continued equals one that did not, trial by trial."""

import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lrbo.errors import StudyError
from lrbo.optimization.loop import SearchLoop, SearchSettings
from lrbo.optimization.proposals import SearchClient
from lrbo.optimization.space import Space, sobol_point
from lrbo.study.journal import Study
from lrbo.tracking.tracker import NullTracker
from lrbo.trials.racing import Race
from lrbo.trials.records import TrialRecord
from tests.support.fakes import (
    DyingStudy,
    FakeClient,
    FakeExecutor,
    FakeTracker,
    FakeWorker,
    Fuse,
    Killed,
    make_about,
    make_layers,
    make_space,
    make_weight_space,
)

TOLERANCES = {
    "point": 1e-6,  # two fits of the same surrogate; 4e-10 was measured
    "objective": 1e-12,  # a sum of two float64 numbers of order 1
}
SEED = 3


@dataclass
class Search:
    """Everything of one search that outlives a process: the folder and the tracker's store."""

    folder: Path
    trials: int = 6
    initial: int = 4
    capacity: int = 1
    delays: tuple[int, ...] = (0,)
    kl_weight: float = 0.0
    real: bool = False
    space: Space = field(default_factory=make_space)
    size: str | None = None
    race: Race | None = None
    outcomes: dict[int, Any] = field(default_factory=dict)
    store: dict[int, list[TrialRecord]] = field(default_factory=dict)
    tracker: Any = None
    reported: list[int] = field(default_factory=list)

    def run(self, fuse: Fuse | None = None) -> None:
        """Do what one process does: new objects, the lock, what MLflow missed, the loop."""
        fuse = fuse or Fuse()
        study = DyingStudy(self.folder, fuse)
        client = SearchClient if self.real else lambda s, seed: FakeClient(s, seed=seed, fuse=fuse)
        self.client = client(self.space, seed=SEED)
        self.worker = FakeWorker(self.space, fuse, self.outcomes, self.race)
        self.executor = FakeExecutor(self.capacity, self.delays, fuse)
        tracker = self.tracker or FakeTracker(self.store, fuse)

        def reported(record: TrialRecord) -> None:
            fuse.burn("when reported")
            self.reported.append(record.request.trial_index)

        with study.locked():
            if not study.exists:
                study.begin(make_about(self.space.problem.units, self.space), "")
            tracker.sync(study.state.records)
            SearchLoop(
                study=study,
                client=self.client,
                worker=self.worker,
                executor=self.executor,
                tracker=tracker,
                settings=SearchSettings(
                    trials=self.trials,
                    initial=self.initial,
                    kl_weight=self.kl_weight,
                    size=self.size,
                    races=self.race is not None,
                ),
                on_trial=reported,
                poll_s=0.0,
            ).run()

    @property
    def study(self) -> Study:
        return Study(self.folder)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.study.journal.read_text().splitlines()]

    def count(self, event: str) -> Counter[int]:
        return Counter(each["trial"] for each in self.events if each["event"] == event)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrbo.study.journal.os.fsync", lambda _: None)


def assert_same_search(actual: Search, expected: Search) -> None:
    """Compare what a search is: requests and results of all trials, each ended and shown once."""
    ours, theirs = actual.study.state, expected.study.state
    assert list(ours.trials) == list(theirs.trials) == list(range(expected.trials))
    for index, record in theirs.trials.items():
        assert ours.trials[index].request == record.request
        assert ours.trials[index].metrics == record.metrics
        assert ours.trials[index].is_completed == record.is_completed
    once = dict.fromkeys(range(expected.trials), 1)
    assert actual.count("suggested") == actual.count("ended") == once
    assert {index: len(shown) for index, shown in actual.store.items()} == once
    for index, (shown,) in actual.store.items():
        assert shown.request == theirs.trials[index].request
        assert shown.metrics == theirs.trials[index].metrics


@pytest.mark.parametrize(
    ("space", "capacity", "delays", "step"),
    [
        (make_space(), 1, (0,), 1),
        (make_space(), 3, (4, 0, 2, 1, 3), 2),
        (make_weight_space(), 1, (0,), 2),
    ],
    ids=["ratios", "several at once", "weights"],
)
def test_killed_at_any_moment_and_continued_equals_uninterrupted(
    tmp_path: Path, space: Any, capacity: int, delays: tuple[int, ...], step: int
) -> None:
    # One of each: baseline, start or analytic, Sobol, surrogate, one more; one has no value.
    options: dict[str, Any] = {"trials": 5, "initial": 3, "outcomes": {3: "failed"}}
    options |= {"capacity": capacity, "delays": delays, "space": space}
    uninterrupted = Search(tmp_path / "whole", **options)
    whole = Fuse()
    uninterrupted.run(whole)
    assert_same_search(uninterrupted, uninterrupted)
    for moment in (
        *("before ask", "after ask", "before submit", "in the worker", "after submit"),
        *("before result", "tracker before storing", "tracker after storing", "when reported"),
        *(f"{when} {event}" for when in ("before", "inside", "after") for event in JOURNALED),
    ):
        assert moment in whole.moments
    for at in range(0, len(whole.moments), step):
        search = Search(tmp_path / f"killed-{at}", **options)
        with pytest.raises(Killed, match=f"^{whole.moments[at]}$"):
            search.run(Fuse(at))
        search.run()
        assert_same_search(search, uninterrupted)


JOURNALED = ("suggested", "started", "ended", "logged")


def test_killed_again_and_again_equals_uninterrupted(tmp_path: Path) -> None:
    """Every process dies a few moments after its start; some make no progress at all."""
    uninterrupted = Search(tmp_path / "whole", trials=8)
    uninterrupted.run()
    search = Search(tmp_path / "killed", trials=8)
    deaths = 0
    for attempt in range(200):
        try:
            search.run(Fuse(5 + 7 * attempt % 31))
            break
        except Killed:
            deaths += 1
    assert deaths > 5
    assert_same_search(search, uninterrupted)
    assert max(search.count("started").values()) > 1


def test_origins_come_in_order(tmp_path: Path) -> None:
    search = Search(tmp_path, trials=6, initial=4)
    search.run()
    records = search.study.state.records
    origins = [record.request.origin for record in records]
    assert origins == ["uniform", "start", "sobol", "sobol", "model", "model"]
    space = search.space
    assert records[0].request.allocation == space.problem.uniform()
    assert records[1].request.allocation == space.allocate(space.start_point())
    assert records[2].request.allocation == space.allocate(sobol_point(space, 1, SEED))
    assert records[0].request.variables == {}
    for record in records[1:]:
        assert record.request.variables == space.realised(record.request.allocation, {})
    assert len({record.request.seed for record in records}) == len(records)


def test_without_start_ratios_trial_1_is_a_sobol_point(tmp_path: Path) -> None:
    search = Search(tmp_path, trials=3, space=make_space(start={}))
    search.run()
    origins = [record.request.origin for record in search.study.state.records]
    assert origins == ["uniform", "sobol", "sobol"]
    first = search.study.state.trials[1].request.allocation
    assert first == search.space.allocate(sobol_point(search.space, 0, SEED))


def test_several_trials_run_at_once_and_end_in_any_order(tmp_path: Path) -> None:
    search = Search(tmp_path, trials=9, capacity=3, delays=(5, 0, 2, 1))
    search.run()
    assert search.executor.peak == 3
    ends = [event["trial"] for event in search.events if event["event"] == "ended"]
    assert sorted(ends) == list(range(9))
    assert ends != sorted(ends)
    assert search.reported == ends
    assert search.count("started") == dict.fromkeys(range(9), 1)
    # A proposal knows the values of all that ended before it, and all that run as open.
    for index, observations in search.client.observations.items():
        events = search.events
        now = next(
            i for i, e in enumerate(events) if e["event"] == "suggested" and e["trial"] == index
        )
        ended = {e["trial"] for e in events[:now] if e["event"] == "ended"}
        state = search.study.state
        expected = Counter(
            (
                tuple(state.trials[i].request.variables.values()),
                state.trials[i].metrics["nll"] if i in ended else None,
            )
            for i in range(1, index)  # the baseline stands for no point of this space
        )
        assert Counter((tuple(o.point.values()), o.loss) for o in observations) == expected
        assert sum(o.loss is None for o in observations) <= 2
    assert any(o.loss is None for batch in search.client.observations.values() for o in batch)


@pytest.mark.parametrize(
    ("planned", "outcome", "reason"),
    [
        ("failed", "failed", "planned to be failed"),
        ("abandoned", "abandoned", "planned to be abandoned"),
        ({"nll": math.nan}, "abandoned", "not finite: nll, objective"),
        ({"nll": math.inf}, "abandoned", "not finite: nll, objective"),
        ({"perplexity": math.nan}, "abandoned", "not finite: perplexity"),
    ],
)
def test_a_trial_without_a_value_is_noted_with_its_reason_and_told_to_nobody(
    tmp_path: Path, planned: Any, outcome: str, reason: str
) -> None:
    search = Search(tmp_path, outcomes={2: planned, 4: planned})
    search.run()
    for index in (2, 4):
        record = search.study.state.trials[index]
        assert record.result is not None
        assert (record.result.outcome, record.result.error) == (outcome, reason)
        assert record.metrics == {}
        assert search.store[index][0].result == record.result
        silent = tuple(record.request.variables.values())
        for number, observations in search.client.observations.items():
            if number > index:
                assert silent not in {tuple(o.point.values()) for o in observations}
    assert len(search.client.observations[5]) == 2  # trials 1 and 3
    assert all(o.loss is not None for o in search.client.observations[5])


def test_without_any_value_the_surrogate_is_not_asked(tmp_path: Path) -> None:
    search = Search(tmp_path, trials=5, initial=2, outcomes={1: "failed", 2: "failed", 3: "failed"})
    search.run()
    # Trial 0 has a value, but the baseline stands for no point of this space.
    origins = [record.request.origin for record in search.study.state.records]
    assert origins == ["uniform", "start", "sobol", "sobol", "sobol"]


def test_five_in_a_row_without_a_value_stop_the_search(tmp_path: Path) -> None:
    search = Search(tmp_path, trials=12, outcomes=dict.fromkeys(range(2, 12), "failed"))
    with pytest.raises(StudyError, match=r"last 5 trials .* planned to be failed"):
        search.run()
    assert list(search.study.state.trials) == list(range(7))
    assert sorted(search.store) == list(range(7))
    search.outcomes = {}  # the cause is mended
    search.run()
    state = search.study.state
    assert len(state.ended) == 12
    assert [r.request.trial_index for r in state.completed] == [0, 1, *range(7, 12)]


def test_four_in_a_row_do_not_stop_it(tmp_path: Path) -> None:
    bad = dict.fromkeys([2, 3, 4, 5, 7, 8, 9, 10], "abandoned")
    search = Search(tmp_path, trials=12, outcomes=bad)
    search.run()
    assert [r.request.trial_index for r in search.study.state.completed] == [0, 1, 6, 11]


def test_the_objective_weighs_the_divergence(tmp_path: Path) -> None:
    search = Search(tmp_path, kl_weight=0.5)
    search.run()
    for record in search.study.state.records:
        m = record.metrics
        expected = m["nll"] + 0.5 * m["kl_dense_to_compressed"]
        assert m["objective"] == pytest.approx(expected, abs=TOLERANCES["objective"])
    losses = {o.loss for o in search.client.observations[5]}
    assert losses == {r.metrics["objective"] for r in search.study.state.records[1:5]}


def test_a_point_whose_options_were_tried_is_moved(tmp_path: Path) -> None:
    """Coarse ranks: many points round to the same few allocations."""
    layers = make_layers(1, {"q_proj": (24, 24), "o_proj": (24, 24)})
    space = make_space(0.6, layers, groups={"q": ["q_proj"], "o": ["o_proj"]}, start={}, dense=[])
    plain = [
        space.problem.uniform(),
        *(space.allocate(sobol_point(space, i, SEED)) for i in range(7)),
    ]
    assert len({tuple(allocation.options.values()) for allocation in plain}) < 8  # some to move
    search = Search(tmp_path, trials=8, initial=8, space=space)
    search.run()
    options = [tuple(r.request.allocation.options.values()) for r in search.study.state.records]
    assert len(set(options)) == 8  # of the 10 that budget and bounds allow
    for record in search.study.state.records:
        assert record.request.allocation.cost.parameters <= space.problem.budget.limit


def test_a_space_with_one_allocation_repeats_it_and_ends(tmp_path: Path) -> None:
    layers = make_layers(1, {"q_proj": (24, 24)})
    space = make_space(0.6, layers, groups={"q": ["q_proj"]}, start={}, dense=[])
    search = Search(tmp_path, trials=4, space=space)
    search.run()
    assert len(search.study.state.completed) == 4
    options = {tuple(r.request.allocation.options.values()) for r in search.study.state.records}
    assert len(options) == 1


def test_more_trials_later_continue_as_if_asked_for_at_once(tmp_path: Path) -> None:
    at_once = Search(tmp_path / "at once", trials=8)
    at_once.run()
    later = Search(tmp_path / "later", trials=5)
    later.run()
    assert later.worker.calls == [0, 1, 2, 3, 4]
    later.trials = 8
    later.run()
    assert later.worker.calls == [5, 6, 7]
    assert_same_search(later, at_once)


def test_a_finished_search_does_nothing_more(tmp_path: Path) -> None:
    search = Search(tmp_path)
    search.run()
    content = search.study.journal.read_bytes()
    search.run()
    search.trials = 2
    search.run()
    assert search.worker.calls == []
    assert search.study.journal.read_bytes() == content


def test_a_number_that_was_removed_from_the_journal_is_filled_again(tmp_path: Path) -> None:
    """What the message about a damaged line advises: remove it, and its trial is run again."""
    search = Search(tmp_path)
    search.run()
    before = search.study.state.trials
    others = [event for event in search.events if event["trial"] != 2]
    search.study.journal.write_text("".join(json.dumps(event) + "\n" for event in others))
    search.run()
    after = search.study.state.trials
    assert search.worker.calls == [2]
    assert sorted(after) == sorted(before)
    assert all(after[index] == before[index] for index in before if index != 2)


def test_a_slow_tracker_delays_and_loses_nothing(tmp_path: Path) -> None:
    class Slow(FakeTracker):
        def trial(self, record: TrialRecord) -> None:
            time.sleep(0.02)
            super().trial(record)

    tracker = Slow()
    search = Search(tmp_path, trials=3, tracker=tracker)
    search.run()
    assert sorted(tracker.store) == [0, 1, 2]
    for record in search.study.state.records:
        assert record.seconds["logging"] >= 0.02
        assert {"suggestion", "allocation", "scoring", "logging"} <= set(record.seconds)


def test_the_tracker_decides_nothing(tmp_path: Path) -> None:
    tracked = Search(tmp_path / "tracked")
    tracked.run()
    silent = Search(tmp_path / "silent", tracker=NullTracker())
    silent.run()
    silent.store = tracked.store
    assert_same_search(silent, tracked)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_space, make_weight_space])
def test_ax_proposes_after_a_kill_what_it_would_have_without(tmp_path: Path, make: Any) -> None:
    options: dict[str, Any] = {"real": True, "trials": 6, "initial": 3, "outcomes": {4: "failed"}}
    options["space"] = make()
    whole = Search(tmp_path / "whole", **options)
    whole.run(fuse := Fuse())
    killed = Search(tmp_path / "killed", **options)
    third = [i for i, moment in enumerate(fuse.moments) if moment == "in the worker"][3]
    for at in (third, 8):  # in the first trial of the surrogate, then soon after the restart
        with pytest.raises(Killed):
            killed.run(Fuse(at))
    killed.run()
    expected = whole.study.state.trials
    assert [r.request.origin for r in expected.values()][3:] == ["model"] * 3
    for index, record in killed.study.state.trials.items():
        assert record.request.allocation == expected[index].request.allocation
        assert record.request.variables == pytest.approx(
            expected[index].request.variables, abs=TOLERANCES["point"]
        )
    assert killed.count("ended") == dict.fromkeys(range(6), 1)
