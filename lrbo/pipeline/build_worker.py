"""A plan -> a worker: the model, its factors and the scores of the dense model."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lrbo.allocation.apply import on_device
from lrbo.allocation.loss_calibration import LossCalibration, sensitivity_file
from lrbo.allocation.loss_curves import SensitivitySettings, measure_losses, points_of
from lrbo.allocation.transfer import Donor
from lrbo.config.choices import STEPS
from lrbo.config.saved import from_yaml, to_yaml
from lrbo.errors import ModelError, StudyError
from lrbo.evaluation.timing import TimingSettings
from lrbo.factorization.prepared import Prepared
from lrbo.models.devices import dtype_name, resolve_device
from lrbo.models.parameters import fingerprint
from lrbo.optimization.space import Space
from lrbo.pipeline.choose_windows import choose_windows
from lrbo.pipeline.planning import SOURCES, Plan, plan_search, tokens_file
from lrbo.pipeline.prepare import without_effect
from lrbo.pipeline.search_space import base_options, largest_ranks, menus_of
from lrbo.progress import PlainConsole, Reporter
from lrbo.study.journal import Study
from lrbo.study.study_record import StudyRecord
from lrbo.study.versions import versions
from lrbo.tasks.model_task import Reference
from lrbo.trials.racing import Race
from lrbo.trials.worker import Worker


def build_worker(plan: Plan, study: Study, reporter: Reporter) -> Worker:
    """Load the model, gather statistics, factor it and score it dense, each only once.

    Statistics and factors come from the cache if they are there, tokens and dense scores from the
    study, which must be locked and begins here if it is new.

    Raises:
        StudyError: If the study was begun with another model.
    """
    config, dtype = plan.config, plan.dtype
    device = resolve_device(config.model.device)
    with reporter.waiting("Loading the model"):
        model = plan.task.load(plan.source, dtype=dtype, device=device)
    loaded = plan.task.map(model).covering(config.budget.include)
    if plan.base is not None:  # of which those that it shares are not counted
        loaded = replace(loaded, parameters=plan.layers.parameters)
    if loaded != plan.layers:
        raise ModelError(
            f"model {plan.source.path!r} has {loaded.parameters:,} parameters, expected "
            f"{plan.layers.parameters:,} from its config.json, which does not say what its files "
            f"hold. Download it (hf download {plan.source.path} --local-dir FOLDER) and give "
            "model.path=FOLDER, whose files are read first."
        )
    reporter.say(
        f"Model {config.model.name}: {plan.layers.parameters:,} parameters, {dtype} on {device}"
    )
    if plan.base is not None:
        reporter.say(
            f"Those are what it adds to the base {config.model.base} (fingerprint "
            f"{plan.base.fingerprint}), which is shared and not counted"
        )
    if study.exists:
        require_same_model(study, model)
        digest = study.about.model_fingerprint
    else:
        digest = fingerprint(model)
        SOURCES[config.task].save(tokens_file(study), plan.windows)
        study.begin(_about(plan, digest, device), to_yaml(config))
    stored = plan.preparation.factors(digest, dtype, device, reporter, model)
    if idle := without_effect(plan.layers, stored):
        reporter.say(idle)
    # The file serves every form, and some use few of its directions.
    menus = menus_of(
        plan.layers.compressible,
        config.space.forms,
        plan.method,
        plan.stored_dtype,
        options=base_options(config),
        measure=plan.space.problem.budget.measure,
    )
    ranks = largest_ranks(menus, plan.space.problem.budget.measure)
    prepared = on_device(model, stored, ranks)
    if config.evaluation.pool_tokens is not None and not study.state.selection:
        space = informed_space(plan, study, model, prepared, reporter)
        subset = choose_windows(plan, study, space, model, prepared, reporter)
        plan = replace(plan, windows={**plan.windows, "validation": subset})
    timed, racing = config.latency, config.search.racing
    timing = TimingSettings(
        (timed.tokens or config.data.window,),
        steps=STEPS,
        repeats=timed.repeats,
        warmup=timed.warmup,
    )
    return Worker(
        model=model,
        layers=plan.layers,
        itemsize=plan.stored_dtype.itemsize,
        prepared=prepared,
        windows=plan.windows["validation"].examples,
        dense=_dense_reference(plan, model, study, reporter),
        task=plan.task,
        batch_windows=config.evaluation.batch_windows,
        latency=timing if timed.enabled else None,
        race=None if racing is None else Race(racing, config.search.kl_weight),
    )


def study_worker(folder: Path, config_yaml: str, working_folder: Path, cache: Path) -> Worker:
    """Build the worker of a study, or raise StudyError if this machine does not see its folder."""
    study = Study(folder)
    if not study.exists:
        raise StudyError(
            f"{platform.node()} does not see {folder}: all nodes need the study and the cache "
            f"({cache}) under the same paths, on a file system that they share"
        )
    os.environ["LRBO_CACHE"] = str(cache)
    if working_folder.is_dir():
        os.chdir(working_folder)
    plan = plan_search(from_yaml(config_yaml, "the configuration of the search"), study, [])
    return build_worker(plan, study, Reporter(PlainConsole(quiet=True)))


def require_same_model(study: StudyRecord, model: PreTrainedModel) -> None:
    """Raise StudyError, with both fingerprints, unless the study was begun with this model."""
    begun = study.about.model_fingerprint
    current = fingerprint(model, getattr(torch, study.about.dtype))
    if current != begun:
        raise StudyError(
            f"study {study.name} was begun with a model of fingerprint {begun}, "
            f"{model.name_or_path or 'the model'} now has {current}: its weights or config.json "
            "changed. Restore them, or start another study=NAME."
        )


def _dense_reference(
    plan: Plan, model: PreTrainedModel, study: Study, reporter: Reporter
) -> Reference:
    """Load the dense model's scores of the validation examples from the study, or measure them."""
    record, windows, scored = plan.task.record, plan.windows["validation"], study.state.dense
    file, dense = study.folder / "dense.safetensors", None
    if file.exists():
        with suppress(StudyError):
            loaded = plan.task.load_reference(file)
            same_loss = not scored or loaded.loss == scored[record.minimized.name]
            dense = loaded if same_loss and loaded.scored == windows.scored else None
        if dense is None:
            reporter.say(f"{file} is damaged, or of another study; the dense model is scored again")
    if dense is None:
        with reporter.step("Dense model on validation text", windows.scored, record.counted) as on:
            dense = plan.task.measure_dense(model, windows.examples, on_scored=on)
        dense.save(file)
        reporter.say(f"Dense distributions kept: {file.stat().st_size / 2**20:.1f} MiB")
    if not scored:
        study.record("dense", metrics={**record.measured(dense.loss), "tokens": dense.scored})
    return dense


