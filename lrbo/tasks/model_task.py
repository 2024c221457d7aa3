"""What a task computes with a model: losses, their gradients, and how far it is from dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrbo.models.sources import ModelSource
from lrbo.models.specs import ModelMap
from lrbo.tasks.metrics import Task

Labels = Literal["sampled", "data"]
OnLogits = Callable[[Tensor, Tensor], None] | None  # called with inputs of a head, and logits
OnScored = Callable[[int], None] | None  # called with the number of predictions after each chunk


@runtime_checkable
class Segments(Protocol):
    """A model as what comes before its blocks, the blocks, and what comes after them.

    Hidden states between them are ``(examples, positions, features)``. A model without blocks is
    one block. ``model`` is in evaluation mode, and never changed for longer than a call.
    """

    model: nn.Module

    @property
    def device(self) -> torch.device:
        """Where blocks run."""

    def __len__(self) -> int: ...

    def open_block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Give a block for the length of a ``with``."""

    def embed(self, examples: Any) -> Tensor:
        """Input of the first block, outside of any graph."""

    def run(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run one block; follows the caller's gradient mode."""

    def finish(self, hidden: Tensor) -> Tensor:
        """States of which losses are computed, from the output of the last block."""


@runtime_checkable
class Reference(Protocol):
    """Predictions of the dense model for some examples, made once per study."""

    @property
    def loss(self) -> float:
        """Mean loss."""

    @property
    def scored(self) -> int:
        """Number of predictions."""

    def save(self, path: Path) -> None:
        """Write a file for :meth:`ModelTask.load_reference`."""


@runtime_checkable
class ModelTask(Protocol):
    """A task with the tensors: everything between the model and the numbers of a trial.

    Methods that read a model raise ModelError if there is none, or it is damaged or of no known
    family; those that score it raise NonFiniteError, with the count, for losses that are not
    finite.
    """

    record: ClassVar[Task]
    auto_class: ClassVar[str]  # of transformers, which opens a checkpoint

    def skeleton(self, source: ModelSource) -> PreTrainedModel:
        """Build the model on the meta device."""

    def load(
        self, source: ModelSource, *, dtype: torch.dtype | None, device: torch.device
    ) -> PreTrainedModel:
        """Load the model for inference; ``dtype=None`` is that of its files."""

    def tokenizer(self, source: ModelSource) -> PreTrainedTokenizerBase | None:
        """Load what is written beside the weights to make examples of text, if anything."""

    def map(self, model: PreTrainedModel) -> ModelMap:
        """Map the layers of a model, which may be on the meta device."""

    def segments(self, model: Any) -> Segments:
        """Split a model into segments."""

    def problems(self, model: PreTrainedModel, name: str, examples: Mapping[str, Any]) -> list[str]:
        """List the examples, by their key, that a model of this name cannot read."""

    def positions(self, examples: Any) -> int:
        """Count the inputs that a layer is given for examples."""

    def output_gradients(
        self,
        segments: Segments,
        states: Tensor,
        examples: Any,
        *,
        labels: Labels,
        seed: int,
        batch_windows: int,
        on_logits: OnLogits = None,
    ) -> int:
        """Replace the last block's output by the gradient of the summed loss with respect to it.

        ``states`` are ``(examples, positions, features)``, overwritten in batches. Labels are
        sampled from the model's own predictions, or those of the data. ``on_logits`` is given only
        where the map covers a head. Returns the number of predictions with a loss; StatisticsError
        if there are none.
        """

    def distance(self, segments: Segments, dense: Tensor, other: Tensor) -> float:
        """Mean divergence of two finished states, in the unit of the loss."""

    def losses(self, model: Any, examples: Any, *, on_scored: OnScored = None) -> Tensor:
        """Mean loss of each example, ``(examples,)``, float64 on the CPU."""

    def compared(
        self, model: Any, examples: Any, reference: Any, first: int, *, on_scored: OnScored = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and divergence of every prediction, both ``(examples, predictions)``, float64.

        The examples are consecutive ones of those of the reference, from number ``first`` on.
        """

    def measure_dense(self, model: Any, examples: Any, *, on_scored: OnScored = None) -> Reference:
        """Score the dense model, and store what others are compared with."""

    def load_reference(self, path: Path) -> Reference:
        """Read a file of :meth:`Reference.save`; StudyError if it is damaged."""
