"""What a form is: a family of what a unit can become, its levels and what they cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lrbo.models.specs import LayerSpec

Level = tuple[int, ...]
Levels = tuple[Any, ...]  # one level, or arrays of many
Costs = tuple[Any, Any, Any]  # parameters, bytes, multiply-adds: integers, or arrays
Integers = NDArray[np.int64]

INDEX_BYTES = 4  # int32
DENSE_FORM = "dense"
GROUP_SIZES = (16, 32, 64, 128, 256)  # inputs that share a scale


@dataclass(frozen=True)
class Grid:
    """Which levels are offered."""

    multiple: int = 1  # of ranks
    minimum: int = 0  # of the ranks of low-rank forms
    group_sizes: Sequence[int] = (64,)  # of quantized forms
    percentages: Sequence[int] = (50,)  # of the entries that sparse forms keep
    row_percentages: Sequence[int] = (5,)  # of the outputs that sparse forms keep
    blocks: Sequence[Sequence[int]] = ((2, 1), (1, 2))  # rows, columns; of Kronecker sums
    frequency_groups: Sequence[int] = (8,)  # of the rows of a table
    shared_outputs: int = 0  # of all layers that could share a factor with the unit; 0: none
    bands: Sequence[Sequence[int]] = ((2, 32),)  # directions of 8 bits, then of 3; of deltas


class Form(ABC):
    """A family of what a unit can become: its levels, and what each of them costs."""

    name: str  # in space.forms, in journals and in checkpoints
    by_rows: ClassVar[bool] = True  # whether rows can be looked up, as tables need
    in_blocks: ClassVar[bool] = True  # whether it is of layers in blocks, not of tables alone

    @abstractmethod
    def levels(self, unit: LayerSpec, grid: Grid) -> list[Integers]:
        """List the levels of a unit, ``(n, k)`` each, along which no loss ever rises."""

    @abstractmethod
    def cost(self, unit: LayerSpec, level: Levels, *, bias: bool, itemsize: int) -> Costs:
        """Return parameters, bytes, and multiply-adds per token, of all that is stored and run.

        Args:
            unit: To be stored so.
            level: Integers, or arrays of one shape; the costs are the same.
            bias: Whether the unit is stored with a bias, which dense knows itself.
            itemsize: Bytes of a parameter.
        """

    @abstractmethod
    def problem(self, out_features: int, in_features: int, level: Level) -> str | None:
        """Explain why a linear map of a shape cannot have a level; ``None`` where it can."""

    def suits(self, unit: LayerSpec) -> bool:
        """Whether it is a form of units like this: of tables, or of layers in blocks."""
        return self.by_rows if unit.block is None else self.in_blocks

    def label(self, level: Level) -> str:
        """Name a level for readers: ``"rank 96"``; the form itself where it has none."""
        return f"rank {level[0]}" if level else self.name


class Dense(Form):
    """The unit as it is: one level, which has no numbers."""

    name = DENSE_FORM

    @override
    def levels(self, unit: LayerSpec, grid: Grid) -> list[Integers]:
        return [np.empty((1, 0), dtype=np.int64)]

    @override
    def cost(self, unit: LayerSpec, level: Levels, *, bias: bool, itemsize: int) -> Costs:
        return unit.parameters, unit.parameters * itemsize, unit.out_features * unit.in_features

    @override
    def problem(self, out_features: int, in_features: int, level: Level) -> str | None:
        return f"dense has no level, got {list(level)}" if level else None
