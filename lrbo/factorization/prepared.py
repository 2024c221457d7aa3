"""What is worked out once of a unit, for all options that it may become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from lrbo.factorization.bases import Base
from lrbo.factorization.factors import PARTS, Buffers, LowRankFactors
from lrbo.layers.based import BasedLinear, Factors, shapes_of
from lrbo.layers.forms import Based, QuantizedFactors, form_named
from lrbo.layers.options import Losses, Option, Section


@runtime_checkable
class Prepared(Protocol):
    """A unit that can become any of some options at once."""

    @property
    def has_effect(self) -> bool:
        """Whether any option raises the error."""

    def losses(self, section: Section) -> Losses | None:
        """Return the predicted losses of a section of the menu, as far as there are levels."""

    def trial_module(self, name: str, option: Option, tokens: int, buffers: Buffers) -> nn.Module:
        """Return the module of an option for a trial; nothing is worked out for it."""

    def stored(self, name: str, option: Option, dtype: torch.dtype) -> nn.Module:
        """Return the module of an option as a checkpoint has it: exactly as it is counted."""

    def stand_in(self, name: str, option: Option) -> nn.Module:
        """Return a module that takes as long as the stored one; its outputs mean nothing."""

    def part(self, family: Option) -> LowRankFactors:
        """Return the factors of a family, whose ranks are its levels."""

    def only(
        self, ranks: Mapping[Option, int], dtype: torch.dtype, device: torch.device
    ) -> Prepared | None:
        """Return some families, up to a rank of each, elsewhere; ``None`` if there are none."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for the cache."""


CURVES = ("tail", "loss")  # what differs between a low rank and its rounded factors


def is_alone(form: Based) -> bool:
    """Whether a low rank is all there is, so that its factors are those of the unit."""
    return isinstance(form, QuantizedFactors)


@dataclass(frozen=True)
class BasedWeight:
    """A base of a weight, and factors of what it leaves, with their errors and losses."""

    base: Base
    rest: LowRankFactors

    def module(self, rank: int) -> BasedLinear:
        """Return the layer with a rank of what the base leaves, which is rounded to 8 bits."""
        rest = self.rest
        if not 0 <= rank <= rest.max_rank:
            raise ValueError(f"rank {rank} is outside 0..{rest.max_rank}.")
        dtype = self.base.dtype
        factors = Factors.of(rest.left[:, :rank], rest.right[:rank], dtype) if rank else None

        def linear(x: Tensor) -> Tensor:
            if factors is None:
                return x.new_zeros(len(rest.left))
            left, scale, right = (each.to(x.dtype) for each in factors)
            return left @ (scale * (right @ x))

        return self.base.module(factors, rest.bias_for(linear, dtype), rest.left.device)

    def to(
        self, *, dtype: torch.dtype, device: torch.device, max_rank: int | None = None
    ) -> BasedWeight:
        """Return a copy of other dtype or device, with at most ``max_rank`` directions.

        Factors stay as they are until they are rounded, once.
        """
        rest = self.rest.to(dtype=self.rest.left.dtype, device=device, max_rank=max_rank)
        return BasedWeight(self.base.to(device, dtype), rest)


@dataclass(frozen=True)
class UnitFactors:
    """Low-rank factors of a unit, and its bases with factors of what each leaves."""

    low_rank: LowRankFactors | None
    based: Mapping[Option, BasedWeight]

    @property
    def has_effect(self) -> bool:
        """Whether any option raises the error."""
        return self.low_rank is None or self.low_rank.has_effect

    def part(self, family: Option) -> LowRankFactors:
        """Return the factors of a family, whose ranks are its levels."""
        if family in self.based:
            return self.based[family].rest
        if self.low_rank is None or family.has_base:
            raise KeyError(f"{family} was not prepared")
        return self.low_rank

    def losses(self, section: Section) -> Losses | None:
        """Return the predicted losses of a section of the menu, as far as there are levels."""
        if self.low_rank is None and not section.family.has_base:
            return np.zeros(0)  # no rank is cheaper than dense
        return self.part(section.family).losses(section)

    def trial_module(self, name: str, option: Option, tokens: int, buffers: Buffers) -> nn.Module:
        """Return the module of an option for a trial; nothing is worked out for it."""
        if option.family in self.based:
            return self.based[option.family].module(option.level[-1])
        return self.part(option.family).trial_module(name, option, tokens, buffers)

    def stored(self, name: str, option: Option, dtype: torch.dtype) -> nn.Module:
        """Return the module of an option as a checkpoint has it: exactly as it is counted."""
        if option.family in self.based:
            own = self.based[option.family]
            rank = option.level[-1]
            device = own.rest.left.device
            return own.to(dtype=dtype, device=device, max_rank=rank).module(rank)
        return self.part(option.family).stored(name, option, dtype)

    def stand_in(self, name: str, option: Option) -> nn.Module:
        """Return a module that takes as long as the stored one; its outputs mean nothing."""
        if option.family in self.based:
            return self.based[option.family].module(option.level[-1])
        return self.part(option.family).stand_in(name, option)

    def only(
        self, ranks: Mapping[Option, int], dtype: torch.dtype, device: torch.device
    ) -> UnitFactors | None:
        """Return some families, up to a rank of each, elsewhere; ``None`` if there are none."""
        low_rank = None if self.low_rank is None else self.low_rank.only(ranks, dtype, device)
        based = {
            family: own.to(dtype=dtype, device=device, max_rank=ranks[family])
            for family, own in self.based.items()
            if family in ranks
        }
        return UnitFactors(low_rank, based) if low_rank or based else None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for the cache."""
        tensors = {} if self.low_rank is None else self.low_rank.tensors()
        for family, own in self.based.items():
            parts = {**own.base.tensors, **own.rest.tensors()}
            if is_alone(own.base.form):  # its factors are those of the unit
                parts = {part: each for part, each in parts.items() if part in CURVES}
            tensors |= {f"{family}.{part}": each.clone() for part, each in parts.items()}
        return tensors


def prepared_of(tensors: Mapping[str, Tensor]) -> Prepared:
    """Read what :meth:`Prepared.tensors` gave; ValueError if shapes do not fit each other."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        text, _, part = name.rpartition(".")
        parts.setdefault(text, {})[part] = tensor
    low_rank = LowRankFactors.of_tensors(parts.pop(""))
    if not parts:
        return low_rank
    based: dict[Option, BasedWeight] = {}
    for text, given in parts.items():
        family = Option.parse(text)
        form = form_named(family.form)
        assert isinstance(form, Based)
        own = {part: given.pop(part) for part in list(given) if part not in PARTS}
        alone = is_alone(form)
        rest = replace(low_rank, **given) if alone else LowRankFactors.of_tensors(given)
        shape = (rest.left.shape[0], rest.right.shape[1])
        for part, (expected, _) in shapes_of(form, *shape, family.level).items():
            if part not in own or own[part].shape != expected:
                raise ValueError(f"{text}.{part} is missing or of a shape other than {expected}")
        floats = (tensor.dtype for tensor in own.values() if tensor.is_floating_point())
        dtype = next(floats, rest.left.dtype)
        based[family] = BasedWeight(Base(form, family.level, shape, own, dtype), rest)
    return UnitFactors(low_rank, based)
