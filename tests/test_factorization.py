"""The contract of every registered method: a new one is picked up here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrbo.accounting import STORAGES
from lrbo.errors import ConfigError, StatisticsError
from lrbo.factorization.base import FactorizationMethod, Statistic
from lrbo.factorization.registry import METHODS, method_named
from lrbo.model import LayerSpec
from lrbo.nested import NestedFactors, PivotedFactors
from tests import reference
from tests.reference import Affine, Matrix

TOLERANCE = {
    "full rank": 1e-10,  # the design's promise; products of well-conditioned float64 matrices
    "direct": 1e-9,  # singular vectors: 1e-16 divided by the gap between neighbouring values
    "error": 1e-9,  # relative to the error at rank 0: a sum of squares that were subtracted
    "scaled": 1e-10,  # 3 is not a power of two, so bits differ
}

SHAPES = {"wide": (5, 9), "tall": (9, 5), "square": (7, 7)}
GROUP_SIZES = (40, 25, 60)


@dataclass(frozen=True)
class Layer:
    """A dense layer with the calibration inputs that it saw."""

    weight: Tensor
    bias: Tensor | None
    groups: list[Tensor]

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

    @property
    def statistics(self) -> dict[Statistic, Tensor]:
        """All statistics there are, by the printed formulas."""
        found = {
            Statistic.INPUT_MEAN: reference.mean(self.rows),
            Statistic.INPUT_COVARIANCE: reference.covariance(self.rows),
            Statistic.POOLED_INPUT_COVARIANCE: reference.pooled_covariance(self.inputs),
        }
        assert set(found) == set(Statistic), "a new statistic needs its plain formula here"
        return {statistic: torch.from_numpy(value) for statistic, value in found.items()}

    @property
    def spec(self) -> LayerSpec:
        out_features, in_features = self.weight.shape
        return LayerSpec(
            "layer", "kind", 0, out_features, in_features, self.bias is not None, site="layer"
        )


def make_layer(shape: str, *, bias: bool, seed: int = 0, tokens: Sequence[int] = GROUP_SIZES):
    """Draw a layer and inputs: correlated features, and a mean that differs from group to group."""
    out_features, in_features = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mix = draw(in_features, in_features)
    groups = [draw(count, in_features) @ mix + 2 * draw(in_features) for count in tokens]
    return Layer(draw(out_features, in_features), draw(out_features) if bias else None, groups)


# --- each method states here what its error means and what a direct computation gives -----------


def _svd_error(layer: Layer, compressed: Affine) -> float:
    return float(((layer.dense[0] - compressed[0]) ** 2).sum())


def _svd_direct(layer: Layer, rank: int) -> Affine:
    return reference.truncated_svd(layer.dense[0], rank), layer.dense[1]


def _bolaco_error(layer: Layer, compressed: Affine) -> float:
    return reference.pooled_output_error(layer.dense, compressed, layer.inputs)


def _bolaco_direct(layer: Layer, rank: int) -> Affine:
    return reference.bolaco(*layer.dense, layer.inputs, rank)


MEASURED_ERROR: dict[str, Callable[[Layer, Affine], float]] = {
    "svd": _svd_error,
    "bolaco": _bolaco_error,
}
DIRECT: dict[str, Callable[[Layer, int], Affine]] = {"svd": _svd_direct, "bolaco": _bolaco_direct}


def test_every_method_is_under_contract() -> None:
    assert len(METHODS) >= 2
    assert set(METHODS) == set(MEASURED_ERROR) == set(DIRECT)
    assert all(name == method.name for name, method in METHODS.items())
    assert all(isinstance(method, FactorizationMethod) for method in METHODS.values())


every_layer = pytest.mark.parametrize(
    "layer",
    [
        pytest.param(make_layer(shape, bias=bias), id=f"{shape}-{'bias' if bias else 'plain'}")
        for shape in SHAPES
        for bias in (False, True)
    ],
)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def factors_of(method: FactorizationMethod, layer: Layer) -> NestedFactors:
    """Factor with exactly the statistics that the method says it needs."""
    given = {need: layer.statistics[need] for need in method.needs}
    return method.factor(layer.weight, layer.bias, given)


def map_at(factors: NestedFactors, layer: Layer, rank: int) -> Affine:
    return reference.affine_of(factors.at_rank(rank), layer.spec.in_features)


def ranks_of(factors: NestedFactors) -> range:
    return range(factors.max_rank + 1)


def largest_difference(a: Affine, b: Affine) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


@every_method
@every_layer
def test_full_rank_reproduces_the_affine_map(method: FactorizationMethod, layer: Layer) -> None:
    factors = factors_of(method, layer)
    assert isinstance(factors, NestedFactors)
    assert factors.max_rank == min(layer.weight.shape)
    full = map_at(factors, layer, factors.max_rank)
    assert largest_difference(full, layer.dense) <= TOLERANCE["full rank"]


@every_method
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact_with_fewer_tokens_than_features(
    method: FactorizationMethod, shape: str
) -> None:
    layer = make_layer(shape, bias=True, tokens=(2, 1))  # a covariance of rank 1 at most
    factors = factors_of(method, layer)
    full = map_at(factors, layer, factors.max_rank)
    assert largest_difference(full, layer.dense) <= TOLERANCE["full rank"]
    assert factors.error_at(factors.max_rank) == 0.0


@every_method
@every_layer
def test_error_never_rises_and_ends_at_zero(method: FactorizationMethod, layer: Layer) -> None:
    factors = factors_of(method, layer)
    errors = [factors.error_at(rank) for rank in ranks_of(factors)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0
    assert errors[0] > 0.0


@every_method
@every_layer
def test_error_is_what_is_measured(method: FactorizationMethod, layer: Layer) -> None:
    factors = factors_of(method, layer)
    unit = factors.error_at(0)
    for rank in ranks_of(factors):
        measured = MEASURED_ERROR[method.name](layer, map_at(factors, layer, rank))
        assert abs(factors.error_at(rank) - measured) <= TOLERANCE["error"] * unit, rank


@every_method
@every_layer
def test_a_prefix_is_the_direct_factorization(method: FactorizationMethod, layer: Layer) -> None:
    factors = factors_of(method, layer)
    for rank in ranks_of(factors):
        difference = largest_difference(
            map_at(factors, layer, rank), DIRECT[method.name](layer, rank)
        )
        assert difference <= TOLERANCE["direct"], rank


@every_method
@every_layer
def test_a_rank_has_that_rank(method: FactorizationMethod, layer: Layer) -> None:
    factors = factors_of(method, layer)
    for rank in ranks_of(factors):
        weight, _ = map_at(factors, layer, rank)
        assert np.linalg.matrix_rank(weight, tol=1e-8) == rank


@every_method
@every_layer
def test_parameters_counts_the_module(method: FactorizationMethod, layer: Layer) -> None:
    factors = factors_of(method, layer)
    for rank in ranks_of(factors):
        module = factors.at_rank(rank)
        assert method.parameters(layer.spec, rank) == reference.count_parameters(module), rank


@every_method
@every_layer
def test_pivoted_storage_is_the_same_map_in_the_numbers_that_are_counted(
    method: FactorizationMethod, layer: Layer
) -> None:
    assert STORAGES == ("factored", "pivoted")
    factors = factors_of(method, layer)
    for rank in ranks_of(factors):
        module = PivotedFactors(factors, torch.float64).at_rank(rank)
        counted = method.parameters(layer.spec, rank, "pivoted")
        assert counted == reference.count_parameters(module), rank
        assert counted == method.parameters(layer.spec, rank, "factored") - rank * rank
        found = reference.affine_of(module, layer.spec.in_features)
        difference = largest_difference(found, map_at(factors, layer, rank))
        assert difference <= TOLERANCE["full rank"], rank


@every_method
@every_layer
def test_same_call_same_bits_and_input_untouched(method: FactorizationMethod, layer: Layer) -> None:
    statistics = layer.statistics
    watched = [layer.weight, *statistics.values()] + ([] if layer.bias is None else [layer.bias])
    before = [tensor.clone() for tensor in watched]
    first = method.factor(layer.weight, layer.bias, statistics)
    second = method.factor(layer.weight, layer.bias, statistics)
    assert all(torch.equal(a, b) for a, b in zip(before, watched, strict=True))
    for rank in ranks_of(first):
        one, two = first.at_rank(rank).state_dict(), second.at_rank(rank).state_dict()
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert first.error_at(rank) == second.error_at(rank)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_works_in_float64_whatever_the_weight_is(
    method: FactorizationMethod, dtype: torch.dtype
) -> None:
    """A half-precision weight is factored as the float64 matrix that it stands for."""
    layer = make_layer("tall", bias=True)
    assert layer.bias is not None
    weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
    low = method.factor(weight, bias, layer.statistics)
    high = method.factor(weight.double(), bias.double(), layer.statistics)
    for rank in ranks_of(low):
        one, two = low.at_rank(rank).state_dict(), high.at_rank(rank).state_dict()
        assert {(tensor.dtype, tensor.device.type) for tensor in one.values()} == {
            (torch.float64, weight.device.type)
        }
        assert all(torch.equal(one[name], two[name]) for name in one)


@every_method
def test_a_missing_statistic_is_refused_by_name(method: FactorizationMethod) -> None:
    layer = make_layer("wide", bias=False)
    for missing in method.needs:
        rest = {need: layer.statistics[need] for need in method.needs - {missing}}
        with pytest.raises(StatisticsError, match=rf"{method.name}.*needs .*\b{missing.value}\b"):
            method.factor(layer.weight, layer.bias, rest)


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_is_refused_with_its_count(
    method: FactorizationMethod, bad: float
) -> None:
    layer = make_layer("wide", bias=True)
    assert layer.bias is not None
    weight, bias = layer.weight.clone(), layer.bias.clone()
    weight[1, 2] = weight[4, 0] = bad
    bias[3] = bad
    with pytest.raises(StatisticsError, match=r"weight holds 2 non-finite values out of 45"):
        method.factor(weight, layer.bias, layer.statistics)
    with pytest.raises(StatisticsError, match=r"bias holds 1 non-finite values out of 5"):
        method.factor(layer.weight, bias, layer.statistics)
    for need in method.needs:
        broken = layer.statistics[need].clone()
        broken.view(-1)[:3] = bad
        with pytest.raises(StatisticsError, match=rf"{need.value} holds 3 non-finite"):
            method.factor(layer.weight, layer.bias, {**layer.statistics, need: broken})


@every_method
@every_layer
def test_a_layer_scaled_by_3_gives_layers_scaled_by_3(
    method: FactorizationMethod, layer: Layer
) -> None:
    factors = factors_of(method, layer)
    bias = None if layer.bias is None else 3 * layer.bias
    scaled = factors_of(method, Layer(3 * layer.weight, bias, layer.groups))
    for rank in ranks_of(factors):
        one, three = map_at(factors, layer, rank), map_at(scaled, layer, rank)
        assert largest_difference((3 * one[0], 3 * one[1]), three) <= TOLERANCE["scaled"], rank
        assert scaled.error_at(rank) == pytest.approx(
            9 * factors.error_at(rank), rel=1e-9, abs=TOLERANCE["scaled"]
        )


@every_method
@every_layer
def test_permuted_inputs_give_a_permuted_layer(method: FactorizationMethod, layer: Layer) -> None:
    order = torch.randperm(layer.weight.shape[1], generator=torch.Generator().manual_seed(5))
    permuted = Layer(layer.weight[:, order], layer.bias, [g[:, order] for g in layer.groups])
    factors, other = factors_of(method, layer), factors_of(method, permuted)
    for rank in ranks_of(factors):
        weight, bias = map_at(factors, layer, rank)
        expected = (weight[:, order.numpy()], bias)
        difference = largest_difference(expected, map_at(other, permuted, rank))
        assert difference <= TOLERANCE["direct"], rank


@every_method
@every_layer
def test_never_worse_than_svd_in_its_own_metric(method: FactorizationMethod, layer: Layer) -> None:
    measure = MEASURED_ERROR[method.name]
    factors = factors_of(method, layer)
    unit = factors.error_at(0)
    for rank in ranks_of(factors):
        plain = measure(layer, _svd_direct(layer, rank))
        assert factors.error_at(rank) <= plain + TOLERANCE["error"] * unit, rank


@every_method
@every_layer
def test_modules_run_on_batches_of_sequences(method: FactorizationMethod, layer: Layer) -> None:
    factors = factors_of(method, layer)
    x = torch.randn(2, 3, layer.spec.in_features, dtype=torch.float64)
    for rank in (0, 1, factors.max_rank):
        module = factors.at_rank(rank)
        assert isinstance(module, nn.Module)
        weight, bias = map_at(factors, layer, rank)
        expected = x.numpy() @ weight.T + bias
        assert np.abs(module(x).numpy() - expected).max() <= TOLERANCE["full rank"]


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        method_named("svdd")
    assert "'svdd'" in str(caught.value)
    assert all(name in str(caught.value) for name in METHODS)
    assert method_named("svd") is METHODS["svd"]
