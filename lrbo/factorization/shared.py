"""Layers that read the same input factored as one, with one right factor for all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lrbo.calibration.statistics import Statistic
from lrbo.factorization.base import FactorizationMethod, Statistics, factor_layer
from lrbo.factorization.factors import Buffers, LowRankFactors
from lrbo.factorization.prediction import predicted_loss
from lrbo.layers.joint_form import SharedFactored
from lrbo.layers.options import Option
from lrbo.layers.shared import SharedLinear
from lrbo.models.model_map import linear_bias, linear_weight
from lrbo.models.specs import LayerSpec

SHARED = Option(SharedFactored.name)  # the family
SITE = "site"


@dataclass(frozen=True)
class SharedFactors:
    """A layer of some that are factored as one.

    Attributes:
        site: Name of the first of these layers, which stores the right factor.
        is_first: Whether this is the first.
        rest: Its own left factor, and the right one of all; errors are those of all together,
            losses its own.
    """

    site: str
    is_first: bool
    rest: LowRankFactors

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.rest.left.device

    def module(self, rank: int) -> SharedLinear:
        """Return the layer as it is stored."""
        layer = self.rest.at_rank(rank)
        right = layer.right.weight if self.is_first else None
        left = layer.left.weight.contiguous()
        return SharedLinear(left, right, layer.bias, layer.in_features, self.site)

    def trial_module(self, name: str, rank: int, tokens: int, buffers: Buffers) -> nn.Module:
        """Return the layer for a trial, as of :meth:`LowRankFactors.trial_module`: on its own."""
        return self.rest.trial_module(name, SHARED.at(rank), tokens, buffers)

    def to(
        self, *, dtype: torch.dtype, device: torch.device, max_rank: int | None = None
    ) -> SharedFactors:
        """Return a copy of other dtype or device, with at most ``max_rank`` directions."""
        return replace(self, rest=self.rest.to(dtype=dtype, device=device, max_rank=max_rank))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for the cache; the name of the site is its bytes."""
        site = torch.tensor([self.is_first, *self.site.encode()], dtype=torch.uint8)
        return self.rest.tensors() | {SITE: site}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> SharedFactors:
        """Read what :meth:`tensors` gave; ValueError if shapes do not fit each other."""
        parts = dict(tensors)
        is_first, *site = parts.pop(SITE).tolist()
        return cls(bytes(site).decode(), bool(is_first), LowRankFactors.of_tensors(parts))


def prepare_shared(
    specs: Sequence[LayerSpec],
    modules: Sequence[nn.Module],
    method: FactorizationMethod,
    statistics: Sequence[Statistics],
    work: torch.device,
) -> dict[str, SharedFactors]:
    """Factor layers that read the same input as one layer, of which each then has its outputs.

    The metric is that of a method for the stacked weight: second moments of output gradients are
    those of the layers, without what is between these. Losses are predicted layer by layer, as of
    any other factors, and so add up.

    Args:
        specs: Of the layers, that which stores the right factor first; of kinds that a method
            treats differently, that of the first counts.
        modules: The layers.
        method: Gives the metric.
        statistics: Of each layer.
        work: Where to decompose; it has float64.

    Returns:
        By layer name; float32 on the CPU, up to the rank that costs as much as dense.

    Raises:
        StatisticsError: If a statistic is missing, or is not finite.
    """
    how = method.for_kind(specs[0].kind)
    given = [{name: each.to(work) for name, each in own.items()} for own in statistics]
    weights = [linear_weight(module).to(work, torch.float64) for module in modules]
    biases = [linear_bias(module) for module in modules]
    bias = None
    if any(each is not None for each in biases):
        pairs = zip(biases, weights, strict=True)
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b.to(w) for b, w in pairs])
    full = factor_layer(how, torch.cat(weights), bias, stacked(given, how.needs))
    most = SharedFactored.largest_rank(specs[0].in_features, sum(map(len, weights)))
    made = {}
    ends = pairwise(accumulate(map(len, weights), initial=0))
    for spec, own, (start, end), known in zip(specs, biases, ends, given, strict=True):
        # Of a bias that does not depend on the rank, a layer may have none beside one that does.
        has_offset = full.offset is not None and (own is not None or full.center is not None)
        offset = full.offset[start:end] if full.offset is not None and has_offset else None
        part = replace(full, left=full.left[start:end], offset=offset)
        if Statistic.OUTPUT_GRADIENT in known:
            part = replace(part, loss=predicted_loss(part, known))
        part = part.to(dtype=torch.float32, device=torch.device("cpu"), max_rank=most)
        made[spec.name] = SharedFactors(specs[0].name, spec is specs[0], part)
    return made


def stacked(
    statistics: Sequence[Statistics], needs: Collection[Statistic]
) -> dict[Statistic, Tensor]:
    """Return statistics of a layer whose outputs are those of several that read the same input."""
    first = statistics[0]
    result = {need: first[need] for need in needs if need in first}
    if Statistic.OUTPUT_GRADIENT in result:
        own = [each[Statistic.OUTPUT_GRADIENT] for each in statistics]
        joined: Any = torch.block_diag  # untyped in torch
        result[Statistic.OUTPUT_GRADIENT] = joined(*own)
    if Statistic.INPUT_IMPORTANCE in result:
        own = [each[Statistic.INPUT_IMPORTANCE] for each in statistics]
        result[Statistic.INPUT_IMPORTANCE] = torch.stack(own).sum(0)
    if Statistic.WEIGHT_GRADIENT in result:
        own = [each[Statistic.WEIGHT_GRADIENT] for each in statistics]
        result[Statistic.WEIGHT_GRADIENT] = torch.cat(own)
    return result
