"""Frequency groups of a table as a form: which levels a unit has, and what they cost."""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import override

from lrbo.layers.form import INDEX_BYTES, Costs, Form, Grid, Integers, Level, Levels
from lrbo.models.specs import LayerSpec


class FrequencyGroups(Form):
    """Groups of rows, those of frequent tokens together, each with thin factors of its own.

    A level is the number of groups, and that of directions, which the groups share: a frequent
    one has more. All groups but the last have as many rows, so a direction costs as much in any,
    ``rows / groups + in`` parameters. The position of each row in the order of the groups is an
    index, and so is the rank of each group.

    References:
        Chen et al., *GroupReduce: Block-Wise Low-Rank Approximation for Neural Language Model
        Shrinking*, NeurIPS 2018, with ranks by what they save in place of the mean frequency.
    """

    name = "frequency_groups"
    in_blocks = False

    @staticmethod
    def rows(out_features: int, groups: Any) -> Any:
        """Return the rows of a group, of which the last may have fewer; arrays are taken too."""
        return -(-out_features // groups)

    @classmethod
    def can_be(cls, out_features: int, groups: int) -> bool:
        """Whether so many groups leave rows to the last."""
        return groups >= 2 and (groups - 1) * cls.rows(out_features, groups) < out_features

    @classmethod
    def largest(cls, out_features: int, in_features: int, groups: int) -> int:
        """Return the most directions: with fewer parameters than dense, and that there are."""
        rows: int = cls.rows(out_features, groups)
        last = out_features - (groups - 1) * rows
        most = (groups - 1) * min(rows, in_features) + min(last, in_features)
        cheaper: int = (out_features * in_features - 1) // (rows + in_features)
        return min(most, cheaper)

    @override
    def levels(self, unit: LayerSpec, grid: Grid) -> list[Integers]:
        shape = unit.out_features, unit.in_features
        runs = []
        for groups in grid.frequency_groups:
            if not self.can_be(unit.out_features, groups):
                continue
            first = max(-(-grid.minimum * groups // grid.multiple), 1) * grid.multiple
            counts = np.arange(first, self.largest(*shape, groups) + 1, grid.multiple)
            counts = counts.astype(np.int64)
            runs.append(np.column_stack([np.full_like(counts, groups), counts]))
        return runs

    @override
    def cost(self, unit: LayerSpec, level: Levels, *, bias: bool, itemsize: int) -> Costs:
        groups, count = level
        elements = count * (self.rows(unit.out_features, groups) + unit.in_features)
        parameters = elements + (unit.out_features if bias else 0)
        indices = unit.out_features + groups
        return parameters, parameters * itemsize + INDEX_BYTES * indices, elements

    @override
    def problem(self, out_features: int, in_features: int, level: Level) -> str | None:
        got = f", got {list(level)}"
        if len(level) != 2:
            return f"{self.name} has a number of groups, and one of directions{got}"
        groups, count = level
        if not self.can_be(out_features, groups):
            return (
                f"{self.name} needs from 2 groups on that all have some of {out_features} rows{got}"
            )
        largest = self.largest(out_features, in_features, groups)
        if not 1 <= count <= largest:
            return f"{self.name} has from 1 to {largest} directions in {groups} groups{got}"
        return None

    @override
    def label(self, level: Level) -> str:
        groups, count = level
        return f"{count} direction{'s' if count > 1 else ''} in {groups} groups"
