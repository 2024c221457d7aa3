"""A layer factored once: every rank is a prefix of the same factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lrbo.layers.forms import form_named
from lrbo.layers.low_rank import Bias, LowRankLinear, is_dearer, linear_of
from lrbo.layers.modules import PRODUCTS
from lrbo.layers.options import Losses, Option, Section
from lrbo.layers.product_form import Factored

Buffers = MutableMapping[str, Tensor]
Curve = Literal["loss", "error"]  # of a section: predicted losses, or relative output errors
CURVES = ("tail", "loss", "error")  # by rank
PARTS = ("left", "right", "tail", "offset", "center", "loss", "error")


def bias_of(
    offset: Bias,
    center: Float[Tensor, " in"] | None,
    linear: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> Bias:
    """Return the bias of a dtype with which a layer gives ``offset`` at ``center``, if any.

    ``linear`` is the layer without bias, with rounded weights, in the dtype of its input. The bias
    is the small difference of large vectors, so it is formed in float32 at least: in bfloat16 its
    error was half of its length in some layers of SmolLM2-135M.
    """
    if offset is None or center is None:
        return None if offset is None else offset.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (offset.to(wide) - linear(center.to(wide))).to(dtype)


@dataclass(frozen=True)
class LowRankFactors:
    """A linear layer factored once, from which every rank is a prefix.

    The rank-``r`` layer is ``x -> left[:, :r] @ (right[:r] @ x) + bias_at(r)``. A rank outside
    ``0..max_rank`` is a ValueError, of every method that takes one.

    Attributes:
        left: Columns in order of decreasing importance.
        right: Rows in the same order.
        tail: Error at rank 0, 1, ..., ``k``, float64: squared, and summed over outputs; per token
            where the method weighs by a covariance.
        offset: The bias at rank 0, or ``None`` for a layer without bias.
        center: The input that gives ``offset`` at every rank: the mean input, if ``offset`` is the
            mean output. ``None`` where the bias does not depend on the rank.
        loss: Predicted increase of the model's loss at rank 0, 1, ..., ``k``, nats per token,
            float64. ``None`` where calibration took no output gradients.
        error: Relative error of the layer's output at rank 0, 1, ..., ``k``, as stored, float64.
            ``None`` where it was not asked for.
    """

    left: Float[Tensor, "out k"]
    right: Float[Tensor, "k in"]
    tail: Float[Tensor, " k_plus_1"]
    offset: Bias = None
    center: Float[Tensor, " in"] | None = None
    loss: Float[Tensor, " k_plus_1"] | None = None
    error: Float[Tensor, " k_plus_1"] | None = None

    @property
    def max_rank(self) -> int:
        """The number of directions."""
        return self.right.shape[0]

    @property
    def has_effect(self) -> bool:
        """Whether any rank raises the error: not where zeros or a bias do as well."""
        return float(self.tail[0]) > 0 and (self.loss is None or float(self.loss[0]) > 0)

    @property
    def _curves(self) -> dict[str, Tensor]:
        return {name: each for name in CURVES if (each := getattr(self, name)) is not None}

    def bias_at(self, rank: int) -> Bias:
        """Return the bias at a rank: ``offset``, less ``W_r center`` if that is given."""
        left, right = self.left[:, :rank], self.right[:rank]
        return self.bias_for(lambda x: left.to(x.dtype) @ (right.to(x.dtype) @ x), left.dtype)

    def bias_for(self, linear: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Bias:
        """Return the bias of a layer, as of :func:`bias_of`."""
        return bias_of(self.offset, self.center, linear, dtype)

    def at_rank(self, rank: int) -> LowRankLinear:
        """Return the rank-``rank`` layer; its matrices are views."""
        return LowRankLinear(*self._prefix(rank), self.bias_at(rank))

    def losses(self, section: Section, curve: Curve = "loss") -> Losses | None:
        """Return a curve at rising ranks, up to the largest there is."""
        values: Tensor | None = getattr(self, curve)
        if values is None:
            return None
        ranks = section.levels[section.levels[:, -1] <= self.max_rank, -1]
        losses: Losses = values.numpy().astype(np.float64)[ranks]
        return losses

    def trial_module(self, name: str, option: Option, tokens: int, buffers: Buffers) -> nn.Module:
        """Return the layer of an option for a trial; nothing is factored or pivoted for it.

        Every form of a rank is the same function, so that views of the factors serve for all.
        Where two thin products take more operations for so many tokens than a dense one, the prefix
        is multiplied out, into the buffer of that name, which trials share; a missing one is added.
        """
        layer = self.at_rank(*option.level)
        if not is_dearer(layer.rank, layer.out_features, layer.in_features, tokens):
            return layer
        if name not in buffers:
            buffers[name] = self.left.new_empty(layer.out_features, layer.in_features)
        product = torch.mm(layer.left.weight, layer.right.weight, out=buffers[name])
        # Of the product, which is rounded once.
        bias = self.bias_for(lambda x: product.to(x.dtype) @ x, product.dtype)
        return linear_of(product, bias)

    def stored(self, name: str, option: Option, dtype: torch.dtype) -> nn.Module:
        """Return the layer of an option as a checkpoint has it: exactly as it is counted."""
        left, right = self._prefix(*option.level)
        return PRODUCTS[option.form].of_product(name, left, right, self.bias_for, dtype)

    def stand_in(self, name: str, option: Option) -> nn.Module:
        """Return a layer that takes as long as the stored one; its outputs mean nothing."""
        left, right = self._prefix(*option.level)
        return PRODUCTS[option.form].stand_in(name, left, right, self.bias_at(*option.level))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name; ``left`` transposed, so that its prefixes are contiguous."""
        parts = {part: getattr(self, part) for part in PARTS}
        return {
            part: (tensor.T if part == "left" else tensor).contiguous()
            for part, tensor in parts.items()
            if tensor is not None
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> LowRankFactors:
        """Read what :meth:`tensors` gave; ValueError if shapes do not fit each other."""
        parts = {part: t.T if part == "left" else t for part, t in tensors.items()}
        (rows, rank), (_, columns) = parts["left"].shape, parts["right"].shape
        shapes = {"right": (rank, columns), "tail": (rank + 1,), "offset": (rows,)}
        shapes |= {"center": (columns,), "loss": (rank + 1,), "error": (rank + 1,)}
        for part, shape in shapes.items():
            if part in parts and tuple(parts[part].shape) != shape:
                raise ValueError(f"{part} has shape {tuple(parts[part].shape)}, expected {shape}")
        return cls(**parts)

    def to(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        max_rank: int | None = None,
    ) -> LowRankFactors:
        """Return a copy of other dtype or device, with at most ``max_rank`` leading directions.

        ``left`` is laid out by direction, so that a prefix of it is contiguous in memory.
        ``offset`` and ``center`` stay in float32 at least, and errors and losses where they are.
        """
        count = self.max_rank if max_rank is None else min(max_rank, self.max_rank)
        wide = torch.promote_types(dtype, torch.float32)
        left = self.left[:, :count].T.contiguous().to(device, dtype)
        right = self.right[:count].contiguous().to(device, dtype)
        return LowRankFactors(
            left.T,
            right,
            self.tail[: count + 1],
            None if self.offset is None else self.offset.to(device, wide),
            None if self.center is None else self.center.to(device, wide),
            None if self.loss is None else self.loss[: count + 1],
            None if self.error is None else self.error[: count + 1],
        )

    def part(self, family: Option) -> LowRankFactors:
        """Return the factors of a family: these, which serve all forms that are no more."""
        del family
        return self

    def leading(self, rank: int) -> LowRankFactors:
        """Return the factors up to a rank, as views."""
        return replace(
            self,
            left=self.left[:, :rank],
            right=self.right[:rank],
            **{curve: each[: rank + 1] for curve, each in self._curves.items()},
        )

    def only(
        self, ranks: Mapping[Option, int], dtype: torch.dtype, device: torch.device
    ) -> LowRankFactors | None:
        """Return a copy up to the largest of some ranks, by family; ``None`` if they are 0."""
        own = (ranks[f] for f in ranks if isinstance(form_named(f.form), Factored))
        rank = max(own, default=0)
        return self.to(dtype=dtype, device=device, max_rank=rank) if rank else None

    def bound(self, dense: nn.Module) -> LowRankFactors:
        """Return the factors: no option of theirs needs the dense layer."""
        del dense
        return self

    def _prefix(self, rank: int) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        """Return views of the leading directions."""
        if not 0 <= rank <= self.max_rank:
            raise ValueError(f"rank {rank} is outside 0..{self.max_rank}.")
        return self.left[:, :rank], self.right[:rank]
