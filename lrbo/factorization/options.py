"""The options of rounding and of every factorization method, with ranges: no tensors in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lrbo.config.options import (
    ABOVE_0_TO_1,
    FLAG,
    FROM_0,
    FROM_0_TO_1,
    NAMES,
    Options,
    Rule,
    one_of,
    option,
)
from lrbo.layers.form import GROUP_SIZES

SIZES = Rule(
    f"one or several of {', '.join(map(str, GROUP_SIZES))}, each once",
    lambda v: len(v) > 0 and {*v} <= {*GROUP_SIZES} and len({*v}) == len(v),
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
    """How weights become integers, numbers of a codebook or a few of their entries.

    Attributes:
        method: ``"gptq"`` moves what one input leaves to the inputs to come (for sparse forms this
            is SparseGPT), ``"nearest"`` decides on every entry alone.
        group_sizes: Of integers: inputs that share a scale; each size is a choice of its own.
        percentages: Of entries that sparse forms keep; each is a choice of its own.
        damping: Added to the diagonal of the input second moment, as a share of its mean entry.
    """

    method: str = option("gptq", one_of(("gptq", "nearest")))
    group_sizes: tuple[int, ...] = option((64,), SIZES)
    percentages: tuple[int, ...] = option((50,), PERCENTAGES)
    damping: float = option(0.01, ABOVE_0_TO_1)


METHOD_OPTIONS: Mapping[str, type[Options]] = {
    "svd": Options,
    "fwsvd": Options,
    "asvd": AsvdOptions,
    "drone": Options,
    "svd_llm": Options,
    "bolaco": Options,
    "loss_aware": LossAwareOptions,
}
