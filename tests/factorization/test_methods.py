"""The contract of every registered method: a new one is picked up here."""

import warnings
from functools import cache

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn

from lrbo.config.compose import conf_folder
from lrbo.config.options import rules_of
from lrbo.errors import ConfigError, StatisticsError
from lrbo.factorization.base import FactorizationMethod, factor_layer
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.methods import LossAware
from lrbo.factorization.registry import METHODS, method_named
from lrbo.layers.forms import FORMS
from lrbo.layers.modules import PRODUCTS
from lrbo.layers.options import Option
from lrbo.linalg import JitterWarning
from tests.support import reference
from tests.support.methods import CASES, SHAPES, Case, Layer, make_layer, plain_svd
from tests.support.reference import Affine

TOLERANCE = {
    "full rank": 1e-10,  # the design's promise; products of well-conditioned float64 matrices
    "direct": 1e-9,  # singular vectors: 1e-16 divided by the gap between neighbouring values
    "error": 1e-9,  # relative to the error at rank 0: a sum of squares that were subtracted
    "scaled": 1e-10,  # 3 is not a power of two, so bits differ
}


def test_every_method_is_under_contract() -> None:
    assert len(METHODS) == 8
    assert {case.method.name for case in CASES.values()} == set(METHODS)
    assert all(CASES[name].method is method for name, method in METHODS.items())
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
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@cache  # tests ask of the same layers
def factors_of(method: FactorizationMethod, layer: Layer) -> LowRankFactors:
    """Factor with exactly the statistics that the method says it needs."""
    given = {need: layer.statistics[need] for need in method.needs}
    return method.factor(layer.weight, layer.bias, given)


@cache
def map_at(factors: LowRankFactors, layer: Layer, rank: int) -> Affine:
    return reference.affine_of(factors.at_rank(rank), layer.spec.in_features)


def ranks_of(factors: LowRankFactors) -> range:
    return range(factors.max_rank + 1)


def largest_difference(a: Affine, b: Affine) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


@every_method
@every_layer
def test_full_rank_reproduces_the_affine_map(method: FactorizationMethod, layer: Layer) -> None:
    factors = factors_of(method, layer)
    assert isinstance(factors, LowRankFactors)
    assert factors.max_rank == min(layer.weight.shape)
    full = map_at(factors, layer, factors.max_rank)
    assert largest_difference(full, layer.dense) <= TOLERANCE["full rank"]


