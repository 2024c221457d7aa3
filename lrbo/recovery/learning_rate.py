"""The learning rate of a training: most of the best step along its first gradient, and falling."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lrbo.errors import NonFiniteError
from lrbo.recovery.student import Student

LOWEST = 0.1  # of the learning rate, at the last step
CLIP = 1.0  # largest norm of a gradient
SHARE = 0.7  # of the best first step: later gradients are smaller, and their noise adds up
FIRST = 1e-3  # step that is tried first
RUNG = math.sqrt(10)  # between two steps that are tried
RUNGS = 8  # either way


def rate_factor(progress: float, warmup: float) -> float:
    """Return the share of the learning rate: a linear rise, then a cosine down to a tenth."""
    if progress < warmup:
        return progress / warmup
    done = (progress - warmup) / (1 - warmup)
    return LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def best_step(change: Callable[[float], float]) -> float | None:
    """Return the size of the step along a line that lowers a loss most.

    Sizes a factor of ``RUNG`` apart are tried, up to the first that is worse than the one below it:
    the result is the vertex of the parabola through no step and these two.

    Args:
        change: What a step of a size adds to the loss; not finite where it is far too large.

    Returns:
        ``None`` if no size lowers the loss.
    """

    def at(rung: int) -> float:
        value = change(FIRST * RUNG**rung)
        return value if math.isfinite(value) else math.inf

    rung, here, above = 0, at(0), math.inf
    while here >= 0:
        if rung == -RUNGS:
            return None
        rung, here, above = rung - 1, at(rung - 1), here
    if rung == 0:
        while (above := at(rung + 1)) < here and rung < RUNGS:
            rung, here = rung + 1, above
    size, larger = FIRST * RUNG**rung, FIRST * RUNG ** (rung + 1)
    curvature = (above / larger - here / size) / (larger - size)
    if math.isinf(above) or curvature <= 0:
        return size
    return min((size - here / size / curvature) / 2, larger)


def learning_rate(
    student: Student,
    windows: Int[Tensor, "windows tokens"],
    optimizer: Callable[[float], torch.optim.Optimizer],
    judged: Callable[[], float],
    before: float,
    restore: Callable[[], None],
) -> float | None:
    """Try first steps of an optimizer, each taken back, and return a share of the best one.

    Their gradient is that of as many windows as a step has, from all of the text alike.

    Args:
        student: The loss, and the parameters that are trained.
        windows: To train on.
        optimizer: Makes an optimizer of these parameters with a rate.
        judged: The loss that steps are to lower.
        before: That loss without a step.
        restore: Takes a step back.

    Returns:
        ``None`` if no step lowers the loss.

    Raises:
        NonFiniteError: If the loss or an element of its gradient is not finite.
    """
    settings, parameters, seen = student.settings, list(student.parameters()), student.tokens
    count = min(settings.batch_windows * settings.accumulation, len(windows))
    rows = (2 * torch.arange(count) + 1) * len(windows) // (2 * count)
    for part in torch.split(rows, settings.batch_windows):
        (student(windows[part], part)["loss"] * (len(part) / count)).backward()
    student.tokens = seen
    student.require_finite_gradients()
    nn.utils.clip_grad_norm_(parameters, CLIP)
    gradients = [parameter.grad for parameter in parameters]

    def change(rate: float) -> float:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer(rate).step()
        try:
            return judged() - before
        except NonFiniteError:
            return math.inf
        finally:
            restore()

    size = best_step(change)
    student.zero_grad()
    return None if size is None else SHARE * size
