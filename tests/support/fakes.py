"""Stand-ins for the slow and the outside parts of a search: they die, fail and answer late."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrbo.allocation.allocate import dense_cost
from lrbo.errors import Outcome
from lrbo.layers.forms import Quantized, form_named
from lrbo.layers.options import Budget, Measure, Menu, Section
from lrbo.models.specs import LayerSpec
from lrbo.optimization.budgets import FrontSpace, over_budgets
from lrbo.optimization.proposals import Observation, SearchClient
from lrbo.optimization.space import Problem, Space
from lrbo.optimization.variables import (
    RatioSpace,
    SpaceSettings,
    WeightSpace,
    build_ratio_space,
    build_weight_space,
)
from lrbo.study.journal import Study
from lrbo.tracking.mlflow_runs import Checkpoint, Presentation
from lrbo.tracking.tracker import Tracker
from lrbo.trials.racing import Race, paired_difference
from lrbo.trials.records import TrialRecord, TrialRequest, TrialResult

GROUPS = {"qk": ["q_proj", "k_proj"], "o": ["o_proj"], "up": ["up_proj"], "down": ["down_proj"]}
SHAPES = {
    "q_proj": (24, 24),
    "k_proj": (12, 24),
    "v_proj": (12, 24),
    "o_proj": (24, 24),
    "up_proj": (40, 24),
    "down_proj": (24, 40),
}


ITEMSIZE = 4  # bytes of a parameter


class Killed(BaseException):
    """The process is gone. Not an ``Exception``: nothing may catch it and carry on."""


@dataclass
class Fuse:
    """Dies at one chosen moment out of all that are reported to it.

    Attributes:
        at: Number of the moment, from 0; ``None`` never dies.
        moments: What was reported, in order.
    """

    at: int | None = None
    moments: list[str] = field(default_factory=list)

    def reaches(self, moment: str) -> bool:
        """Note a moment and return whether it is the one to die at."""
        self.moments.append(moment)
        return self.at == len(self.moments) - 1

    def burn(self, moment: str) -> None:
        """Note a moment and die if it is the one."""
        if self.reaches(moment):
            raise Killed(moment)


def make_layers(blocks: int = 2, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> list[LayerSpec]:
    """Describe the layers of a model that does not exist."""
    return [
        LayerSpec(f"layers.{block}.{kind}", kind, block, *shape, has_bias=False, site="x")
        for block in range(blocks)
        for kind, shape in shapes.items()
    ]


def make_problem(
    keep_ratio: float = 0.7,
    layers: Sequence[LayerSpec] | None = None,
    *,
    forms: Sequence[str] = ("factored",),
    bias: bool = True,
    rank_multiple: int = 1,
    minimum: int = 0,
    measure: Measure = "parameters",
    group_sizes: Sequence[int] = (16,),
) -> Problem:
    """Give every layer a menu, as Bolaco stores it: low-rank layers with a bias."""
    menus = {
        layer.name: Menu.of(
            layer,
            forms,
            bias=bias or layer.has_bias,
            itemsize=ITEMSIZE,
            multiple=rank_multiple,
            minimum=minimum,
            group_sizes=group_sizes,
        )
        for layer in (make_layers() if layers is None else layers)
    }
    return Problem(menus, Budget.keeping(keep_ratio, dense_cost(menus), measure))


PROBLEM = ("forms", "bias", "rank_multiple", "minimum", "measure", "group_sizes")


def make_space(
    keep_ratio: float = 0.7,
    layers: Sequence[LayerSpec] | None = None,
    **changes: Any,
) -> RatioSpace:
    """Build a small search space: four variables, values stay dense, ranks one by one."""
    options: dict[str, Any] = {
        "groups": GROUPS,
        "dense": ["v_proj"],
        "start": {"qk": 0.4, "down": 0.9},
    }
    problem = {name: changes.pop(name) for name in PROBLEM if name in changes}
    config = SpaceSettings(**(options | changes))
    return build_ratio_space(make_problem(keep_ratio, layers, **problem), config)


Curves = Mapping[str, NDArray[np.float64]]


def make_curves(layers: Sequence[LayerSpec], seed: int = 0) -> Curves:
    """Draw predicted losses by rank: falling strictly to 0 at full rank, of sizes far apart."""
    generator = np.random.default_rng(seed)
    curves = {}
    for spec in layers:
        steps = generator.exponential(size=min(spec.out_features, spec.in_features)) ** 2 + 1e-3
        falling = np.append(np.sort(steps).cumsum()[::-1], 0.0)
        curves[spec.name] = falling * 10.0 ** generator.uniform(-3, 0)
    return curves


def with_curves(menus: Mapping[str, Menu], curves: Curves) -> dict[str, Menu]:
    """Give menus the losses of curves by rank; a layer without a curve stays dense.

    Integers lose a share of the loss of rank 0: a quarter per bit, and half per rank.
    """

    def losses(name: str, section: Section) -> NDArray[np.float64]:
        curve, ranks, form = curves[name], section.levels[:, -1], form_named(section.form)
        if isinstance(form, Quantized):
            return curve[0] * 4.0**-form.bits * 0.5**ranks
        return curve[ranks[ranks < len(curve)]]

    return {
        name: menu.with_losses([losses(name, section) for section in menu.sections[:-1]])
        if name in curves
        else menu.only_dense()
        for name, menu in menus.items()
    }


def predicted(problem: Problem, curves: Curves) -> Problem:
    """Give a problem the losses of curves by rank."""
    return replace(problem, menus=with_curves(problem.menus, curves))


def make_weight_space(
    keep_ratio: float = 0.7,
    layers: Sequence[LayerSpec] | None = None,
    curves: Curves | None = None,
    **changes: Any,
) -> WeightSpace:
    """Build a small space of weights with predicted losses: one group per kind, three knots."""
    layers = make_layers() if layers is None else layers
    problem = {name: changes.pop(name) for name in PROBLEM if name in changes}
    config = SpaceSettings(bounds=[-0.5, 0.5], **changes)
    space = build_weight_space(make_problem(keep_ratio, layers, **problem), config)
    return space.of(predicted(space.problem, make_curves(layers) if curves is None else curves))


def make_front_space(
    kind: str = "weights", lowest: float = 0.5, highest: float = 0.8, **changes: Any
) -> FrontSpace:
    """Build a small space of weights or ratios over a range of budgets."""
    make = {"weights": make_weight_space, "ratios": make_space}[kind]
    return over_budgets(make(lowest, **changes), lowest, highest)


def make_about(
    layers: Sequence[LayerSpec] | None = None, space: Space | None = None, **changes: Any
) -> dict[str, Any]:
    """Describe what was fixed when a study was begun."""
    text = {"text": "words[text]", "windows": FakeWorker.WINDOWS, "digest": "a digest"}
    layers = make_layers() if layers is None else layers
    about = {
        "study_id": "an id",
        "seed": 0,
        "model_fingerprint": "a fingerprint",
        "model_parameters": sum(spec.parameters for spec in layers),
        "dtype": "float32",
        "stored_dtype": "float32",
        "device": "cpu",
        "timed": False,
        "task": "causal_lm",
        "data": dict.fromkeys(("calibration", "validation", "test"), text),
        "budget": asdict(
            Budget("parameters", sum(spec.parameters for spec in layers))
            if space is None
            else space.problem.budget
        ),
        "include": ["blocks"],
        "forms": ["factored"],
        "added_biases": [spec.name for spec in layers if not spec.has_bias],
        "layers": [asdict(spec) for spec in layers],
        "variables": {} if space is None else {k: list(v) for k, v in space.bounds.items()},
        "donors": [],
        "versions": {"lrbo": "0.1.0"},
    }
    return about | changes


class DyingStudy(Study):
    """A study whose process may die before, in the middle of, or after each journal write."""

    def __init__(self, folder: Path, fuse: Fuse) -> None:
        self.fuse = fuse
        super().__init__(folder)

    def record(self, event: str, **fields: Any) -> None:
        """Append, and die on the way where the fuse says so."""
        self.fuse.burn(f"before {event}")
        before = self.journal.stat().st_size if self.journal.exists() else 0
        super().record(event, **fields)
        if self.fuse.reaches(f"inside {event}"):
            written = self.journal.stat().st_size - before
            with self.journal.open("rb+") as file:
                file.truncate(before + written // 2)
            raise Killed(f"inside {event}")
        self.fuse.burn(f"after {event}")


class FakeClient(SearchClient):
    """Proposes a feasible point that depends on seed and trial number alone."""

    def __init__(self, space: Space, *, seed: int, fuse: Fuse | None = None) -> None:
        super().__init__(space, seed=seed)
        self.fuse = fuse or Fuse()
        self.observations: dict[int, list[Observation]] = {}
        self.references: dict[int, tuple[float, float] | None] = {}

    def ask(
        self,
        trial_index: int,
        observations: Sequence[Observation],
        reference: tuple[float, float] | None = None,
    ) -> dict[str, float]:
        """Return a random point; keeps what it was told."""
        self.fuse.burn("before ask")
        self.observations[trial_index] = list(observations)
        self.references[trial_index] = reference
        chooser = random.Random(f"{self.seed} {trial_index}")
        drawn = {name: chooser.uniform(*limits) for name, limits in self.space.bounds.items()}
        point = self.space.project(drawn)
        self.fuse.burn("after ask")
        return point


@dataclass
class FakeWorker:
    """Evaluates an analytic loss: each layer costs ``weight * (1 - kept share)^2`` nats.

    Attributes:
        space: Says what the layers are.
        fuse: May die in the middle of an evaluation.
        outcomes: Trials that end otherwise: an outcome, or metrics that replace the real ones.
        race: When to give a trial up; its loss differs from window to window then.
        calls: Trial numbers in the order of evaluation.
    """

    space: Space
    fuse: Fuse = field(default_factory=Fuse)
    outcomes: Mapping[int, Outcome | Mapping[str, float]] = field(default_factory=dict)
    race: Race | None = None
    calls: list[int] = field(default_factory=list)
    WINDOWS = 12

    def __call__(self, request: TrialRequest) -> TrialResult:
        """Return the result of a request."""
        index = request.trial_index
        self.calls.append(index)
        self.fuse.burn("in the worker")
        planned = self.outcomes.get(index, {})
        if isinstance(planned, str) and planned != "completed":
            return TrialResult(index, planned, {}, 0.5, f"planned to be {planned}")
        metrics = self.metrics(request) | (planned if isinstance(planned, Mapping) else {})
        if self.race is None:
            return TrialResult(index, "completed", metrics, 0.5)
        chooser = random.Random(index)
        hard = [window % 5 - 2 + 0.01 * chooser.gauss(0, 1) for window in range(self.WINDOWS)]
        losses = [metrics["nll"] + each - sum(hard) / len(hard) for each in hard]
        for count in range(1, self.WINDOWS):
            rival = request.rival_losses
            if rival and self.race.is_lost(
                losses[:count], rival[:count], self.WINDOWS, looks=self.WINDOWS - 1
            ):
                gap, error = paired_difference(losses[:count], rival[:count], self.WINDOWS)
                estimate = {"objective": sum(rival) / len(rival) + gap, "objective_sem": error}
                return TrialResult(index, "stopped", estimate | {"tokens": 5.0 * count}, 0.5)
        kl = (metrics["kl_dense_to_compressed"],) * self.WINDOWS
        return TrialResult(
            index, "completed", metrics, 0.5, example_losses=tuple(losses), example_divergences=kl
        )

    def metrics(self, request: TrialRequest) -> dict[str, float]:
        """Return the numbers of an allocation."""
        problem, allocation = self.space.problem, request.allocation
        loss = 0.0
        for number, name in enumerate(problem.menus):
            loss += (1 + number % 3) * (1 - problem.share(allocation, (name,))) ** 2
        nll = 2.0 + loss
        cost = allocation.cost
        return {
            "nll": nll,
            "perplexity": math.exp(nll),
            "kl_dense_to_compressed": loss / 2,
            "parameters": float(cost.parameters),
            "keep_ratio": problem.share(allocation),
            "tokens": 100.0,
            "model_parameters": float(cost.parameters),
            "model_bytes": float(cost.bytes),
            "macs_per_token": float(cost.macs),
        }


@dataclass
class FakeJob:
    """A trial that is evaluated when it is submitted and answers after some polls."""

    finished: TrialResult
    polls: int
    fuse: Fuse

    def done(self) -> bool:
        """Return whether enough polls went by."""
        self.polls -= 1
        return self.polls < 0

    def result(self) -> TrialResult:
        """Return the result, or die."""
        self.fuse.burn("before result")
        return self.finished


@dataclass
class FakeExecutor:
    """Runs several trials at once and lets them end in another order than they began.

    Attributes:
        capacity: How many at once.
        delays: Polls until the nth submitted job is done, repeated; unequal ones mix the order.
        fuse: May die before or after a submission, or when a result is fetched.
        peak: The largest number of trials that were out at the same time.
        ends: Trial numbers in the order of their ends.
    """

    capacity: int = 1
    delays: Sequence[int] = (0,)
    fuse: Fuse = field(default_factory=Fuse)
    peak: int = 0
    ends: list[int] = field(default_factory=list)
    jobs: list[FakeJob] = field(default_factory=list)

    def submit(
        self, worker: Callable[[TrialRequest], TrialResult], request: TrialRequest
    ) -> FakeJob:
        """Evaluate now, answer later."""
        self.fuse.burn("before submit")
        delay = self.delays[len(self.jobs) % len(self.delays)]
        job = FakeJob(worker(request), delay, self.fuse)
        self.jobs.append(job)
        self.peak = max(self.peak, sum(one.polls >= 0 for one in self.jobs))
        self.fuse.burn("after submit")
        return job


@dataclass
class FakeTracker(Tracker):
    """Keeps what it is shown in a store that outlives it, as a database does.

    Attributes:
        store: Trial number to the records shown under it; several would be a double entry.
        fuse: May die before or after a trial is stored.
        calls: Names of the methods that were called.
    """

    store: dict[int, list[TrialRecord]] = field(default_factory=dict)
    fuse: Fuse = field(default_factory=Fuse)
    calls: list[str] = field(default_factory=list)

    def start(self, config: Mapping[str, Any]) -> None:
        """Note the call."""
        self.calls.append("start")

    def trial(self, record: TrialRecord) -> None:
        """Store a trial."""
        self.calls.append("trial")
        self.fuse.burn("tracker before storing")
        self.store.setdefault(record.request.trial_index, []).append(record)
        self.fuse.burn("tracker after storing")

    def sync(self, records: Iterable[TrialRecord]) -> int:
        """Store what is missing."""
        self.calls.append("sync")
        missing = [
            record
            for record in records
            if record.result is not None and record.request.trial_index not in self.store
        ]
        for record in missing:
            self.store[record.request.trial_index] = [record]
        return len(missing)

    def present(self, presentation: Presentation) -> None:
        """Note the call."""
        self.calls.append("present")

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Note the call."""
        self.calls.append("checkpoint")

    def summary(self, metrics: Mapping[str, float], artifacts: Iterable[Path]) -> None:
        """Note the call."""
        self.calls.append("summary")

    def finish(self, *, completed: bool) -> None:
        """Note the call."""
        self.calls.append("finish")


def fixed_clock(start: float = 1_700_000_000.0, step: float = 1.0) -> Callable[[], float]:
    """Return a clock that moves by ``step`` each time it is read."""

    def times() -> Iterator[float]:
        now = start
        while True:
            yield now
            now += step

    source = times()
    return lambda: next(source)
