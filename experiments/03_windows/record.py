"""Score allocations of the real model on many windows, each window by itself.

    python experiments/03_windows/record.py

Writes losses.npz anew after each allocation; stop it and type it again as you like.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import compressed
from lrbo.config import compose
from lrbo.files.atomic import replacing
from lrbo.optimization.space import sobol_point
from lrbo.optimization.variables import WeightSpace
from lrbo.pipeline import build_worker, planning
from lrbo.progress import Reporter
from lrbo.study.journal import Study

FILE = Path(__file__).with_name("losses.npz")
WINDOWS, TOKENS = 96, 512


def wanted(space: WeightSpace, count: int) -> Iterator[tuple[str, Allocation]]:
    """Yield the baselines, and Sobol points of the space at its width and at half of it."""
    yield "uniform", space.problem.uniform()
    yield "analytic", space.problem.by_loss()
    for index in range(count):
        for width, seed in ((1.0, 11), (0.5, 12)):
            point = sobol_point(space, index, seed)
            shrunk = {name: value * width for name, value in point.items()}
            yield f"sobol {width}", space.allocate(shrunk)


def main() -> None:
    """Score what is not scored yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12, help="Sobol points of each width")
    parser.add_argument("--folder", type=Path, default=Path("studies/windows"))
    options = parser.parse_args()
    study = Study(options.folder)
    config: Any = compose.composed(
        "search",
        [
            f"study={study.folder}",
            f"data.validation.tokens={WINDOWS * TOKENS}",
            "sensitivity.layers_per_kind=0",
            "evaluation.kl_top=1",
        ],
    )
    plan = planning.plan_search(config, study, [])
    reporter = Reporter()
    with study.locked():
        worker = build_worker.build_worker(plan, study, reporter)
        space: Any = build_worker.informed_space(
            plan, study, worker.model, worker.prepared, reporter
        )
        if FILE.is_file():
            arrays = np.load(FILE)
            sorts, rows = list(arrays["sorts"]), list(arrays["losses"])
        else:
            dense = worker.task.losses(worker.model, worker.windows)
            sorts, rows = ["dense"], [dense.numpy().astype(np.float32)]
        for index, (sort, allocation) in enumerate(wanted(space, options.count), start=1):
            if index < len(rows):
                continue
            start = time.perf_counter()
            with compressed(
                worker.model,
                allocation,
                worker.prepared,
                tokens=worker.windows.numel(),
                buffers=worker.buffers,
            ):
                losses = worker.task.losses(worker.model, worker.windows)
            rows.append(losses.numpy().astype(np.float32))
            sorts.append(sort)
            with replacing(FILE) as beside, beside.open("wb") as file:
                np.savez_compressed(file, sorts=np.array(sorts), losses=np.stack(rows))
            seconds = time.perf_counter() - start
            reporter.say(f"{index:>4} {sort:<12} {float(losses.mean()):.4f}  {seconds:.1f} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
