"""Do validation windows that are chosen by a few allocations rank other allocations better?

    python experiments/03_windows/run.py

On losses.npz, which record.py measured: allocations of the real model on many windows. Many times
over, windows are divided into a pool and others that nothing is chosen by, and allocations into
some that windows are chosen by and others that are ranked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from lrbo.pipeline.choose_windows import select_windows

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
FILE = Path(__file__).with_name("losses.npz")
SPLITS = 3 if SMOKE else 200
POOL, SELECTING = 64, 8  # windows, allocations
SIZES = (8, 16)  # windows that are wanted
TRIALS = 30
PAID = round(SELECTING * POOL / TRIALS)  # windows of every trial that the choice costs as much as

Losses = NDArray[np.float64]
Choose = Callable[[Losses, int, np.random.Generator], list[int]]


@dataclass(frozen=True)
class Recorded:
    """What was measured.

    Attributes:
        losses: ``(allocations, windows)``, nats per token: of the analytic allocation and of
            Sobol points; what is known to be far off (uniform) is left out.
        second: First window of the second text.
    """

    losses: Losses
    second: int

    @classmethod
    def load(cls) -> Recorded:
        """Read losses.npz."""
        arrays = np.load(FILE)
        searched = ~np.isin(arrays["sorts"], ("dense", "uniform"))
        losses = arrays["losses"].astype(np.float64)
        return cls(losses[searched], losses.shape[1] // 2)


def first(losses: Losses, count: int, generator: np.random.Generator) -> list[int]:
    """Return the first windows: the pool comes in a drawn order, half of it from each text."""
    del losses, generator
    return list(range(count))


def at_random(losses: Losses, count: int, generator: np.random.Generator) -> list[int]:
    """Return windows of any text."""
    return [int(index) for index in generator.permutation(losses.shape[1])[:count]]


def of_most_variance(losses: Losses, count: int, generator: np.random.Generator) -> list[int]:
    """Return the windows that differ most between allocations."""
    del generator
    return [int(index) for index in np.argsort(-losses.var(0), kind="stable")[:count]]


def of_least_distance(losses: Losses, count: int, generator: np.random.Generator) -> list[int]:
    """Return what `evaluation.pool_tokens` chooses."""
    del generator
    return select_windows(torch.tensor(losses), count)


# Name: how windows are chosen, and for a number that is wanted, how many are taken.
WAYS: dict[str, tuple[Choose, Callable[[int], int]]] = {
    "first (no pool)": (first, lambda count: count),
    "random": (at_random, lambda count: count),
    "most variance (the paper's)": (of_most_variance, lambda count: count),
    "least distance (lrbo)": (of_least_distance, lambda count: count),
    "first, twice as many": (first, lambda count: 2 * count),
    f"first, {PAID} more": (first, lambda count: count + PAID),
}


def split(
    recorded: Recorded, generator: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Return windows of the pool, other windows, allocations that choose, others.

    Both sorts of windows hold as many of either text, one after the other.
    """
    windows = recorded.losses.shape[1]
    texts = (np.arange(recorded.second), np.arange(recorded.second, windows))
    mixed = np.stack([generator.permutation(text) for text in texts], axis=1).ravel()
    allocations = generator.permutation(len(recorded.losses))
    return mixed[:POOL], mixed[POOL:], allocations[:SELECTING], allocations[SELECTING:]


def judged(sample: Losses, pool: Losses, others: Losses) -> list[float]:
    """Return what a choice says of allocations that it has not seen.

    Args:
        sample: ``(allocations, windows)``, losses on the chosen windows.
        pool: On the whole pool.
        others: On windows that nothing was chosen by.

    Returns:
        Rank correlation with the pool, regret and error there, rank correlation with the others.
    """
    estimates, truth = sample.mean(1), pool.mean(1)
    regret = truth[estimates.argmin()] - truth.min()
    error = np.std(estimates - truth)
    return [
        float(spearmanr(estimates, truth)[0]),
        1000 * float(regret),
        1000 * float(error),
        float(spearmanr(estimates, others.mean(1))[0]),
    ]


def main() -> None:
    """Print the table."""
    recorded = Recorded.load()
    losses = recorded.losses
    rows: dict[tuple[str, int], list[list[float]]] = {}
    errors: dict[int, list[float]] = {}  # of the first windows, by their number
    for seed in range(SPLITS):
        generator = np.random.default_rng(seed)
        pool, others, selecting, ranked = split(recorded, generator)
        for name, (choose, taken) in WAYS.items():
            for size in SIZES:
                places = choose(losses[np.ix_(selecting, pool)], taken(size), generator)
                on_pool = losses[np.ix_(ranked, pool)]
                row = judged(on_pool[:, places], on_pool, losses[np.ix_(ranked, others)])
                rows.setdefault((name, size), []).append(row)
        whole = losses[np.ix_(ranked, pool)].mean(1)
        for count in range(min(SIZES), POOL + 1):
            off = losses[np.ix_(ranked, pool[:count])].mean(1) - whole
            errors.setdefault(count, []).append(1000 * float(np.std(off)))
    print(
        f"{len(losses)} allocations ({SELECTING} choose), {losses.shape[1]} windows "
        f"({POOL} in the pool), {SPLITS} splits\n"
    )
    heads = [
        "windows chosen by",
        "windows",
        "window scores, 30 trials",
        "rank correlation",
        "regret",
        "error",
        "rank correlation, other windows",
    ]
    print(f"| {' | '.join(heads)} |")
    print(f"|---|{'---:|' * (len(heads) - 1)}")
    for size in SIZES:
        for name, (choose, taken) in WAYS.items():
            correlation, regret, error, elsewhere = np.mean(rows[name, size], axis=0)
            pays = choose in (of_most_variance, of_least_distance)
            cost = TRIALS * taken(size) + SELECTING * POOL * pays
            print(
                f"| {name} | {taken(size)} | {cost:,} | {correlation:.3f} | {regret:.2f} | "
                f"{error:.1f} | {elsewhere:.3f} |"
            )
    print()
    for size in SIZES:
        reached = float(np.mean([row[2] for row in rows["least distance (lrbo)", size]]))
        equal = next(count for count, values in errors.items() if np.mean(values) <= reached)
        saved = equal - size
        trials = f"{SELECTING * POOL / saved:.0f} trials" if saved > 0 else "no number of trials"
        print(
            f"{size} windows of least distance have the error of the first {equal}: the choice is "
            f"paid back by {trials}"
        )


if __name__ == "__main__":
    main()
