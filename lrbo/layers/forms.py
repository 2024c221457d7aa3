"""Forms: families of what a unit can become, and the arithmetic of what each level costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lrbo.errors import ConfigError
from lrbo.models.specs import LayerSpec

Level = tuple[int, ...]
Levels = tuple[Any, ...]  # one level, or arrays of many
Costs = tuple[Any, Any, Any]  # parameters, bytes, multiply-adds: integers, or arrays
Integers = NDArray[np.int64]

INDEX_BYTES = 4  # int32
DENSE_FORM = "dense"


class Form(ABC):
    """A family of what a unit can become: its levels, and what each of them costs."""

    name: ClassVar[str]  # in space.forms, in journals and in checkpoints

    @abstractmethod
    def levels(self, unit: LayerSpec, multiple: int, minimum: int) -> Integers:
        """List the levels of a unit, from least to most: ``(n, k)``."""

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

    def label(self, level: Level) -> str:
        """Name a level for readers: ``"rank 96"``; the form itself where it has none."""
        return f"rank {level[0]}" if level else self.name


class Dense(Form):
    """The unit as it is: one level, which has no numbers."""

    name = DENSE_FORM

    @override
    def levels(self, unit: LayerSpec, multiple: int, minimum: int) -> Integers:
        return np.empty((1, 0), dtype=np.int64)

    @override
    def cost(self, unit: LayerSpec, level: Levels, *, bias: bool, itemsize: int) -> Costs:
        return unit.parameters, unit.parameters * itemsize, unit.out_features * unit.in_features

    @override
    def problem(self, out_features: int, in_features: int, level: Level) -> str | None:
        return f"dense has no level, got {list(level)}" if level else None


class Factored(Form):
    """Two thin matrices of a rank, the one level: ``rank * (out + in)`` parameters."""

    name = "factored"

    def stored(self, unit: LayerSpec, rank: Any) -> tuple[Any, int]:
        """Return the elements of the matrices, each used once per token, and the indices."""
        return rank * (unit.out_features + unit.in_features), 0

    @override
    def levels(self, unit: LayerSpec, multiple: int, minimum: int) -> Integers:
        first = max(-(-minimum // multiple), 1) * multiple
        ranks = np.arange(first, min(unit.out_features, unit.in_features) + 1, multiple)
        return ranks[:, None].astype(np.int64)

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


FORMS: Mapping[str, Form] = {form.name: form for form in (Dense(), Factored(), Pivoted())}


def form_named(name: str) -> Form:
    """Return a form; ConfigError lists those there are if it has another name."""
    if name not in FORMS:
        raise ConfigError([f"form {name!r} is unknown; known: {', '.join(FORMS)}"])
    return FORMS[name]
