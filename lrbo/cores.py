"""Which cores this process may use, and how torch's threads share them with other processes."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# Products of other shapes that oneDNN compiles and keeps, 1024 by itself: a step of training on a
# model with another rank in each layer has more, and would compile each of them each time.
KERNELS = "8192"
BUSY = 2.0  # processes per core, from which on fewer threads are faster


def available_cores(quota: Path = CGROUP_QUOTA) -> int:
    """Return how many cores the process may use: by its affinity and its container's quota."""
    cores = _affinity()
    with suppress(OSError, ValueError):  # not Linux, no control group, or a quota of "max"
        microseconds, period = map(int, quota.read_text(encoding="ascii").split())
        cores = min(cores, math.ceil(microseconds / period))
    return max(cores, 1)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_torch(say: Callable[[str], None]) -> None:
    """Prepare the threads of torch, unless it is loaded already, and say what the user may mend."""
    if "torch" not in sys.modules:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
        for note in prepare_threads(os.environ, available_cores(), _affinity(), load):
            say(note)


def prepare_threads(
    environment: MutableMapping[str, str], cores: int, affinity: int, load: float
) -> list[str]:
    """Set in ``environment`` what libraries read when torch is loaded, except what the user set.

    A thread that waits for another sleeps. By default it spins and takes the core that the other
    one needs: beside ten busy processes on two cores that made a forward pass 3 to 23 times slower.

    Their number, by itself ``affinity``, never follows from the ``load``, the processes that run or
    wait: sums in another order round differently, and a continued search must propose the same.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)
    if "OMP_NUM_THREADS" in environment:
        return []
    notes = []
    if cores < affinity:
        environment["OMP_NUM_THREADS"] = str(cores)
        notes.append(
            f"Threads: {cores} of {affinity}, the CPU quota of this container; "
            "OMP_NUM_THREADS=N sets another number"
        )
    if cores > 1 and load >= BUSY * cores:
        share = max(1, int(cores**2 / (cores + load)))
        notes.append(
            f"The machine is busy (load {load:.1f} on {cores} cores): OMP_NUM_THREADS={share} "
            "before the command is likely to be faster"
        )
    return notes
