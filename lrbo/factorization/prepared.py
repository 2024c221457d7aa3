"""What is worked out once of a unit, for all options that it may become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from lrbo.factorization.bases import Base
from lrbo.factorization.factors import CURVES, PARTS, Buffers, Curve, LowRankFactors
from lrbo.factorization.frequency_groups import GroupedFactors
from lrbo.factorization.joint import JOINT, Skipped, Thinned
from lrbo.factorization.kronecker import KroneckerSum
from lrbo.factorization.shared import SharedFactors
from lrbo.layers.based import BasedLinear, Factors, shapes_of
from lrbo.layers.forms import Based, Delta, DeltaBands, QuantizedFactors, form_named, is_delta
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.joint_form import SharedFactored
from lrbo.layers.kronecker_form import Kronecker
from lrbo.layers.options import Losses, Option, Section
from lrbo.layers.product_form import Factored


@runtime_checkable
class Prepared(Protocol):
    """A unit that can become any of some options at once."""

    @property
    def has_effect(self) -> bool:
        """Whether any option raises the error."""

    def losses(self, section: Section, curve: Curve = "loss") -> Losses | None:
        """Return a curve of a section of the menu, as far as there are levels."""

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

    def bound(self, dense: nn.Module) -> Prepared:
        """Return the unit with its dense layer, of which joint options take a part."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for the cache."""


CODES = ("codes_left", "codes_scale", "codes_right")  # the names of rounded factors in the cache


@dataclass(frozen=True)
class BasedWeight:
    """A base of a weight, and factors of what it leaves, with their errors and losses.

    ``codes`` are the factors as they are stored; without them they are rounded, to 8 bits or to
    floats, where a layer is made.
    """

    base: Base
    rest: LowRankFactors
    codes: Factors | None = None

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.rest.left.device if self.codes is None else self.codes.device

    def module(self, rank: int) -> BasedLinear:
        """Return the layer with a rank of what the base leaves, as it is stored."""
        rest = self.rest
        if not 0 <= rank <= rest.max_rank:
            raise ValueError(f"rank {rank} is outside 0..{rest.max_rank}.")
        dtype, factors = self.base.dtype, None
        if rank and self.codes is not None:
            factors = self.codes.leading(rank)
        elif rank:
            sides, floats = (rest.left[:, :rank], rest.right[:rank]), self.base.form.has_floats
            factors = Factors.of(*sides, dtype, floats=floats)

        def linear(x: Tensor) -> Tensor:
            if factors is None:
                return x.new_zeros(len(rest.left))
            left, right = factors.wide(x.dtype)
            return left @ (right @ x)

        return self.base.module(factors, rest.bias_for(linear, dtype), self.device)

    def trial_module(self, name: str, rank: int, tokens: int, buffers: Buffers) -> nn.Module:
        """Return the layer with a rank for a trial: as it is stored."""
        del name, tokens, buffers
        return self.module(rank)

    def to(
        self, *, dtype: torch.dtype, device: torch.device, max_rank: int | None = None
    ) -> BasedWeight:
        """Return a copy of other dtype or device, with at most ``max_rank`` directions.

        It has the factors only as they are stored: they are rounded here, once, if not before.
        """
        rest = self.rest.leading(
            self.rest.max_rank if max_rank is None else min(max_rank, self.rest.max_rank)
        )
        codes = self.codes
        if codes is None:
            floats = self.base.form.has_floats
            codes = Factors.of(rest.left, rest.right, dtype, floats=floats)
        codes = codes.leading(rest.max_rank).to(device, dtype)
        ends = {"offset": rest.offset, "center": rest.center}
        moved = {name: each.to(device) for name, each in ends.items() if each is not None}
        gone = {"left": rest.left.to("meta"), "right": rest.right.to("meta")}
        return BasedWeight(self.base.to(device, dtype), replace(rest, **moved, **gone), codes)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for the cache."""
        parts = {**self.base.tensors, **self.rest.tensors()}
        if isinstance(self.base.form, QuantizedFactors | Delta):
            # Its factors are those of the unit, as they are.
            parts = {part: each for part, each in parts.items() if part in CURVES}
        codes = () if self.codes is None else zip(CODES, self.codes[:3], strict=True)
        return parts | {name: each for name, each in codes if each is not None}


@dataclass(frozen=True)
class UnitFactors:
    """Low-rank factors of a unit, and what else it can become.

    Attributes:
        low_rank: Factors of the whole weight; ``None`` where no rank is wanted.
        based: Bases with factors of what each leaves, Kronecker sums, groups of rows, and factors
            of which layers with the same input share one.
        joint: What it becomes together with the other layers of its attention or MLP.
        shared: The weight of the base model, ``(out, in)``, where all of these are of a change of
            it; the cache has none.
    """

    low_rank: LowRankFactors | None
    based: Mapping[Option, BasedWeight | KroneckerSum | GroupedFactors | SharedFactors]
    joint: Mapping[Option, Thinned | Skipped] = field(default_factory=dict)
    shared: Tensor | None = None

    @property
    def has_effect(self) -> bool:
        """Whether any option raises the error."""
        return self.low_rank is None or self.low_rank.has_effect

    def part(self, family: Option) -> LowRankFactors:
        """Return the factors of a family, whose ranks are its levels."""
        if family in self.based:
            return self.based[family].rest
        if self.low_rank is None or not isinstance(form_named(family.form), Factored):
            raise KeyError(f"{family} was not prepared")
        return self.low_rank

    def losses(self, section: Section, curve: Curve = "loss") -> Losses | None:
        """Return a curve of a section of the menu, as far as there are levels."""
        family = section.family
        if not len(section.levels):
            return np.zeros(0)
        if family in self.joint:
            return self.joint[family].losses(section)
        is_float = self.low_rank is not None and isinstance(form_named(family.form), Factored)
        if family.is_low_rank and family not in self.based and not is_float:
            return np.zeros(0)  # no rank is cheaper than dense
        return self.part(family).losses(section, curve)

    def trial_module(self, name: str, option: Option, tokens: int, buffers: Buffers) -> nn.Module:
        """Return the module of an option for a trial, of what is worked out already."""
        if option.family in self.joint:
            return self.joint[option.family].module(option)
        if option.family in self.based:
            own = self.based[option.family]
            return self._on_base(own.trial_module(name, option.level[-1], tokens, buffers))
        return self.part(option.family).trial_module(name, option, tokens, buffers)

    def stored(self, name: str, option: Option, dtype: torch.dtype) -> nn.Module:
        """Return the module of an option as a checkpoint has it: exactly as it is counted."""
        if option.family in self.joint:
            return self.joint[option.family].module(option, dtype)
        if option.family in self.based:
            own = self.based[option.family]
            rank = option.level[-1]
            own = own.to(dtype=dtype, device=own.device, max_rank=rank)
            return self._on_base(own.module(rank))
        return self.part(option.family).stored(name, option, dtype)

    def stand_in(self, name: str, option: Option) -> nn.Module:
        """Return a module that takes as long as the stored one; its outputs mean nothing."""
        if option.family in self.joint:
            return self.joint[option.family].module(option)
        if option.family in self.based:
            return self._on_base(self.based[option.family].module(option.level[-1]))
        return self.part(option.family).stand_in(name, option)

    def _on_base(self, module: nn.Module) -> nn.Module:
        """Put the weight of the base model under a change, in the dtype of its layer."""
        if self.shared is not None and isinstance(module, BasedLinear):
            module.share_(self.shared.to(module.weight))
        return module

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
        joint = {
            family: own.only(ranks[family], device)
            for family, own in self.joint.items()
            if family in ranks
        }
        if not (low_rank or based or joint):
            return None
        changes = any(is_delta(family.form) for family in based)
        shared = self.shared.to(device, dtype) if changes and self.shared is not None else None
        return UnitFactors(low_rank, based, joint, shared)

    def bound(self, dense: nn.Module) -> UnitFactors:
        """Return the unit with its dense layer, of which joint options take a part."""
        joint = {family: replace(own, dense=dense) for family, own in self.joint.items()}
        return replace(self, joint=joint)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for the cache."""
        tensors = {} if self.low_rank is None else self.low_rank.tensors()
        for family, own in self.based.items():
            tensors |= {f"{family}.{part}": each.clone() for part, each in own.tensors().items()}
        for family, joint in self.joint.items():
            tensors |= {f"{family}.{part}": each for part, each in joint.tensors().items()}
        return tensors


