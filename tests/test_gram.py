"""Gram matrices by panels of columns, against the product itself."""

import pytest
import torch

from lrbo.linalg import add_gram, mirror_upper
from tests.test_linalg import TOLERANCE, draw, relative


@pytest.mark.parametrize("width", [1, 7, 255, 256, 259, 301])
def test_panels_add_up_to_the_scaled_gram_matrix(width: int) -> None:
    """Widths on both sides of the limit above which panels are used, some not divisible."""
    accumulator = torch.zeros(width, width, dtype=torch.float64)
    expected = torch.zeros_like(accumulator)
    for seed, scale in enumerate((1.0, 0.25)):
        rows = draw(9, width, seed=seed)
        add_gram(accumulator, rows, scale)
        expected += scale * rows.T @ rows
    assert relative(mirror_upper(accumulator), expected) <= TOLERANCE["exact"]


@pytest.mark.parametrize("width", [7, 301])
def test_panels_add_weighted_squares_of_vectors(width: int) -> None:
    accumulator, rows = torch.zeros(width, width, dtype=torch.float64), draw(9, width)
    vectors, weights = draw(2, width, seed=1), torch.tensor([-3.0, 0.5], dtype=torch.float64)
    add_gram(accumulator, rows, vectors=vectors, weights=weights)
    expected = rows.T @ rows + vectors.T @ torch.diag(weights) @ vectors
    assert relative(mirror_upper(accumulator), expected) <= TOLERANCE["exact"]


def test_panels_leave_what_is_below_the_block_diagonal_untouched() -> None:
    accumulator = torch.zeros(256, 256, dtype=torch.float64)
    add_gram(accumulator, torch.ones(1, 256, dtype=torch.float64))
    untouched = int((accumulator == 0).sum())
    assert untouched == 32 * 32 * 28  # 28 of 64 blocks
    assert untouched == int((accumulator.tril(-1) == 0).sum()) - 256 * 257 // 2


def test_float32_rows_are_added_up_in_the_dtype_of_the_accumulator() -> None:
    rows = draw(50, 300).float()
    accumulator = torch.zeros(300, 300, dtype=torch.float64)
    for _ in range(3):
        add_gram(accumulator, rows)
    exact = 3 * rows.double().T @ rows.double()
    assert accumulator.dtype == torch.float64
    assert relative(mirror_upper(accumulator), exact) <= TOLERANCE["gram"]


def test_mirror_reads_the_upper_triangle_only() -> None:
    matrix = draw(6, 6)
    mirrored = mirror_upper(matrix)
    assert torch.equal(mirrored, mirrored.T)
    assert torch.equal(mirrored.triu(), matrix.triu())
    other = matrix.triu() + draw(6, 6, seed=9).tril(-1)
    assert torch.equal(mirror_upper(other), mirrored)
