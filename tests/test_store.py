"""Factors come back from disk as they were, and only for what they were made of."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from lrbo.allocation import rungs
from lrbo.errors import StatisticsError
from lrbo.factorization.base import Statistic
from lrbo.factorization.pooled import Bolaco
from lrbo.factorization.registry import METHODS, method_named
from lrbo.factorization.store import (
    PARTS,
    factor_model,
    factors_fingerprint,
    load_factors,
    save_factors,
)
from lrbo.factorization.weighted import Svd
from lrbo.model import fingerprint, linear_bias, linear_weight, map_model
from lrbo.nested import LowRankFactors
from tests.tiny import CASES, build

TOLERANCE = {
    "rounded": 1e-6,  # relative to the largest entry: float64 rounded to float32 once
}


class Sites:
    """Statistics of every site, which remember who asked."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        self.widths, self.asked = widths, []

    def at(self, site: str) -> Mapping[Statistic, Tensor]:
        self.asked.append(site)
        width = self.widths[site]
        generator = torch.Generator().manual_seed(width)
        rows = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
        covariance = rows.T @ rows / len(rows)
        return {
            Statistic.INPUT_MEAN: rows.mean(0),
            Statistic.INPUT_COVARIANCE: covariance,
            Statistic.POOLED_INPUT_COVARIANCE: covariance,
        }


def sites_of(case: str) -> Sites:
    layers = map_model(build(case))
    return Sites({spec.site: spec.in_features for spec in layers.compressible})


def make(case: str, method: str) -> dict[str, LowRankFactors]:
    model = build(case)
    return factor_model(model, map_model(model), method_named(method), sites_of(case))


def assert_same(found: LowRankFactors, expected: LowRankFactors) -> None:
    for part in PARTS:
        one, other = getattr(found, part), getattr(expected, part)
        assert (one is None) == (other is None), part
        if one is not None:
            assert one.dtype == other.dtype, part
            assert torch.equal(one, other), part


every_case = pytest.mark.parametrize("case", ["llama_tied", "gpt2", "llama_biased"])
every_method = pytest.mark.parametrize("method", METHODS)


def test_every_part_of_the_factors_is_stored() -> None:
    assert {field.name for field in dataclasses.fields(LowRankFactors)} == set(PARTS)


# --- factoring a model -------------------------------------------------------------------------


@every_case
@every_method
def test_every_layer_is_factored_as_the_method_says(case: str, method: str) -> None:
    model, sites = build(case), sites_of(case)
    layers = map_model(model)
    factors = make(case, method)
    assert list(factors) == [spec.name for spec in layers.compressible]
    for spec in layers.compressible:
        module = model.get_submodule(spec.name)
        exact = method_named(method).factor(
            linear_weight(module), linear_bias(module), sites.at(spec.site)
        )
        found = factors[spec.name]
        assert {found.left.dtype, found.right.dtype} == {torch.float32}
        for rank in range(found.max_rank + 1):
            assert found.error_at(rank) == exact.error_at(rank)
            product = exact.left[:, :rank] @ exact.right[:rank]
            difference = (found.left[:, :rank] @ found.right[:rank]).double() - product
            unit = float(linear_weight(module).abs().max()) * 10
            assert float(difference.abs().max()) <= TOLERANCE["rounded"] * unit, rank


@every_case
@every_method
def test_exactly_the_ranks_below_dense_in_either_form_are_kept(case: str, method: str) -> None:
    layers = map_model(build(case))
    for name, found in make(case, method).items():
        cost = partial(method_named(method).parameters, storage="pivoted")
        steps = rungs(layers.by_name[name], cost, 1)
        assert found.max_rank == steps[-2][0]


@every_case
def test_statistics_are_read_only_by_methods_that_need_them(case: str) -> None:
    model = build(case)
    layers = map_model(model)
    for method in METHODS.values():
        sites = sites_of(case)
        factor_model(model, layers, method, sites)
        assert sites.asked == ([s.site for s in layers.compressible] if method.needs else [])


