"""Modules that run factored weights: LowRankLinear, and PivotedLinear (PIFA form)."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lrbo.pivoting import Pivoting


class LowRankLinear(nn.Module):
    """x -> left(right(x)): two nn.Linear, so that export, dtype and device moves just work.

    Attributes:
        right: ``in -> rank``, without bias.
        left: ``rank -> out``, with the bias of the layer, if any.
    """

    def __init__(self, right: nn.Linear, left: nn.Linear) -> None:
        super().__init__()
        self.right = right
        self.left = left

    @classmethod
    def from_tensors(
        cls,
        left: Float[Tensor, "out r"],
        right: Float[Tensor, "r in"],
        bias: Float[Tensor, " out"] | None,
    ) -> LowRankLinear:
        """Wrap tensors without copying them: views stay views."""
        module = cls.empty(left.shape[0], right.shape[1], right.shape[0], bias=bias is not None)
        module.right.weight = nn.Parameter(right, requires_grad=False)
        module.left.weight = nn.Parameter(left, requires_grad=False)
        if bias is not None:
            module.left.bias = nn.Parameter(bias, requires_grad=False)
        return module

    @classmethod
    def empty(cls, out_features: int, in_features: int, rank: int, *, bias: bool) -> LowRankLinear:
        """Return a layer on the meta device, for weights to be loaded into."""
        with torch.device("meta"), warnings.catch_warnings():
            # Rank 0 is a layer too: the one that answers its bias.
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            right = nn.Linear(in_features, rank, bias=False)
            left = nn.Linear(rank, out_features, bias=bias)
        return cls(right, left)

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


class PivotedLinear(nn.Module):
    """Some outputs are rows times the input, the others combinations of these outputs.

    It holds ``rank * (in + out) - rank**2`` numbers and multiplies as often, where
    :class:`LowRankLinear` needs ``rank * (in + out)`` for the same function. See
    :func:`lrbo.pivoting.pivot`.

    Attributes:
        rows: ``(rank, in)``, the weights of the pivot outputs.
        coefficients: ``(out - rank, rank)``, the other outputs in terms of the pivot outputs.
        places: ``(out,)``, int32: where each output is among pivots and others.
        bias: ``(out,)`` or ``None``.
    """

    places: Tensor

    def __init__(
        self,
        rows: Float[Tensor, "r in"],
        coefficients: Float[Tensor, "others r"],
        places: Int[Tensor, " out"],
        bias: Float[Tensor, " out"] | None,
    ) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows, requires_grad=False)
        self.coefficients = nn.Parameter(coefficients, requires_grad=False)
        self.register_buffer("places", places)
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
        return self.rows.shape[0]

    @property
    def growth(self) -> float:
        """Return the largest absolute coefficient."""
        return float(self.coefficients.abs().max()) if self.coefficients.numel() else 0.0

    def multiplied(self) -> Float[Tensor, "out in"]:
        """Return the dense weight that the layer stands for, in float64."""
        rows = self.rows.double()
        return torch.cat([rows, self.coefficients.double() @ rows])[self.places]

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Apply the layer."""
        pivots = functional.linear(x, self.rows)
        others = functional.linear(pivots, self.coefficients)
        result = torch.cat([pivots, others], -1).index_select(-1, self.places)
        return result if self.bias is None else result.add_(self.bias)
