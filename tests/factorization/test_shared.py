"""Layers factored as one: the best of their shared inputs, and losses that add up."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.cache import factor_model, factors_fingerprint
from lrbo.factorization.prepared import UnitFactors, prepared_of
from lrbo.factorization.registry import METHODS, method_named
from lrbo.factorization.shared import SHARED, SharedFactors, prepare_shared
from lrbo.layers.low_rank import linear_of
from lrbo.layers.options import Menu
from lrbo.layers.shared import SharedLinear, link_
from lrbo.models.model_map import linear_weight, map_model
from lrbo.models.specs import LayerSpec, sharing
from tests.support import reference
from tests.support.methods import RandomStatistics
from tests.support.tiny import CASES, build

# Factors are kept in float32; everything is compared in float64.
SINGLE = 1e-5  # relative
CPU, IN, OUTS = torch.device("cpu"), 8, {"q": 7, "k": 4, "v": 5}
Statistics = dict[Statistic, Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layers(biased: Mapping[str, bool]) -> tuple[list[LayerSpec], list[nn.Linear], list[Statistics]]:
    """Return layers that read the same input, and what is known of them."""
    rows = draw(90, IN, seed=0) @ draw(IN, IN, seed=1) + 1
    covariance = torch.cov(rows.T, correction=0)
    specs, modules, statistics = [], [], []
    for seed, (name, out) in enumerate(OUTS.items(), start=2):
        specs.append(LayerSpec(name, name, 0, out, IN, biased[name], "q", closing="o"))
        offset = draw(out, seed=30 + seed) if biased[name] else None
        modules.append(linear_of(draw(out, IN, seed=10 + seed), offset))
        slopes = draw(60, out, seed=20 + seed) * seed
        statistics.append(
            {
                Statistic.INPUT_MEAN: rows.mean(0),
                Statistic.INPUT_MAGNITUDE: rows.abs().mean(0),
                Statistic.INPUT_COVARIANCE: covariance,
                Statistic.POOLED_INPUT_COVARIANCE: covariance,
                Statistic.OUTPUT_GRADIENT: slopes.T @ slopes / len(slopes),
                Statistic.INPUT_IMPORTANCE: rows.square().mean(0) * seed,
                Statistic.WEIGHT_GRADIENT: draw(out, IN, seed=40 + seed).abs(),
            }
        )
    return specs, modules, statistics


def stored(made: Mapping[str, SharedFactors], rank: int) -> dict[str, SharedLinear]:
    """Return the layers of a rank, which know each other."""
    modules = {name: own.module(rank) for name, own in made.items()}
    link_(modules)
    return modules


BIASED = dict.fromkeys(OUTS, False) | {"k": True}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("biased", [dict.fromkeys(OUTS, True), BIASED], ids=["all", "one"])
def test_losses_of_the_layers_are_those_of_what_is_stored(
    name: str, biased: dict[str, bool]
) -> None:
    specs, modules, statistics = layers(biased)
    made = prepare_shared(specs, modules, method_named(name), statistics, CPU)
    moment = statistics[0][Statistic.INPUT_COVARIANCE]
    mean = statistics[0][Statistic.INPUT_MEAN]
    if name != "bolaco":
        moment = moment + mean.outer(mean)
    most = IN * sum(OUTS.values()) // (IN + sum(OUTS.values()))
    assert [own.rest.max_rank for own in made.values()] == [most] * 3
    for rank in (1, most):
        of_rank = stored(made, rank)
        for spec, dense, known in zip(specs, modules, statistics, strict=True):
            layer, own = of_rank[spec.name], made[spec.name]
            assert (layer.right is None) == (spec.name != "q")
            rest = (dense.weight.double() - layer.dense_weight()).numpy()
            gradient = reference.shrunk(known[Statistic.OUTPUT_GRADIENT].numpy(), 0.01)
            actual = float(np.trace(gradient @ rest @ moment.numpy() @ rest.T)) / 2
            assert own.rest.loss is not None
            # Directions of another metric may cancel, and a curve never rises.
            assert float(own.rest.loss[rank]) >= actual * (1 - SINGLE)
            if name in ("loss_aware", "svd_llm", "drone", "bolaco"):
                assert float(own.rest.loss[rank]) == pytest.approx(actual, rel=SINGLE)
            if name == "bolaco":  # a bias restores the mean output
                bias = 0 if dense.bias is None else dense.bias
                expected = dense.weight @ mean + bias
                torch.testing.assert_close(
                    layer(mean.float()).double(), expected, rtol=1e-4, atol=1e-4
                )
            elif biased[spec.name]:
                torch.testing.assert_close(layer.bias.double(), dense.bias)
            else:
                assert layer.bias is None


def test_without_data_it_is_the_truncated_svd_of_the_stacked_weight() -> None:
    specs, modules, _ = layers(BIASED)
    made = prepare_shared(specs, modules, method_named("svd"), [{}] * 3, CPU)
    weight = torch.cat([module.weight for module in modules]).numpy()
    for rank in range(1, 6):
        rows = torch.cat([each.dense_weight() for each in stored(made, rank).values()]).numpy()
        expected = reference.truncated_svd(weight, rank)
        assert np.abs(rows - expected).max() <= SINGLE * np.abs(weight).max()
    assert all(own.rest.loss is None for own in made.values())


def test_first_order_weighs_each_row_of_the_stack_by_its_own_gradients() -> None:
    specs, modules, statistics = layers(BIASED)
    made = prepare_shared(specs, modules, method_named("first_order"), statistics, CPU)
    weight = torch.cat([module.weight for module in modules]).numpy()
    own = torch.cat([each[Statistic.WEIGHT_GRADIENT] for each in statistics]).numpy()
    scale = np.sqrt(reference.importance_of_rows(abs(weight) * own, 0.25))
    for rank in range(1, 6):
        rows = torch.cat([each.dense_weight() for each in stored(made, rank).values()]).numpy()
        expected = reference.diagonally_weighted_svd(weight.T, scale, rank).T
        assert np.abs(rows - expected).max() <= SINGLE * np.abs(weight).max()


def test_with_gradients_no_other_shared_factor_loses_less() -> None:
    """The optimum is the truncated SVD of ``R [Wq; Wk; Wv] S``, with ``R`` block-diagonal."""
    specs, modules, statistics = layers(BIASED)
    method = method_named("loss_aware", {"output_power": 1.0, "output_shrinkage": 1e-6})
    # Of the same trace each layer's moment is shrunk to the same as the stacked one.
    for known in statistics:
        known[Statistic.OUTPUT_GRADIENT] /= known[Statistic.OUTPUT_GRADIENT].diagonal().mean()
    made = prepare_shared(specs, modules, method, statistics, CPU)
    roots = [np.linalg.cholesky(each[Statistic.OUTPUT_GRADIENT].numpy()).T for each in statistics]
    mean = statistics[0][Statistic.INPUT_MEAN]
    inputs = (statistics[0][Statistic.INPUT_COVARIANCE] + mean.outer(mean)).numpy()
    pairs = zip(roots, modules, strict=True)
    weighed = np.concatenate([root @ module.weight.numpy() for root, module in pairs])
    values = np.linalg.svd(weighed @ np.linalg.cholesky(inputs), compute_uv=False)
    for rank in range(1, 6):
        lost = 0.0
        for root, dense, layer in zip(roots, modules, stored(made, rank).values(), strict=True):
            rest = root @ (dense.weight - layer.dense_weight()).numpy()
            lost += float(np.trace(rest @ inputs @ rest.T))
        assert lost == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-4)


def test_alike_layers_need_no_more_rank_than_one() -> None:
    """Layers of the same weight: what one loses at a rank, each loses."""
    specs, modules, statistics = layers(dict.fromkeys(OUTS, False))
    weight = modules[0].weight
    alike = [linear_of(weight[: len(module.weight)], None) for module in modules]
    made = prepare_shared(specs, alike, method_named("svd_llm"), statistics, CPU)
    losses = [own.rest.loss for own in made.values()]
    assert all(curve is not None and float(curve[5]) > 0 for curve in losses)
    exact = replace(specs[0], out_features=2), replace(specs[1], out_features=2)
    made = prepare_shared(
        exact,
        [linear_of(weight[:2], None)] * 2,
        method_named("svd"),
        [{}, {}],
        CPU,
    )
    for own in made.values():
        weight_of_two = own.rest.left[:, :2] @ own.rest.right[:2]
        torch.testing.assert_close(weight_of_two.double(), weight[:2], rtol=SINGLE, atol=SINGLE)


def test_a_missing_statistic_is_named() -> None:
    specs, modules, _ = layers(BIASED)
    with pytest.raises(StatisticsError, match="method 'svd_llm' needs the statistics covariance"):
        prepare_shared(specs, modules, method_named("svd_llm"), [{}] * 3, CPU)


GROUPS = {"gpt2": 0, "gpt_neox": 0, "phi3": 0, "opt": 2, "phi": 2}  # of two blocks; else 4


@pytest.mark.parametrize("case", CASES)
def test_every_group_of_a_model_is_prepared_and_comes_back_from_its_tensors(case: str) -> None:
    model, method = build(case), method_named("svd")
    specs = map_model(model).compressible
    groups = sharing(specs)
    assert len(groups) == GROUPS.get(case, 4)
    parts = factor_model(
        model, map_model(model), method, RandomStatistics(), joint=("shared_factored", "skip")
    )
    made = {name: each for part in parts for name, each in part.items()}
    inside = {spec.name: group for group in groups for spec in group}
    for spec in specs:
        unit = made[spec.name]
        assert isinstance(unit, UnitFactors)
        outputs = sum(each.out_features for each in inside.get(spec.name, ()))
        menu = Menu.of(spec, ["shared_factored"], bias=False, itemsize=4, shared_outputs=outputs)
        assert (SHARED in unit.based) == bool(outputs) == (len(menu) > 1)
        if not outputs:
            continue
        (section, _) = menu.sections
        losses = unit.losses(section)
        assert losses is not None
        assert len(losses) == len(section.levels) == unit.based[SHARED].rest.max_rank
        again = prepared_of(unit.tensors())
        moved = unit.only({SHARED: 3}, torch.float32, CPU)
        assert isinstance(again, UnitFactors)
        assert moved is not None
        option = SHARED.at(3)
        one, other = (each.stored(spec.name, option, torch.float32) for each in (unit, again))
        trial = moved.trial_module(spec.name, option, 0, {})
        assert isinstance(one, SharedLinear)
        assert isinstance(other, SharedLinear)
        assert one.site == other.site == inside[spec.name][0].name
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])
        assert torch.equal(trial.left.weight, one.left.weight)  # type: ignore[union-attr]
    for group in groups:
        modules = {
            spec.name: made[spec.name].stored(spec.name, SHARED.at(3), torch.float32)
            for spec in group
        }
        link_(modules)
        dense = [linear_weight(model.get_submodule(spec.name)).double() for spec in group]
        expected = reference.truncated_svd(torch.cat(dense).numpy(), 3)
        actual = torch.cat([m.dense_weight() for m in modules.values()]).numpy()  # type: ignore[operator]
        assert np.abs(actual - expected).max() <= SINGLE * np.abs(expected).max()


def test_factors_with_a_shared_one_are_others_in_the_cache() -> None:
    digests = {
        factors_fingerprint("model", None, method_named("svd"), joint=joint)
        for joint in ((), ("shared_factored",), ("shared_factored", "skip"))
    }
    assert len(digests) == 3


def test_tensors_that_do_not_fit_each_other_are_refused() -> None:
    specs, modules, statistics = layers(BIASED)
    made = prepare_shared(specs, modules, method_named("svd_llm"), statistics, CPU)
    tensors = made["k"].tensors()
    assert SharedFactors.of_tensors(tensors).site == "q"
    with pytest.raises(ValueError, match=r"loss has shape \(5,\), expected"):
        SharedFactors.of_tensors(tensors | {"loss": tensors["loss"][:-1]})
