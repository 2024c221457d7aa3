"""Some rows of a low-rank product, the others as combinations of them, and the layer of these."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lrbo.layers.low_rank import Bias, BiasFor, Left, ProductModule, Right, linear_of, require_plain
from lrbo.linalg import float64_device, require_finite
from lrbo.models.families import is_pointwise

# Largest coefficient that is left. Rounding grows with the length of a row of coefficients: for a
# random (4096, 2973) that is 12.1 at a bound of 1.25 after 22 swaps, and 10.6 at 1.05 after 49.
GROWTH_BOUND = 1.05
# Rank-one updates between two fresh computations of the coefficients.
UPDATES = 64
EPSILON = torch.finfo(torch.float64).eps
# Largest entry of U, in units of its column, and of the inverse of L with which an elimination is
# trusted with 12 digits. Matrices of up to 11008 x 2973 reached 68 and 3.
ELIMINATION_LIMIT = 1e3


class Product(nn.Linear):
    """A linear map whose output may lie in memory by columns, all rows of one feature together.

    Features are then put in order by copying rows of memory, several times as fast on a CPU as
    moving elements within rows (``experiments/bench_speed``).
    """

    pointwise = False  # see PivotedLinear

    def forward(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """Apply the layer, which has no bias."""
        # A quantized or distributed weight is a tensor of its own kind, which may only be a factor
        # on the right.
        if by_columns(x, self.pointwise) and type(self.weight) in (nn.Parameter, Tensor):
            return nn.functional.linear(self.weight, x).T
        return super().forward(x)


def by_columns(x: Tensor, pointwise: bool) -> bool:
    """Whether a pivoted layer works by columns.

    What has to lie by rows in the end must be transposed, which pays for half precision on a CPU.
    """
    return pointwise or (x.device.type == "cpu" and x.element_size() == 2)


class PivotedLinear(ProductModule):
    """Some outputs are rows times the input, the others combinations of these outputs.

    It holds ``rank * (in + out) - rank**2`` parameters and multiplies as often; see
    :func:`pivot`. Both matrices are nn.Linear, so that adapters just work.

    Attributes:
        rows: ``in -> rank``, the pivot outputs.
        coefficients: ``rank -> out - rank``, the other outputs in terms of the pivot outputs.
        index: Where each output is among pivots and others, int32.
        pointwise: Whether outputs are only used elementwise, as by an activation function, so that
            they may lie in memory by columns; ``False`` is always right.
    """

    index: Tensor

    def __init__(
        self,
        rows: Float[Tensor, "r in"],
        coefficients: Float[Tensor, "others r"],
        index: Int[Tensor, " out"],
        bias: Bias,
    ) -> None:
        super().__init__(len(index), rows.shape[1], len(rows), rows)
        self.rows = linear_of(rows, None, Product)
        self.coefficients = linear_of(coefficients, None, Product)
        self.pointwise = False
        self.register_buffer("index", index)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    @override
    def of_product(
        cls, name: str, left: Left, right: Right, bias_for: BiasFor, dtype: torch.dtype
    ) -> PivotedLinear:
        form = pivot(left, right, f"{name} at rank {len(right)}")  # in float64
        rows = form.rows.to(left.device, dtype)
        coefficients = form.coefficients.to(left.device, dtype)
        index = form.order.argsort().to(left.device, torch.int32)

        def linear(x: Tensor) -> Tensor:
            pivots = rows.to(x.dtype) @ x
            return torch.cat([pivots, coefficients.to(x.dtype) @ pivots])[index]

        layer = cls(rows, coefficients, index, bias_for(linear, dtype))
        return layer.take_pointwise(is_pointwise(name))

    @classmethod
    @override
    def stand_in(cls, name: str, left: Left, right: Right, bias: Bias) -> PivotedLinear:
        # Choosing pivots takes seconds per layer, and the time of a product does not depend on
        # its elements. Outputs are gathered from all over the layer, as they are after a choice.
        rank = len(right)
        generator = torch.Generator().manual_seed(rank)
        index = torch.randperm(len(left), generator=generator, device="cpu")
        index = index.to(left.device, torch.int32)
        layer = cls(right, left[rank:].contiguous(), index, bias)
        return layer.take_pointwise(is_pointwise(name))

    @property
    def growth(self) -> float:
        """The largest absolute coefficient."""
        coefficients = self.coefficients.weight
        return float(coefficients.abs().max()) if coefficients.numel() else 0.0

    @override
    def dense_weight(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out in"]:
        rows = self.rows.weight.to(dtype)
        return torch.cat([rows, self.coefficients.weight.to(dtype) @ rows])[self.index]

    def take_pointwise(self, pointwise: bool) -> PivotedLinear:
        """Set ``pointwise``, here and in both matrices, and return the layer."""
        self.pointwise = self.rows.pointwise = self.coefficients.pointwise = pointwise
        return self

    @override
    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        pivots = self.rows(x.reshape(-1, x.shape[-1]))
        others = self.coefficients(pivots)
        if by_columns(x, self.pointwise):
            result = torch.cat([pivots.T, others.T]).index_select(0, self.index).T
            if not self.pointwise:
                result = result.contiguous()
        else:
            both = torch.cat([pivots, others], -1)
            if x.device.type == "cpu":  # there index_select takes up to ten times as long
                result = both.gather(-1, self.index.long().expand_as(both))
            else:
                result = both.index_select(-1, self.index)
        if self.bias is not None:
            result = result.add_(self.bias)
        return result.view(*x.shape[:-1], len(self.index))

    @override
    def look_up(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        require_plain(self.rows, self.coefficients)
        at = self.index[ids].long()
        is_pivot = at < self.rank
        shares = self.rows.weight.new_zeros(len(at), self.rank)
        shares[is_pivot, at[is_pivot]] = 1.0
        shares[~is_pivot] = self.coefficients.weight[at[~is_pivot] - self.rank]
        return shares @ self.rows.weight


class DependentColumnsWarning(UserWarning):
    """Some columns depend on those before them: a smaller rank gives the same layer."""


@dataclass(frozen=True)
class Pivoting:
    """A product ``left @ right`` as some of its rows and combinations of these.

    Row ``order[i]`` of the product is ``rows[i]``, row ``order[r + i]`` is
    ``coefficients[i] @ rows``: the lossless form of Zhao et al., *PIFA: Pivoting Factorization*
    (ICML 2025), ``r * (m + n) - r * r`` numbers, in float64.
    """

    order: Int[Tensor, " m"]  # the r pivots, then the other rows, each part ascending
    rows: Float[Tensor, "r n"]
    coefficients: Float[Tensor, "others r"]  # none larger than GROWTH_BOUND


def pivot(left: Float[Tensor, "m r"], right: Float[Tensor, "r n"], name: str = "left") -> Pivoting:
    """Choose pivot rows of a product so that no coefficient exceeds ``GROWTH_BOUND``.

    Gaussian elimination with partial pivoting finds the first pivots. Then the pivot and the
    row of the largest coefficient change places until none is above the bound (maxvol;
    Goreinov et al., *How to find a good submatrix*, 2010). Each swap multiplies the volume of the
    pivot rows by more than the bound, so it ends.

    Both work on the unit lower trapezoidal factor, whose columns are independent whatever
    ``left`` is. So the form is as exact for a ``left`` of lower rank, and a warning says that it
    holds more pivots than were needed. Where elimination would lose digits, an orthonormal basis
    of the columns replaces it. All is done in float64, on the device of ``left`` (on the CPU
    where that has none), in about ``6 m r^2`` operations: on one busy core 0.2 s for
    ``(1536, 417)`` and a minute for ``(11008, 2973)`` (``experiments/bench_pivoted``).

    Raises:
        StatisticsError: If an entry is not finite.
        ValueError: If ``left`` has more columns than rows.
    """
    count, rank = left.shape
    if rank > count:
        raise ValueError(
            f"{name} has {rank} columns and {count} rows; a pivoted form has at most as many "
            "pivots as there are rows: lower the rank."
        )
    require_finite(name, left)
    require_finite(f"the right factor of {name}", right)
    work = float64_device(left.device)
    exact = left.detach().to(work, torch.float64)
    basis, order = _start(exact, name)
    while True:  # afresh each time, because rank-one updates drift
        coefficients = _combinations(basis[order[:rank]], basis[order[rank:]])
        if not _swap(coefficients, order):
            break
    pivots, by_pivot = order[:rank].sort()
    others, by_other = order[rank:].sort()
    return Pivoting(
        order=torch.cat([pivots, others]),
        rows=exact[pivots] @ right.detach().to(work, torch.float64),
        coefficients=coefficients[by_other][:, by_pivot],
    )


def _start(
    exact: Float[Tensor, "m r"], name: str
) -> tuple[Float[Tensor, "m r"], Int[Tensor, " m"]]:
    """Return a basis of the columns, and rows in order: well-conditioned pivots, then others."""
    rank = exact.shape[1]
    packed, exchanges, _ = torch.linalg.lu_factor_ex(exact)  # _ex: takes singular matrices too
    upper = packed[:rank].triu().abs()
    scale = exact.abs().amax(0) if exact.numel() else exact.new_zeros(rank)
    dependent = int((upper.diagonal() <= len(exact) * EPSILON * scale).sum())
    if dependent:
        warnings.warn(
            f"{name}: {dependent} of {rank} columns depend on those before them. The pivoted form "
            f"is exact, but rank {rank - dependent} would store less and give the same outputs.",
            DependentColumnsWarning,
            stacklevel=3,
        )
    lower = packed.tril(-1)
    lower.diagonal().fill_(1.0)
    unit = torch.eye(rank, dtype=exact.dtype, device=exact.device)
    inverse = torch.linalg.solve_triangular(lower[:rank], unit, upper=False, unitriangular=True)
    if bool((upper > ELIMINATION_LIMIT * scale).any() | (inverse.abs() > ELIMINATION_LIMIT).any()):
        return _start_orthonormal(exact)
    rows = list(range(len(exact)))
    for row, other in enumerate(exchanges.tolist()):  # LAPACK counts from 1
        rows[row], rows[other - 1] = rows[other - 1], rows[row]
    order = torch.tensor(rows, dtype=torch.int64, device=exact.device)
    basis = torch.empty_like(lower)
    basis[order] = lower
    return basis, order


def _start_orthonormal(
    exact: Float[Tensor, "m r"],
) -> tuple[Float[Tensor, "m r"], Int[Tensor, " m"]]:
    """Do the same by pivoted Gram-Schmidt, which no matrix that we know of defeats."""
    basis, _ = torch.linalg.qr(exact)
    rest, is_pivot = basis.clone(), torch.zeros(len(exact), dtype=torch.bool, device=exact.device)
    rows = []
    for _ in range(exact.shape[1]):
        row = int(rest.square().sum(1).argmax())
        direction = rest[row] / rest[row].norm()
        rest.addr_(rest @ direction, direction, alpha=-1.0)
        rest[row] = 0.0
        is_pivot[row] = True
        rows.append(row)
    pivots = torch.tensor(rows, dtype=torch.int64, device=exact.device)
    return basis, torch.cat([pivots, (~is_pivot).nonzero()[:, 0]])


def _combinations(
    pivots: Float[Tensor, "r r"], others: Float[Tensor, "others r"]
) -> Float[Tensor, "others r"]:
    """Return ``others pivots^-1``; one step of refinement saves a digit of a large matrix."""
    packed, exchanges = torch.linalg.lu_factor(pivots)
    solution: Tensor = torch.linalg.lu_solve(packed, exchanges, others, left=False)
    rest = others - solution @ pivots
    return solution.add_(torch.linalg.lu_solve(packed, exchanges, rest, left=False))


def _swap(coefficients: Float[Tensor, "others r"], order: Int[Tensor, " m"]) -> int:
    """Exchange pivots, in place, until the bound holds or the updates are used up; count swaps."""
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
        order[[j, rank + i]] = order[[rank + i, j]]
    return UPDATES
