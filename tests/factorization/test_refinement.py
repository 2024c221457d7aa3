"""Bases and low ranks made again: never worse by a plain reference, of the same size."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.methods import LossAware, SvdLlm
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prepare_unit import prepared_unit
from lrbo.factorization.prepared import BasedWeight, UnitFactors
from lrbo.factorization.refinement import Parts, is_integer, is_repaired, refine
from lrbo.factorization.tables import prepared_table
from lrbo.layers.options import Option
from lrbo.models.specs import LayerSpec
from tests.factorization.test_tables import ROWS, WIDTH, cost_of, spec_of, statistics_of, table
from tests.support import reference

OPTIONS = BaseOptions(group_sizes=(16, 32), percentages=(30,), row_percentages=(10,))
REPAIRED = ["int2 32 4", "int3_sym 16 3", "lut3 5", "sparse_2_4 4", "sparse 30 2"]
REPAIRED += ["sparse_rows 10 9"]
SPEC = LayerSpec("layer", "kind", 0, 48, 64, True, site="layer")


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics() -> dict[Statistic, Tensor]:
    inputs = drawn(200, 64, seed=1) @ (drawn(64, 64, seed=2) * torch.linspace(2, 0.1, 64).double())
    gradients = drawn(200, 48, seed=3) * torch.linspace(1, 0.2, 48).double()
    return {
        Statistic.INPUT_MEAN: inputs.mean(0) + 0.3,
        Statistic.INPUT_COVARIANCE: inputs.T @ inputs / 200,
        Statistic.OUTPUT_GRADIENT: gradients.T @ gradients / 200,
    }


def layer() -> nn.Linear:
    module = nn.Linear(64, 48)
    with torch.no_grad():
        module.weight.copy_(drawn(48, 64, seed=4) + 2 * drawn(48, 2, seed=5) @ drawn(2, 64, seed=6))
        module.bias.copy_(drawn(48, seed=7))
    return module


def predicted(module: nn.Linear, unit: BasedWeight, rank: int) -> float:
    """Work out ``1/2 tr(G D C D^T)`` in numpy, for the weight that the layer runs."""
    given = statistics()
    change = reference.numpy_of(module.weight.detach() - unit.module(rank).dense_weight())
    mean = reference.numpy_of(given[Statistic.INPUT_MEAN])
    moment = reference.numpy_of(given[Statistic.INPUT_COVARIANCE]) + np.outer(mean, mean)
    gradient = reference.numpy_of(given[Statistic.OUTPUT_GRADIENT])
    flat = np.trace(gradient) / len(gradient) * np.eye(len(gradient))
    return float(np.trace((0.99 * gradient + 0.01 * flat) @ change @ moment @ change.T)) / 2


def sizes(unit: BasedWeight, rank: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    tensors = unit.module(rank).state_dict()
    return {name: (tuple(each.shape), each.dtype) for name, each in tensors.items()}


def prepared(option: Option, module: nn.Linear, method: FactorizationMethod) -> BasedWeight:
    plan = BasePlan((option.form,), OPTIONS)
    unit = prepared_unit(module, method, statistics(), None, bases=plan, errors=False)
    assert isinstance(unit, UnitFactors)
    based = unit.based[option.family]
    assert isinstance(based, BasedWeight)
    return based


@pytest.mark.parametrize("text", REPAIRED)
@pytest.mark.parametrize(
    "method",
    [LossAware(), LossAware(centred=True), SvdLlm()],
    ids=["loss_aware", "centred", "svd_llm"],
)
def test_it_is_never_worse_and_costs_the_same(text: str, method: FactorizationMethod) -> None:
    option, module = Option.parse(text), layer()
    rank, unit = option.rank, prepared(option, module, method)
    plan = BasePlan((option.form,), OPTIONS)
    parts = Parts.of(SPEC, module, unit, method, statistics(), plan)
    made = [refine(unit, rank, parts, turns) for turns in (1, 2, 4)]
    for each in made:
        assert each.after <= each.before == made[0].before
        assert (each.after < each.before) == (each.turn > 0)
        assert sizes(each.unit, rank) == sizes(unit, rank)
        assert each.unit.base.family == option.family
        assert each.unit.rest.max_rank == rank
    assert made[2].after <= made[1].after <= made[0].after
    if not method.adds_bias:  # whose moment is another one
        assert made[0].before == pytest.approx(predicted(module, unit, rank), rel=1e-6)
        assert made[2].after == pytest.approx(predicted(module, made[2].unit, rank), rel=1e-6)


def test_a_mean_that_is_restored_stays_restored() -> None:
    option, module, method = Option.parse("int2 32 4"), layer(), LossAware(centred=True)
    unit, given = prepared(option, module, method), statistics()
    parts = Parts.of(SPEC, module, unit, method, given, BasePlan((option.form,), OPTIONS))
    made = refine(unit, 4, parts, 2)
    assert made.turn > 0
    mean = given[Statistic.INPUT_MEAN].float()
    with torch.no_grad():
        expected, actual = module(mean), made.unit.module(4)(mean)
    assert torch.allclose(actual, expected, atol=1e-4 * float(expected.abs().max()))


def test_few_bits_and_a_low_rank_gain_by_it() -> None:
    option, module, method = Option.parse("int2 32 4"), layer(), LossAware()
    unit = prepared(option, module, method)
    parts = Parts.of(SPEC, module, unit, method, statistics(), BasePlan(("int2",), OPTIONS))
    first = refine(unit, 4, parts, 1)
    assert first.after < 0.95 * first.before
    # By its definition: a base of what the low rank leaves, and the best low rank of what that
    # leaves, before it is rounded to integers.
    factors = unit.module(4).factors
    assert factors is not None
    left, right = factors.wide(torch.float64)
    target = module.weight.detach().double() - left @ right
    (base,) = BasePlan(("int2",), replace(OPTIONS, group_sizes=(32,))).make(
        target, statistics(), torch.float32
    )
    for name, tensor in base.tensors.items():
        assert torch.equal(first.unit.base.tensors[name], tensor)


@pytest.mark.parametrize("text", ["int3 16 2", "lut4 2"])
def test_a_table_is_refined_in_its_own_metric(text: str) -> None:
    option, spec, given = Option.parse(text), spec_of("tied"), statistics_of()
    module = nn.Embedding(ROWS, WIDTH, _weight=table().float())
    plan = BasePlan((option.form,), OPTIONS)
    unit = prepared_table(spec, module, given, None, bases=plan)
    assert isinstance(unit, UnitFactors)
    based = unit.based[option.family]
    assert isinstance(based, BasedWeight)
    parts = Parts.of(spec, module, based, LossAware(), given, plan)
    made = refine(based, 2, parts, 3)
    assert made.after <= made.before
    assert sizes(made.unit, 2) == sizes(based, 2)
    change = module.weight.detach().double() - made.unit.module(2).dense_weight()
    assert made.after == pytest.approx(cost_of("tied", change, given), rel=1e-5)


def test_gradients_are_asked_for() -> None:
    option, module = Option.parse("int2 32 4"), layer()
    given = {s: t for s, t in statistics().items() if s is not Statistic.OUTPUT_GRADIENT}
    unit, plan = prepared(option, module, SvdLlm()), BasePlan(("int2",), OPTIONS)
    with pytest.raises(StatisticsError, match="judged by gradients of outputs"):
        Parts.of(SPEC, module, unit, SvdLlm(), given, plan)


def test_only_a_base_with_a_rank_is_repaired_and_integers_are_integers() -> None:
    alone = ["int4 64 0", "pivoted 8", "factored_int8 8", "dense", "kronecker 2 1 3", "skip"]
    alone += ["delta 8", "delta_bands 2 32 40"]
    assert not any(is_repaired(Option.parse(text)) for text in alone)
    assert all(is_repaired(Option.parse(text)) for text in REPAIRED)
    integers = [text for text in [*alone, *REPAIRED] if is_integer(Option.parse(text))]
    assert integers == ["int4 64 0", "int2 32 4", "int3_sym 16 3"]


@pytest.mark.parametrize("text", ["int3 16 0", "int2_sym 32 0", "int2 32 4"])
@pytest.mark.parametrize("centred", [False, True])
def test_integers_gain_by_sweeps_with_a_low_rank_and_without(text: str, centred: bool) -> None:
    option, module, method = Option.parse(text), layer(), LossAware(centred=centred)
    rank, unit = option.rank, prepared(option, module, method)
    made = []
    for sweeps in (0, 3):
        plan = BasePlan((option.form,), replace(OPTIONS, sweeps=sweeps))
        parts = Parts.of(SPEC, module, unit, method, statistics(), plan)
        made.append(refine(unit, rank, parts))
    plain, own = made
    assert own.after < plain.after
    assert (plain.turn, own.turn) == (int(rank > 0), 1)
    assert sizes(own.unit, rank) == sizes(unit, rank)
    if not centred:  # whose moment is another one
        assert own.after == pytest.approx(predicted(module, own.unit, rank), rel=1e-6)
        return
    mean = statistics()[Statistic.INPUT_MEAN].float()
    with torch.no_grad():
        expected, actual = module(mean), own.unit.module(rank)(mean)
    assert torch.allclose(actual, expected, atol=1e-4 * float(expected.abs().max()))


def test_a_table_of_integers_alone_is_swept() -> None:
    option, spec, given = Option.parse("int3 16 0"), spec_of("tied"), statistics_of()
    module = nn.Embedding(ROWS, WIDTH, _weight=table().float())
    unit = prepared_table(spec, module, given, None, bases=BasePlan(("int3",), OPTIONS))
    assert isinstance(unit, UnitFactors)
    based = unit.based[option.family]
    assert isinstance(based, BasedWeight)
    plan = BasePlan(("int3",), replace(OPTIONS, sweeps=2))
    made = refine(based, 0, Parts.of(spec, module, based, LossAware(), given, plan))
    assert made.after < made.before
    change = module.weight.detach().double() - made.unit.module(0).dense_weight()
    assert made.after == pytest.approx(cost_of("tied", change, given), rel=1e-5)
