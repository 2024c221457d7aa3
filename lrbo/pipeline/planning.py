"""A configuration -> a plan: everything that can be made and checked without the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.calibration.collect import CalibrationSettings
from lrbo.config.schema import ModelConfig, SearchConfig
from lrbo.data import documents
from lrbo.data.windows import (
    Role,
    RoleExamples,
    TokenWindows,
    load_windows,
    make_windows,
    save_windows,
)
from lrbo.errors import BudgetError, Collecting, ConfigError, DataError, ModelError, StudyError
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.joint import NEEDS as JOINT_NEEDS
from lrbo.factorization.prediction import ERROR_NEEDS
from lrbo.factorization.registry import method_named
from lrbo.layers.forms import is_joint
from lrbo.layers.joint_form import WHOLE_PARTS
from lrbo.models.devices import dtype_name, resolve_device, resolve_dtype
from lrbo.models.loading import load_tokenizer
from lrbo.models.pairs import (
    SAME,
    BaseModel,
    base_source,
    changed_beside,
    is_same,
    unlike,
    with_changes,
)
from lrbo.models.sources import ModelSource
from lrbo.models.specs import ModelMap
from lrbo.optimization.space import STARTS, Space, Start
from lrbo.pipeline.prepare import Preparation, curve_needs, needs_of_tables
from lrbo.pipeline.search_space import base_options, build_search_space, build_starts
from lrbo.progress import Reporter
from lrbo.study.journal import Study
from lrbo.study.study_record import follows
from lrbo.tasks.model_task import ModelTask
from lrbo.tasks.registry import TASKS


@dataclass(frozen=True)
class ExampleSource:
    """Makes the examples of a task, saves and loads them; DataError if there are too few."""

    make: Callable[[SearchConfig, ModelSource], dict[Role, Any]]
    save: Callable[[Path, Mapping[Role, Any]], object]
    load: Callable[[Path], dict[Role, Any]]


def _token_windows(config: SearchConfig, source: ModelSource) -> dict[Role, TokenWindows]:
    pool_tokens, tokenizer = config.evaluation.pool_tokens, load_tokenizer(source)
    return make_windows(config.data, tokenizer, seed=config.seed, pool_tokens=pool_tokens)


SOURCES: MutableMapping[str, ExampleSource] = {
    "causal_lm": ExampleSource(_token_windows, save_windows, load_windows)
}


@dataclass(frozen=True)
class Plan:
    """What a search needs and can know before a model is loaded.

    The model runs in ``dtype``; bytes are counted in ``stored_dtype``, that of its files, in which
    a checkpoint is written. ``windows`` are examples. With a ``base``, all that is counted is what
    the model adds to it.
    """

    config: SearchConfig
    source: ModelSource
    layers: ModelMap
    method: FactorizationMethod
    task: ModelTask
    dtype: torch.dtype
    stored_dtype: torch.dtype
    space: Space
    windows: Mapping[Role, RoleExamples]
    starts: tuple[Start, ...] = STARTS
    base: BaseModel | None = None

    @property
    def preparation(self) -> Preparation:
        """What statistics and factors depend on."""
        settings = CalibrationSettings(**vars(self.config.calibration), seed=self.config.seed)
        needs = curve_needs(self.method) if self.config.sensitivity.enabled else self.method.needs
        needs |= needs_of_tables(self.layers)
        bases = BasePlan.of(self.config.space.forms, base_options(self.config))
        if bases is not None:
            needs |= bases.needs
        errors = self.config.space.type == "thresholds"
        if errors:
            needs |= ERROR_NEEDS
        joint = tuple(name for name in self.config.space.forms if is_joint(name))
        if any(name in WHOLE_PARTS for name in joint):
            needs |= JOINT_NEEDS
        windows = self.windows["calibration"].examples
        return Preparation(
            self.source,
            self.layers,
            self.method,
            needs,
            windows,
            settings,
            self.task,
            bases,
            errors,
            joint,
            self.base,
        )

    @property
    def added_biases(self) -> list[str]:
        """The units to which the method adds a bias where they are not dense."""
        units, adds_bias = self.layers.compressible, self.method.adds_bias
        return [unit.name for unit in units if unit.is_biased(adds_bias) and not unit.has_bias]

    @property
    def follows(self) -> dict[str, Any]:
        """The part of ``study.json`` that follows from configuration and model."""
        return {
            **follows(self.config, self.layers.compressible, dtype_name(self.stored_dtype)),
            "model_parameters": self.layers.parameters,
            "added_biases": self.added_biases,
            "layers": [asdict(spec) for spec in self.layers.layers],
            "variables": {name: list(ends) for name, ends in self.space.bounds.items()},
        }

    def losses(
        self, model: PreTrainedModel, role: Role, description: str, reporter: Reporter
    ) -> Tensor:
        """Score a model on the text of a role, as a step: the mean loss of each example."""
        windows = self.windows[role]
        with reporter.step(description, windows.scored, self.task.record.counted) as advance:
            return self.task.losses(model, windows.examples, on_scored=advance)


def model_source(config: ModelConfig) -> ModelSource:
    """Return where the configured model comes from."""
    return ModelSource(cast(Any, config.source), config.path, config.revision)


def plan_search(config: SearchConfig, study: Study, problems: list[str]) -> Plan:
    """Check everything that can be checked without the weights; an existing study has its windows.

    Raises:
        ConfigError: Listing the given problems and every further one; the model is not looked at
            where values, packages or device are a problem already.
        StudyError: If ``study.json`` says otherwise than configuration and model.
    """
    source = model_source(config.model)
    missing = [source.missing_package()]
    base = None if config.model.base is None else base_source(config.model.base)
    if base is not None:
        missing.append(base.missing_package())
    if config.data.source == "packaged":
        missing.append(documents.missing_package())
    problems = [*problems, *filter(None, missing)]
    device = None
    with Collecting(problems, ConfigError):
        device = resolve_device(config.model.device)
        if config.latency.enabled and study.exists and study.about.device != str(device):
            problems.append(
                f"model.device={config.model.device!r} is {device} here: study {study.name} timed "
                f"its trials on {study.about.device}, and times of two devices make no "
                "front; continue it there, or begin another study=NAME"
            )
    if device is None or problems:
        raise ConfigError(problems)
    if study.exists:
        dtype: torch.dtype = getattr(torch, study.about.dtype)
    else:
        dtype = resolve_dtype(config.model.dtype, device)
    options = {key: value for key, value in config.method.items() if key != "name"}
    method = method_named(config.method["name"], options)
    scoring = config.evaluation
    task = TASKS[config.task](
        batch_windows=scoring.batch_windows,
        chunk_tokens=scoring.chunk_tokens,
        kl_top=scoring.kl_top,
    )
    if config.latency.enabled and task.auto_class != "AutoModelForCausalLM":
        problems.append(
            f"latency.enabled=true: prefill and decoding of language models are timed, and "
            f"task={config.task} has neither"
        )
    layers = space = windows = skeleton = stored = None
    starts: tuple[Start, ...] = ()
    with Collecting(problems, ConfigError, ModelError, BudgetError):
        skeleton = task.skeleton(source)
        layers = task.map(skeleton).covering(config.budget.include)
        stored = skeleton.dtype
        if base is not None:
            key = f"model.base={config.model.base!r}"
            problems += unlike(skeleton, task.skeleton(base), key)
        space = build_search_space(config, layers.compressible, method, stored)
    if layers is not None:
        donors = study.about.donors if study.exists else ()
        with Collecting(problems, ConfigError):
            starts = build_starts(config.warm_start, layers.compressible, config.studies, donors)
    with Collecting(problems, DataError, StudyError, ModelError):
        windows = examples_of(config, source, study)
    if skeleton is not None and windows is not None:
        examples = {f"data.{role}": each.examples for role, each in windows.items()}
        problems += task.problems(skeleton, config.model.name, examples)
    if layers is None or stored is None or space is None or windows is None or problems:
        raise ConfigError(problems)
    shared = None
    if base is not None:
        layers, shared = _pair(layers, source, base, task, study)
    plan = Plan(config, source, layers, method, task, dtype, stored, space, windows, starts, shared)
    about: Mapping[str, Any] = study.about.fields if study.exists else {}
    others = [key for key, value in plan.follows.items() if about and about[key] != value]
    if others:
        raise StudyError(
            f"{study.folder / 'study.json'} says other {', '.join(others)} than configuration and "
            "model give: the file was changed, or the model was. Restore it, or begin another "
            "study=NAME"
        )
    return plan


def _pair(
    layers: ModelMap, source: ModelSource, base: ModelSource, task: ModelTask, study: Study
) -> tuple[ModelMap, BaseModel]:
    """Count what a model adds to its base: the map without what they share, and the base.

    A new study reads both models once; one that exists says what it was.

    Raises:
        ConfigError: If they are the same.
    """
    if study.exists and (fingerprint := study.about.base_fingerprint) is not None:
        return replace(layers, parameters=study.about.model_parameters), BaseModel(
            base, fingerprint
        )
    cpu = torch.device("cpu")
    model, other = (task.load(each, dtype=None, device=cpu) for each in (source, base))
    if is_same(model, other):
        raise ConfigError([f"model.base={base.path!r}: {SAME}"])
    changed = changed_beside(model, other, layers)
    return with_changes(layers, changed), BaseModel.of(base, other)


def examples_of(
    config: SearchConfig, source: ModelSource, study: Study
) -> Mapping[Role, RoleExamples]:
    """Return the examples of a study: those that it has, or new ones.

    Of validation these are the whole pool until windows have been selected from it. A file that is
    missing or damaged is made again where the texts still give the tokens of the study.

    Raises:
        DataError: If a text is missing, or too short.
        StudyError: If they are not the tokens that the study was begun with.
    """
    file, examples = tokens_file(study), SOURCES[config.task]
    if not study.exists:  # a file alone may be of settings that were given up
        return examples.make(config, source)
    expected: Mapping[Any, Any] = study.about.data
    windows: dict[Role, Any] = {}
    with suppress(DataError):
        windows = examples.load(file)
    if _differing(windows, expected):
        windows = examples.make(config, source)
        if differing := _differing(windows, expected):
            raise StudyError(
                f"{file} is missing, damaged or of other tokens, and the texts give others by now "
                f"for {', '.join(differing)}: their digests are not those in study.json. Restore "
                "the file or the texts, or begin another study=NAME"
            )
        study.remake(file, lambda: examples.save(file, windows))
    if selection := study.state.selection:
        windows["validation"] = windows["validation"].only(selection["windows"])
        if windows["validation"].digest != selection["digest"]:
            raise StudyError(
                f"{study.journal}: the windows of the event chosen have the digest "
                f"{windows['validation'].digest}, it says {selection['digest']}; restore the "
                "file, or begin another study=NAME"
            )
    return windows


def _differing(
    windows: Mapping[Role, RoleExamples], expected: Mapping[Role, Mapping[str, object]]
) -> list[Role]:
    """Return the roles whose windows are not those that a study was begun with."""
    actual = {role: (len(each.examples), each.digest) for role, each in windows.items()}
    begun = {role: (about["windows"], about["digest"]) for role, about in expected.items()}
    return [role for role, each in begun.items() if actual.get(role) != each]


def tokens_file(study: Study) -> Path:
    """Return the file of a study's examples; of validation, the whole pool."""
    return study.folder / "tokens.safetensors"
