"""The windows that blocks are trained on: as many as there is time to pass and to learn from."""

from __future__ import annotations

import math
import time

import torch
from jaxtyping import Int
from torch import Tensor

from lrbo.recovery.stage import Recovery
from lrbo.recovery.states import read_tensors, write_tensors
from lrbo.tasks.model_task import Segments

FILE = "windows.safetensors"
NAMES = ("training", "held_back")
EPOCHS = 2  # over the windows that are taken, where time does not suffice for all of them
STEP = 3  # forward passes that take as long as a step on as many windows
HELD_BACK = 8  # windows that are taken at least, if there are so many


def windows_in_time(
    recovery: Recovery, dense: Segments, checks: int
) -> tuple[Int[Tensor, "windows tokens"], Int[Tensor, "others tokens"]]:
    """Return windows to train blocks on and windows to judge them by.

    Both streams pass every window through every block, whether a step uses it or not. So no more
    are taken than the steps of ``recovery.tokens`` can see, or than time allows ``EPOCHS`` steps
    on, at equal distances. An interrupted run goes on with those that it began with.

    Args:
        recovery: With ``batch_windows`` among its settings.
        dense: The dense model, whose first block is timed.
        checks: How often a block is judged after steps.
    """
    every, path = (recovery.training, recovery.held_back), recovery.folder / FILE
    if (read := read_tensors(path)) is not None:
        taken = [read[1][name] for name in NAMES]
    else:
        counts = _counts(recovery, dense, checks)
        taken = [torch.arange(n) * len(each) // n for n, each in zip(counts, every, strict=True)]
        write_tensors(path, dict(zip(NAMES, taken, strict=True)), {})
    training, held_back = (each[rows] for rows, each in zip(taken, every, strict=True))
    if len(training) < len(every[0]):
        recovery.reporter.say(
            f"Blocks: {len(training)} of {len(every[0])} windows to train on and {len(held_back)} "
            f"of {len(every[1])} held back: there are no steps, or no time, for more"
        )
    return training, held_back


def _counts(recovery: Recovery, dense: Segments, checks: int) -> tuple[int, int]:
    training, held_back = len(recovery.training), len(recovery.held_back)
    size, tokens = recovery.settings.batch_windows, recovery.tokens
    if tokens is not None:
        steps = math.ceil(tokens / (size * recovery.training.shape[1]))
        return min(training, size * steps), held_back
    share = held_back / training
    passes = 2 * (1 + share) + (checks + 1) * share + STEP * EPOCHS
    seconds = len(dense) * passes * _window_seconds(recovery, dense)
    possible = max(int(recovery.deadline() / max(seconds, 1e-9)), size)
    if possible >= training:
        return training, held_back
    return possible, min(held_back, max(math.ceil(share * possible), HELD_BACK))


def _window_seconds(recovery: Recovery, dense: Segments) -> float:
    """Time a window in the first block."""
    seconds = math.inf
    with dense.open_block(0) as block, torch.no_grad():
        hidden = dense.embed(recovery.training[: recovery.settings.batch_windows])
        for _ in range(2):  # the first run is slower than all others
            start = time.perf_counter()
            dense.run(block, 0, hidden).sum().item()  # which waits for a device
            seconds = min(seconds, time.perf_counter() - start)
    return seconds / len(hidden)
