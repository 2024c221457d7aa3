"""The windows that judge an end-to-end stage: as many as leave the time to its steps."""

from __future__ import annotations

import math
import time

import torch
from jaxtyping import Int
from torch import Tensor

from lrbo.recovery.stage import Recovery
from lrbo.recovery.states import read_tensors, write_tensors

FILE, NAME = "judging.safetensors", "held_back"
SHARE = 0.1  # of the time, for judging
LEAST = 8  # windows, if there are so many
STEP = 4  # forward passes of the dense model that take as long as a step on as many windows


def windows_in_time(recovery: Recovery, count: int | None) -> Int[Tensor, "windows tokens"]:
    """Return windows to judge by, at equal distances among those held back.

    They pass the dense model once, and the compressed one before the first step, after the last
    and at each look between, for all of which ``SHARE`` of the time is enough. An interrupted run
    goes on with those that it began with.

    Args:
        recovery: With ``batch_windows`` and others of an end-to-end stage among its settings.
        count: Steps, where time does not decide how many.
    """
    every, path = recovery.held_back, recovery.folder / FILE
    if (read := read_tensors(path)) is not None:
        rows = read[1][NAME]
    else:
        taken = min(max(_affordable(recovery, count), LEAST), len(every))
        rows = (2 * torch.arange(taken) + 1) * len(every) // (2 * taken)
        write_tensors(path, {NAME: rows}, {})
    if len(rows) < len(every):
        recovery.reporter.say(
            f"{len(rows)} of {len(every)} windows judge the model: there is no time for more"
        )
    return every[rows]


def _affordable(recovery: Recovery, count: int | None) -> int:
    """Return the number of windows that a share of the time can pass as often as is needed."""
    settings, seconds = recovery.settings, recovery.deadline()
    window = _window_seconds(recovery)
    step = STEP * window * settings.batch_windows * settings.accumulation
    steps = seconds / step if count is None else count
    passes = 3 + steps / settings.evaluate_every
    return int(SHARE * seconds / (passes * window))


def _window_seconds(recovery: Recovery) -> float:
    """Time a window in the dense model."""
    seconds = math.inf
    for _ in range(2):  # the first run is slower than all others
        start = time.perf_counter()
        recovery.task.losses(recovery.dense, recovery.held_back[:1])
        seconds = min(seconds, time.perf_counter() - start)
    return max(seconds, 1e-9)
