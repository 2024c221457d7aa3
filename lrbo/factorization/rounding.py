"""Weights -> integers of a few bits or numbers of a codebook, of the least output error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lrbo.factorization.bases import PANEL, Base, upper_root
from lrbo.layers.forms import Codebook, Quantized
from lrbo.layers.packing import pack

# Shares of the range of a group that are tried as the range of its integers: at few bits, a finer
# grid is worth a few clipped entries.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
CHUNK = 2**20  # entries of which scales are sought at a time
INPUTS = "input second moment"  # in messages
ITERATIONS = 12  # of k-means; what moves after them is in the third digit of the error


# What a column of a weight becomes: by its position in order, and what it should be.
Snap = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class GptqOrder:
    """In which order inputs are rounded, and how what each leaves is moved to those to come."""

    energy: Float[Tensor, " in"]
    order: Int64[Tensor, " in"]  # from the input of most energy on
    moves: Float[Tensor, "in in"]  # row by row: of what each leaves, what each later one gets

    @classmethod
    def of(cls, moment: Float[Tensor, "in in"], damping: float, name: str) -> GptqOrder:
        """Return that of ``H = C + damping * mean(diag C) I``.

        Raises:
            StatisticsError: If ``H`` is not positive definite; says which damping is enough.
        """
        energy = moment.diagonal()
        order = energy.argsort(descending=True, stable=True)
        # What an entry leaves is far larger than its rounding in float32, which is twice as fast.
        root = upper_root(moment, damping, name, order, torch.float32)
        return cls(energy, order, root.div_(root.diagonal().clone()))

    def round(self, columns: Float[Tensor, "in rows"], snap: Snap) -> None:
        """Round column after column, and add what each leaves to the columns to come.

        Greedily, for the least of ``tr(E H E^T)``. The columns are in order, and what they become
        is left to ``snap``.

        References:
            Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
            Transformers*, ICLR 2023, algorithm 1, in the form that Chee et al., *QuIP*, NeurIPS
            2023, theorem 6, show to be the same, and that needs no inverse.
        """
        round_columns(columns, self.moves, snap)


def round_columns(
    columns: Float[Tensor, "in rows"],
    moves: Float[Tensor, "in in"],
    snap: Snap,
    errors: Float[Tensor, "in rows"] | None = None,
) -> None:
    """Round column after column, a panel at a time, each to what the errors of others make of it.

    Args:
        columns: What is rounded, in order.
        moves: Row by row: of the error of each, what each other one gets. Where there are errors
            before, its diagonal is zero.
        snap: What a column becomes.
        errors: What each leaves so far, updated in place; ``None`` if none is rounded yet.
    """
    is_first = errors is None
    errors = torch.zeros_like(columns) if errors is None else errors
    for start in range(0, len(columns), PANEL):
        stop = min(start + PANEL, len(columns))
        own = slice(start, stop)
        given, left = columns[own], errors[own]
        due = torch.addmm(given, moves[:start, own].T, errors[:start])
        if not is_first:
            due.addmm_(moves[stop:, own].T, errors[stop:])
        shares = moves[own, own].T.contiguous()
        rows = zip(*(each.unbind() for each in (given, due, left, shares)), strict=True)
        for at, (exact, column, error, share) in enumerate(rows, start):
            # Those that are still to come have left what they did before, at first nothing.
            column.addmv_(left.T, share)
            torch.sub(exact, snap(at, column), out=error)


@dataclass(frozen=True)
class InputMetric:
    """What errors of a weight are weighed with, and what rounding in it takes, made once."""

    moment: Float[Tensor, "in in"]
    damping: float

    @cached_property
    def gptq(self) -> GptqOrder:
        """The order of inputs; StatisticsError as of :meth:`GptqOrder.of`."""
        return GptqOrder.of(self.moment, self.damping, INPUTS)

    @cached_property
    def damped(self) -> Float[Tensor, "in in"]:
        """``H = C + damping * mean(diag C) I``, float64."""
        damped = self.moment.double().clone()
        damped.diagonal().add_(self.damping * damped.diagonal().mean())
        return damped


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
    parts = [
        _scales(rows, form, group_size, importance, dtype)
        for rows in torch.split(weight.float(), max(CHUNK // weight.shape[1], 1))
    ]
    scale, zero = (torch.cat(each) for each in zip(*parts, strict=True))
    return scale.to(weight), zero.to(weight)


def _scales(
    weight: Float[Tensor, "rows in"],
    form: Quantized,
    group_size: int,
    importance: Float[Tensor, " in"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    groups = weight.reshape(len(weight), -1, group_size)
    weights = importance.float().view(-1, group_size)
    most = 2**form.bits - 1
    low = groups.amin(2).clamp_max(0.0)
    high = groups.amax(2).clamp_min(0.0)
    if form.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    exact, codes = torch.empty_like(groups), torch.empty_like(groups)
    for clip in CLIPS:
        step = ((high - low) * (clip / most)).to(dtype).to(groups)
        step = torch.where(step > 0, step, torch.ones_like(step))
        middle = torch.full_like(step, 2.0 ** (form.bits - 1))
        if not form.symmetric:
            middle = (-low * clip / step).round().clamp(0, most)
        torch.addcmul(middle[:, :, None], groups, step.reciprocal()[:, :, None], out=exact)
        torch.round(exact, out=codes).clamp_(0, most).sub_(exact).square_()
        total = torch.einsum("ogi,gi->og", codes, weights).mul_(step.square())
        better = total < best
        best = torch.where(better, total, best)
        scale, zero = torch.where(better, step, scale), torch.where(better, middle, zero)
    return scale, zero


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
        made.append(rounded(form, codes - wide[1], scale, zero, dtype))
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
    rest = weight.float().T.index_select(0, order).repeat(1, len(grids))
    codes = torch.empty_like(rest)
    gptq.round(rest, snap_to(grids, steps, order, codes))
    parts = codes[order.argsort()].T.chunk(len(grids))
    return [
        rounded(form, part, *step, dtype)
        for (form, _), part, step in zip(grids, parts, steps, strict=True)
    ]


def snap_to(
    grids: Sequence[tuple[Quantized, int]],
    steps: Sequence[tuple[Tensor, Tensor]],
    order: Int64[Tensor, " in"],
    codes: Float[Tensor, "in grids_out"],
) -> Snap:
    """Return what rounds a column, in order, to the nearest integers of grids side by side.

    Args:
        grids: Forms and group sizes.
        steps: Scale and zero point of every group of each grid, ``(out, groups)``.
        order: Of the inputs.
        codes: Where the integers are left, less their zero points, float32.
    """
    finest = math.gcd(*(size for _, size in grids))

    def groups(index: int) -> Tensor:
        """Scales or zero points by group of the finest grid: ``(groups, grids * out)``, float32."""
        wide = [
            each[index].T.repeat_interleave(size // finest, 0)
            for each, (_, size) in zip(steps, grids, strict=True)
        ]
        return torch.cat(wide, 1).float()

    scale, zero = groups(0), groups(1)
    most = torch.cat(
        [
            torch.full((len(each[0]),), 2.0**form.bits - 1)
            for (form, _), each in zip(grids, steps, strict=True)
        ]
    )
    lines = [each.unbind() for each in (scale, -zero, most.to(zero) - zero)]
    by_group = [*zip(*lines, strict=True)]
    own = [by_group[index] for index in (order // finest).tolist()]
    rows = codes.unbind()

    def snap(at: int, column: Tensor) -> Tensor:
        step, least, largest = own[at]
        torch.clamp(column.div_(step).round_(), least, largest, out=rows[at])
        return torch.mul(rows[at], step)

    return snap


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
    gptq: GptqOrder | None = None,
) -> Base:
    """Round every entry to a number of its row: the nearest, or with ``moment`` as GPTQ does.

    ``gptq`` is that of ``moment``, if it is known.

    Raises:
        StatisticsError: As of :func:`round_gptq`.
    """
    if gptq is None and moment is not None:
        gptq = GptqOrder.of(moment, damping, INPUTS)
    even = torch.ones(weight.shape[1]).to(weight)
    importance = even if gptq is None else gptq.energy
    table = cluster(weight, form.bits, importance).to(dtype).float()
    if gptq is None:
        codes = _nearest(weight.float(), table)
    else:
        rest = weight.float().T.index_select(0, gptq.order)
        indices = torch.empty(rest.shape, dtype=torch.int64, device=rest.device)

        def snap(at: int, column: Tensor) -> Tensor:
            indices[at] = _nearest(column[:, None], table)[:, 0]
            return table.gather(1, indices[at][:, None])[:, 0]

        gptq.round(rest, snap)
        codes = indices[gptq.order.argsort()].T
    packed = pack(codes.to(torch.uint8).contiguous(), form.bits)
    shape = (weight.shape[0], weight.shape[1])
    return Base(form, (), shape, {"packed": packed, "table": table.to(dtype)}, dtype)


def rounded(
    form: Quantized, codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype
) -> Base:
    """Return the base of integers that are given less their zero points."""
    shape = (codes.shape[0], codes.shape[1])
    size = shape[1] // scale.shape[1]
    whole = codes + zero.to(codes.dtype).repeat_interleave(size, 1)
    tensors = {"packed": pack(whole.to(torch.uint8).contiguous(), form.bits)}
    tensors["scale"] = scale.to(dtype)
    if not form.symmetric:
        tensors["zero"] = zero.to(torch.uint8)
    return Base(form, (size,), shape, tensors, dtype)
