"""Give a trial up as soon as it is surely worse than the best one, window by window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from lrbo.paired import paired_difference

LEAST = 4  # windows before which nothing is said of how much they differ


@dataclass(frozen=True)
class Race:
    """Decides from paired differences on the same windows whether a trial can still win.

    Windows differ much more in how hard they are than trials do on one window, so that the
    difference to the best trial is known long before either mean is (racing: Maron and Moore,
    1994).

    Attributes:
        confidence: One-sided, of a whole trial, in (0.5, 1): one that is no worse than the best
            over all windows is given up with at most the rest of the probability, however often
            it is looked at (Bonferroni: the looks share it).
        kl_weight: Weight of the divergence in the loss of a window.
    """

    confidence: float
    kl_weight: float = 0.0

    def is_lost(
        self, mine: Sequence[float], rival: Sequence[float], windows: int, looks: int
    ) -> bool:
        """Return whether the trial is worse, as far as it can be told.

        Args:
            mine: Losses of the windows that were scored.
            rival: Those of the best trial on the same windows.
            windows: How many there are in all.
            looks: How often this is asked of a trial, at most.
        """
        if not LEAST <= len(mine) < windows:
            return False
        difference, error = paired_difference(mine, rival, windows)
        quantile = 1 - (1 - self.confidence) / max(looks, 1)
        return difference > float(stdtrit(len(mine) - 1, quantile)) * error


def window_loss(nll: float, kl: float, kl_weight: float) -> float:
    """Return the loss of a window: two trials of the same numbers must not differ by rounding."""
    return nll + kl_weight * kl


def spread_order(count: int) -> list[int]:
    """Return 0, 1, ..., ``count - 1`` so that every beginning is spread over the whole.

    Windows come text by text; the first ones scored must speak for all texts.
    """
    golden = (math.sqrt(5) - 1) / 2
    return sorted(range(count), key=lambda index: index * golden % 1.0)
