"""Compressing equals multiplying the truncated factors out; afterwards every module is back."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import compressed, on_device, store_
from lrbo.factorization.base import factor_layer
from lrbo.factorization.factors import LowRankFactors, is_dearer
from lrbo.factorization.registry import method_named
from lrbo.layers.low_rank import LowRankLinear
from lrbo.layers.modules import PRODUCTS, replace_module
from lrbo.layers.options import DENSE, Budget, Option
from lrbo.models.model_map import linear_bias, linear_weight, map_model
from tests.support.forms import form_of
from tests.support.tiny import CASES, build, token_ids

TOLERANCE = {
    "logits": 1e-9,  # float64, two blocks deep, relative to the largest logit
    "float32": 1e-4,  # the same in single precision
}

every_case = pytest.mark.parametrize("case", CASES)
FORMS = tuple(PRODUCTS)


def factors_of(model: PreTrainedModel, *, shift: bool = False) -> dict[str, LowRankFactors]:
    """Factor every layer by plain SVD; with ``shift`` give each a bias that moves with the rank."""
    factors = {}
    generator = torch.Generator().manual_seed(0)
    for spec in map_model(model).compressible:
        module = model.get_submodule(spec.name)
        own = factor_layer(method_named("svd"), linear_weight(module), linear_bias(module), {})
        if shift:
            offset = torch.randn(spec.out_features, generator=generator, dtype=torch.float64)
            center = torch.randn(own.right.shape[1], generator=generator, dtype=torch.float64)
            own = LowRankFactors(own.left, own.right, own.tail, offset, center)
        factors[spec.name] = own.to(dtype=model.dtype)
    return factors


def deciding(options: dict[str, Option]) -> Allocation:
    """Return an allocation of which nobody asks what it costs."""
    return Allocation(options, {}, Budget("parameters", 0))


def of_ranks(ranks: dict[str, int | None]) -> Allocation:
    """Give each unit a rank, in all forms by turns; ``None`` is dense."""
    return deciding(
        {
            name: DENSE if rank is None else Option(FORMS[i % len(FORMS)], (rank,))
            for i, (name, rank) in enumerate(ranks.items())
        }
    )


def allocation_of(factors: dict[str, LowRankFactors]) -> Allocation:
    """Give each unit another rank, from 0 up; every fourth stays dense."""
    names = list(factors)
    return of_ranks(
        {name: None if i % 4 == 3 else i % factors[name].max_rank for i, name in enumerate(names)}
    )


def multiplied_out(
    model: PreTrainedModel, factors: dict[str, LowRankFactors], allocation: Allocation
) -> PreTrainedModel:
    """Write each truncated product into the dense weight."""
    for name, option in allocation.options.items():
        if option == DENSE:
            continue
        (rank,) = option.level
        own, module = factors[name], model.get_submodule(name)
        linear_weight(module).copy_(own.left[:, :rank] @ own.right[:rank])
        bias = own.bias_at(rank)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(token_ids(2, 7)).logits


def state(model: nn.Module) -> dict[str, object]:
    """Return every module and the place of every parameter in memory."""
    modules = dict(model.named_modules())
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    return {"modules": modules, "addresses": addresses, "training": model.training}


@every_case
@pytest.mark.parametrize("shift", [False, True])
def test_compressed_is_the_model_with_the_products_written_in(case: str, shift: bool) -> None:
    model = build(case).double()
    dense = logits(model)
    factors = factors_of(model, shift=shift)
    allocation = allocation_of(factors)
    with compressed(model, allocation, factors) as compressed_model:
        actual = logits(compressed_model)
    expected = logits(multiplied_out(model, factors, allocation))
    unit = float(expected.abs().max())
    assert float((actual - expected).abs().max()) <= TOLERANCE["logits"] * unit
    assert float((actual - dense).abs().max()) > 1e-3 * unit, "the case must change something"


@every_case
def test_at_full_rank_the_model_says_what_it_said(case: str) -> None:
    model = build(case).double()
    dense = logits(model)
    factors = factors_of(model)
    full = of_ranks({name: f.max_rank for name, f in factors.items()})
    with compressed(model, full, factors):
        actual = logits(model)
    unit = float(dense.abs().max())
    assert float((actual - dense).abs().max()) <= TOLERANCE["logits"] * unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_rounded_to_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    """From factors as precise as they are at hand, so that nothing is rounded twice."""
    model = build("llama_tied")
    factors = {n: f.to(dtype=torch.float64) for n, f in factors_of(model, shift=True).items()}
    model = model.to(dtype)
    allocation = allocation_of(factors)
    store_(model, allocation, factors)
    for name, option in allocation.options.items():
        if option != DENSE:
            stored = factors[name].stored(name, option, dtype).state_dict()
            held = model.get_submodule(name).state_dict()
            assert held.keys() == stored.keys()
            assert all(torch.equal(held[n], tensor) for n, tensor in stored.items())
            assert {t.dtype for t in held.values()} <= {dtype, torch.int32}


def test_leading_directions_are_moved_to_where_their_units_are() -> None:
    model = build("llama_tied").bfloat16()
    factors = factors_of(build("llama_tied"))
    first, second, third, *_ = factors
    one, other = Option("factored"), Option("pivoted")
    ranks = {first: {one: 3, other: 2}, second: {one: 0}, third: {other: 10**6}}
    moved = on_device(model, factors, {**ranks, "elsewhere": {one: 2}})
    assert set(moved) == {first, third}
    assert moved[first].max_rank == 3
    assert moved[third].max_rank == factors[third].max_rank
    assert {f.left.dtype for f in moved.values()} == {torch.bfloat16}


@every_case
def test_every_module_comes_back_and_nothing_was_copied(case: str) -> None:
    model = build(case)
    factors = factors_of(model)
    allocation = allocation_of(factors)
    before, outputs = state(model), logits(model)
    with compressed(model, allocation, factors) as compressed_model:
        assert compressed_model is model
        replaced = {n for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
        assert replaced == {name for name, option in allocation.options.items() if option != DENSE}
        for name in replaced:
            module = model.get_submodule(name)
            if module.rank:
                assert module.left.weight.data_ptr() == factors[name].left.data_ptr()
                assert module.right.weight.data_ptr() == factors[name].right.data_ptr()
    assert state(model) == before
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_every_module_comes_back_after_an_error_inside(error: type[BaseException]) -> None:
    model = build("gpt2")
    factors = factors_of(model)
    before = state(model)

    def fail_inside() -> None:
        with compressed(model, allocation_of(factors), factors):
            raise error("inside")

    with pytest.raises(error, match="inside"):
        fail_inside()
    assert state(model) == before


def test_one_allocation_after_another_leaves_no_trace() -> None:
    model = build("llama_tied").double()
    factors = factors_of(model)
    before = state(model)
    outputs = []
    for rank in (2, 5, 2):
        with compressed(model, of_ranks(dict.fromkeys(factors, rank)), factors):
            outputs.append(logits(model))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    assert state(model) == before


def test_compressing_for_good_stays_and_gives_the_dense_modules_back() -> None:
    model = build("gpt2").double()
    factors = factors_of(model)
    allocation = allocation_of(factors)
    before, reported = state(model)["modules"], list[str]()
    with compressed(model, allocation, factors):
        expected = logits(model)
    dense = store_(model, allocation, factors, on_unit=reported.append)
    unit = float(expected.abs().max())
    assert float((logits(model) - expected).abs().max()) <= TOLERANCE["logits"] * unit
    options = {n: option for n, option in allocation.options.items() if option != DENSE}
    assert list(dense) == reported == list(options)
    assert all(module is before[name] for name, module in dense.items())
    assert {n: form_of(model.get_submodule(n)) for n in dense} == {
        name: option.form for name, option in options.items()
    }
    held = {id(module) for module in model.modules()}
    assert not any(id(module) in held for module in dense.values())


def test_the_mode_of_the_model_is_kept() -> None:
    model = build("llama_untied")
    factors = factors_of(model)
    for training in (True, False):
        model.train(training)
        with compressed(model, allocation_of(factors), factors):
            assert {module.training for module in model.modules()} == {training}
        assert {module.training for module in model.modules()} == {training}


# --- refusals leave the model as it was --------------------------------------------------------


def test_a_unit_that_is_not_prepared_is_refused_by_name() -> None:
    model = build("llama_tied")
    factors = factors_of(model)
    before = state(model)
    *others, missing = factors
    some = {name: factors[name] for name in others}
    allocation = of_ranks(dict.fromkeys(factors, 1))
    message = rf"1 units are not dense and were not prepared, the first is {missing}"
    with pytest.raises(KeyError, match=message):
        store_(model, allocation, some)
    with pytest.raises(KeyError, match=message), compressed(model, allocation, some):
        pytest.fail("a unit is not prepared")
    assert state(model) == before
    # A dense unit needs none.
    store_(model, of_ranks({**dict.fromkeys(others, 1), missing: None}), some)


def test_a_rank_that_the_factors_do_not_have_is_refused() -> None:
    model = build("llama_tied")
    factors = factors_of(model)
    before = state(model)
    allocation = of_ranks({**dict.fromkeys(factors, 1), list(factors)[-1]: 99})
    with pytest.raises(ValueError, match="rank 99 is outside"):
        store_(model, allocation, factors)
    with pytest.raises(ValueError, match="rank 99"), compressed(model, allocation, factors):
        pytest.fail("the factors lack this rank")
    assert state(model) == before


def test_a_unit_that_the_model_does_not_have_is_refused() -> None:
    model = build("llama_tied")
    factors = factors_of(model)
    before = state(model)
    factors["model.layers.7.mlp.up_proj"] = next(iter(factors.values()))
    allocation = of_ranks(dict.fromkeys(factors, 1))
    with pytest.raises(AttributeError, match="7"):
        store_(model, allocation, factors)
    assert state(model) == before
    with (
        pytest.raises(AttributeError, match="7"),
        compressed(model, allocation, factors),
    ):
        pytest.fail("the model lacks this layer")
    assert state(model) == before


def test_replacing_a_module_returns_what_was_there() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4)))
    inner, new = model[1][0], nn.Identity()
    assert replace_module(model, "1.0", new) is inner
    assert model[1][0] is new
    outer, other = model[0], nn.Identity()
    assert replace_module(model, "0", other) is outer  # a child of the model itself
    assert model[0] is other


# --- prefixes that are multiplied out ------------------------------------------------------------


def high_ranks(factors: dict[str, LowRankFactors]) -> Allocation:
    """Give each layer a rank at which two thin products cost more; every fourth stays dense."""
    names = list(factors)
    ranks = {name: None if i % 4 == 3 else factors[name].max_rank - 1 - i % 2
             for i, name in enumerate(names)}  # fmt: skip
    return of_ranks(ranks)


def lower(allocation: Allocation) -> Allocation:
    """Return an allocation of one rank less."""
    options = allocation.options.items()
    return deciding(
        {name: o if o == DENSE else Option(o.form, (o.level[0] - 1,)) for name, o in options}
    )


@every_case
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_multiplied_out_prefixes_say_what_two_products_say(
    case: str, shift: bool, dtype: torch.dtype
) -> None:
    model = build(case).to(dtype)
    factors = factors_of(model, shift=shift)
    allocation = high_ranks(factors)
    with compressed(model, allocation, factors):
        expected = logits(model)
    before, bits = state(model), {n: p.clone() for n, p in model.named_parameters()}
    with compressed(model, allocation, factors, tokens=10**6):
        kinds = {type(model.get_submodule(n)) for n in allocation.compressed}
        assert kinds == {nn.Linear}
        actual = logits(model)
    unit = float(expected.abs().max())
    tolerance = TOLERANCE["logits" if dtype == torch.float64 else "float32"]
    assert float((actual - expected).abs().max()) <= tolerance * unit
    assert state(model) == before
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


def test_a_product_is_made_only_where_it_saves_operations() -> None:
    model = build("llama_tied").double()
    factors = factors_of(model)
    names = list(factors)
    ranks = {name: 1 + i % factors[name].max_rank for i, name in enumerate(names)}
    for tokens in (0, 3, 40, 10**6):
        dearer = {}
        for name, rank in ranks.items():
            shape = len(factors[name].left), factors[name].right.shape[1]
            dearer[name] = is_dearer(rank, *shape, tokens)
        with compressed(model, of_ranks(ranks), factors, tokens=tokens):
            for name in names:
                kind = nn.Linear if dearer[name] else LowRankLinear
                assert type(model.get_submodule(name)) is kind
        assert any(dearer.values()) == (tokens >= 40)
        assert not all(dearer.values())


@pytest.mark.parametrize(
    ("rank", "tokens", "dearer"),
    [
        (5, 10**9, False),  # 5 * 20 = 10 * 10: as many operations for ever
        (6, 10**9, True),
        (6, 30, False),  # 30 * 6 * 20 = 3600 = (30 + 6) * 100
        (6, 31, True),
        (10, 0, False),
    ],
)
def test_operations_are_counted_with_those_of_making_the_product(
    rank: int, tokens: int, dearer: bool
) -> None:
    assert is_dearer(rank, 10, 10, tokens) == dearer


def test_products_are_written_into_the_same_memory_trial_after_trial() -> None:
    model = build("gpt2")
    factors = factors_of(model)
    allocation, buffers = high_ranks(factors), {}
    addresses, outputs = [], []
    for decided in (allocation, lower(allocation), allocation):
        with compressed(model, decided, factors, tokens=10**6, buffers=buffers):
            used = {n: model.get_submodule(n).weight.data_ptr() for n in decided.compressed}
            outputs.append(logits(model))
        addresses.append({name: buffer.data_ptr() for name, buffer in buffers.items()})
        assert used == addresses[-1]
    assert addresses[0] == addresses[1] == addresses[2]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    dense = {parameter.data_ptr() for parameter in model.parameters()}
    assert not dense & set(addresses[0].values())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_dense_layers_come_back_from_products_after_an_error(error: type[BaseException]) -> None:
    model = build("gpt2")
    factors = factors_of(model)
    before = state(model)

    def fail_inside() -> None:
        with compressed(model, high_ranks(factors), factors, tokens=10**6):
            raise error("inside")

    with pytest.raises(error, match="inside"):
        fail_inside()
    assert state(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(96, 256, generator=generator).to(dtype)
    right = torch.randn(256, 80, generator=generator).to(dtype)
    center = torch.randn(80, generator=generator) + 4
    offset = torch.randn(96, generator=generator)
    factors = LowRankFactors(left, right, torch.zeros(257), offset, center)
    buffer = torch.empty(96, 80, dtype=dtype)
    option, buffers = Option("pivoted", (200,)), {"unit": buffer}
    layer = factors.trial_module("unit", option, 10**6, buffers)
    assert layer.weight.data_ptr() == buffer.data_ptr()
    exact = left[:, :200].double() @ right[:200].double()
    # Adding up in half precision would lose ten times as much.
    slack = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5 * 200
    assert bool(((layer.weight.double() - exact).abs() <= slack).all())
    answered = layer.weight.double() @ center.double() + layer.bias.double()
    unit = float(layer.bias.abs().max())
    assert float((answered - offset).abs().max()) <= torch.finfo(dtype).eps * unit