def test_progress_names_each_layer_once_and_the_model_is_untouched() -> None:
    model = build("gpt2")
    layers = map_model(model)
    before, done = fingerprint(model), []
    factor_model(model, layers, Svd(), sites_of("gpt2"), on_layer=done.append)
    assert done == [spec.name for spec in layers.compressible]
    assert fingerprint(model) == before


def test_a_broken_layer_is_refused_by_name() -> None:
    model = build("llama_tied")
    name = "model.layers.1.mlp.up_proj"
    model.get_submodule(name).weight[0, :2] = torch.nan
    with pytest.raises(StatisticsError, match=rf"^{name}: weight holds 2 non-finite values"):
        factor_model(model, map_model(model), Svd(), sites_of("llama_tied"))


# --- disk --------------------------------------------------------------------------------------


@every_case
@every_method
def test_factors_come_back_as_they_were(case: str, method: str, tmp_path: Path) -> None:
    factors = make(case, method)
    save_factors(tmp_path / "factors.safetensors", factors, "abc")
    found = load_factors(tmp_path / "factors.safetensors", "abc")
    assert found.keys() == factors.keys()
    for name, expected in factors.items():
        assert_same(found[name], expected)
        for rank in range(1, expected.max_rank + 1):
            assert found[name].left[:, :rank].T.is_contiguous()
    assert [path.name for path in tmp_path.iterdir()] == ["factors.safetensors"]


def test_a_name_may_hold_the_separator(tmp_path: Path) -> None:
    one = make("llama_tied", "svd")
    factors = {"a|b": next(iter(one.values()))}
    save_factors(tmp_path / "factors", factors, "abc")
    found = load_factors(tmp_path / "factors", "abc")
    assert set(found) == {"a|b"}
    assert_same(found["a|b"], factors["a|b"])


def test_factors_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "factors.safetensors"
    save_factors(path, make("llama_tied", "svd"), "abc")
    with pytest.raises(StatisticsError, match=r"factors\.safetensors has fingerprint abc, .* xyz"):
        load_factors(path, "xyz")


def test_a_file_that_is_cut_off_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "factors.safetensors"
    save_factors(path, make("llama_tied", "svd"), "abc")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SafetensorError):
        load_factors(path, "abc")


# --- fingerprint -------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_model_calibration_and_method() -> None:
    base = factors_fingerprint("model", "calibration", Bolaco())
    others = {
        factors_fingerprint("model 2", "calibration", Bolaco()),
        factors_fingerprint("model", "calibration 2", Bolaco()),
        factors_fingerprint("model", "calibration", Svd()),
        factors_fingerprint("model", "calibration", Svd(name="svd2")),
    }
    assert len(others | {base}) == 5
    assert factors_fingerprint("model", "calibration", Bolaco()) == base


def test_a_method_that_needs_no_calibration_does_not_depend_on_it() -> None:
    """So its factors are not made again when the calibration text changes."""
    assert not Svd().needs
    assert factors_fingerprint("model", "a", Svd()) == factors_fingerprint("model", "b", Svd())


def test_the_fingerprint_is_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets are walked in the order of hashes, and those of strings differ between processes."""
    needs = sorted(Bolaco().needs)
    assert len(needs) == 2
    found, orders = set(), set()
    for first in needs:  # small integers lie in a small set in their own order
        monkeypatch.setattr(Statistic, "__hash__", lambda self, first=first: int(self != first))
        method = Bolaco(needs=frozenset(needs))
        orders.add(repr(method))
        found.add(factors_fingerprint("model", "calibration", method))
    assert len(orders) == 2, "both orders must have been seen"
    assert len(found) == 1


def test_every_family_can_be_factored_and_stored(tmp_path: Path) -> None:
    for case in CASES:
        factors = make(case, "svd")
        assert len(factors) >= 8
        save_factors(tmp_path / case, factors, case)
        for name, found in load_factors(tmp_path / case, case).items():
            assert_same(found, factors[name])