@every_method
@every_layer
def test_error_never_rises_and_ends_at_zero(method: FactorizationMethod, layer: Layer) -> None:
    factors = factors_of(method, layer)
    errors = [float(factors.tail[rank]) for rank in ranks_of(factors)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0
    assert errors[0] > 0.0


@every_case
@every_layer
def test_error_is_what_is_measured(case: Case, layer: Layer) -> None:
    factors = factors_of(case.method, layer)
    unit = float(factors.tail[0])
    for rank in ranks_of(factors):
        measured = case.error(layer, map_at(factors, layer, rank))
        assert abs(float(factors.tail[rank]) - measured) <= TOLERANCE["error"] * unit, rank


@every_case
@every_layer
def test_a_prefix_is_the_direct_factorization(case: Case, layer: Layer) -> None:
    factors = factors_of(case.method, layer)
    for rank in ranks_of(factors):
        difference = largest_difference(map_at(factors, layer, rank), case.direct(layer, rank))
        assert difference <= TOLERANCE["direct"], rank


@every_case
@every_layer
def test_never_worse_than_svd_in_its_own_metric(case: Case, layer: Layer) -> None:
    factors = factors_of(case.method, layer)
    unit = float(factors.tail[0])
    for rank in ranks_of(factors):
        plain = case.error(layer, plain_svd(layer, rank))
        assert float(factors.tail[rank]) <= plain + TOLERANCE["error"] * unit, rank


@every_method
@every_layer
def test_a_rank_has_that_rank(method: FactorizationMethod, layer: Layer) -> None:
    factors = factors_of(method, layer)
    for rank in ranks_of(factors):
        weight, _ = map_at(factors, layer, rank)
        assert np.linalg.matrix_rank(weight, tol=1e-8) == rank


@every_method
@every_layer
@pytest.mark.parametrize("form", PRODUCTS)
def test_every_form_is_the_same_map_at_what_it_costs(
    method: FactorizationMethod, layer: Layer, form: str
) -> None:
    """What adds a bias says so: a menu must count it before anything is factored."""
    factors = factors_of(method, layer)
    bias = method.adds_bias or layer.spec.has_bias
    for rank in ranks_of(factors):
        option = Option(form, (rank,))
        module = factors.stored("layer", option, torch.float64)
        assert (module.bias is not None) == bias
        for counted in (module, factors.stand_in("layer", option)):
            parameters, *_ = FORMS[form].cost(layer.spec, (rank,), bias=bias, itemsize=8)
            assert parameters == reference.count_parameters(counted), rank
        actual = reference.affine_of(module, layer.spec.in_features)
        difference = largest_difference(actual, map_at(factors, layer, rank))
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
        assert float(first.tail[rank]) == float(second.tail[rank])


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_works_in_float64_whatever_the_weight_is(
    method: FactorizationMethod, dtype: torch.dtype
) -> None:
    """A half-precision weight is factored as the float64 matrix that it stands for."""
    layer = make_layer("tall", bias=True)
    assert layer.bias is not None
    weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
    low = factor_layer(method, weight, bias, layer.statistics)
    high = factor_layer(method, weight.double(), bias.double(), layer.statistics)
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
            factor_layer(method, layer.weight, layer.bias, rest)


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
        factor_layer(method, weight, layer.bias, layer.statistics)
    with pytest.raises(StatisticsError, match=r"bias holds 1 non-finite values out of 5"):
        factor_layer(method, layer.weight, bias, layer.statistics)
    for need in method.needs:
        broken = layer.statistics[need].clone()
        broken.view(-1)[:3] = bad
        with pytest.raises(StatisticsError, match=rf"{need.value} holds 3 non-finite"):
            factor_layer(method, layer.weight, layer.bias, {**layer.statistics, need: broken})


def assert_scaled(method: FactorizationMethod, layer: Layer, gradients: Tensor, times: int) -> None:
    """Scale a layer by 3 and compare maps, and errors, which become so many times larger."""
    bias = None if layer.bias is None else 3 * layer.bias
    factors = factors_of(method, layer)
    scaled = factors_of(method, Layer(3 * layer.weight, bias, layer.groups, gradients))
    for rank in ranks_of(factors):
        one, three = map_at(factors, layer, rank), map_at(scaled, layer, rank)
        assert largest_difference((3 * one[0], 3 * one[1]), three) <= TOLERANCE["scaled"], rank
        assert float(scaled.tail[rank]) == pytest.approx(
            times * float(factors.tail[rank]), rel=1e-9, abs=TOLERANCE["scaled"]
        )


@every_method
@every_layer
def test_a_layer_scaled_by_3_gives_layers_scaled_by_3(
    method: FactorizationMethod, layer: Layer
) -> None:
    """The loss sees outputs three times as large: its gradients are what they were."""
    has_weight_in_it = method.name == "first_order"  # its metric
    assert_scaled(method, layer, layer.gradients, 27 if has_weight_in_it else 9)


@pytest.mark.parametrize("name", ["fwsvd", "loss_aware", "loss_aware-kfac", "loss_aware-centred"])
@every_layer
def test_where_the_loss_undoes_a_scale_its_error_stays(name: str, layer: Layer) -> None:
    """What reads the output divides it by 3: nothing that the loss feels has changed."""
    assert_scaled(CASES[name].method, layer, layer.gradients / 3, 1)


@every_method
@every_layer
def test_permuted_features_give_a_permuted_layer(method: FactorizationMethod, layer: Layer) -> None:
    shuffle = torch.Generator().manual_seed(5)
    rows, columns = (torch.randperm(size, generator=shuffle) for size in layer.weight.shape)
    permuted = Layer(
        layer.weight[rows][:, columns],
        None if layer.bias is None else layer.bias[rows],
        [group[:, columns] for group in layer.groups],
        layer.gradients[:, rows],
    )
    factors, other = factors_of(method, layer), factors_of(method, permuted)
    for rank in ranks_of(factors):
        weight, bias = map_at(factors, layer, rank)
        expected = (weight[rows.numpy()][:, columns.numpy()], bias[rows.numpy()])
        difference = largest_difference(expected, map_at(other, permuted, rank))
        assert difference <= TOLERANCE["direct"], rank


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


# --- singular statistics -------------------------------------------------------------------------


def singular_layer(shape: str, what: str) -> Layer:
    """Draw a layer that calibration saw too little of, in one of the ways in which it happens."""
    layer = make_layer(shape, bias=True, tokens=(2, 1) if what == "few tokens" else (40, 25, 60))
    for group in layer.groups:
        if what == "dead feature":
            group[:, 2] = 0.0
        elif what == "constant feature":
            group[:, 2] = 0.7
    if what == "dead output":
        layer.gradients[:, 1] = 0.0
    return layer


@every_case
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("what", ["few tokens", "dead feature", "constant feature", "dead output"])
def test_singular_statistics_are_no_special_case(case: Case, shape: str, what: str) -> None:
    layer = singular_layer(shape, what)
    with warnings.catch_warnings():
        if case.method.name == "svd_llm":  # a root by Cholesky may need help, and says so
            warnings.simplefilter("ignore", JitterWarning)
        factors = factors_of(case.method, layer)
    full = map_at(factors, layer, factors.max_rank)
    assert largest_difference(full, layer.dense) <= TOLERANCE["full rank"]
    assert float(factors.tail[factors.max_rank]) == 0.0
    unit = float(factors.tail[0])
    assert unit > 0.0
    for rank in ranks_of(factors):
        measured = case.error(layer, map_at(factors, layer, rank))
        assert abs(float(factors.tail[rank]) - measured) <= TOLERANCE["error"] * unit, rank
        plain = case.error(layer, plain_svd(layer, rank))
        assert float(factors.tail[rank]) <= plain + TOLERANCE["error"] * unit, rank


@pytest.mark.parametrize("shape", SHAPES)
def test_help_for_a_root_by_cholesky_is_announced(shape: str) -> None:
    with pytest.warns(JitterWarning, match="input second moment is not positive definite"):
        factors_of(METHODS["svd_llm"], singular_layer(shape, "dead feature"))


# --- layers without effect -----------------------------------------------------------------------


def by_magnitude(layer: Layer, rank: int) -> Affine:
    """Weigh rows by the largest of their weights, where no gradient says how they matter."""
    weight, bias = layer.dense
    rows = reference.importance_of_rows(abs(weight), METHODS["first_order"].kept)
    return reference.diagonally_weighted_svd(weight.T, np.sqrt(rows), rank).T, bias


# What is left of a metric in which inputs or gradients weigh all alike.
LEFT = {
    ("fwsvd", "gradients"): plain_svd,
    ("loss_aware", "gradients"): CASES["drone"].direct,
    ("first_order", "gradients"): by_magnitude,
    ("first_order", "inputs"): by_magnitude,
    ("fwsvd", "inputs"): plain_svd,
    ("asvd", "inputs"): plain_svd,
    ("drone", "inputs"): plain_svd,
    ("svd_llm", "inputs"): plain_svd,
    ("bolaco", "inputs"): plain_svd,
    ("loss_aware", "inputs"): None,
}


def factors_without_effect(method: FactorizationMethod, layer: Layer) -> LowRankFactors:
    given = {need: layer.statistics[need] for need in method.needs}
    return factor_layer(method, layer.weight, layer.bias, given)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "what"), LEFT)
