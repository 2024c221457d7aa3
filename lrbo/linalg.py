"""PSD root, weighted SVD, leading eigenpairs: float64, and nothing repaired in silence."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.errors import StatisticsError


class JitterWarning(UserWarning):
    """A matrix that should be positive semi-definite was not; the message says by how much."""


# Moments of half-precision and float32 activations are sums of float32 products, so rounding
# leaves eigenvalues of a singular moment as low as -6e-8 * sqrt(rows of a batch) of the largest:
# -1.5e-8 was seen. What lies below this share of it is not rounding, and is announced.
NEGATIVE_TOLERANCE = 1e-6
# Of the mean diagonal entry, tried one after the other.
JITTER_SHARES = (0.0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 numbers of ``device`` can live: mps has none."""
    return torch.device("cpu") if device.type == "mps" else device


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that holds a NaN or an infinity.

    Args:
        name: What the tensor is, for the message; a layer's name belongs in it.
        tensor: Any floating tensor.

    Raises:
        StatisticsError: With the count of bad entries.
    """
    if bool(torch.isfinite(tensor.sum())):  # every entry is: a tenth of the time of asking each
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise StatisticsError(
            f"{name} holds {bad} non-finite values out of {tensor.numel()}. If it comes from "
            "calibration, rerun it with model.dtype=float32; if it is a weight, the checkpoint "
            "is damaged."
        )


def psd_eigenpairs(
    matrix: Float[Tensor, "d d"], name: str = "matrix"
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Return eigenvalues and eigenvectors of a PSD matrix, largest first, in float64.

    Eigenvalues that rounding made slightly negative become 0. Eigenvalues below
    ``-1e-6`` of the largest become 0 too, with a :class:`JitterWarning` that states them.

    Args:
        matrix: ``(d, d)``, symmetric; only its symmetric part is used.
        name: What it is, for messages.

    Returns:
        ``(d,)`` eigenvalues in falling order and ``(d, d)`` eigenvectors as columns, on the
        device of ``matrix`` (computed on the CPU where the device has no float64).

    Raises:
        StatisticsError: If ``matrix`` is not finite.
    """
    require_finite(name, matrix)
    work = float64_device(matrix.device)
    double = matrix.to(work, torch.float64)
    eigenvalues, eigenvectors = torch.linalg.eigh((double + double.T) / 2)
    eigenvalues, eigenvectors = eigenvalues.flip(-1), eigenvectors.flip(-1)
    if eigenvalues.numel() and eigenvalues[-1] < -NEGATIVE_TOLERANCE * eigenvalues[0].abs():
        warnings.warn(
            f"{name}: smallest eigenvalue {eigenvalues[-1]:.3e} is negative beyond rounding "
            f"(largest {eigenvalues[0]:.3e}); set to 0.",
            JitterWarning,
            stacklevel=2,
        )
    return eigenvalues.clamp_min(0.0), eigenvectors


def psd_root(
    matrix: Float[Tensor, "d d"], name: str = "matrix"
) -> tuple[Float[Tensor, "d k"], Float[Tensor, "k d"]]:
    """Return a root ``S`` with ``S S^T = matrix`` and its pseudo-inverse.

    Directions without energy (eigenvalue below ``d * eps`` of the largest) are left out, so
    ``k`` is the numerical rank and no jitter is needed.

    Args:
        matrix: ``(d, d)``, symmetric positive semi-definite.
        name: What it is, for messages.

    Returns:
        ``(d, k)`` root and ``(k, d)`` pseudo-inverse, float64.

    Raises:
        StatisticsError: If ``matrix`` is not finite.
    """
    eigenvalues, eigenvectors = psd_eigenpairs(matrix, name)
    largest = eigenvalues[0] if eigenvalues.numel() else eigenvalues.new_zeros(())
    kept = eigenvalues > eigenvalues.numel() * torch.finfo(torch.float64).eps * largest
    scale = eigenvalues[kept].sqrt()
    basis = eigenvectors[:, kept]
    return basis * scale, (basis / scale).T


