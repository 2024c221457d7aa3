"""The loop that evaluates trials of a study, for the search and for single points."""

from __future__ import annotations

from lrbo.config.choices import KEEP_RATIO, THRESHOLD
from lrbo.errors import ConfigError
from lrbo.optimization.budgets import FrontSpace
from lrbo.optimization.loop import SearchLoop, SearchSettings
from lrbo.optimization.proposals import SearchClient
from lrbo.optimization.space import Point
from lrbo.optimization.thresholds import ThresholdSpace
from lrbo.pipeline import build_worker, planning
from lrbo.progress import Reporter
from lrbo.reports.mlflow_view import make_tracker, params, presentation, show_if_possible
from lrbo.study import versions
from lrbo.study.front import pareto_front
from lrbo.study.journal import Study
from lrbo.trials.records import Executor, InlineExecutor
from lrbo.trials.worker import Worker

# A trial that keeps so little less than wanted leaves nothing to gain between its neighbours.
CLOSE = 0.002


def search_loop(
    plan: planning.Plan, study: Study, worker: Worker, executor: Executor, reporter: Reporter
) -> SearchLoop:
    """Make the loop of a locked study, whose tracker is started and up to date."""
    config, search = plan.config, plan.config.search
    space = build_worker.informed_space(plan, study, worker.model, worker.prepared, reporter)
    tracker = make_tracker(config, study)
    with reporter.waiting("Opening MLflow"):
        tracker.start(params(config, study))
        tracker.present(presentation(study))
        tracker.sync(study.state.records)
    loop = SearchLoop(
        study=study,
        client=SearchClient(space, seed=config.seed),
        worker=worker,
        executor=executor,
        tracker=tracker,
        settings=SearchSettings(
            search.trials,
            search.initial,
            search.kl_weight,
            None if config.budget.lowest is None else search.size,
            search.thresholds,
            races=search.racing is not None,
        ),
        starts=plan.starts,
    )
    if not study.state.trials:
        starts = loop.warm_starts
        for index, start in enumerate(starts):
            same = [i for i, other in enumerate(starts) if other.allocation == start.allocation]
            if start.origin == "transfer" and len(same) > 1:
                twin = next(i for i in same if i != index)
                reporter.say(
                    f"Trial {index}, what the donor lends, has the options of trial {twin}, "
                    f"{starts[twin].origin}"
                )
        if len(starts) >= config.search.trials:
            reporter.say(
                f"The first {len(starts)} trials are what a search begins with: "
                f"search.trials={config.search.trials} leaves none to search; raise it to go on"
            )
    return loop


def evaluate_between(plan: planning.Plan, study: Study, ratio: float, reporter: Reporter) -> None:
    """Evaluate the point of a front at a keep ratio, on the line between its neighbours.

    It becomes a trial of the study, which must not be locked. Where a neighbour is a baseline at no
    point of the space, the line is that of what each unit keeps. Of thresholds it is the smallest
    one that keeps no more. Nothing is done at one budget,
    where a trial is close already, where the front ends below the ratio, or where these options
    were tried.

    Raises:
        ConfigError: If the study was run with packages that score otherwise.
        StudyError: If the study is locked: a search is adding trials to it.
    """
    space = plan.space
    if not isinstance(space, FrontSpace | ThresholdSpace):
        return
    front = pareto_front(study.state.completed, KEEP_RATIO)  # whatever the search minimised
    if any(0 <= ratio - record.metrics[KEEP_RATIO] < CLOSE for record in front):
        return
    small = [record for record in front if record.metrics[KEEP_RATIO] <= ratio][-1:]
    large = [record for record in front if record.metrics[KEEP_RATIO] > ratio][:1]
    if small and not large:
        reporter.say(
            f"keep={ratio:g} is beyond the end of the front, trial {small[0].request.trial_index} "
            f"at keep ratio {small[0].metrics[KEEP_RATIO]:.4f}: no larger trial is better, so "
            "that there is none between two to try"
        )
    if not small or not large:
        return
    below, above = small[0].request, large[0].request
    if refused := versions.refusals(study, allowed=plan.config.search.other_versions):
        raise ConfigError(refused)
    with study.locked():
        versions.note_changes(study)
        worker = build_worker.build_worker(plan, study, reporter)
        loop = search_loop(plan, study, worker, InlineExecutor(), reporter)
        informed = loop.client.space
        if isinstance(informed, ThresholdSpace):
            point: Point = {THRESHOLD: informed.meeting(informed.problem.keeping(ratio).budget)}
        else:
            assert isinstance(space, FrontSpace)
            point = space.between(below.variables, above.variables, ratio)
        if point:
            allocation = informed.allocate(point)
        else:
            assert isinstance(space, FrontSpace)
            allocation = space.between_allocations(below.allocation, above.allocation, ratio)
        done, tried = 0, [record.request.allocation.options for record in study.state.records]
        try:
            if allocation.options not in tried:
                record = loop.evaluate("between", point, allocation)
                if record.is_completed:
                    metric = study.task.headline
                    reporter.say(
                        f"Trial {record.request.trial_index}, between two points of the front: "
                        f"keep ratio {record.metrics[KEEP_RATIO]:.4f}, {metric.label} "
                        f"{metric.text(record.metrics[metric.name])}"
                    )
            show_if_possible(study, loop.tracker)
            done = len(study.state.searched)
        finally:
            loop.tracker.finish(completed=done >= plan.config.search.trials)
