"""Trainable layers have the function of the stored ones, pass gradients, and go back as stored."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.errors import ModelError, StatisticsError
from lrbo.layers.based import BasedLinear
from lrbo.layers.form import Form
from lrbo.layers.forms import FORMS, Delta
from lrbo.layers.joint_form import SharedFactored
from lrbo.layers.low_rank import LowRankLinear
from lrbo.layers.modules import replace_modules
from lrbo.layers.pivoted import GROWTH_BOUND, PivotedLinear
from lrbo.pipeline.in_memory import calibrate, factorize
from lrbo.recovery.trainable import Trainables, make_trainable, matrix_shapes
from tests.support.form_modules import (
    both_biases,
    every_module,
    inputs_of,
    levels_of,
    module_of,
    unit_of,
)
from tests.support.tiny import build, token_ids

ALL = ("blocks", "embedding")
SHAPE = (16, 32)
INTEGER_TENSORS = ("packed", "zero", "positions", "mask", "rows")


class Holder(nn.Module):
    """A model of one layer, with a norm."""

    def __init__(self, layer: nn.Module, inputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.unit = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.norm(x))


def some_levels(form: Form) -> list[tuple[int, ...]]:
    """Return levels near both ends."""
    levels = levels_of(form, unit_of(SHAPE))
    return [*dict.fromkeys((levels[0], levels[-1]))]


def held(form: Form, level: tuple[int, ...], *, bias: bool, dtype: torch.dtype) -> Holder:
    layer = module_of(form, SHAPE, level, bias=bias)
    model = Holder(layer, inputs_of(form, SHAPE, level)).to(dtype).requires_grad_(False)
    model.norm.bias += 0.5
    return model


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def change_(trainables: Trainables, scale: float = 0.01) -> None:
    with torch.no_grad():
        for index, (_, parameter) in enumerate(trainables.named_parameters()):
            parameter.add_(scale * draw(*parameter.shape, seed=index))


def layout(model: nn.Module) -> dict[str, object]:
    return {n: (t.shape, t.dtype, t.numel() * t.itemsize) for n, t in model.state_dict().items()}


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@every_module
@both_biases
@pytest.mark.parametrize("bases", [True, False])
def test_a_trainable_layer_has_the_function_of_the_stored_one_and_every_parameter_a_gradient(
    form: Form, bias: bool, bases: bool
) -> None:
    for level in some_levels(form):
        for tokens in (3, 300):  # where a product is cheaper, and where it is multiplied out
            model = held(form, level, bias=bias, dtype=torch.float32)
            x = draw(tokens, inputs_of(form, SHAPE, level))
            expected, before = model(x), copies(model)
            trainables = make_trainable(model, bases=bases)
            actual = model(x)
            assert actual.shape == expected.shape
            torch.testing.assert_close(
                actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
            )
            if actual.requires_grad:
                (actual * draw(*actual.shape, seed=1)).sum().backward()
            for name, parameter in trainables.named_parameters():
                assert parameter.dtype == torch.float32
                reached = form.name != "skip" or name.startswith("unit")
                assert (parameter.grad is not None) == reached, (name, level)
                if parameter.numel() and reached:
                    assert bool(parameter.grad.any()), (name, level)
            trainables.store_()
            after = model.state_dict()
            assert after.keys() == before.keys()
            for name, tensor in after.items():  # nothing was trained
                assert torch.equal(tensor, before[name]), (name, level)
                assert not tensor.requires_grad


@every_module
@both_biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_trained_is_stored_in_the_same_layout_with_the_same_integers(
    form: Form, bias: bool, dtype: torch.dtype
) -> None:
    for level in some_levels(form):
        model = held(form, level, bias=bias, dtype=dtype)
        before, was = layout(model), copies(model)
        x = draw(5, inputs_of(form, SHAPE, level)).to(dtype)
        trainables = make_trainable(model)
        change_(trainables)
        expected = model(x)
        assert expected.dtype == dtype
        trainables.store_()
        assert layout(model) == before
        bound = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(
            model(x), expected, rtol=bound, atol=bound * float(expected.detach().abs().max())
        )
        for name, tensor in model.state_dict().items():
            if name.rpartition(".")[2] in INTEGER_TENSORS:
                assert torch.equal(tensor, was[name])
            elif name == "norm.bias":  # beside a change of a base model it may be the base's
                assert torch.equal(tensor, was[name]) == isinstance(form, Delta)


@every_module
def test_the_shapes_of_matrices_are_known_before_they_are_trained(form: Form) -> None:
    for level in some_levels(form):
        model = held(form, level, bias=False, dtype=torch.float32)
        shapes = matrix_shapes(model)
        trainables = make_trainable(model)
        trained = dict(trainables.named_parameters())
        assert shapes == {name: tuple(trained[name].shape) for name in trainables.matrices}


def test_the_gradient_of_a_scale_is_that_of_the_weight_summed_over_its_group() -> None:
    """Against autograd through the dense weight, written out."""
    layer = module_of(FORMS["int4"], SHAPE, (16, 2), bias=False)
    assert isinstance(layer, BasedLinear)
    model, x = Holder(layer, SHAPE[1]), draw(7, SHAPE[1])
    base, scale = layer.base(torch.float32), layer.get_buffer("scale").clone()
    trainables = make_trainable(model)
    model.unit(x).square().sum().backward()
    gain = torch.zeros_like(scale, requires_grad=True)
    low_rank = layer.dense_weight(torch.float32) - base
    weight = (base.view(*scale.shape, -1) * (1 + gain)[:, :, None]).flatten(1) + low_rank
    (x @ weight.T).square().sum().backward()
    actual = dict(trainables.named_parameters())["unit.gain"].grad
    torch.testing.assert_close(
        actual, gain.grad, rtol=1e-4, atol=1e-4 * float(gain.grad.abs().max())
    )


@pytest.mark.parametrize("form", ["factored_int8", "factored_int4", "int4", "delta_bands"])
def test_rounding_is_seen_as_it_is_stored_and_passes_gradients_unchanged(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = levels_of(FORMS[form], unit_of(SHAPE))[-1]
    model = Holder(module_of(FORMS[form], SHAPE, level, bias=False), SHAPE[1])
    x, weight = draw(5, SHAPE[1]), draw(5, SHAPE[0], seed=3)
    trainables = make_trainable(model)
    change_(trainables, 0.03)
    unit = trainables.modules["unit"]
    rounded = unit(x)
    (gradient,) = torch.autograd.grad((rounded * weight).sum(), unit.left)
    with monkeypatch.context() as patch:
        patch.setattr(unit, "grids", ())
        exact = unit(x)
    assert not torch.allclose(rounded, exact, rtol=1e-4)
    # Of the left factor the gradient is what the right one, as it is rounded, lets pass.
    right = torch.linalg.lstsq(weight.T, gradient).solution
    trainables.store_()
    torch.testing.assert_close(model.unit(x), rounded, rtol=1e-4, atol=1e-4)
    assert right.shape == (5, level[-1])


def test_a_base_that_is_held_passes_gradients_after_it_was_first_used_without_any() -> None:
    model = held(FORMS["int4"], (16, 2), bias=False, dtype=torch.float32)
    trainables = make_trainable(model, bases=False)
    x = draw(5, SHAPE[1])
    with torch.inference_mode():
        expected = model(x)
    model(x).sum().backward()
    torch.testing.assert_close(model(x), expected)
    assert all(parameter.grad is not None for _, parameter in trainables.named_parameters())


def test_of_layers_that_share_a_factor_it_is_trained_once() -> None:
    form, generator = FORMS[SharedFactored.name], torch.Generator().manual_seed(0)
    first = module_of(form, SHAPE, (4,), bias=True)
    assert form.name == "shared_factored"
    other = type(first)(torch.randn(8, 4, generator=generator), None, None, SHAPE[1], "first")
    first.site = "first"
    model = nn.Module()
    model.add_module("first", first)
    model.add_module("other", other)
    replace_modules(model, {"first": first, "other": other})
    x, before = draw(3, SHAPE[1]), layout(model)
    expected = first(x), other(x), other(x + 1)
    trainables = make_trainable(model)
    names = [name for name, _ in trainables.named_parameters()]
    assert names == ["first.left", "first.right", "first.bias", "other.left"]
    actual = model.first(x), model.other(x), model.other(x + 1)
    torch.testing.assert_close(actual, expected)
    change_(trainables)
    expected = model.first(x), model.other(x)
    trainables.store_()
    assert layout(model) == before
    assert model.other.peers == (model.first,)
    torch.testing.assert_close((model.first(x), model.other(x)), expected)


def test_a_pivoted_layer_is_pivoted_again_by_its_conventions() -> None:
    layer = module_of(FORMS["pivoted"], SHAPE, (6,), bias=True)
    assert isinstance(layer, PivotedLinear)
    model = Holder(layer.take_pointwise(True), SHAPE[1])
    trainables = make_trainable(model)
    change_(trainables, 0.3)
    x = draw(5, SHAPE[1])
    expected = model(x)
    trainables.store_()
    assert model.unit is layer
    assert layer.pointwise
    assert layer.growth <= GROWTH_BOUND
    assert layer.index.dtype == torch.int32
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_state_comes_back_and_another_one_is_refused() -> None:
    model = held(FORMS["factored"], (4,), bias=True, dtype=torch.float32)
    trainables = make_trainable(model)
    state = trainables.state()
    assert list(state) == ["unit.left", "unit.right", "unit.bias", "norm.weight", "norm.bias"]
    assert trainables.names_of("unit") == list(state)[:3]
    change_(trainables)
    assert not torch.equal(trainables.state()["unit.left"], state["unit.left"])
    trainables.load_state(state)
    for name, tensor in trainables.state().items():
        assert torch.equal(tensor, state[name])
    with pytest.raises(ModelError, match=r"unit.right: shape \(2,\), expected shape \(4, 32\)"):
        trainables.load_state({"unit.left": state["unit.left"] + 1, "unit.right": torch.zeros(2)})
    assert torch.equal(trainables.state()["unit.left"], state["unit.left"])
    with pytest.raises(ModelError, match="nowhere: shape"):
        trainables.load_state({"nowhere": torch.zeros(2)})


def test_a_parameter_that_is_not_finite_is_refused_by_name() -> None:
    model = held(FORMS["pivoted"], (4,), bias=False, dtype=torch.float32)
    trainables = make_trainable(model)
    with torch.no_grad():
        trainables.modules["unit"].left[0, 0] = torch.nan
    with pytest.raises(StatisticsError, match=r"unit.left holds 1 non-finite"):
        trainables.store_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("form", "keep"), [("pivoted", 0.7), ("sparse_2_4", 0.58), ("factored_int8", 0.2)]
)
def test_a_whole_model_with_a_tied_table_is_trained_and_stored_again(
    form: str, keep: float, dtype: torch.dtype
) -> None:
    model = build("llama_tied").to(dtype)
    ids = token_ids(6, 16)
    calibration = calibrate(model, ids, include=ALL, progress=False)
    made = factorize(model, calibration, forms=[form], include=ALL, progress=False)
    allocation = made.uniform(keep, measure="bytes")
    made.compress_(model, allocation)
    expected, before, was = model(ids).logits, layout(model), copies(model)
    trainables = make_trainable(model)
    table = "model.embed_tokens"
    assert table in trainables.modules
    actual = model(ids).logits
    assert actual.dtype == dtype
    bound = 1e-3 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(
        actual, expected, rtol=bound, atol=bound * float(expected.abs().max())
    )
    actual.logsumexp(-1).sum().backward()
    for name, parameter in trainables.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
    trained = {name for name, _ in trainables.named_parameters()}
    assert "model.norm.weight" in trained
    block = trainables.names_of("model.layers.1")
    assert set(block) == {name for name in trained if name.startswith("model.layers.1.")}
    assert "model.layers.1.input_layernorm.weight" in block
    change_(trainables, 1e-2)
    changed = model(ids).logits
    trainables.store_()
    torch.testing.assert_close(
        model(ids).logits, changed, rtol=bound, atol=bound * float(changed.detach().abs().max())
    )
    assert layout(model) == before
    assert model.lm_head.tied == (model.model.embed_tokens,)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] in INTEGER_TENSORS:
            assert torch.equal(tensor, was[name])


def test_what_cannot_be_trained_is_named(family_model: Callable[[str], PreTrainedModel]) -> None:
    class Adapter(nn.Linear):
        """A factor with an adapter."""

    layer = module_of(FORMS["factored"], SHAPE, (4,), bias=False)
    assert isinstance(layer, LowRankLinear)
    layer.left = Adapter(4, 16)
    with pytest.raises(ModelError, match=r"1 layers cannot be trained: unit, a LowRankLinear"):
        make_trainable(Holder(layer, SHAPE[1]))
    with pytest.raises(ModelError, match="has no compressed layer"):
        make_trainable(family_model("llama_untied"))
