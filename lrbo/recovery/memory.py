"""What a recovery will take of memory and disk, before anything is loaded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
WIDE = 4  # bytes of a number that is trained
ADAM = 4 * WIDE  # of it: gradient, two moments, the best so far
LOGITS = 3  # copies of a batch's logits in float32: of both models, and their gradient


@dataclass(frozen=True)
class Sizes:
    """What the estimate is made from: counts of numbers and of bytes."""

    dense: int  # bytes of the dense model, in the dtype that it runs in
    compressed: int  # likewise
    trained: Mapping[int, int]  # numbers that are trained, by block; -1 for those outside
    windows: int
    weighed: int  # windows that gradients are taken of
    tokens: int  # of a window
    features: int  # of the residual stream
    inside: int  # outputs of all layers of a block together
    blocks: int
    vocabulary: int
    itemsize: int
    batches: Mapping[str, int]  # windows that go through together, by stage
    matrices: int  # numbers of factors and thin layers
    updates: int  # numbers that adapters train


def needs(sizes: Sizes, stages: Collection[str], scratch: int) -> dict[str, int]:
    """Return the bytes of memory by what needs them; hidden states take at most ``scratch``."""
    total = sum(sizes.trained.values())
    in_training = {"distill": total, "mixed_rank": total, "adapter": sizes.updates}
    states = max(2 * sizes.windows, sizes.blocks * sizes.weighed) * sizes.tokens
    states *= sizes.features * sizes.itemsize
    parts = {
        "the dense model": sizes.dense,
        "the compressed model": sizes.compressed,
        "its numbers in float32": total * WIDE,
    }
    optimizers, activations = [], []
    if "blocks" in stages:
        parts["hidden states"] = min(states, scratch)
        optimizers.append(max(sizes.trained.values(), default=0) * ADAM)
        step = sizes.batches["blocks"] * sizes.tokens
        activations.append(3 * step * sizes.inside * sizes.itemsize)
    for stage in in_training.keys() & {*stages}:
        step = sizes.batches[stage] * sizes.tokens
        logits = LOGITS * step * sizes.vocabulary * WIDE
        optimizers.append(in_training[stage] * ADAM)
        if stage == "adapter":  # the best state, and sums for the backward pass
            optimizers[-1] += (total + sizes.matrices) * WIDE
        activations.append(3 * step * sizes.inside * sizes.itemsize * sizes.blocks + logits)
    parts["gradients and optimizer"] = max(optimizers, default=0)
    parts["activations of a step"] = max(activations, default=0)
    return parts


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, within the limit of this container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no control group, or a limit of "max"
        limit, used = (
            int((CGROUP / name).read_text(encoding="ascii"))
            for name in ("memory.max", "memory.current")
        )
        free = min(free, limit - used)
    return free


def memory_problems(
    sizes: Sizes, stages: Collection[str], scratch: int, device: torch.device
) -> list[str]:
    """Return the problem, with numbers, if a recovery cannot fit into the memory of a device."""
    wanted = needs(sizes, stages, scratch)
    total, free = sum(wanted.values()), free_memory(device)
    if total <= free:
        return []
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in wanted.items())
    return [
        f"recovery needs about {total / GIB:.1f} GiB of memory on {device} ({parts}), and "
        f"{free / GIB:.1f} GiB are free; take fewer stages, smaller batches or shorter windows, or "
        "another machine"
    ]


def disk_problems(
    sizes: Sizes, stored: Mapping[str, Tensor], out: Path, stages: Collection[str], scratch: int
) -> list[str]:
    """Return the problems, with numbers, of disks that cannot hold what is written meanwhile."""
    states = 2 * sizes.windows * sizes.tokens * sizes.features * sizes.itemsize
    weights = sum(tensor.nbytes for tensor in stored.values())
    total, whole = sum(sizes.trained.values()), len({"distill", "mixed_rank"} & {*stages})
    kept = total * WIDE * (len(stages) + 3 * whole + 2 * ("adapter" in stages))
    moments = sizes.blocks * sizes.features**2 * WIDE * ("blocks" in stages)
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    disks = {folder: weights + kept + moments}
    if "blocks" in stages and states > scratch:
        spill = Path(tempfile.gettempdir())
        disks[spill] = disks.get(spill, 0) + states - scratch
    return [
        f"recovery writes about {wanted / GIB:.1f} GiB to {disk}, where {free / GIB:.1f} GiB are "
        "free; make room, or choose another folder"
        for disk, wanted in disks.items()
        if wanted > (free := shutil.disk_usage(disk).free)
    ]
