"""A trainable base with a low rank over it: integers stay, scales and factors are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lrbo.factorization.quantized_factors import BAND_CLIPS
from lrbo.layers.based import BYTE, INT8, MIDDLE, BasedLinear, Factors, dense_of, middle_of
from lrbo.layers.forms import Delta, KeptRows
from lrbo.layers.low_rank import Left, Right, is_dearer
from lrbo.layers.packing import pack
from lrbo.recovery.trainable_module import TrainableModule, put, trained, wide

TRIED = BAND_CLIPS[::3]  # shares of the largest number: each is another pass, at every step
FLOATS = ("scale", "table", "values")  # the tensors of bases that are no integers


class Grid(NamedTuple):
    """Integers from 0 to ``most`` of a run of directions, of which ``middle`` stands for 0."""

    directions: int
    bits: int
    middle: float
    most: int


class TrainableBase(TrainableModule):
    """A base that stands for the weight, and a low rank of what it leaves.

    Scales are trained as relative changes, ``scale * (1 + gain)``: they are as small as a step of
    an optimizer. Factors in integers are trained as floats. A base whose numbers are trained is
    unpacked at each call, and held for the backward pass in the dtype of the input.

    Attributes:
        base: Which tensor of the base is trained; ``None`` for none.
    """

    left: nn.Parameter | None
    right: nn.Parameter | None
    gain: nn.Parameter | None
    numbers: nn.Parameter | None
    bias: nn.Parameter | None
    left_step: Tensor  # of factors in integers, ``(r,)``
    right_step: Tensor

    def __init__(self, name: str, stored: BasedLinear, *, bases: bool) -> None:
        super().__init__(name, stored)
        self._layer, self._held = (stored,), dict[torch.dtype, Tensor]()
        self.base = next((n for n in FLOATS if n in stored.names), None) if bases else None
        self.left = self.right = self.gain = self.numbers = None
        if self.base == "scale":
            self.gain = nn.Parameter(torch.zeros_like(wide(stored.get_buffer("scale"))))
        elif self.base is not None:
            self.numbers = trained(stored.get_buffer(self.base))
        self.grids: tuple[Grid, ...] = ()  # none of factors in floats
        if stored.factors is not None:
            self.matrices = ("left", "right")
            self._take_factors(stored.factors)
        self.bias = None if stored.bias is None else trained(stored.bias)

    @property
    def layer(self) -> BasedLinear:
        """The stored layer."""
        return self._layer[0]

    def _take_factors(self, factors: Factors) -> None:
        """Hold factors as floats, both sides of a direction of one length, and their steps."""
        if factors.scale is None:
            self.left, self.right = trained(factors.left), trained(factors.right)
            return
        self.grids = grids_of(factors)
        scale = wide(factors.scale)
        left, right = factors._replace(scale=torch.ones_like(scale)).wide(scale.dtype)
        ratio = right.norm(dim=1) / left.norm(dim=0)
        ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
        left_step = (scale * ratio).abs().sqrt()
        steps = left_step, torch.where(left_step > 0, scale / left_step, left_step)
        self.left, self.right = trained(left * steps[0]), trained(right * steps[1][:, None])
        self.register_buffer("left_step", steps[0], persistent=False)
        self.register_buffer("right_step", steps[1], persistent=False)

    @override
    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        linear, shape = nn.functional.linear, (self.layer.out_features, self.layer.in_features)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        tokens, factors = x.numel() // max(shape[1], 1), self._factors(x.dtype)
        is_partial = isinstance(self.layer.form, KeptRows)
        if self._has_base and not is_partial:
            weight = self._weight(x.dtype)
            if factors is None:
                return linear(x, weight, bias)
            # The gradient of a trained base is as dear as that of a dense weight.
            if self.base is not None and tokens * sum(shape) > shape[0] * shape[1]:
                return linear(x, torch.addmm(weight, *factors), bias)
            return linear(linear(x, factors[1]), factors[0], bias) + linear(x, weight)
        result = x.new_zeros(*x.shape[:-1], shape[0])
        if factors is not None:
            left, right = factors
            if not is_partial and is_dearer(len(right), *shape, tokens):
                return linear(x, left @ right, bias)
            result = linear(linear(x, right), left, bias)
        elif bias is not None:
            result = result + bias
        if is_partial:
            tensors = self._tensors()
            result = result.index_add(-1, tensors["rows"], linear(x, tensors["values"].to(x.dtype)))
        return result

    @override
    def look_up(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        dtype, shape = self.weight.dtype, (len(ids), self.layer.in_features)
        rows: Tensor | None = None
        if self.base is not None:  # a table's rows are unpacked one by one
            own = {name: tensor[ids] for name, tensor in self._tensors().items()}
            rows = dense_of(self.layer.form, shape, own, dtype)
        elif self._has_base:
            rows = self._weight(dtype)[ids]
        factors = self._factors(dtype)
        if factors is not None:
            low_rank = factors[0][ids] @ factors[1]
            return low_rank if rows is None else rows + low_rank
        return self.weight.new_zeros(shape) if rows is None else rows

    @property
    def _has_base(self) -> bool:
        return bool(self.layer.names) or isinstance(self.layer.form, Delta)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the base, the trained one among them."""
        tensors = {name: self.layer.get_buffer(name) for name in self.layer.names}
        if self.gain is not None:
            tensors["scale"] = tensors["scale"] * (1 + self.gain)
        elif self.base is not None and self.numbers is not None:
            tensors[self.base] = self.numbers
        return tensors

    def _weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return the weight that the base stands for, from memory if nothing of it is trained."""
        shape = self.layer.out_features, self.layer.in_features
        if self.base is not None:
            return dense_of(self.layer.form, shape, self._tensors(), dtype)
        if dtype not in self._held:
            with torch.inference_mode(False):  # else no gradient could ever pass it
                self._held = {dtype: self.layer.base(dtype)}
        return self._held[dtype]

    def _factors(self, dtype: torch.dtype) -> tuple[Left, Right] | None:
        """Return the low rank; of integers, as storing will round it, and gradients pass."""
        left: Tensor | None = self.left
        right: Tensor | None = self.right
        if left is None or right is None:
            return None
        if self.grids:
            with torch.no_grad():
                codes, step, scale = self._rounded(left, right)
                left_error = codes[0].T * (scale / step) - left
                right_error = codes[1] * step[:, None] - right
            left, right = left + left_error, right + right_error
        return left.to(dtype), right.to(dtype)

    def _rounded(self, left: Left, right: Right) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Round both sides: integers by direction, the step of the right one, and the scales."""
        codes, steps = zip(
            rounded(left.T, self.grids, self.left_step),
            rounded(right, self.grids, self.right_step),
            strict=True,
        )
        scale = (steps[0] * steps[1]).to(self.layer.get_buffer("factor_scale").dtype)
        return codes, steps[1], scale.to(steps[1].dtype)

    @override
    def write_(self) -> None:
        layer = self.layer
        if self.base is not None:
            stored = layer.get_buffer(self.base)
            setattr(layer, self.base, self._tensors()[self.base].detach().to(stored.dtype))
        if self.bias is not None:
            put(layer, "bias", self.bias)
        if self.left is None or self.right is None:
            return
        if not self.grids:
            layer.left, layer.right = (
                side.detach().to(self.weight.dtype, copy=True) for side in (self.left, self.right)
            )
            return
        codes, _, scale = self._rounded(self.left, self.right)
        layer.factor_scale = scale.to(layer.get_buffer("factor_scale").dtype)
        layer.left, layer.right = (
            _packed(side, self.grids, is_flat=layer.bands is not None) for side in codes
        )
        if layer.left.dtype == torch.int8:
            layer.left = layer.left.T.contiguous()


