"""Groups of rows of a table factored one by one, with directions in an order over all groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lrbo.factorization.factors import Buffers, LowRankFactors
from lrbo.layers.frequency import GroupedLinear
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.low_rank import Bias


@dataclass(frozen=True)
class GroupedFactors:
    """Directions of groups of rows, in an order in which every first few stand for the table.

    Attributes:
        groups: Their number.
        order: The rows, group by group.
        owner: The group of each direction.
        rest: The directions: columns of ``left`` are the rows of their group, ``(rows, k)``, zeros
            where the last one has fewer. Errors and losses are those of the whole table with the
            first 0, 1, ..., ``k`` of them.
        offset: The bias, or ``None``.
    """

    groups: int
    order: Int[Tensor, " out"]
    owner: Int[Tensor, " k"]
    rest: LowRankFactors
    offset: Bias = None

    @classmethod
    def of(
        cls, order: Int[Tensor, " out"], parts: Sequence[LowRankFactors], offset: Bias
    ) -> GroupedFactors:
        """Order the directions of all groups by what they save, those of a group as they are.

        As a direction costs as much in any group, the first few are those that save most for what
        they cost; where one saves more than the one before it in its group, both are taken
        for the less.
        """
        size, groups = len(parts[0].left), len(parts)
        most = FrequencyGroups.largest(len(order), parts[0].right.shape[1], groups)
        curves = [part.tail if part.loss is None else part.loss for part in parts]
        saved = torch.cat([(-curve.diff()).cummin(0).values for curve in curves])
        first = saved.argsort(descending=True, stable=True)[:most]
        owner = torch.arange(groups, device=first.device).repeat_interleave(
            torch.tensor([part.max_rank for part in parts], device=first.device)
        )

        def summed(curves: Sequence[Tensor]) -> Tensor:
            """Return the sum over groups after the first 0, 1, ... directions."""
            whole = torch.stack([curve[0] for curve in curves]).sum()
            steps = torch.cat([curve.diff() for curve in curves])[first].cumsum(0)
            return torch.cat([whole[None], whole + steps]).clamp_min(0.0).cummin(0).values

        left = parts[0].left.new_zeros(most, size)
        for number, part in enumerate(parts):
            own = owner[first] == number
            left[own, : len(part.left)] = part.left.T[: int(own.sum())]
        right = torch.cat([part.right for part in parts])[first]
        losses = [part.loss for part in parts if part.loss is not None]
        rest = LowRankFactors(
            left.T,
            right,
            summed([part.tail for part in parts]),
            loss=summed(losses) if losses else None,
        )
        return cls(groups, order.int(), owner[first].int(), rest, offset)

    @property
    def device(self) -> torch.device:
        """Where the directions are."""
        return self.rest.left.device

    def module(self, count: int) -> GroupedLinear:
        """Return the layer of the first directions."""
        if not 1 <= count <= self.rest.max_rank:
            raise ValueError(f"{count} directions are outside 1..{self.rest.max_rank}.")
        owner = self.owner[:count]
        by_group = owner.argsort(stable=True)
        bias = None if self.offset is None else self.offset.to(self.rest.left.dtype)
        return GroupedLinear(
            self.rest.left.T[by_group],
            self.rest.right[by_group],
            owner.bincount(minlength=self.groups).int(),
            self.order.argsort().int(),
            bias,
        )

    def trial_module(self, name: str, count: int, tokens: int, buffers: Buffers) -> nn.Module:
        """Return the layer of the first directions for a trial: as it is stored."""
        del name, tokens, buffers
        return self.module(count)

    def to(
        self, *, dtype: torch.dtype, device: torch.device, max_rank: int | None = None
    ) -> GroupedFactors:
        """Return a copy of other dtype or device, with at most ``max_rank`` directions."""
        rest = self.rest.to(dtype=dtype, device=device, max_rank=max_rank)
        wide = torch.promote_types(dtype, torch.float32)
        return replace(
            self,
            order=self.order.to(device),
            owner=self.owner[: rest.max_rank].to(device),
            rest=rest,
            offset=None if self.offset is None else self.offset.to(device, wide),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for the cache."""
        own = {"order": self.order, "owner": self.owner}
        return self.rest.tensors() | own | ({} if self.offset is None else {"offset": self.offset})

    @classmethod
    def of_tensors(cls, groups: int, tensors: Mapping[str, Tensor]) -> GroupedFactors:
        """Read what :meth:`tensors` gave; ValueError if shapes do not fit each other."""
        given = dict(tensors)
        order, owner, offset = given.pop("order"), given.pop("owner"), given.pop("offset", None)
        rest = LowRankFactors.of_tensors(given)
        expected = [FrequencyGroups.rows(len(order), groups), rest.max_rank, len(order)]
        actual = [len(rest.left), len(owner), len(order if offset is None else offset)]
        if actual != expected:
            raise ValueError(f"frequency groups of sizes {actual}, expected {expected}")
        return cls(groups, order, owner, rest, offset)
