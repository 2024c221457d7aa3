"""Factored once: every rank is a prefix of the same memory, with the bias that belongs to it."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrbo.nested import LowRankFactors, NestedFactors, PivotedFactors

TOLERANCE = {
    "map": 1e-12,  # sums of a few products of numbers around 1, float64
    "float32": 1e-5,  # the same after rounding to single precision
}

OUT, IN, COUNT = 6, 8, 5
BIASES = ("none", "fixed", "with rank")

every_bias = pytest.mark.parametrize("bias", BIASES)


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


@pytest.mark.parametrize("rank", [-1, COUNT + 1, 99])
@pytest.mark.parametrize("question", [LowRankFactors.at_rank, LowRankFactors.error_at])
def test_a_rank_that_no_prefix_has_is_refused(
    question: Callable[[LowRankFactors, int], object], rank: int
) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is outside 0\.\.{COUNT}"):
        question(make("fixed"), rank)


def test_error_is_read_off_the_tail_as_a_plain_number() -> None:
    factors = make("none")
    errors = [factors.error_at(rank) for rank in range(COUNT + 1)]
    assert errors == factors.tail.tolist()
    assert all(type(error) is float for error in errors)


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
        assert copy.error_at(rank) == factors.error_at(rank)  # the tail stays in float64
    assert len(copy.tail) == copy.max_rank + 1
    assert copy.loss is not None
    assert copy.loss.dtype == torch.float64
    assert torch.equal(copy.loss, 3 * copy.tail)
    assert dataclasses.replace(factors, loss=None).to(max_rank=limit).loss is None


@every_bias
def test_a_copy_for_running_keeps_each_prefix_contiguous(bias: str) -> None:
    copy = make(bias).to(dtype=torch.float32)
    for rank in range(1, COUNT + 1):
        assert copy.left[:, :rank].T.is_contiguous()
        assert copy.right[:rank].is_contiguous()


def test_a_copy_without_a_dtype_keeps_the_numbers() -> None:
    factors = make("with rank")
    copy = factors.to()
    for field in dataclasses.fields(LowRankFactors):
        assert torch.equal(getattr(copy, field.name), getattr(factors, field.name)), field.name


def test_low_rank_factors_keep_the_protocol() -> None:
    factors = make("fixed")
    assert isinstance(factors, NestedFactors)
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


# --- pivoted -----------------------------------------------------------------------------------


@every_bias
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pivoted_factors_are_the_same_layers_in_fewer_numbers(
    bias: str, dtype: torch.dtype
) -> None:
    factors = make(bias)
    pivoted = PivotedFactors(factors, dtype)
    assert isinstance(pivoted, NestedFactors)
    assert pivoted.max_rank == COUNT
    x = torch.randn(4, IN, dtype=torch.float64)
    tolerance = TOLERANCE["map" if dtype == torch.float64 else "float32"]
    for rank in range(COUNT + 1):
        weight, offset = by_loops(factors, rank)
        layer = pivoted.at_rank(rank)
        assert layer.rank == rank
        assert (layer.bias is None) == (bias == "none")
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        found = layer(x.to(dtype)).double()
        assert float((found - (x @ weight.T + offset)).abs().max()) <= 10 * tolerance
        assert pivoted.error_at(rank) == factors.error_at(rank)


def test_the_bias_of_a_pivoted_layer_mends_its_rounded_weights_at_the_center() -> None:
    """As for factors: else the error of rounding is the same for every token."""
    factors = make("with rank")
    assert factors.offset is not None
    assert factors.center is not None
    far = dataclasses.replace(factors, center=50 * factors.center)  # a mean as large as in models
    assert far.center is not None
    layer = PivotedFactors(far, torch.bfloat16).at_rank(4)
    assert layer.bias is not None
    mended = factors.offset - layer.multiplied() @ far.center
    slack = 2**-8 * mended.abs() + 1e-4
    assert bool(((layer.bias.double() - mended).abs() <= slack).all())
    of_exact_weights = factors.offset - by_loops(far, 4)[0] @ far.center
    assert not torch.equal(of_exact_weights.bfloat16(), layer.bias)


def test_a_rank_that_pivoted_factors_do_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 6 is outside"):
        PivotedFactors(make("none"), torch.float32).at_rank(COUNT + 1)


def test_a_warning_of_pivoting_names_layer_and_rank() -> None:
    factors = make("none")
    factors.left[:, 2] = 0.0
    pivoted = PivotedFactors(factors, torch.float32, "layers.3.up_proj")
    with pytest.warns(UserWarning, match=r"layers\.3\.up_proj at rank 4: 1 of 4 columns"):
        pivoted.at_rank(4)
