"""Kronecker sums: the terms of a weight, what every first few of them leave, and their layers."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrbo.calibration.statistics import Statistic
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.kronecker import KroneckerSum, inner_products, kronecker_terms
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prepared import UnitFactors, prepared_of
from lrbo.layers.kronecker import KroneckerLinear
from lrbo.layers.options import Option
from tests.support import reference

SHAPE = (12, 18)
LEFTS = [(6, 18), (12, 9), (6, 9), (4, 3), (2, 1)]
EXACT = 1e-9  # relative, in float64: sums of a few hundred products

every_left = pytest.mark.parametrize("left", LEFTS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, seed: int) -> Tensor:
    rows = drawn(2 * size, size, seed=seed) * torch.linspace(2.0, 0.2, size, dtype=torch.float64)
    return rows.T @ rows / len(rows) + 0.2


def summed(terms: LowRankFactors, left: tuple[int, int], count: int) -> Tensor:
    """Add Kronecker products one by one."""
    block = SHAPE[0] // left[0], SHAPE[1] // left[1]
    total = torch.zeros(SHAPE, dtype=torch.float64)
    for a, b in zip(terms.left.T[:count].double(), terms.right[:count].double(), strict=True):
        total += torch.kron(a.reshape(left), b.reshape(block))
    return total


def rearranged(weight: Tensor, left: tuple[int, int]) -> Tensor:
    """Return a row per entry of A: the block of the weight there (Van Loan and Pitsianis)."""
    block = SHAPE[0] // left[0], SHAPE[1] // left[1]
    return torch.stack(
        [
            weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]].flatten()
            for i in range(left[0])
            for j in range(left[1])
        ]
    )


@every_left
@pytest.mark.parametrize("is_weighed", [False, True])
def test_every_loss_is_the_quadratic_form_of_what_the_terms_leave(
    left: tuple[int, int], is_weighed: bool
) -> None:
    weight, gradient, inputs = drawn(*SHAPE), moment(12, 1), moment(18, 2)
    terms = kronecker_terms(weight, left, gradient, inputs, is_weighed=is_weighed)
    assert terms.loss is not None
    size = left[0] * left[1]
    assert terms.max_rank == (weight.numel() - 1) // (size + weight.numel() // size)
    for count in range(terms.max_rank + 1):
        rest = weight - summed(terms, left, count)
        expected = float(torch.trace(gradient @ rest @ inputs @ rest.T)) / 2
        assert abs(float(terms.loss[count]) - expected) < EXACT * float(terms.loss[0])
    assert bool((terms.loss.diff() < 0).all())
    assert torch.equal(terms.loss, terms.tail)


@every_left
def test_without_moments_terms_are_those_of_van_loan(left: tuple[int, int]) -> None:
    weight = drawn(*SHAPE)
    terms = kronecker_terms(weight, left, None, None)
    values = torch.linalg.svdvals(rearranged(weight, left)).square()
    expected = [float(values[count:].sum()) for count in range(terms.max_rank + 1)]
    assert terms.tail.tolist() == pytest.approx(expected, rel=EXACT)
    assert terms.loss is None


@every_left
def test_in_moments_that_are_products_a_term_is_the_best_there_is(left: tuple[int, int]) -> None:
    """The optimum: an SVD between the roots, written out with Kronecker products."""
    weight = drawn(*SHAPE)
    block = SHAPE[0] // left[0], SHAPE[1] // left[1]
    parts = [
        [moment(size, seed) for seed, size in enumerate(sizes)]
        for sizes in zip(left, block, strict=True)
    ]
    gradient, inputs = (torch.kron(*own) for own in parts)
    roots = [torch.kron(*map(torch.linalg.cholesky, own)) for own in parts]
    values = torch.linalg.svdvals(rearranged(roots[0].T @ weight @ roots[1], left)).square() / 2
    terms = kronecker_terms(weight, left, gradient, inputs)
    assert terms.loss is not None
    assert float(terms.loss[0]) == pytest.approx(float(values.sum()), rel=EXACT)
    for count in range(1, terms.max_rank + 1):
        best = float(values[count:].sum())
        assert float(terms.loss[count]) >= best * (1 - EXACT)
        # By two sweeps, one term after the other.
        assert float(terms.loss[0] - terms.loss[count]) >= 0.9 * float(values[:count].sum())


@pytest.mark.parametrize("left", [(6, 18), (12, 9), (6, 9), (2, 1), (1, 3)])
def test_no_change_of_one_side_of_the_first_term_leaves_less(left: tuple[int, int]) -> None:
    """A fixed point of alternating least squares, solved with the whole normal equations."""
    weight, gradient, inputs = drawn(*SHAPE), moment(12, 1), moment(18, 2)
    terms = kronecker_terms(weight, left, gradient, inputs)
    block = SHAPE[0] // left[0], SHAPE[1] // left[1]
    a, b = terms.left[:, 0].reshape(left), terms.right[0].reshape(block)
    roots = torch.linalg.cholesky(gradient), torch.linalg.cholesky(inputs)
    target = (roots[0].T @ weight @ roots[1]).flatten()

    def best(images: list[Tensor]) -> float:
        columns = torch.stack([(roots[0].T @ each @ roots[1]).flatten() for each in images], 1)
        solved = torch.linalg.lstsq(columns, target[:, None]).solution
        return float((columns @ solved - target[:, None]).square().sum()) / 2

    def units(shape: tuple[int, int]) -> list[Tensor]:
        size = shape[0] * shape[1]
        return [*torch.eye(size, dtype=torch.float64).view(size, *shape)]

    assert terms.loss is not None
    for images in (
        [torch.kron(each, b) for each in units(left)],
        [torch.kron(a, each) for each in units(block)],
    ):
        gain = float(terms.loss[0] - terms.loss[1])
        assert float(terms.loss[0]) - best(images) <= 1.2 * gain


def test_terms_in_the_moments_leave_far_less_than_those_of_the_weight_alone() -> None:
    weight = drawn(*SHAPE)
    gradient, inputs = (
        torch.logspace(1.0, -1.0, size, dtype=torch.float64).diag() + 0.01 * moment(size, 5)
        for size in SHAPE
    )
    for left in LEFTS[:4]:
        losses = [
            kronecker_terms(weight, left, gradient, inputs, is_weighed=flag).loss
            for flag in (True, False)
        ]
        assert losses[0] is not None
        assert losses[1] is not None
        assert float(losses[0][1]) < 0.9 * float(losses[1][1])


def test_inner_products_do_not_depend_on_how_many_rows_are_taken_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left, right, gradient, inputs = drawn(3, 4, 3), drawn(3, 3, 6), moment(12, 1), moment(18, 2)
    terms = [torch.kron(a, b) for a, b in zip(left, right, strict=True)]
    expected = [[float((gradient @ a @ inputs * b).sum()) for b in terms] for a in terms]
    for chunk in (1, 2 * 3 * 3 * 18, 2**22):
        monkeypatch.setattr("lrbo.factorization.kronecker.CHUNK", chunk)
        actual = inner_products(left, right, gradient, inputs)
        assert np.allclose(actual.numpy(), expected, rtol=EXACT)


def test_of_a_weight_that_is_one_term_hardly_anything_is_left() -> None:
    weight = torch.kron(drawn(4, 3), drawn(3, 6, seed=1))
    terms = kronecker_terms(weight, (4, 3), moment(12, 1), moment(18, 2))
    assert terms.loss is not None
    assert float(terms.loss[1]) < 0.01 * float(terms.loss[0])
    assert bool(torch.isfinite(terms.left).all())


def test_a_weight_of_zeros_has_terms_of_zeros() -> None:
    terms = kronecker_terms(0 * drawn(*SHAPE), (4, 3), moment(12, 1), 1e-9 * moment(18, 2))
    assert not terms.left.any()
    assert not terms.tail.any()


# --- layers --------------------------------------------------------------------------------------


def some_sum(*, bias: bool, center: bool = False) -> KroneckerSum:
    terms = kronecker_terms(drawn(*SHAPE), (4, 3), moment(12, 1), moment(18, 2))
    offset = drawn(12, seed=8) if bias else None
    middle = drawn(18, seed=9) if center else None
    return KroneckerSum(SHAPE, (4, 3), terms, offset, middle)


@pytest.mark.parametrize("tokens", [0, 1, 10**6])
@pytest.mark.parametrize(("bias", "center"), [(False, False), (True, False), (True, True)])
def test_a_trial_and_the_stored_layer_are_one_function(
    tokens: int, bias: bool, center: bool
) -> None:
    own, buffers = some_sum(bias=bias, center=center), dict[str, Tensor]()
    for count in range(1, own.rest.max_rank + 1):
        weight, added = reference.affine_of(own.module(count), SHAPE[1])
        assert np.abs(weight - summed(own.rest, (4, 3), count).numpy()).max() < EXACT
        expected = np.zeros(12) if own.offset is None else own.offset.numpy()
        if own.center is not None:
            expected = expected - weight @ own.center.numpy()
        assert np.abs(added - expected).max() < EXACT
        trial = own.trial_module("unit", count, tokens, buffers)
        again, offset = reference.affine_of(trial, SHAPE[1])
        assert np.abs(again - weight).max() < EXACT
        assert np.abs(offset - added).max() < EXACT
    # Where the sum takes fewer multiply-adds as one weight, it is made one, in a buffer.
    assert type(trial) is (nn.Linear if tokens == 10**6 else KroneckerLinear)
    assert list(buffers) == (["unit"] if tokens == 10**6 else [])
    for count in (0, own.rest.max_rank + 1):
        with pytest.raises(ValueError, match=rf"{count} terms are outside 1\.\."):
            own.trial_module("unit", count, tokens, buffers)


def test_terms_come_back_from_their_tensors_and_others_are_refused() -> None:
    rank = LowRankFactors(drawn(12, 3).float(), drawn(3, 18).float(), torch.zeros(4))
    own = some_sum(bias=True, center=True).to(dtype=torch.float32, device=torch.device("cpu"))
    unit = UnitFactors(rank, {Option("kronecker", (4, 3)): own})
    tensors = unit.tensors()
    again = prepared_of(tensors)
    assert isinstance(again, UnitFactors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.tensors().items())
    part = again.only({Option("kronecker", (4, 3)): 2}, torch.bfloat16, torch.device("cpu"))
    assert part is not None
    assert part.low_rank is None
    option = Option("kronecker", (4, 3, 2))
    trial, stored = part.trial_module("u", option, 1, {}), unit.stored("u", option, torch.bfloat16)
    for name, tensor in stored.state_dict().items():
        assert torch.equal(trial.state_dict()[name], tensor), name
    moved = {name.replace("4 3", "6 9"): tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"Kronecker terms of sizes \[12, 18, 12, 18\], expected"):
        prepared_of(moved)


def test_the_plan_reads_the_moments_and_takes_over_the_bias() -> None:
    weight, mean = drawn(*SHAPE), drawn(18, seed=4)
    statistics = {
        Statistic.INPUT_MEAN: mean,
        Statistic.INPUT_COVARIANCE: moment(18, 2),
        Statistic.OUTPUT_GRADIENT: moment(12, 1),
    }
    plan = BasePlan(("kronecker",), BaseOptions(blocks=((3, 6), (2, 1), (5, 1))))
    offset = drawn(12, seed=5)
    for center in (None, mean):
        factors = LowRankFactors(weight, torch.eye(18).double(), torch.zeros(19), offset, center)
        sums = plan.sums(weight, factors, statistics)
        assert list(sums) == [Option("kronecker", (4, 3)), Option("kronecker", (6, 18))]
        inputs = moment(18, 2) + (mean.outer(mean) if center is None else 0)
        gradient = torch.from_numpy(
            reference.shrunk(reference.numpy_of(statistics[Statistic.OUTPUT_GRADIENT]), 0.01)
        )
        for own in sums.values():
            assert own.offset is offset
            assert own.center is center
            rest = weight - own.module(1).dense_weight()
            expected = float(torch.trace(gradient @ rest @ inputs @ rest.T)) / 2
            assert own.rest.loss is not None
            assert float(own.rest.loss[1]) == pytest.approx(expected, rel=EXACT)


def test_where_nothing_passes_terms_are_those_of_the_weight_and_cost_nothing() -> None:
    weight = drawn(*SHAPE)
    statistics = {
        Statistic.INPUT_MEAN: torch.zeros(18, dtype=torch.float64),
        Statistic.INPUT_COVARIANCE: torch.zeros(18, 18, dtype=torch.float64),
        Statistic.OUTPUT_GRADIENT: moment(12, 1),
    }
    plan = BasePlan(("kronecker",), BaseOptions(blocks=((3, 6),)))
    factors = LowRankFactors(weight, torch.eye(18).double(), torch.zeros(19))
    (own,) = plan.sums(weight, factors, statistics).values()
    plain = kronecker_terms(weight, (4, 3), None, None)
    assert torch.allclose(own.rest.left, plain.left)
    assert own.rest.loss is not None
    assert not own.rest.loss.any()
