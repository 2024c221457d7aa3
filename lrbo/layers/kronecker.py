"""A linear layer that is a sum of Kronecker products, run without forming the sum."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lrbo.layers.form import Level
from lrbo.layers.kronecker_form import Kronecker
from lrbo.layers.low_rank import Bias, FormModule

KroneckerLeft = Float[Tensor, "terms rows columns"]
KroneckerRight = Float[Tensor, "terms block_rows block_columns"]


def sum_of(left: KroneckerLeft, right: KroneckerRight) -> Float[Tensor, "out in"]:
    """Return ``sum_k left_k (x) right_k``."""
    product = left.flatten(1).T @ right.flatten(1)
    rows = product.view(*left.shape[1:], *right.shape[1:]).transpose(1, 2)
    return rows.reshape(left.shape[1] * right.shape[1], left.shape[2] * right.shape[2])


class KroneckerLinear(FormModule):
    """x -> sum_k A_k X B_k^T, where X is x as a matrix, row by row.

    Attributes:
        left: ``A``, ``(terms, rows, columns)``.
        right: ``B``, ``(terms, out / rows, in / columns)``.
    """

    def __init__(self, left: KroneckerLeft, right: KroneckerRight, bias: Bias) -> None:
        """Wrap tensors without copying them: views stay views."""
        shape = left.shape[1] * right.shape[1], left.shape[2] * right.shape[2]
        super().__init__(*shape, len(left), left.detach())
        self.left = nn.Parameter(left, requires_grad=False)
        self.right = nn.Parameter(right, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        left_first, right_first = Kronecker.orders(*shape, (left.shape[1], left.shape[2]))
        self.is_left_first = left_first <= right_first

    @classmethod
    def on_meta(
        cls, out_features: int, in_features: int, level: Level, *, bias: bool
    ) -> KroneckerLinear:
        """Return a layer for weights to be loaded into."""
        rows, columns, terms = level
        block = Kronecker.block(out_features, in_features, (rows, columns))
        with torch.device("meta"):
            left, right = torch.empty(terms, rows, columns), torch.empty(terms, *block)
            return cls(left, right, torch.empty(out_features) if bias else None)

    @override
    def dense_weight(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out in"]:
        return sum_of(self.left.to(dtype), self.right.to(dtype))

    @override
    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        terms, rows, columns = self.left.shape
        _, block_rows, block_columns = self.right.shape
        matrix = x.reshape(-1, columns, block_columns)
        tokens, linear = len(matrix), nn.functional.linear
        # Rows are in two dimensions: a product of strided ones is many small products.
        if self.is_left_first:
            inputs = matrix.transpose(1, 2).reshape(-1, columns)
            inner = linear(inputs, self.left.flatten(0, 1)).view(
                tokens, block_columns * terms, rows
            )
            result = (self.right.permute(1, 2, 0).flatten(1) @ inner).transpose(1, 2)
        else:
            inner = linear(matrix.reshape(-1, block_columns), self.right.flatten(0, 1))
            inner = inner.view(tokens, columns, terms, block_rows).permute(0, 3, 2, 1)
            outer = linear(
                inner.reshape(tokens * block_rows, terms * columns),
                self.left.transpose(0, 1).flatten(1),
            )
            result = outer.view(tokens, block_rows, rows).transpose(1, 2)
        result = result.reshape(*x.shape[:-1], self.out_features)
        return result if self.bias is None else result + self.bias
