"""Stop a trial as soon as it is almost certainly worse than the best one, window by window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MIN_WINDOWS = 4  # that an estimate of their variance needs


@dataclass(frozen=True)
class Race:
    """A sequential test on paired differences: can a trial still win?

    Windows differ more than trials on one window do, so the difference from the best trial is
    known long before either mean is (racing: Maron and Moore, 1994). A trial that is no worse than
    the best over all windows is stopped with a probability of at most ``1 - confidence``, however
    many looks there are (Bonferroni).
    """

    confidence: float
    kl_weight: float = 0.0  # of the divergence in a window's loss

    def is_lost(
        self, losses: Sequence[float], rival: Sequence[float], windows: int, looks: int
    ) -> bool:
        """Whether losses are surely worse than those of the best trial on the same windows.

        ``windows`` is their number in a whole trial, ``looks`` the largest number of calls for it.
        """
        from scipy.special import stdtrit  # reports need the rest of this module, without scipy

        if not MIN_WINDOWS <= len(losses) < windows:
            return False
        difference, error = paired_difference(losses, rival, windows)
        quantile = 1 - (1 - self.confidence) / max(looks, 1)
        return difference > float(stdtrit(len(losses) - 1, quantile)) * error


def paired_difference(
    losses: Sequence[float], rival: Sequence[float], windows: float = math.inf
) -> tuple[float, float]:
    """Return the mean of ``losses - rival``, and its standard error as an estimate over windows.

    The scored windows are a sample without replacement: the error is 0 when all were scored.
    """
    differences = [a - b for a, b in zip(losses, rival, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count < 2:
        return mean, math.inf if windows > count else 0.0
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    return mean, math.sqrt(variance / count * (1 - count / windows))


def window_loss(nll: float, kl: float, kl_weight: float) -> float:
    """Return the loss of a window; in one order of operations, so equal trials stay equal."""
    return nll + kl_weight * kl


def spread_order(count: int) -> list[int]:
    """Order ``range(count)`` so that every prefix is spread evenly: windows come text by text."""
    golden = (math.sqrt(5) - 1) / 2
    return sorted(range(count), key=lambda index: index * golden % 1.0)
