"""Which windows of a text rank allocations as the whole text does."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def select_windows(losses: Float[Tensor, "allocations windows"], count: int) -> list[int]:
    """Return the windows on which allocations differ as they do over all windows.

    A window's own level says nothing of allocations, so each is centred over them. What is wanted
    are ``count`` windows whose mean differs from the mean of all by as little as possible, summed
    over the squares of all allocations: one window after another is added that brings it
    nearest, and then windows are exchanged, the best exchange first, until none helps.

    Args:
        losses: Of each allocation on each window, nats per token.
        count: How many are wanted, up to all.

    Returns:
        Their places, ascending.

    Raises:
        ValueError: If there are fewer than two allocations, fewer windows than wanted, or losses
            that are not finite.
    """
    allocations, windows = losses.shape
    if allocations < 2:
        raise ValueError(f"{allocations} allocations: at least 2 are needed to see a difference.")
    if not 1 <= count <= windows:
        raise ValueError(f"{count} windows are wanted: expected 1 to {windows}, which there are.")
    bad = int((~torch.isfinite(losses)).sum())
    if bad:
        raise ValueError(f"{bad} of {losses.numel()} losses are not finite; leave their rows out.")
    centred = losses.double() - losses.double().mean(0)
    profiles = centred - centred.mean(1, keepdim=True)  # mean over windows: the zero vector
    chosen: list[int] = []
    total = torch.zeros(allocations, dtype=torch.float64)
    for _ in range(count):
        chosen.append(_nearest(total, profiles, chosen)[0])
        total = profiles[:, chosen].sum(1)
    best = float((total**2).sum())
    while count < windows:
        exchanges = []
        for place, window in enumerate(chosen):
            other, distance = _nearest(total - profiles[:, window], profiles, chosen)
            exchanges.append((distance, place, other))
        distance, place, other = min(exchanges)
        if not distance < best * (1 - 1e-9):  # rounding must not exchange forever
            break
        chosen[place] = other
        total, best = profiles[:, chosen].sum(1), distance
    return sorted(chosen)


def _nearest(
    total: Float[Tensor, " allocations"],
    profiles: Float[Tensor, "allocations windows"],
    taken: list[int],
) -> tuple[int, float]:
    """Return the window that brings a sum nearest to nothing, and the squared distance."""
    distances = ((total[:, None] + profiles) ** 2).sum(0)
    distances[taken] = torch.inf
    found = int(distances.argmin())
    return found, float(distances[found])
