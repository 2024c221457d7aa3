"""The accountant says what counting the parameters of the real modules says."""

import math
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lrbo.accounting import (
    STORAGES,
    ModelAccount,
    Storage,
    account,
    dense_parameters,
    low_rank_parameters,
)
from lrbo.compression import replace_module
from lrbo.layers import LowRankLinear, PivotedLinear
from lrbo.model import map_model
from lrbo.specs import LayerSpec, ModelMap
from tests import reference
from tests.tiny import CASES, build, token_ids

# Everything is counted in integers: nothing here has a tolerance.

every_case = pytest.mark.parametrize("case", CASES)
every_storage = pytest.mark.parametrize("storage", STORAGES)
both_biases = pytest.mark.parametrize("bias", [False, True])


def some_ranks(layers: ModelMap) -> dict[str, int | None]:
    """Give each layer another rank, from 0 up; every third stays dense."""
    return {
        spec.name: None if i % 3 == 2 else i % min(spec.out_features, spec.in_features)
        for i, spec in enumerate(layers.compressible)
    }


def put_in(
    model: PreTrainedModel,
    layers: ModelMap,
    ranks: dict[str, int | None],
    *,
    bias: bool,
    storage: Storage,
) -> ModelAccount:
    """Replace layers by real low-rank modules, and return the account of the result."""
    parameters = {}
    for name, rank in ranks.items():
        spec = layers.by_name[name]
        if rank is None:
            parameters[name] = spec.parameters
            continue
        has_bias = bias or spec.has_bias
        replace_module(model, name, real_layer(spec, rank, bias=has_bias, storage=storage))
        parameters[name] = low_rank_parameters(spec, rank, bias=has_bias, storage=storage)
    return account(layers, ranks, parameters, storage=storage, bytes_per_parameter=4)


def real_layer(spec: LayerSpec, rank: int, *, bias: bool, storage: Storage) -> nn.Module:
    """Make a low-rank layer of ones."""
    left, right = torch.ones(spec.out_features, rank), torch.ones(rank, spec.in_features)
    offset = torch.ones(spec.out_features) if bias else None
    if storage == "factored":
        return LowRankLinear.from_tensors(left, right, offset)
    coefficients = torch.ones(spec.out_features - rank, rank)
    places = torch.arange(spec.out_features, dtype=torch.int32)
    return PivotedLinear(right, coefficients, places, offset)


def macs_of_linear_layers(model: PreTrainedModel) -> int:
    """Count what torch multiplies for one token, in linear layers only."""
    ids = token_ids(1, 1)
    attention = 0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    for operation, flops in counts.items():
        if "bmm" in str(operation):  # attention scores, which are no linear layer
            attention += flops
    return (sum(counts.values()) - attention) // 2


@every_case
@both_biases
@every_storage
def test_account_is_the_count_of_the_modules(case: str, bias: bool, storage: Storage) -> None:
    model = build(case)
    layers = map_model(model)
    ranks = some_ranks(layers)
    assert set(ranks.values()) >= {None, 0, 1}, "the case must exercise each kind of decision"
    dense_model = reference.count_parameters(model)
    dense = [reference.count_parameters(model.get_submodule(name)) for name in ranks]
    counted = put_in(model, layers, ranks, bias=bias, storage=storage)
    kept = [reference.count_parameters(model.get_submodule(name)) for name in ranks]
    assert counted.model_dense == dense_model
    assert counted.model == reference.count_parameters(model)
    assert counted.compressible_dense == sum(dense)
    assert counted.compressible == sum(kept)
    assert counted.keep_ratio == sum(kept) / sum(dense)


