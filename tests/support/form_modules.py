"""Modules of every form and level, on small shapes, for the contract that all forms keep."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

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
    Delta,
    DeltaBands,
    Quantized,
    QuantizedFactors,
)
from lrbo.layers.frequency import GroupedLinear
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.joint import empty_joint
from lrbo.layers.joint_form import Joint, SharedFactored
from lrbo.layers.kronecker import KroneckerLinear
from lrbo.layers.kronecker_form import Kronecker
from lrbo.layers.low_rank import linear_of
from lrbo.layers.modules import PRODUCTS, empty_module
from lrbo.layers.options import Option
from lrbo.models.specs import LayerSpec

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