def test_a_layer_without_effect_costs_nothing_and_keeps_directions_in_order(
    name: str, what: str, shape: str
) -> None:
    """Any rank will do; what another text may bring is answered as well as a rank can."""
    layer = make_layer(shape, bias=True)
    for tensor in layer.groups if what == "inputs" else [layer.gradients]:
        tensor.zero_()
    factors = factors_without_effect(METHODS[name], layer)
    assert {float(factors.tail[rank]) for rank in ranks_of(factors)} == {0.0}
    full = map_at(factors, layer, factors.max_rank)
    assert largest_difference(full, layer.dense) <= TOLERANCE["full rank"]
    direct = LEFT[name, what]
    for rank in ranks_of(factors) if direct else ():
        actual = map_at(factors, layer, rank)
        assert largest_difference(actual, direct(layer, rank)) <= TOLERANCE["direct"], rank


@every_method
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_zeros_costs_nothing(method: FactorizationMethod, shape: str) -> None:
    layer = make_layer(shape, bias=True)
    layer.weight.zero_()
    factors = factors_without_effect(method, layer)
    for rank in ranks_of(factors):
        assert float(factors.tail[rank]) == 0.0
        assert largest_difference(map_at(factors, layer, rank), layer.dense) == 0.0


@every_method
def test_a_layer_with_effect_is_factored_by_the_method_alone(method: FactorizationMethod) -> None:
    """Also one whose inputs are constant, which a method that restores means answers exactly."""
    for constant in (False, True):
        layer = make_layer("wide", bias=True)
        for group in layer.groups if constant else []:
            group.copy_(layer.groups[0][0].expand_as(group))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", JitterWarning)
            plain, actual = factors_of(method, layer), factors_without_effect(method, layer)
        assert torch.equal(actual.left, plain.left)
        assert torch.equal(actual.tail, plain.tail)


