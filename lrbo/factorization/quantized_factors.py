"""Two thin matrices -> integers of 4 bits, of which every rank is still a prefix."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.rounding import GptqOrder, round_in_order, round_nearest
from lrbo.layers.based import MIDDLE, Factors
from lrbo.layers.forms import Quantized
from lrbo.layers.packing import unpack

INTEGERS = Quantized(4, symmetric=True)
FIRST = 32  # directions that are solved for together; then twice as many, and so on


def round_factors(
    factors: LowRankFactors,
    weight: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"] | None,
    gradient: Float[Tensor, "out out"] | None,
    *,
    dtype: torch.dtype,
    damping: float,
) -> Factors:
    """Round factors to integers of 4 bits with one scale per direction.

    ``right`` is rounded by GPTQ in the metric of the inputs. Its rows do not meet: directions are
    orthogonal in the metric of the outputs. Then follow the columns of ``left``, in runs of rising
    length: each run is solved again for the ``right`` that there now is and for what the rounded
    columns before it leave, ``L = (W - L' R') C R^T (R C R^T)^+``, and rounded by GPTQ along the
    outputs, in the metric of their gradients. What a run became stays, so that every rank is a
    prefix. The pseudoinverse leaves out only directions that ``right`` lost in rounding, which no
    ``left`` can use.

    Args:
        factors: Of the weight, float64.
        weight: ``(out, in)``, float64.
        moment: ``C``, of the inputs; ``None`` rounds every entry to the nearest.
        gradient: ``G``, of the outputs; ``None`` where nothing tells them apart.
        dtype: Of the scales as they are stored.
        damping: Of both metrics, as a share of the mean diagonal entry.

    Raises:
        StatisticsError: If a damped metric is not positive definite; says which damping is enough.

    References:
        Saha et al., *Compressing Large Language Models using Low Rank and Low Precision
        Decomposition* (CALDERA), NeurIPS 2024, algorithm 2, for the order: round, solve the other
        factor, round it. Rounding ``left`` against the gradients instead of the rounded inner
        moment ``R C R^T``, which is nearly diagonal, is ours.
    """
    left, right, max_rank = factors.left.T.contiguous(), factors.right, factors.max_rank
    if moment is None:
        return _packed([_nearest(left)], _nearest(right), dtype)
    codes = _rounded(right, GptqOrder.of(moment, damping, "input second moment"))
    outputs = None
    if gradient is not None:
        outputs = GptqOrder.of(gradient, damping, "output gradient moment")
    thin = _wide(codes)
    inner, shared = thin @ moment @ thin.T, thin @ moment @ weight.T
    length = inner.diagonal().sqrt()
    length = torch.where(length > 0, length, torch.ones_like(length))
    parts: list[tuple[Tensor, Tensor]] = []
    before = weight.new_zeros(0, len(weight))  # columns of left, rounded
    ends = [0, *(FIRST * 2**step for step in range(max_rank.bit_length())), max_rank]
    for start, stop in pairwise(sorted({min(end, max_rank) for end in ends})):
        target = shared[start:stop] - inner[start:stop, :start] @ before
        scale = length[start:stop, None]
        square = inner[start:stop, start:stop] / scale / scale.T
        solved = torch.linalg.pinv(square, hermitian=True) @ (target / scale) / scale
        parts.append(_nearest(solved) if outputs is None else _rounded(solved, outputs))
        before = torch.cat([before, _wide(parts[-1])])
    return _packed(parts, codes, dtype)


def _rounded(rows: Float[Tensor, "k n"], gptq: GptqOrder) -> tuple[Tensor, Tensor]:
    """Return packed integers and scale of every row."""
    grids = [(INTEGERS, rows.shape[1])]
    (base,) = round_in_order(rows, gptq, grids, dtype=torch.float32)
    return base.tensors["packed"], base.tensors["scale"][:, 0]


def _nearest(rows: Float[Tensor, "k n"]) -> tuple[Tensor, Tensor]:
    (base,) = round_nearest(rows, [(INTEGERS, rows.shape[1])], dtype=torch.float32)
    return base.tensors["packed"], base.tensors["scale"][:, 0]


def _wide(rows: tuple[Tensor, Tensor]) -> Float[Tensor, "k n"]:
    """Return the rows that packed integers and scales stand for, in float64."""
    packed, scale = rows
    return (unpack(packed, INTEGERS.bits).double() - MIDDLE) * scale.double()[:, None]


def _packed(
    left: list[tuple[Tensor, Tensor]], right: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Factors:
    codes, scale = (torch.cat(each) for each in zip(*left, strict=True))
    return Factors(codes, (scale.double() * right[1].double()).to(dtype), right[0])
