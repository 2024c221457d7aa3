"""Pivot rows and coefficients are the product again, for any matrix, within a stated bound."""

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrbo.errors import StatisticsError
from lrbo.layers import pivoted
from lrbo.layers.pivoted import GROWTH_BOUND, DependentColumnsWarning, Pivoting, pivot

TOLERANCE = {
    # float64, relative to the largest |left| @ |right|: sums of up to 60 products
    "product": 1e-12,
}


def draw(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def product_of(form: Pivoting) -> Tensor:
    """Put the rows of a form where they belong."""
    actual = torch.full((len(form.order), form.rows.shape[1]), torch.nan, dtype=torch.float64)
    actual[form.order] = torch.cat([form.rows, form.coefficients @ form.rows])
    return actual


def check(left: Tensor, right: Tensor, form: Pivoting) -> None:
    """Hold all that the docstring promises."""
    rows, rank = left.shape
    assert form.rows.shape == (rank, right.shape[1])
    assert form.coefficients.shape == (rows - rank, rank)
    assert form.rows.dtype == form.coefficients.dtype == torch.float64
    assert form.order.sort().values.tolist() == list(range(rows))
    for part in (form.order[:rank], form.order[rank:]):
        assert part.tolist() == sorted(part.tolist())
    largest = form.coefficients.abs().max() if form.coefficients.numel() else 0.0
    assert float(largest) <= GROWTH_BOUND
    exact = left.double() @ right.double()
    unit = (left.double().abs() @ right.double().abs()).max() if left.numel() else 0.0
    assert torch.isfinite(product_of(form)).all()
    assert float((product_of(form) - exact).abs().max()) <= TOLERANCE["product"] * unit


@st.composite
def factors(draw_one: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw factors: plain, scaled by column or row, with rows that nearly depend, of integers."""
    rows = draw_one(st.integers(1, 24))
    rank = draw_one(st.integers(0, rows))
    columns = draw_one(st.integers(1, 12))
    seed = draw_one(st.integers(0, 2**32))
    left, right = draw(rows, rank, seed=seed), draw(rank, columns, seed=seed + 1)
    kind = draw_one(st.sampled_from(["plain", "columns", "rows", "near", "integer", "signs"]))
    if kind == "columns":  # as the square roots of singular values scale them
        left = left * 10.0 ** (-6 * torch.arange(rank) / max(rank, 1))
    elif kind == "rows":
        left = left * 10.0 ** (6 * draw(rows, 1, seed=seed + 2)).clamp(-6, 6)
    elif kind == "near" and rank:
        source = torch.arange(rows) % max(1, rank // 2)
        left = left[source] + 1e-7 * left
    elif kind == "integer":
        left = left.round()
    elif kind == "signs":
        left = left.sign()
    return left, right


@given(factors())
@settings(max_examples=150, deadline=None)
def test_the_form_is_the_product_within_the_bound(pair: tuple[Tensor, Tensor]) -> None:
    left, right = pair
    before = left.clone(), right.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DependentColumnsWarning)  # integers may well depend
        form = pivot(left, right)
        second = pivot(left, right)
    check(left, right, form)
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])
    assert torch.equal(form.coefficients, second.coefficients)
    assert torch.equal(form.order, second.order)


@pytest.fixture
def swaps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of swaps between two computations of the coefficients, in order."""
    counts: list[int] = []
    swap = pivoted._swap

    def counted(coefficients: Tensor, order: Tensor) -> int:
        counts.append(swap(coefficients, order))
        return counts[-1]

    monkeypatch.setattr(pivoted, "_swap", counted)
    return counts


@pytest.mark.parametrize("shape", [(96, 64, 48), (64, 32, 160), (300, 40, 20)])
def test_elimination_alone_breaks_the_bound_and_swaps_mend_it(
    shape: tuple[int, int, int], swaps: list[int]
) -> None:
    rows, rank, columns = shape
    actual = [
        pivot(draw(rows, rank, seed=seed), draw(rank, columns, seed=seed)) for seed in range(8)
    ]
    assert sum(swaps) > 0, "the case must need swaps"
    for seed, form in enumerate(actual):
        check(draw(rows, rank, seed=seed), draw(rank, columns, seed=seed), form)


def test_more_swaps_than_one_round_of_updates_holds(
    monkeypatch: pytest.MonkeyPatch, swaps: list[int]
) -> None:
    left, right = draw(300, 40), draw(40, 20)
    expected = pivot(left, right)
    assert (count := sum(swaps)) > 1
    swaps.clear()
    monkeypatch.setattr(pivoted, "UPDATES", 1)
    actual = pivot(left, right)
    check(left, right, actual)
    assert torch.equal(actual.order, expected.order)
    assert swaps == [*[1] * count, 0]


@pytest.mark.parametrize("rank", [0, 7])
def test_rank_0_and_full_rank_need_no_coefficients(rank: int, swaps: list[int]) -> None:
    left, right = draw(7, rank), draw(rank, 9)
    form = pivot(left, right)
    check(left, right, form)
    assert form.coefficients.numel() == 0
    assert swaps == [0]
    assert len(form.rows) == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_of_less_precision_are_taken_as_the_numbers_they_are(dtype: torch.dtype) -> None:
    left, right = draw(20, 8).to(dtype), draw(8, 11).to(dtype)
    check(left, right, pivot(left, right))


# --- matrices that elimination alone does not manage ---------------------------------------------


def _wilkinson(last: float) -> Tensor:
    """Return the matrix on which partial pivoting doubles the last column in every step."""
    square = torch.eye(60, dtype=torch.float64) - torch.ones(60, 60, dtype=torch.float64).tril(-1)
    square[:, -1] = last
    return torch.cat([square, 0.9 * (2 * torch.rand(20, 60, generator=_seeded()).double() - 1)])


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("last", [1.0, 0.5])
def test_where_elimination_loses_all_digits_another_start_is_used(
    last: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    slow = pivoted._start_orthonormal

    def watched(exact: Tensor) -> object:
        started.append(True)
        return slow(exact)

    monkeypatch.setattr(pivoted, "_start_orthonormal", watched)
    left, right = _wilkinson(last), draw(60, 9)
    check(left, right, pivot(left, right))
    assert started
    pivot(draw(80, 60), right)
    assert len(started) == 1


def test_both_starts_end_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = draw(96, 64), draw(64, 20)
    check(left, right, pivot(left, right))
    monkeypatch.setattr(pivoted, "ELIMINATION_LIMIT", 0.0)
    check(left, right, pivot(left, right))


# --- fewer directions than columns ---------------------------------------------------------------


def _zeros(left: Tensor) -> Tensor:
    left[:, 2:4] = 0.0
    return left


def _sums(left: Tensor) -> Tensor:
    left[:, 3] = left[:, 0] - left[:, 1]
    left[:, 5] = 2 * left[:, 2]
    return left


def _nothing(left: Tensor) -> Tensor:
    return left.mul_(0.0)


@pytest.mark.parametrize(("spoil", "count"), [(_zeros, 2), (_sums, 2), (_nothing, 6)])
@pytest.mark.parametrize("rows", [6, 15])
def test_columns_that_depend_are_counted_in_a_warning_and_the_form_is_exact(
    spoil: Callable[[Tensor], Tensor], count: int, rows: int
) -> None:
    left, right = spoil(draw(rows, 6)), draw(6, 10)
    message = rf"gate at rank 6: {count} of 6 columns depend .* rank {6 - count} would store less"
    with pytest.warns(DependentColumnsWarning, match=message):
        form = pivot(left, right, "gate at rank 6")
    check(left, right, form)


def test_columns_that_nearly_depend_are_not_warned_of() -> None:
    left, right = draw(30, 10), draw(10, 8)
    left[:, 7] = left[:, 1] + 1e-9 * left[:, 7]
    check(left, right, pivot(left, right))


# --- refusals ------------------------------------------------------------------------------------


def test_more_columns_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"up_proj has 6 columns and 5 rows; .*lower the rank"):
        pivot(draw(5, 6), draw(6, 9), "up_proj")


@pytest.mark.parametrize("bad", ["left", "right"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(bad: str, value: float) -> None:
    pair = {"left": draw(5, 3), "right": draw(3, 9)}
    pair[bad][1, 1] = value
    name = "q_proj" if bad == "left" else "the right factor of q_proj"
    with pytest.raises(StatisticsError, match=name):
        pivot(pair["left"], pair["right"], "q_proj")


@pytest.mark.gpu
def test_on_a_gpu_the_form_is_made_there() -> None:
    left, right = draw(96, 64), draw(64, 20)
    form = pivot(left.to("cuda"), right.to("cuda"))
    assert {form.rows.device.type, form.order.device.type} == {"cuda"}
    moved = Pivoting(form.order.cpu(), form.rows.cpu(), form.coefficients.cpu())
    check(left, right, moved)
