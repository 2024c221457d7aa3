"""What a recovery needs and can know before a model is loaded: checkpoint, dense model, text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lrbo.checkpoints import export, quantizer
from lrbo.checkpoints.calibration_text import SEEN_LIMIT, seen_shares
from lrbo.checkpoints.trained import stored_in
from lrbo.config.recovery import STAGES, STUDY_TEXT
from lrbo.config.schema import RecoverConfig
from lrbo.data.windows import Role, TokenWindows
from lrbo.errors import (
    CheckpointError,
    Collecting,
    ConfigError,
    DataError,
    ModelError,
    StudyError,
)
from lrbo.layers.modules import compressed_layers
from lrbo.models.devices import dtype_name, resolve_device, resolve_dtype
from lrbo.models.limits import Limits
from lrbo.models.pairs import base_source, other_settings
from lrbo.models.parameters import fingerprint
from lrbo.models.sources import ModelSource
from lrbo.models.specs import ModelMap
from lrbo.pipeline import checks
from lrbo.pipeline.recovery_text import TEXTS, seen_problems, split, windows_of
from lrbo.recovery import memory, states
from lrbo.recovery.adapter import Shapes, adapter_problems, count_numbers
from lrbo.recovery.gradients import windows_for
from lrbo.recovery.mixed_rank import mixed_rank_problems, units_of
from lrbo.recovery.trainable import matrix_shapes
from lrbo.study.journal import Study
from lrbo.study.study_record import study_folder
from lrbo.tasks.causal_lm import CausalLM
from lrbo.tasks.model_task import ModelTask


@dataclass(frozen=True)
class RecoveryPlan:
    """A recovery that can begin.

    Models are read in ``loaded`` and multiplied in ``compute``; what is written has the dtypes of
    the checkpoint, ``stored``.
    """

    config: RecoverConfig
    folder: Path
    about: Mapping[str, Any]  # what the checkpoint says of how it was made
    source: ModelSource  # of the dense model
    study: Study | None  # of the checkpoint, if it is at hand
    windows: Mapping[Role, TokenWindows]
    task: ModelTask
    device: torch.device
    compute: torch.dtype
    stored: torch.dtype
    texts: tuple[Role, ...] = TEXTS  # that are scored

    @property
    def loaded(self) -> torch.dtype:
        """The dtype that the models are read in: float32 where everything is in float32."""
        return torch.float32 if self.compute == torch.float32 else self.stored

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a recovery to go on."""
        return {
            "checkpoint": str(self.folder.absolute()),
            "checkpoint.digest": _digest_of(self.folder),
            "model.path": self.source.path,
            "model.dtype": dtype_name(self.compute),
            **{f"data.{role}": each.digest for role, each in self.windows.items()},
            **self.config.recover.effective,
            "seed": self.config.seed,
        }

    @cached_property
    def is_solved(self) -> bool:
        """Whether a refit has solved layers on text to train on, all of it or some."""
        trials = (self.about.get("refit") or {"trials": []})["trials"]
        if not any(each["taken"] for each in trials):
            return False
        if self.config.data.name == STUDY_TEXT:
            return True
        shares = seen_shares(self.folder, self.windows["calibration"].ids) or {}
        return any(s > SEEN_LIMIT for name, s in shares.items() if name.startswith("calibration"))

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the windows to train on, and those to judge by, which no step or refit has seen.

        After a refit these are of the validation text, which judged the refit as well.

        Raises:
            DataError: If there is one window alone.
        """
        if self.is_solved:
            return self.windows["calibration"].ids, self.windows["validation"].ids
        return split(self.windows["calibration"], self.config.recover.held_back)

    def require_dense(self, dense: PreTrainedModel) -> None:
        """Refuse another dense model than that which was compressed, if the checkpoint says which.

        Raises:
            ModelError: With both fingerprints.
        """
        expected = self.about.get("base_fingerprint")
        if expected is None:
            return
        dtype = self.about.get("validation", {}).get("dtype")
        current = fingerprint(dense, getattr(torch, dtype) if dtype else None)
        if current != expected:
            raise ModelError(
                f"the dense model {self.source.label} has the fingerprint {current}, and "
                f"{self.folder} was made of one with {expected}: its weights or config.json "
                "changed, or it is another model. Restore it, or name it with model.path="
            )


def plan_recovery(
    config: RecoverConfig, study: Study | None = None, texts: tuple[Role, ...] = TEXTS
) -> RecoveryPlan:
    """Check everything that can be checked before a model is loaded.

    Without a ``study``, that of the checkpoint is looked for in the folder of studies.

    Raises:
        ConfigError: Listing every problem.
    """
    checks.require_valid(config)
    folder, problems = Path(config.checkpoint), list[str]()
    device = checkpoint = None
    with Collecting(problems, ConfigError):
        device = resolve_device(config.model.device)
    with Collecting(problems, CheckpointError, ModelError):
        checkpoint = _checkpoint(folder)
    if device is None or checkpoint is None:
        raise ConfigError(problems)
    about = checkpoint.quantization_config["provenance"]
    source, skeleton = _dense(config, about, folder, checkpoint, problems)
    study = study or _study(config, about)
    windows = None
    with Collecting(problems, DataError, StudyError, ModelError):
        windows = windows_of(config, folder, about, source, study)
    if windows is not None:
        limits = Limits.of(checkpoint, str(folder))
        problems += limits.of_windows({f"data.{r}": each.ids for r, each in windows.items()})
        if not config.allow_seen:
            problems += seen_problems(config, folder, windows, study)
    if source is None or windows is None or skeleton is None or problems:
        raise ConfigError(problems)
    out = states.folder_of(Path(config.out))
    with Collecting(problems, CheckpointError):
        # What is faster is measured: a recovery goes on with what it began with.
        begun = states.begun(out).get("model.dtype") if config.model.dtype == "auto" else None
    if problems:
        raise ConfigError(problems)
    compute = resolve_dtype(begun or config.model.dtype, device)
    stored = getattr(torch, export.stored_dtype(folder) or "float32")
    task = CausalLM()
    plan = RecoveryPlan(
        config, folder, about, source, study, windows, task, device, compute, stored, texts
    )
    shapes, units = _trainable(skeleton, checkpoint)
    if "adapter" in config.recover.stages:
        problems += adapter_problems(config.recover.adapter, shapes)
    if "mixed_rank" in config.recover.stages:
        problems += mixed_rank_problems(units)
    with Collecting(problems, DataError):
        problems += _room(plan, skeleton, shapes)
    with Collecting(problems, CheckpointError):
        problems += states.differences(out, plan.settings)
    if problems:
        raise ConfigError(problems)
    return plan


def _checkpoint(folder: Path) -> Any:
    """Read the configuration of a checkpoint that can be trained."""
    if (folder / export.CODE).is_file():
        raise CheckpointError(
            f"checkpoint={str(folder)!r} has a modelling file (format=remote_code); expected what "
            "lrbo compress writes with format=lrbo"
        )
    config = export.load_config(folder)
    if config.quantization_config["auto_class"] != CausalLM.auto_class:
        raise CheckpointError(
            f"checkpoint={str(folder)!r} opens with {config.quantization_config['auto_class']}; "
            "expected a causal language model"
        )
    return config


def _dense(
    config: RecoverConfig,
    about: Mapping[str, Any],
    folder: Path,
    checkpoint: Any,
    problems: list[str],
) -> tuple[ModelSource | None, PreTrainedModel | None]:
    """Look for the dense model where it is said to be, and build it without its weights."""
    named, stated = config.model.path, about.get("base_model")
    if named is None and stated is None:
        problems.append(
            f"checkpoint={str(folder)!r} does not say which dense model it was made of; give "
            "model.path=FOLDER"
        )
        return None, None
    source = base_source(named) if named is not None else ModelSource(**(stated or {}))
    where = "model.path" if named is not None else f"the record of {folder}"
    advice = "" if named is not None else "; if it is elsewhere, give model.path=FOLDER"
    if missing := source.missing_package():
        problems.append(f"the dense model, looked for where {where} says: {missing}{advice}")
        return source, None
    path = Path(source.path)
    if (
        source.source == "hf"
        and not path.is_dir()
        and (path.is_absolute() or source.path.startswith(".") or source.path.count("/") > 1)
    ):
        problems.append(
            f"the dense model is not there: {where} says {source.path!r}, and there is no such "
            f"folder{advice}"
        )
        return source, None
    skeleton = None
    with Collecting(problems, ModelError):
        try:
            skeleton = CausalLM.skeleton(source)
        except ModelError as error:
            raise ModelError(
                f"the dense model, looked for where {where} says: {error}{advice}"
            ) from error
        if "base_fingerprint" not in about:
            with torch.device("meta"):
                own = type(skeleton)(checkpoint)
            if others := other_settings(own, skeleton):
                raise ModelError(
                    f"the dense model {source.label} is not what {folder} was made of: "
                    f"{'; '.join(others[:3])}; name it with model.path="
                )
    return source, skeleton


def _study(config: RecoverConfig, about: Mapping[str, Any]) -> Study | None:
    """Open the study that the checkpoint is of, if it is in the folder of studies."""
    name = about.get("study")
    if not isinstance(name, str):
        return None
    with suppress(StudyError):
        study = Study(study_folder(config.studies, name), config.studies)
        if study.exists and study.about.model_fingerprint == about.get("base_fingerprint"):
            return study
    return None


def _trainable(skeleton: PreTrainedModel, checkpoint: Any) -> tuple[Shapes, list[tuple[str, ...]]]:
    """Return the matrices of a checkpoint, and its layers that the dense model has as well."""
    with torch.device("meta"):
        model = type(skeleton)(checkpoint)
    quantizer.put_in(model, quantizer.LowRankConfig.from_dict(checkpoint.quantization_config))
    return matrix_shapes(model), units_of(model, compressed_layers(model))


def _room(plan: RecoveryPlan, skeleton: PreTrainedModel, shapes: Shapes) -> list[str]:
    """List what memory and disks cannot hold."""
    layers, stored = plan.task.map(skeleton), stored_in(plan.folder)
    recover, scratch = plan.config.recover, int(plan.config.recover.blocks.memory_gib * 2**30)
    sizes = _sizes(plan, skeleton, layers, stored, shapes)
    stages, out = recover.stages, Path(plan.config.out)
    return [
        *memory.memory_problems(sizes, stages, scratch, plan.device),
        *memory.disk_problems(sizes, stored, out, stages, scratch),
    ]


def _sizes(
    plan: RecoveryPlan,
    skeleton: PreTrainedModel,
    layers: ModelMap,
    stored: Mapping[str, Any],
    shapes: Shapes,
) -> memory.Sizes:
    recover = plan.config.recover
    batches = {name: int(getattr(recover, name).batch_windows) for name in STAGES}
    if recover.mixed_rank.consistency:
        batches["mixed_rank"] *= 2
    units = export.load_config(plan.folder).quantization_config["units"]
    wider = plan.loaded.itemsize / plan.stored.itemsize
    blocks = {spec.name: spec.block for spec in layers.layers}
    trained: dict[int, int] = {}
    for name, tensor in stored.items():
        unit = next((u for u in units if name.startswith(f"{u}.")), None)
        if tensor.is_floating_point() and (unit is not None or tensor.dim() <= 1):
            block = -1 if unit is None else blocks.get(unit)
            block = -1 if block is None else block
            trained[block] = trained.get(block, 0) + tensor.numel()
    count = 1 + max((spec.block for spec in layers.layers if spec.block is not None), default=0)
    inside = [spec.out_features for spec in layers.layers if spec.block == 0]
    table = skeleton.get_input_embeddings().weight
    training, weighs = torch.cat(plan.parts()), recover.blocks.weighting == "gradient"
    return memory.Sizes(
        dense=int(layers.parameters * plan.loaded.itemsize),
        compressed=int(sum(tensor.nbytes for tensor in stored.values()) * wider),
        trained=trained,
        windows=len(training),
        weighed=windows_for(int(table.shape[1]), *training.shape) if weighs else 0,
        tokens=training.shape[1],
        features=int(table.shape[1]),
        inside=2 * sum(inside),
        blocks=count,
        vocabulary=int(table.shape[0]),
        itemsize=plan.loaded.itemsize,
        batches=batches,
        matrices=sum(rows * columns for rows, columns in shapes.values()),
        updates=count_numbers(recover.adapter, shapes) if "adapter" in recover.stages else 0,
    )


def _digest_of(folder: Path) -> str:
    """Return a digest of the files of a checkpoint's weights."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
