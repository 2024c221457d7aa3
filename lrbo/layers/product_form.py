"""The forms of two thin matrices, in the numbers of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import override

from lrbo.layers.form import INDEX_BYTES, Costs, Form, Grid, Integers, Level, Levels
from lrbo.models.specs import LayerSpec


class Factored(Form):
    """Two thin matrices of a rank, the one level: ``rank * (out + in)`` parameters."""

    name = "factored"

    def stored(self, unit: LayerSpec, rank: Any) -> tuple[Any, int]:
        """Return the elements of the matrices, each used once per token, and the indices."""
        return rank * (unit.out_features + unit.in_features), 0

    @override
    def levels(self, unit: LayerSpec, grid: Grid) -> list[Integers]:
        first = max(-(-grid.minimum // grid.multiple), 1) * grid.multiple
        ranks = np.arange(first, min(unit.out_features, unit.in_features) + 1, grid.multiple)
        return [ranks[:, None].astype(np.int64)]

    @override
    def cost(self, unit: LayerSpec, level: Levels, *, bias: bool, itemsize: int) -> Costs:
        (rank,) = level
        elements, indices = self.stored(unit, rank)
        parameters = elements + (unit.out_features if bias else 0)
        return parameters, parameters * itemsize + INDEX_BYTES * indices, elements

    @override
    def problem(self, out_features: int, in_features: int, level: Level) -> str | None:
        largest = min(out_features, in_features)
        if len(level) != 1 or not 0 <= level[0] <= largest:
            return f"{self.name} has one rank from 0 to {largest}, got {list(level)}"
        return None


class Pivoted(Factored):
    """Some outputs, and the others as combinations of them: ``rank * (out + in) - rank**2``.

    The same function as :class:`Factored` in fewer parameters, and never more than the dense
    weight; where each output is, is stored as an index (Zhao et al., *PIFA*, ICML 2025).
    """

    name = "pivoted"

    @override
    def stored(self, unit: LayerSpec, rank: Any) -> tuple[Any, int]:
        return rank * (unit.out_features + unit.in_features) - rank * rank, unit.out_features
