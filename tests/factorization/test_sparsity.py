"""Sparse weights: which entries and outputs stay, and that the others make up for what is gone."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.sparsity import keep_rows, sparsify
from lrbo.layers.forms import KeptRows, SemiStructured, Sparse
from lrbo.layers.options import Option
from tests.factorization.test_bases import correlated, drawn, output_error

both = pytest.mark.parametrize(("form", "percent"), [(SemiStructured(), None), (Sparse(), 50)])


@pytest.mark.parametrize("with_moment", [False, True])
@pytest.mark.parametrize("percent", [25, 50, 70])
def test_every_row_keeps_its_percentage(percent: int, with_moment: bool) -> None:
    moment = correlated(64) if with_moment else None
    base = sparsify(drawn(5, 64), Sparse(), percent, dtype=torch.float64, moment=moment)
    kept = base.weight(torch.float64) != 0
    assert kept.sum(1).tolist() == [64 * percent // 100] * 5
    assert base.family == Option("sparse", (percent,))


@pytest.mark.parametrize("with_moment", [False, True])
def test_of_four_entries_two_are_kept(with_moment: bool) -> None:
    moment = correlated(64) if with_moment else None
    base = sparsify(drawn(5, 64), SemiStructured(), None, dtype=torch.float64, moment=moment)
    kept = (base.weight(torch.float64) != 0).view(5, -1, 4)
    assert bool((kept.sum(2) == 2).all())


@both
def test_with_uncorrelated_inputs_the_largest_stay_as_they_are(
    form: SemiStructured | Sparse, percent: int | None
) -> None:
    weight, moment = drawn(6, 32), 2.0 * torch.eye(32, dtype=torch.float64)
    alone = sparsify(weight, form, percent, dtype=torch.float64).weight(torch.float64)
    base = sparsify(weight, form, percent, dtype=torch.float64, moment=moment)
    assert torch.allclose(base.weight(torch.float64), alone, atol=1e-6)
    groups = weight.view(6, -1, 4) if percent is None else weight[:, None]
    count = groups.shape[2] // 2
    smallest = groups.abs().topk(count, 2).values.amin(2, keepdim=True)
    expected = torch.where(groups.abs() >= smallest, groups, 0.0).view(6, 32)
    assert torch.allclose(alone, expected, atol=1e-6)


@both
def test_with_correlated_inputs_the_others_make_up_for_what_is_gone(
    form: SemiStructured | Sparse, percent: int | None
) -> None:
    weight, moment = drawn(24, 256), correlated(256)
    errors = [
        output_error(
            weight,
            sparsify(weight, form, percent, dtype=torch.float64, moment=each).weight(torch.float64),
            moment,
        )
        for each in (None, moment)
    ]
    assert errors[1] < 0.6 * errors[0]


def test_sparsegpt_is_the_textbook_algorithm() -> None:
    """Column by column with the whole inverse, against panels and a triangular root."""
    weight, moment, damping = drawn(6, 64, seed=3), correlated(64, seed=4), 0.01
    damped = moment + damping * moment.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    for form, percent in ((SemiStructured(), None), (Sparse(), 50)):
        rest, left = weight.clone(), list(range(64))
        first = torch.linalg.inv(damped).diagonal()
        kept = _smallest_go(weight.square() / first, 32)
        for column in range(64):
            inverse = torch.linalg.inv(damped[left][:, left])
            if percent is None and column % 4 == 0:
                # Of a column after those before it in its group are gone, as its root has it.
                diagonal = [torch.linalg.inv(damped[left[i:]][:, left[i:]])[0, 0] for i in range(4)]
                four = rest[:, column : column + 4].square() / torch.stack(diagonal)
                kept[:, column : column + 4] = _smallest_go(four, 2)
            error = torch.where(kept[:, column], 0.0, rest[:, column])
            rest[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
            left = left[1:]
        base = sparsify(weight, form, percent, dtype=torch.float64, moment=moment, damping=damping)
        actual = base.weight(torch.float64)
        assert torch.equal(actual != 0, kept)
        assert float((actual - torch.where(kept, rest, 0.0)).abs().max()) < 1e-4  # float32


def _smallest_go(saliency: Tensor, count: int) -> Tensor:
    order = saliency.argsort(1, descending=True)
    return torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, order[:, :count], True)


@pytest.mark.parametrize("percent", [25, 50])
def test_outputs_share_their_entries_by_what_their_gradients_weigh(percent: int) -> None:
    """As many in all, in far less predicted loss, and no other number of tensors."""
    weight, moment = drawn(12, 64), correlated(64)
    gradient = torch.logspace(1.0, -2.0, 12, dtype=torch.float64).diag()
    alike, shared = (
        sparsify(weight, Sparse(), percent, dtype=torch.float64, moment=moment, gradient=each)
        for each in (None, gradient)
    )
    counts = (shared.weight(torch.float64) != 0).sum(1)
    assert int(counts.sum()) == 12 * (64 * percent // 100)
    assert int(counts[:4].min()) > int(counts[-4:].max())
    assert {n: t.shape for n, t in shared.tensors.items()} == {
        n: t.shape for n, t in alike.tensors.items()
    }
    losses = []
    for base in (shared, alike):
        rest = weight - base.weight(torch.float64)
        losses.append(float(torch.trace(gradient @ rest @ moment @ rest.T)))
    assert losses[0] < 0.8 * losses[1]


def test_the_outputs_that_stay_are_those_whose_absence_costs_most() -> None:
    weight, moment = drawn(10, 16), correlated(16)
    scale = drawn(10, 10, seed=6)
    gradient = scale @ scale.T
    base = keep_rows(weight, KeptRows(), 30, dtype=torch.float64, moment=moment, gradient=gradient)
    whole = float(torch.trace(gradient @ weight @ moment @ weight.T))
    gains = []
    for row in range(10):
        rest = weight.clone()
        rest[row] = 0.0
        gains.append(whole - float(torch.trace(gradient @ rest @ moment @ rest.T)))
    expected = sorted(np.argsort(gains)[-3:].tolist())
    assert base.tensors["rows"].tolist() == expected
    actual = base.weight(torch.float64)
    assert torch.equal(actual[expected], weight[expected])
    assert int((actual != 0).any(1).sum()) == 3
    alone = keep_rows(weight, KeptRows(), 30, dtype=torch.float64)
    largest = weight.norm(dim=1).topk(3).indices.sort().values
    assert torch.equal(alone.tensors["rows"].long(), largest)


def test_the_plan_gives_gradients_to_sparse_forms_where_they_are_known() -> None:
    weight, gradient = drawn(10, 16), torch.logspace(1.0, -2.0, 10, dtype=torch.float64).diag()
    statistics = {
        Statistic.INPUT_MEAN: torch.zeros(16, dtype=torch.float64),
        Statistic.INPUT_COVARIANCE: correlated(16),
    }
    options = BaseOptions(percentages=(50,), row_percentages=(20, 40))
    plan = BasePlan(("sparse", "sparse_rows"), options)
    alike, *rows = plan.make(weight, statistics, torch.float32)
    assert [base.family for base in rows] == [Option("sparse_rows", (n,)) for n in (20, 40)]
    known = statistics | {Statistic.OUTPUT_GRADIENT: gradient}
    shared, *others = plan.make(weight, known, torch.float32)
    assert (alike.weight(torch.float64) != 0).sum(1).tolist() == [8] * 10
    assert (shared.weight(torch.float64) != 0).sum(1).tolist() != [8] * 10
    assert others[0].tensors["rows"].tolist() == [0, 1]
    nothing = statistics | {Statistic.OUTPUT_GRADIENT: 0 * gradient}
    again, *_ = plan.make(weight, nothing, torch.float32)
    assert torch.equal(again.tensors["values"], alike.tensors["values"])