def grids_of(factors: Factors) -> tuple[Grid, ...]:
    """Return the integers of each run of directions."""
    if factors.bands is not None:
        runs = factors.bands.runs(factors.rank)
        return tuple(Grid(count, bits, middle_of(bits), 2**bits - 1) for count, bits in runs)
    if factors.left.dtype == BYTE:
        return (Grid(factors.rank, 4, MIDDLE, 15),)
    return (Grid(factors.rank, 8, INT8, 2 * INT8),)


def rounded(
    rows: Float[Tensor, "r n"], grids: Sequence[Grid], steps: Float[Tensor, " r"]
) -> tuple[Float[Tensor, "r n"], Float[Tensor, " r"]]:
    """Round rows to integers, halves in some bands, each by the step of the least squared error.

    Tried are ``steps``, those that the rows were once stored with, and some that cut off more or
    less of the largest number.
    """
    codes, best = torch.empty_like(rows), steps.clone()
    start = 0
    for grid in grids:
        run = slice(start, start + grid.directions)
        values, start = rows[run], start + grid.directions
        peak = values.abs().amax(1)
        least = torch.full_like(peak, torch.inf)
        for clip in (None, *((1.0,) if grid.bits == 8 else TRIED)):
            step = steps[run] if clip is None else peak * (clip / (grid.most / 2))
            step = torch.where(step > 0, step, torch.ones_like(step))
            tried = (values / step[:, None] + grid.middle).round_().clamp_(0, grid.most)
            tried -= grid.middle
            error = (tried * step[:, None] - values).square_().sum(1)
            better = error < least
            codes[run] = torch.where(better[:, None], tried, codes[run])
            best[run] = torch.where(better, step, best[run])
            least = torch.minimum(error, least)
    return codes, best


def _packed(codes: Float[Tensor, "r n"], grids: Sequence[Grid], *, is_flat: bool) -> Tensor:
    """Return integers as :class:`Factors` has them, by direction."""
    if not is_flat and grids[0].bits == 8:
        return codes.to(torch.int8)
    parts, start = [], 0
    for grid in grids:
        own = codes[start : start + grid.directions] + grid.middle
        parts.append(pack(own.to(BYTE).contiguous(), grid.bits))
        start += grid.directions
    return torch.cat([part.flatten() for part in parts]) if is_flat else parts[0]
