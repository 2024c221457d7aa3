"""PSD root, weighted SVD, leading eigenpairs: float64, and nothing repaired in silence.

Matrices that are not finite are a StatisticsError.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lrbo.errors import StatisticsError


class JitterWarning(UserWarning):
    """A matrix that should be positive semi-definite was not; the message says by how much."""


def _warn(message: str) -> None:
    warnings.warn(message, JitterWarning, stacklevel=3)


# Moments are sums of float32 products: rounding leaves eigenvalues of a singular one as low as
# -6e-8 * sqrt(rows of a batch) of the largest. Below this share of it they are announced.
NEGATIVE_TOLERANCE = 1e-6
PANELS = 8  # of columns, in a Gram matrix that is not small
# Of the mean diagonal entry, tried one after the other.
JITTER_SHARES = (0.0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 numbers of ``device`` can live: mps has none."""
    return torch.device("cpu") if device.type == "mps" else device


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that holds a NaN or an infinity; ``name`` with that of its layer."""
    if bool(torch.isfinite(tensor.sum())):  # every entry is: a tenth of the time of asking each
        return
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise StatisticsError(
            f"{name} holds {bad} non-finite values out of {tensor.numel()}. If it comes from "
            "calibration, rerun it with model.dtype=float32; if it is a weight, the checkpoint "
            "is damaged."
        )


def has_energy(moment: Tensor) -> bool:
    """Whether a second moment, or its diagonal, is not zero throughout."""
    if moment.dim() == 2 and bool(moment.diagonal().any()):  # a hundredth of the time
        return True
    return bool(moment.any())


def _symmetric(matrix: Float[Tensor, "d d"], name: str) -> Float[Tensor, "d d"]:
    """Return the symmetric part of a finite matrix in float64."""
    require_finite(name, matrix)
    double = matrix.to(float64_device(matrix.device), torch.float64)
    return (double + double.T) / 2


def psd_eigenpairs(
    matrix: Float[Tensor, "d d"], name: str = "matrix", scale: float = 0.0
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Return eigenvalues and eigenvectors (columns) of a PSD matrix, largest first, in float64.

    Only the symmetric part is used. Eigenvalues that rounding made slightly negative become 0;
    those below ``-1e-6`` of the largest, or of the ``scale`` of what the matrix is a product of,
    too, with a :class:`JitterWarning` that states them. Both are on the device of ``matrix``, or
    on the CPU where that has no float64.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(_symmetric(matrix, name))
    eigenvalues, eigenvectors = eigenvalues.flip(-1), eigenvectors.flip(-1)
    largest = max(float(eigenvalues[0].abs()), scale) if eigenvalues.numel() else 0.0
    if eigenvalues.numel() and float(eigenvalues[-1]) < -NEGATIVE_TOLERANCE * largest:
        _warn(
            f"{name}: smallest eigenvalue {eigenvalues[-1]:.3e} is negative beyond rounding "
            f"(largest {eigenvalues[0]:.3e}); set to 0."
        )
    return eigenvalues.clamp_min(0.0), eigenvectors


def psd_root(
    matrix: Float[Tensor, "d d"], name: str = "matrix"
) -> tuple[Float[Tensor, "d k"], Float[Tensor, "k d"]]:
    """Return a root ``S`` with ``S S^T = matrix`` and its pseudo-inverse, in float64.

    Directions without energy (eigenvalue below ``d * eps`` of the largest) are left out, so
    ``k`` is the numerical rank and no jitter is needed.
    """
    eigenvalues, eigenvectors = psd_eigenpairs(matrix, name)
    floor = eigenvalues.numel() * torch.finfo(torch.float64).eps * eigenvalues[:1]
    has_energy = eigenvalues > floor
    scale, basis = eigenvalues[has_energy].sqrt(), eigenvectors[:, has_energy]
    return basis * scale, (basis / scale).T


def psd_cholesky(matrix: Float[Tensor, "d d"], name: str = "matrix") -> Float[Tensor, "d d"]:
    """Return the lower Cholesky factor of the symmetric part of a matrix, in float64.

    A matrix of which a pivot is not positive gets jitter on its diagonal: from 1e-12 of its mean
    diagonal entry on, ten times more at each try, announced with its size. A singular one may
    pass without, if rounding leaves its pivots positive: the product is exact all the same.

    Raises:
        StatisticsError: If ``matrix`` has no energy, or needs a jitter of more than 1e-4.
    """
    double = _symmetric(matrix, name)
    scale = float(double.diagonal().mean())
    if scale <= 0:
        raise StatisticsError(
            f"{name} has a mean diagonal of {scale:.3e}, expected a positive one: nothing was "
            "measured. Calibrate on text that reaches this layer."
        )
    identity = torch.eye(len(double), dtype=torch.float64, device=double.device)
    pivot = 0
    for share in JITTER_SHARES:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(double + share * scale * identity)
        if not int(failed):
            if share:
                _warn(
                    f"{name} is not positive definite (pivot {pivot} of {len(double)}); added "
                    f"{share * scale:.3e} to its diagonal, {share:.0e} of the mean entry."
                )
            return factor
        pivot = pivot or int(failed)
    raise StatisticsError(
        f"{name} is not positive definite even with {JITTER_SHARES[-1] * scale:.3e} added to its "
        "diagonal. Use more calibration tokens, or a method that shrinks its statistics."
    )


def weighted_svd(
    weight: Float[Tensor, "out in"],
    right_root: Float[Tensor, "in k"] | Float[Tensor, " in"] | None = None,
) -> tuple[Float[Tensor, "out p"], Float[Tensor, " p"], Float[Tensor, "p in"]]:
    r"""Minimise ``||(W - W_r) B||_F`` over all matrices ``W_r`` of rank ``r``, for every ``r``.

    With the SVD ``W B = U diag(s) V^T`` the optimum of each rank is ``W_r = U_r U_r^T W``, and
    its error is ``sqrt(sum(s_{r:}^2))``: the textbook form ``U_r diag(s_r) V_r^T B^-1`` without an
    inverse, so a singular ``B`` is no special case, and the full rank is ``W`` itself.

    Args:
        weight: ``W``, any floating dtype; not modified.
        right_root: ``B``, or the diagonal of one; ``None`` is the identity.

    Returns:
        ``U``, ``s`` falling, and ``U^T W``, with ``p = min(out, in)``; float64.
    """
    basis, reduced = column_space(weight.to(torch.float64))
    product = reduced
    if right_root is not None:
        root = right_root.to(reduced)
        product = reduced * root if root.dim() == 1 else reduced @ root
    # All of U: where B is singular, the rest completes the full rank, in order of no importance.
    left, values, _ = torch.linalg.svd(product, full_matrices=product.shape[0] > product.shape[1])
    values = nn.functional.pad(values, (0, len(left) - len(values)))
    return (left if basis is None else basis @ left), values, left.T @ reduced


def output_directions(
    weight: Float[Tensor, "out in"],
    covariance: Float[Tensor, "in in"],
    name: str = "output covariance",
) -> tuple[Float[Tensor, "out p"], Float[Tensor, " p"], Float[Tensor, "p in"]]:
    """Return the principal directions ``Q`` of the outputs ``W x``, their energies, and ``Q^T W``.

    The same as :func:`weighted_svd` with a root of the inputs' covariance, whose singular values
    are the roots of the energies; from one symmetric eigendecomposition. All is in float64.
    """
    basis, reduced = column_space(weight)
    # Rounding of the covariance is relative to its own size: a weight that is what integers leave
    # points nowhere in particular, and its outputs may be far smaller than that allows.
    size = float(weight.square().sum(1).max() * covariance.diagonal().max())
    energy, vectors = psd_eigenpairs(reduced @ covariance @ reduced.T, name, size)
    return (vectors if basis is None else basis @ vectors), energy, vectors.T @ reduced


def column_space(
    weight: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out in"] | None, Float[Tensor, "p in"]]:
    """Return an orthonormal basis ``Q`` of a tall ``W`` and ``Q^T W``; else ``None`` and ``W``."""
    if weight.shape[0] <= weight.shape[1]:
        return None, weight
    basis, reduced = torch.linalg.qr(weight)
    return basis, reduced


def add_gram(
    accumulator: Float[Tensor, "d d"],
    rows: Float[Tensor, "n d"],
    scale: float = 1.0,
    *,
    vectors: Float[Tensor, "k d"] | None = None,
    weights: Float[Tensor, " k"] | None = None,
) -> None:
    """Add ``scale * rows^T rows`` to the upper triangle of ``accumulator``, in place.

    Only panels on and above the diagonal are multiplied, in the dtype of ``rows``: 9/16 of the
    work of the full product. Read the result with :func:`mirror_upper`.

    With ``vectors``, ``sum_k weights_k v_k v_k^T`` is added as well: a pass of its own costs as
    much as the product with a few hundred rows. Both, and the accumulator, are float64.
    """
    width = rows.shape[1]
    step = -(-width // PANELS) if width >= 256 else width
    for start in range(0, width, step):
        stop = min(start + step, width)
        panel = rows[:, start:stop].T @ rows[:, start:]
        sums = accumulator[start:stop, start:]
        sums.add_(panel.to(accumulator.device), alpha=scale)
        if vectors is not None and weights is not None:
            sums.addmm_((weights[:, None] * vectors[:, start:stop]).T, vectors[:, start:])


def mirror_upper(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Return the symmetric matrix whose upper triangle is that of ``matrix``."""
    symmetric = matrix.triu()
    symmetric += symmetric.triu(1).T
    return symmetric
