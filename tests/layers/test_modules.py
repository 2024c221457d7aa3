"""The low-rank layers equal a dense product, and behave like any other module."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrbo.layers.low_rank import LowRankLinear, linear_of
from lrbo.layers.pivoted import GROWTH_BOUND, PivotedLinear
from tests.support import reference

TOLERANCE = {
    torch.float64: 1e-12,  # sums of ten products of numbers around 1
    torch.float32: 1e-5,  # the same in single precision
    torch.bfloat16: 0.1,  # three digits, rounded after each of the two products
    torch.float16: 0.02,  # eight times finer, of outputs up to 15
}

OUT, IN = 5, 7
both_biases = pytest.mark.parametrize("bias", [False, True])


def parts(rank: int, *, bias: bool, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(rank)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return draw(OUT, rank), draw(rank, IN), draw(OUT) if bias else None


@both_biases
@pytest.mark.parametrize("rank", [0, 1, 3, 5])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forward_is_the_dense_product(rank: int, bias: bool, dtype: torch.dtype) -> None:
    left, right, offset = parts(rank, bias=bias, dtype=dtype)
    layer = LowRankLinear(left, right, offset)
    x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(9)).to(dtype)
    weight = left.double() @ right.double()
    expected = x.double() @ weight.T + (0 if offset is None else offset.double())
    actual = layer(x)
    assert actual.dtype == dtype
    assert actual.shape == (2, 3, OUT)
    assert float((actual.double() - expected).abs().max()) <= TOLERANCE[dtype]


@both_biases
def test_rank_0_answers_its_bias(bias: bool) -> None:
    left, right, offset = parts(0, bias=bias)
    actual = LowRankLinear(left, right, offset)(torch.ones(4, IN, dtype=torch.float64))
    expected = torch.zeros(OUT, dtype=torch.float64) if offset is None else offset
    assert torch.equal(actual, expected.expand(4, OUT))


@both_biases
def test_tensors_are_wrapped_and_not_copied(bias: bool) -> None:
    left, right, offset = parts(3, bias=bias)
    layer = LowRankLinear(left[:, :2], right[:2], offset)
    assert layer.left.weight.data_ptr() == left.data_ptr()
    assert layer.right.weight.data_ptr() == right.data_ptr()
    if offset is not None:
        assert layer.left.bias.data_ptr() == offset.data_ptr()
    left[0, 0] = 123.0
    assert layer.left.weight[0, 0] == 123.0
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@both_biases
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_names_are_those_of_two_linear_layers_and_no_weight(rank: int, bias: bool) -> None:
    layer = LowRankLinear(*parts(rank, bias=bias))
    names = ["right.weight", "left.weight", "weight"] + (["left.bias"] if bias else [])
    assert sorted(layer.state_dict()) == sorted(names)
    assert layer.rank == rank


def test_dtype_and_device_move_as_in_any_module() -> None:
    layer = LowRankLinear(*parts(2, bias=True))
    for dtype, device in product((torch.float32, torch.bfloat16), ("cpu", "meta")):
        moved = nn.Sequential(LowRankLinear(*parts(2, bias=True)))
        moved = moved.to(dtype=dtype, device=device)
        assert {(p.dtype, p.device.type) for p in moved.parameters()} == {(dtype, device)}
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}


def test_gradients_reach_the_input() -> None:
    """Factors do not learn, but what lies before them may be asked for gradients."""
    left, right, offset = parts(2, bias=True)
    x = torch.randn(1, IN, dtype=torch.float64, requires_grad=True)
    LowRankLinear(left, right, offset)(x).sum().backward()
    assert x.grad is not None
    expected = (left @ right).sum(0)
    assert float((x.grad[0] - expected).abs().max()) <= TOLERANCE[torch.float64]


# --- pivoted -----------------------------------------------------------------------------------

# Shapes (out, in): wide, tall and square.
SHAPES = [(5, 7), (9, 4), (6, 6)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def pivoted(
    shape: tuple[int, int],
    rank: int,
    *,
    bias: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[PivotedLinear, Tensor, Tensor | None]:
    """Return a pivoted layer, and the weight and bias that it was made of."""
    generator = torch.Generator().manual_seed(rank)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    left, right = draw(shape[0], rank), draw(rank, shape[1])
    offset = draw(shape[0]).to(dtype) if bias else None
    layer = PivotedLinear.of_product("layer", left, right, lambda linear, dtype: offset, dtype)
    return layer, left @ right, offset


@both_biases
@every_shape
@pytest.mark.parametrize("rank", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_pivoted_layer_is_the_dense_product(
    shape: tuple[int, int], rank: int, bias: bool, dtype: torch.dtype
) -> None:
    layer, weight, offset = pivoted(shape, rank, bias=bias, dtype=dtype)
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(9)).to(dtype)
    expected = x.double() @ weight.T + (0 if offset is None else offset.double())
    actual = layer(x)
    assert actual.dtype == dtype
    assert actual.shape == (2, 3, shape[0])
    assert actual.is_contiguous()
    assert float((actual.double() - expected).abs().max()) <= TOLERANCE[dtype]
    assert float((layer.dense_weight() - weight).abs().max()) <= TOLERANCE[dtype]
    assert layer.growth <= GROWTH_BOUND + TOLERANCE[dtype]
    one = layer(x[0, 0])
    assert float((one - actual[0, 0]).abs().max()) <= TOLERANCE[dtype]


@both_biases
@every_shape
@pytest.mark.parametrize("rank", [0, 3])
def test_pointwise_answers_are_the_same_by_columns(
    shape: tuple[int, int], rank: int, bias: bool
) -> None:
    layer, _, _ = pivoted(shape, rank, bias=bias)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64)
    expected = layer(x)
    actual = layer.take_pointwise(True)(x)
    assert float((actual - expected).abs().max()) <= TOLERANCE[torch.float64]
    assert actual.view(6, shape[0]).T.is_contiguous()
    assert torch.equal(layer(x[:0]), expected[:0])
    by_columns = x.view(6, -1).T.contiguous().T.view(2, 3, -1)  # as a pointwise layer answers
    assert float((layer(by_columns) - expected).abs().max()) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("pointwise", [False, True])
def test_the_matrices_of_a_pivoted_layer_may_be_adapted(pointwise: bool) -> None:
    """What adapters and hooks put in their places need not answer by columns."""
    layer, _, _ = pivoted((5, 7), 3, bias=True)
    layer.take_pointwise(pointwise)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    expected = layer(x)
    for name in ("rows", "coefficients"):
        plain = linear_of(layer.get_submodule(name).get_parameter("weight"), None)
        setattr(layer, name, plain)
        assert float((layer(x) - expected).abs().max()) <= TOLERANCE[torch.float64]


class Quantized(Tensor):
    """A weight that takes part in products as quantized ones do: as a layer's weight alone."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(args[0], Quantized):
            pytest.fail("a quantized weight was the input of a product")
        with torch._C.DisableTorchFunctionSubclass():  # what comes out is no weight
            return func(*args, **kwargs or {})


