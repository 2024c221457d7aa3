"""The forms, and the arithmetic of what each level of them costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from lrbo.config.choices import REPAIRED
from lrbo.errors import ConfigError
from lrbo.layers.based_form import Based as Based
from lrbo.layers.delta_form import Delta as Delta
from lrbo.layers.delta_form import DeltaBands as DeltaBands
from lrbo.layers.delta_form import DeltaInt8 as DeltaInt8
from lrbo.layers.form import (
    GROUP_SIZES,
    INDEX_BYTES,
    Costs,
    Dense,
    Form,
    Grid,
    Integers,
    Level,
    Levels,
)
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.joint_form import Joint, Neurons, SharedFactored, Skip
from lrbo.layers.kronecker_form import Kronecker
from lrbo.layers.product_form import Factored, Pivoted
from lrbo.models.specs import LayerSpec


@dataclass(frozen=True)
class Quantized(Based):
    """Integers of a few bits with a scale per group of inputs; the base has a group size.

    Each group of each row has a scale, of the model's dtype, and a zero point in a byte unless it
    is symmetric.
    """

    bits: int
    symmetric: bool = False

    @property
    @override
    def base_name(self) -> str:
        return f"int{self.bits}{'_sym' if self.symmetric else ''}"

    @override
    def largest_rank(self, out_features: int, in_features: int) -> int:
        # Eight bits leave nothing.
        return 0 if self.bits == 8 else super().largest_rank(out_features, in_features)

    @override
    def bases(self, grid: Grid) -> list[Level]:
        return [(size,) for size in grid.group_sizes]

    @override
    def base_cost(self, out_features: int, in_features: int, base: Levels, itemsize: int) -> Costs:
        (size,) = base
        dense, groups = out_features * in_features, in_features // size
        per_group = itemsize + (0 if self.symmetric else 1)
        return dense, dense * self.bits // 8 + out_features * groups * per_group, dense

    @override
    def base_problem(self, out_features: int, in_features: int, base: Level) -> str | None:
        if base[0] in GROUP_SIZES and in_features % base[0] == 0:
            return None
        sizes = [str(size) for size in GROUP_SIZES if in_features % size == 0]
        if not sizes:
            return f"a multiple of {GROUP_SIZES[0]} inputs, not {in_features}"
        return f"groups of {' or '.join(sizes)} of its {in_features} inputs"

    @override
    def base_label(self, base: Level) -> str:
        return f"{self.bits} bit, groups of {base[0]}"


@dataclass(frozen=True)
class Codebook(Based):
    """Each row has numbers of its own, as many as a few bits can name, and their indices.

    The shared values of SqueezeLLM (Kim et al., ICML 2024) and SpaLLM (2024).
    """

    bits: int

    @property
    @override
    def base_name(self) -> str:
        return f"lut{self.bits}"

    @override
    def base_cost(self, out_features: int, in_features: int, base: Levels, itemsize: int) -> Costs:
        dense = out_features * in_features
        return dense, dense * self.bits // 8 + out_features * 2**self.bits * itemsize, dense

    @override
    def base_label(self, base: Level) -> str:
        return f"{self.bits} bit of a codebook"


@dataclass(frozen=True)
class SemiStructured(Based):
    """Two of every four inputs of a row, with two bits for the position of each: 2:4 sparsity."""

    base_name = "sparse_2_4"

    @override
    def base_cost(self, out_features: int, in_features: int, base: Levels, itemsize: int) -> Costs:
        kept = out_features * in_features // 2
        return kept, kept * itemsize + kept // 4, 2 * kept  # multiplied as dense

    @override
    def base_label(self, base: Level) -> str:
        return "2:4 sparse"


@dataclass(frozen=True)
class Sparse(Based):
    """A percentage of the entries, with a bit for every entry that there was."""

    base_name = "sparse"
    by_rows = False

    @override
    def bases(self, grid: Grid) -> list[Level]:
        return [(percent,) for percent in grid.percentages]

    @staticmethod
    def kept(in_features: int, percent: Any) -> Any:
        """Return the entries that are kept per row, on average; arrays are taken too."""
        return in_features * percent // 100

    @override
    def base_cost(self, out_features: int, in_features: int, base: Levels, itemsize: int) -> Costs:
        kept = out_features * self.kept(in_features, base[0])
        dense = out_features * in_features
        return kept, kept * itemsize + dense // 8, dense  # multiplied as dense

    @override
    def base_problem(self, out_features: int, in_features: int, base: Level) -> str | None:
        if not 0 < base[0] < 100:
            return "a percentage above 0 and below 100"
        if not self.kept(in_features, base[0]):
            return f"a percentage that keeps one of {in_features} inputs"
        return super().base_problem(out_features, in_features, base)

    @override
    def base_label(self, base: Level) -> str:
        return f"{base[0]}% sparse entries"


@dataclass(frozen=True)
class KeptRows(Based):
    """A percentage of the outputs as they are, and which; the low rank is of all the others.

    References:
        Li et al., *LoSparse: Structured Compression of Large Language Models based on Low-Rank and
        Sparse Approximation*, ICML 2023, as it is deployed: a product of thin matrices, and whole
        rows of what it leaves.
    """

    base_name = "sparse_rows"
    by_rows = False

    @override
    def largest_rank(self, out_features: int, in_features: int) -> int:
        # The low rank is most of what there is: up to the parameters of dense.
        return out_features * in_features // (out_features + in_features)

    @override
    def bases(self, grid: Grid) -> list[Level]:
        return [(percent,) for percent in grid.row_percentages]

    @staticmethod
    def kept(out_features: int, percent: Any) -> Any:
        """Return the number of outputs that are kept, at least one; arrays are taken too."""
        return -(-out_features * percent // 100)

    @override
    def base_cost(self, out_features: int, in_features: int, base: Levels, itemsize: int) -> Costs:
        rows = self.kept(out_features, base[0])
        entries = rows * in_features
        return entries, entries * itemsize + INDEX_BYTES * rows, entries

    @override
    def base_problem(self, out_features: int, in_features: int, base: Level) -> str | None:
        return None if 0 < base[0] < 100 else "a percentage above 0 and below 100"

    @override
    def base_label(self, base: Level) -> str:
        return f"{base[0]}% of the outputs"


@dataclass(frozen=True)
class QuantizedFactors(Based):
    """Two thin matrices in integers of 8 or 4 bits, with one scale per rank: a base of nothing.

    Of 4 bits, a row of either is whole bytes.
    """

    bits: int

    @property
    @override
    def base_name(self) -> str:
        return f"factored_int{self.bits}"

    @property
    @override
    def factor_bits(self) -> int:
        return self.bits

    @override
    def largest_rank(self, out_features: int, in_features: int) -> int:
        if self.bits == 8:
            return min(out_features, in_features)
        # From there on integers of 4 bits for the whole weight are cheaper.
        return out_features * in_features // (out_features + in_features)

    @override
    def levels(self, unit: LayerSpec, grid: Grid) -> list[Integers]:
        shape = unit.out_features, unit.in_features
        if self.base_problem(*shape, ()) is not None:
            return []
        (ranks,) = FACTORED.levels(unit, grid)
        return [ranks[ranks[:, 0] <= self.largest_rank(*shape)]]

    @override
    def base_cost(self, out_features: int, in_features: int, base: Levels, itemsize: int) -> Costs:
        return 0, 0, 0

    @override
    def base_problem(self, out_features: int, in_features: int, base: Level) -> str | None:
        if self.bits == 8 or out_features % 2 == in_features % 2 == 0:
            return None
        return f"an even number of outputs and inputs, not {out_features} and {in_features}"

    @override
    def label(self, level: Level) -> str:
        return f"rank {level[-1]} in {self.bits} bit"

    @override
    def base_label(self, base: Level) -> str:
        return "nothing"


FACTORED = Factored()
BITS = (8, 4, 3, 2)
_REPAIRED: tuple[Based, ...] = (
    *(Quantized(bits, symmetric) for symmetric in (False, True) for bits in BITS),
    *(Codebook(bits) for bits in (4, 3)),
    SemiStructured(),
    Sparse(),
    KeptRows(),
)
_FORMS: tuple[Form, ...] = (
    Dense(),
    FACTORED,
    Pivoted(),
    *(QuantizedFactors(bits) for bits in (8, 4)),
    *_REPAIRED,
    Kronecker(),
    FrequencyGroups(),
    SharedFactored(),
    Neurons(),
    Skip(),
    *(replace(form, has_floats=True) for form in _REPAIRED if form.base_name in REPAIRED),
    Delta(),
    DeltaInt8(),
    DeltaBands(),
)
FORMS: Mapping[str, Form] = {form.name: form for form in _FORMS}


def form_named(name: str) -> Form:
    """Return a form; ConfigError lists those there are if it has another name."""
    if name not in FORMS:
        raise ConfigError([f"form {name!r} is unknown; known: {', '.join(FORMS)}"])
    return FORMS[name]


def is_delta(name: str) -> bool:
    """Whether a form is a change of the weight of a base model."""
    return isinstance(form_named(name), Delta)


def is_joint(name: str) -> bool:
    """Whether several layers take a form together."""
    return isinstance(form_named(name), Joint)
