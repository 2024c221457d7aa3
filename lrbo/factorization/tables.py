"""Tables factored in the metric of the loss: frequent tokens, and labels in doubt, weigh more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lrbo.calibration.statistics import HEAD_STATISTICS, LOOKUP_STATISTICS, Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.bases import Base
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.frequency_groups import GroupedFactors
from lrbo.factorization.methods import balanced, second_moment, tail_sums
from lrbo.factorization.prediction import PREDICTION_SHRINKAGE, left_out, shrunk, squared_errors
from lrbo.factorization.prepared import BasedWeight, Prepared, UnitFactors
from lrbo.layers.forms import QuantizedFactors
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.low_rank import Bias
from lrbo.layers.options import Option
from lrbo.linalg import (
    add_gram,
    float64_device,
    mirror_upper,
    psd_eigenpairs,
    require_finite,
)
from lrbo.models.model_map import linear_bias, linear_weight
from lrbo.models.specs import LayerSpec

ROWS = 8192  # that are worked on at a time
# Of the moment of row gradients, at the same trace. It is estimated at the dense model, with all
# layers behind it: 384 of 576 ranks of SmolLM2-135M's embedding cost 0.198 nats (4,096 tokens of
# calibration), where 1 predicts 0.011 and 0.5 predicts 0.054, with directions that are as good.
ROW_POWER = 0.5


class Curvature(NamedTuple):
    """A role of a table: how much each row weighs, and the moment of its columns."""

    outputs: Float[Tensor, " rows"]
    inputs: Float[Tensor, "in in"]


def table_needs(spec: LayerSpec) -> frozenset[Statistic]:
    """Return the statistics of an embedding or a head that its factors depend on."""
    needs = LOOKUP_STATISTICS if spec.is_lookup else frozenset[Statistic]()
    return needs | (HEAD_STATISTICS if spec.multiplies else frozenset())


@dataclass(frozen=True)
class TableMetric:
    r"""What a change ``D`` of a table costs, in each of its roles, which add.

    As an embedding, ``1/2 sum_v p_v D_v G D_v^T`` nats per token: ``p_v`` is the frequency of token
    ``v``, and ``G = E[g g^T]``, flattened, of the gradient of the loss at the row that was looked
    up. As a head, ``1/2 sum_v f_v D_v C D_v^T``, with ``f_v = E[p_v (1 - p_v)]`` of the probability
    of label ``v``, the diagonal of the curvature of the loss in the logits, and ``C`` the second
    moment of the final hidden state. Both are K-FAC, with the exact second moment of a one-hot
    vector. Labels are tokens: where their frequency is known, ``f`` is the mean of this
    expectation and of the frequency at the same sum.

    For the directions of a low rank both are one metric: each row weighs its share of the two
    costs, and the moments of the columns are added, each as much as its rows weigh. That is exact
    in one role, and in two where ``p`` and ``f`` are proportional.

    References:
        Chen et al., *GroupReduce: Block-Wise Low-Rank Approximation for Neural Language Model
        Shrinking*, NeurIPS 2018, section 3.1, for rows weighed by frequency; Martens and Grosse,
        2015, as of :class:`LossAware`, for both metrics.
    """

    roles: Sequence[Curvature]

    @classmethod
    def of(
        cls, spec: LayerSpec, statistics: Mapping[Statistic, Tensor], device: torch.device
    ) -> TableMetric:
        """Return the metric of an embedding or head; StatisticsError if it lacks a statistic."""
        if missing := sorted(need.value for need in table_needs(spec) - set(statistics)):
            raise StatisticsError(
                f"an embedding or a head needs the statistics {', '.join(missing)}; got "
                f"{', '.join(sorted(s.value for s in statistics)) or 'none'}. Calibrate with the "
                "same parts of the model included."
            )
        for statistic, tensor in statistics.items():
            require_finite(statistic.value, tensor)
        pairs = []
        if spec.is_lookup:
            columns = flattened(statistics[Statistic.ROW_GRADIENT])
            pairs.append((statistics[Statistic.TOKEN_FREQUENCY], columns))
        if spec.multiplies:
            variance = statistics[Statistic.LABEL_VARIANCE]
            if (frequency := statistics.get(Statistic.TOKEN_FREQUENCY)) is not None:
                # Of more text, and of unseen tokens too: 384 of 576 ranks of SmolLM2-135M's head
                # cost 0.27 nats on other text so (8,192 tokens of calibration), 0.31 by the
                # variance alone; 8 groups of as many parameters 0.10, not 0.15.
                variance = (variance + variance.sum() * frequency) / 2
            pairs.append((variance, second_moment(statistics)))
        return cls(
            [
                Curvature(rows.to(device, torch.float64), columns.to(device, torch.float64))
                for rows, columns in pairs
            ]
        )

    @cached_property
    def columns(self) -> Float[Tensor, "in in"]:
        """The moment of the columns, of all roles together; the identity if nothing costs."""
        total = torch.stack([each.outputs.sum() * each.inputs for each in self.roles]).sum(0)
        return total if bool(total.any()) else torch.eye(len(total)).to(total)

    @cached_property
    def _roots(self) -> tuple[Float[Tensor, "in in"], Float[Tensor, "in in"]]:
        """A root of the moment of the columns, shrunk, and the transposed inverse of the root."""
        strength, axes = psd_eigenpairs(shrunk(self.columns, PREDICTION_SHRINKAGE), "row moment")
        return axes * strength.sqrt(), axes / strength.sqrt()

    @property
    def inputs(self) -> dict[Statistic, Tensor]:
        """The moment of the columns, as that of the inputs of a layer."""
        columns = self.columns
        mean = columns.new_zeros(len(columns))
        return {Statistic.INPUT_MEAN: mean, Statistic.INPUT_COVARIANCE: columns}

    def with_rounding(
        self, weight: Float[Tensor, "rows in"], left: Tensor, right: Tensor
    ) -> Float[Tensor, " k_plus_1"]:
        """Return the predicted losses of ranks of factors as they are stored, rounded."""
        losses = []
        for rows, inputs in self.roles:
            scale = rows.sqrt()[:, None]
            moment = shrunk(inputs, PREDICTION_SHRINKAGE)
            losses.append(squared_errors(scale * weight, scale * left, right, moment))
        return torch.stack(losses).sum(0) / 2

    def factor(self, weight: Float[Tensor, "rows in"], bias: Bias, max_rank: int) -> LowRankFactors:
        """Factor a table, or what a base leaves of it, for every rank up to one at once.

        With ``w`` the weights of rows and ``M`` the moment of columns, the directions are those of
        ``diag(w)^1/2 E M^1/2``, from the Gram matrix of its columns; every row has the best
        coordinates in them, also one without weight. Rows are multiplied in the dtype of
        ``weight``, float32 at least, and summed in float64.
        """
        grams = [_gram(weight, each.outputs) for each in self.roles]
        sizes = [float(each.inputs.diagonal().sum()) for each in self.roles]
        gram = torch.stack([s * g for s, g in zip(sizes, grams, strict=True)]).sum(0)
        if not bool(gram.any()):
            gram = _gram(weight, torch.ones(len(weight)).to(gram))
        root, inverse = self._roots
        energy, vectors = psd_eigenpairs(root.T @ gram @ root, "weighted rows")
        there, back = root @ vectors, (inverse @ vectors).T
        pairs = [
            (there.T @ gram @ there) * (back @ shrunk(each.inputs, PREDICTION_SHRINKAGE) @ back.T)
            for gram, each in zip(grams, self.roles, strict=True)
        ]
        left = weight @ there[:, :max_rank].to(weight)
        left, right = balanced(left, back[:max_rank].to(weight))
        loss = left_out(torch.stack(pairs).sum(0))[: max_rank + 1]
        return LowRankFactors(left, right, tail_sums(energy / 2)[: max_rank + 1], bias, loss=loss)

    def grouped(self, weight: Float[Tensor, "rows in"], bias: Bias, groups: int) -> GroupedFactors:
        """Factor groups of rows, those that weigh most first, in directions of their own.

        A row weighs what it costs to change it, over all directions and in all roles: as an
        embedding, by the frequency of its token.
        """
        weights = [each.outputs * each.inputs.diagonal().sum() for each in self.roles]
        order = torch.stack(weights).sum(0).argsort(descending=True, stable=True)
        parts = []
        for own in torch.split(order, FrequencyGroups.rows(len(weight), groups)):
            metric = TableMetric([Curvature(each.outputs[own], each.inputs) for each in self.roles])
            parts.append(metric.factor(weight[own], None, min(len(own), weight.shape[1])))
        return GroupedFactors.of(order, parts, bias)

    def bases(
        self, weight: Float[Tensor, "rows in"], plan: BasePlan, dtype: torch.dtype
    ) -> list[Base]:
        """Make every base of a table, some rows at a time: no row depends on another."""
        given, metric = self.inputs, plan.metric(self.inputs)
        blocks = torch.split(weight, ROWS)
        parts = [plan.make(rows, given, dtype, metric=metric) for rows in blocks]
        return [_joined(pieces) for pieces in zip(*parts, strict=True)]


def flattened(moment: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Raise a moment to ``ROW_POWER``, at the same trace."""
    strength, axes = psd_eigenpairs(moment, Statistic.ROW_GRADIENT.value)
    flat = strength**ROW_POWER
    if not bool(flat.any()):
        return moment
    return (axes * (flat * (strength.sum() / flat.sum()))) @ axes.T


