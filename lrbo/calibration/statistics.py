"""Running statistics of what the layers of a site read: only those that were asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.calibration.moments import Moments, PooledMoments
from lrbo.errors import StatisticsError
from lrbo.factorization.base import Statistic
from lrbo.linalg import float64_device


def require_sound(
    owner: str, of: str, found: Mapping[Statistic, Tensor], *, seen: int, tokens: int
) -> None:
    """Refuse statistics of too few or too many tokens, or that are not finite.

    Args:
        owner: The site or layer, for messages.
        of: What they are gathered from: ``"inputs"`` or ``"gradients"``.
        found: The statistics.
        seen: Tokens that they are of.
        tokens: Tokens that they should be of.

    Raises:
        StatisticsError: If there were others, or a value is not finite.
    """
    if seen != tokens:
        raise StatisticsError(
            f"{owner}: {of} came for {seen} of {tokens} tokens; every mapped layer must run once "
            "per token. Correct the family's sites in lrbo/families.py."
        )
    for statistic, tensor in found.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise StatisticsError(
                f"{owner}: its {statistic} holds {bad} non-finite values out of "
                f"{tensor.numel()} after {tokens} tokens. The {of} overflowed; rerun with "
                "model.dtype=float32 or bfloat16."
            )


@dataclass
class SiteMoments:
    """Running statistics of one site.

    Attributes:
        plain: Mean and covariance.
        pooled: Mean, and covariance within groups.
        magnitude: ``(in,)``, float64, ``sum |x|``.
        tokens: Inputs seen.
    """

    plain: Moments | None
    pooled: PooledMoments | None
    magnitude: Float[Tensor, " d"] | None
    tokens: int = 0

    @classmethod
    def empty(cls, needs: Collection[Statistic], width: int, device: torch.device) -> SiteMoments:
        """Return what gathers the needs; mean and covariance come together."""
        pooled = Statistic.POOLED_INPUT_COVARIANCE in needs
        plain = Statistic.INPUT_COVARIANCE in needs or (
            Statistic.INPUT_MEAN in needs and not pooled
        )
        place = float64_device(device)
        return cls(
            Moments.empty(width, device) if plain else None,
            PooledMoments.empty(width, device) if pooled else None,
            torch.zeros(width, dtype=torch.float64, device=place)
            if Statistic.INPUT_MAGNITUDE in needs
            else None,
        )

    def update(
        self, inputs: Float[Tensor, "windows tokens d"], spans: Sequence[tuple[int, int, bool]]
    ) -> None:
        """Add the inputs of some windows.

        Args:
            inputs: ``(windows, tokens, d)``, any floating dtype.
            spans: What of the windows is of one group: start, stop, and whether the group ends
                there. All windows are in one span, in order.
        """
        rows = inputs.flatten(0, 1)
        self.tokens += len(rows)
        if self.plain is not None:
            self.plain.update(rows)
        if self.pooled is not None:
            whole: list[Tensor] = []
            for start, stop, closes in spans:
                part = inputs[start:stop].flatten(0, 1)
                if closes and not self.pooled.open.tokens:
                    whole.append(part)
                else:
                    self.pooled.update(part, closes_group=closes)
            if whole:
                self.pooled.update_whole(whole)
        if self.magnitude is not None:
            self.magnitude += rows.abs().to(self.magnitude.device).sum(0, dtype=torch.float64)

    def statistics(self, site: str, tokens: int) -> dict[Statistic, Tensor]:
        """Return the finished statistics, float64, on the CPU.

        Args:
            site: Its name, for messages.
            tokens: That should have been seen.

        Raises:
            StatisticsError: If there were others, or a value is not finite.
        """
        found: dict[Statistic, Tensor] = {}
        if self.pooled is not None:
            found[Statistic.INPUT_MEAN] = self.pooled.mean
            found[Statistic.POOLED_INPUT_COVARIANCE] = self.pooled.covariance
        if self.plain is not None:
            found[Statistic.INPUT_MEAN] = self.plain.mean
            found[Statistic.INPUT_COVARIANCE] = self.plain.covariance
        if self.magnitude is not None:
            found[Statistic.INPUT_MAGNITUDE] = self.magnitude / tokens
        require_sound(site, "inputs", found, seen=self.tokens, tokens=tokens)
        return {statistic: tensor.cpu() for statistic, tensor in found.items()}
