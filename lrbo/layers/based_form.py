"""What forms with a base have in common: levels, and what a low rank over a base costs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from typing_extensions import override

from lrbo.config.choices import FLOATS
from lrbo.layers.form import Costs, Form, Grid, Integers, Level, Levels
from lrbo.models.specs import LayerSpec


@dataclass(frozen=True)
class Based(Form):
    """A base that stands for the weight, and a low rank of what it leaves.

    A level is that of the base, and the rank last. Both factors are integers, of 8 bits unless
    :attr:`factor_bits` says otherwise, with one scale per rank. In forms whose names end in
    ``_float`` they are numbers of the model's dtype, of 16 bits in most, without scales.
    """

    has_floats: bool = field(default=False, kw_only=True)

    @property
    @abstractmethod
    def base_name(self) -> str:
        """The name of the form with factors in integers."""

    @property
    def name(self) -> str:  # type: ignore[override]
        """For example ``"int4"``, or ``"int4_float"`` with factors in floats."""
        return f"{self.base_name}{FLOATS if self.has_floats else ''}"

    @property
    def factor_bits(self) -> int:
        """The bits of an integer of a factor."""
        return 8

    def bases(self, grid: Grid) -> list[Level]:
        """List the levels of the base; by default it has no numbers."""
        del grid
        return [()]

    @abstractmethod
    def base_cost(self, out_features: int, in_features: int, base: Levels, itemsize: int) -> Costs:
        """Return parameters, bytes and multiply-adds per token of a base alone."""

    def base_problem(self, out_features: int, in_features: int, base: Level) -> str | None:
        """Explain, after "needs", why a shape cannot have a base; ``None`` where it can.

        By default rows must be whole bytes of bits.
        """
        del out_features, base
        return None if in_features % 8 == 0 else f"a multiple of 8 inputs, not {in_features}"

    @abstractmethod
    def base_label(self, base: Level) -> str:
        """Name a base for readers."""

    def largest_rank(self, out_features: int, in_features: int) -> int:
        """Return the largest rank that is offered.

        An eighth of a square layer's rank costs two bits per weight in 8 bits, and a sixteenth in
        16: a wider base is always cheaper than more.
        """
        return min(out_features, in_features) // (16 if self.has_floats else 8)

    @override
    def levels(self, unit: LayerSpec, grid: Grid) -> list[Integers]:
        shape = unit.out_features, unit.in_features
        ranks = np.arange(0, self.largest_rank(*shape) + 1, grid.multiple, dtype=np.int64)
        return [
            np.column_stack([*(np.full_like(ranks, number) for number in base), ranks])
            for base in self.bases(grid)
            if self.base_problem(*shape, base) is None
        ]

    @override
    def cost(self, unit: LayerSpec, level: Levels, *, bias: bool, itemsize: int) -> Costs:
        *base, rank = level
        shape = unit.out_features, unit.in_features
        parameters, size, macs = self.base_cost(*shape, tuple(base), itemsize)
        factors, biases = rank * sum(shape), unit.out_features if bias else 0
        size += self.factor_bytes(*shape, tuple(base), rank, itemsize) + itemsize * biases
        return parameters + factors + biases, size, macs + factors

    def factor_bytes(
        self, out_features: int, in_features: int, base: Levels, rank: Any, itemsize: int
    ) -> Any:
        """Return the bytes of the factors of a rank over a base, scales included."""
        del base
        elements = rank * (out_features + in_features)
        if self.has_floats:
            return elements * itemsize
        return elements * self.factor_bits // 8 + itemsize * rank

    @override
    def problem(self, out_features: int, in_features: int, level: Level) -> str | None:
        largest = self.largest_rank(out_features, in_features)
        width = len(self.bases(Grid())[0]) + 1
        if len(level) != width or not 0 <= level[-1] <= largest:
            numbers = "one number" if width == 1 else f"{width} numbers"
            reason = f"has {numbers}, the last a rank from 0 to {largest}"
        elif (needs := self.base_problem(out_features, in_features, level[:-1])) is not None:
            reason = f"needs {needs}"
        else:
            return None
        return f"{self.name} {reason}, got {list(level)}"

    @override
    def label(self, level: Level) -> str:
        base, kind = self.base_label(level[:-1]), " in floats" if self.has_floats else ""
        return f"{base}, rank {level[-1]}{kind}" if level[-1] else base
