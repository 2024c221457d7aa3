"""Ask, submit, tell, save; continue after an interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from lrbo.allocation.allocate import Allocation
from lrbo.config.choices import PREDICTED
from lrbo.errors import StudyError
from lrbo.files.parsing import may_be_infinite
from lrbo.optimization.proposals import SearchClient, observations_of
from lrbo.optimization.space import STARTS, Point, Start, WarmStart, sobol_point
from lrbo.study.front import reference_point
from lrbo.study.journal import Study
from lrbo.tracking.tracker import Tracker
from lrbo.trials.racing import window_loss
from lrbo.trials.records import (
    Evaluate,
    Executor,
    Job,
    Origin,
    TrialRecord,
    TrialRequest,
    TrialResult,
)

MAX_FAILURES_IN_A_ROW = 5


@dataclass(frozen=True)
class SearchSettings:
    """How long to search, and for what."""

    trials: int  # in all, those of earlier runs included
    initial: int  # baselines, start values and Sobol points, before the surrogate takes over
    kl_weight: float = 0.0  # of the divergence from the dense model, in the objective
    size: str | None = None  # metric that is minimized beside the loss, for a whole front
    # Loss and size beyond which a trial of a front is of no use, by name.
    thresholds: Mapping[str, float] = field(default_factory=dict)
    races: bool = False  # gives trials up that are surely worse than the best so far


@dataclass
class SearchLoop:
    """Runs trials until the study, which the caller has locked, has enough of them.

    Every step is in the journal before the next one begins, and the journal is the only state,
    so a loop that is killed anywhere continues as if nothing had happened: a trial without an
    end is run again, and proposals depend on nothing else.

    Attributes:
        on_trial: Called with each trial that ended.
        proposing: Entered with the number of a trial while it is proposed.
    """

    study: Study
    client: SearchClient
    worker: Evaluate
    executor: Executor
    tracker: Tracker
    settings: SearchSettings
    starts: Sequence[Start] = STARTS
    on_trial: Callable[[TrialRecord], None] = lambda _: None
    proposing: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()
    poll_s: float = 0.05
    jobs: dict[int, Job] = field(default_factory=dict)

    def run(self) -> None:
        """Search until the study has ``trials`` trials that ended.

        Raises:
            StudyError: If five trials in a row end without a value: more trials will not help.
        """
        while True:
            while len(self.jobs) < self.executor.capacity and (request := self._next_request()):
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
        """The trials that need no search."""
        return self.client.space.warm_starts(self.starts)

    def evaluate(self, origin: Origin, point: Point, allocation: Allocation) -> TrialRecord:
        """Evaluate an allocation that the caller chose, as a trial like all others."""
        # After all numbers of the search, which tell its warm starts.
        last = max(self.study.state.trials, default=-1)
        index = max(last + 1, self.settings.trials, len(self.warm_starts))
        variables = self.client.space.realised(allocation, point)
        seed = self.client.seed * 100_003 + index
        request = TrialRequest(index, origin, variables, allocation, seed)
        self.study.record_suggestion(request, {"suggestion": 0.0, "allocation": 0.0})
        self._start(request)
        self._end(self.jobs.pop(index).result())
        return self.study.state.trials[index]

    def _next_request(self) -> TrialRequest | None:
        """Return the next trial: first those that an interruption left open."""
        for record in self.study.state.open:
            if record.request.trial_index not in self.jobs:
                return record.request
        # Not their count: a damaged trial may have been taken out of the journal by hand.
        for index in range(self.settings.trials):
            if index not in self.study.state.trials:
                with self.proposing(index):
                    return self._suggest(index)
        return None

    def _suggest(self, index: int) -> TrialRequest:
        """Propose the next allocation and write it down."""
        start, allocation_s, rival = time.perf_counter(), 0.0, None
        if index < len(self.warm_starts):  # scored whole: reports compare with them
            warm = self.warm_starts[index]
            origin, variables, allocation = warm.origin, warm.point, warm.allocation
        else:
            origin, point = self._propose(index)
            proposed = time.perf_counter()
            allocation, point = self._new_allocation(point, self.client.seed + index)
            allocation_s = time.perf_counter() - proposed
            variables = self.client.space.realised(allocation, point)
            best = self.study.state.best() if self.settings.races else None
            rival = None if best is None else best.request.trial_index
        seed = self.client.seed * 100_003 + index
        request = TrialRequest(index, origin, variables, allocation, seed, rival)
        suggestion_s = time.perf_counter() - start - allocation_s
        seconds = {"suggestion": suggestion_s, "allocation": allocation_s}
        self.study.record_suggestion(request, seconds)
        return request

    def _propose(self, index: int) -> tuple[Origin, Point]:
        state, settings, space = self.study.state, self.settings, self.client.space
        size = settings.size
        observations = observations_of(state.records, size)
        if index < settings.initial or all(each.loss is None for each in observations):
            return "sobol", sobol_point(space, index - 1, self.client.seed)
        limits = settings.thresholds
        reference = None if size is None else reference_point(state.completed, size, limits)
        return "model", self.client.ask(index, observations, reference)

    def _new_allocation(self, point: Point, seed: int) -> tuple[Allocation, Point]:
        """Return allocation and point, moved by growing steps while its options are known.

        Options are coarse on small units; after 20 steps the space may have no others left.
        """
        space = self.client.space
        tried = [record.request.allocation.options for record in self.study.state.records]
        generator = torch.Generator().manual_seed(seed)
        allocation, moved = space.allocate(point), point
        for attempt in range(20):
            if allocation.options not in tried:
                break
            noise = torch.randn(len(space.names), generator=generator, dtype=torch.float64)
            step = 0.01 * (attempt + 1)
            moved = space.project(
                {n: point[n] + step * x for n, x in zip(space.names, noise.tolist(), strict=True)}
            )
            allocation = space.allocate(moved)
        return allocation, moved

    def _start(self, request: TrialRequest) -> None:
        """Write down that a trial runs, and hand it out."""
        self.study.record("started", trial=request.trial_index)
        if request.rival is not None:
            rival = self.study.state.trials[request.rival].result
            assert rival is not None, f"trial {request.rival} was the best and has no result"
            pairs = zip(rival.example_losses, rival.example_divergences, strict=True)
            losses = tuple(window_loss(nll, kl, self.settings.kl_weight) for nll, kl in pairs)
            request = replace(request, rival_losses=losses)
        self.jobs[request.trial_index] = self.executor.submit(self.worker, request)

    def _end(self, result: TrialResult) -> None:
        """Write down the result of a trial, then pass it on."""
        metrics = dict(result.metrics)
        outcome, error = result.outcome, result.error
        if outcome == "completed":
            task = self.study.task
            distance = self.settings.kl_weight * metrics[task.divergence]
            metrics["objective"] = metrics[task.minimized.name] + distance
            allocation = self.study.state.trials[result.trial_index].request.allocation
            predicted = self.client.space.problem.predicted(allocation)
            if predicted is not None:
                metrics[PREDICTED] = predicted
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
            example_losses=result.example_losses,
            example_divergences=result.example_divergences,
        )
        tracked = time.perf_counter()
        self.tracker.trial(self.study.state.trials[result.trial_index])
        seconds = time.perf_counter() - tracked
        self.study.record("logged", trial=result.trial_index, seconds=seconds)
        self.on_trial(self.study.state.trials[result.trial_index])
        last = self.study.state.ended[-MAX_FAILURES_IN_A_ROW:]
        if len(last) == MAX_FAILURES_IN_A_ROW and not any(record.metrics for record in last):
            reason = last[-1].result and last[-1].result.error
            raise StudyError(
                f"the last {len(last)} trials ended without a value, the last one with: {reason}. "
                "Nothing is lost; mend the cause and run the same command again."
            )
