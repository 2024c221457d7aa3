"""Slow, plain versions to compare with: loops, dense matrices, formulas as printed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lrbo.layers.options import Option

Matrix = NDArray[np.float64]
Affine = tuple[Matrix, Matrix]
"""``(W, b)`` of the map ``x -> W x + b``."""
Priced = tuple[Option, int]
"""An option and its price."""


# --- moments -----------------------------------------------------------------------------------


def mean(rows: Matrix) -> Matrix:
    """``1/n sum_i x_i``, each sum correctly rounded."""
    return np.array([math.fsum(column) / len(rows) for column in rows.T])


def covariance(rows: Matrix) -> Matrix:
    """``1/n sum_i (x_i - mean)(x_i - mean)^T``, one token at a time."""
    centre = mean(rows)
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for row in rows:
        total += np.outer(row - centre, row - centre)
    return total / len(rows)


def pooled_covariance(groups: Sequence[Matrix]) -> Matrix:
    """``1/g sum_j cov(group_j)``: equation 3 of Bolaco."""
    total = np.zeros((groups[0].shape[1], groups[0].shape[1]))
    for group in groups:
        total += covariance(group)
    return total / len(groups)


def second_moment(rows: Matrix) -> Matrix:
    """``1/n sum_i x_i x_i^T``, one token at a time, around zero."""
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for row in rows:
        total += np.outer(row, row)
    return total / len(rows)


def importance(rows: Matrix, gradients: Matrix) -> Matrix:
    """``1/n sum_i sum_o (g_io x_ij)^2``: squared gradients of the weight, token by token."""
    total = np.zeros(rows.shape[1])
    for row, gradient in zip(rows, gradients, strict=True):
        total += (np.outer(gradient, row) ** 2).sum(0)
    return total / len(rows)


def weight_gradient(windows: list[Matrix], gradients: list[Matrix]) -> Matrix:
    """``1/n sum_w |sum_{i in w} g_i x_i^T|``: gradients of the weight, added up by window."""
    total = np.zeros((gradients[0].shape[1], windows[0].shape[1]))
    for rows, slopes in zip(windows, gradients, strict=True):
        own = np.zeros_like(total)
        for row, slope in zip(rows, slopes, strict=True):
            own += np.outer(slope, row)
        total += abs(own)
    return total / sum(map(len, windows))


def numpy_of(tensor: torch.Tensor) -> Matrix:
    """Copy a tensor of any dtype into float64."""
    return tensor.detach().to(torch.float64).numpy().copy()


# --- factorization -----------------------------------------------------------------------------


def truncated_svd(weight: Matrix, rank: int) -> Matrix:
    """``sum_{i<r} s_i u_i v_i^T`` (Eckart and Young)."""
    left, values, right = np.linalg.svd(weight)
    total = np.zeros_like(weight)
    for i in range(min(rank, len(values))):
        total += values[i] * np.outer(left[:, i], right[i])
    return total


def whitened_svd(weight: Matrix, second_moment: Matrix, rank: int) -> Matrix:
    """``SVD_r(W L) L^-1`` with the Cholesky root ``L L^T`` of a full-rank second moment."""
    root = np.linalg.cholesky(second_moment)
    return truncated_svd(weight @ root, rank) @ np.linalg.inv(root)


def diagonally_weighted_svd(weight: Matrix, scale: Matrix, rank: int) -> Matrix:
    """``SVD_r(W S) S^-1`` with a diagonal ``S`` without zeros: FWSVD, ASVD."""
    return truncated_svd(weight * scale, rank) / scale


def importance_of_rows(importance: Matrix, kept: float) -> Matrix:
    """Sums by row of the largest entries, of which ``kept`` is the share; or its largest alone."""
    pruned = round((1 - kept) * importance.size)
    least = np.sort(importance, axis=None)[min(pruned, importance.size - 1)]
    sums = [row[row >= least].sum() if row.max() >= least else row.max() for row in importance]
    return np.array(sums)


def power(matrix: Matrix, exponent: float) -> Matrix:
    """``V diag(e^p) V^T`` of a positive definite matrix: the symmetric root, or its inverse."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(values**exponent) @ vectors.T


def two_sided_svd(weight: Matrix, left: Matrix, right: Matrix, rank: int) -> Matrix:
    """``G^-1/2 SVD_r(G^1/2 W C^1/2) C^-1/2`` of positive definite ``G`` and ``C``."""
    middle = truncated_svd(power(left, 0.5) @ weight @ power(right, 0.5), rank)
    return power(left, -0.5) @ middle @ power(right, -0.5)


