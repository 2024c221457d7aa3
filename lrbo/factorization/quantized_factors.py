"""Two thin matrices -> integers of 4 bits, of which every rank is still a prefix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.factorization.base import Remainders
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.rounding import INPUTS, GptqOrder, round_in_order, round_nearest
from lrbo.layers.based import MIDDLE, Factors
from lrbo.layers.forms import Quantized
from lrbo.layers.packing import unpack

INTEGERS = Quantized(4, symmetric=True)
FIRST, GROWTH = 16, 4  # directions of the first run, and how many times as long each next one ends

Rows = tuple[Tensor, Tensor]  # packed integers and scales


def round_factors(
    first: LowRankFactors,
    remainder: Remainders,
    weight: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"] | None,
    gradient: Float[Tensor, "out out"] | None,
    *,
    dtype: torch.dtype,
    damping: float,
    inputs: GptqOrder | None = None,
) -> Factors:
    """Factor a weight into integers of 4 bits with one scale per direction.

    In 4 bits a direction loses about a hundredth of its energy, which for the strongest is more
    than all weak ones have. So directions come in runs: a run factors what the rounded runs before
    it leave, what they lost in rounding included, and every rank is still a prefix. Of a run,
    ``right`` is rounded by GPTQ in the metric of the inputs; ``left`` is solved again for what
    that became, ``L = D C R^T (R C R^T)^+``, and rounded by GPTQ along the outputs, in the metric
    of their gradients. The pseudoinverse leaves out only directions that ``right`` lost in
    rounding, which no ``left`` can use.

    Args:
        first: Factors of the weight, float64, of as many directions as are wanted.
        remainder: Factors what runs leave.
        weight: ``(out, in)``, float64.
        moment: ``C``, of the inputs; ``None`` rounds every entry to the nearest.
        gradient: ``G``, of the outputs; ``None`` where nothing tells them apart.
        dtype: Of the scales as they are stored.
        damping: Of both metrics, as a share of the mean diagonal entry.
        inputs: The order of ``moment``, if it is known.

    Raises:
        StatisticsError: If a damped metric is not positive definite; says which damping is enough.

    References:
        Saha et al., *Compressing Large Language Models using Low Rank and Low Precision
        Decomposition* (CALDERA), NeurIPS 2024, algorithm 2, for rounding one factor and solving the
        other. Runs, and rounding ``left`` against gradients where it rounds against the rounded
        ``right``, are ours.
    """
    outputs = None
    if moment is not None:
        inputs = inputs or GptqOrder.of(moment, damping, INPUTS)
        if gradient is not None:
            outputs = GptqOrder.of(gradient, damping, "output gradient moment")
    lefts, rights, scales = list[Tensor](), list[Tensor](), list[Tensor]()
    rest, start = weight, 0
    while start < first.max_rank:
        stop = min(max(FIRST, GROWTH * start), first.max_rank)
        run = remainder(rest, stop - start) if start else first.leading(stop)
        right = _rounded(run.right.double().contiguous(), inputs)
        if moment is None:
            columns = run.left.double().T.contiguous()
        else:
            columns = _solved(_wide(right), moment, rest)
        left = _rounded(columns, outputs)
        lefts.append(left[0])
        rights.append(right[0])
        scales.append((left[1].double() * right[1].double()).to(dtype))
        start = stop
        if start < first.max_rank:
            codes = Factors(lefts[-1], scales[-1], rights[-1]).wide(torch.float64)
            rest = rest - codes[0] @ codes[1]
    return Factors(*map(torch.cat, (lefts, scales, rights)))


def _solved(
    right: Float[Tensor, "k in"], moment: Float[Tensor, "in in"], target: Float[Tensor, "out in"]
) -> Float[Tensor, "k out"]:
    """Return the transposed ``left`` of which ``left right`` is nearest to a target."""
    weighed = right @ moment
    inner, shared = weighed @ right.T, weighed @ target.T
    length = inner.diagonal().sqrt()
    scale = torch.where(length > 0, length, torch.ones_like(length))[:, None]
    inverse: Tensor = torch.linalg.pinv(inner / scale / scale.T, hermitian=True)
    return inverse @ (shared / scale) / scale


def _rounded(rows: Float[Tensor, "k n"], gptq: GptqOrder | None) -> Rows:
    """Round rows with a scale each, by GPTQ or to the nearest."""
    grids = [(INTEGERS, rows.shape[1])]
    if gptq is None:
        (base,) = round_nearest(rows, grids, dtype=torch.float32)
    else:
        (base,) = round_in_order(rows, gptq, grids, dtype=torch.float32)
    return base.tensors["packed"], base.tensors["scale"][:, 0]


def _wide(rows: Rows) -> Float[Tensor, "k n"]:
    """Return the rows that packed integers and scales stand for, in float64."""
    packed, scale = rows
    return (unpack(packed, INTEGERS.bits).double() - MIDDLE) * scale.double()[:, None]
