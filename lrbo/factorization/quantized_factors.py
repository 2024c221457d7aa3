"""Two thin matrices -> integers of a few bits, of which every rank is still a prefix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.factorization.base import Remainders
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.rounding import CLIPS, INPUTS, GptqOrder, scales
from lrbo.layers.based import MIDDLE, Factors, middle_of
from lrbo.layers.delta_form import Bands
from lrbo.layers.forms import Quantized
from lrbo.layers.packing import pack

INTEGERS = Quantized(4, symmetric=True)
FIRST, GROWTH = 16, 4  # directions of the first run, and how many times as long each next one ends
# Shares of the largest number of a direction that its integers may reach to, in a band.
BAND_CLIPS = (*CLIPS, 0.45, 0.4, 0.35, 0.3, 0.25)

# In float32 a system is solved in which every direction has this share, of its length, that none
# before it has; others have a pseudoinverse in float64.
INDEPENDENT = 0.01
SAME = 1e-12  # of energy

Rows = tuple[Tensor, Tensor, Tensor]  # packed, and numbers that scales multiply, float32


def round_factors(
    first: LowRankFactors,
    remainder: Remainders,
    weight: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"] | None,
    gradient: Float[Tensor, "out out"] | None,
    *,
    dtype: torch.dtype,
    damping: float,
    bands: Bands | None = None,
    inputs: GptqOrder | None = None,
) -> Factors:
    """Factor a weight into integers of 4 bits, or of bands, with one scale per direction.

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
        bands: The bits of directions, if other than 4; no run is in two bands.
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
    lefts, rights, steps = list[Tensor](), list[Tensor](), list[Tensor]()
    rest = weight.float()  # what rounding to few bits leaves is far larger than that of float32
    weights = None if moment is None else moment.float()
    for start, stop, bits in _runs(first.max_rank, bands):
        run = remainder(rest, stop - start) if start else first.leading(stop)
        right = _rounded(run.right, inputs, bits)
        columns = run.left.T
        if weights is not None:
            columns = _solved(right[2] * right[1][:, None], weights, rest)
        left = _rounded(columns, outputs, bits)
        lefts.append(left[0])
        rights.append(right[0])
        steps.append((left[1] * right[1]).to(dtype))
        if stop < first.max_rank:
            rest = torch.addmm(rest, left[2].T * steps[-1].float(), right[2], alpha=-1)
    if bands is None:
        return Factors(torch.cat(lefts), torch.cat(steps), torch.cat(rights))
    flat = [torch.cat([each.flatten() for each in side]) for side in (lefts, rights)]
    return Factors(flat[0], torch.cat(steps), flat[1], bands)


def _runs(count: int, bands: Bands | None) -> Iterator[tuple[int, int, int]]:
    """Yield where runs start and stop, and their bits."""
    start = end = 0
    for width, bits in [(count, 4)] if bands is None else bands.runs(count):
        end += width
        while start < end:
            stop = min(max(FIRST, GROWTH * start), end)
            yield start, stop, bits
            start = stop


def _solved(
    right: Float[Tensor, "k in"], moment: Float[Tensor, "in in"], target: Float[Tensor, "out in"]
) -> Float[Tensor, "k out"]:
    """Return the transposed ``left`` of which ``left right`` is nearest to a target."""
    weighed = right @ moment
    inner, shared = weighed @ right.T, weighed @ target.T
    length = inner.diagonal().sqrt()
    scale = torch.where(length > 0, length, torch.ones_like(length))[:, None]
    inner, shared = inner / scale / scale.T, shared / scale
    root, failed = torch.linalg.cholesky_ex(inner)
    if not int(failed) and float(root.diagonal().min()) > INDEPENDENT:
        return torch.cholesky_solve(shared, root) / scale
    right, moment, target = right.double(), moment.double(), target.double()
    weighed = right @ moment
    inner = weighed @ right.T / scale / scale.T
    # Of directions alike to the digits of float32 one is enough.
    inverse: Tensor = torch.linalg.pinv(inner, rtol=SAME, hermitian=True)
    return (inverse @ (weighed @ target.T / scale) / scale).float()


def _rounded(rows: Float[Tensor, "k n"], gptq: GptqOrder | None, bits: int) -> Rows:
    """Round rows with a scale each, by GPTQ or to the nearest."""
    values, count = rows.float().contiguous(), rows.shape[1]
    weights = torch.ones_like(values[0]) if gptq is None else gptq.energy.float()
    if bits == INTEGERS.bits:
        middle = float(MIDDLE)
        scale = scales(values, INTEGERS, count, weights, torch.float32)[0]
    else:
        middle = middle_of(bits)
        scale = _scales_in_band(values, weights, bits)
    most = 2**bits - 1
    exact = values / scale
    if gptq is None:
        codes = (exact + middle).round_().clamp_(0, most)
    else:
        least = torch.full_like(exact[:, 0], -middle)
        largest, half = least + most, middle % 1

        def snap(at: int, column: Tensor, value: Tensor) -> None:
            del at
            if half:  # between integers
                column = column.sub_(half).round_().add_(half)
            else:
                column.round_()
            torch.clamp(column, least, largest, out=value)

        ordered = gptq.round(exact.T.index_select(0, gptq.order), snap)
        codes = ordered[gptq.order.argsort()].T + middle
    packed = pack(codes.to(torch.uint8).contiguous(), bits)
    return packed, scale[:, 0], codes - middle


def _scales_in_band(
    values: Float[Tensor, "k n"], weights: Float[Tensor, " n"], bits: int
) -> Float[Tensor, "k 1"]:
    """Return the scales of rows of a band, in float32, each of the least error of a few."""
    most, middle = 2**bits - 1, middle_of(bits)
    peak = values.abs().amax(1, keepdim=True)
    scale, best = torch.ones_like(peak), torch.full_like(peak, torch.inf)
    for clip in BAND_CLIPS:
        step = torch.where(peak > 0, peak * (clip / (most / 2)), torch.ones_like(peak))
        codes = (values / step + middle).round_().clamp_(0, most)
        error = (codes.sub_(middle).mul_(step) - values).square_() @ weights[:, None]
        scale = torch.where(error < best, step, scale)
        best = torch.minimum(error, best)
    return scale
