"""Kronecker sums as a form: which levels a unit has, and what they cost."""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import override

from lrbo.layers.form import Costs, Form, Grid, Integers, Level, Levels
from lrbo.models.specs import LayerSpec

MOST = 16  # terms: each is fitted by itself


class Kronecker(Form):
    """A sum of Kronecker products ``A_k (x) B_k``, each a matrix of blocks ``a_ij B``.

    A level is the shape of ``A``, ``rows`` by ``columns``, and the number of terms. ``B`` is a
    block, ``out / rows`` by ``in / columns``. A term has the parameters of ``A`` and ``B``. It is
    run on an input as a matrix, which ``A`` multiplies from one side and ``B`` from the other, in
    the order of fewer multiply-adds.

    References:
        Edalati et al., *Kronecker Decomposition for GPT Compression* (KnGPT2), ACL 2022, for one
        term; Benallal et al., *Krony-PT*, 2024, for several.
    """

    name = "kronecker"
    by_rows = False

    @staticmethod
    def block(out_features: int, in_features: int, left: Level) -> Level:
        """Return the rows and columns of ``B`` beside an ``A`` of some shape."""
        return out_features // left[0], in_features // left[1]

    @staticmethod
    def orders(out_features: int, in_features: int, left: Levels) -> tuple[Any, Any]:
        """Count the multiply-adds of a term with ``A`` first, and with ``B`` first."""
        rows, columns = left
        block_rows, block_columns = out_features // rows, in_features // columns
        left_first = rows * block_columns * (columns + block_rows)
        right_first = columns * block_rows * (block_columns + rows)
        return left_first, right_first

    @classmethod
    def macs(cls, out_features: int, in_features: int, level: Levels) -> Any:
        """Count the multiply-adds of a level per token, in the order of fewer."""
        *left, terms = level
        first, second = cls.orders(out_features, in_features, tuple(left))
        return terms * (first + (second - first) * (second < first))

    @classmethod
    def largest(cls, out_features: int, in_features: int, left: Level) -> int:
        """Return the most terms: with fewer parameters than a dense weight, up to ``MOST``."""
        block = cls.block(out_features, in_features, left)
        cheaper = (out_features * in_features - 1) // (left[0] * left[1] + block[0] * block[1])
        return min(cheaper, MOST)

    @classmethod
    def shapes(cls, out_features: int, in_features: int, grid: Grid) -> list[Level]:
        """List the shapes of ``A`` for the blocks that divide a layer and save something."""
        shapes = [
            (out_features // rows, in_features // columns)
            for rows, columns in grid.blocks
            if out_features % rows == 0 and in_features % columns == 0
        ]
        return [each for each in shapes if cls.largest(out_features, in_features, each)]

    @override
    def levels(self, unit: LayerSpec, grid: Grid) -> list[Integers]:
        shape = unit.out_features, unit.in_features
        runs = []
        for left in self.shapes(*shape, grid):
            terms = np.arange(1, self.largest(*shape, left) + 1, dtype=np.int64)
            runs.append(np.column_stack([*(np.full_like(terms, number) for number in left), terms]))
        return runs

    @override
    def cost(self, unit: LayerSpec, level: Levels, *, bias: bool, itemsize: int) -> Costs:
        rows, columns, terms = level
        dense = unit.out_features * unit.in_features
        parameters = terms * (rows * columns + dense // (rows * columns))
        parameters = parameters + (unit.out_features if bias else 0)
        macs = self.macs(unit.out_features, unit.in_features, level)
        return parameters, parameters * itemsize, macs

    @override
    def problem(self, out_features: int, in_features: int, level: Level) -> str | None:
        got = f", got {list(level)}"
        if len(level) != 3:
            return f"{self.name} has rows and columns, and a number of terms{got}"
        *left, terms = level
        if min(left) < 1 or out_features % left[0] or in_features % left[1]:
            shape = f"{out_features} x {in_features}"
            return f"{self.name} needs rows and columns that divide {shape}{got}"
        block = self.block(out_features, in_features, (left[0], left[1]))
        largest = min(left[0] * left[1], block[0] * block[1])
        if not 1 <= terms <= largest:
            return f"{self.name} has from 1 to {largest} terms of these shapes{got}"
        return None

    @override
    def label(self, level: Level) -> str:
        rows, columns, terms = level
        return f"{terms} Kronecker term{'s' if terms > 1 else ''} of {rows} x {columns}"
