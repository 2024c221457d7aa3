"""Embeddings and heads are factored in the metric of the loss, and predicted in nats."""

import pytest
import torch
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prediction import PREDICTION_SHRINKAGE
from lrbo.factorization.prepared import UnitFactors, prepared_of
from lrbo.factorization.tables import TableMetric
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.options import Option
from lrbo.models.specs import LayerSpec

ROWS, WIDTH = 40, 16
CPU = torch.device("cpu")


def spec_of(role: str) -> LayerSpec:
    tied_to, is_lookup = ("head" if role == "tied" else None), role != "head"
    return LayerSpec("table", "table", None, ROWS, WIDTH, False, "table", tied_to, is_lookup)


def moment(generator: torch.Generator, strength: float) -> Tensor:
    root = torch.randn(WIDTH, 3 * WIDTH, generator=generator, dtype=torch.float64)
    scale = torch.linspace(1.0, 0.05, WIDTH, dtype=torch.float64)[:, None]
    return strength * (scale * root) @ (scale * root).T / (3 * WIDTH)


def statistics_of(*, proportional: bool = False) -> dict[Statistic, Tensor]:
    generator = torch.Generator().manual_seed(3)
    frequency = torch.arange(1.0, ROWS + 1, dtype=torch.float64).pow(-1.0)
    frequency /= frequency.sum()
    variance = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    return {
        Statistic.TOKEN_FREQUENCY: frequency,
        Statistic.ROW_GRADIENT: moment(generator, 0.3),
        Statistic.INPUT_MEAN: torch.randn(WIDTH, generator=generator, dtype=torch.float64),
        Statistic.INPUT_COVARIANCE: moment(generator, 2.0),
        Statistic.LABEL_VARIANCE: 0.8 * frequency if proportional else variance,
    }


def table() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def root_of(matrix: Tensor) -> Tensor:
    """Return the root of a matrix, at the trace of the matrix itself."""
    values, vectors = torch.linalg.eigh(matrix)
    root = vectors @ values.clamp_min(0.0).sqrt().diag() @ vectors.T
    return root * matrix.trace() / root.trace()


def cost_of(role: str, change: Tensor, statistics: dict[Statistic, Tensor]) -> float:
    """Sum the predicted loss of a change of a table row by row, as the docstring has it."""

    def shrunk(matrix: Tensor) -> Tensor:
        mean = matrix.diagonal().mean() * torch.eye(WIDTH).double()
        return (1 - PREDICTION_SHRINKAGE) * matrix + PREDICTION_SHRINKAGE * mean

    total = 0.0
    mean = statistics[Statistic.INPUT_MEAN]
    roles = {
        "lookup": (Statistic.TOKEN_FREQUENCY, root_of(statistics[Statistic.ROW_GRADIENT])),
        "head": (
            Statistic.LABEL_VARIANCE,
            statistics[Statistic.INPUT_COVARIANCE] + mean.outer(mean),
        ),
    }
    for name, (weights, matrix) in roles.items():
        if role in (name, "tied"):
            shares = statistics[weights]
            if name == "head" and Statistic.TOKEN_FREQUENCY in statistics:
                frequency = statistics[Statistic.TOKEN_FREQUENCY]
                shares = (shares + shares.sum() * frequency) / 2
            for share, row in zip(shares, change, strict=True):
                total += 0.5 * float(share * (row @ shrunk(matrix) @ row))
    return total


every_role = pytest.mark.parametrize("role", ["lookup", "head", "tied"])


@every_role
def test_the_predicted_loss_of_a_rank_is_the_sum_over_rows_and_roles(role: str) -> None:
    statistics, weight = statistics_of(), table()
    factors = TableMetric.of(spec_of(role), statistics, CPU).factor(weight, None, WIDTH)
    for rank in (0, 1, 5, WIDTH - 1):
        change = weight - factors.left[:, :rank] @ factors.right[:rank]
        expected = cost_of(role, change, statistics)
        assert float(factors.loss[rank]) == pytest.approx(expected, rel=1e-9)
    assert bool((factors.loss.diff() <= 0).all())
    assert torch.allclose(factors.left @ factors.right, weight)