@every_case
@every_storage
def test_macs_are_what_torch_multiplies(case: str, storage: Storage) -> None:
    model = build(case)
    layers = map_model(model)
    dense = macs_of_linear_layers(model)
    counted = put_in(model, layers, some_ranks(layers), bias=False, storage=storage)
    assert counted.macs_per_token_dense == dense
    assert counted.macs_per_token == macs_of_linear_layers(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    model = build("gpt2").to(dtype)
    layers = map_model(model)
    ranks = dict.fromkeys((spec.name for spec in layers.compressible), None)
    dense = {spec.name: spec.parameters for spec in layers.compressible}
    counted = account(layers, ranks, dense, storage="pivoted", bytes_per_parameter=dtype.itemsize)
    stored = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    assert counted.bytes == counted.bytes_dense == sum(stored.values())


@every_storage
def test_bytes_count_the_order_that_a_pivoted_layer_keeps(storage: Storage) -> None:
    model = build("gpt2")
    layers = map_model(model)
    counted = put_in(model, layers, some_ranks(layers), bias=True, storage=storage)
    tensors = [*model.parameters()]
    tensors += [m.places for m in model.modules() if isinstance(m, PivotedLinear)]
    stored = {t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel()}
    assert counted.bytes == sum(stored.values())
    assert (counted.bytes > 4 * counted.model) == (storage == "pivoted")


def test_a_tied_head_is_counted_once() -> None:
    tied, untied = (map_model(build(case)) for case in ("llama_tied", "llama_untied"))
    head = tied.by_name["lm_head"]
    assert head.tied_to is not None
    assert untied.parameters - tied.parameters == head.parameters
    # The head costs the same multiplications either way.
    counts = [
        account(layers, {}, {}, storage="factored", bytes_per_parameter=2)
        for layers in (tied, untied)
    ]
    assert counts[0].macs_per_token_dense == counts[1].macs_per_token_dense


@every_case
def test_nothing_changes_while_every_layer_is_dense(case: str) -> None:
    layers = map_model(build(case))
    ranks = dict.fromkeys((spec.name for spec in layers.compressible), None)
    dense = {spec.name: spec.parameters for spec in layers.compressible}
    counted = account(layers, ranks, dense, storage="pivoted", bytes_per_parameter=2)
    assert counted.keep_ratio == 1.0
    assert counted.model == counted.model_dense
    assert counted.macs_per_token == counted.macs_per_token_dense
    assert counted.compressible_dense == dense_parameters(layers.compressible)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 4)])
@both_biases
def test_a_rank_costs_what_its_tensors_hold(shape: tuple[int, int], bias: bool) -> None:
    out_features, in_features = shape
    spec = LayerSpec("layer", "kind", 0, *shape, bias, site="layer")
    assert spec.parameters == reference.count_parameters(nn.Linear(in_features, out_features, bias))
    for rank in range(min(shape) + 1):
        factored, pivoted = (
            low_rank_parameters(spec, rank, bias=bias, storage=form) for form in STORAGES
        )
        for kind, counted in ((LowRankLinear, factored), (PivotedLinear, pivoted)):
            module = kind.empty(out_features, in_features, rank, bias=bias)
            assert counted == reference.count_parameters(module)
        assert pivoted == factored - rank * rank
        assert pivoted <= spec.parameters
    assert pivoted == spec.parameters  # at full rank the pivoted form is the dense one


@every_storage
@pytest.mark.parametrize("rank", [-1, 6])
def test_a_rank_that_the_layer_cannot_have_is_refused_by_name(storage, rank: int) -> None:
    spec = LayerSpec("blocks.3.fc1", "fc1", 3, 5, 9, has_bias=False, site="blocks.3.fc1")
    with pytest.raises(ValueError, match=rf"blocks\.3\.fc1: rank {rank} is outside 0\.\.5"):
        low_rank_parameters(spec, rank, bias=False, storage=storage)


def test_keep_ratio_covers_the_compressible_layers_only() -> None:
    layers = map_model(build("llama_untied"))
    ranks = {spec.name: 1 for spec in layers.compressible}
    kept = {spec.name: 100 for spec in layers.compressible}
    counted = account(layers, ranks, kept, storage="factored", bytes_per_parameter=2)
    assert isinstance(counted, ModelAccount)
    assert math.isclose(counted.keep_ratio, 1400 / counted.compressible_dense, rel_tol=1e-15)
    outside = counted.model_dense - counted.compressible_dense
    assert counted.model == outside + 1400
    assert counted.bytes == 2 * counted.model
    assert len(kept) == 14
    assert not any(re.search("head|embed", name) for name in kept)
