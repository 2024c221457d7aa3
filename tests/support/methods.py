"""Every method under contract: what its error means, and what a direct computation gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lrbo.calibration.statistics import TABLE_STATISTICS, Statistic
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.methods import Asvd, FirstOrder, LossAware
from lrbo.factorization.registry import METHODS
from lrbo.models.specs import LayerSpec
from tests.support import reference
from tests.support.reference import Affine, Matrix

SHAPES = {"wide": (5, 9), "tall": (9, 5), "square": (7, 7)}
GROUP_SIZES = (40, 25, 60)


@dataclass(frozen=True, eq=False)
class Layer:
    """A dense layer with the inputs and output gradients that calibration saw."""

    weight: Tensor
    bias: Tensor | None
    groups: list[Tensor]
    gradients: Tensor

    @property
    def dense(self) -> Affine:
        bias = torch.zeros(len(self.weight)) if self.bias is None else self.bias
        return reference.numpy_of(self.weight), reference.numpy_of(bias)

    @property
    def inputs(self) -> list[Matrix]:
        return [reference.numpy_of(group) for group in self.groups]

    @property
    def rows(self) -> Matrix:
        return np.concatenate(self.inputs)

    @cached_property
    def statistics(self) -> dict[Statistic, Tensor]:
        """All statistics of layers there are, by the printed formulas."""
        gradients = reference.numpy_of(self.gradients)
        values = {
            Statistic.INPUT_MEAN: reference.mean(self.rows),
            Statistic.INPUT_MAGNITUDE: reference.mean(abs(self.rows)),
            Statistic.INPUT_COVARIANCE: reference.covariance(self.rows),
            Statistic.POOLED_INPUT_COVARIANCE: reference.pooled_covariance(self.inputs),
            Statistic.OUTPUT_GRADIENT: reference.second_moment(gradients),
            Statistic.INPUT_IMPORTANCE: reference.importance(self.rows, gradients),
            Statistic.WEIGHT_GRADIENT: reference.weight_gradient(
                self.inputs,
                np.split(gradients, np.cumsum([len(each) for each in self.groups])[:-1]),
            ),
        }
        assert set(values) == set(Statistic) - TABLE_STATISTICS, (
            "a new statistic needs its plain formula here"
        )
        return {statistic: torch.from_numpy(value) for statistic, value in values.items()}

    def number(self, statistic: Statistic) -> Matrix:
        return reference.numpy_of(self.statistics[statistic])

    @property
    def spec(self) -> LayerSpec:
        out_features, in_features = self.weight.shape
        return LayerSpec(
            "layer", "kind", 0, out_features, in_features, self.bias is not None, site="layer"
        )


def make_layer(
    shape: str, *, bias: bool, seed: int = 0, tokens: Sequence[int] = GROUP_SIZES
) -> Layer:
    """Draw a layer: correlated features and gradients, means that differ from group to group."""
    out_features, in_features = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mix = draw(in_features, in_features)
    groups = [draw(count, in_features) @ mix + 2 * draw(in_features) for count in tokens]
    weight, offset = draw(out_features, in_features), draw(out_features) if bias else None
    gradients = draw(sum(tokens), out_features) @ draw(out_features, out_features) / 10
    return Layer(weight, offset, groups, gradients)


class RandomStatistics:
    """Statistics of every layer of a model, the same for each of its shape; note who asked."""

    def __init__(self, *, gradients: bool = True) -> None:
        self.gradients, self.names = gradients, list[str]()

    def of(self, spec: LayerSpec) -> Mapping[Statistic, Tensor]:
        """Draw those of a layer."""
        self.names.append(spec.name)
        generator = torch.Generator().manual_seed(spec.in_features)

        def draw(width: int) -> Tensor:
            return torch.randn(3 * width, width, generator=generator, dtype=torch.float64)

        rows, slopes = draw(spec.in_features), draw(spec.out_features)
        covariance = torch.cov(rows.T, correction=0)
        actual = {
            Statistic.INPUT_MEAN: rows.mean(0),
            Statistic.INPUT_MAGNITUDE: rows.abs().mean(0),
            Statistic.INPUT_COVARIANCE: covariance,
            Statistic.POOLED_INPUT_COVARIANCE: covariance,
        }
        if self.gradients:
            actual[Statistic.OUTPUT_GRADIENT] = slopes.T @ slopes / len(slopes)
            actual[Statistic.INPUT_IMPORTANCE] = rows.square().mean(0)
            actual[Statistic.WEIGHT_GRADIENT] = slopes.abs().mean(0).outer(rows.abs().mean(0))
        return actual


# --- the error of a compressed layer, measured on tokens -----------------------------------------


def _weighted_error(layer: Layer, compressed: Affine, weights: Matrix | float) -> float:
    return float(((layer.dense[0] - compressed[0]) ** 2 * weights).sum())


def _svd_error(layer: Layer, compressed: Affine) -> float:
    return _weighted_error(layer, compressed, 1.0)


def _fwsvd_error(layer: Layer, compressed: Affine) -> float:
    return _weighted_error(layer, compressed, layer.number(Statistic.INPUT_IMPORTANCE))


def _first_order_error(kept: float) -> Callable[[Layer, Affine], float]:
    return lambda layer, compressed: _weighted_error(
        layer, compressed, _first_order_rows(layer, kept)[:, None]
    )


def _first_order_rows(layer: Layer, kept: float) -> Matrix:
    importance = abs(layer.dense[0]) * layer.number(Statistic.WEIGHT_GRADIENT)
    return reference.importance_of_rows(importance, kept)


def _asvd_error(alpha: float) -> Callable[[Layer, Affine], float]:
    return lambda layer, compressed: _weighted_error(
        layer, compressed, layer.number(Statistic.INPUT_MAGNITUDE) ** (2 * alpha)
    )


def _output_error(layer: Layer, compressed: Affine) -> float:
    return reference.mean_squared_output_error(layer.dense, compressed, layer.rows)


def _bolaco_error(layer: Layer, compressed: Affine) -> float:
    return reference.pooled_output_error(layer.dense, compressed, layer.inputs)


def _kfac_error(layer: Layer, compressed: Affine) -> float:
    change = layer.dense[0] - compressed[0]
    return reference.quadratic_loss(change, reference.numpy_of(layer.gradients), layer.rows, 0.01)


def _flattened_error(exponent: float, *, centred: bool) -> Callable[[Layer, Affine], float]:
    def error(layer: Layer, compressed: Affine) -> float:
        errors = layer.rows @ (layer.dense[0] - compressed[0]).T
        if centred:
            errors = errors - errors.mean(0)
        metric = _metric(layer, exponent)
        return float(np.mean([row @ metric @ row for row in errors])) / 2

    return error


# --- the best layer of a rank, by formulas with inverses -----------------------------------------


def plain_svd(layer: Layer, rank: int) -> Affine:
    return reference.truncated_svd(layer.dense[0], rank), layer.dense[1]


def _fwsvd_direct(layer: Layer, rank: int) -> Affine:
    scale = np.sqrt(layer.number(Statistic.INPUT_IMPORTANCE))
    return reference.diagonally_weighted_svd(layer.dense[0], scale, rank), layer.dense[1]


def _first_order_direct(kept: float) -> Callable[[Layer, int], Affine]:
    def direct(layer: Layer, rank: int) -> Affine:
        weight, scale = layer.dense[0], np.sqrt(_first_order_rows(layer, kept))
        return reference.diagonally_weighted_svd(weight.T, scale, rank).T, layer.dense[1]

    return direct


def _asvd_direct(alpha: float) -> Callable[[Layer, int], Affine]:
    def direct(layer: Layer, rank: int) -> Affine:
        scale = layer.number(Statistic.INPUT_MAGNITUDE) ** alpha
        return reference.diagonally_weighted_svd(layer.dense[0], scale, rank), layer.dense[1]

    return direct


def _whitened_direct(layer: Layer, rank: int) -> Affine:
    moment = reference.second_moment(layer.rows)
    return reference.whitened_svd(layer.dense[0], moment, rank), layer.dense[1]


def _drone_direct(layer: Layer, rank: int) -> Affine:
    identity = np.eye(len(layer.dense[0]))
    moment = reference.second_moment(layer.rows)
    return reference.two_sided_svd(layer.dense[0], identity, moment, rank), layer.dense[1]


def _bolaco_direct(layer: Layer, rank: int) -> Affine:
    return reference.bolaco(*layer.dense, layer.inputs, rank)


def _kfac_direct(layer: Layer, rank: int) -> Affine:
    gradient = reference.shrunk(layer.number(Statistic.OUTPUT_GRADIENT), 0.01)
    moment = reference.second_moment(layer.rows)
    return reference.two_sided_svd(layer.dense[0], gradient, moment, rank), layer.dense[1]


def _flattened_direct(exponent: float, *, centred: bool) -> Callable[[Layer, int], Affine]:
    def direct(layer: Layer, rank: int) -> Affine:
        weight, bias = layer.dense
        metric = _metric(layer, exponent)
        if weight.shape[0] > weight.shape[1]:  # where no output is, any strength will do
            metric = metric + np.eye(len(weight)) - _projector(weight)
        moment = reference.covariance if centred else reference.second_moment
        approximation = reference.two_sided_svd(weight, metric, moment(layer.rows), rank)
        if centred:
            bias = bias + (weight - approximation) @ reference.mean(layer.rows)
        return approximation, bias

    return direct


def _metric(layer: Layer, exponent: float) -> Matrix:
    gradient = reference.shrunk(layer.number(Statistic.OUTPUT_GRADIENT), 0.01)
    return reference.flattened(gradient, layer.dense[0], exponent)


def _projector(weight: Matrix) -> Matrix:
    return weight @ np.linalg.pinv(weight)


@dataclass(frozen=True)
class Case:
    """A method under contract.

    Attributes:
        method: With its options.
        error: Of a compressed layer, in the method's own metric.
        direct: The best layer of a rank, where statistics are not singular.
    """

    method: FactorizationMethod
    error: Callable[[Layer, Affine], float]
    direct: Callable[[Layer, int], Affine]


CASES = {
    "svd": Case(METHODS["svd"], _svd_error, plain_svd),
    "fwsvd": Case(METHODS["fwsvd"], _fwsvd_error, _fwsvd_direct),
    "first_order": Case(
        METHODS["first_order"], _first_order_error(0.25), _first_order_direct(0.25)
    ),
    "asvd": Case(METHODS["asvd"], _asvd_error(0.5), _asvd_direct(0.5)),
    "drone": Case(METHODS["drone"], _output_error, _drone_direct),
    "svd_llm": Case(METHODS["svd_llm"], _output_error, _whitened_direct),
    "bolaco": Case(METHODS["bolaco"], _bolaco_error, _bolaco_direct),
    "loss_aware": Case(
        METHODS["loss_aware"],
        _flattened_error(0.75, centred=False),
        _flattened_direct(0.75, centred=False),
    ),
    "first_order-few": Case(
        FirstOrder(kept=0.03), _first_order_error(0.03), _first_order_direct(0.03)
    ),
    "first_order-all": Case(
        FirstOrder(kept=1.0), _first_order_error(1.0), _first_order_direct(1.0)
    ),
    "asvd-alpha": Case(Asvd(alpha=1.0), _asvd_error(1.0), _asvd_direct(1.0)),
    "loss_aware-kfac": Case(LossAware(output_power=1.0), _kfac_error, _kfac_direct),
    "loss_aware-centred": Case(
        LossAware(output_power=0.5, centred=True),
        _flattened_error(0.5, centred=True),
        _flattened_direct(0.5, centred=True),
    ),
}