def test_the_matrices_of_a_pivoted_layer_may_be_quantized() -> None:
    layer, weight, _ = pivoted((5, 7), 3, bias=False)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    for part in (layer.rows, layer.coefficients):
        quantized = part.weight.detach().as_subclass(Quantized)
        part.weight = nn.Parameter(quantized, requires_grad=False)
    for pointwise in (False, True):
        actual = layer.take_pointwise(pointwise)(x)
        assert float((actual - x @ weight.T).abs().max()) <= TOLERANCE[torch.float64]


@both_biases
@every_shape
def test_a_pivoted_layer_holds_rank_squared_fewer_parameters(
    shape: tuple[int, int], bias: bool
) -> None:
    for rank in range(min(shape) + 1):
        layer, _, _ = pivoted(shape, rank, bias=bias)
        parameters = rank * sum(shape) - rank * rank + (shape[0] if bias else 0)
        assert reference.count_parameters(layer) == parameters
        assert layer.rank == rank
        names = ["coefficients.weight", "index", "rows.weight", "weight"]
        names += ["bias"] if bias else []
        assert sorted(layer.state_dict()) == sorted(names)
        assert layer.index.dtype == torch.int32
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_another_dtype_leaves_the_order_of_a_pivoted_layer_alone() -> None:
    layer, _, _ = pivoted((5, 7), 2, bias=True)
    places = layer.index.clone()
    moved = nn.Sequential(layer).to(torch.bfloat16)[0]
    assert {parameter.dtype for parameter in moved.parameters()} == {torch.bfloat16}
    assert torch.equal(moved.index, places)
    assert moved.index.dtype == torch.int32


@both_biases
def test_gradients_pass_through_a_pivoted_layer(bias: bool) -> None:
    layer, weight, _ = pivoted((5, 7), 3, bias=bias)
    x = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert float((x.grad[0] - weight.sum(0)).abs().max()) <= TOLERANCE[torch.float64]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_pivoted_layer_runs_on_a_gpu(dtype: torch.dtype) -> None:
    layer, weight, offset = pivoted((9, 4), 3, bias=True, dtype=dtype)
    assert offset is not None
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(9)).to(dtype)
    expected = x.double() @ weight.T + offset.double()
    actual = layer.to("cuda")(x.to("cuda")).cpu()
    assert float((actual.double() - expected).abs().max()) <= TOLERANCE[dtype]
