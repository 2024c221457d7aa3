"""The options of rounding and of every factorization method, with ranges: no tensors in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lrbo.config.choices import NO_SWEEPS
from lrbo.config.options import (
    ABOVE_0_TO_1,
    COUNT,
    FLAG,
    FROM_0,
    FROM_0_TO_1,
    NAMES,
    REPEATED,
    Options,
    Rule,
    at_least,
    mismatch,
    one_of,
    option,
)
from lrbo.layers.form import GROUP_SIZES, Grid

SIZES = Rule(
    f"one or several of {', '.join(map(str, GROUP_SIZES))}, each once",
    lambda v: len(v) > 0 and {*v} <= {*GROUP_SIZES} and len({*v}) == len(v),
)


def _are_blocks(blocks: Any) -> bool:
    pairs = [tuple(each) for each in blocks if isinstance(each, list | tuple) and len(each) == 2]
    whole = all(min(pair) >= 1 and 1 < max(pair) <= COUNT for pair in pairs)
    return whole and 0 < len(blocks) == len({*pairs})


BLOCKS = Rule(
    "one or several [rows, columns] of at least 1, each once and none [1, 1]", _are_blocks
)
GROUPS = Rule(
    "one or several whole numbers from 2 on, each once",
    lambda v: len(v) > 0 and all(2 <= n <= COUNT for n in v) and len({*v}) == len(v),
)
BANDS = Rule(
    "one or several [directions of 8 bits, directions of 3 bits], each once",
    lambda v: (
        len(v) > 0
        and all(isinstance(each, list | tuple) and len(each) == 2 for each in v)
        and all(0 <= n <= COUNT for each in v for n in each)
        and len({tuple(each) for each in v}) == len(v)
    ),
)
PERCENTAGES = Rule(
    "one or several whole numbers above 0 and below 100, each once",
    lambda v: len(v) > 0 and all(0 < n < 100 for n in v) and len({*v}) == len(v),
)


@dataclass(frozen=True)
class AsvdOptions(Options):
    """Options of ``asvd``."""

    alpha: float = option(0.5, FROM_0)  # strength of the weights; 0 is plain SVD, 0.5 the paper's


@dataclass(frozen=True)
class FirstOrderOptions(Options):
    """Options of ``first_order``."""

    kept: float = option(0.25, ABOVE_0_TO_1)  # share of the weights whose importance counts


@dataclass(frozen=True)
class LossAwareOptions(Options):
    """Options of ``loss_aware``, whose input moment is ``C`` and output-gradient moment ``G``.

    Attributes:
        input_shrinkage: Of ``C``, in [0, 1].
        output_shrinkage: Of ``G``, in (0, 1]; 1 ignores where gradients point, and keeps their
            size. Without any, directions that no gradient has would have no weight to divide by.
        output_power: ``G`` is raised to this power, in [0, 1], at the same trace: 1 is K-FAC,
            and 0 ignores where gradients point. On SmolLM2-135M at keep ratio 0.7 the perplexity
            of WikiText-2 was 35.1 at 1, 34.2 at 0.75 and 34.5 at 0.5.
        centred: Whether ``C`` is the covariance, and a bias restores the mean output.
        one_sided: Kinds of layers whose ``G`` is ignored but for its size.
    """

    input_shrinkage: float = option(0.0, FROM_0_TO_1)
    output_shrinkage: float = option(0.01, ABOVE_0_TO_1)
    output_power: float = option(0.75, FROM_0_TO_1)
    centred: bool = option(False, FLAG)
    one_sided: tuple[str, ...] = option((), NAMES)


@dataclass(frozen=True)
class BaseOptions(Options):
    """How weights become integers, codebooks, a few entries, Kronecker sums or groups of rows.

    Attributes:
        method: ``"gptq"`` moves what one input leaves to the inputs to come (for sparse forms this
            is SparseGPT), ``"nearest"`` decides on every entry alone.
        group_sizes: Of integers: inputs that share a scale; each size is a choice of its own.
        percentages: Of entries that sparse forms keep; each is a choice of its own.
        row_percentages: Of outputs that ``sparse_rows`` keeps; each is a choice of its own.
        blocks: Rows and columns of the second factor of a Kronecker product; each is a choice of
            its own, for the layers that it divides.
        frequency_groups: Of the rows of an embedding or head; each number is a choice of its own.
        bands: Of ``delta_bands``: how many leading directions have 8 bits, and how many behind them
            3; the others have 2. Each pair is a choice of its own.
        damping: Added to the diagonal of the input second moment, as a share of its mean entry.
        sweeps: Of coordinate descent over all integers and their scales, after ``"gptq"``.
    """

    method: str = option("gptq", one_of(("gptq", "nearest")))
    group_sizes: tuple[int, ...] = option(Grid.group_sizes, SIZES)
    percentages: tuple[int, ...] = option(Grid.percentages, PERCENTAGES)
    row_percentages: tuple[int, ...] = option(Grid.row_percentages, PERCENTAGES)
    blocks: tuple[tuple[int, int], ...] = option(Grid.blocks, BLOCKS)
    frequency_groups: tuple[int, ...] = option(Grid.frequency_groups, GROUPS)
    bands: tuple[tuple[int, int], ...] = option(Grid.bands, BANDS)
    damping: float = option(0.01, ABOVE_0_TO_1)
    sweeps: int = option(0, at_least(0, most=REPEATED))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sweeps and self.method == "nearest":
            raise ValueError(mismatch("sweeps", self.sweeps, NO_SWEEPS))

    def grid(self, multiple: int = 1, minimum: int = 0) -> Grid:
        """Return the levels that are made; ranks are multiples, from a minimum on."""
        names = [field.name for field in fields(Grid) if hasattr(self, field.name)]
        own = {name: getattr(self, name) for name in names}
        return Grid(multiple, minimum, **own)


METHOD_OPTIONS: Mapping[str, type[Options]] = {
    "svd": Options,
    "fwsvd": Options,
    "first_order": FirstOrderOptions,
    "asvd": AsvdOptions,
    "drone": Options,
    "svd_llm": Options,
    "bolaco": Options,
    "loss_aware": LossAwareOptions,
}