@pytest.mark.parametrize("role", ["lookup", "head", "tied"])
def test_no_other_product_of_a_rank_costs_less(role: str) -> None:
    """In one role, and in two where the weights of rows are proportional."""
    statistics, weight = statistics_of(proportional=True), table()
    factors = TableMetric.of(spec_of(role), statistics, CPU).factor(weight, None, WIDTH)
    least = float(factors.loss[3])
    basis = factors.right[:3].clone().requires_grad_()
    rows = factors.left[:, :3].clone().requires_grad_()
    # Stationary: the gradient of the cost by both factors is nothing beside that by chance ones.
    parts = TableMetric.of(spec_of(role), statistics, CPU).roles
    mean = torch.eye(WIDTH).double()
    cost = torch.zeros((), dtype=torch.float64)
    for each in parts:
        inputs = each.inputs
        inputs = (1 - PREDICTION_SHRINKAGE) * inputs + (
            PREDICTION_SHRINKAGE * inputs.diagonal().mean() * mean
        )
        change = weight - rows @ basis
        cost = cost + 0.5 * (each.outputs * (change @ inputs * change).sum(1)).sum()
    assert float(cost.detach()) == pytest.approx(least, rel=1e-9)
    gradients = torch.autograd.grad(cost, [rows, basis])
    assert all(float(g.norm()) < 1e-9 * max(least, 1.0) for g in gradients)


def test_frequent_tokens_lose_less() -> None:
    statistics, weight = statistics_of(), table()
    factors = TableMetric.of(spec_of("lookup"), statistics, CPU).factor(weight, None, WIDTH)
    errors = (weight - factors.left[:, :8] @ factors.right[:8]).square().sum(1)
    lengths = weight.square().sum(1)
    frequent, rare = slice(0, 4), slice(20, None)
    assert float((errors / lengths)[frequent].mean()) < float((errors / lengths)[rare].mean())