def prepared_table(
    spec: LayerSpec,
    module: nn.Module,
    given: Mapping[Statistic, Tensor],
    device: torch.device | None,
    *,
    bases: BasePlan | None,
) -> Prepared:
    """Factor an embedding or a head, and what its bases leave; StatisticsError if one lacks."""
    stored, bias = linear_weight(module), linear_bias(module)
    work = float64_device(stored.device if device is None else device)
    metric = TableMetric.of(spec, given, work)
    # In float32 at least: a table may be the largest tensor by far, and has no more digits.
    weight = stored.to(work, torch.promote_types(stored.dtype, torch.float32))
    require_finite("weight", weight)
    offset = None if bias is None else bias.to(weight)
    full = metric.factor(weight, offset, min(weight.shape))
    cpu, single, double = torch.device("cpu"), torch.float32, torch.float64
    low_rank = full.to(dtype=single, device=cpu, max_rank=min(weight.shape) - 1)
    plan = None if bases is None else bases.of_tables
    if plan is None:
        return low_rank

    def remainder(rest: Tensor, max_rank: int) -> LowRankFactors:
        return metric.factor(rest, offset, max_rank)

    based: dict[Option, BasedWeight | GroupedFactors] = {}
    for base in metric.bases(weight, plan, stored.dtype):
        form, codes = base.form, None
        most = min(form.largest_rank(*base.shape), low_rank.max_rank)
        if isinstance(form, QuantizedFactors):
            factors, exact = full.leading(most), weight.to(double)
            codes = plan.factors(form, factors, remainder, exact, metric.inputs, stored.dtype)
            loss = metric.with_rounding(exact, *codes.wide(double))
            factors = replace(factors, loss=loss)
            codes = codes.to(cpu, stored.dtype) if form.factor_bits == 4 else None
        else:
            factors = remainder(weight - base.weight(weight.dtype), most)
        factors = factors.to(dtype=single, device=cpu)
        based[base.family] = BasedWeight(base.to(cpu), factors, codes)
    for groups in plan.frequency_groups:
        if FrequencyGroups.can_be(len(weight), groups):
            made = metric.grouped(weight, offset, groups)
            based[Option(FrequencyGroups.name, (groups,))] = made.to(dtype=single, device=cpu)
    return UnitFactors(low_rank, based)


def _gram(
    weight: Float[Tensor, "rows in"], weights: Float[Tensor, " rows"]
) -> Float[Tensor, "in in"]:
    """Return ``E^T diag(w) E``, float64."""
    width = weight.shape[1]
    upper = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
    for rows, own in zip(*(torch.split(each, ROWS) for each in (weight, weights)), strict=True):
        add_gram(upper, rows * own.sqrt().to(rows)[:, None])
    return mirror_upper(upper)


def _joined(pieces: Sequence[Base]) -> Base:
    """Join the bases of some rows each."""
    first = pieces[0]
    tensors = {name: torch.cat([piece.tensors[name] for piece in pieces]) for name in first.tensors}
    rows = sum(piece.shape[0] for piece in pieces)
    return Base(first.form, first.level, (rows, first.shape[1]), tensors, first.dtype)
