"""The loop that evaluates trials of a study, for the search and for single points."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lrbo import builders, config, versions
from lrbo.commands.view import digests, make_tracker, presentation, show_if_possible
from lrbo.errors import ConfigError
from lrbo.executors.base import Executor
from lrbo.executors.inline import InlineExecutor
from lrbo.optimization.base import WarmStart
from lrbo.optimization.client import SearchClient
from lrbo.optimization.front import KEEP_RATIO, pareto_front
from lrbo.optimization.front_space import FrontSpace
from lrbo.optimization.loop import SearchLoop, SearchSettings
from lrbo.optimization.study import Study
from lrbo.presentation import perplexity_text
from lrbo.progress import Reporter
from lrbo.trial import TrialRecord
from lrbo.worker import Worker

# A trial that keeps so little less than wanted leaves nothing to gain between its neighbours.
CLOSE = 0.002


def search_loop(
    plan: builders.Plan,
    study: Study,
    worker: Worker,
    reporter: Reporter,
    *,
    executor: Executor | None = None,
    on_trial: Callable[[TrialRecord], None] = lambda _: None,
) -> SearchLoop:
    """Return the loop of a study, its tracker started and up to date.

    Args:
        plan: Of the study.
        study: Locked.
        worker: Evaluates a request.
        reporter: Shows progress.
        executor: Where trials run; ``None`` is this process.
        on_trial: Told each trial that ended.
    """
    chosen = plan.config
    settings = SearchSettings(
        trials=chosen.search.trials,
        initial=chosen.search.initial,
        kl_weight=chosen.search.kl_weight,
        seed=chosen.seed,
        size=None if chosen.budget.lowest is None else chosen.search.size,
        thresholds=chosen.search.thresholds,
        races=chosen.search.racing is not None,
        starts=plan.starts,
    )
    space = builders.informed_space(plan, study, worker, reporter)
    tracker = make_tracker(chosen, study)
    with reporter.waiting("Opening MLflow"):
        tracker.start(config.flat(chosen) | digests(study))
        tracker.present(presentation(study))
        tracker.sync(study.state.records)
    loop = SearchLoop(
        study=study,
        client=SearchClient(space, seed=chosen.seed),
        worker=worker,
        executor=executor or InlineExecutor(),
        tracker=tracker,
        settings=settings,
        on_trial=on_trial,
    )
    if not study.state.trials:
        _say_repeats(loop.warm_starts, reporter)
    if not study.state.trials and len(loop.warm_starts) >= settings.trials:
        reporter.say(
            f"The first {len(loop.warm_starts)} trials are what a search begins with: "
            f"search.trials={settings.trials} leaves none to search; raise it to go on"
        )
    return loop


def _say_repeats(starts: Sequence[WarmStart], reporter: Reporter) -> None:
    """Say where a donor lends nothing but a baseline, which is why two trials are the same."""
    for place, start in enumerate(starts):
        same = [i for i, other in enumerate(starts) if other.allocation == start.allocation]
        if start.origin == "transfer" and same != [place]:
            twin = next(i for i in same if i != place)
            reporter.say(
                f"Trial {place}, what the donor lends, has the ranks of trial {twin}, "
                f"{starts[twin].origin}"
            )


def evaluate_between(plan: builders.Plan, study: Study, ratio: float, reporter: Reporter) -> None:
    """Evaluate the point of a front at a keep ratio, on the line between its neighbours.

    It becomes a trial of the study, so that it is chosen only if it is better than what was
    found before. Where one of the neighbours is a baseline that stands at no point of the space,
    the line is that of what each layer keeps. Nothing is done at one budget, where a trial is
    close already, where the front ends below the ratio, or where these ranks were tried.

    Args:
        plan: Of the study.
        study: Not locked.
        ratio: Wanted keep ratio.
        reporter: Shows progress.

    Raises:
        ConfigError: If the study was run with packages that score otherwise.
        StudyError: If the study is locked: a search is adding trials to it.
    """
    space = plan.space
    if not isinstance(space, FrontSpace):
        return
    front = pareto_front(study.state.completed, KEEP_RATIO)  # whatever the search minimised
    if any(0 <= ratio - record.metrics[KEEP_RATIO] < CLOSE for record in front):
        return
    small = [record for record in front if record.metrics[KEEP_RATIO] <= ratio][-1:]
    large = [record for record in front if record.metrics[KEEP_RATIO] > ratio][:1]
    if not small or not large:
        if small:
            reporter.say(
                f"keep={ratio:g} is beyond the end of the front, {_named(small[0])}: no larger "
                "trial is better, so that there is none between two to try"
            )
        return
    below, above = small[0].request, large[0].request
    points = [below.variables, above.variables]
    point = space.between(points, ratio) if all(KEEP_RATIO in found for found in points) else None
    refused = versions.refusals(study, allowed=plan.config.search.other_versions)
    if refused:
        raise ConfigError(refused)
    with study.locked():
        versions.note_changes(study)
        worker = builders.build_worker(plan, study, reporter)
        loop = search_loop(plan, study, worker, reporter)
        allocation = (
            space.between_allocations(below.allocation, above.allocation, ratio)
            if point is None
            else loop.client.space.allocate(point)
        )
        done, tried = 0, [record.request.allocation.ranks for record in study.state.records]
        try:
            if allocation.ranks not in tried:
                record = loop.evaluate("between", point or {}, allocation)
                if record.is_completed:
                    reporter.say(
                        f"Trial {record.request.trial_index}, between two points of the front: "
                        f"keep ratio {record.metrics[KEEP_RATIO]:.4f}, perplexity "
                        f"{perplexity_text(record.metrics['perplexity'])}"
                    )
            show_if_possible(study, loop.tracker)
            done = len(study.state.searched)
        finally:
            loop.tracker.finish(completed=done >= plan.config.search.trials)


def _named(record: TrialRecord) -> str:
    """Name a trial with what it keeps."""
    return f"trial {record.request.trial_index} at keep ratio {record.metrics[KEEP_RATIO]:.4f}"
