"""Train a compressed checkpoint a little, and write it with the same options and bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lrbo.checkpoints import export, trained
from lrbo.config import saved, schema
from lrbo.config.recovery import BlocksConfig
from lrbo.config.saved import command_line
from lrbo.config.schema import RecoverConfig
from lrbo.config.shell import assigned
from lrbo.errors import LrboError
from lrbo.files.rendering import render
from lrbo.files.tables import Table, columns
from lrbo.models.devices import dtype_name
from lrbo.models.loading import load_tokenizer
from lrbo.models.sources import ModelSource
from lrbo.pipeline.recovering import RecoveryPlan, plan_recovery
from lrbo.pipeline.recovery_text import TEXTS
from lrbo.progress import Reporter
from lrbo.recovery import adapter, blocks, distill, mixed_rank, states
from lrbo.recovery.stage import Recovery, StageReport
from lrbo.recovery.trainable import Trainables, make_trainable
from lrbo.reports.mlflow_view import enter_checkpoint, make_tracker
from lrbo.reports.terminal import print_table
from lrbo.study.versions import versions
from lrbo.tasks.metrics import MISSING
from lrbo.tracking.recovery_run import MlflowRecoveryRun, RecoveryRun
from lrbo.tracking.tracker import MlflowTracker, Tracker

STAGES: Mapping[str, Any] = {
    "blocks": blocks,
    "distill": distill,
    "adapter": adapter,
    "mixed_rank": mixed_rank,
}
MODELS = ("dense", "before", "after")
CPU = torch.device("cpu")


def run(config: RecoverConfig, reporter: Reporter) -> dict[str, Any]:
    """Train the small numbers of a checkpoint towards the dense model that it was made of.

    Raises:
        ConfigError: Listing every problem, before a model is loaded.
        ModelError: If the dense model is another one, or a layer cannot be trained.
        NonFiniteError: If a loss is not finite; what was finished before it is kept.
    """
    with reporter.waiting("Reading texts"):
        plan = plan_recovery(config)
    result = recover(plan, reporter, _tracker(plan))
    scores = {model: {text: result[text][model] for text in TEXTS} for model in MODELS}
    if plan.study is not None:
        _enter(plan, scores)
    if config.output == "text":
        print_table(_table(plan, scores))
    return result


def recover(plan: RecoveryPlan, reporter: Reporter, tracker: Tracker | None) -> dict[str, Any]:
    """Train a checkpoint, going on where that was interrupted, and write it.

    Returns:
        ``folder``, ``bytes``, ``dtype``, by each text that is scored the scores of the dense
        model, before and after, and the reports of the ``stages``.

    Raises:
        ConfigError: If it was begun with other settings.
        ModelError: If the dense model is another one, or a layer cannot be trained.
        NonFiniteError: If a loss is not finite; what was finished before it is kept.
    """
    config = plan.config
    state = states.State(states.folder_of(Path(config.out)), plan.settings)
    if not state.is_new:
        reporter.say(f"Going on with what is finished in {state.folder}")
    with state.locked():
        shown = _shown(plan, state, tracker)
        try:
            result = _recovered(plan, state, shown, reporter)
        except BaseException as error:
            shown.finish({}, "FAILED" if isinstance(error, LrboError) else "KILLED")
            raise
    state.remove()
    return result


def _recovered(
    plan: RecoveryPlan, state: states.State, shown: RecoveryRun, reporter: Reporter
) -> dict[str, Any]:
    out = Path(plan.config.out)
    scores = _scored_before(plan, state, reporter)
    with reporter.waiting("Loading the models"):
        dense, model = (_load(plan, name, plan.loaded) for name in MODELS[:2])
    trainables = make_trainable(model)
    reports = _trained(plan, state, dense, model, trainables, shown, reporter)
    del dense
    trainables.store_()
    trained.round_(model, trained.stored_in(plan.folder))

    def describe(folder: Path) -> tuple[dict[str, Any], str]:
        written = export.load(folder, dtype=plan.compute, device=plan.device)
        scores["after"] = _scores(plan, written, "after", reporter)
        about = _about(plan, state.identity, reports, scores)
        return about, _card(plan, reports, _table(plan, scores))

    size = trained.save(
        out,
        plan.folder,
        model,
        load_tokenizer(ModelSource("hf", str(plan.folder))),
        describe,
        windows=plan.windows,
    )
    numbers = {
        f"{text}_{name}_{metric}": value
        for name, texts in scores.items()
        for text, values in texts.items()
        for metric, value in values.items()
    }
    shown.finish(numbers, "FINISHED")
    reporter.say(f"How to open it, what it scored and how it was made: {out / export.CARD}")
    return {
        "folder": str(out),
        "bytes": size,
        "dtype": dtype_name(plan.compute),
        **{text: {name: scores[name][text] for name in MODELS} for text in plan.texts},
        "stages": [asdict(report) for report in reports],
    }


def _about(
    plan: RecoveryPlan, identity: str, reports: list[StageReport], scores: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the record of a recovery for the checkpoint."""
    return {
        "validation_as_written": {
            **scores["after"]["validation"],
            "dtype": dtype_name(plan.compute),
        },
        "recovery": {
            "id": identity,
            "settings": plan.settings,
            "stages": [asdict(report) for report in reports],
            "scores": scores,
            "text": {role: each.text for role, each in plan.windows.items()},
            "versions": versions(),
        },
    }


