"""What a stage of a recovery is given, and what it reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.progress import Reporter
from lrbo.recovery.trainable import Trainables
from lrbo.tasks.model_task import ModelTask


@dataclass(frozen=True)
class Recovery:
    """A compressed model in training beside the dense one that it was made of."""

    model: PreTrainedModel  # compressed, with trainable modules in place, on its device
    trainables: Trainables
    dense: PreTrainedModel  # frozen, on the same device
    task: ModelTask
    training: Int[Tensor, "windows tokens"]
    held_back: Int[Tensor, "others tokens"]  # that no step trains on
    settings: Any  # the stage's own options
    deadline: Callable[[], float]  # seconds left for this stage
    folder: Path  # where the stage may keep its own state; exists
    reporter: Reporter
    log: Callable[[str, float, int], None]  # metric, value and step, for MLflow
    seed: int
    tokens: int | None = None  # that a stage trains on at most; None: until its deadline


@dataclass(frozen=True)
class StageReport:
    """How a stage went."""

    name: str
    seconds: float
    steps: int
    tokens: int  # that its steps saw, with repetitions
    before: float  # held-out loss, of which the stage says what it is
    after: float
    stopped: str | None = None  # why it ended before its last step, if it did
    rows: tuple[dict[str, Any], ...] = ()  # of a stage of several parts
    trained: int = 0  # numbers
