"""Which windows of a text rank allocations as the whole text does."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import compressed
from lrbo.config.schema import windows_of
from lrbo.data.windows import RoleExamples
from lrbo.errors import NonFiniteError, StudyError
from lrbo.factorization.factors import Buffers
from lrbo.factorization.prepared import Prepared
from lrbo.optimization.space import Space, sobol_point
from lrbo.pipeline.planning import Plan
from lrbo.progress import Reporter
from lrbo.study.journal import Study


def select_windows(losses: Float[Tensor, "allocations windows"], count: int) -> list[int]:
    """Select the windows on which allocations differ as they do over all windows.

    A window's own level says nothing of allocations, so each is centred over them. The mean of the
    ``count`` windows differs from that of all by as little as possible, in squares summed over
    allocations: the window that brings it nearest is added until there are ``count``, and then the
    best exchange is made until none helps. Losses are in nats per token, indices ascend.

    Raises:
        ValueError: If there are fewer than two allocations, fewer windows than ``count``, or losses
            that are not finite.
    """
    allocations, windows = losses.shape
    if allocations < 2:
        raise ValueError(f"{allocations} allocations: at least 2 are needed to see a difference.")
    if not 1 <= count <= windows:
        raise ValueError(f"{count} windows are wanted: expected 1 to {windows}, which there are.")
    if bad := int((~torch.isfinite(losses)).sum()):
        raise ValueError(f"{bad} of {losses.numel()} losses are not finite; leave their rows out.")
    centred = losses.double() - losses.double().mean(0)
    profiles = centred - centred.mean(1, keepdim=True)  # mean over windows: the zero vector
    selected: list[int] = []
    total = torch.zeros(allocations, dtype=torch.float64)

    def nearest(total: Tensor) -> tuple[int, float]:
        distances = ((total[:, None] + profiles) ** 2).sum(0)
        distances[selected] = torch.inf
        index = int(distances.argmin())
        return index, float(distances[index])

    for _ in range(count):
        selected.append(nearest(total)[0])
        total = profiles[:, selected].sum(1)
    best = float((total**2).sum())
    while count < windows:
        exchanges = []
        for position, window in enumerate(selected):
            other, distance = nearest(total - profiles[:, window])
            exchanges.append((distance, position, other))
        distance, position, other = min(exchanges)
        if not distance < best * (1 - 1e-9):  # rounding must not exchange forever
            break
        selected[position] = other
        total, best = profiles[:, selected].sum(1), distance
    return sorted(selected)


def pool_allocations(space: Space, count: int, seed: int) -> list[Allocation]:
    """Allocations that windows are compared on: the least predicted loss, and Sobol points.

    The search itself takes the Sobol points of ``seed``, these are those of ``seed + 1``.
    """
    analytic = [space.problem.by_loss()] if space.problem.is_predicted else []
    points = (sobol_point(space, index, seed + 1) for index in range(count - len(analytic)))
    return [*analytic, *(space.allocate(point) for point in points)]


def choose_windows(
    plan: Plan,
    study: Study,
    space: Space,
    model: PreTrainedModel,
    prepared: Mapping[str, Prepared],
    reporter: Reporter,
) -> RoleExamples:
    """Choose the validation windows of the pool that rank allocations as all of it does, by loss.

    The losses of each allocation are an event of the journal, and so is the choice: an interrupted
    search goes on with the next allocation.

    Raises:
        StudyError: If fewer than two allocations have a finite loss.
    """
    data, task, pool = plan.config.data, plan.task, plan.windows["validation"]
    assert data.validation.tokens is not None  # checked: else there would be nothing to choose
    count = windows_of(data.validation.tokens, data)
    allocations = pool_allocations(space, plan.config.evaluation.pool_allocations, plan.config.seed)
    missing = [index for index in range(len(allocations)) if index not in study.state.pooled]
    trials = len(missing) * len(pool.examples) / count
    reporter.say(
        f"Choosing {count} of {len(pool.examples)} validation windows by what "
        f"{len(allocations)} allocations lose on each: once per study, as many tokens as "
        f"{trials:.0f} trials"
    )
    buffers: Buffers = {}
    total, positions = len(missing) * pool.scored, task.positions(pool.examples)
    with reporter.step("Pool of validation text", total, task.record.counted) as advance:
        for index in missing:
            start = time.perf_counter()
            losses: list[float] | None = None
            error = None
            try:
                with compressed(
                    model, allocations[index], prepared, tokens=positions, buffers=buffers
                ):
                    losses = task.losses(model, pool.examples, on_scored=advance).tolist()
            except NonFiniteError as failure:  # says nothing of windows, and would come back
                error = str(failure)
            seconds = time.perf_counter() - start
            study.record("pooled", allocation=index, losses=losses, error=error, seconds=seconds)
    finite = [losses for _, losses in sorted(study.state.pooled.items()) if losses is not None]
    if len(finite) < 2:
        raise StudyError(
            f"{len(finite)} of {len(allocations)} allocations have a finite loss on the pool of "
            "validation text, 2 are needed to choose windows; begin another study=NAME with "
            "evaluation.pool_tokens=null, or with a higher budget.keep_ratio"
        )
    indices = select_windows(torch.tensor(finite, dtype=torch.float64), count)
    subset = pool.only(indices)
    study.record(
        "chosen", windows=indices, pool=len(pool.examples), text=subset.text, digest=subset.digest
    )
    return subset
