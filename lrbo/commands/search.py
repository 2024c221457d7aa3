"""Run a search to its end, continuing what exists of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lrbo import builders, checks, config, versions
from lrbo.commands.trials import search_loop
from lrbo.commands.view import show_if_possible
from lrbo.compression import compressed
from lrbo.errors import ConfigError
from lrbo.evaluation.perplexity import score
from lrbo.executors.base import Executor
from lrbo.executors.inline import InlineExecutor
from lrbo.executors.ray_tasks import RayExecutor, RaySettings, connected
from lrbo.loading import cache_folder, resolve_device
from lrbo.progress import Reporter
from lrbo.report import print_report
from lrbo.results import summary
from lrbo.schema import SearchConfig
from lrbo.search.study import Study
from lrbo.trial import TrialRecord
from lrbo.worker import Worker


def run(chosen: SearchConfig, typed: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """Run a search to its end, continuing what exists of it.

    Args:
        chosen: The composed values.
        typed: Overrides as typed. If none of them changes what is measured, an existing study
            is continued with its own values, so that its name is all one needs to type.
        reporter: Shows progress.

    Returns:
        The summary of the study.

    Raises:
        ConfigError: Listing every problem, before any model is loaded.
        StudyError: If the study is locked, damaged or stuck.
    """
    study = Study(checks.study_folder(chosen.studies, chosen.study))
    problems: list[str] = []
    if study.exists:
        study.about()
        if all(config.is_free(override.lstrip("+~").partition("=")[0]) for override in typed):
            chosen = config.stored_config(study.config_yaml(), typed, chosen)
        else:
            problems += [
                f"study {study.name} was begun with another configuration; {difference}"
                for difference in config.differences(study.config_yaml(), chosen)
            ]
            if problems:
                problems.append(
                    f"to continue it: lrbo search study={chosen.study}; to begin another: "
                    "study=NEWNAME"
                )
        problems += versions.refusals(study, allowed=chosen.search.other_versions)
    problems += checks.check(chosen)
    if checks.check_writable("study", study.folder):  # then not even the lock can be taken
        raise ConfigError(problems)
    with study.locked():
        plan = builders.plan_search(chosen, study, problems)
        if study.exists:
            versions.note_changes(study)
        with _executor(plan, study) as executor:
            return _search(plan, study, executor, reporter)


@contextmanager
def _executor(plan: builders.Plan, study: Study) -> Iterator[Executor]:
    """Yield where trials run; a cluster is reached before a model is loaded."""
    given = plan.config.executor
    if given.name == "inline":
        yield InlineExecutor()
        return
    settings = RaySettings(
        address=given.address,
        workers=given.workers,
        devices=given.devices,
        oversubscribe=given.oversubscribe,
        uses_gpu=resolve_device(plan.config.model.device).type == "cuda",
    )
    build = partial(
        builders.study_worker,
        study.folder.absolute(),
        config.to_yaml(plan.config),
        Path.cwd(),
        cache_folder().absolute(),
    )
    with connected(settings) as ray:
        executor = RayExecutor(ray, settings, build)
        try:
            yield executor
        finally:
            executor.shut_down()


def _search(
    plan: builders.Plan, study: Study, executor: Executor, reporter: Reporter
) -> dict[str, Any]:
    """Search, test and report, with the study locked."""
    chosen = plan.config
    trials = chosen.search.trials
    if study.state.trials:
        done = sum(record.request.origin != "between" for record in study.state.ended)
        reporter.say(f"Continuing study {study.name}: {done} of {trials} trials are done")
    is_front = chosen.budget.lowest is not None
    worker = builders.build_worker(plan, study, reporter)
    loop = search_loop(
        plan,
        study,
        worker,
        reporter,
        executor=executor,
        on_trial=lambda record: reporter.say(_trial_line(record, study, trials, is_front=is_front)),
    )
    tracker = loop.tracker
    completed = False
    try:
        loop.run()
        _test(plan, study, worker, reporter)
        completed = True
    finally:
        if study.state.dense:
            show_if_possible(study, tracker)
        tracker.finish(completed=completed)
    print_report(study, Console(highlight=False))
    reporter.say(f"Figures: {study.folder / 'figures'}")
    point = "" if chosen.budget.lowest is None else " point=keep=RATIO"
    reporter.say(f"Next: lrbo compress study={chosen.study}{point} out=FOLDER, or: lrbo dashboard")
    return summary(study)


def _trial_line(record: TrialRecord, study: Study, trials: int, *, is_front: bool) -> str:
    """Return one line about a trial that ended."""
    index, origin = record.request.trial_index, record.request.origin
    head = f"Trial {index + 1:>3}/{trials} {origin:<7}"
    if record.is_stopped:
        return (
            f"{head} stopped after {record.metrics['tokens']:,.0f} tokens: loss "
            f"{record.metrics['objective']:.4f} +- {record.metrics['objective_sem']:.4f}, "
            f"{record.seconds['scoring']:5.1f} s"
        )
    if not record.is_completed:
        assert record.result is not None
        return f"{head} {record.result.outcome}: {record.result.error}"
    best = study.state.best()
    assert best is not None
    kept = f" at {record.metrics['keep_ratio']:.1%}" if is_front else ""
    mark = " *" if best.request.trial_index == index else ""
    seconds = record.seconds
    return (
        f"{head} perplexity {record.metrics['perplexity']:9.3f}{kept}  "
        f"best {best.metrics['perplexity']:9.3f}  {seconds['scoring']:5.1f} s "
        f"(+ {seconds['suggestion'] + seconds['allocation']:.1f} s to suggest){mark}"
    )


def _test(plan: builders.Plan, study: Study, worker: Worker, reporter: Reporter) -> None:
    """Score dense, uniform and best on the test text, once each."""
    windows = plan.windows["test"]
    best, uniform = study.state.best(), study.state.uniform
    wanted: dict[str, TrialRecord | None] = {"dense": None}
    if uniform is not None:
        wanted["uniform"] = uniform
    if best is not None:
        wanted["best"] = best
    for label, record in wanted.items():
        trial = None if record is None else record.request.trial_index
        if label in study.state.tests and study.state.tests[label]["trial"] == trial:
            continue
        with reporter.step(f"Test text, {label}", windows.scored_tokens, "tokens") as advance:
            sizes = {
                "batch_windows": plan.config.evaluation.batch_windows,
                "chunk_tokens": plan.config.evaluation.chunk_tokens,
            }
            if record is None:
                found = score(worker.model, windows.ids, **sizes, on_tokens=advance)
            else:
                with compressed(
                    worker.model,
                    record.request.allocation,
                    worker.factors,
                    tokens=windows.ids.numel(),
                    buffers=worker.buffers,
                ):
                    found = score(worker.model, windows.ids, **sizes, on_tokens=advance)
        metrics = {"nll": found.mean, "perplexity": found.value, "tokens": found.tokens}
        study.record("tested", label=label, trial=trial, text=windows.text, metrics=metrics)
