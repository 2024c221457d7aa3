"""Times are compared with counts of multiply-adds, on a clock that runs by these."""

import math
import random
import statistics
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lrbo.config.choices import STEPS
from lrbo.evaluation import timing
from lrbo.evaluation.timing import PairedTimes, TimingSettings, measure_latency
from lrbo.layers.options import account
from lrbo.layers.pivoted import PivotedLinear
from lrbo.trials.racing import Race
from lrbo.trials.records import TrialRequest
from tests.support import tiny
from tests.trials.test_worker import (
    BOTH,
    WINDOWS,
    Forms,
    every_forms,
    make_worker,
    numbers,
    request_for,
    snapshot,
)

TOLERANCE = {
    "ratio": 1e-12,  # sums of whole numbers, divided once
    "error": 0.15,  # relative: of a standard deviation estimated from 600 medians
}
TOKENS = 12
IDS = tiny.token_ids(1, TOKENS)[0]
LINEAR = torch.nn.functional.linear
METRICS = {
    f"{phase}_{what}"
    for phase in ("prefill", "decode")
    for what in ("latency_ratio", "latency_ratio_sem", "s", "dense_s")
}


@dataclass
class WorkClock:
    """Goes on by one second per multiply-add of a linear layer, times how slow the machine is.

    Attributes:
        slowness: Factors, one per look at the clock; the last one stays.
        now: Seconds.
        looks: How often it was read.
    """

    slowness: list[float] = field(default_factory=lambda: [1.0])
    now: float = 0.0
    looks: int = 0

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        factor = self.slowness[min(self.looks, len(self.slowness) - 1)]
        self.now += factor * x.numel() // x.shape[-1] * weight.numel()
        return LINEAR(x, weight, bias)

    def __call__(self) -> float:
        self.looks += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> WorkClock:
    clock = WorkClock()
    monkeypatch.setattr(torch.nn.functional, "linear", clock.linear)
    monkeypatch.setattr(timing, "perf_counter", clock)
    return clock


PIVOTED = ("pivoted",)


def measured(forms: Forms, **settings: int) -> dict[str, float]:
    worker = make_worker()
    options = request_for(worker, forms=forms).allocation.compressed
    layers = {
        name: worker.prepared[name].stand_in(name, option) for name, option in options.items()
    }
    return measure_latency(worker.model, layers, IDS, timings(**settings))


def timings(**settings: int) -> TimingSettings:
    return TimingSettings((TOKENS,), **{"steps": STEPS, "warmup": 1, **settings})


@every_forms
def test_ratios_are_those_of_the_multiply_adds_that_the_accountant_counts(
    forms: Forms, clock: WorkClock
) -> None:
    metrics = measured(forms)
    worker = make_worker()
    allocation = request_for(worker, forms=forms).allocation
    counted = account(worker.layers, allocation.cost, itemsize=8)
    head = worker.model.get_output_embeddings().weight.numel()
    # The head runs once at the end of a prefill, and in every step of decoding.
    blocks = [cost.macs - head for cost in (counted.model, counted.model_dense)]
    prefill = [TOKENS * count + head for count in blocks]
    decode = [count + head for count in blocks]
    for phase, (mine, dense) in (("prefill", prefill), ("decode", decode)):
        assert metrics[f"{phase}_s"] == mine
        assert metrics[f"{phase}_dense_s"] == dense
        ratio = metrics[f"{phase}_latency_ratio"]
        assert ratio == pytest.approx(mine / dense, rel=TOLERANCE["ratio"])
        assert metrics[f"{phase}_latency_ratio_sem"] == 0.0
    assert prefill[0] < prefill[1]
    assert set(metrics) == METRICS


