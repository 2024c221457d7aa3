"""Bases: what can stand for a whole weight, before a low rank of what it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lrbo.errors import StatisticsError
from lrbo.layers.based import BasedLinear, Factors, dense_of
from lrbo.layers.form import Level
from lrbo.layers.forms import Based
from lrbo.layers.low_rank import Bias
from lrbo.layers.options import Option
from lrbo.linalg import require_finite

PANEL = 32  # columns, after whose rounding the others are corrected together


@dataclass(frozen=True)
class Base:
    """A base of a weight: its tensors, as of :func:`lrbo.layers.based.shapes_of`."""

    form: Based
    level: Level
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype  # of the tensors that are no integers, those of a low rank over it included

    @property
    def family(self) -> Option:
        """The option, without its rank."""
        return Option(self.form.name, self.level)

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return the weight that the base stands for."""
        return dense_of(self.form, self.shape, self.tensors, dtype)

    def module(self, factors: Factors | None, bias: Bias, device: torch.device) -> BasedLinear:
        """Return the layer with a low rank over the base; its tensors are views."""
        like = torch.empty(0, dtype=self.dtype, device=device)
        return BasedLinear(self.form, self.shape, self.tensors, factors, bias, like)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Base:
        """Return a copy elsewhere, with floating-point tensors of another dtype."""
        moved = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self.tensors.items()
        }
        return Base(self.form, self.level, self.shape, moved, dtype or self.dtype)


def upper_root(
    moment: Float[Tensor, "in in"],
    damping: float,
    name: str,
    order: Int64[Tensor, " in"] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "in in"]:
    """Return the upper ``M`` with ``M M^T = C + damping * mean(diag C) I``, made in a dtype.

    Raises:
        StatisticsError: If that is not positive definite; says which damping is enough.
    """
    require_finite(name, moment)
    mean = float(moment.diagonal().mean())
    if not mean > 0:
        raise StatisticsError(
            f"{name} has a mean diagonal of {mean:.3e}, expected a positive one: nothing was "
            "measured. Calibrate on text that reaches this layer."
        )
    order = torch.arange(len(moment), device=moment.device) if order is None else order
    turned = order.flip(0)
    for share in (damping, *(10.0**power for power in range(-6, 1))):
        if share < damping:
            continue
        # Of rows and columns from the last to the first it is the lower one.
        damped = moment.to(dtype).index_select(0, turned).index_select(1, turned)
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        if share > damping:
            raise StatisticsError(
                f"{name} is not positive definite with a damping of {damping:g}; raise "
                f"bases.damping to {share:g}, or use more calibration tokens."
            )
        upper: Tensor = lower.flip(0, 1)
        return upper
    raise StatisticsError(
        f"{name} is not positive definite even with a damping of 1; it is no second moment."
    )
