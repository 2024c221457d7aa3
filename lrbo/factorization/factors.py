"""Factored once, every rank is a prefix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lrbo.families import is_pointwise
from lrbo.layers import LowRankLinear, PivotedLinear
from lrbo.pivoting import pivot


@runtime_checkable
class NestedFactors(Protocol):
    """A layer factored once; each rank uses a prefix of the same tensors."""

    @property
    def max_rank(self) -> int:
        """Return the largest rank at hand."""
        ...

    def at_rank(self, rank: int) -> nn.Module:
        """Return the layer at a rank, from views of the factors."""
        ...

    def error_at(self, rank: int) -> float:
        """Return the error of a rank, in the method's own metric."""
        ...


@dataclass(frozen=True)
class LowRankFactors:
    """A linear layer factored once, from which every rank is a prefix.

    The rank-``r`` layer is ``x -> left[:, :r] @ (right[:r] @ x) + bias_at(r)``.

    Attributes:
        left: ``(out, k)``, columns in order of decreasing importance.
        right: ``(k, in)``, rows in the same order.
        tail: ``(k + 1,)``, error left at rank 0, 1, ..., ``k``, float64: squared, and summed over
            outputs; per token where the method weighs by a covariance.
        offset: ``(out,)``, the bias that the layer falls back to at rank 0, or ``None`` for a
            layer without bias.
        center: ``(in,)``, the input at which the layer answers ``offset`` at every rank: the
            mean input, if ``offset`` is the mean output. ``None`` where the bias does not depend
            on the rank.
        loss: ``(k + 1,)``, float64, predicted increase of the model's loss at rank 0, 1, ...,
            ``k``, nats per token: comparable between layers and methods. ``None`` where
            calibration took no output gradients.
    """

    left: Float[Tensor, "out k"]
    right: Float[Tensor, "k in"]
    tail: Float[Tensor, " k_plus_1"]
    offset: Float[Tensor, " out"] | None = None
    center: Float[Tensor, " in"] | None = None
    loss: Float[Tensor, " k_plus_1"] | None = None

    @property
    def max_rank(self) -> int:
        """Return the number of directions at hand."""
        return self.right.shape[0]

    @property
    def has_effect(self) -> bool:
        """Say whether any rank costs anything: not where zeros or a bias make up for all."""
        return float(self.tail[0]) > 0 and (self.loss is None or float(self.loss[0]) > 0)

    def bias_at(self, rank: int) -> Float[Tensor, " out"] | None:
        """Return the bias of the rank-``rank`` layer, shape ``(out,)``, or ``None``.

        It is ``offset`` itself, or, with a ``center``, ``offset - W_r center``.
        """

        def linear(x: Float[Tensor, " in"]) -> Float[Tensor, " out"]:
            left, right = self.left[:, :rank].to(x.dtype), self.right[:rank].to(x.dtype)
            return left @ (right @ x)

        return self.bias_for(linear, self.left.dtype)

    def bias_for(
        self,
        linear: Callable[[Float[Tensor, " in"]], Float[Tensor, " out"]],
        dtype: torch.dtype,
    ) -> Float[Tensor, " out"] | None:
        """Return the bias with which ``linear`` answers ``offset`` at ``center``, or ``None``.

        It is the small difference of large vectors, so it is formed in float32 at least, from
        weights as they are after rounding, and rounded once. In bfloat16 throughout, its
        error was half of its length in some layers of SmolLM2-135M, the same for every token.

        Args:
            linear: The layer without bias, with rounded weights; computes in the dtype it is
                given.
            dtype: Of the bias.
        """
        if self.offset is None or self.center is None:
            return None if self.offset is None else self.offset.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return (self.offset.to(wide) - linear(self.center.to(wide))).to(dtype)

    def at_rank(self, rank: int) -> LowRankLinear:
        """Return the rank-``rank`` layer; its matrices are views, so this copies only a bias.

        Raises:
            ValueError: If the rank is not in ``0..max_rank``.
        """
        self._check(rank)
        return LowRankLinear.from_tensors(
            self.left[:, :rank], self.right[:rank], self.bias_at(rank)
        )

    def error_at(self, rank: int) -> float:
        """Return the error of the rank-``rank`` layer in the method's own metric.

        Raises:
            ValueError: If the rank is not in ``0..max_rank``.
        """
        self._check(rank)
        return float(self.tail[rank])

    def to(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        max_rank: int | None = None,
    ) -> LowRankFactors:
        """Return a copy for running: other dtype or device, only the leading directions.

        ``left`` is laid out by direction, so that a prefix of it is contiguous in memory. What
        the bias is made of stays in float32 at least.

        Args:
            dtype: Of ``left`` and ``right``; ``None`` keeps theirs.
            device: Of all but the errors and losses; ``None`` keeps theirs.
            max_rank: So many directions are kept, at most; ``None`` keeps all.
        """
        count = self.max_rank if max_rank is None else min(max_rank, self.max_rank)
        wide = None if dtype is None else torch.promote_types(dtype, torch.float32)

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device=device, dtype=wide)

        left = self.left[:, :count].T.contiguous().to(device=device, dtype=dtype)
        right = self.right[:count].contiguous().to(device=device, dtype=dtype)
        return LowRankFactors(
            left.T,
            right,
            self.tail[: count + 1],
            move(self.offset),
            move(self.center),
            None if self.loss is None else self.loss[: count + 1],
        )

    def _check(self, rank: int) -> None:
        """Refuse a rank that no prefix has."""
        if not 0 <= rank <= self.max_rank:
            raise ValueError(f"rank {rank} is outside 0..{self.max_rank}.")


@dataclass(frozen=True)
class PivotedFactors:
    """The same layers in pivoted storage: each rank is converted, not sliced.

    Attributes:
        factors: As precise as they are at hand; the conversion runs in float64.
        dtype: Of the layers that are returned.
        name: Of the layer, for messages.
    """

    factors: LowRankFactors
    dtype: torch.dtype
    name: str = "layer"

    @property
    def max_rank(self) -> int:
        """Return the number of directions at hand."""
        return self.factors.max_rank

    def at_rank(self, rank: int) -> PivotedLinear:
        """Convert the rank-``rank`` layer, round it, and form its bias from the rounded weights.

        Raises:
            ValueError: If the rank is not in ``0..max_rank``.
        """
        found = self.factors.at_rank(rank)
        form = pivot(found.left.weight, found.right.weight, f"{self.name} at rank {rank}")
        device = found.left.weight.device
        layer = PivotedLinear.from_pivoting(form, dtype=self.dtype, device=device)

        def linear(x: Float[Tensor, " in"]) -> Float[Tensor, " out"]:
            pivots = layer.rows.weight.to(x.dtype) @ x
            others = layer.coefficients.weight.to(x.dtype) @ pivots
            return torch.cat([pivots, others])[layer.places]

        bias = self.factors.bias_for(linear, self.dtype)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer.take_pointwise(is_pointwise(self.name))

    def error_at(self, rank: int) -> float:
        """Return the error of the rank-``rank`` layer in the method's own metric.

        Raises:
            ValueError: If the rank is not in ``0..max_rank``.
        """
        return self.factors.error_at(rank)
