"""The contract of every form: a level costs what its module holds. A new form is picked up here."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lrbo.config.choices import ITEMSIZES
from lrbo.errors import ConfigError
from lrbo.factorization.joint import NEURONS
from lrbo.layers.form import DENSE_FORM, Form
from lrbo.layers.forms import (
    FORMS,
    Based,
    Codebook,
    Delta,
    DeltaBands,
    KeptRows,
    Quantized,
    form_named,
)
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.joint_form import Joint, SharedFactored
from lrbo.layers.kronecker_form import Kronecker
from lrbo.layers.modules import PRODUCTS, low_rank_layers
from tests.support import reference
from tests.support.form_modules import (
    ALONE,
    GROUPS,
    SHARED_OUTPUTS,
    TOKENS,
    both_biases,
    cases,
    every_form,
    every_shape,
    grid,
    inputs_of,
    levels_of,
    module_of,
    unit_of,
)


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
