"""Weights -> integers of a few bits or numbers of a codebook, of the least output error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lrbo.factorization.bases import Base, compensate, inverse_root
from lrbo.layers.forms import Codebook, Quantized
from lrbo.layers.packing import pack

# Shares of the range of a group that are tried as the range of its integers: at few bits, a finer
# grid is worth a few clipped entries.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
INPUTS = "input second moment"  # in messages
ITERATIONS = 12  # of k-means; what moves after them is in the third digit of the error


@dataclass(frozen=True)
class GptqOrder:
    """In which order inputs are rounded, and how what each leaves is moved to those to come."""

    energy: Float[Tensor, " in"]
    order: Int64[Tensor, " in"]  # from the input of most energy on
    root: Float[Tensor, "in in"]  # of the inverse moment in this order, as of compensate

    @classmethod
    def of(cls, moment: Float[Tensor, "in in"], damping: float, name: str) -> GptqOrder:
        """Return that of ``H = C + damping * mean(diag C) I``.

        Raises:
            StatisticsError: If ``H`` is not positive definite; says which damping is enough.
        """
        energy = moment.diagonal()
        order = energy.argsort(descending=True, stable=True)
        ordered = moment.index_select(0, order).index_select(1, order)
        # What an entry leaves is far larger than its rounding in float32, which is twice as fast.
        return cls(energy, order, inverse_root(ordered, damping, name).float())


def scales(
    weight: Float[Tensor, "out in"],
    form: Quantized,
    group_size: int,
    importance: Float[Tensor, " in"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Return scale and zero point of every group, of the least error that rounding leaves.

    The error is squared and weighed by the ``importance`` of each input, and minimised over
    ``CLIPS``, in float32: it only selects one of a few. Scales are rounded to ``dtype`` first, in
    which they will be stored; both are returned in the dtype of the weight.
    """
    groups = weight.float().reshape(len(weight), -1, group_size)
    weights = importance.float().view(-1, group_size)
    most = 2**form.bits - 1
    low = groups.amin(2).clamp_max(0.0)
    high = groups.amax(2).clamp_min(0.0)
    if form.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for clip in CLIPS:
        step = ((high - low) * (clip / most)).to(dtype).to(groups)
        step = torch.where(step > 0, step, torch.ones_like(step))
        middle = torch.full_like(step, 2.0 ** (form.bits - 1))
        if not form.symmetric:
            middle = (-low * clip / step).round().clamp(0, most)
        codes = (groups / step[:, :, None] + middle[:, :, None]).round_().clamp_(0, most)
        error = (codes - middle[:, :, None]).mul_(step[:, :, None]).sub_(groups).square_()
        total = torch.einsum("ogi,gi->og", error, weights)
        better = total < best
        best = torch.where(better, total, best)
        scale, zero = torch.where(better, step, scale), torch.where(better, middle, zero)
    return scale.to(weight), zero.to(weight)


def round_nearest(
    weight: Float[Tensor, "out in"],
    grids: Sequence[tuple[Quantized, int]],
    *,
    dtype: torch.dtype,
) -> list[Base]:
    """Round every entry to the nearest integer of its group, of each form and group size."""
    even = torch.ones(weight.shape[1]).to(weight)
    made = []
    for form, group_size in grids:
        scale, zero = scales(weight, form, group_size, even, dtype)
        wide = [each.repeat_interleave(group_size, 1) for each in (scale, zero)]
        codes = (weight / wide[0] + wide[1]).round_().clamp_(0, 2**form.bits - 1)
        made.append(_rounded(form, codes, scale, zero, dtype))
    return made


def round_gptq(
    weight: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"],
    grids: Sequence[tuple[Quantized, int]],
    *,
    dtype: torch.dtype,
    damping: float = 0.01,
) -> list[Base]:
    """Round column after column, and move what each leaves to the columns to come.

    The least of ``tr(E H E^T)`` for the error ``E`` is sought greedily, from the input of most
    energy on, with ``H = C + damping * mean(diag C) I``. All grids are rounded side by side.

    Args:
        weight: ``(out, in)``.
        moment: ``C = E[x x^T]``.
        grids: Forms and group sizes.
        dtype: Of the stored scales.
        damping: As a share of the mean diagonal entry.

    Raises:
        StatisticsError: If ``H`` is not positive definite; says which damping is enough.

    References:
        Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
        Transformers*, ICLR 2023, algorithm 1, with activation order and scales from the weight as
        it is given.
    """
    return round_in_order(weight, GptqOrder.of(moment, damping, INPUTS), grids, dtype=dtype)


