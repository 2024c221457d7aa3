"""Bases: what can stand for a whole weight, before a low rank of what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.errors import StatisticsError
from lrbo.layers.based import BasedLinear, Factors, dense_of
from lrbo.layers.form import Level
from lrbo.layers.forms import Based
from lrbo.layers.low_rank import Bias
from lrbo.layers.options import Option
from lrbo.linalg import require_finite

PANEL = 32  # columns, after whose rounding the others are corrected together
# Row by row what a column of a weight becomes: its position in order, its values so far, and those
# of the columns from it to the end of the panel, ``(columns, rows)``.
Snap = Callable[[int, Tensor, Tensor], Tensor]


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


def compensate(weight: Float[Tensor, "in rows"], root: Float[Tensor, "in in"], snap: Snap) -> None:
    """Replace column after column, and move what each leaves to the columns to come, in place.

    Greedily, for the least of ``tr(E H E^T)``, with ``root^T root = H^-1``; ``weight`` lies by
    columns. What ``snap`` returns is what the column becomes.

    References:
        Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
        Transformers*, ICLR 2023, algorithm 1; Frantar and Alistarh, *SparseGPT: Massive Language
        Models Can Be Accurately Pruned in One-Shot*, ICML 2023, algorithm 1.
    """
    width = len(weight)
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        panel, errors = weight[start:stop], torch.empty_like(weight[start:stop])
        for index in range(stop - start):
            at = start + index
            error = panel[index] - snap(at, panel[index], panel[index:])
            error /= root[at, at]
            errors[index] = error
            if index + 1 < stop - start:
                panel[index + 1 :].addr_(root[at, at + 1 : stop], error, alpha=-1.0)
        weight[stop:].addmm_(root[start:stop, stop:].T, errors, alpha=-1.0)


def inverse_root(
    moment: Float[Tensor, "in in"], damping: float, name: str
) -> Float[Tensor, "in in"]:
    """Return the upper ``U`` with ``U^T U = (C + damping * mean(diag C) I)^-1``, float64.

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
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    for share in (damping, *(10.0**power for power in range(-6, 1))):
        if share < damping:
            continue
        # With H = M M^T for an upper M, the inverse is M^-T M^-1.
        damped = (moment.double() + share * mean * identity).flip(0, 1)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        if share > damping:
            raise StatisticsError(
                f"{name} is not positive definite with a damping of {damping:g}; raise "
                f"bases.damping to {share:g}, or use more calibration tokens."
            )
        upper: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        return upper
    raise StatisticsError(
        f"{name} is not positive definite even with a damping of 1; it is no second moment."
    )
