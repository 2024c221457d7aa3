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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrbo import builders, config
from lrbo.allocation import Allocation, allocate
from lrbo.optimization.base import BudgetSpace
from lrbo.optimization.study import Study
from lrbo.optimization.weights import WeightSpace
from lrbo.progress import Reporter
from lrbo.trial import TrialRequest

HERE = Path(__file__).parent
MULTIPLE = 8


def planned(overrides: list[str], study: Study) -> builders.Plan:
    """Return the plan of a search with some overrides."""
    chosen: Any = config.composed("search", [f"study={study.folder}", *overrides])
    return builders.plan_search(chosen, study, [])


def wanted(
    weights: WeightSpace, ratios: dict[str, BudgetSpace], count: int
) -> Iterator[tuple[str, Allocation]]:
    """Yield allocations in turn of every sort, so that any beginning has all of them."""
    yield "uniform", weights.uniform()
    found = weights.analytic()
    assert found is not None
    analytic, _ = found
    yield "analytic", analytic
    for index in range(count):
        for width, space in ((0.5, weights), (1.0, weights)):
            point = space.sobol_point(index, seed=int(10 * width))
            wide = {name: value * width / 0.5 for name, value in point.items()}
            yield f"weights {width}", space.allocate(wide)
        for name, other in ratios.items():
            yield name, other.allocate(other.sobol_point(index, seed=1))
        yield "layers", _shaken(weights, analytic, index)


def _shaken(space: WeightSpace, analytic: Allocation, index: int) -> Allocation:
    """Return the analytic allocation with the ratio of every layer multiplied at random."""
    generator = np.random.default_rng(index)
    ratios = {}
    for spec in space.layers:
        rank = analytic.ranks[spec.name]
        kept = 1.0 if rank is None else space.cost(spec, rank) / spec.parameters
        ratios[spec.name] = kept * float(np.exp(0.2 * generator.standard_normal()))
    return allocate(
        ratios, space.layers, space.budget, cost=space.cost, rank_multiple=space.rank_multiple
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
        worker = builders.build_worker(plan, study, reporter)
        space: Any = builders.informed_space(plan, study, worker, reporter)
        save_layers(HERE / "layers.npz", space, study.state.dense["nll"])
        file = HERE / "recorded.jsonl"
        done = len(file.read_text("utf-8").splitlines()) if file.is_file() else 0
        for index, (sort, allocation) in enumerate(wanted(space, ratios, options.count)):
            if index < done:
                continue
            start = time.perf_counter()
            result = worker(TrialRequest(index, "sobol", {}, allocation, index))
            line = {
                "sort": sort,
                "nll": result.metrics["nll"],
                "seconds": round(time.perf_counter() - start, 2),
                "windows": [round(lost, 5) for lost in result.window_nll],
                "ranks": [rank or 0 for rank in allocation.ranks.values()],
            }
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line, separators=(",", ":")) + "\n")
            reporter.say(f"{index:>4} {sort:<20} {line['nll']:.4f}  {line['seconds']:.1f} s")


def save_layers(path: Path, space: WeightSpace, dense: float) -> None:
    """Write names, shapes and predicted losses of the layers, at ranks that are on offer."""
    longest = max(len(curve) for curve in space.curves.values())
    curves = np.zeros((len(space.layers), -(-longest // MULTIPLE)), np.float32)
    for row, spec in zip(curves, space.layers, strict=True):
        curve = np.asarray(space.curves[spec.name])[::MULTIPLE]
        row[: len(curve)] = curve
    np.savez_compressed(
        path,
        names=np.array([spec.name for spec in space.layers]),
        kinds=np.array([spec.kind for spec in space.layers]),
        blocks=np.array([spec.block for spec in space.layers]),
        shapes=np.array([(spec.out_features, spec.in_features) for spec in space.layers]),
        curves=curves,
        budget=space.budget.parameters,
        dense=dense,
    )


if __name__ == "__main__":
    main()
