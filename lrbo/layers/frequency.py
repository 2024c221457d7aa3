"""A table in groups of rows, each of which is a product of two thin matrices of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lrbo.layers.form import Level
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.low_rank import Bias, FormModule


class GroupedLinear(FormModule):
    """x -> for every group left_g^T (right_g x), all of them in the order of the rows.

    Attributes:
        left: Rows of the groups by direction, ``(k, rows)``; those that the last group lacks are
            zeros. Directions lie group by group.
        right: ``(k, in)``.
        ranks: Directions of each group, ``(groups,)``, int32.
        index: Where each row is among those of all groups, ``(out,)``, int32.
    """

    ranks: Tensor
    index: Tensor

    def __init__(
        self,
        left: Float[Tensor, "k rows"],
        right: Float[Tensor, "k in"],
        ranks: Int[Tensor, " groups"],
        index: Int[Tensor, " out"],
        bias: Bias,
    ) -> None:
        """Wrap tensors without copying them: views stay views."""
        super().__init__(len(index), right.shape[1], len(right), right.detach())
        self.left = nn.Parameter(left, requires_grad=False)
        self.right = nn.Parameter(right, requires_grad=False)
        self.register_buffer("ranks", ranks)
        self.register_buffer("index", index)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def on_meta(
        cls, out_features: int, in_features: int, level: Level, *, bias: bool
    ) -> GroupedLinear:
        """Return a layer for weights to be loaded into."""
        groups, count = level
        with torch.device("meta"):
            return cls(
                torch.empty(count, FrequencyGroups.rows(out_features, groups)),
                torch.empty(count, in_features),
                torch.empty(groups, dtype=torch.int32),
                torch.empty(out_features, dtype=torch.int32),
                torch.empty(out_features) if bias else None,
            )

    @property
    def problem(self) -> str | None:
        """What is wrong with the numbers of ranks and index; ``None`` if nothing is."""
        ranks, index = self.ranks.cpu(), self.index.cpu()
        if not torch.equal(index.sort().values, torch.arange(len(index)).int()):
            return f"index is no order of the {len(index)} rows"
        if int(ranks.min()) < 0 or int(ranks.sum()) != self.rank:
            return f"ranks do not add up to the {self.rank} directions"
        return None

    def _groups(self) -> Iterator[tuple[Float[Tensor, "r rows"], Float[Tensor, "r in"]]]:
        """Return views of the factors of each group."""
        ranks = self.ranks.tolist()
        return zip(*(torch.split(each, ranks) for each in (self.left, self.right)), strict=True)

    @override
    def dense_weight(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out in"]:
        parts = [left.to(dtype).T @ right.to(dtype) for left, right in self._groups()]
        return torch.cat(parts)[self.index]

    @override
    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        inner = nn.functional.linear(x.reshape(-1, self.in_features), self.right)
        ranks = self.ranks.tolist()
        both = zip(torch.split(inner, ranks, -1), torch.split(self.left, ranks), strict=True)
        rows = torch.cat([own @ left for own, left in both], -1)
        if x.device.type == "cpu":  # there index_select takes up to ten times as long
            result = rows.gather(-1, self.index.long().expand(len(rows), -1))
        else:
            result = rows.index_select(-1, self.index)
        result = result.view(*x.shape[:-1], self.out_features)
        return result if self.bias is None else result.add_(self.bias)

    @override
    def look_up(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        at, size = self.index[ids].long(), self.left.shape[1]
        rows = self.right.new_empty(len(ids), self.in_features)
        for number, (left, right) in enumerate(self._groups()):
            own = (at // size == number).nonzero()[:, 0]
            rows[own] = left[:, at[own] % size].T @ right
        return rows
