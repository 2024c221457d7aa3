"""The options of every factorization method, with their ranges: no tensors in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lrbo.config.options import ABOVE_0_TO_1, FLAG, FROM_0, FROM_0_TO_1, NAMES, Options, option


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


METHOD_OPTIONS: Mapping[str, type[Options]] = {
    "svd": Options,
    "fwsvd": Options,
    "asvd": AsvdOptions,
    "drone": Options,
    "svd_llm": Options,
    "bolaco": Options,
    "loss_aware": LossAwareOptions,
}
