"""Modules that run factored weights: LowRankLinear."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn


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

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Apply the layer."""
        result: Tensor = self.left(self.right(x))
        return result
