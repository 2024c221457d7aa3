"""Some rows of a low-rank matrix, and the others as combinations of them: the pivoted form."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lrbo.linalg import require_finite

# Largest coefficient that is left. What rounding adds to an output grows with the length of its
# row of coefficients, and swaps shorten it: from 12.1 at a bound of 1.25 to 10.6 at 1.05 for a
# random (4096, 2973), with 49 swaps instead of 22. At 1.02 it is 9.9 with 102, which take longer.
GROWTH_BOUND = 1.05
# Rank-one updates between two fresh computations of the coefficients.
UPDATES = 64
EPSILON = torch.finfo(torch.float64).eps
# Largest entry of U, in units of its column, and of the inverse of L with which an elimination is
# trusted with 12 digits. Matrices of up to 11008 x 2973 reached 68 and 3; only ones made for it
# reach more.
ELIMINATION_LIMIT = 1e3


class DependentColumnsWarning(UserWarning):
    """Some columns add nothing to those before them: a smaller rank gives the same layer."""


@dataclass(frozen=True)
class Pivoting:
    """A product ``left @ right`` as some of its rows and combinations of these.

    Row ``pivots[i]`` of the product is ``rows[i]``, row ``others[i]`` is
    ``coefficients[i] @ rows``. This is the lossless form of Zhao et al., *PIFA: Pivoting
    Factorization* (ICML 2025): ``r * (m + n) - r * r`` numbers.

    Attributes:
        order: ``(m,)``, int64: the ``r`` pivots, then the other rows, each part ascending.
        rows: ``(r, n)``, float64.
        coefficients: ``(m - r, r)``, float64.
        growth: Largest absolute coefficient, at most ``GROWTH_BOUND``.
        swaps: Pivots that were exchanged after the elimination.
    """

    order: Int[Tensor, " m"]
    rows: Float[Tensor, "r n"]
    coefficients: Float[Tensor, "others r"]
    growth: float
    swaps: int

    @property
    def pivots(self) -> Int[Tensor, " r"]:
        """Return the rows that are kept."""
        return self.order[: len(self.rows)]

    @property
    def others(self) -> Int[Tensor, " others"]:
        """Return the rows that are combinations of the pivots."""
        return self.order[len(self.rows) :]


def pivot(left: Float[Tensor, "m r"], right: Float[Tensor, "r n"], name: str = "left") -> Pivoting:
    """Choose pivot rows of a product so that no coefficient exceeds ``GROWTH_BOUND``.

    Gaussian elimination with partial pivoting finds the first pivots. Then the pivot and the
    row of the largest coefficient change places until none is above the bound (maxvol;
    Goreinov et al., *How to find a good submatrix*, 2010). Each swap multiplies the volume of the
    pivot rows by more than the bound, so it ends; and it ends only after the coefficients were
    computed afresh and lie within the bound.

    Both work on the unit lower trapezoidal factor, whose columns are independent whatever
    ``left`` is. So the form is as exact for a ``left`` of lower rank; it then holds more pivots
    than were needed, which is warned of. A matrix on which elimination would lose digits is
    begun with an orthonormal basis of its columns instead, which takes longer.

    Args:
        left: ``(m, r)`` with ``r <= m``, any floating dtype; not modified.
        right: ``(r, n)``, on the same device.
        name: What it is, for messages.

    Returns:
        The form, in float64, on the device of ``left`` (on the CPU where that has no float64).

    Raises:
        StatisticsError: If an entry is not finite.
        ValueError: If ``left`` has more columns than rows.

    Note:
        The time is that of about ``6 m r^2`` operations: on one busy core 0.2 s for
        ``(1536, 417)`` and a minute for ``(11008, 2973)`` (``experiments/bench_pivoted``).
    """
    count, rank = left.shape
    if rank > count:
        raise ValueError(
            f"{name} has {rank} columns and {count} rows; a pivoted form has at most as many "
            "pivots as there are rows: lower the rank."
        )
    require_finite(name, left)
    require_finite(f"the right factor of {name}", right)
    work = torch.device("cpu") if left.device.type == "mps" else left.device  # has no float64
    exact = left.detach().to(work, torch.float64)
    basis, place = _start(exact, name)
    swaps = 0
    while True:  # afresh each time, because rank-one updates drift
        coefficients = _combinations(basis[place[:rank]], basis[place[rank:]])
        done = _swap(coefficients, place)
        if not done:
            break
        swaps += done
    pivots, by_pivot = place[:rank].sort()
    others, by_other = place[rank:].sort()
    coefficients = coefficients[by_other][:, by_pivot]
    return Pivoting(
        order=torch.cat([pivots, others]),
        rows=exact[pivots] @ right.detach().to(work, torch.float64),
        coefficients=coefficients,
        growth=float(coefficients.abs().max()) if coefficients.numel() else 0.0,
        swaps=swaps,
    )


def _start(
    exact: Float[Tensor, "m r"], name: str
) -> tuple[Float[Tensor, "m r"], Int[Tensor, " m"]]:
    """Return independent columns that span those of ``exact``, and rows to begin with.

    Returns:
        ``(m, r)``, a basis, and ``(m,)``, first the pivots, then the other rows. The pivot rows
        of the basis are well conditioned.
    """
    rank = exact.shape[1]
    packed, exchanges, _ = torch.linalg.lu_factor_ex(exact)  # _ex: takes singular matrices too
    upper = packed[:rank].triu().abs()
    scale = exact.abs().amax(0) if exact.numel() else exact.new_zeros(rank)
    dependent = int((upper.diagonal() <= len(exact) * EPSILON * scale).sum())
    if dependent:
        warnings.warn(
            f"{name}: {dependent} of {rank} columns depend on those before them. The pivoted form "
            f"is exact, but rank {rank - dependent} would store less and answer the same.",
            DependentColumnsWarning,
            stacklevel=3,
        )
    lower = packed.tril(-1)
    lower.diagonal().fill_(1.0)
    unit = torch.eye(rank, dtype=exact.dtype, device=exact.device)
    inverse = torch.linalg.solve_triangular(lower[:rank], unit, upper=False, unitriangular=True)
    if bool((upper > ELIMINATION_LIMIT * scale).any() | (inverse.abs() > ELIMINATION_LIMIT).any()):
        return _start_orthonormal(exact)
    order = list(range(len(exact)))
    for row, other in enumerate(exchanges.tolist()):  # LAPACK counts from 1
        order[row], order[other - 1] = order[other - 1], order[row]
    place = torch.tensor(order, dtype=torch.int64, device=exact.device)
    basis = torch.empty_like(lower)
    basis[place] = lower
    return basis, place


def _start_orthonormal(
    exact: Float[Tensor, "m r"],
) -> tuple[Float[Tensor, "m r"], Int[Tensor, " m"]]:
    """Do as :func:`_start` by pivoted Gram-Schmidt, which no matrix that we know of defeats."""
    basis, _ = torch.linalg.qr(exact)
    rest, is_pivot = basis.clone(), torch.zeros(len(exact), dtype=torch.bool, device=exact.device)
    pivots = []
    for _ in range(exact.shape[1]):
        row = int(rest.square().sum(1).argmax())
        direction = rest[row] / rest[row].norm()
        rest.addr_(rest @ direction, direction, alpha=-1.0)
        rest[row] = 0.0
        is_pivot[row] = True
        pivots.append(row)
    chosen = torch.tensor(pivots, dtype=torch.int64, device=exact.device)
    return basis, torch.cat([chosen, (~is_pivot).nonzero()[:, 0]])


def _combinations(
    pivots: Float[Tensor, "r r"], others: Float[Tensor, "others r"]
) -> Float[Tensor, "others r"]:
    """Return ``others pivots^-1``; one step of refinement saves a digit of a large matrix."""
    packed, exchanges = torch.linalg.lu_factor(pivots)
    found: Tensor = torch.linalg.lu_solve(packed, exchanges, others, left=False)
    rest = others - found @ pivots
    return found.add_(torch.linalg.lu_solve(packed, exchanges, rest, left=False))


def _swap(coefficients: Float[Tensor, "others r"], place: Int[Tensor, " m"]) -> int:
    """Exchange pivots until no coefficient is above the bound, or the updates are used up.

    Args:
        coefficients: Updated in place.
        place: Pivots, then others; updated in place.

    Returns:
        The number of swaps; 0 if the coefficients were within the bound.
    """
    if not coefficients.numel():
        return 0
    rank = coefficients.shape[1]
    for done in range(UPDATES):
        i, j = divmod(int(coefficients.abs().argmax()), rank)
        largest = float(coefficients[i, j])
        if abs(largest) <= GROWTH_BOUND:
            return done
        row, column = coefficients[i].clone(), coefficients[:, j].clone()
        coefficients.addr_(column, row, alpha=-1.0 / largest)
        coefficients[i] = -row / largest
        coefficients[:, j] = column / largest
        coefficients[i, j] = 1.0 / largest
        place[[j, rank + i]] = place[[rank + i, j]]
    return UPDATES
