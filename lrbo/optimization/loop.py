"""Ask, submit, tell, save; continue after an interruption."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from lrbo.allocation import Allocation
from lrbo.errors import StudyError
from lrbo.executors.base import Evaluate, Executor, Job
from lrbo.optimization.base import STARTS, Start, WarmStart
from lrbo.optimization.client import SearchClient, observations_of
from lrbo.optimization.front import reference_point
from lrbo.optimization.study import Study
from lrbo.racing import window_loss
from lrbo.strict_json import may_be_infinite
from lrbo.tracking import Tracker
from lrbo.trial import Origin, TrialRecord, TrialRequest, TrialResult

log = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 5


@dataclass(frozen=True)
class SearchSettings:
    """How long to search and for what.

    Attributes:
        trials: Trials in all, those of earlier runs included.
        initial: Trials before the surrogate takes over: baseline, start values, Sobol points.
        kl_weight: Weight of the divergence in ``nll + kl_weight * kl_dense_to_compressed``.
        seed: Of the study.
        size: Metric that is minimised beside the loss, for a whole front; ``None`` for the
            lowest loss at one budget.
        thresholds: Loss and size from which on a trial of a front is of no use, by name.
        races: Whether trials may be given up that are surely worse than the best so far.
        starts: What the search begins with, before it searches.
    """

    trials: int
    initial: int
    kl_weight: float
    seed: int
    size: str | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    races: bool = False
    starts: Sequence[Start] = STARTS

    def objective(self, metrics: Mapping[str, float]) -> float:
        """Return what is minimised, nats per token."""
        return metrics["nll"] + self.kl_weight * metrics["kl_dense_to_compressed"]


@dataclass
class SearchLoop:
    """Runs trials until the study has as many as wanted.

    Every step is in the journal before the next one begins, and the state is only what the
    journal says, so a loop that is killed anywhere continues as if nothing had happened: a
    trial without an end is run again, and proposals depend on nothing else.

    Attributes:
        study: Locked by the caller.
        client: Proposes points.
        worker: Evaluates a request.
        executor: Where.
        tracker: Gets every trial; losing it loses nothing.
        settings: How long and for what.
        on_trial: Told each trial that ended.
        proposing: Entered with the number of a trial while its point is chosen.
    """

    study: Study
    client: SearchClient
    worker: Evaluate
    executor: Executor
    tracker: Tracker
    settings: SearchSettings
    on_trial: Callable[[TrialRecord], None] = lambda _: None
    proposing: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()
    poll_s: float = 0.05
    jobs: dict[int, Job] = field(default_factory=dict)

    def run(self) -> None:
        """Search until the study has ``settings.trials`` trials that ended.

        Raises:
            StudyError: If five trials in a row end without a value: something is wrong that
                more trials will not mend.
        """
        while True:
            while len(self.jobs) < self.executor.capacity:
                request = self._next_request()
                if request is None:
                    break
                self._start(request)
            if not self.jobs:
                return
            finished = [index for index, job in self.jobs.items() if job.done()]
            for index in finished:
                self._end(self.jobs.pop(index).result())
            if not finished:
                time.sleep(self.poll_s)

    @cached_property
    def warm_starts(self) -> list[WarmStart]:
        """Return the trials that need no search."""
        return self.client.space.warm_starts(self.settings.starts)

    def evaluate(
        self, origin: Origin, point: Mapping[str, float], allocation: Allocation | None = None
    ) -> TrialRecord:
        """Evaluate one more point, chosen by the caller, as a trial like all others.

        Args:
            origin: Who chose it.
            point: Of the space, ``{}`` if the allocation stands at none.
            allocation: Its ranks; by default those of the point.
        """
        # Behind all numbers that the search will give: it knows what to begin with by them.
        index = max(
            max(self.study.state.trials, default=-1) + 1,
            self.settings.trials,
            len(self.warm_starts),
        )
        start = time.perf_counter()
        if allocation is None:
            allocation = self.client.space.allocate(point)
        variables = self.client.space.realised(allocation, point) or {}
        seconds = {"suggestion": 0.0, "allocation": time.perf_counter() - start}
        request = TrialRequest(
            index, origin, variables, allocation, self.settings.seed * 100_003 + index
        )
        self.study.record_suggestion(request, seconds)
        self._start(request)
        job = self.jobs.pop(index)
        while not job.done():
            time.sleep(self.poll_s)
        self._end(job.result())
        return self.study.state.trials[index]

    def _next_request(self) -> TrialRequest | None:
        """Return what to run next: first what an interruption left open."""
        for record in self.study.state.open:
            if record.request.trial_index not in self.jobs:
                return record.request
        # Not their count: a damaged trial may have been taken out of the journal by hand.
        unused = (i for i in range(self.settings.trials) if i not in self.study.state.trials)
        index = next(unused, None)
        if index is None:
            return None
        with self.proposing(index):
            return self._suggest(index)

    def _suggest(self, index: int) -> TrialRequest:
        """Choose the next allocation and write it down."""
        space, seed = self.client.space, self.settings.seed
        taken = {
            tuple(record.request.allocation.ranks.values()) for record in self.study.state.records
        }
        origin: Origin
        allocation_s = 0.0
        start = time.perf_counter()

        def allocate(point: Mapping[str, float]) -> Allocation:
            nonlocal allocation_s
            begin = time.perf_counter()
            allocation = space.allocate(point)
            allocation_s += time.perf_counter() - begin
            return allocation

        variables: Mapping[str, float]
        if index < len(self.warm_starts):
            known_start = self.warm_starts[index]
            origin, variables = known_start.origin, known_start.point
            allocation = known_start.allocation
        else:
            observations = observations_of(self.study.state.records, self.settings.size)
            known = any(observation.loss is not None for observation in observations)
            if index < self.settings.initial or not known:
                origin, point = "sobol", space.sobol_point(index - 1, seed)
            else:
                point = self.client.ask(index, observations, self._reference())
                origin = "model"
            allocation, place = self._new_allocation(point, allocate, taken, seed + index)
            variables = space.realised(allocation, place) or {}
        seconds = {
            "suggestion": time.perf_counter() - start - allocation_s,
            "allocation": allocation_s,
        }
        best = self.study.state.best() if self.settings.races else None
        # What the search begins with is scored whole: reports compare with it.
        rival = None if best is None or index < len(self.warm_starts) else best
        request = TrialRequest(
            index,
            origin,
            variables,
            allocation,
            seed * 100_003 + index,
            None if rival is None else rival.request.trial_index,
        )
        self.study.record_suggestion(request, seconds)
        return request

    def _new_allocation(
        self,
        point: Mapping[str, float],
        allocate: Callable[[Mapping[str, float]], Allocation],
        taken: set[tuple[int | None, ...]],
        seed: int,
    ) -> tuple[Allocation, Mapping[str, float]]:
        """Return the allocation of a point, moved a little if its ranks were tried already.

        Ranks are coarse on small layers, so different points can round to the same ranks, whose
        value is known. Steps grow until the ranks differ; after 20 the known ones are accepted,
        because the space may have no others left.
        """
        space = self.client.space
        generator = torch.Generator().manual_seed(seed)
        allocation, place = allocate(point), point
        for attempt in range(20):
            if tuple(allocation.ranks.values()) not in taken:
                break
            noise = torch.randn(len(space.names), generator=generator, dtype=torch.float64)
            moved = [
                point[name] + 0.01 * (attempt + 1) * float(step)
                for name, step in zip(space.names, noise, strict=True)
            ]
            place = dict(zip(space.names, space.project(moved), strict=True))
            allocation = allocate(place)
        return allocation, place

    def _reference(self) -> tuple[float, float] | None:
        """Return loss and size beyond which trials of a front are of no use."""
        size = self.settings.size
        if size is None:
            return None
        return reference_point(self.study.state.completed, size, self.settings.thresholds)

    def _start(self, request: TrialRequest) -> None:
        """Write down that a trial runs, and hand it out."""
        self.study.record("started", trial=request.trial_index)
        if request.rival is not None:
            rival = self.study.state.trials[request.rival].result
            assert rival is not None, f"trial {request.rival} was the best and has no result"
            weight = self.settings.kl_weight
            pairs = zip(rival.window_nll, rival.window_kl, strict=True)
            losses = tuple(window_loss(nll, kl, weight) for nll, kl in pairs)
            request = replace(request, rival_losses=losses)
        self.jobs[request.trial_index] = self.executor.submit(self.worker, request)

    def _end(self, result: TrialResult) -> None:
        """Write down what came of a trial, then show it to everybody else."""
        metrics = dict(result.metrics)
        outcome, error = result.outcome, result.error
        if outcome == "completed":
            metrics["objective"] = self.settings.objective(metrics)
            bad = sorted(
                name
                for name, value in metrics.items()
                if not (math.isfinite(value) or (may_be_infinite(name) and value == math.inf))
            )
            if bad:
                outcome, error, metrics = "abandoned", f"not finite: {', '.join(bad)}", {}
        self.study.record(
            "ended",
            trial=result.trial_index,
            outcome=outcome,
            metrics=metrics,
            error=error,
            seconds={"scoring": result.seconds},
            window_nll=result.window_nll,
            window_kl=result.window_kl,
        )
        record = self.study.state.trials[result.trial_index]
        start = time.perf_counter()
        self.tracker.trial(record)
        self.study.record("logged", trial=result.trial_index, seconds=time.perf_counter() - start)
        self.on_trial(self.study.state.trials[result.trial_index])
        self._refuse_hopeless()

    def _refuse_hopeless(self) -> None:
        """Stop where every trial fails."""
        last = self.study.state.ended[-MAX_FAILURES_IN_A_ROW:]
        hopeless = not any(record.is_completed or record.is_stopped for record in last)
        if len(last) == MAX_FAILURES_IN_A_ROW and hopeless:
            assert last[-1].result is not None
            raise StudyError(
                f"the last {len(last)} trials ended without a value, the last one with: "
                f"{last[-1].result.error}. Nothing is lost; mend the cause and run the same "
                "command again."
            )
