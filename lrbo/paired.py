"""Two trials on the same windows: their mean difference, and the standard error of it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def paired_difference(
    mine: Sequence[float], rival: Sequence[float], windows: float = math.inf
) -> tuple[float, float]:
    """Return the mean paired difference, and its standard error as an estimate of that over all.

    The windows are a sample without replacement from all: nothing is left to estimate when all
    were scored, and the error is 0. All are of one length, so that each stands for as many tokens.

    Args:
        mine: Losses of the windows that were scored.
        rival: Those of the other trial on the same windows.
        windows: How many there are in all: of a text, or infinitely many like these.
    """
    differences = [a - b for a, b in zip(mine, rival, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count < 2:
        return mean, math.inf if windows > count else 0.0
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    return mean, math.sqrt(variance / count * (1 - count / windows))
