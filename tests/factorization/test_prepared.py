"""Integers and low-rank factors of a unit: one function for trials, checkpoints and the cache."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.cache import factor_model, load_factors, save_factors
from lrbo.factorization.factors import PARTS, LowRankFactors
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prepared import BasedWeight, Prepared, UnitFactors, prepared_of
from lrbo.factorization.registry import method_named
from lrbo.layers.based import BasedLinear
from lrbo.layers.modules import PRODUCTS
from lrbo.layers.options import Menu, Option
from lrbo.models.model_map import linear_bias, linear_weight, map_model
from lrbo.models.specs import LayerSpec
from tests.support import reference
from tests.support.methods import RandomStatistics
from tests.support.tiny import build

TOLERANCE = {
    "float32": 1e-5,  # relative to the largest entry of weight or bias
    "loss": 1e-4,  # relative: factors in float32, of small differences of large weights
}

INTEGERS = ("int8", "int4", "int3", "int2_sym")
PLAN = BasePlan(INTEGERS, BaseOptions(group_sizes=(16,)))
SIZE, OTHER_SIZE = 16, 32
CPU = torch.device("cpu")
# With biases that depend on the rank, and without any.
CASES = {"llama_biased": "bolaco", "llama_tied": "loss_aware"}

every_case = pytest.mark.parametrize("case", CASES)
every_form = pytest.mark.parametrize("form", INTEGERS)


@functools.cache  # every test reads them only
def make(case: str) -> dict[str, Prepared]:
    model, method = build(case), method_named(CASES[case])
    parts = factor_model(model, map_model(model), method, RandomStatistics(), bases=PLAN)
    return {name: each for part in parts for name, each in part.items()}


def quantized(case: str) -> dict[str, UnitFactors]:
    """Return the units whose inputs make whole groups: of 24 inputs there are none."""
    return {
        name: each
        for name, each in make(case).items()
        if isinstance(each, UnitFactors) and each.based
    }


def some_unit(case: str = "llama_biased") -> UnitFactors:
    return quantized(case)["model.layers.0.mlp.up_proj"]


def options_of(unit: UnitFactors) -> list[Option]:
    ranks = {family: range(own.rest.max_rank + 1) for family, own in unit.based.items()}
    return [family.at(rank) for family in ranks for rank in ranks[family]]


def affine_of(unit: UnitFactors, option: Option) -> tuple[Tensor, Tensor]:
    """Add the leading directions up to the integers, each rounded to 8 bits, in float64."""
    own = unit.based[option.family]
    weight = own.base.weight(torch.float64)
    for i in range(option.level[-1]):
        ends = own.rest.left[:, i].double(), own.rest.right[i].double()
        steps = [end.abs().max() / 127 for end in ends]
        codes = [(end / step).round() for end, step in zip(ends, steps, strict=True)]
        weight = weight + float((steps[0] * steps[1]).float()) * torch.outer(*codes)
    offset = own.rest.offset
    bias = torch.zeros(len(weight)) if offset is None else offset
    if own.rest.center is not None:
        leading = weight - own.base.weight(torch.float64)
        bias = bias.double() - leading @ own.rest.center.double()
    return weight, bias.double()


def assert_same_factors(actual: LowRankFactors, expected: LowRankFactors) -> None:
    for part in PARTS:
        one, other = getattr(actual, part), getattr(expected, part)
        assert (one is None) == (other is None), part
        assert one is None or one.dtype == other.dtype, part
        assert one is None or torch.equal(one, other), part


def assert_same(actual: Prepared, expected: Prepared) -> None:
    if isinstance(expected, LowRankFactors):
        assert isinstance(actual, LowRankFactors)
        assert_same_factors(actual, expected)
        return
    assert isinstance(actual, UnitFactors)
    assert isinstance(expected, UnitFactors)
    assert (actual.low_rank is None) == (expected.low_rank is None)
    if actual.low_rank is not None and expected.low_rank is not None:
        assert_same_factors(actual.low_rank, expected.low_rank)
    assert actual.based.keys() == expected.based.keys()
    for family, own in actual.based.items():
        other = expected.based[family]
        assert own.base.family == family
        assert own.base.form == other.base.form
        assert own.base.tensors.keys() == other.base.tensors.keys()
        for part, tensor in own.base.tensors.items():
            assert tensor.dtype == other.base.tensors[part].dtype, part
            assert torch.equal(tensor, other.base.tensors[part]), part
        assert_same_factors(own.rest, other.rest)


def assert_same_module(actual: nn.Module, expected: nn.Module) -> None:
    assert type(actual) is type(expected)
    held, wanted = actual.state_dict(), expected.state_dict()
    assert held.keys() == wanted.keys()
    for name, tensor in held.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


# --- what is prepared ----------------------------------------------------------------------------


@every_case
def test_every_unit_has_its_low_ranks_and_the_integers_that_its_shape_can_have(case: str) -> None:
    model = build(case)
    layers, method = map_model(model), method_named(CASES[case])
    plain = factor_model(model, layers, method, RandomStatistics())
    low_rank = {name: each for part in plain for name, each in part.items()}
    assert make(case).keys() == low_rank.keys()
    for name, unit in make(case).items():
        assert isinstance(unit, UnitFactors)
        assert unit.low_rank is not None
        assert_same(unit.low_rank, low_rank[name])
        spec = layers.by_name[name]
        menu = Menu.of(spec, INTEGERS, bias=True, itemsize=4, group_sizes=(SIZE,))
        assert list(unit.based) == [section.family for section in menu.sections[:-1]]
        assert bool(unit.based) == (spec.in_features % SIZE == 0)
        for section in menu.sections[:-1]:
            losses = unit.losses(section)
            assert losses is not None
            assert len(losses) == len(section.levels)


@every_case
def test_what_the_integers_leave_is_factored_as_the_method_says(case: str) -> None:
    model, method = build(case), method_named(CASES[case])
    layers, statistics = map_model(model), RandomStatistics()
    for name, unit in quantized(case).items():
        module, given = model.get_submodule(name), statistics.of(layers.by_name[name])
        weight = linear_weight(module).double()
        for family, own in unit.based.items():
            rest = weight - own.base.weight(torch.float64)
            exact = method.remainders(linear_bias(module), given)(rest, own.rest.max_rank)
            assert torch.equal(own.rest.tail, exact.tail)
            assert own.rest.loss is not None
            assert exact.loss is not None
            assert torch.equal(own.rest.loss, exact.loss)
            assert unit.part(family) is own.rest
            product = own.rest.left.double() @ own.rest.right.double()
            expected = exact.left @ exact.right
            limit = TOLERANCE["float32"] * float(weight.abs().max())
            assert float((product - expected).abs().max()) <= limit


@every_case
def test_the_predicted_loss_is_the_quadratic_form_of_what_an_option_leaves(case: str) -> None:
    """Of ranks of another metric it is more, where an earlier rank has more."""
    model = build(case)
    layers, statistics = map_model(model), RandomStatistics()
    for name, unit in quantized(case).items():
        given = {s: reference.numpy_of(t) for s, t in statistics.of(layers.by_name[name]).items()}
        gradient = reference.shrunk(given[Statistic.OUTPUT_GRADIENT], 0.01)
        inputs = given[Statistic.INPUT_COVARIANCE]
        if CASES[case] == "loss_aware":  # without a bias of its own
            inputs = inputs + np.outer(given[Statistic.INPUT_MEAN], given[Statistic.INPUT_MEAN])
        dense = linear_weight(model.get_submodule(name)).double()
        for option in options_of(unit):
            own, rank = unit.based[option.family], option.level[-1]
            # The factors as they are, before a module rounds them to 8 bits.
            left, right = own.rest.left[:, :rank].double(), own.rest.right[:rank].double()
            change = (dense - own.base.weight(torch.float64) - left @ right).numpy()
            expected = float(np.trace(gradient @ change @ inputs @ change.T)) / 2
            assert own.rest.loss is not None
            predicted = float(own.rest.loss[rank])
            if CASES[case] == "loss_aware":
                assert predicted == pytest.approx(expected, rel=TOLERANCE["loss"])
            assert predicted >= expected * (1 - TOLERANCE["loss"])


def test_more_bits_and_a_larger_rank_leave_less() -> None:
    for case in CASES:
        for unit in quantized(case).values():
            tails = [unit.part(Option(form, (SIZE,))).tail for form in ("int8", "int4", "int3")]
            assert float(tails[0][0]) < float(tails[1][0]) < float(tails[2][0])
            assert all(bool((tail.diff() < 0).all()) for tail in tails)
            assert unit.has_effect


def test_integers_with_a_bias_of_their_own_keep_the_mean_output() -> None:
    model = build("llama_biased")
    layers, statistics = map_model(model), RandomStatistics()
    for name, unit in quantized("llama_biased").items():
        module = model.get_submodule(name)
        mean = statistics.of(layers.by_name[name])[Statistic.INPUT_MEAN]
        offset = linear_bias(module)
        expected = linear_weight(module).double() @ mean
        if offset is not None:
            expected = expected + offset
        for option in options_of(unit):
            weight, bias = affine_of(unit, option)
            limit = TOLERANCE["float32"] * float(expected.abs().max())
            assert float((weight @ mean + bias - expected).abs().max()) <= limit


def test_a_layer_that_cannot_be_rounded_is_refused_by_name() -> None:
    class Broken(RandomStatistics):
        def of(self, spec: LayerSpec) -> dict[Statistic, Tensor]:
            return {name: torch.nan * tensor for name, tensor in super().of(spec).items()}

    model = build("llama_tied")
    made = factor_model(model, map_model(model), method_named("svd"), Broken(), bases=PLAN)
    with pytest.raises(
        StatisticsError, match=r"^model\.layers\.0\.self_attn\.q_proj: .*non-finite"
    ):
        next(made)


# --- modules -------------------------------------------------------------------------------------


@every_case
def test_a_trial_adds_the_leading_directions_to_the_integers(case: str) -> None:
    for name, unit in quantized(case).items():
        for option in options_of(unit):
            weight, bias = affine_of(unit, option)
            module = unit.trial_module(name, option, 10**6, {})
            assert isinstance(module, BasedLinear)
            assert (module.form.name, module.rank) == (option.form, option.level[-1])
            actual, added = reference.affine_of(module, weight.shape[1])
            size = max(float(weight.abs().max()), float(bias.abs().max()))
            limit = TOLERANCE["float32"] * size
            assert np.abs(actual - weight.numpy()).max() <= limit
            assert np.abs(added - bias.numpy()).max() <= limit


@every_case
def test_many_tokens_are_multiplied_with_one_matrix_and_few_with_three(case: str) -> None:
    """The same outputs: for many it is cheaper to add the low rank to what is unpacked."""
    unit, option = some_unit(case), Option("int4", (SIZE, 2))
    module = unit.trial_module("unit", option, 0, {})
    rows, columns = module.out_features, module.in_features
    few = torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    many = few.repeat(rows, 1)
    assert 2 * (rows + columns) < rows * columns < len(many) * (rows + columns)
    outputs = [module(few), module(many)[:2]]
    expected = few.double() @ module.dense_weight().T
    expected = expected if module.bias is None else expected + module.bias.double()
    for actual in outputs:
        limit = TOLERANCE["float32"] * float(expected.abs().max())
        assert float((actual.double() - expected).abs().max()) <= limit
    with FlopCounterMode(display=False) as counter:
        module(many)
    assert counter.get_total_flops() == 2 * rows * columns * (len(many) + option.rank)


def test_factors_are_rounded_once_and_take_no_more_memory_than_their_integers() -> None:
    unit, family = some_unit(), Option("int4", (SIZE,))
    part = unit.only({family: 2}, torch.bfloat16, CPU)
    assert part is not None
    own = part.based[family]
    assert isinstance(own, BasedWeight)
    assert own.codes is not None
    held = {name: each for name, each in own.module(2).state_dict().items() if name != "weight"}
    assert held["left"].data_ptr() == own.codes.left.data_ptr()
    assert held["right"].data_ptr() == own.codes.right.data_ptr()
    assert own.rest.left.is_meta
    assert own.rest.right.is_meta
    packed = unit.based[family].base.tensors["packed"]
    assert own.base.tensors["packed"].data_ptr() == packed.data_ptr()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trials_and_checkpoints_have_the_same_tensors(case: str, dtype: torch.dtype) -> None:
    for name, unit in quantized(case).items():
        for option in options_of(unit):
            part = unit.only({option.family: option.level[-1]}, dtype, CPU)
            assert part is not None
            stored = unit.stored(name, option, dtype)
            floats = [t for t in stored.state_dict().values() if t.is_floating_point()]
            assert {tensor.dtype for tensor in floats} == {dtype}
            assert_same_module(part.trial_module(name, option, 7, {}), stored)
            assert_same_module(part.stand_in(name, option), stored)


@pytest.mark.parametrize("form", PRODUCTS)
def test_low_rank_forms_are_those_of_the_low_rank_factors(form: str) -> None:
    unit, option = some_unit(), Option(form, (3,))
    low_rank = unit.low_rank
    assert low_rank is not None
    assert unit.part(option.family) is low_rank
    for tokens in (0, 10**6):
        one, other = (each.trial_module("unit", option, tokens, {}) for each in (unit, low_rank))
        assert_same_module(one, other)
    one, other = (each.stored("unit", option, torch.bfloat16) for each in (unit, low_rank))
    assert_same_module(one, other)
    assert_same_module(unit.stand_in("unit", option), low_rank.stand_in("unit", option))


OPERATIONS: list[Callable[[UnitFactors, Option], object]] = [
    lambda unit, option: unit.trial_module("unit", option, 0, {}),
    lambda unit, option: unit.stored("unit", option, torch.float32),
    lambda unit, option: unit.stand_in("unit", option),
]


@every_form
@pytest.mark.parametrize("operation", OPERATIONS)
def test_options_that_were_not_prepared_are_refused(
    operation: Callable[[UnitFactors, Option], object], form: str
) -> None:
    unit, family = some_unit(), Option(form, (SIZE,))
    most = unit.part(family).max_rank
    for rank in (-1, most + 1):
        with pytest.raises(ValueError, match=rf"rank {rank} is outside 0\.\."):
            operation(unit, family.at(rank))
    other = Option(form, (OTHER_SIZE,))
    with pytest.raises(KeyError, match=f"{form} {OTHER_SIZE} was not prepared"):
        operation(unit, other.at(0))


# --- a part of the families ----------------------------------------------------------------------


@every_case
def test_only_some_families_are_kept_up_to_their_ranks(case: str) -> None:
    for name, unit in quantized(case).items():
        one, other = Option("int4", (SIZE,)), Option("int2_sym", (SIZE,))
        part = unit.only({one: 1, other: 0, Option("pivoted"): 3}, torch.bfloat16, CPU)
        assert part is not None
        assert {family: own.rest.max_rank for family, own in part.based.items()} == {
            one: 1,
            other: 0,
        }
        assert unit.low_rank is not None
        low_rank = unit.low_rank.to(dtype=torch.bfloat16, device=CPU, max_rank=3)
        assert_same(part.part(Option("factored")), low_rank)
        for option in (one.at(1), other.at(0)):
            expected = unit.stored(name, option, torch.bfloat16)
            assert_same_module(part.stored(name, option, torch.bfloat16), expected)
        # Predictions stay what they were.
        assert part.part(one).loss is not None
        assert part.part(one).loss.tolist() == unit.part(one).loss[:2].tolist()


def test_nothing_is_kept_of_no_families() -> None:
    unit, size = some_unit(), OTHER_SIZE
    for ranks in ({}, {Option("pivoted"): 0}, {Option("int4", (size,)): 1}):
        assert unit.only(ranks, torch.float32, CPU) is None


def test_integers_alone_have_no_low_rank_forms() -> None:
    family = Option("int4", (SIZE,))
    part = some_unit().only({family: 2}, torch.float32, CPU)
    assert part is not None
    assert part.low_rank is None
    assert part.has_effect
    with pytest.raises(KeyError, match="pivoted was not prepared"):
        part.trial_module("unit", Option("pivoted", (1,)), 0, {})


# --- tensors of the cache ------------------------------------------------------------------------


@every_case
def test_a_unit_comes_back_from_its_tensors(case: str) -> None:
    for unit in quantized(case).values():
        tensors = unit.tensors()
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        assert_same(prepared_of(tensors), unit)


def test_a_unit_without_integers_comes_back_as_its_low_rank_factors() -> None:
    unit = make("llama_tied")["model.layers.0.mlp.down_proj"]
    assert isinstance(unit, UnitFactors)
    assert unit.low_rank is not None
    assert_same(prepared_of(unit.tensors()), unit.low_rank)


@every_case
def test_units_come_back_from_disk(case: str, tmp_path: Path) -> None:
    save_factors(tmp_path / "factors", iter([make(case)]), "abc")
    actual = load_factors(tmp_path / "factors", "abc")
    assert actual.keys() == make(case).keys()
    for name, unit in quantized(case).items():
        assert_same(actual[name], unit)


def test_tensors_that_do_not_fit_each_other_are_refused() -> None:
    tensors = some_unit().tensors()
    moved = {name.replace("int4 16.", "int4 32."): each for name, each in tensors.items()}
    with pytest.raises(ValueError, match=r"int4 32\.scale is missing or of a shape other than"):
        prepared_of(moved)
    with pytest.raises(ValueError, match=r"loss has shape \(2,\), expected \(3,\)"):
        prepared_of(tensors | {"int4 16.loss": tensors["int4 16.loss"][1:]})
    unknown = {name.replace("int4 16.", "int5 16."): each for name, each in tensors.items()}
    with pytest.raises(ValueError, match="'int5 16' is no option"):
        prepared_of(unknown)
