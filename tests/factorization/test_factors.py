"""Factored once: every rank is a prefix of the same memory, with the bias that belongs to it."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrbo.factorization.factors import LowRankFactors
from lrbo.layers.forms import FORMS
from lrbo.layers.modules import PRODUCTS
from lrbo.layers.options import Option, Section
from lrbo.models.specs import LayerSpec
from tests.support import reference
from tests.support.forms import form_of

TOLERANCE = {
    "map": 1e-12,  # sums of a few products of numbers around 1, float64
    "float32": 1e-5,  # the same after rounding to single precision
}

OUT, IN, COUNT = 6, 8, 5
BIASES = ("none", "fixed", "with rank")

every_bias = pytest.mark.parametrize("bias", BIASES)
every_form = pytest.mark.parametrize("form", PRODUCTS)


def make(bias: str, seed: int = 0) -> LowRankFactors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    tail = draw(COUNT + 1).abs().sort(descending=True).values
    return LowRankFactors(
        draw(OUT, COUNT),
        draw(COUNT, IN),
        tail,
        None if bias == "none" else draw(OUT),
        draw(IN) if bias == "with rank" else None,
        3 * tail,
        0.5 * tail,
    )


def by_loops(factors: LowRankFactors, rank: int) -> tuple[Tensor, Tensor]:
    """Add up one direction after the other, as the definition says."""
    weight = torch.zeros(OUT, IN, dtype=torch.float64)
    bias = torch.zeros(OUT, dtype=torch.float64) if factors.offset is None else factors.offset
    for i in range(rank):
        weight = weight + torch.outer(factors.left[:, i], factors.right[i])
        if factors.center is not None:
            bias = bias - factors.left[:, i] * (factors.right[i] @ factors.center)
    return weight, bias


@every_bias
def test_each_rank_is_the_sum_of_its_leading_directions(bias: str) -> None:
    factors = make(bias)
    x = torch.randn(4, IN, dtype=torch.float64)
    assert factors.max_rank == COUNT
    for rank in range(COUNT + 1):
        weight, offset = by_loops(factors, rank)
        layer = factors.at_rank(rank)
        assert layer.rank == rank
        assert float((layer(x) - (x @ weight.T + offset)).abs().max()) <= TOLERANCE["map"]
        assert (layer.left.bias is None) == (bias == "none")


@every_bias
def test_the_matrices_of_every_rank_are_the_same_memory(bias: str) -> None:
    factors = make(bias)
    for rank in range(1, COUNT + 1):
        layer = factors.at_rank(rank)
        assert layer.left.weight.data_ptr() == factors.left.data_ptr()
        assert layer.right.weight.data_ptr() == factors.right.data_ptr()


def test_a_bias_that_moves_with_the_rank_leaves_the_offset_as_it_was() -> None:
    factors = make("with rank")
    assert factors.offset is not None
    before = factors.offset.clone()
    layers = [factors.at_rank(rank) for rank in range(COUNT + 1)]
    assert torch.equal(factors.offset, before)
    assert torch.equal(layers[0].left.bias, before)
    assert not torch.equal(layers[1].left.bias, layers[2].left.bias)


def stored(factors: LowRankFactors, option: Option) -> nn.Module:
    return factors.stored("layer", option, torch.float32)


OPERATIONS: list[Callable[[LowRankFactors, Option], nn.Module]] = [
    lambda factors, option: factors.at_rank(*option.level),
    lambda factors, option: factors.trial_module("layer", option, 0, {}),
    lambda factors, option: factors.trial_module("layer", option, 10**6, {}),
    lambda factors, option: factors.stand_in("layer", option),
    stored,
]


@every_form
@pytest.mark.parametrize("rank", [-1, COUNT + 1, 99])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_rank_that_no_prefix_has_is_refused(
    operation: Callable[[LowRankFactors, Option], nn.Module], rank: int, form: str
) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is outside 0\.\.{COUNT}"):
        operation(make("fixed"), Option(form, (rank,)))


@pytest.mark.parametrize("multiple", [1, 2])
def test_losses_are_those_of_the_levels_as_far_as_there_are_factors(multiple: int) -> None:
    factors = make("none")
    assert factors.loss is not None
    ranks = np.arange(multiple, 3 * COUNT, multiple)
    sections = [
        Section(form, levels, np.zeros((len(ranks), 3), dtype=np.int64))
        for form, levels in (
            ("factored", ranks[:, None]),
            ("int4", np.column_stack([np.full_like(ranks, 64), ranks])),
        )
    ]
    for section in sections:
        losses = factors.losses(section)
        assert losses is not None
        assert losses.dtype == np.float64
        assert losses.tolist() == factors.loss[multiple : COUNT + 1 : multiple].tolist()
        assert dataclasses.replace(factors, loss=None).losses(section) is None


@every_bias
@pytest.mark.parametrize("limit", [None, 0, 2, COUNT, COUNT + 3])
def test_a_copy_for_running_has_the_leading_directions_in_the_new_dtype(
    bias: str, limit: int | None
) -> None:
    factors = make(bias)
    copy = factors.to(dtype=torch.float32, device=torch.device("cpu"), max_rank=limit)
    assert copy.max_rank == (COUNT if limit is None else min(limit, COUNT))
    x = torch.randn(3, IN, dtype=torch.float64)
    for rank in range(copy.max_rank + 1):
        layer, exact = copy.at_rank(rank), factors.at_rank(rank)
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
        difference = float((layer(x.float()).double() - exact(x)).abs().max())
        assert difference <= TOLERANCE["float32"]
    assert torch.equal(copy.tail, factors.tail[: copy.max_rank + 1])  # in float64
    assert copy.loss is not None
    assert copy.loss.dtype == torch.float64
    assert torch.equal(copy.loss, 3 * copy.tail)
    lossless = dataclasses.replace(factors, loss=None)
    cpu = torch.device("cpu")
    assert lossless.to(dtype=torch.float32, device=cpu, max_rank=limit).loss is None


@every_bias
def test_a_copy_for_running_keeps_each_prefix_contiguous(bias: str) -> None:
    copy = make(bias).to(dtype=torch.float32, device=torch.device("cpu"))
    for rank in range(1, COUNT + 1):
        assert copy.left[:, :rank].T.is_contiguous()
        assert copy.right[:rank].is_contiguous()


def test_a_copy_of_the_same_dtype_keeps_the_elements() -> None:
    factors = make("with rank")
    copy = factors.to(dtype=factors.left.dtype, device=factors.left.device)
    for field in dataclasses.fields(LowRankFactors):
        assert torch.equal(getattr(copy, field.name), getattr(factors, field.name)), field.name


def test_low_rank_factors_give_modules_and_are_frozen() -> None:
    factors = make("fixed")
    assert isinstance(factors.at_rank(1), nn.Module)
    with pytest.raises(dataclasses.FrozenInstanceError):
        factors.left = factors.right  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_any_dtype_the_center_is_answered_with_the_offset(dtype: torch.dtype) -> None:
    """Rounded factors miss their outputs; the bias makes up for it where most tokens are."""
    factors = make("with rank")
    # As in real layers: the outputs lie far from 0, the bias is a small difference.
    factors = dataclasses.replace(factors, center=100 * factors.center)
    exact = factors.offset
    factors = dataclasses.replace(
        factors, offset=exact + factors.left @ (factors.right @ factors.center)
    )
    copy = factors.to(dtype=dtype)
    for rank in range(COUNT + 1):
        layer = copy.at_rank(rank)
        assert layer.left.bias.dtype == dtype
        product = layer.left.weight.double() @ (layer.right.weight.double() @ factors.center)
        answer = product + layer.left.bias.double()
        size = float(layer.left.bias.double().abs().max())
        # One rounding of the bias is all that is left, and float32's of the sums.
        limit = torch.finfo(dtype).eps * size + TOLERANCE["float32"] * float(product.abs().max())
        assert float((answer - factors.offset).abs().max()) <= limit


# --- the forms -----------------------------------------------------------------------------------


@every_form
@every_bias
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_form_stores_the_same_layers_at_what_they_cost(
    bias: str, form: str, dtype: torch.dtype
) -> None:
    factors = make(bias)
    unit = LayerSpec("layer", "kind", 0, OUT, IN, bias != "none", site="layer")
    x = torch.randn(4, IN, dtype=torch.float64)
    tolerance = 10 * TOLERANCE["map" if dtype == torch.float64 else "float32"]
    for rank in range(COUNT + 1):
        weight, offset = by_loops(factors, rank)
        option = Option(form, (rank,))
        layer = factors.stored("layer", option, dtype)
        assert form_of(layer) == form
        assert layer.rank == rank
        assert (layer.bias is None) == (bias == "none")
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        outputs = layer(x.to(dtype)).double()
        assert float((outputs - (x @ weight.T + offset)).abs().max()) <= tolerance
        trial_layer = factors.trial_module("layer", option, 0, {})
        difference = outputs - trial_layer(x)
        assert float(difference.abs().max()) <= tolerance
        parameters, *_ = FORMS[form].cost(unit, (rank,), bias=bias != "none", itemsize=4)
        assert parameters == reference.count_parameters(layer)
        assert parameters == reference.count_parameters(factors.stand_in("layer", option))


@every_form
def test_the_bias_of_a_stored_layer_mends_its_rounded_weights_at_the_center(form: str) -> None:
    """Else the error of rounding is the same for every token."""
    factors = make("with rank")
    assert factors.offset is not None
    assert factors.center is not None
    far = dataclasses.replace(factors, center=50 * factors.center)  # a mean as large as in models
    assert far.center is not None
    layer = far.stored("layer", Option(form, (4,)), torch.bfloat16)
    assert layer.bias is not None
    mended = factors.offset - layer.dense_weight() @ far.center
    slack = 2**-8 * mended.abs() + 1e-4
    assert bool(((layer.bias.double() - mended).abs() <= slack).all())
    of_exact_weights = factors.offset - by_loops(far, 4)[0] @ far.center
    assert not torch.equal(of_exact_weights.bfloat16(), layer.bias)


def test_a_warning_of_pivoting_names_layer_and_rank() -> None:
    factors = make("none")
    factors.left[:, 2] = 0.0
    with pytest.warns(UserWarning, match=r"layers\.3\.up_proj at rank 4: 1 of 4 columns"):
        factors.stored("layers.3.up_proj", Option("pivoted", (4,)), torch.float32)


# --- tensors of the cache ------------------------------------------------------------------------


@every_bias
def test_what_is_kept_are_contiguous_prefixes_and_comes_back(bias: str) -> None:
    factors = make(bias)
    tensors = factors.tensors()
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert tensors["left"].shape == (COUNT, OUT)
    restored = LowRankFactors.of_tensors(tensors)
    for field in dataclasses.fields(LowRankFactors):
        one, other = getattr(restored, field.name), getattr(factors, field.name)
        assert (one is None) == (other is None) == (field.name not in tensors)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("part", ["right", "tail", "offset", "center", "loss"])
def test_tensors_of_shapes_that_do_not_fit_are_refused(part: str) -> None:
    tensors = make("with rank").tensors()
    tensors[part] = tensors[part][1:]
    with pytest.raises(ValueError, match=rf"{part} has shape \(.*\), expected \("):
        LowRankFactors.of_tensors(tensors)