# --- registry ------------------------------------------------------------------------------------


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        method_named("svdd")
    assert "'svdd'" in str(caught.value)
    assert all(name in str(caught.value) for name in METHODS)
    assert method_named("svd") == METHODS["svd"]


def test_options_change_a_method_and_are_known_by_name() -> None:
    for name, method in METHODS.items():
        options = {option: getattr(method, option) for option in rules_of(method)}
        assert method_named(name, options) == method
    assert method_named("asvd", {"alpha": 0.25}).alpha == 0.25
    assert METHODS["asvd"].alpha == 0.5


@pytest.mark.parametrize(
    ("name", "expected"),
    [("svd", r"svd has no such option; it has none"), ("asvd", r"it has alpha")],
)
@pytest.mark.parametrize("option", ["beta", "name", "needs"])
def test_an_option_that_a_method_does_not_have_is_refused(
    name: str, expected: str, option: str
) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{option}: .*{expected}"):
        method_named(name, {option: 1})


def test_one_sided_kinds_are_treated_without_directions_of_gradients() -> None:
    layer = make_layer("square", bias=True)
    method = LossAware(one_sided=("q_proj", "k_proj"))
    ignoring = factors_of(LossAware(output_power=0.0), layer)
    for kind in ("q_proj", "k_proj"):
        assert torch.equal(factors_of(method.for_kind(kind), layer).left, ignoring.left)
    assert method.for_kind("v_proj") is method
    for other in METHODS.values():
        assert other.for_kind("q_proj") is other


def test_every_method_has_a_file_that_states_all_of_its_options() -> None:
    files = {file.stem: file for file in (conf_folder() / "method").glob("*.yaml")}
    assert set(files) == set(METHODS)
    for name, file in files.items():
        stated = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert method_named(stated.pop("name"), stated) == METHODS[name]
        assert set(stated) == set(rules_of(METHODS[name]))