def _scored_before(plan: RecoveryPlan, state: states.State, reporter: Reporter) -> dict[str, Any]:
    """Score the dense model and the compressed one, once, in the dtype that they run in."""
    scores = state.scores()
    for name in MODELS[:2]:
        if name in scores:
            continue
        if name == "dense":  # in the dtype of its files, in which its fingerprint is taken
            with reporter.waiting("Loading the dense model"):
                plan.require_dense(plan.task.load(plan.source, dtype=None, device=CPU))
        with reporter.waiting("Loading the model"):
            model = _load(plan, name, plan.compute)
        scores[name] = _scores(plan, model, name, reporter)
        state.keep_scores(scores)
    return scores


def _load(plan: RecoveryPlan, name: str, dtype: torch.dtype) -> PreTrainedModel:
    if name == "dense":
        return plan.task.load(plan.source, dtype=dtype, device=plan.device)
    return export.load(plan.folder, dtype=dtype, device=plan.device)


def _scores(
    plan: RecoveryPlan, model: PreTrainedModel, name: str, reporter: Reporter
) -> dict[str, Any]:
    """Score a model on each text that is to be scored."""
    scores: dict[str, Any] = {}
    for text in plan.texts:
        windows = plan.windows[text]
        step = f"{text.capitalize()} text, {name}"
        with reporter.step(step, windows.scored, plan.task.record.counted) as advance:
            losses = plan.task.losses(model, windows.examples, on_scored=advance)
        scores[text] = plan.task.record.measured(float(losses.mean()))
    return scores


def _trained(
    plan: RecoveryPlan,
    state: states.State,
    dense: PreTrainedModel,
    model: PreTrainedModel,
    trainables: Trainables,
    shown: RecoveryRun,
    reporter: Reporter,
) -> list[StageReport]:
    """Run the stages that are not finished yet; the minutes are for all of them."""
    recover = plan.config.recover
    training, held_back = plan.parts()
    if plan.is_solved:
        reporter.say(
            "The validation text judges: a refit has solved on text that would be held back"
        )
    left = 60.0 * recover.minutes
    reports: list[StageReport] = []
    for number, name in enumerate(recover.stages, start=1):
        if (finished := state.finished(name)) is not None:
            report, tensors = finished
            trainables.load_state(tensors)
        else:
            settings, stage = getattr(recover, name), STAGES[name]
            others = len(recover.stages) - number
            has_own = others and isinstance(settings, BlocksConfig)
            share = settings.share if has_own else 1 / (1 + others)
            # What an interrupted run of it has used counts too.
            end = time.monotonic() + share * left - stage.spent(state.stage_folder(name))
            recovery = Recovery(
                model=model,
                trainables=trainables,
                dense=dense,
                task=plan.task,
                training=training,
                held_back=held_back,
                settings=settings,
                deadline=partial(_left, end),
                folder=state.stage_folder(name),
                reporter=reporter,
                log=shown.log,
                seed=plan.config.seed,
                tokens=recover.tokens,
            )
            with _computing(plan.device, plan.compute, plan.loaded):
                report = stage.run(recovery)
            state.finish(report, trainables.state())
        left = max(left - report.seconds, 0.0)
        reports.append(report)
        reporter.say(_sentence(report))
    return reports


