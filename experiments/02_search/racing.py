"""Racing: how many tokens it saves, and whether it loses the best trial.

Trials that were recorded with their windows are raced again in random orders, and the search of
``lrbo`` is run on the surrogate with windows that differ as those of recorded trials near it do.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from surrogate import Recorded, Surrogate, ranks_of

from lrbo.allocation.allocate import Allocation
from lrbo.trials.racing import Race, paired_difference, spread_order

# Which recorded trials are raced again: all, or those around the least predicted loss alone.
SORTS = {
    "of all sorts": (
        "uniform", "analytic", "weights 0.5", "weights 1.0", "per_kind", "per_kind_and_depth",
        "layers",
    ),
    "around the least predicted loss": ("analytic", "weights 0.5"),
}  # fmt: skip


@dataclass
class Races:
    """Scores trials as a racing worker does, against the best one that was scored whole.

    Attributes:
        race: When to give up.
        batch: Windows between two looks.
        scored: Share of the windows of each trial.
        best: Windows of the best trial.
    """

    race: Race
    batch: int
    scored: list[float] = field(default_factory=list)
    best: np.ndarray | None = None

    def __call__(self, mine: np.ndarray) -> tuple[float, float]:
        """Return the loss of a trial and its standard error, 0 where it was scored whole."""
        windows, rival = len(mine), self.best
        starts = spread_order(-(-windows // self.batch))
        order = np.concatenate(
            [np.arange(start * self.batch, (start + 1) * self.batch) for start in starts]
        )
        order = order[order < windows]
        for look in range(1, len(starts) if rival is not None else 1):
            places = order[: look * self.batch]
            assert rival is not None
            pair = mine[places].tolist(), rival[places].tolist()
            if self.race.is_lost(*pair, windows, len(starts) - 1):
                self.scored.append(len(places) / windows)
                difference, error = paired_difference(*pair, windows)
                return float(rival.mean()) + difference, error
        self.scored.append(1.0)
        if rival is None or mine.mean() < rival.mean():
            self.best = mine
        return float(mine.mean()), 0.0

    @property
    def given_up(self) -> float:
        """Return the share of trials that were not scored whole."""
        return float(np.mean([share < 1 for share in self.scored]))


def replayed(recorded: Recorded, sorts: Sequence[str], races: Races, seed: int) -> bool:
    """Race recorded trials in a random order; return whether the best one is still found."""
    losses = [
        np.array(row["windows"])
        for row in recorded.rows
        if "windows" in row and row["sort"] in sorts
    ]
    for index in np.random.default_rng(seed).permutation(len(losses)):
        races(losses[index])
    assert races.best is not None
    return bool(races.best.mean() == min(trial.mean() for trial in losses))


class WindowSurrogate:
    """What the real model would lose on each window, for searches around the least loss.

    Each window's loss is a line of the mean loss, and for each allocation something of its own,
    with the spread that recorded trials around the least predicted loss have.
    """

    def __init__(self, mean: Surrogate) -> None:
        """Fit the windows of the recorded trials."""
        self.mean = mean
        near = SORTS["around the least predicted loss"]
        losses = np.array(
            [
                row["windows"]
                for row in mean.recorded.rows
                if "windows" in row and row["sort"] in near
            ]
        )
        totals = losses.mean(1)
        self.lines = np.polyfit(totals, losses, 1)
        self.spread = (losses - self.lines[0] * totals[:, None] - self.lines[1]).std(0)

    def __call__(self, allocation: Allocation) -> np.ndarray:
        """Return the loss of each window, nats per token; their mean is the surrogate's loss."""
        total = self.mean(allocation)
        seed = zlib.crc32(repr(tuple(ranks_of(allocation).values())).encode())
        own = self.spread * np.random.default_rng(seed).standard_normal(len(self.spread))
        losses = self.lines[0] * total + self.lines[1] + own
        return np.asarray(losses + total - losses.mean())