def psd_cholesky(matrix: Float[Tensor, "d d"], name: str = "matrix") -> Float[Tensor, "d d"]:
    """Return the lower Cholesky factor ``L`` with ``L L^T = matrix``, in float64.

    A matrix of which a pivot is not positive gets jitter on its diagonal: from 1e-12 of its mean
    diagonal entry on, ten times more at each try, announced with its size. A singular one may
    pass without, if rounding leaves its pivots positive: the product is exact all the same.

    Args:
        matrix: ``(d, d)``, symmetric; only its symmetric part is used.
        name: What it is, for messages.

    Raises:
        StatisticsError: If ``matrix`` is not finite, has no energy at all, or is not positive
            even with a jitter of 1e-4 of its mean diagonal entry.
    """
    require_finite(name, matrix)
    work = float64_device(matrix.device)
    double = matrix.to(work, torch.float64)
    double = (double + double.T) / 2
    scale = float(double.diagonal().mean())
    if scale <= 0:
        raise StatisticsError(
            f"{name} has a mean diagonal of {scale:.3e}, expected a positive one: nothing was "
            "measured. Calibrate on text that reaches this layer."
        )
    identity = torch.eye(len(double), dtype=torch.float64, device=work)
    pivot = 0
    for share in JITTER_SHARES:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(double + share * scale * identity)
        if not int(failed):
            if share:
                warnings.warn(
                    f"{name} is not positive definite (pivot {pivot} of {len(double)}); added "
                    f"{share * scale:.3e} to its diagonal, {share:.0e} of the mean entry.",
                    JitterWarning,
                    stacklevel=2,
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
    its error is ``sqrt(sum(s_{r:}^2))``. For an invertible ``B`` that is the textbook form
    ``U_r diag(s_r) V_r^T B^-1``; it needs no inverse, so a singular ``B`` is no special case,
    and the full rank is ``W`` itself.

    Args:
        weight: ``(out, in)``, any floating dtype; not modified.
        right_root: ``B``: ``(in, k)``, or ``(in,)`` for a diagonal one; ``None`` is the identity.

    Returns:
        ``U`` ``(out, p)`` with ``p = min(out, in)``, ``s`` ``(p,)`` falling, and ``U^T W``
        ``(p, in)``; float64.
    """
    basis, reduced = column_space(weight.to(torch.float64))
    if right_root is None:
        product = reduced
    elif right_root.dim() == 1:
        product = reduced * right_root.to(reduced)
    else:
        product = reduced @ right_root.to(reduced)
    # All of U: where B is singular, the rest completes the full rank, in order of no importance.
    left, found, _ = torch.linalg.svd(product, full_matrices=product.shape[0] > product.shape[1])
    values = found.new_zeros(len(left))
    values[: len(found)] = found
    return (left if basis is None else basis @ left), values, left.T @ reduced


def output_directions(
    weight: Float[Tensor, "out in"],
    covariance: Float[Tensor, "in in"],
    name: str = "output covariance",
) -> tuple[Float[Tensor, "out p"], Float[Tensor, " p"], Float[Tensor, "p in"]]:
    """Return the principal directions of the outputs ``W x``, for inputs of known covariance.

    The same answer as :func:`weighted_svd` with a root of the covariance, from one symmetric
    eigendecomposition of order ``p = min(out, in)`` and no root: where the layer widens, the
    outputs lie in the column space of ``W``, and it is decomposed in a basis of that space.

    Args:
        weight: ``(out, in)``, float64.
        covariance: ``(in, in)``, float64, of the inputs; centred or not.
        name: What the covariance of the outputs is, for messages.

    Returns:
        ``Q`` ``(out, p)``, energies ``(p,)`` falling, and ``Q^T W`` ``(p, in)``.
    """
    basis, reduced = column_space(weight)
    energy, vectors = psd_eigenpairs(reduced @ covariance @ reduced.T, name)
    return (vectors if basis is None else basis @ vectors), energy, vectors.T @ reduced


def column_space(
    weight: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out in"] | None, Float[Tensor, "p in"]]:
    """Return an orthonormal basis of a tall matrix and the matrix in it; else the matrix.

    Args:
        weight: ``(out, in)``.

    Returns:
        ``(out, in)`` basis ``Q`` and ``(in, in)`` ``Q^T W`` where ``out > in``, so that what
        follows is done in the smaller space; else ``None`` and ``weight``.
    """
    if weight.shape[0] <= weight.shape[1]:
        return None, weight
    basis, reduced = torch.linalg.qr(weight)
    return basis, reduced


def add_gram(
    accumulator: Float[Tensor, "d d"],
    rows: Float[Tensor, "n d"],
    scale: float = 1.0,
    panels: int = 8,
    *,
    vectors: Float[Tensor, "k d"] | None = None,
    weights: Float[Tensor, " k"] | None = None,
) -> None:
    """Add ``scale * rows^T rows`` to the upper triangle of ``accumulator``, in place.

    Only panels on and above the diagonal are multiplied: 9/16 of the work of the full product
    with eight panels. What lies below the block diagonal is left untouched; read the result
    with :func:`mirror_upper`.

    Args:
        accumulator: ``(d, d)``, float64; modified.
        rows: ``(n, d)``, tokens as rows. The product runs in the dtype of ``rows``.
        scale: Weight of this batch.
        panels: Number of column panels; 1 where the matrix is small.
        vectors: ``(k, d)``, float64: ``sum_k weights_k v_k v_k^T`` is added as well, each panel
            while it is at hand; a pass of its own over a matrix this size costs as much as the
            product with a few hundred rows.
        weights: ``(k,)``, float64, of either sign.
    """
    width = rows.shape[1]
    step = -(-width // panels) if width >= 256 else width
    weighted = None if vectors is None or weights is None else weights[:, None] * vectors
    for start in range(0, width, step):
        stop = min(start + step, width)
        panel = rows[:, start:stop].T @ rows[:, start:]
        sums = accumulator[start:stop, start:]
        sums.add_(panel.to(accumulator.device), alpha=scale)
        if vectors is not None and weighted is not None:
            sums.addmm_(weighted[:, start:stop].T, vectors[:, start:])


def mirror_upper(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Return the symmetric matrix whose upper triangle is that of ``matrix``."""
    found = matrix.triu()
    found += found.triu(1).T
    return found
