"""Run a search to its end, continuing what exists of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrbo import builders, config, paths, versions
from lrbo.calibration.corpus import TokenWindows
from lrbo.commands.asked import donor_problems, search_asked, study_of
from lrbo.commands.live import live_search
from lrbo.commands.trials import search_loop
from lrbo.commands.view import show_if_possible
from lrbo.compression import compressed
from lrbo.errors import ConfigError
from lrbo.evaluation.perplexity import Perplexity, score_windows
from lrbo.executors.base import Executor
from lrbo.executors.inline import InlineExecutor
from lrbo.executors.ray_tasks import RayExecutor, RaySettings, connected, find_problems
from lrbo.loading import resolve_device
from lrbo.optimization.front import LATENCIES
from lrbo.optimization.study import Study
from lrbo.progress import Reporter
from lrbo.report import print_report
from lrbo.results import size_metric, summary
from lrbo.schema import SearchConfig
from lrbo.shell import command
from lrbo.storage import cache_folder
from lrbo.terminal import PlainConsole
from lrbo.tracking import Tracker
from lrbo.trial import TrialRecord, TrialRequest, TrialResult
from lrbo.worker import Worker


def run(chosen: SearchConfig, typed: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """Run a search to its end, print its report, and return its summary.

    Args and errors are those of :func:`search`.
    """
    study = search(chosen, typed, reporter)
    print_report(study, PlainConsole())
    reporter.say(f"Figures: {study.folder / 'figures'}")
    size = size_metric(study)
    wanted = dict(study.keys)
    if size is not None:
        wanted["point"] = f"{size if size in LATENCIES else 'keep'}=RATIO"
    reporter.say(f"Next: {command('compress', **wanted, out='FOLDER')}, or: lrbo dashboard")
    return summary(study)


def search(chosen: SearchConfig, typed: Sequence[str], reporter: Reporter) -> Study:
    """Run a search to its end, continuing what exists of it.

    Args:
        chosen: The composed values.
        typed: Overrides as typed. If none of them changes what is measured, an existing study
            is continued with its own values, so that its name is all one needs to type.
        reporter: Shows progress.

    Raises:
        ConfigError: Listing every problem, before any model is loaded.
        StudyError: If the study is locked, damaged or stuck.
    """
    study = study_of(chosen)
    chosen, problems = search_asked(chosen, typed, study)
    problems += donor_problems(chosen, study)
    if problems and paths.check_writable("study", str(study.folder)):  # not even the lock
        raise ConfigError(problems)
    with study.locked():
        elsewhere = _executor_problems(chosen)
        try:
            with reporter.waiting("Reading texts"):
                plan = builders.plan_search(chosen, study, problems)
        except ConfigError as error:
            raise ConfigError([*error.problems, *elsewhere]) from error
        if elsewhere:
            raise ConfigError(elsewhere)
        if study.exists:
            versions.note_changes(study)
        with _executor(plan, study) as executor:
            _search(plan, study, executor, reporter)
    return study


def _executor_problems(chosen: SearchConfig) -> list[str]:
    """Return why trials cannot run where they are to; a cluster is asked."""
    if chosen.executor.name != "ray":
        return []
    try:
        return find_problems(_ray_settings(chosen))
    except ConfigError:  # of the device, which is named with the other values
        return []


def _ray_settings(chosen: SearchConfig) -> RaySettings:
    """Return where trials run.

    Raises:
        ConfigError: If the device of the model is not there.
    """
    given = chosen.executor
    return RaySettings(
        address=given.address,
        workers=given.workers,
        devices=given.devices,
        oversubscribe=given.oversubscribe,
        uses_gpu=resolve_device(chosen.model.device).type == "cuda",
    )


@contextmanager
def _executor(plan: builders.Plan, study: Study) -> Iterator[Executor]:
    """Yield where trials run; a cluster is reached before a model is loaded."""
    if plan.config.executor.name == "inline":
        yield InlineExecutor()
        return
    settings = _ray_settings(plan.config)
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


def _search(plan: builders.Plan, study: Study, executor: Executor, reporter: Reporter) -> None:
    """Search, test and draw, with the study locked."""
    chosen = plan.config
    trials = chosen.search.trials
    if study.state.trials:
        done = len(study.state.searched)
        if done < trials:
            reporter.say(f"Continuing study {study.name}: {done} of {trials} trials are done")
        else:
            reporter.say(
                f"Study {study.name}: its {done} trials are done; search.trials={done + 10} "
                "adds ten"
            )
    worker = builders.build_worker(plan, study, reporter)
    loop = search_loop(plan, study, worker, reporter, executor=executor)
    here: Worker | None = None
    with _closing(study, loop.tracker, trials, reporter):
        with live_search(reporter, study, chosen, lambda: executor.capacity) as live:
            loop.on_trial, loop.proposing = live.ended, live.proposing
            if chosen.executor.name == "inline":
                loop.worker, here = live.scoring(worker), worker
            else:
                # Actors have model and factors of their own, which may be on the same device.
                # Here they are needed again for the test text only, and come from the cache.
                loop.worker = _nowhere
                del worker
                _release_memory()
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
    """Stand for the worker where every actor has its own."""
    raise AssertionError(f"trial {request.trial_index} was to be evaluated beside the actors")


def _release_memory() -> None:
    """Give memory of what nobody holds any more back to device and system."""
    gc.collect()  # models hold themselves in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _test(plan: builders.Plan, study: Study, worker: Worker | None, reporter: Reporter) -> None:
    """Score dense, uniform, analytic and best on the test text: each trial once.

    Args:
        plan: Of the study.
        study: Locked.
        worker: Has model and factors; ``None`` loads them, if anything is to be scored.
        reporter: Shows progress.
    """
    windows, state = plan.windows["test"], study.state
    records = {"uniform": state.uniform, "analytic": state.analytic, "best": state.best()}
    wanted: dict[str, TrialRecord | None] = {"dense": None}
    wanted |= {label: record for label, record in records.items() if record is not None}
    for label, record in wanted.items():
        trial = None if record is None else record.request.trial_index
        known = [t for t in state.tests.values() if t["trial"] == trial]
        if known and state.tests.get(label) in known:
            continue
        if not known:
            worker = worker or builders.build_worker(plan, study, reporter)
            known = [_tested(plan, worker, label, record, windows, reporter)]
        study.record("tested", label=label, **known[0])


def _tested(
    plan: builders.Plan,
    worker: Worker,
    label: str,
    record: TrialRecord | None,
    windows: TokenWindows,
    reporter: Reporter,
) -> dict[str, Any]:
    """Return what a trial, or the dense model, scores on the test text, for the journal."""
    ids = windows.ids
    put_in: AbstractContextManager[object] = nullcontext()
    if record is not None:
        put_in = compressed(
            worker.model,
            record.request.allocation,
            worker.factors,
            tokens=ids.numel(),
            buffers=worker.buffers,
        )
    with reporter.step(f"Test text, {label}", windows.scored_tokens, "tokens") as advance, put_in:
        losses = score_windows(
            worker.model,
            ids,
            batch_windows=plan.config.evaluation.batch_windows,
            chunk_tokens=plan.config.evaluation.chunk_tokens,
            on_tokens=advance,
        ).tolist()
    total = Perplexity.of_windows(losses, ids.shape[1] - 1)
    return {
        "trial": None if record is None else record.request.trial_index,
        "text": windows.text,
        "metrics": {"nll": total.mean, "perplexity": total.value, "tokens": total.tokens},
        "window_nll": losses,
    }