def shrunk(matrix: Matrix, share: float) -> Matrix:
    """``(1 - a) M + a tr(M)/d I``."""
    size = len(matrix)
    return (1 - share) * matrix + share * np.trace(matrix) / size * np.eye(size)


def flattened(moment: Matrix, weight: Matrix, exponent: float) -> Matrix:
    """The part of ``G`` that outputs of ``W`` can reach, to a power, at the trace it had."""
    basis = np.linalg.svd(weight, full_matrices=False)[0]
    reached = basis.T @ moment @ basis
    raised = power(reached, exponent)
    return basis @ (raised * np.trace(reached) / np.trace(raised)) @ basis.T


def quadratic_loss(change: Matrix, gradients: Matrix, rows: Matrix, share: float) -> float:
    """``1/2 mean_ij (g_i . D x_j)^2`` over all pairs of a gradient and an input.

    A share of it is replaced by what gradients of the same length in all directions would give.
    """
    moved = rows @ change.T
    total = 0.0
    for gradient in gradients:
        total += float(((moved @ gradient) ** 2).mean()) / len(gradients)
    lengths = float((gradients**2).sum()) / len(gradients)
    anywhere = lengths / gradients.shape[1] * float((moved**2).sum()) / len(rows)
    return ((1 - share) * total + share * anywhere) / 2


def bolaco(weight: Matrix, bias: Matrix, groups: Sequence[Matrix], rank: int) -> Affine:
    """Equations 3 to 6 of Bolaco, on outputs: ``Q Q^T W`` and ``mu - Q Q^T (mu - b)``."""
    outputs = [group @ weight.T + bias for group in groups]
    _, vectors = np.linalg.eigh(pooled_covariance(outputs))
    leading = vectors[:, ::-1][:, :rank]
    projector = leading @ leading.T
    centre = mean(np.concatenate(outputs))
    return projector @ weight, centre - projector @ (centre - bias)


def mean_squared_output_error(dense: Affine, other: Affine, rows: Matrix) -> float:
    """``1/n sum_i ||y_i - y'_i||^2``, one token at a time."""
    total = 0.0
    for row in rows:
        difference = (dense[0] @ row + dense[1]) - (other[0] @ row + other[1])
        total += float(difference @ difference)
    return total / len(rows)


def pooled_output_error(dense: Affine, other: Affine, groups: Sequence[Matrix]) -> float:
    """Mean over groups of the mean squared output error around the group's own mean error."""
    total = 0.0
    for group in groups:
        errors = np.array(
            [(dense[0] @ row + dense[1]) - (other[0] @ row + other[1]) for row in group]
        )
        centred = errors - mean(errors)
        total += float((centred * centred).sum()) / len(group)
    return total / len(groups)


def affine_of(module: nn.Module, in_features: int) -> Affine:
    """Read ``(W, b)`` off a layer by feeding it zero and the unit vectors."""
    floats = (t for t in module.state_dict().values() if t.is_floating_point())
    dtype = next(floats).dtype
    with torch.no_grad():
        bias = module(torch.zeros(in_features, dtype=dtype))
        weight = module(torch.eye(in_features, dtype=dtype)) - bias
    return numpy_of(weight.T), numpy_of(bias)


def unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """Read packed integers bit by bit, as :mod:`lrbo.layers.packing` describes it."""
    rows, width = packed.shape
    count = width * 8 // bits
    codes, start, shift = np.zeros((rows, count), dtype=np.int64), 0, 0
    for part in {8: (8,), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}[bits]:
        size = count * part // 8
        for row in range(rows):
            for entry in range(count):
                byte = int(packed[row, start + entry % size])
                codes[row, entry] += ((byte >> entry // size * part) % 2**part) << shift
        start, shift = start + size, shift + part
    return codes


def count_parameters(module: nn.Module) -> int:
    """Count parameters, a tensor that is reached by two names once."""
    sizes: dict[int, int] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, nn.Parameter):
            sizes[id(tensor)] = math.prod(tensor.shape)
    return sum(sizes.values())


# --- allocation --------------------------------------------------------------------------------


def ladder(options: Sequence[Priced]) -> list[Priced]:
    """The options that cost less than the last one, which is dense, then dense."""
    *others, dense = options
    return [*sorted((o for o in others if o[1] < dense[1]), key=lambda o: o[1]), dense]


def undominated(options: Sequence[tuple[Option, int, float]]) -> list[tuple[Option, int, float]]:
    """The options that cost less than dense and that no option beats, by comparing all pairs.

    A cheaper one beats by a smaller loss, one of the same price also by standing before it. Of
    those of equal loss only the form of the cheapest is left.
    """
    *others, dense = options

    def is_beaten(index: int) -> bool:
        _, price, loss = others[index]
        return any(
            (p < price and x < loss) or (p == price and (x, i) < (loss, index))
            for i, (_, p, x) in enumerate(others)
        )

    front = [o for i, o in enumerate(others) if o[1] < dense[1] and not is_beaten(i)]
    cheapest = {loss: min((o for o in front if o[2] == loss), key=lambda o: o[1])
                for _, _, loss in front}  # fmt: skip
    same = [o for o in front if o[0].form == cheapest[o[2]][0].form]
    return [*sorted(same, key=lambda o: o[1]), dense]


def allocate(
    ratios: Mapping[str, float],
    ladders: Mapping[str, Sequence[Priced]],
    ceiling: int,
) -> dict[str, Option]:
    """Raise one common scale; each unit steps up as its wish is reached, if the step fits.

    Every round looks at every unit again: which wants its next step at the lowest scale? A
    unit whose step did not fit is out. Units of one option have no wish.
    """
    size = {name: steps[-1][1] for name, steps in ladders.items()}
    at = dict.fromkeys(ladders, 0)
    out: set[str] = set()
    while True:
        best: tuple[float, str] | None = None
        for name, steps in ladders.items():
            if name in out or at[name] + 1 == len(steps):
                continue
            scale = steps[at[name] + 1][1] / (ratios[name] * size[name])
            if best is None or (scale, name) < best:
                best = (scale, name)
        if best is None:
            return {name: steps[at[name]][0] for name, steps in ladders.items()}
        name = best[1]
        used = sum(steps[at[n]][1] for n, steps in ladders.items())
        if used - ladders[name][at[name]][1] + ladders[name][at[name] + 1][1] <= ceiling:
            at[name] += 1
        else:
            out.add(name)


def least_loss(menus: Sequence[Sequence[tuple[int, float]]], ceiling: int) -> float:
    """The least summed loss of all selections within a ceiling: one (price, loss) of each menu.

    Every sum of prices that a selection reaches is kept, with the least loss that reaches it.
    """
    best = {0: 0.0}
    for options in menus:
        reached: dict[int, float] = {}
        for (used, lost), (price, loss) in product(best.items(), options):
            total = used + price
            reached[total] = min(reached.get(total, math.inf), lost + loss)
        best = reached
    return min(lost for used, lost in best.items() if used <= ceiling)


# --- evaluation --------------------------------------------------------------------------------


def log_probabilities(logits: torch.Tensor) -> list[float]:
    """``l_i - log sum_j exp(l_j)``, each sum correctly rounded."""
    values = [float(value) for value in logits.double()]
    largest = max(values)
    normalizer = largest + math.log(math.fsum(math.exp(value - largest) for value in values))
    return [value - normalizer for value in values]


def negative_log_likelihood(logits: torch.Tensor, token: int) -> float:
    """``-log p(token)``, nats."""
    return -log_probabilities(logits)[token]


def divergence(dense: torch.Tensor, other: torch.Tensor) -> float:
    """``sum_i p_i (log p_i - log q_i)`` of two rows of logits, nats."""
    p, q = log_probabilities(dense), log_probabilities(other)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def coarse_divergence(dense: torch.Tensor, other: torch.Tensor, top: int) -> float:
    """The divergence over the ``top`` most probable tokens of ``dense`` and one bucket."""
    p, q = log_probabilities(dense), log_probabilities(other)
    order = sorted(range(len(p)), key=lambda i: -p[i])
    terms = [math.exp(p[i]) * (p[i] - q[i]) for i in order[:top]]
    if order[top:]:
        rest_p = math.fsum(math.exp(p[i]) for i in order[top:])
        rest_q = math.fsum(math.exp(q[i]) for i in order[top:])
        terms.append(rest_p * (math.log(rest_p) - math.log(rest_q)))
    return math.fsum(terms)
