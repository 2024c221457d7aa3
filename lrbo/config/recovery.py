"""The section recover: what is trained after compression, how, and for how long."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lrbo.config import options
from lrbo.config.distillation import (
    ADAMW,
    MUON,
    AdapterConfig,
    DistillConfig,
    MixedRankConfig,
    TrainingConfig,
    training_problems,
)
from lrbo.config.options import ANY_COUNT, Rule, one_of, option

STAGES = ("blocks", "distill", "adapter", "mixed_rank")  # by name
DEFAULT_STAGES = STAGES[:2]
STUDY_TEXT = "study"  # data.name where the text is that of the checkpoint's study


def _are_stages(names: list[str]) -> bool:
    return {*names} <= {*STAGES} and 0 < len(names) == len({*names})


@dataclass
class DenseConfig:
    """The dense model, and what everything runs in."""

    path: str | None = None
    dtype: str = option("auto", one_of(("auto", "float32", "bfloat16")))
    device: str = "auto"


@dataclass
class BlocksConfig:
    """How blocks are trained one by one."""

    optimizer: str = option(ADAMW, one_of((MUON, ADAMW)))
    lr: float = option(5e-4, options.ABOVE_0)
    epochs: int = option(8, ANY_COUNT)
    batch_windows: int = option(2, ANY_COUNT)
    warmup: float = option(0.1, options.BELOW_1)
    weight_decay: float = option(0.01, options.FROM_0)
    weighting: str = option("none", one_of(("gradient", "none")))
    share: float = option(0.5, options.ABOVE_0_TO_1)
    memory_gib: float = option(2.0, options.FROM_0)


@dataclass
class RecoverySection:
    """What is trained, and for how long."""

    minutes: float = option(10.0, options.ABOVE_0)
    tokens: int | None = option(None, ANY_COUNT.or_null())
    stages: list[str] = option(
        lambda: [*DEFAULT_STAGES], Rule(f"some of {', '.join(STAGES)}, each once", _are_stages)
    )
    held_back: float = option(0.125, Rule("above 0 and below 1", lambda v: 0 < v < 1))
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    mixed_rank: MixedRankConfig = field(default_factory=MixedRankConfig)

    @property
    def effective(self) -> dict[str, Any]:
        """Values by key, without the options of stages that are not among ``stages``."""
        unused = {*STAGES} - {*self.stages}
        values = {k: v for k, v in asdict(self).items() if k not in unused}
        return options.flatten(values, "recover.")


def stage_problems(config: RecoverySection) -> list[str]:
    """List what options of a stage cannot be together."""
    return [
        problem
        for name in STAGES
        if isinstance(settings := getattr(config, name), TrainingConfig)
        for problem in training_problems(settings, f"recover.{name}.")
    ]


@dataclass
class SearchRecovery(RecoverySection):
    """What is trained of each of the best trials of a search, and for how long."""

    enabled: bool = False
    candidates: int = option(3, ANY_COUNT)

    @property
    def section(self) -> RecoverySection:
        """How each of them is trained."""
        names = [each.name for each in fields(RecoverySection)]
        return RecoverySection(**{name: getattr(self, name) for name in names})