@every_role
def test_bases_of_a_table_are_made_of_rows_alone(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of any size, and what they leave is predicted."""
    plan = BasePlan(("int4", "lut3", "sparse_2_4"), BaseOptions(group_sizes=(16,)))
    statistics, weight = statistics_of(), table()
    metric = TableMetric.of(spec_of(role), statistics, CPU)
    whole = metric.bases(weight, plan, torch.float32)
    monkeypatch.setattr("lrbo.factorization.tables.ROWS", 7)
    pieces = metric.bases(weight, plan, torch.float32)
    assert [base.family for base in whole] == [base.family for base in pieces]
    for one, other in zip(whole, pieces, strict=True):
        assert one.shape == other.shape == (ROWS, WIDTH)
        for name in one.tensors:  # sums of more rows at once round otherwise
            torch.testing.assert_close(one.tensors[name], other.tensors[name])
        rest = weight - one.weight(torch.float64)
        loss = metric.factor(rest, None, 2).loss
        assert float(loss[0]) == pytest.approx(cost_of(role, rest, statistics), rel=1e-9)


def test_rounding_a_tied_table_by_its_metric_costs_less_than_to_the_nearest() -> None:
    statistics, weight = statistics_of(), table()
    metric = TableMetric.of(spec_of("tied"), statistics, CPU)
    costs = {}
    for method in ("gptq", "nearest"):
        plan = BasePlan(("int3",), BaseOptions(method, (16,)))
        (base,) = metric.bases(weight, plan, torch.float64)
        costs[method] = cost_of("tied", weight - base.weight(torch.float64), statistics)
    assert costs["gptq"] < 0.9 * costs["nearest"]


@every_role
@pytest.mark.parametrize("groups", [2, 3, 8])
def test_every_few_directions_of_groups_are_predicted_row_by_row(role: str, groups: int) -> None:
    statistics, weight = statistics_of(), table()
    grouped = TableMetric.of(spec_of(role), statistics, CPU).grouped(weight, None, groups)
    assert grouped.rest.loss is not None
    size = -(-ROWS // groups)
    assert grouped.rest.max_rank == FrequencyGroups.largest(ROWS, WIDTH, groups)
    for count in {1, 2, 9, grouped.rest.max_rank // 2, grouped.rest.max_rank}:
        module = grouped.module(count)
        change = weight - module.dense_weight()
        expected = cost_of(role, change, statistics)
        assert float(grouped.rest.loss[count]) == pytest.approx(expected, rel=1e-9)
        assert module.problem is None
    assert bool((grouped.rest.loss.diff() <= 0).all())
    weights = torch.stack(
        [
            each.outputs * each.inputs.trace()
            for each in TableMetric.of(spec_of(role), statistics, CPU).roles
        ]
    ).sum(0)[grouped.order]
    assert bool((weights.diff() <= 0).all())
    # The rows of a group lie in the span of as many directions as it has.
    module = grouped.module(9)
    ranks = [
        int(torch.linalg.matrix_rank(module.dense_weight()[own]))
        for own in grouped.order.split(size)
    ]
    assert ranks == module.ranks.tolist()


def test_groups_lose_less_than_a_rank_of_as_many_parameters_where_frequencies_fall() -> None:
    statistics, weight = statistics_of(), table()
    statistics[Statistic.TOKEN_FREQUENCY] = statistics[Statistic.TOKEN_FREQUENCY].pow(3)
    metric = TableMetric.of(spec_of("lookup"), statistics, CPU)
    whole, grouped = metric.factor(weight, None, WIDTH), metric.grouped(weight, None, 4)
    ranks = grouped.module(16).ranks.tolist()
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > 2 * ranks[-1]
    rank = -(-16 * (ROWS // 4 + WIDTH) // (ROWS + WIDTH))  # of as many parameters, rounded up
    assert grouped.rest.loss is not None
    assert whole.loss is not None
    assert float(grouped.rest.loss[16]) < 0.7 * float(whole.loss[rank])


def test_groups_come_back_from_their_tensors() -> None:
    statistics, weight = statistics_of(), table()
    metric, family = (
        TableMetric.of(spec_of("tied"), statistics, CPU),
        Option("frequency_groups", (3,)),
    )
    bias = torch.arange(ROWS).double()
    grouped = metric.grouped(weight, bias, 3).to(dtype=torch.float32, device=CPU)
    whole = metric.factor(weight, bias, WIDTH).to(dtype=torch.float32)
    tensors = UnitFactors(whole, {family: grouped}).tensors()
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    again = prepared_of(tensors)
    for count in (1, 5, grouped.rest.max_rank):
        held = again.stored("table", family.at(count), torch.float32).state_dict()
        expected = grouped.module(count).state_dict()
        assert held.keys() == expected.keys()
        assert all(torch.equal(held[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="frequency groups of sizes"):
        prepared_of({n.replace("groups 3", "groups 4"): each for n, each in tensors.items()})
    for count in (0, grouped.rest.max_rank + 1):
        with pytest.raises(ValueError, match=rf"{count} directions are outside 1\.\."):
            again.trial_module("table", family.at(count), 0, {})


def test_a_missing_statistic_is_named() -> None:
    statistics = statistics_of()
    del statistics[Statistic.ROW_GRADIENT]
    with pytest.raises(StatisticsError, match="needs the statistics row_gradient; got"):
        TableMetric.of(spec_of("tied"), statistics, CPU)
    TableMetric.of(spec_of("head"), statistics, CPU)


def test_a_table_without_effect_is_factored_all_the_same() -> None:
    statistics, weight = statistics_of(), table()
    statistics[Statistic.ROW_GRADIENT] = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    factors = TableMetric.of(spec_of("lookup"), statistics, CPU).factor(weight, None, WIDTH)
    assert not bool(factors.loss.any())
    assert not factors.has_effect
    assert torch.allclose(factors.left @ factors.right, weight)
