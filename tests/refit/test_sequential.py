"""The sequential refit against one that rebuilds the whole model after every site."""

import numpy as np
import pytest
import torch

from lrbo.allocation.apply import store_
from lrbo.calibration.collect import CalibrationWarning
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.prepared import BasedWeight, Prepared, UnitFactors
from lrbo.factorization.rounding import round_nearest
from lrbo.layers.forms import Quantized
from lrbo.layers.options import Option
from lrbo.linalg import JitterWarning
from lrbo.models.model_map import linear_bias, linear_weight, map_model
from lrbo.refit.sequential import RefitSettings, refit
from tests.support import reference
from tests.support.allocations import decided
from tests.support.refits import (
    HELD,
    RANK,
    ROUNDED,
    WIDTH,
    WINDOWS,
    affine,
    allocation,
    assert_untouched,
    double,
    inputs_of,
    metrics_of,
    old_factors,
    one_thread,
    same_bits,
    slow_refit,
    snapshot,
)
from tests.support.tiny import build, token_ids

__all__ = ["one_thread"]  # a fixture

families = pytest.mark.parametrize(
    ("case", "centred"),
    [
        ("llama_biased", False),
        ("llama_biased", True),
        ("gpt2", True),  # Conv1D
        ("qwen2", False),  # grouped queries, biases on q, k, v alone
        ("phi", False),  # attention and MLP read the same
        ("gpt_neox", False),
        ("phi3", False),  # q, k, v in one layer
        ("opt", False),  # flattens the tokens of all windows before its MLP
        ("mistral", False),
        ("qwen3", False),  # norms of queries and keys
        ("smollm3", False),
    ],
)


@families
def test_each_site_reads_what_the_model_refit_so_far_gives_it(case: str, centred: bool) -> None:
    model, layers = double(case)
    before = snapshot(model)
    old = old_factors(model, layers, centred=centred)
    plan = allocation(layers, dense=("k_proj", "c_fc"))
    windows, metrics = token_ids(WINDOWS, WIDTH), metrics_of(layers)
    settings = RefitSettings(blend=0.75, feedback=0.6, ridge=1e-2, held_back=0.2, batch_windows=3)
    named: list[str] = []
    result = refit(
        model, layers, plan, old, windows, settings, metric=metrics.get, on_layer=named.append
    )
    rest = [i for i in range(WINDOWS) if i not in HELD]
    slow = slow_refit(
        model, layers, plan, old, windows[rest], windows[list(HELD)], settings, metrics
    )
    assert list(result.factors) == named == [row.name for row in result.report] == list(slow)
    assert len(slow) >= 6
    for row in result.report:
        expected, factors = slow[row.name], result.factors[row.name]
        assert (row.rank, row.accepted) == (RANK, expected.taken)
        errors = (row.fitted_before, row.fitted_after, row.held_back_before, row.held_back_after)
        assert errors == pytest.approx(expected.errors, rel=1e-3, abs=1e-9)
        for mine, theirs in zip(affine(factors), expected.layer, strict=True):
            np.testing.assert_allclose(mine, theirs, **ROUNDED)
        assert factors.max_rank == RANK
        assert factors.left.dtype == factors.right.dtype == torch.float32
        has_bias = layers.by_name[row.name].has_bias or centred
        assert (factors.offset is not None, factors.center is not None) == (has_bias, centred)
    assert {row.accepted for row in result.report} >= {True}
    assert_untouched(model, before)


def test_with_everything_upstream_dense_it_is_the_whitened_svd() -> None:
    model, layers = double("llama_untied")
    windows = token_ids(WINDOWS, WIDTH)
    settings = RefitSettings(ridge=0.0, held_back=0.0, blend=1.0)
    site = layers.sites[0]
    result = refit(model, layers, allocation(layers), old_factors(model, layers), windows, settings)
    x = inputs_of(model, site, windows)
    members = [spec for spec in layers.compressible if spec.site == site]
    assert len(members) == 3
    for spec in members:
        weight = reference.numpy_of(linear_weight(model.get_submodule(spec.name)))
        expected = reference.whitened_svd(weight, x.T @ x / len(x), RANK)
        np.testing.assert_allclose(affine(result.factors[spec.name])[0], expected, **ROUNDED)


