"""The modules of every form multiply by what they store, and take stored weights back."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lrbo.factorization.bases import Base
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.prepared import BasedWeight
from lrbo.layers.form import Form
from lrbo.layers.forms import (
    FORMS,
    Based,
    Codebook,
    Delta,
    Quantized,
)
from lrbo.layers.joint_form import Joint
from lrbo.layers.low_rank import FormModule
from lrbo.layers.modules import PRODUCTS, low_rank_layers, thin_layers
from tests.support import reference
from tests.support.form_modules import (
    ALONE,
    TOKENS,
    TOLERANCE,
    base_of,
    both_biases,
    cases,
    empty_of,
    every_module,
    every_product,
    every_shape,
    factors,
    inputs_of,
    levels_of,
    module_of,
    unit_of,
)
from tests.support.forms import form_of


@every_module
@every_shape
@both_biases
def test_an_empty_module_takes_the_weights_of_a_stored_one(
    form: Form, shape: tuple[int, int], bias: bool
) -> None:
    before = torch.get_rng_state()
    for level in cases(form, shape, bias=bias):
        stored = module_of(form, shape, level, bias=bias)
        empty = empty_of(form, shape, level, bias=bias)
        held, expected = empty.state_dict(), stored.state_dict()
        assert all(tensor.is_meta for tensor in held.values())
        assert {n: t.shape for n, t in held.items()} == {n: t.shape for n, t in expected.items()}
        assert {n: t.dtype for n, t in held.items()} == {n: t.dtype for n, t in expected.items()}
        empty.load_state_dict(expected, strict=True, assign=True)
        inputs = inputs_of(form, shape, level)
        x = torch.randn(TOKENS, inputs, generator=torch.Generator().manual_seed(1))
        assert torch.equal(empty(x), stored(x))
        assert {**low_rank_layers(empty), **thin_layers(empty)} == {"": empty}
        if isinstance(stored, FormModule) and not isinstance(form, Joint):
            ids = torch.arange(shape[0]).flip(0).repeat(2, 1)
            rows = stored(ids)
            assert rows.shape == (2, shape[0], shape[1])
            weight = stored.dense_weight().flip(0)
            torch.testing.assert_close(rows[1].double(), weight, rtol=1e-5, atol=1e-5)
        assert form_of(empty) == form_of(stored) == form.name
        assert not any(parameter.requires_grad for parameter in empty.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@every_product
@every_shape
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_dense_weight_is_what_the_module_multiplies_by(
    form: Form, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for level in cases(form, shape, bias=False):
        left, right = factors(shape, level[0])
        kind = PRODUCTS[form.name]
        module = kind.of_product("unit", left, right, lambda linear, dtype: None, dtype)
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}
        weight, exact = module.dense_weight(), left @ right
        assert weight.dtype == torch.float64
        size = max(float(exact.abs().max()), 1.0)
        assert float((weight - exact).abs().max()) <= TOLERANCE[dtype] * size
        actual, _ = reference.affine_of(module, shape[1])
        assert float(np.abs(actual - weight.numpy()).max()) <= TOLERANCE[dtype] * size


@every_product
@every_shape
def test_of_full_rank_the_dense_weight_is_the_dense_weight(
    form: Form, shape: tuple[int, int]
) -> None:
    weight = factors(shape, shape[1])[0]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    module = PRODUCTS[form.name].of_product(
        "unit", u * s, vh, lambda linear, dtype: None, torch.float64
    )
    difference = (module.dense_weight() - weight).abs().max()
    assert float(difference) <= TOLERANCE[torch.float64] * float(weight.abs().max())


@every_product
@both_biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_is_made_for_the_module_as_it_is_rounded(
    form: Form, bias: bool, dtype: torch.dtype
) -> None:
    """In the dtype that it computes in, so that a bias may mend what rounding did."""
    shape, offset = (9, 5), torch.arange(9, dtype=torch.float64)
    left, right = factors(shape, 3)
    x = torch.arange(5, dtype=torch.float64)
    answers: list[Tensor] = []

    def bias_for(linear, wanted: torch.dtype) -> Tensor | None:
        assert wanted == dtype
        answers.append(linear(x))
        return offset.to(wanted) if bias else None

    module = PRODUCTS[form.name].of_product("unit", left, right, bias_for, dtype)
    (answer,) = answers
    assert answer.dtype == torch.float64
    difference = answer - module.dense_weight() @ x
    assert float(difference.abs().max()) <= TOLERANCE[torch.float64] * float(answer.abs().max())
    assert (module.bias is None) == (not bias)
    if bias:
        assert torch.equal(module.bias, offset.to(dtype))


@every_product
@both_biases
def test_a_stand_in_has_the_tensors_of_the_stored_module(form: Form, bias: bool) -> None:
    shape, level = (9, 5), (3,)
    left, right = (t.float() for t in factors(shape, 3))
    offset = torch.ones(9) if bias else None
    stand_in = PRODUCTS[form.name].stand_in("unit", left, right, offset)
    stored = module_of(form, shape, level, bias=bias)
    held, expected = stand_in.state_dict(), stored.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in held.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    assert stand_in(torch.ones(2, 5)).shape == (2, 9)


based = pytest.mark.parametrize(
    "form",
    [
        form
        for form in FORMS.values()
        if isinstance(form, Based) and not isinstance(form, Delta) and form.name not in ALONE
    ],
    ids=lambda form: form.name,
)


def entries(base: Base) -> np.ndarray:
    """Read a base entry by entry, from its tensors as they are described."""
    tensors = {name: tensor.numpy() for name, tensor in base.tensors.items()}
    rows, columns = base.shape
    weight = np.zeros(base.shape)
    form = base.form
    if isinstance(form, Quantized | Codebook):
        codes = reference.unpacked(tensors["packed"], form.bits)
        assert codes.shape == base.shape
    elif "mask" in tensors:
        codes = reference.unpacked(tensors["mask"], 1)
    elif "rows" in tensors:
        weight[tensors["rows"]] = tensors["values"]
        return weight
    else:
        codes = reference.unpacked(tensors["positions"], 2)
    for row in range(rows):
        taken = 0
        for column in range(columns):
            value = 0.0
            if isinstance(form, Quantized):
                group = column // base.level[0]
                middle = tensors["zero"][row, group] if "zero" in tensors else 2 ** (form.bits - 1)
                value = tensors["scale"][row, group] * (int(codes[row, column]) - int(middle))
            elif isinstance(form, Codebook):
                value = tensors["table"][row, codes[row, column]]
            elif "mask" in tensors:
                if codes[row, column]:
                    value = tensors["values"][row, taken]
                    taken += 1
            else:
                pair = 2 * (column // 4)
                positions = codes[row, pair : pair + 2].tolist()
                if column % 4 in positions:
                    value = tensors["values"][row, pair + positions.index(column % 4)]
            weight[row, column] = value
    return weight


@based
@both_biases
@pytest.mark.parametrize("rank", [0, 2])
def test_a_base_and_a_rank_are_what_their_module_multiplies_by(
    form: Based, bias: bool, rank: int
) -> None:
    shape = (17, 32)
    base = base_of(form, shape, levels_of(form, unit_of(shape))[0], torch.float64)
    left, right = factors(shape, rank)
    offset = torch.arange(17.0, dtype=torch.float64) if bias else None
    weight = BasedWeight(base, LowRankFactors(left, right, torch.zeros(rank + 1), offset))
    steps = left.abs().amax(0) / 127, right.abs().amax(1, keepdim=True) / 127
    rounded = [
        each if form.has_floats else (each / step).round() * step
        for each, step in zip((left, right), steps, strict=True)
    ]
    expected = entries(base) + (rounded[0] @ rounded[1]).numpy()
    actual, added = reference.affine_of(weight.module(rank), shape[1])
    limit = 1e-12 * np.abs(expected).max()
    assert np.abs(actual - expected).max() < limit
    assert np.abs(weight.module(rank).dense_weight().numpy() - expected).max() < limit
    assert np.allclose(added, 0.0 if offset is None else offset.numpy())


@based
def test_more_bytes_leave_less(form: Based) -> None:
    """Over the levels of a form, without a rank, and against the form of one bit more."""
    shape, unit = (17, 64), unit_of((17, 64))
    weight = factors(shape, 64)[0]

    def error(of: Based, level: tuple[int, ...]) -> float:
        rest = base_of(of, shape, level, torch.float64).weight(torch.float64) - weight
        return float(rest.square().sum())

    def size(level: tuple[int, ...]) -> int:
        return int(form.cost(unit, level, bias=False, itemsize=2)[1])

    bases = sorted((level for level in levels_of(form, unit) if level[-1] == 0), key=size)
    errors = [error(form, level) for level in bases]
    assert all(less > more for less, more in pairwise(errors))
    wider = {"int2": "int3", "int3": "int4", "int4": "int8", "lut3": "lut4"}.get(form.name)
    if wider is not None:
        other = FORMS[wider]
        assert isinstance(other, Based)
        assert error(other, bases[0]) < error(form, bases[0])


@both_biases
@pytest.mark.parametrize("rank", [0, 3])
def test_factors_in_8_bits_are_rounded_direction_by_direction(bias: bool, rank: int) -> None:
    form, shape = FORMS["factored_int8"], (9, 5)
    assert isinstance(form, Based)
    left, right = factors(shape, rank)
    offset = torch.arange(9.0, dtype=torch.float64) if bias else None
    base = base_of(form, shape, (rank,), torch.float64)
    weight = BasedWeight(base, LowRankFactors(left, right, torch.zeros(rank + 1), offset))
    expected = np.zeros(shape)
    for column, row in zip(left.T.numpy(), right.numpy(), strict=True):
        steps = np.abs(column).max() / 127, np.abs(row).max() / 127
        codes = np.rint(column / steps[0]), np.rint(row / steps[1])
        expected += steps[0] * steps[1] * np.outer(*codes)
    module = weight.module(rank)
    assert np.abs(module.dense_weight().numpy() - expected).max() < 1e-12
    x = factors((4, 5), 5)[0] @ factors((5, 5), 5)[1]
    added = 0.0 if offset is None else offset.numpy()
    actual = module(x).numpy()
    assert np.abs(actual - (x.numpy() @ expected.T + added)).max() < 1e-10
    if rank:
        limit = rank * float(left.abs().max() * right.abs().max()) / 100
        assert np.abs(expected - (left @ right).numpy()).max() <= limit


def test_factors_in_8_bits_multiply_no_more_than_a_dense_layer_on_many_tokens() -> None:
    form, shape, tokens = FORMS["factored_int8"], (9, 5), 1000
    module = module_of(form, shape, (5,), bias=True)
    x = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        actual = module(x)
    assert counter.get_total_flops() // 2 == (tokens + 5) * 9 * 5
    expected = x.double() @ module.dense_weight().T + module.bias.double()
    assert float((actual - expected).abs().max()) < 1e-5 * float(expected.abs().max())