def test_a_machine_that_slows_down_and_runs_that_warm_up_leave_the_ratios(
    clock: WorkClock,
) -> None:
    expected = measured(PIVOTED)
    # Slower from turn to turn: two timings of two looks each in a turn, with the same factor.
    drift = [1.0 + turn // 4 for turn in range(1000)]
    clock.looks, clock.slowness = 0, drift
    assert measured(PIVOTED)["prefill_latency_ratio"] == expected["prefill_latency_ratio"]
    # The first two turns do not count, however long one of the two models takes in them.
    cold = [*[1.0, 100.0, 1.0, 1.0] * 2, *[1.0] * 32]
    clock.looks, clock.slowness = 0, cold * 2
    metrics = measured(PIVOTED, warmup=2, repeats=8)
    assert metrics == expected


def test_who_is_first_takes_turns(clock: WorkClock) -> None:
    """Whoever is second takes twice as long: half of the ratios double, the others halve."""
    expected = measured(PIVOTED)["prefill_latency_ratio"]
    clock.looks, clock.slowness = 0, [1.0, 1.0, 1.0, 2.0] * 100  # start, end, start, end
    ratio = measured(PIVOTED, repeats=4, warmup=0)["prefill_latency_ratio"]
    assert ratio == pytest.approx((2 + 1 / 2) / 2 * expected, rel=TOLERANCE["ratio"])


def test_the_clock_is_read_when_the_device_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def clock() -> float:
        calls.append("clock")
        return float(len(calls))

    monkeypatch.setattr(timing, "wait_for", lambda device: calls.append("wait"))
    monkeypatch.setattr(timing, "perf_counter", clock)
    measure_latency(make_worker().model, {}, IDS, timings(repeats=1, warmup=0))
    assert calls == ["wait", "clock"] * 8  # begin and end, of two models, in two phases
    waited: list[torch.device] = []
    monkeypatch.undo()
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    timing.wait_for(torch.device("cpu"))
    timing.wait_for(torch.device("cuda:1"))
    assert waited == [torch.device("cuda:1")]


@every_forms
def test_layers_are_those_of_an_export_in_all_but_their_elements(forms: Forms) -> None:
    worker = make_worker("llama_biased")
    allocation = request_for(worker, forms=forms).allocation
    assert {option.form for option in allocation.compressed.values()} == set(forms)
    for name, option in allocation.compressed.items():
        stand_in = worker.prepared[name].stand_in(name, option)
        exported = worker.prepared[name].stored(name, option, torch.float64)
        assert type(stand_in) is type(exported)
        if isinstance(exported, PivotedLinear):
            assert sorted(stand_in.index.tolist()) == sorted(exported.index.tolist())
        mine, theirs = stand_in.state_dict(), exported.state_dict()
        assert {n: (t.shape, t.dtype) for n, t in mine.items()} == {
            n: (t.shape, t.dtype) for n, t in theirs.items()
        }
        assert all(tensor.is_contiguous() for tensor in mine.values())
        assert (stand_in.bias is None) == (exported.bias is None)


@pytest.mark.parametrize("case", tiny.CASES)
def test_every_family_can_be_timed_and_is_as_it_was(case: str) -> None:
    worker = make_worker(case)
    worker.latency = timings(repeats=3)
    before = snapshot(worker)
    metrics = worker(request_for(worker, forms=BOTH)).metrics
    assert METRICS.issubset(metrics)
    assert all(metrics[name] > 0 for name in METRICS if not name.endswith("_sem"))
    assert snapshot(worker) == before


def test_a_trial_times_nothing_unless_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, timed = make_worker(), make_worker()
    timed.latency = timings(repeats=3)
    one, other = numbers(worker(request_for(worker))), numbers(timed(request_for(timed)))
    assert set(other) - set(one) == METRICS
    assert one == {name: other[name] for name in one}
    monkeypatch.setattr("lrbo.trials.worker.measure_latency", lambda *_: pytest.fail("timed"))
    assert worker(request_for(worker)).outcome == "completed"


def test_a_trial_that_is_given_up_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(batch_windows=1)
    worker.latency, worker.race = timings(), Race(0.99, 0.0)
    monkeypatch.setattr(Race, "is_lost", lambda *_: True)
    monkeypatch.setattr("lrbo.trials.worker.measure_latency", lambda *_: pytest.fail("timed"))
    request = request_for(worker)
    losses = tuple(1.0 + index / 8 for index in range(len(WINDOWS)))
    rival = TrialRequest(1, "sobol", {}, request.allocation, 0, 0, losses)
    assert worker(rival).outcome == "stopped"


def test_memory_that_runs_out_while_timing_fails_the_trial_and_leaves_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = make_worker()
    worker.latency = timings()
    before = snapshot(worker)
    single_token_calls = 0

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal single_token_calls
        single_token_calls += x.shape[:2] == (1, 1)  # a head or a step: well inside the timing
        if single_token_calls > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return LINEAR(x, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        result = worker(request_for(worker))
    assert result.outcome == "failed"
    assert snapshot(worker) == before


# --- the estimate ------------------------------------------------------------------------------


def test_a_few_disturbed_timings_change_little() -> None:
    chooser = random.Random(0)
    dense = [chooser.uniform(1.0, 1.02) for _ in range(7)]
    mine = [0.8 * chooser.uniform(1.0, 1.02) for _ in range(7)]
    quiet = PairedTimes.of(mine, dense)
    disturbed = PairedTimes.of([*mine[:2], 50.0, *mine[3:]], [*dense[:5], 40.0, dense[6]])
    assert abs(quiet.ratio - 0.8) < 0.02
    assert abs(disturbed.ratio - 0.8) < 0.02
    assert disturbed.ratio_error < 0.02


def test_the_error_is_the_spread_of_the_medians_of_many_measurements() -> None:
    chooser = random.Random(1)

    def once() -> PairedTimes:
        mine = [chooser.gauss(0.8, 0.02) for _ in range(25)]
        return PairedTimes.of(mine, [1.0] * len(mine))

    many = [once() for _ in range(600)]
    spread = statistics.stdev(times.ratio for times in many)
    claimed = math.sqrt(statistics.fmean(times.ratio_error**2 for times in many))
    assert claimed == pytest.approx(spread, rel=TOLERANCE["error"])
