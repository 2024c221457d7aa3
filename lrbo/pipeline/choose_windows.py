"""Choose the validation windows out of a pool, by what a few allocations lose on each of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lrbo.allocation import Allocation
from lrbo.calibration.corpus import TokenWindows
from lrbo.compression import Buffers, compressed
from lrbo.errors import NonFiniteError, StudyError
from lrbo.evaluation.perplexity import score_windows
from lrbo.evaluation.selection import select_windows
from lrbo.nested import LowRankFactors
from lrbo.optimization.base import Space
from lrbo.optimization.study import Study
from lrbo.progress import Reporter


@dataclass(frozen=True)
class PoolSettings:
    """How windows are chosen.

    Attributes:
        windows: That are wanted.
        allocations: That are scored on the whole pool, at least 2.
        seed: Of the search.
        batch_windows: Windows per forward pass.
        chunk_tokens: Rows of logits at a time.
    """

    windows: int
    allocations: int
    seed: int
    batch_windows: int = 4
    chunk_tokens: int = 256


def pool_allocations(space: Space, count: int, seed: int) -> list[Allocation]:
    """Return what windows are compared with: the least predicted loss, and Sobol points.

    Args:
        space: With its loss curves, if there are any.
        count: How many.
        seed: Of the search, whose own Sobol points are others.
    """
    known = space.analytic()
    found = [] if known is None else [known[0]]
    points = (space.sobol_point(index, seed + 1) for index in range(count - len(found)))
    return [*found, *(space.allocate(point) for point in points)]


def choose_windows(
    study: Study,
    space: Space,
    model: PreTrainedModel,
    factors: Mapping[str, LowRankFactors],
    pool: TokenWindows,
    settings: PoolSettings,
    reporter: Reporter,
) -> TokenWindows:
    """Return the windows of the pool that rank allocations as the whole pool does.

    By their nll alone, whatever else the objective weighs. What each allocation lost is a line
    of the journal, and so is the choice: a search that was interrupted goes on with the next
    allocation, and one that was continued chooses nothing.

    Args:
        study: Locked, without a choice yet.
        space: With its loss curves, if there are any.
        model: The dense model, in evaluation mode.
        factors: In the model's dtype and on its device.
        pool: More windows than are wanted.
        settings: How many, and by what.
        reporter: Shows progress.

    Raises:
        StudyError: If fewer than two allocations have a finite loss.
    """
    allocations = pool_allocations(space, settings.allocations, settings.seed)
    missing = [place for place in range(len(allocations)) if place not in study.state.pooled]
    trials = len(missing) * len(pool.ids) / settings.windows
    reporter.say(
        f"Choosing {settings.windows} of {len(pool.ids)} validation windows by what "
        f"{len(allocations)} allocations lose on each: once per study, as many tokens as "
        f"{trials:.0f} trials"
    )
    buffers: Buffers = {}
    total = len(missing) * pool.scored_tokens
    with reporter.step("Pool of validation text", total, "tokens") as advance:
        for place in missing:
            start = time.perf_counter()
            losses: list[float] | None = None
            error = None
            try:
                with compressed(
                    model,
                    allocations[place],
                    factors,
                    tokens=pool.ids.numel(),
                    buffers=buffers,
                ):
                    losses = score_windows(
                        model,
                        pool.ids,
                        batch_windows=settings.batch_windows,
                        chunk_tokens=settings.chunk_tokens,
                        on_tokens=advance,
                    ).tolist()
            except NonFiniteError as found:  # says nothing of windows, and would come back
                error = str(found)
            seconds = time.perf_counter() - start
            study.record("pooled", place=place, losses=losses, error=error, seconds=seconds)
    known = [losses for _, losses in sorted(study.state.pooled.items()) if losses is not None]
    if len(known) < 2:
        raise StudyError(
            f"{len(known)} of {len(allocations)} allocations have a finite loss on the pool of "
            "validation text, 2 are needed to choose windows; begin another study=NAME with "
            "evaluation.pool_tokens=null, or with a higher budget.keep_ratio"
        )
    places = select_windows(torch.tensor(known, dtype=torch.float64), settings.windows)
    chosen = pool.only(places)
    study.record(
        "chosen", windows=places, pool=len(pool.ids), text=chosen.text, digest=chosen.digest
    )
    return chosen
