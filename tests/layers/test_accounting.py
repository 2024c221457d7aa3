"""The accountant says what counting the tensors of the real modules says."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lrbo.config.choices import ITEMSIZES
from lrbo.layers.forms import FORMS
from lrbo.layers.modules import PRODUCTS, replace_module
from lrbo.layers.options import DENSE, Cost, ModelAccount, Option, account, as_stored, dense_cost
from lrbo.layers.tables import stored_modules
from lrbo.models.model_map import linear_weight, map_model
from lrbo.models.specs import ModelMap
from tests.support import reference
from tests.support.tiny import CASES, build, token_ids

# Everything is counted in integers: nothing here has a tolerance.

every_case = pytest.mark.parametrize("case", CASES)
# Each form alone, and all of them in one model.
every_mixture = pytest.mark.parametrize("forms", [*((name,) for name in PRODUCTS), tuple(PRODUCTS)])
both_biases = pytest.mark.parametrize("bias", [False, True])


def some_options(layers: ModelMap, forms: tuple[str, ...]) -> dict[str, Option]:
    """Give each unit another option: forms in turn, ranks from 0 up; every third stays dense."""
    return {
        unit.name: DENSE
        if i % 3 == 2
        else Option(forms[i % len(forms)], (i % min(unit.out_features, unit.in_features),))
        for i, unit in enumerate(layers.compressible)
    }


def put_in(
    model: PreTrainedModel, layers: ModelMap, options: Mapping[str, Option], *, adds_bias: bool
) -> dict[str, Cost]:
    """Replace units by real modules, and return what they are said to cost."""
    itemsize = model.dtype.itemsize
    for name, option in options.items():
        if option != DENSE:
            unit = layers.by_name[name]
            has_bias = unit.is_biased(adds_bias)
            (rank,) = option.level
            module = PRODUCTS[option.form].of_product(
                name,
                torch.eye(unit.out_features, rank, dtype=torch.float64),
                torch.ones(rank, unit.in_features, dtype=torch.float64),
                lambda _, dtype, n=unit.out_features, b=has_bias: (
                    torch.ones(n).to(dtype) if b else None
                ),
                linear_weight(model.get_submodule(name)).dtype,
            )
            for path, each in stored_modules(model, {name: module}).items():
                replace_module(model, path, each)
    return as_stored(layers, options, adds_bias, itemsize)[0]


def whole(model: PreTrainedModel) -> ModelMap:
    """Map a model with a budget that covers embedding and head too."""
    layers = map_model(model)
    return layers.covering(list(dict.fromkeys(spec.part for spec in layers.layers)))


def counted(model: PreTrainedModel, layers: ModelMap, costs: Mapping[str, Cost]) -> ModelAccount:
    return account(layers, Cost.total(costs.values()), itemsize=model.dtype.itemsize)


def bytes_of(module: nn.Module) -> int:
    """Count what is stored: parameters, and the indices that a form keeps; tied tensors once."""
    tensors = [*module.parameters()]
    tensors += [b for m in module.modules() if isinstance(m, tuple(PRODUCTS.values()))
                for b in m.buffers()]  # fmt: skip
    stored = {id(t): t.numel() * t.element_size() for t in tensors}
    return sum(stored.values())


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
@every_mixture
def test_parameters_and_bytes_are_the_count_of_the_modules(
    case: str, bias: bool, forms: tuple[str, ...]
) -> None:
    model = build(case)
    layers = whole(model)
    options = some_options(layers, forms)
    assert {option.level for option in options.values()} >= {(), (0,), (1,)}
    before = reference.count_parameters(model), bytes_of(model)
    dense = [reference.count_parameters(model.get_submodule(name)) for name in options]
    costs = put_in(model, layers, options, adds_bias=bias)
    result = counted(model, layers, costs)
    assert (result.model_dense.parameters, result.model_dense.bytes) == before
    assert result.model.parameters == reference.count_parameters(model)
    assert result.model.bytes == bytes_of(model)
    assert result.units_dense.parameters == sum(dense)
    for name, cost in costs.items():
        module = model.get_submodule(name)
        held = reference.count_parameters(module), bytes_of(module)
        assert (cost.parameters, cost.bytes) == held, name
    assert result.units == Cost.total(costs.values())


@every_case
@every_mixture
def test_macs_are_what_torch_multiplies(case: str, forms: tuple[str, ...]) -> None:
    model = build(case)
    layers = map_model(model)
    dense = macs_of_linear_layers(model)
    costs = put_in(model, layers, some_options(layers, forms), adds_bias=False)
    result = counted(model, layers, costs)
    assert result.model_dense.macs == dense
    assert result.model.macs == macs_of_linear_layers(model)


@pytest.mark.parametrize("dtype", ITEMSIZES)
def test_bytes_are_those_of_the_dtype(dtype: str) -> None:
    kind = getattr(torch, dtype)
    model = build("gpt2").to(kind)
    layers = map_model(model)
    costs = put_in(model, layers, some_options(layers, tuple(PRODUCTS)), adds_bias=True)
    result = counted(model, layers, costs)
    assert ITEMSIZES[dtype] == kind.itemsize
    assert result.model.bytes == bytes_of(model)
    assert result.model.bytes > kind.itemsize * result.model.parameters  # the indices


def test_a_tied_head_is_counted_once() -> None:
    tied, untied = (map_model(build(case)) for case in ("llama_tied", "llama_untied"))
    pair = tied.by_name["model.embed_tokens"]
    assert pair.tied_to == "lm_head"
    assert untied.parameters - tied.parameters == pair.parameters
    # The head costs the same multiplications either way.
    results = [account(layers, Cost(0, 0, 0), itemsize=2) for layers in (tied, untied)]
    assert results[0].model_dense.macs == results[1].model_dense.macs


@every_case
def test_nothing_changes_while_every_unit_is_dense(case: str) -> None:
    layers = map_model(build(case))
    options = dict.fromkeys((unit.name for unit in layers.compressible), DENSE)
    _, result = as_stored(layers, options, True, 2)
    assert result.units == result.units_dense == dense_cost(layers.compressible, 2)
    assert result.model == result.model_dense


def test_only_what_is_compressible_is_counted_as_units() -> None:
    layers = map_model(build("llama_untied"))
    assert len(layers.compressible) == 14
    units = Cost(1400, 3000, 900)
    result = account(layers, units, itemsize=2)
    assert result.units == units
    for measure in ("parameters", "bytes", "macs"):
        outside = result.model_dense.of(measure) - result.units_dense.of(measure)
        assert outside > 0
        assert result.model.of(measure) == outside + units.of(measure)
    assert result.model_dense.bytes == 2 * result.model_dense.parameters


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_a_pivoted_unit_holds_rank_squared_fewer_parameters(shape: tuple[int, int]) -> None:
    unit = map_model(build("gpt2")).compressible[0]
    unit = type(unit)("unit", "kind", 0, *shape, has_bias=False, site="unit")
    for rank in range(min(shape) + 1):
        factored, pivoted = (
            FORMS[form].cost(unit, (rank,), bias=False, itemsize=2)[0]
            for form in ("factored", "pivoted")
        )
        assert pivoted == factored - rank * rank <= unit.parameters
    assert pivoted == unit.parameters  # at full rank the pivoted form is the dense one
