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


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that holds a NaN or an infinity.

    Args:
        name: What the tensor is, for the message; a layer's name belongs in it.
        tensor: Any floating tensor.

    Raises:
        StatisticsError: With the count of bad entries.
    """
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
    device = matrix.device
    work = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
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
    """
    eigenvalues, eigenvectors = psd_eigenpairs(matrix, name)
    largest = eigenvalues[0] if eigenvalues.numel() else eigenvalues.new_zeros(())
    kept = eigenvalues > eigenvalues.numel() * torch.finfo(torch.float64).eps * largest
    scale = eigenvalues[kept].sqrt()
    basis = eigenvectors[:, kept]
    return basis * scale, (basis / scale).T


def weighted_svd(
    weight: Float[Tensor, "out in"],
    right_root: Float[Tensor, "in k"] | None = None,
    right_inverse: Float[Tensor, "k in"] | None = None,
) -> tuple[Float[Tensor, "out p"], Float[Tensor, " p"], Float[Tensor, "p in"]]:
    r"""Minimise ``||(W - W_r) B||_F`` over all matrices ``W_r`` of rank ``r``, for every ``r``.

    With the thin SVD ``W B = U diag(s) V^T`` the optimum of each rank is the prefix
    ``W_r = U_{:r} diag(s_{:r}) V_{:r}^T B^+`` and its error is ``sqrt(sum(s_{r:}^2))``.

    Args:
        weight: ``(out, in)``, any floating dtype; not modified.
        right_root: ``(in, k)``, ``B``; ``None`` is the identity.
        right_inverse: ``(k, in)``, the (pseudo-)inverse of ``B``.

    Returns:
        ``U`` ``(out, p)``, ``s`` ``(p,)`` falling, and ``V^T B^+`` ``(p, in)``; float64.
    """
    double = weight.to(torch.float64)
    product = double if right_root is None else double @ right_root
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    return left, values, right if right_inverse is None else right @ right_inverse


def add_gram(
    accumulator: Float[Tensor, "d d"],
    rows: Float[Tensor, "n d"],
    scale: float = 1.0,
    panels: int = 4,
) -> None:
    """Add ``scale * rows^T rows`` to the upper triangle of ``accumulator``, in place.

    Only panels on and above the diagonal are multiplied: 5/8 of the work of the full product
    with four panels. What lies below the block diagonal is left untouched; read the result
    with :func:`mirror_upper`.

    Args:
        accumulator: ``(d, d)``, float64; modified.
        rows: ``(n, d)``, tokens as rows. The product runs in the dtype of ``rows``.
        scale: Weight of this batch.
        panels: Number of column panels; 1 where the matrix is small.
    """
    width = rows.shape[1]
    step = -(-width // panels) if width >= 256 else width
    for start in range(0, width, step):
        stop = min(start + step, width)
        panel = rows[:, start:stop].T @ rows[:, start:]
        accumulator[start:stop, start:].add_(panel.to(accumulator.device), alpha=scale)


def mirror_upper(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Return the symmetric matrix whose upper triangle is that of ``matrix``."""
    upper = matrix.triu()
    return upper + upper.triu(1).T