def test_behind_a_compressed_layer_the_full_rank_answer_is_least_squares() -> None:
    """Of the layers behind them only the compressed values are not as in the dense model."""
    model, layers = double("gpt2")
    first, second = (f"transformer.h.0.attn.{kind}" for kind in ("c_attn", "c_proj"))
    options = {first: Option("factored", (RANK,)), second: Option("pivoted", (16,))}
    allocation = decided(layers.compressible, options)
    windows = token_ids(WINDOWS, WIDTH)
    settings = RefitSettings(ridge=0.0, held_back=0.0, blend=1.0)
    result = refit(model, layers, allocation, old_factors(model, layers), windows, settings)
    assert set(result.factors) == {first, second}
    dense = inputs_of(model, second, windows)
    wide = {name: factors.to(dtype=torch.float64) for name, factors in result.factors.items()}
    store_(model, allocation, wide)
    x = inputs_of(model, second, windows)
    weight = reference.numpy_of(linear_weight(build("gpt2").get_submodule(second)))
    expected = np.linalg.lstsq(x, dense @ weight.T, rcond=None)[0].T
    assert np.abs(expected - weight).max() > 0.1  # there is something to mend
    np.testing.assert_allclose(affine(result.factors[second])[0], expected, **ROUNDED)


def test_integers_stay_what_they_are_and_layers_behind_them_make_up_for_them() -> None:
    model, layers = double("gpt2")
    first, second = (f"transformer.h.0.attn.{kind}" for kind in ("c_attn", "c_proj"))
    option = Option("int2", (16, 1))
    allocation = decided(layers.compressible, {first: option, second: Option("pivoted", (16,))})
    weight = linear_weight(model.get_submodule(first))
    (rounded,) = round_nearest(weight, [(Quantized(2), 16)], dtype=torch.float64)
    old = old_factors(model, layers)
    left, values, right = torch.linalg.svd(weight - rounded.weight(torch.float64))
    tail = torch.zeros(2, dtype=torch.float64)
    bias = linear_bias(model.get_submodule(first))
    rest = LowRankFactors(left[:, :1] * values[0], right[:1], tail, bias)
    own = BasedWeight(rounded, rest)
    prepared: dict[str, Prepared] = {**old, first: UnitFactors(old[first], {own.base.family: own})}
    windows, before = token_ids(WINDOWS, WIDTH), snapshot(model)
    settings = RefitSettings(ridge=0.0, held_back=0.0, blend=1.0)
    result = refit(model, layers, allocation, prepared, windows, settings)
    assert set(result.factors) == {row.name for row in result.report} == {second}
    assert_untouched(model, before)
    dense = inputs_of(model, second, windows)
    wide = result.factors[second].to(dtype=torch.float64)
    store_(model, allocation, prepared | {second: wide})
    x = inputs_of(model, second, windows)
    weight = reference.numpy_of(linear_weight(build("gpt2").get_submodule(second)))
    expected = np.linalg.lstsq(x, dense @ weight.T, rcond=None)[0].T
    assert np.abs(expected - weight).max() > 0.1  # there is something to mend
    np.testing.assert_allclose(affine(result.factors[second])[0], expected, **ROUNDED)


def test_with_few_tokens_some_layers_keep_what_they_had() -> None:
    model, layers = double("llama_untied")
    old = old_factors(model, layers)
    with pytest.warns(CalibrationWarning) as caught, pytest.warns(JitterWarning):
        result = refit(
            model, layers, allocation(layers), old, token_ids(3, 5), RefitSettings(ridge=0.0)
        )
    (warning,) = [str(w.message) for w in caught if w.category is CalibrationWarning]
    assert "10 tokens for the 24 features that model.layers.0.mlp.down_proj reads" in warning
    assert {row.accepted for row in result.report} == {True, False}
    for row in result.report:
        assert row.held_back_before is not None
        assert row.held_back_after is not None
        assert row.accepted == (row.held_back_after < row.held_back_before)
        if not row.accepted:
            assert torch.equal(result.factors[row.name].left, old[row.name].left[:, :RANK])
            assert torch.equal(result.factors[row.name].right, old[row.name].right[:RANK])


def test_without_windows_held_back_every_layer_is_taken() -> None:
    model, layers = double("llama_untied")
    settings = RefitSettings(held_back=0.0)
    old = old_factors(model, layers)
    result = refit(model, layers, allocation(layers), old, token_ids(6, 12), settings)
    assert len(result.report) == len(layers.compressible)
    for row in result.report:
        assert row.accepted
        assert row.held_back_before is row.held_back_after is None
        assert row.fitted_after < row.fitted_before


def test_windows_to_judge_by_may_be_given() -> None:
    model, layers = build("qwen2"), map_model(build("qwen2"))
    given = (model, layers, allocation(layers), old_factors(model, layers))
    windows = token_ids(WINDOWS, WIDTH)
    rest = [index for index in range(WINDOWS) if index not in HELD]
    settings = RefitSettings(held_back=0.2)
    first = refit(*given, windows, settings)
    assert same_bits(first, refit(*given, windows[rest], settings, judging=windows[list(HELD)]))
