"""Run a search to its end, continuing what exists of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from lrbo.allocation.apply import compressed
from lrbo.commands import recover_best
from lrbo.config import saved
from lrbo.config.choices import LATENCIES
from lrbo.config.schema import SearchConfig
from lrbo.config.shell import command
from lrbo.errors import ConfigError
from lrbo.files import paths
from lrbo.files.atomic import cache_folder
from lrbo.models.devices import release_memory, resolve_device
from lrbo.pipeline import build_worker, planning
from lrbo.pipeline.feasibility import search_asked, study_of
from lrbo.pipeline.trial_loop import search_loop
from lrbo.progress import PlainConsole, Reporter
from lrbo.reports.mlflow_view import show_if_possible
from lrbo.reports.results import size_metric, summary
from lrbo.reports.search_progress import LiveSearch
from lrbo.reports.terminal import print_report
from lrbo.study import versions
from lrbo.study.journal import Study
from lrbo.tracking.tracker import Tracker
from lrbo.trials.ray_executor import RayExecutor, RaySettings, connected, find_problems
from lrbo.trials.records import Executor, InlineExecutor, TrialRequest, TrialResult
from lrbo.trials.worker import Worker


def run(config: SearchConfig, typed: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """Run a search as :func:`search` does, print its report, and return its summary."""
    study = search(config, typed, reporter)
    print_report(study, PlainConsole())
    reporter.say(f"Figures: {study.folder / 'figures'}")
    keys, size = dict(study.keys), size_metric(study)
    if size is not None:
        keys["point"] = f"{size if size in LATENCIES else 'keep'}=RATIO"
    reporter.say(f"Next: {command('compress', **keys, out='FOLDER')}, or: lrbo dashboard")
    return summary(study)


def search(config: SearchConfig, typed: Sequence[str], reporter: Reporter) -> Study:
    """Run a search to its end, continuing what exists of it, as ``search_asked`` says.

    Raises:
        ConfigError: Listing every problem, before any model is loaded.
        StudyError: If the study is locked, damaged or stuck.
    """
    study = study_of(config)
    config, problems = search_asked(config, typed, study)
    if problems and paths.check_writable("study", str(study.folder)):  # not even the lock
        raise ConfigError(problems)
    with study.locked():
        elsewhere: list[str] = []
        if config.executor.name == "ray":
            with suppress(ConfigError):  # of the device, which is named with the other values
                elsewhere = find_problems(_ray_settings(config))
        try:
            with reporter.waiting("Reading texts"):
                plan = planning.plan_search(config, study, problems)
        except ConfigError as error:
            raise ConfigError([*error.problems, *elsewhere]) from error
        if elsewhere := [*elsewhere, *recover_best.problems_of(plan)]:
            raise ConfigError(elsewhere)
        if study.exists:
            versions.note_changes(study)
        with _executor(plan, study) as executor:
            _search(plan, study, executor, reporter)
        if config.recover.enabled:
            release_memory()
            recover_best.recover_best(config, study, reporter)
    return study


def _ray_settings(config: SearchConfig) -> RaySettings:
    ray, uses_gpu = config.executor, resolve_device(config.model.device).type == "cuda"
    return RaySettings(ray.address, ray.workers, ray.devices, ray.oversubscribe, uses_gpu)


@contextmanager
def _executor(plan: planning.Plan, study: Study) -> Iterator[Executor]:
    """Yield where trials run; a cluster is reached before a model is loaded."""
    if plan.config.executor.name == "inline":
        yield InlineExecutor()
        return
    settings = _ray_settings(plan.config)
    build = partial(
        build_worker.study_worker,
        study.folder.absolute(),
        saved.to_yaml(plan.config),
        Path.cwd(),
        cache_folder().absolute(),
    )
    with connected(settings) as ray:
        executor = RayExecutor(ray, settings, build)
        try:
            yield executor
        finally:
            executor.shut_down()


def _search(plan: planning.Plan, study: Study, executor: Executor, reporter: Reporter) -> None:
    """Search, test and draw, with the study locked."""
    config = plan.config
    trials = config.search.trials
    done, name = len(study.state.searched), study.name
    if study.state.trials and done < trials:
        reporter.say(f"Continuing study {name}: {done} of {trials} trials are done")
    elif study.state.trials:
        reporter.say(
            f"Study {name}: its {done} trials are done; search.trials={done + 10} adds ten"
        )
    worker = build_worker.build_worker(plan, study, reporter)
    loop = search_loop(plan, study, worker, executor, reporter)
    here: Worker | None = None
    with _closing(study, loop.tracker, trials, reporter):
        with reporter.trials(trials) as show:
            live = LiveSearch(reporter, study, trials, show, lambda: executor.capacity)
            live.update()
            loop.on_trial, loop.proposing = live.ended, live.proposing
            if config.executor.name == "inline":
                loop.worker, here = live.scoring(worker), worker
            else:
                # Actors have model and factors of their own, which may be on the same device.
                loop.worker = _nowhere
                del worker
                release_memory()
            loop.run()
        _test(plan, study, here, reporter)


@contextmanager
def _closing(study: Study, tracker: Tracker, trials: int, reporter: Reporter) -> Iterator[None]:
    """Draw figures and close the run of a study, however its search ends.

    An interrupt draws nothing: that takes longer than whoever interrupts will wait.
    """

    def draw() -> None:
        if study.state.dense:
            with reporter.waiting("Drawing figures"):
                show_if_possible(study, tracker)

    completed = False
    try:
        try:
            yield
            completed = True
        except Exception:
            draw()
            raise
        draw()
    except KeyboardInterrupt:
        done = len(study.state.searched)
        reporter.say(f"Stopping: {done} of {trials} trials are in {study.journal}")
        raise
    finally:
        tracker.finish(completed=completed)


def _nowhere(request: TrialRequest) -> TrialResult:
    raise AssertionError(f"trial {request.trial_index} was to be evaluated beside the actors")


def _test(plan: planning.Plan, study: Study, worker: Worker | None, reporter: Reporter) -> None:
    """Score dense, uniform, analytic and best on the test text, each trial once."""
    state, windows = study.state, plan.windows["test"]
    records = {"uniform": state.uniform, "analytic": state.analytic, "best": state.best()}
    for label, record in ({"dense": None} | records).items():
        if record is None and label != "dense":
            continue
        trial = None if record is None else record.request.trial_index
        scores = [test for test in state.tests.values() if test["trial"] == trial]
        if state.tests.get(label) in scores:
            continue
        if not scores:
            worker = worker or build_worker.build_worker(plan, study, reporter)
            put_in: AbstractContextManager[object] = nullcontext()
            if record is not None:
                allocation, prepared = record.request.allocation, worker.prepared
                tokens, buffers = plan.task.positions(windows.examples), worker.buffers
                put_in = compressed(
                    worker.model, allocation, prepared, tokens=tokens, buffers=buffers
                )
            with put_in:
                losses = plan.losses(worker.model, "test", f"Test text, {label}", reporter).tolist()
            mean = math.fsum(losses) / len(losses)
            metrics = {**plan.task.record.measured(mean), "tokens": windows.scored}
            score = {"trial": trial, "text": windows.text, "metrics": metrics}
            scores = [score | {"example_losses": losses}]
        study.record("tested", label=label, **scores[0])