def _left(end: float) -> float:
    """Return the seconds until a moment of the monotonic clock."""
    return end - time.monotonic()


def _computing(device: torch.device, compute: torch.dtype, loaded: torch.dtype) -> Any:
    """Multiply in a narrower dtype than that of the parameters, where that is faster."""
    if compute == loaded:
        return nullcontext()
    # A cache would hold rounded parameters beyond the step that changes them.
    return torch.autocast(device.type, compute, cache_enabled=False)


def _sentence(report: StageReport) -> str:
    change = "stays" if report.after >= report.before else f"from {report.before:.4f} to"
    stopped = f"; {report.stopped}" if report.stopped else ""
    return (
        f"Stage {report.name}: held-out loss {change} {report.after:.4f}, {report.steps:,} steps "
        f"on {report.tokens:,} tokens{stopped}"
    )


def _table(plan: RecoveryPlan, scores: Mapping[str, Any]) -> Table:
    metric = plan.task.record.headline
    rows = [
        [
            name,
            *(metric.of(scores[name][text]) if name in scores else MISSING for text in plan.texts),
        ]
        for name in MODELS
    ]
    heads = [f"{text} {metric.label}" for text in plan.texts]
    return Table(f"Recovery, scored in {dtype_name(plan.compute)}", columns("model", *heads), rows)


def _card(plan: RecoveryPlan, reports: list[StageReport], table: Table) -> str:
    path, name = plan.folder / export.CARD, Path(plan.config.out).name
    roles = ("calibration", *plan.texts)
    text = {role: each.text for role, each in plan.windows.items() if role in roles}
    section = render(
        "recovery.md", stages=reports, text=text, table=table, is_solved=plan.is_solved
    )
    skipped = ("studies", "output")
    values = {k: v for k, v in schema.flat(plan.config).items() if k not in skipped}
    values |= {"checkpoint": plan.folder.name, "out": name}
    line = command_line("recover", values, str(plan.about.get("study")))
    card = path.read_text(encoding="utf-8") if path.is_file() else None
    return trained.with_section(card, name, section, line)


def _tracker(plan: RecoveryPlan) -> Tracker | None:
    """Return that of the study, if the study is at hand."""
    if plan.study is None:
        return None
    stored = saved.continued(plan.study.config, [assigned("studies", plan.config.studies)])
    return make_tracker(stored, plan.study)


def _shown(plan: RecoveryPlan, state: states.State, tracker: Tracker | None) -> RecoveryRun:
    """Show the recovery below the study's run, if that is tracked."""
    if not isinstance(tracker, MlflowTracker):
        return RecoveryRun()
    name = f"recovery-{Path(plan.config.out).name}"
    return MlflowRecoveryRun(tracker, state.identity, name, plan.settings)


def _enter(plan: RecoveryPlan, scores: Mapping[str, Any]) -> None:
    """Make what was written a version of the study's registered model."""
    out = Path(plan.config.out)
    study, trial = plan.study, plan.about.get("trial")
    assert study is not None
    if not isinstance(trial, int):
        return
    stored = saved.continued(study.config, [assigned("studies", plan.config.studies)])
    headline = plan.task.record.headline.name
    tags: dict[str, str] = {text: f"{scores['after'][text][headline]:.4f}" for text in TEXTS}
    tags |= {"format": "lrbo", "dtype": dtype_name(plan.compute)}
    tags |= {"keep_ratio": f"{plan.about['keep_ratio']:.4f}"}
    enter_checkpoint(stored, study, out, trial, plan.config.register, tags)
