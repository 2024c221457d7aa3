"""Forms that several layers take together: all of an attention or MLP, or all with one input."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from lrbo.layers.form import Costs, Form, Grid, Integers, Level, Levels
from lrbo.models.specs import LayerSpec


class Joint(Form):
    """What several layers become together, at one level: by default all of an attention or MLP.

    Each layer has the option as its own, and counts what it stores of it. Of a whole part the layer
    that ends it answers for the loss.
    """

    by_rows = False
    is_whole: ClassVar[bool] = True  # of all layers of a part, not of those that read one input


class Neurons(Joint):
    """Some neurons of an MLP, the one level: thinner layers, of the kind that they were."""

    name = "neurons"

    @override
    def levels(self, unit: LayerSpec, grid: Grid) -> list[Integers]:
        if not unit.neurons:
            return []
        return [np.arange(grid.multiple, unit.neurons, grid.multiple, dtype=np.int64)[:, None]]

    @staticmethod
    def shape(unit: LayerSpec, count: Any) -> tuple[Any, Any]:
        """Return outputs and inputs of a layer of so many neurons; arrays are taken too."""
        if unit.is_closing:
            return unit.out_features, count
        # More than one for each neuron where gate and up are one layer.
        return count * (unit.out_features // unit.neurons), unit.in_features

    @override
    def cost(self, unit: LayerSpec, level: Levels, *, bias: bool, itemsize: int) -> Costs:
        outputs, inputs = self.shape(unit, *level)
        parameters = outputs * inputs + (outputs if unit.has_bias else 0)
        return parameters, parameters * itemsize, outputs * inputs

    @override
    def problem(self, out_features: int, in_features: int, level: Level) -> str | None:
        largest = max(out_features, in_features)
        if len(level) != 1 or not 1 <= level[0] <= largest:
            return f"{self.name} has one number from 1 to {largest}, got {list(level)}"
        return None

    @override
    def label(self, level: Level) -> str:
        return f"{level[0]} neurons"


class Skip(Joint):
    """Nothing is run: what the part added on average is added, as a bias of its last layer."""

    name = "skip"

    @override
    def levels(self, unit: LayerSpec, grid: Grid) -> list[Integers]:
        return [] if unit.closing is None else [np.empty((1, 0), dtype=np.int64)]

    @override
    def cost(self, unit: LayerSpec, level: Levels, *, bias: bool, itemsize: int) -> Costs:
        parameters = unit.out_features if unit.is_closing else 0
        return parameters, parameters * itemsize, 0

    @override
    def problem(self, out_features: int, in_features: int, level: Level) -> str | None:
        return f"{self.name} has no level, got {list(level)}" if level else None

    @override
    def label(self, level: Level) -> str:
        return "skipped"


class SharedFactored(Joint):
    """Two thin matrices of a rank, of which layers that read the same input have the right one.

    Together ``rank * (in + sum of outs)`` parameters. The first of them, that of
    :attr:`LayerSpec.site`, stores, runs and counts the right matrix.

    References:
        Peng et al., *Data-free Weight Compress and Denoise for Large Language Models*, 2024, where
        it is called joint rank-k approximation.
    """

    name = "shared_factored"
    is_whole = False

    @override
    def levels(self, unit: LayerSpec, grid: Grid) -> list[Integers]:
        if not grid.shared_outputs:
            return []
        first = max(-(-grid.minimum // grid.multiple), 1) * grid.multiple
        most = self.largest_rank(unit.in_features, grid.shared_outputs)
        return [np.arange(first, most + 1, grid.multiple, dtype=np.int64)[:, None]]

    @staticmethod
    def largest_rank(inputs: int, outputs: int) -> int:
        """Return the largest rank of layers of so many outputs together that is not above dense."""
        return inputs * outputs // (inputs + outputs)

    @override
    def cost(self, unit: LayerSpec, level: Levels, *, bias: bool, itemsize: int) -> Costs:
        (rank,) = level
        elements = rank * unit.out_features
        if unit.name == unit.site:
            elements += rank * unit.in_features
        parameters = elements + (unit.out_features if bias else 0)
        return parameters, parameters * itemsize, elements

    @override
    def problem(self, out_features: int, in_features: int, level: Level) -> str | None:
        if len(level) != 1 or not 1 <= level[0] <= in_features:
            return f"{self.name} has one rank from 1 to {in_features}, got {list(level)}"
        return None

    @override
    def label(self, level: Level) -> str:
        return f"shared rank {level[0]}"


WHOLE_PARTS = frozenset(form.name for form in (Neurons, Skip, SharedFactored) if form.is_whole)
