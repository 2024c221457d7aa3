"""The contract of every form: a level costs what its module holds. A new form is picked up here."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrbo.config.choices import ITEMSIZES
from lrbo.errors import ConfigError
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.bases import Base
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.frequency_groups import GroupedFactors
from lrbo.factorization.joint import NEURONS, SKIP, Refit, Skipped, Thinned
from lrbo.factorization.kronecker import KroneckerSum
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prepared import BasedWeight
from lrbo.factorization.registry import method_named
from lrbo.factorization.shared import SharedFactors
from lrbo.layers.form import DENSE_FORM, GROUP_SIZES, Form, Grid
from lrbo.layers.forms import (
    FORMS,
    Based,
    Codebook,
    Delta,
    DeltaBands,
    KeptRows,
    Quantized,
    QuantizedFactors,
    form_named,
)
from lrbo.layers.frequency import GroupedLinear
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.joint import empty_joint
from lrbo.layers.joint_form import Joint, SharedFactored
from lrbo.layers.kronecker import KroneckerLinear
from lrbo.layers.kronecker_form import Kronecker
from lrbo.layers.low_rank import FormModule, linear_of
from lrbo.layers.modules import PRODUCTS, empty_module, low_rank_layers, thin_layers
from lrbo.layers.options import Option
from lrbo.models.specs import LayerSpec
from tests.support import reference
from tests.support.forms import form_of

TOLERANCE = {
    torch.float64: 1e-12,  # relative to the largest element: sums of a few products
    torch.float32: 1e-5,  # the same in single precision
}

SHAPES = [(5, 9), (9, 5), (7, 7), (1, 4), (4, 1), (17, 32), (8, 16)]
TOKENS = 3
ALONE = ("factored_int8", "factored_int4")  # have a base of nothing
BANDS = ((2, 3),)
PERCENTAGES = (25, 50)
ROW_PERCENTAGES = (20, 40)
BLOCKS = ((2, 1), (1, 2), (4, 4), (3, 3))
GROUPS = (2, 3)
SHARED_OUTPUTS = 40

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_module = pytest.mark.parametrize("form", list(FORMS.values())[1:], ids=list(FORMS)[1:])
every_product = pytest.mark.parametrize("form", [FORMS[n] for n in PRODUCTS], ids=PRODUCTS)
every_shape = pytest.mark.parametrize("shape", SHAPES)
both_biases = pytest.mark.parametrize("bias", [False, True])


def grid(multiple: int = 1, minimum: int = 0) -> Grid:
    return Grid(
        multiple,
        minimum,
        GROUP_SIZES,
        PERCENTAGES,
        ROW_PERCENTAGES,
        BLOCKS,
        GROUPS,
        SHARED_OUTPUTS,
        BANDS,
    )


def unit_of(shape: tuple[int, int], *, bias: bool = False) -> LayerSpec:
    """Return a layer with which an MLP ends, of as many neurons as it has inputs.

    It is the first that reads its input.
    """
    return LayerSpec("unit", "kind", 0, *shape, bias, "unit", closing="unit", neurons=shape[1])


def levels_of(
    form: Form, unit: LayerSpec, multiple: int = 1, minimum: int = 0
) -> list[tuple[int, ...]]:
    runs = form.levels(unit, grid(multiple, minimum))
    return [tuple(map(int, level)) for run in runs for level in run]


def module_of(
    form: Form, shape: tuple[int, int], level: tuple[int, ...], *, bias: bool
) -> nn.Module:
    """Return what a checkpoint has, of random factors, in float32."""
    if form.name == DENSE_FORM:
        return nn.Linear(shape[1], shape[0], bias)
    if isinstance(form, Joint) and form.is_whole:
        return joint_of(form, shape, bias=bias).module(Option(form.name, level))
    left, right = factors(shape, level[-1])
    offset = torch.ones(shape[0])
    if isinstance(form, SharedFactored):
        rest = LowRankFactors(left.float(), right.float(), torch.zeros(level[-1] + 1))
        rest = replace(rest, offset=offset if bias else None)
        return SharedFactors("unit", is_first=True, rest=rest).module(level[-1])
    if isinstance(form, Kronecker):
        return kronecker_of(shape, level, offset=offset.double() if bias else None).float()
    if isinstance(form, FrequencyGroups):
        return grouped_of(shape, level, offset if bias else None)
    if isinstance(form, Based):
        rest = LowRankFactors(left.float(), right.float(), torch.zeros(level[-1] + 1))
        rest = replace(rest, offset=offset if bias else None)
        codes = None
        if isinstance(form, QuantizedFactors) and form.bits == 4 and level[-1]:
            plan = BasePlan((form.name,), BaseOptions("nearest"))
            remainder = method_named("svd").remainders(None, {})
            codes = plan.factors(form, rest, remainder, left @ right, {}, torch.float32)
        if isinstance(form, DeltaBands) and level[-1]:
            plan = BasePlan((form.name,), BaseOptions("nearest"))
            remainder = method_named("svd").remainders(None, {})
            change, bands = left @ right, level[:-1]
            codes = plan.factors(form, rest, remainder, change, {}, torch.float32, bands)
        base = base_of(form, shape, level, torch.float32)
        module = BasedWeight(base, rest, codes).module(level[-1])
        if isinstance(form, Delta):
            module.share_(shared_of(shape))
        return module

    def bias_for(linear: object, dtype: torch.dtype) -> Tensor | None:
        del linear
        return offset.to(dtype) if bias else None

    return PRODUCTS[form.name].of_product("unit", left, right, bias_for, torch.float32)


def shared_of(shape: tuple[int, int]) -> Tensor:
    return factors(shape, shape[1])[0].float()


def joint_of(form: Joint, shape: tuple[int, int], *, bias: bool) -> Thinned | Skipped:
    """Return what the last layer of an MLP can become, of one that is random."""
    dense, count = linear_of(torch.zeros(shape), None), shape[1]
    if form.name == SKIP.form:
        return Skipped(torch.zeros(1), whole=False, mean=torch.ones(shape[0]), dense=dense)
    refit = Refit(factors(shape, count)[0].float(), torch.eye(count))
    if bias:
        refit = replace(refit, offset=torch.ones(shape[0]), center=torch.ones(count))
    return Thinned(torch.arange(count), torch.zeros(count + 1), refit, dense)


def inputs_of(form: Form, shape: tuple[int, int], level: tuple[int, ...]) -> int:
    """Return the number of inputs of a module."""
    return level[0] if form.name == NEURONS.form else shape[1]


def empty_of(
    form: Form, shape: tuple[int, int], level: tuple[int, ...], *, bias: bool
) -> nn.Module:
    """Return the module that weights are loaded into."""
    option = Option(form.name, level)
    if isinstance(form, Joint):
        return empty_joint(unit_of(shape, bias=bias), option, bias=bias)
    module = empty_module("unit", option, *shape, bias=bias)
    if isinstance(form, Delta):  # in no file
        module.share_(shared_of(shape))
    return module


def kronecker_of(
    shape: tuple[int, int], level: tuple[int, ...], offset: Tensor | None = None
) -> KroneckerLinear:
    *left, terms = level
    block = shape[0] // left[0], shape[1] // left[1]
    sides = factors((left[0] * left[1], block[0] * block[1]), terms)
    terms_of = KroneckerSum(
        shape, (left[0], left[1]), LowRankFactors(*sides, torch.zeros(terms + 1)), offset
    )
    return terms_of.module(terms)


def grouped_of(
    shape: tuple[int, int], level: tuple[int, ...], offset: Tensor | None = None
) -> GroupedLinear:
    """Return a table of random factors, with its rows in a random order."""
    groups, count = level
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(count))
    weight, parts = factors(shape, shape[1])[0].float(), []
    for own in order.split(FrequencyGroups.rows(shape[0], groups)):
        u, s, vh = torch.linalg.svd(weight[own], full_matrices=False)
        tail = torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)])
        parts.append(LowRankFactors(u * s, vh, tail))
    return GroupedFactors.of(order, parts, offset).module(count)


def base_of(
    form: Based, shape: tuple[int, int], level: tuple[int, ...], dtype: torch.dtype
) -> Base:
    """Return a base of a random weight, every entry decided on alone."""
    percentages = level[:-1] or PERCENTAGES
    options = BaseOptions("nearest", percentages=percentages, row_percentages=percentages)
    if isinstance(form, Delta):
        options = (
            BaseOptions("nearest", bands=(level[:2],)) if level[1:] else BaseOptions("nearest")
        )
    if isinstance(form, Quantized):
        options = BaseOptions("nearest", level[:1])
    (base,) = BasePlan((form.name,), options).make(factors(shape, shape[1])[0], {}, dtype)
    assert base.level == level[:-1]
    return base


def factors(shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return draw(shape[0], rank), draw(rank, shape[1])


def cases(form: Form, shape: tuple[int, int], *, bias: bool) -> Iterator[tuple[int, ...]]:
    """Return all levels of a unit, and for ranks the one that is below all of them."""
    yield from levels_of(form, unit_of(shape, bias=bias))
    if form.problem(*shape, (0,)) is None:
        yield (0,)


def test_every_form_but_dense_has_a_module() -> None:
    others = {name for name, form in FORMS.items() if isinstance(form, Based | Joint)}
    assert set(FORMS) == {DENSE_FORM, *PRODUCTS, *others, "kronecker", "frequency_groups"}
    assert all(isinstance(form, Form) and form.name == name for name, form in FORMS.items())
    assert low_rank_layers(nn.Linear(2, 3)) == {}


@every_form
@every_shape
@both_biases
@pytest.mark.parametrize("dtype", ITEMSIZES)
def test_a_level_costs_what_its_module_holds_and_multiplies(
    form: Form, shape: tuple[int, int], bias: bool, dtype: str
) -> None:
    kind = getattr(torch, dtype)
    for level in cases(form, shape, bias=bias):
        module = module_of(form, shape, level, bias=bias).to(kind)
        stored = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            x = torch.ones(TOKENS, inputs_of(form, shape, level), dtype=kind)
            assert module(x).shape == (TOKENS, shape[0])
        cost = form.cost(unit_of(shape, bias=bias), level, bias=bias, itemsize=ITEMSIZES[dtype])
        macs = counter.get_total_flops() // 2 // TOKENS
        area = shape[0] * shape[1]
        if isinstance(form, Delta) and TOKENS * sum(shape) > area:
            # Of so many tokens the low rank is added to the weight, once for all.
            macs += level[-1] * sum(shape) - level[-1] * area // TOKENS
        held = reference.count_parameters(module)
        if isinstance(form, Based):  # an integer is a parameter, its scale is not
            kept = shape[0] * shape[1]
            if not isinstance(form, Quantized | Codebook):
                in_file = form.name not in ALONE and not isinstance(form, Delta)
                kept = module.values.numel() if in_file else 0
            held += kept + level[-1] * sum(shape)
        assert cost == (held, stored, macs), level


@every_form
@both_biases
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    multiple=st.integers(1, 9),
    minimum=st.integers(0, 20),
)
def test_levels_rise_in_every_cost_and_have_no_problem(
    form: Form, bias: bool, shape: tuple[int, int], multiple: int, minimum: int
) -> None:
    unit = unit_of(shape, bias=bias)
    runs_of_groups = (each for each in GROUPS if FrequencyGroups.can_be(shape[0], each))
    for run in form.levels(unit, grid(multiple, minimum)):
        levels = [tuple(map(int, level)) for level in run]
        assert levels == sorted(set(levels))
        assert len({level[:-1] for level in levels}) <= 1
        assert all(form.problem(*shape, level) is None for level in levels)
        costs = [form.cost(unit, level, bias=bias, itemsize=2) for level in levels]
        for less, more in pairwise(costs):
            assert all(a < b for a, b in zip(less, more, strict=True))
        ranks = [level[-1] for level in levels if level]
        if isinstance(form, Kronecker):
            assert ranks == [*range(1, len(ranks) + 1)]
            assert costs[-1][0] < unit.parameters + (shape[0] if bias else 0)
        elif isinstance(form, FrequencyGroups):
            groups = next(runs_of_groups)
            sizes = [len(part) for part in torch.arange(shape[0]).split(-(-shape[0] // groups))]
            assert len(sizes) == groups
            first = max(-(-minimum * groups // multiple), 1) * multiple
            counts = range(first, sum(min(size, shape[1]) for size in sizes) + 1, multiple)
            cheaper = [n for n in counts if n * (sizes[0] + shape[1]) < shape[0] * shape[1]]
            assert ranks == cheaper
        elif isinstance(form, Delta):
            assert ranks == [*range(0, form.largest_rank(*shape) + 1, multiple)]
            assert costs[0] == (
                *([shape[0], 2 * shape[0]] if bias else [0, 0]),
                shape[0] * shape[1],
            )
        elif isinstance(form, Based) and form.name not in ALONE:
            assert ranks == [*range(0, form.largest_rank(*shape) + 1, multiple)]
            most = min(shape) // (16 if form.has_floats else 8)
            most = 0 if form.name in ("int8", "int8_sym") else most
            if isinstance(form, KeptRows):  # no more parameters than dense
                most = next(r for r in range(99) if (r + 1) * sum(shape) > shape[0] * shape[1])
            assert form.largest_rank(*shape) == most
        elif isinstance(form, SharedFactored):
            most = shape[1] * SHARED_OUTPUTS // (shape[1] + SHARED_OUTPUTS)
            assert ranks == [r for r in range(max(minimum, 1), most + 1) if r % multiple == 0]
        elif isinstance(form, Joint):
            has_levels = form.name == NEURONS.form
            assert ranks == ([*range(multiple, unit.neurons, multiple)] if has_levels else [])
        elif form.name != DENSE_FORM:
            most = form.largest_rank(*shape) if isinstance(form, Based) else min(shape)
            allowed = range(max(minimum, 1), most + 1)
            assert ranks == [rank for rank in allowed if rank % multiple == 0]


@every_form
@every_shape
@both_biases
def test_arrays_cost_what_integers_cost(form: Form, shape: tuple[int, int], bias: bool) -> None:
    unit = unit_of(shape, bias=bias)
    for levels in form.levels(unit, grid()):
        arrays = form.cost(unit, tuple(levels.T), bias=bias, itemsize=2)
        single = [tuple(map(int, level)) for level in levels]
        one_by_one = [form.cost(unit, level, bias=bias, itemsize=2) for level in single]
        assert all(type(value) is int for cost in one_by_one for value in cost)
        for column, array in enumerate(arrays):
            expected = [cost[column] for cost in one_by_one]
            assert np.broadcast_to(array, len(levels)).tolist() == expected


@every_form
@every_shape
def test_a_level_that_the_shape_cannot_have_is_refused_by_name(
    form: Form, shape: tuple[int, int]
) -> None:
    bad = [(-1,), (min(shape) + 1,), (64, -1), (16, min(shape)), (0, 0), (16, 0, 0)]
    bad += [(256, 0), (7, 0)] if isinstance(form, Quantized) else [(100, 0)]
    bad += [(3, 2, 1), (*shape, 2), (1, 1, 0), (-1, -1, 1)]
    bad += [()] if form.name != DENSE_FORM else []
    if isinstance(form, Joint):
        bad = [(-1,), (0,), (max(shape) + 1,), (1, 1)]
    if isinstance(form, DeltaBands):  # of which many levels of three numbers are
        bad = [(0,), (2, 3), (2, 3, -1), (2, 3, min(shape) + 1), (-1, 3, 0), (2, -1, 1)]
    for level in bad:
        problem = form.problem(*shape, level)
        assert problem is not None, level
        assert problem.startswith(form.name)
        assert problem.endswith(f"got {list(level)}")
    if form.name in PRODUCTS:
        assert str(min(shape)) in str(form.problem(*shape, (99,)))


@every_form
def test_a_level_has_a_label(form: Form) -> None:
    labels = [form.label(level) for level in levels_of(form, unit_of((16, 32)))]
    assert len(set(labels)) == len(labels)
    assert all(labels)


def test_an_unknown_form_lists_the_known_ones() -> None:
    assert form_named("pivoted") is FORMS["pivoted"]
    with pytest.raises(ConfigError, match="form 'pivot' is unknown; known: dense, factored, pivot"):
        form_named("pivot")


# --- modules -----------------------------------------------------------------------------------


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
