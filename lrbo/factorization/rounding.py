"""Weights -> integers of a few bits or numbers of a codebook, of the least output error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from lrbo.factorization.bases import PANEL, Base, upper_root
from lrbo.layers.forms import Codebook, Quantized
from lrbo.layers.packing import pack

# Shares of the range of a group that are tried as the range of its integers: at few bits, a finer
# grid is worth a few clipped entries.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
# An entry that is cut off by a fifth loses more than all of its group in rounding to 8 bits.
CLIPS_OF = {8: CLIPS[:4]}
BLOCK = 8 * PANEL  # columns, after which it is done by larger products
SINGLE_DAMPING = 1e-3  # from which on moments are factored in float32
CHUNK = 2**18  # entries of which scales are sought at a time
INPUTS = "input second moment"  # in messages
ITERATIONS = 12  # of k-means; what moves after them is in the third digit of the error


# Writes what a column of a weight becomes: by its position in order, what it should be, which may
# be overwritten, and where to.
Snap = Callable[[int, Tensor, Tensor], object]


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
        # A root is as exact as its dtype allows beside the damping.
        dtype = torch.float32 if damping >= SINGLE_DAMPING else torch.float64
        root = upper_root(moment, damping, name, order, dtype).float()
        return cls(energy, order, root.div_(root.diagonal().clone()))

    def round(self, columns: Float[Tensor, "in rows"], snap: Snap) -> Float[Tensor, "in rows"]:
        """Round column after column, and add what each leaves to those to come.

        Rounded ones are returned, and ``columns`` become what these leave. Greedily, for the least
        of ``tr(E H E^T)``. The columns are in order, and what they become is left to ``snap``.

        References:
            Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
            Transformers*, ICLR 2023, algorithm 1, in the form that Chee et al., *QuIP*, NeurIPS
            2023, theorem 6, show to be the same, and that needs no inverse.
        """
        rounded = torch.zeros_like(columns)
        for first in range(0, len(columns), BLOCK):
            block = slice(first, first + BLOCK)
            given = torch.addmm(columns[block], self.moves[:first, block].T, columns[:first])
            for start in range(first, min(first + BLOCK, len(columns)), PANEL):
                own = slice(start, min(start + PANEL, first + BLOCK))
                exact, values = columns[own], rounded[own]
                shares = self.moves[own, own].triu(1).T
                due = given[start - first : own.stop - first]
                due.addmm_(self.moves[first:start, own].T, columns[first:start])
                # All that exact ones of the panel give each other, of which rounded ones take off.
                due.addmm_(shares, exact)
                taken = values.T  # those that are not rounded yet are 0
                rows = zip(*(each.unbind() for each in (due, values, -shares)), strict=True)
                for at, (column, value, share) in enumerate(rows, start):
                    snap(at, column.addmv_(taken, share), value)
                exact.sub_(values)
        return rounded


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
    groups = weight.shape[1] // group_size
    weights = importance.float().view(groups, 1, group_size)
    # Groups lie side by side, entry by entry: one scale after the other, as entries do.
    parts = [
        _scales(rows.T.contiguous().view(groups, group_size, -1), form, weights, dtype)
        for rows in torch.split(weight.float(), max(CHUNK // weight.shape[1], 1))
    ]
    scale, zero = (torch.cat(each, 1).T.contiguous() for each in zip(*parts, strict=True))
    return scale.to(weight), zero.to(weight)


def _scales(
    entries: Float[Tensor, "groups size rows"],
    form: Quantized,
    weights: Float[Tensor, "groups 1 size"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "groups rows"], Float[Tensor, "groups rows"]]:
    most = 2**form.bits - 1
    low = entries.amin(1, keepdim=True).clamp_max(0.0)
    high = entries.amax(1, keepdim=True).clamp_min(0.0)
    if form.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    exact, codes = torch.empty_like(entries), torch.empty_like(entries)
    for clip in CLIPS_OF.get(form.bits, CLIPS):
        step = ((high - low) * (clip / most)).to(dtype).to(entries)
        step = torch.where(step > 0, step, torch.ones_like(step))
        middle = torch.full_like(step, 2.0 ** (form.bits - 1))
        if not form.symmetric:
            middle = (-low * clip / step).round().clamp(0, most)
        torch.addcmul(middle, entries, step.reciprocal(), out=exact)
        torch.round(exact, out=codes).clamp_(0, most).sub_(exact)
        total = torch.bmm(weights, codes.mul_(codes)).mul_(step.square())
        better = total < best
        best = torch.where(better, total, best)
        scale, zero = torch.where(better, step, scale), torch.where(better, middle, zero)
    return scale[:, 0], zero[:, 0]


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
        made.append(rounded(form, codes, scale, zero, dtype))
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
    lines = SideBySide.of(grids, steps, order)
    rest = weight.float().T.index_select(0, order).repeat(1, len(grids))
    parts = lines.codes(gptq.round(rest, lines.snap)).chunk(len(grids))
    return [
        rounded(form, part, *step, dtype)
        for (form, _), part, step in zip(grids, parts, steps, strict=True)
    ]


@dataclass(frozen=True)
class SideBySide:
    """Grids of several bases side by side, for columns that are rounded in an order.

    Attributes:
        order: Of the inputs.
        group: Of each column in order, among groups of the finest grid.
        scale: ``(groups, grids * out)``, float32, as ``zero``, the integer of 0.
        columns: Of each column in order: scale, and the least and the largest integer less zero.
    """

    order: Int64[Tensor, " in"]
    group: Int64[Tensor, " in"]
    scale: Float[Tensor, "groups rows"]
    zero: Float[Tensor, "groups rows"]
    columns: Sequence[tuple[Tensor, ...]]

    @classmethod
    def of(
        cls,
        grids: Sequence[tuple[Quantized, int]],
        steps: Sequence[tuple[Tensor, Tensor]],
        order: Int64[Tensor, " in"],
    ) -> SideBySide:
        """Return those of forms and group sizes, with scale and zero point of every group."""
        finest = math.gcd(*(size for _, size in grids))

        def groups(index: int) -> Tensor:
            wide = [
                each[index].T.repeat_interleave(size // finest, 0)
                for each, (_, size) in zip(steps, grids, strict=True)
            ]
            return torch.cat(wide, 1).float()

        scale, zero, group = groups(0), groups(1), order // finest
        largest = [
            torch.full((len(step),), 2.0**form.bits - 1)
            for (form, _), (step, _) in zip(grids, steps, strict=True)
        ]
        lines = [each.unbind() for each in (scale, -zero, torch.cat(largest).to(zero) - zero)]
        by_group = [*zip(*lines, strict=True)]
        return cls(order, group, scale, zero, [by_group[index] for index in group.tolist()])

    def snap(self, at: int, column: Tensor, value: Tensor) -> None:
        """Round a column to the nearest numbers of its groups, as of :data:`Snap`."""
        step, least, largest = self.columns[at]
        column.div_(step).round_()
        torch.mul(torch.clamp(column, least, largest, out=column), step, out=value)

    def codes(self, numbers: Float[Tensor, "in rows"]) -> UInt8[Tensor, "rows in"]:
        """Return the integers of rounded columns, with inputs as they were; overwrites them."""
        codes = torch.empty(numbers.shape, dtype=torch.uint8, device=numbers.device)
        for start in range(0, len(numbers), PANEL):
            panel = slice(start, start + PANEL)
            index, columns = self.group[panel], numbers[panel]
            columns.div_(self.scale[index]).round_().add_(self.zero[index])
            codes[self.order[panel]] = columns.to(torch.uint8)
        return codes.T


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

        def snap(at: int, column: Tensor, value: Tensor) -> None:
            indices[at] = _nearest(column[:, None], table)[:, 0]
            value.copy_(table.gather(1, indices[at][:, None])[:, 0])

        gptq.round(rest, snap)
        codes = indices[gptq.order.argsort()].T
    packed = pack(codes.to(torch.uint8).contiguous(), form.bits)
    shape = (weight.shape[0], weight.shape[1])
    return Base(form, (), shape, {"packed": packed, "table": table.to(dtype)}, dtype)


def rounded(
    form: Quantized, codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype
) -> Base:
    """Return the base of integers, zero points included."""
    tensors = {"packed": pack(codes.to(torch.uint8).contiguous(), form.bits)}
    tensors["scale"] = scale.to(dtype)
    if not form.symmetric:
        tensors["zero"] = zero.to(torch.uint8)
    shape = (codes.shape[0], codes.shape[1])
    return Base(form, (shape[1] // scale.shape[1],), shape, tensors, dtype)