def round_in_order(
    weight: Float[Tensor, "out in"],
    gptq: GptqOrder,
    grids: Sequence[tuple[Quantized, int]],
    *,
    dtype: torch.dtype,
) -> list[Base]:
    """Round as :func:`round_gptq` does, several weights in one order."""
    order = gptq.order
    steps = [scales(weight, form, size, gptq.energy, dtype) for form, size in grids]

    def columns(index: int) -> Tensor:
        """Scales or zero points by column, in order, of all grids: ``(in, grids * out)``."""
        wide = [
            each[index].repeat_interleave(size, 1)
            for each, (_, size) in zip(steps, grids, strict=True)
        ]
        return torch.cat(wide).float().T.index_select(0, order)

    scale, zero = columns(0), columns(1)
    rows = len(weight)
    most = torch.cat([torch.full((rows,), 2.0**form.bits - 1) for form, _ in grids]).to(scale)
    rest = weight.float().T.index_select(0, order).repeat(1, len(grids))
    codes = torch.empty_like(rest)

    def snap(at: int, column: Tensor, _: Tensor) -> Tensor:
        code = torch.clamp_min_(torch.round(column / scale[at] + zero[at]), 0.0)
        code = torch.minimum(code, most, out=codes[at])
        return (code - zero[at]) * scale[at]

    compensate(rest, gptq.root, snap)
    parts = codes[order.argsort()].T.chunk(len(grids))
    return [
        _rounded(form, part, *own, dtype)
        for (form, _), part, own in zip(grids, parts, steps, strict=True)
    ]


def cluster(
    weight: Float[Tensor, "out in"], bits: int, importance: Float[Tensor, " in"]
) -> Float[Tensor, "out numbers"]:
    """Return the ``2**bits`` numbers of every row that its entries are nearest to, rising.

    Lloyd's k-means on a line, of squares weighed by the ``importance`` of each input, from
    quantiles on (Kim et al., *SqueezeLLM*, ICML 2024, section 4.1). In float32.
    """
    rows, count = weight.float(), 2**bits
    places = (torch.arange(count, device=rows.device) + 0.5) / count * (rows.shape[1] - 1)
    table = rows.sort(1).values[:, places.round().long()]
    heavy = importance.float().expand_as(rows)
    for _ in range(ITERATIONS):
        nearest = _nearest(rows, table)
        totals = torch.zeros_like(table).scatter_add_(1, nearest, heavy)
        sums = torch.zeros_like(table).scatter_add_(1, nearest, heavy * rows)
        table = torch.where(totals > 0, sums / totals, table).sort(1).values
    return table.to(weight)


def _nearest(values: Float[Tensor, "rows n"], table: Float[Tensor, "rows numbers"]) -> Tensor:
    """Return the index of the number that each value is nearest to, of a rising table per row."""
    return torch.searchsorted((table[:, 1:] + table[:, :-1]) / 2, values.contiguous())


def round_to_codebook(
    weight: Float[Tensor, "out in"],
    form: Codebook,
    *,
    dtype: torch.dtype,
    moment: Float[Tensor, "in in"] | None = None,
    damping: float = 0.01,
) -> Base:
    """Round every entry to a number of its row: the nearest, or with ``moment`` as GPTQ does.

    Raises:
        StatisticsError: As of :func:`round_gptq`.
    """
    even = torch.ones(weight.shape[1]).to(weight)
    importance = even if moment is None else moment.diagonal()
    table = cluster(weight, form.bits, importance).to(dtype).float()
    if moment is None:
        codes = _nearest(weight.float(), table)
    else:
        gptq = GptqOrder.of(moment, damping, INPUTS)
        rest = weight.float().T.index_select(0, gptq.order)
        indices = torch.empty(rest.shape, dtype=torch.int64, device=rest.device)

        def snap(at: int, column: Tensor, _: Tensor) -> Tensor:
            indices[at] = _nearest(column[:, None], table)[:, 0]
            return table.gather(1, indices[at][:, None])[:, 0]

        compensate(rest, gptq.root, snap)
        codes = indices[gptq.order.argsort()].T
    packed = pack(codes.to(torch.uint8).contiguous(), form.bits)
    shape = (weight.shape[0], weight.shape[1])
    return Base(form, (), shape, {"packed": packed, "table": table.to(dtype)}, dtype)


def _rounded(
    form: Quantized, codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype
) -> Base:
    tensors = {"packed": pack(codes.to(torch.uint8).contiguous(), form.bits)}
    tensors["scale"] = scale.to(dtype)
    if not form.symmetric:
        tensors["zero"] = zero.to(torch.uint8)
    shape = (codes.shape[0], codes.shape[1])
    return Base(form, (shape[1] // scale.shape[1],), shape, tensors, dtype)