def _about(plan: Plan, digest: str, device: torch.device) -> dict[str, Any]:
    """Return the fields of :class:`lrbo.study.about.About`."""
    return {
        "study_id": uuid.uuid4().hex,
        "model_fingerprint": digest,
        "dtype": dtype_name(plan.dtype),
        "stored_dtype": dtype_name(plan.stored_dtype),
        "device": str(device),
        "data": {
            role: {"text": w.text, "windows": len(w.examples), "digest": w.digest}
            for role, w in plan.windows.items()
        },
        **plan.follows,
        "base_fingerprint": None if plan.base is None else plan.base.fingerprint,
        "donors": [asdict(start) for start in plan.starts if isinstance(start, Donor)],
        "versions": versions(),
    }


def informed_space(
    plan: Plan,
    study: StudyRecord,
    model: PreTrainedModel,
    factors: Mapping[str, Prepared],
    reporter: Reporter,
) -> Space:
    """The space with predicted losses, checked against the model once per study.

    Those of embedding, head and whole attentions or MLPs are scaled by what was measured.
    """
    space = plan.space.with_prepared(factors)
    if not plan.config.sensitivity.enabled:
        return space
    file = sensitivity_file(study.folder)
    calibration = check_predictions(plan, file, model, factors, reporter)
    problem = space.problem.with_losses(factors)
    if calibration is not None:
        problem = replace(problem, menus=calibration.corrected(problem.menus))
    return space.of(problem)


def check_predictions(
    plan: Plan,
    file: Path,
    model: PreTrainedModel,
    factors: Mapping[str, Prepared],
    reporter: Reporter,
) -> LossCalibration | None:
    """Measure what some layers cost alone, to say how well single layers are predicted.

    On text that was not calibrated on: on its own the predictions hold, and lack what is seldom in
    it. A head of SmolLM2-135M without its weakest third of ranks costs 0.05 nats per token on 4,096
    tokens of calibration, where 0.04 are predicted, and 0.49 on others.

    Measurements do not correct the predictions of single layers in blocks: on SmolLM2-135M,
    corrections by three layers per kind gave worse allocations at keep ratios 0.6 and 0.8, since a
    layer alone does not show what it costs among others. Where ``file`` holds measurements,
    nothing is measured. Returns ``None`` where nothing is to be.

    Raises:
        StudyError: If measurements could not be kept, before there are any.
    """
    sizes, layers, task = plan.config.sensitivity, plan.layers, plan.task
    settings = SensitivitySettings(sizes.layers_per_kind, sizes.ranks, sizes.windows)
    if not settings.layers_per_kind or not plan.space.problem.with_losses(factors).is_predicted:
        return None
    if file.exists():
        if not file.is_file():
            raise StudyError(f"{file} is no file, expected measurements or nothing; move it away")
        try:
            return LossCalibration.load(file)
        except StudyError as error:
            reporter.say(f"{error}; it is measured again")
    body, windows = task.segments(model), plan.windows["validation"].examples
    points = points_of(layers.compressible, factors, plan.space.problem.menus, settings)
    with reporter.step("Loss of layers", len(points), "points") as advance:
        measured = measure_losses(
            body,
            points,
            factors,
            windows,
            settings,
            task=task,
            layers=layers.compressible,
            on_point=advance,
        )
    calibration = LossCalibration(tuple(measured))
    calibration.save(file)
    reporter.say(
        f"Predicted against measured loss of single layers, {len(measured)} points: rank "
        f"correlation {calibration.rank_correlation:.3f}"
    )
    return calibration
