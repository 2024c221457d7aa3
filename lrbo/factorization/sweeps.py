"""Integers decided on again, each for what all others leave: sweeps of coordinate descent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.errors import StatisticsError
from lrbo.factorization.bases import PANEL, Base
from lrbo.factorization.rounding import INPUTS, InputMetric, SideBySide, Snap, rounded
from lrbo.layers.forms import Quantized
from lrbo.layers.packing import unpack

CHUNK = 2**24  # entries of the systems for scales that are solved at a time


def swept(
    weight: Float[Tensor, "out in"], bases: Sequence[Base], metric: InputMetric, sweeps: int
) -> list[Base]:
    """Lower ``tr(E H E^T)`` of integer bases, row by row, by sweeps over scales and integers.

    A sweep solves all scales of a row by least squares, and rounds them to the dtype that they are
    stored in. Then it decides on one input after another, in the order of GPTQ: given the errors
    ``E`` of all others, the best real value is ``W_j + sum_i E_i H_ij / H_jj``, and as the error is
    a parabola in it, the integer nearest to that is the best one. Zero points stay. A row that is
    not better after a sweep stays as it was before.

    Args:
        weight: ``(out, in)``, which the bases stand for.
        bases: In integers; they are swept side by side.
        metric: What errors are weighed with.
        sweeps: How many, at least 0.

    Raises:
        StatisticsError: If ``H`` is not positive definite; says which damping is enough.

    References:
        Behdin et al., *QuantEase: Optimization-based Quantization for Language Models*, 2023,
        algorithm 1, which begins at the nearest integers and keeps their scales.
    """
    if not bases or not sweeps:
        return [*bases]
    order = metric.gptq.order  # which refuses what is no metric
    exact = weight.double()
    integers = [_Integers.of(exact, base, metric.damped) for base in bases]
    grids = [(each.form, each.size) for each in integers]
    given = weight.float().T.index_select(0, order).repeat(1, len(bases))
    shares = _shares(metric)
    for _ in range(sweeps):
        scales = [each.best_scale() for each in integers]
        pairs = [*zip(integers, scales, strict=True)]
        errors = torch.cat([each.left_by(each.codes, scale).float().T for each, scale in pairs], 1)
        lines = SideBySide.of(grids, [(scale, each.zero) for each, scale in pairs], order)
        # What an entry leaves is far larger than its rounding in float32, as of GPTQ.
        numbers = _decided(given, shares, errors.index_select(0, order), lines.snap)
        parts = lines.codes(numbers).chunk(len(bases))
        integers = [
            each.or_better(part.double() - each.wide(each.zero), scale)
            for (each, scale), part in zip(pairs, parts, strict=True)
        ]
    return [each.base for each in integers]


def _decided(
    columns: Float[Tensor, "in rows"],
    shares: Float[Tensor, "in in"],
    errors: Float[Tensor, "in rows"],
    snap: Snap,
) -> Float[Tensor, "in rows"]:
    """Round column after column again, each to what the errors of all others make of it.

    ``errors`` are what each leaves so far, and are updated.
    """
    rounded = torch.empty_like(columns)
    for start in range(0, len(columns), PANEL):
        own, behind = slice(start, start + PANEL), slice(start + PANEL, None)
        given, left = columns[own], errors[own]
        due = torch.addmm(given, shares[:start, own].T, errors[:start])
        due.addmm_(shares[behind, own].T, errors[behind])
        within = shares[own, own].T.contiguous()
        lines = (given, due, left, rounded[own], within)
        rows = zip(*(each.unbind() for each in lines), strict=True)
        for at, (exact, column, error, value, share) in enumerate(rows, start):
            snap(at, column.addmv_(left.T, share), value)
            torch.sub(exact, value, out=error)
    return rounded


def _shares(metric: InputMetric) -> Float[Tensor, "in in"]:
    """Return ``H_ij / H_jj`` in the order of GPTQ, without a diagonal, float32."""
    order = metric.gptq.order
    shares = metric.damped.index_select(0, order).index_select(1, order)
    shares = shares.div_(shares.diagonal().clone()).float()
    shares.diagonal().zero_()
    return shares


@dataclass(frozen=True)
class _Integers:
    """The integers of a weight between two sweeps, and what they leave, all in float64.

    Attributes:
        form: Theirs.
        dtype: Of scales as they are stored; ``scale`` holds only numbers that it has.
        moment: ``H``.
        weight: ``(out, in)``.
        zero: The zero point of every group.
        scale: Of every group.
        codes: The integers, less their zero points.
        slope: ``E H``.
        error: The diagonal of ``E H E^T``.
    """

    form: Quantized
    dtype: torch.dtype
    moment: Float[Tensor, "in in"]
    weight: Float[Tensor, "out in"]
    zero: Float[Tensor, "out groups"]
    scale: Float[Tensor, "out groups"]
    codes: Float[Tensor, "out in"]
    slope: Float[Tensor, "out in"]
    error: Float[Tensor, " out"]

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], base: Base, moment: Tensor) -> _Integers:
        """Return those of a base."""
        form, scale = base.form, base.tensors["scale"].double()
        assert isinstance(form, Quantized)
        middle = torch.full_like(scale, 2.0 ** (form.bits - 1))
        zero = middle if form.symmetric else base.tensors["zero"].double()
        codes = unpack(base.tensors["packed"], form.bits).double()
        codes.sub_(zero.repeat_interleave(weight.shape[1] // zero.shape[1], 1))
        nothing = torch.zeros_like(weight), weight.new_full((len(weight),), torch.inf)
        start = cls(form, base.dtype, moment, weight, zero, scale, codes, *nothing)
        return start.or_better(codes, scale)

    @property
    def size(self) -> int:
        """How many inputs a group has."""
        return self.weight.shape[1] // self.scale.shape[1]

    def left_by(self, codes: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> Tensor:
        """Return ``E`` of other integers and scales."""
        return self.weight - codes * self.wide(scale)

    def wide(self, groups: Float[Tensor, "out groups"]) -> Float[Tensor, "out in"]:
        """Repeat what is of groups for each of their inputs."""
        return groups.repeat_interleave(self.size, 1)

    @property
    def base(self) -> Base:
        """The base as it is stored."""
        codes = self.codes + self.wide(self.zero)
        return rounded(self.form, codes, self.scale, self.zero, self.dtype)

    def or_better(
        self, codes: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"]
    ) -> _Integers:
        """Take the rows of other integers and scales that leave less."""
        left = self.left_by(codes, scale)
        slope = left @ self.moment
        error = (left * slope).sum(1)
        better = error < self.error
        rows = better[:, None]
        return replace(
            self,
            scale=torch.where(rows, scale, self.scale),
            codes=torch.where(rows, codes, self.codes),
            slope=torch.where(rows, slope, self.slope),
            error=torch.where(better, error, self.error),
        )

    def best_scale(self) -> Float[Tensor, "out groups"]:
        """Return the scales of least error for these integers, as they are stored.

        A group of only zero points keeps its own, and so does one that would not be positive.
        """
        count = self.scale.shape[1]
        rows = max(CHUNK // count**2, 1)
        pairs = zip(torch.split(self.codes, rows), torch.split(self.slope, rows), strict=True)
        change = torch.cat([self._change(codes, slope) for codes, slope in pairs])
        scale = (self.scale + change).to(self.dtype).double()
        return torch.where((scale > 0) & scale.isfinite(), scale, self.scale)

    def _change(
        self, codes: Float[Tensor, "rows in"], slope: Float[Tensor, "rows in"]
    ) -> Float[Tensor, "rows groups"]:
        """Solve the normal equations of the scales of some rows, from where they are."""
        rows, size, count = len(codes), self.size, self.scale.shape[1]
        gram = codes.new_zeros(rows, count, count)  # the lower half
        for index in range(count):
            own, on = slice(index * size, (index + 1) * size), slice(index * size, None)
            products = (codes[:, own] @ self.moment[own, on]).mul_(codes[:, on])
            gram[:, index:, index] = products.view(rows, -1, size).sum(2)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal.add_(diagonal == 0)  # of zeros alone: no change
        root, failed = torch.linalg.cholesky_ex(gram)
        if bad := int((failed != 0).sum()):
            raise StatisticsError(
                f"the scales of {bad} rows cannot be solved in {INPUTS}; raise bases.damping, or "
                "take bases.sweeps=0."
            )
        due = (codes * slope).view(rows, count, size).sum(2, keepdim=True)
        return torch.cholesky_solve(due, root)[:, :, 0]