def is_rounded_once(form: Based) -> bool:
    """Whether factors over a base are kept as integers, not rounded where a layer is made."""
    return form.factor_bits == 4 or isinstance(form, DeltaBands)


def prepared_of(tensors: Mapping[str, Tensor]) -> Prepared:
    """Read what :meth:`Prepared.tensors` gave; ValueError if shapes do not fit each other."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        text, _, part = name.rpartition(".")
        parts.setdefault(text, {})[part] = tensor
    low_rank = LowRankFactors.of_tensors(parts.pop(""))
    if not parts:
        return low_rank
    based: dict[Option, BasedWeight | KroneckerSum | GroupedFactors | SharedFactors] = {}
    joint: dict[Option, Thinned | Skipped] = {}
    shape = low_rank.left.shape[0], low_rank.right.shape[1]
    for text, given in parts.items():
        family = Option.parse(text)
        if family in JOINT:
            joint[family] = JOINT[family].of_tensors(given)
            continue
        form = form_named(family.form)
        if isinstance(form, Kronecker):
            based[family] = KroneckerSum.of_tensors(shape, family.level, given)
            continue
        if isinstance(form, FrequencyGroups):
            based[family] = GroupedFactors.of_tensors(family.level[0], given)
            continue
        if isinstance(form, SharedFactored):
            based[family] = SharedFactors.of_tensors(given)
            continue
        assert isinstance(form, Based)
        own = {part: given.pop(part) for part in list(given) if part not in PARTS}
        codes = None
        if isinstance(form, QuantizedFactors | Delta):
            rest = replace(low_rank.leading(len(given["tail"]) - 1), **given)
        else:
            rest = LowRankFactors.of_tensors(given)
        if is_rounded_once(form):
            empty = Factors.on_meta(form, family.level, *shape, rest.max_rank)
            for part, other in zip(CODES, empty[:3], strict=True):
                assert other is not None
                if part not in own or own[part].shape != other.shape:
                    raise ValueError(f"{text}.{part} is missing or not of shape {other.shape}")
            left, scale, right = (own.pop(part) for part in CODES)
            codes = Factors(left, scale, right, empty.bands)
        for part, (expected, _) in shapes_of(form, *shape, family.level).items():
            if part not in own or own[part].shape != expected:
                raise ValueError(f"{text}.{part} is missing or of a shape other than {expected}")
        parts_of = [*own.values(), *(() if codes is None else (codes.left, codes.scale))]
        floats = (tensor.dtype for tensor in parts_of if tensor.is_floating_point())
        dtype = next(floats, rest.left.dtype)
        based[family] = BasedWeight(Base(form, family.level, shape, own, dtype), rest, codes)
    return UnitFactors(low_rank, based, joint)
