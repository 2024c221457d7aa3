"""Score allocations of many sorts on the real model, for a surrogate that searches can afford.

    python experiments/02_search/record.py

Appends to recorded.jsonl until all are there; stop it and type it again as you like. Layers and
their predicted losses go to layers.npz.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from surrogate import ranks_of

from lrbo.allocation.allocate import Allocation
from lrbo.config import compose
from lrbo.factorization.factors import LowRankFactors
from lrbo.optimization.space import Space, sobol_point
from lrbo.optimization.variables import WeightSpace
from lrbo.pipeline import build_worker, planning
from lrbo.progress import Reporter
from lrbo.study.journal import Study
from lrbo.trials.records import TrialRequest

HERE = Path(__file__).parent
MULTIPLE = 8


def planned(overrides: list[str], study: Study) -> planning.Plan:
    """Return the plan of a search with some overrides."""
    config: Any = compose.composed("search", [f"study={study.folder}", *overrides])
    return planning.plan_search(config, study, [])


def wanted(
    weights: WeightSpace, ratios: dict[str, Space], count: int
) -> Iterator[tuple[str, Allocation]]:
    """Yield allocations in turn of every sort, so that any beginning has all of them."""
    yield "uniform", weights.problem.uniform()
    analytic = weights.problem.by_loss()
    yield "analytic", analytic
    for index in range(count):
        for width, space in ((0.5, weights), (1.0, weights)):
            point = sobol_point(space, index, seed=int(10 * width))
            wide = {name: value * width / 0.5 for name, value in point.items()}
            yield f"weights {width}", space.allocate(wide)
        for name, other in ratios.items():
            yield name, other.allocate(sobol_point(other, index, seed=1))
        yield "layers", _shaken(weights, analytic, index)


def _shaken(space: WeightSpace, analytic: Allocation, index: int) -> Allocation:
    """Return the analytic allocation with the ratio of every layer multiplied at random."""
    generator = np.random.default_rng(index)
    return space.problem.by_ratio(
        {
            name: space.problem.share(analytic, (name,))
            * float(np.exp(0.2 * generator.standard_normal()))
            for name in space.problem.menus
        }
    )


def main() -> None:
    """Score what is not scored yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40, help="allocations of each sort")
    parser.add_argument("--folder", type=Path, default=Path("studies/recorded"))
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    study = Study(options.folder)
    # A worker that races keeps what each window lost.
    base = ["data.validation.tokens=8192", "sensitivity.layers_per_kind=0", "search.racing=0.95"]
    plan = planned([*base, "space=weights"], study)
    ratios: dict[str, Any] = {
        name: planned([*base, f"space={name}"], Study(Path("studies/none"))).space
        for name in ("per_kind", "per_kind_and_depth")
    }
    reporter = Reporter()
    with study.locked():
        worker = build_worker.build_worker(plan, study, reporter)
        space: Any = build_worker.informed_space(
            plan, study, worker.model, worker.prepared, reporter
        )
        save_layers(HERE / "layers.npz", space, worker.prepared, study.state.dense["nll"])
        file = HERE / "recorded.jsonl"
        line_count = len(file.read_text("utf-8").splitlines()) if file.is_file() else 0
        for index, (sort, allocation) in enumerate(wanted(space, ratios, options.count)):
            if index < line_count:
                continue
            start = time.perf_counter()
            result = worker(TrialRequest(index, "sobol", {}, allocation, index))
            line = {
                "sort": sort,
                "nll": result.metrics["nll"],
                "seconds": round(time.perf_counter() - start, 2),
                "windows": [round(lost, 5) for lost in result.example_losses],
                "ranks": [rank or 0 for rank in ranks_of(allocation).values()],
            }
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line, separators=(",", ":")) + "\n")
            reporter.say(f"{index:>4} {sort:<20} {line['nll']:.4f}  {line['seconds']:.1f} s")


def save_layers(
    path: Path, space: WeightSpace, factors: Mapping[str, LowRankFactors], dense: float
) -> None:
    """Write names, shapes and predicted losses of the layers, at ranks that are on offer."""
    units = space.problem.units
    losses = {name: f.loss.numpy() for name, f in factors.items() if f.loss is not None}
    longest = max(map(len, losses.values()))
    curves = np.zeros((len(units), -(-longest // MULTIPLE)), np.float32)
    for row, spec in zip(curves, units, strict=True):
        curve = losses[spec.name][::MULTIPLE]
        row[: len(curve)] = curve
    np.savez_compressed(
        path,
        names=np.array([spec.name for spec in units]),
        kinds=np.array([spec.kind for spec in units]),
        blocks=np.array([spec.block for spec in units]),
        shapes=np.array([(spec.out_features, spec.in_features) for spec in units]),
        curves=curves,
        budget=space.problem.budget.limit,
        dense=dense,
    )


if __name__ == "__main__":
    main()
