"""Modules that run factored weights: LowRankLinear, and PivotedLinear (PIFA form)."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lrbo.pivoting import Pivoting


def no_weight(like: Tensor) -> Tensor:
    """Return what a low-rank layer has under the name of the dense weight: no number at all.

    A loader that does not know low-rank layers would find nothing under that name in a
    checkpoint and start the layer at random; over another shape it stops.
    """
    return like.new_empty(0)


L = TypeVar("L", bound=nn.Linear)


def linear_of(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    kind: type[L] = nn.Linear,  # type: ignore[assignment]
) -> L:
    """Wrap tensors without copying them: views stay views."""
    with torch.device("meta"), warnings.catch_warnings():
        # Rank 0 is a layer too: the one that answers its bias.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        layer = kind(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


class LowRankLinear(nn.Module):
    """x -> left(right(x)): two nn.Linear, so that dtype and device moves and adapters just work.

    Attributes:
        right: ``in -> rank``, without bias.
        left: ``rank -> out``, with the bias of the layer, if any.
        weight: Empty; see :func:`no_weight`.
    """

    weight: Tensor

    def __init__(self, right: nn.Linear, left: nn.Linear) -> None:
        super().__init__()
        self.right = right
        self.left = left
        self.register_buffer("weight", no_weight(left.weight.detach()))

    @classmethod
    def from_tensors(
        cls,
        left: Float[Tensor, "out r"],
        right: Float[Tensor, "r in"],
        bias: Float[Tensor, " out"] | None,
    ) -> LowRankLinear:
        """Wrap tensors without copying them: views stay views."""
        return cls(linear_of(right, None), linear_of(left, bias))

    @classmethod
    def empty(cls, out_features: int, in_features: int, rank: int, *, bias: bool) -> LowRankLinear:
        """Return a layer on the meta device, for weights to be loaded into."""
        with torch.device("meta"):
            return cls.from_tensors(
                torch.empty(out_features, rank),
                torch.empty(rank, in_features),
                torch.empty(out_features) if bias else None,
            )

    @property
    def rank(self) -> int:
        """Return the inner dimension."""
        return self.right.out_features

    @property
    def bias(self) -> Tensor | None:
        """Return the bias of the layer, ``(out,)``, if it has one."""
        bias: Tensor | None = self.left.bias
        return bias

    def multiplied(self) -> Float[Tensor, "out in"]:
        """Return the dense weight that the layer stands for, in float64."""
        return self.left.weight.double() @ self.right.weight.double()

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Apply the layer."""
        result: Tensor = self.left(self.right(x))
        return result


class Product(nn.Linear):
    """A linear map whose answer may lie in memory by columns, all rows of one feature together.

    Features are then put in order by copying rows of memory, several times as fast on a CPU as
    moving numbers within rows (``experiments/bench_speed``).

    Attributes:
        pointwise: See :class:`PivotedLinear`.
    """

    pointwise = False

    def forward(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """Apply the layer, which has no bias."""
        # A quantized or distributed weight is a tensor of its own kind, which may only be a factor
        # on the right.
        if by_columns(x, self.pointwise) and type(self.weight) in (nn.Parameter, Tensor):
            return nn.functional.linear(self.weight, x).T
        return super().forward(x)


def by_columns(x: Tensor, pointwise: bool) -> bool:
    """Return whether a pivoted layer works by columns.

    What has to lie by rows in the end must be transposed, which pays for half precision on a CPU.
    """
    return pointwise or (x.device.type == "cpu" and x.element_size() == 2)


class PivotedLinear(nn.Module):
    """Some outputs are rows times the input, the others combinations of these outputs.

    It holds ``rank * (in + out) - rank**2`` numbers and multiplies as often, where
    :class:`LowRankLinear` needs ``rank * (in + out)`` for the same function. See
    :func:`lrbo.pivoting.pivot`. Both matrices are nn.Linear too, for the same reasons as there.

    Attributes:
        rows: ``in -> rank``, the pivot outputs.
        coefficients: ``rank -> out - rank``, the other outputs in terms of the pivot outputs.
        places: ``(out,)``, int32: where each output is among pivots and others.
        bias: ``(out,)`` or ``None``.
        weight: Empty; see :func:`no_weight`.
        pointwise: Whether answers are only taken number by number, as an activation function
            does, so that they may lie in memory by columns; ``False`` is always right.
    """

    places: Tensor
    weight: Tensor

    def __init__(
        self,
        rows: Float[Tensor, "r in"],
        coefficients: Float[Tensor, "others r"],
        places: Int[Tensor, " out"],
        bias: Float[Tensor, " out"] | None,
    ) -> None:
        super().__init__()
        self.rows = linear_of(rows, None, Product)
        self.coefficients = linear_of(coefficients, None, Product)
        self.pointwise = False
        self.register_buffer("places", places)
        self.register_buffer("weight", no_weight(rows))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_pivoting(
        cls,
        form: Pivoting,
        *,
        dtype: torch.dtype,
        device: torch.device,
        bias: Float[Tensor, " out"] | None = None,
    ) -> PivotedLinear:
        """Round a form to the dtype that it is to run in."""
        rows = form.rows.to(device, dtype)
        coefficients = form.coefficients.to(device, dtype)
        return cls(rows, coefficients, form.order.argsort().to(device, torch.int32), bias)

    @classmethod
    def empty(cls, out_features: int, in_features: int, rank: int, *, bias: bool) -> PivotedLinear:
        """Return a layer on the meta device, for weights to be loaded into."""
        with torch.device("meta"):
            return cls(
                torch.empty(rank, in_features),
                torch.empty(out_features - rank, rank),
                torch.empty(out_features, dtype=torch.int32),
                torch.empty(out_features) if bias else None,
            )

    @property
    def rank(self) -> int:
        """Return the number of pivots."""
        return self.rows.out_features

    @property
    def growth(self) -> float:
        """Return the largest absolute coefficient."""
        coefficients = self.coefficients.weight
        return float(coefficients.abs().max()) if coefficients.numel() else 0.0

    def multiplied(self) -> Float[Tensor, "out in"]:
        """Return the dense weight that the layer stands for, in float64."""
        rows = self.rows.weight.double()
        return torch.cat([rows, self.coefficients.weight.double() @ rows])[self.places]

    def take_pointwise(self, pointwise: bool) -> PivotedLinear:
        """Set ``pointwise``, here and in both matrices, and return the layer."""
        self.pointwise = self.rows.pointwise = self.coefficients.pointwise = pointwise
        return self

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Apply the layer."""
        pivots = self.rows(x.reshape(-1, x.shape[-1]))
        others = self.coefficients(pivots)
        if by_columns(x, self.pointwise):
            result = torch.cat([pivots.T, others.T]).index_select(0, self.places).T
            if not self.pointwise:
                result = result.contiguous()
        else:
            both = torch.cat([pivots, others], -1)
            if x.device.type == "cpu":  # there index_select takes up to ten times as long
                result = both.gather(-1, self.places.long().expand_as(both))
            else:
                result = both.index_select(-1, self.places)
        if self.bias is not None:
            result = result.add_(self.bias)
        return result.view(*x.shape[:-1], len(self.places))
