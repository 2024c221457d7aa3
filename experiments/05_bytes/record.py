"""Score allocations of the byte menu on the real model, for a surrogate that searches can afford.

    python experiments/05_bytes/record.py

Appends to recorded_BITS.jsonl until all are there; stop it and type it again as you like. The
menus, with their predicted losses, go to menus_BITS.npz.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrbo.allocation.allocate import Allocation
from lrbo.config import compose
from lrbo.optimization.space import sobol_point
from lrbo.optimization.variables import WeightSpace
from lrbo.pipeline import build_worker, planning
from lrbo.progress import Reporter
from lrbo.study.journal import Study
from lrbo.trials.records import TrialRequest

HERE = Path(__file__).parent
WIDTHS = (0.25, 0.5, 1.0)  # of Sobol points, as shares of the bounds


def wanted(space: WeightSpace, count: int) -> Iterator[tuple[str, dict[str, float], Allocation]]:
    """Yield allocations in turn of every sort, so that any beginning has all of them."""
    origin = dict.fromkeys(space.names, 0.0)
    yield "uniform", {}, space.problem.uniform()
    yield "analytic", origin, space.problem.by_loss()
    for name in space.names:
        if name.startswith("form"):
            for step in (-0.4, 0.4):
                point = {**origin, name: step}
                yield "one form", point, space.allocate(point)
    for index in range(count):
        for width in WIDTHS:
            unit = sobol_point(space, index, seed=int(100 * width))
            point = {name: value * width for name, value in unit.items()}
            yield f"weights {width}", point, space.allocate(point)


def main() -> None:
    """Score what is not scored yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=3.25, help="per parameter of the blocks")
    parser.add_argument("--count", type=int, default=30, help="allocations of each width")
    parser.add_argument("--folder", type=Path, default=Path("studies/recorded_bytes"))
    parser.add_argument("overrides", nargs="*", help="further settings of the search")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    bits = options.bits
    study = Study(options.folder.with_name(f"{options.folder.name}_{bits}"))
    overrides = [
        "experiment=bytes", f"budget.bits_per_parameter={bits}", "sensitivity.layers_per_kind=0",
        "tracking.enabled=false", *options.overrides,
    ]  # fmt: skip
    config: Any = compose.composed("search", [f"study={study.folder}", *overrides])
    plan = planning.plan_search(config, study, [])
    reporter = Reporter()
    with study.locked():
        worker = build_worker.build_worker(plan, study, reporter)
        space: Any = build_worker.informed_space(
            plan, study, worker.model, worker.prepared, reporter
        )
        save_menus(HERE / f"menus_{bits}.npz", space, study.state.dense["nll"])
        file = HERE / f"recorded_{bits}.jsonl"
        done = len(file.read_text("utf-8").splitlines()) if file.is_file() else 0
        for index, (sort, point, allocation) in enumerate(wanted(space, options.count)):
            if index < done:
                continue
            start = time.perf_counter()
            result = worker(TrialRequest(index, "sobol", {}, allocation, index))
            menus = space.problem.menus
            line = {
                "sort": sort,
                "nll": result.metrics["nll"],
                "seconds": round(time.perf_counter() - start, 2),
                "windows": [round(lost, 5) for lost in result.example_losses],
                "divergences": [round(lost, 5) for lost in result.example_divergences],
                "point": [point[name] for name in space.names] if point else None,
                "options": [menus[n].index(o) for n, o in allocation.options.items()],
            }
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line, separators=(",", ":")) + "\n")
            reporter.say(f"{index:>4} {sort:<14} {line['nll']:.4f}  {line['seconds']:.1f} s")


def save_menus(path: Path, space: WeightSpace, dense: float) -> None:
    """Write units, and of each the forms, levels, bytes and predicted losses on its menu."""
    rows = []
    for unit, menu in enumerate(space.problem.menus.values()):
        assert menu.losses is not None
        at = 0
        for section in menu.sections:
            for level, cost in zip(section.levels, section.costs, strict=True):
                numbers = [*map(int, level), *[-1] * (2 - len(level))]
                rows.append((unit, section.form, *numbers, int(cost[1]), float(menu.losses[at])))
                at += 1
    units, forms, bases, ranks, sizes, losses = map(np.array, zip(*rows, strict=True))
    specs = space.problem.units
    np.savez_compressed(
        path,
        names=np.array([spec.name for spec in specs]),
        kinds=np.array([spec.kind for spec in specs]),
        blocks=np.array([spec.block for spec in specs]),
        shapes=np.array([(spec.out_features, spec.in_features) for spec in specs]),
        variables=np.array(space.names),
        unit=units.astype(np.int16),
        form=forms,
        numbers=np.stack([bases, ranks], 1).astype(np.int16),
        bytes=sizes.astype(np.int32),
        loss=losses.astype(np.float32),
        budget=space.problem.budget.limit,
        dense=dense,
    )


if __name__ == "__main__":
    main()
