"""Searches at equal trials, on a surrogate of the real model that ten seeds can afford.

    python experiments/02_search/run.py                 # everything that is missing, then the table
    python experiments/02_search/run.py --only tpe      # one search
    python experiments/02_search/run.py --table-only

The surrogate is a Gaussian process on the trials of recorded.jsonl: SmolLM2-135M at keep ratio 0.8,
described by what each allocation is predicted to lose per kind and depth. Results are appended to
results.jsonl, a line per search and seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.mlls import ExactMarginalLogLikelihood

from lrbo.accounting import low_rank_parameters
from lrbo.allocation import Allocation, Budget
from lrbo.model import LayerSpec
from lrbo.search.base import BudgetSpace
from lrbo.search.client import Observation, SearchClient
from lrbo.search.space import build_space
from lrbo.search.weights import build_weight_space

matplotlib.use("Agg")
SMOKE = bool(os.environ.get("LRBO_SMOKE"))
HERE = Path(__file__).parent
MULTIPLE, INITIAL = 8, 7
CRUSHED = 1.2  # nats beyond the dense model
GROUPS = {
    "qk": ["q_proj", "k_proj"], "o": ["o_proj"], "gate": ["gate_proj"], "up": ["up_proj"],
    "down": ["down_proj"],
}  # fmt: skip
PAPER = {"qk": 0.363, "o": 0.789, "gate": 0.841, "up": 0.807, "down": 1.0}


@dataclass
class Recorded:
    """The trials of the real model, and the layers that they are about."""

    layers: list[LayerSpec]
    curves: dict[str, np.ndarray]
    budget: Budget
    dense: float
    rows: list[dict[str, Any]]

    @classmethod
    def load(cls) -> Recorded:
        """Read recorded.jsonl and layers.npz."""
        found = np.load(HERE / "layers.npz")
        layers = [
            LayerSpec(str(name), str(kind), int(block), *map(int, shape), has_bias=False, site="x")
            for name, kind, block, shape in zip(
                found["names"], found["kinds"], found["blocks"], found["shapes"], strict=True
            )
        ]
        curves = {}
        for spec, row in zip(layers, found["curves"].astype(np.float64), strict=True):
            full = min(spec.out_features, spec.in_features)
            ranks = np.arange(full + 1)
            curves[spec.name] = np.interp(ranks, np.arange(len(row)) * MULTIPLE, row)
        lines = (HERE / "recorded.jsonl").read_text("utf-8").splitlines()
        dense = float(found["dense"])
        every = [json.loads(line) for line in lines]
        # Where a few layers are crushed the loss jumps; no search goes there twice.
        rows = [row for row in every if row["nll"] - dense < CRUSHED]
        return cls(layers, curves, Budget(int(found["budget"])), dense, rows)

    @cached_property
    def inputs(self) -> np.ndarray:
        """Return what describes each trial."""
        names = [spec.name for spec in self.layers]
        return np.stack(
            [
                self.features({n: r or None for n, r in zip(names, row["ranks"], strict=True)})
                for row in self.rows
            ]
        )

    @cached_property
    def targets(self) -> np.ndarray:
        """Return the logarithm of the loss of each trial beyond that of the dense model."""
        return np.log(np.array([row["nll"] for row in self.rows]) - self.dense)

    def features(self, ranks: Mapping[str, int | None]) -> np.ndarray:
        """Return logarithms of predicted losses: each kind in each third of the depth, and all."""
        blocks = 1 + max(spec.block or 0 for spec in self.layers)
        cells: dict[tuple[str, int], float] = {}
        for spec in self.layers:
            rank = ranks[spec.name]
            lost = 0.0 if rank is None else float(self.curves[spec.name][rank])
            cell = (spec.kind, 3 * (spec.block or 0) // blocks)
            cells[cell] = cells.get(cell, 0.0) + lost
        each = np.array(list(cells.values()))
        return np.log(np.append(each, each.sum()) + 1e-4)


class Surrogate:
    """What the real model would say of an allocation, to within a stated error.

    A parabola of the whole predicted loss, and a Gaussian process for what it misses, both of the
    logarithm of the loss beyond that of the dense model.
    """

    def __init__(self, recorded: Recorded, rows: Sequence[int]) -> None:
        """Fit some of the recorded trials."""
        self.recorded = recorded
        inputs, targets = recorded.inputs[rows], recorded.targets[rows]
        self.centre, self.scale = inputs.mean(0), inputs.std(0) + 1e-9
        self.parabola = np.polyfit(inputs[:, -1], targets, 2)
        rest = targets - np.polyval(self.parabola, inputs[:, -1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.process = SingleTaskGP(self._scaled(inputs), torch.tensor(rest)[:, None])
            fit_gpytorch_mll(ExactMarginalLogLikelihood(self.process.likelihood, self.process))
        self.process.eval()

    def _scaled(self, inputs: np.ndarray) -> torch.Tensor:
        return torch.tensor((inputs - self.centre) / self.scale)

    def log_excess(self, inputs: np.ndarray) -> np.ndarray:
        """Return the logarithm of the loss beyond that of the dense model."""
        with torch.no_grad():
            rest = self.process.posterior(self._scaled(inputs)).mean[:, 0].numpy()
        return np.asarray(np.polyval(self.parabola, inputs[:, -1]) + rest)

    def __call__(self, allocation: Allocation) -> float:
        """Return the loss, nats per token."""
        inputs = self.recorded.features(allocation.ranks)[None]
        return self.recorded.dense + math.exp(float(self.log_excess(inputs)[0]))


def held_back(recorded: Recorded) -> dict[str, float]:
    """Return how far trials that were not fitted are off, by sort: relative, of the excess."""
    count = len(recorded.rows)
    order = np.random.default_rng(0).permutation(count)
    errors = np.zeros(count)
    for fold in range(5):
        left_out = order[fold::5]
        model = Surrogate(recorded, np.setdiff1d(order, left_out).tolist())
        errors[left_out] = model.log_excess(recorded.inputs[left_out]) - recorded.targets[left_out]
    sorts = [row["sort"] for row in recorded.rows]
    found = {"R^2": 1 - float(errors.var() / recorded.targets.var())}
    for sort in dict.fromkeys(sorts):
        own = errors[[place for place, other in enumerate(sorts) if other == sort]]
        found[sort] = float(np.sqrt((own**2).mean()))
    return found


Losses = list[float]
Search = Callable[[Surrogate, int, int], tuple[Losses, float]]


def spaces(recorded: Recorded, width: float = 0.5) -> dict[str, BudgetSpace]:
    """Return the spaces that are searched."""
    cost = partial(low_rank_parameters, bias=False, storage="pivoted")
    shared: dict[str, Any] = {"cost": cost, "rank_multiple": MULTIPLE}
    ratios: Any = build_space(
        recorded.layers, recorded.budget, groups=GROUPS, dense=["v_proj"], granularity="kind",
        depth_groups=1, bounds=(0.2, 1.0), start=PAPER, **shared,
    )  # fmt: skip
    weights = build_weight_space(
        recorded.layers, recorded.budget, groups={}, dense=[], knots=3, exponent=True, width=width,
        **shared,
    )  # fmt: skip
    return {"ratios": ratios, "weights": weights.with_curves(recorded.curves)}


def starts_of(space: BudgetSpace, *names: str) -> list[tuple[Mapping[str, float], Allocation]]:
    """Return what a search begins with, with its points."""
    return [(start.point, start.allocation) for start in space.warm_starts(names)]


def search(
    kind: str, starts: Sequence[str], propose: str, model: Surrogate, trials: int, seed: int
) -> tuple[Losses, float]:
    """Run a search and return its losses and the seconds that proposals took."""
    space = spaces(model.recorded)[kind]
    losses: Losses = []
    seen: list[Observation] = []

    def tell(point: Mapping[str, float], allocation: Allocation) -> float:
        losses.append(model(allocation))
        told = space.realised(allocation, point)
        if told:
            seen.append(Observation(told, losses[-1]))
        return losses[-1]

    for point, allocation in starts_of(space, *starts):
        tell(point, allocation)
    if propose == "tpe":
        return _tpe(space, tell, losses, trials, seed)
    client = SearchClient(space, seed=seed)
    seconds = 0.0
    generator = np.random.default_rng(seed)
    while len(losses) < trials:
        begin = time.perf_counter()
        if propose == "random":
            drawn = [generator.uniform(low, high) for low, high in space.bounds.values()]
            point = dict(zip(space.names, space.project(drawn), strict=True))
        elif propose == "sobol" or len(losses) < INITIAL:
            point = space.sobol_point(len(losses), seed)
        else:
            point = client.ask(len(losses), seen)
        seconds += time.perf_counter() - begin
        tell(point, space.allocate(point))
    return losses[:trials], seconds


def _tpe(
    space: BudgetSpace,
    tell: Callable[[Mapping[str, float], Allocation], float],
    losses: Losses,
    trials: int,
    seed: int,
) -> tuple[Losses, float]:
    """Let Optuna propose; a point is taken onto the budget, as every other one."""
    import optuna  # type: ignore[import-not-found,unused-ignore]

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    seconds = 0.0
    while len(losses) < trials:
        begin = time.perf_counter()
        trial = study.ask()
        drawn = [trial.suggest_float(name, *ends) for name, ends in space.bounds.items()]
        point = dict(zip(space.names, space.project(drawn), strict=True))
        seconds += time.perf_counter() - begin
        study.tell(trial, tell(point, space.allocate(point)))
    return losses[:trials], seconds


SEARCHES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "random ratios": ("ratios", (), "random"),
    "sobol ratios": ("ratios", ("start",), "sobol"),
    "tpe ratios": ("ratios", ("start",), "tpe"),
    "ax ratios (the paper's)": ("ratios", ("start",), "ax"),
    "random weights": ("weights", ("analytic",), "random"),
    "sobol weights": ("weights", ("analytic",), "sobol"),
    "tpe weights": ("weights", ("analytic",), "tpe"),
    "ax weights (lrbo)": ("weights", ("analytic",), "ax"),
}
RECIPE, OURS = "ax ratios (the paper's)", "ax weights (lrbo)"


def read(file: Path) -> list[dict[str, Any]]:
    """Return the results so far."""
    return [json.loads(x) for x in file.read_text("utf-8").splitlines()] if file.is_file() else []


def show(results: Sequence[Mapping[str, Any]], trials: int) -> None:
    """Print the table: best loss after some trials, and against the others seed by seed."""
    best = {
        name: {r["seed"]: np.minimum.accumulate(r["losses"]) for r in results if r["name"] == name}
        for name in SEARCHES
    }
    target = statistics.median(float(x[trials - 1]) for x in best[RECIPE].values())
    marks = (10, 20, 30, 50)
    titles = [f"after {place}" for place in marks]
    print("| search | " + " | ".join(titles) + " | trials to reach | won | seconds |")
    print("|---|" + "---:|" * (len(marks) + 3))
    for name, runs in best.items():
        if not runs:
            continue
        cells = []
        for place in marks:
            values = [float(x[min(place, trials) - 1]) for x in runs.values()]
            spread = statistics.pstdev(values)
            cells.append(f"{statistics.mean(values):.4f} ({spread:.4f})")
        hit = sorted(int(np.argmax(x <= target)) + 1 for x in runs.values() if x[-1] <= target)
        middle = (len(runs) - 1) // 2
        median = hit[middle] if len(hit) > middle else None
        won = sum(best[OURS][s][-1] < x[-1] for s, x in runs.items() if s in best[OURS])
        seconds = [r["seconds"] / len(r["losses"]) for r in results if r["name"] == name]
        cells += [
            f"{median if median is not None else 'never'} ({len(hit)} of {len(runs)})",
            "-" if name == OURS else f"{won} of {len(runs)}",
            f"{statistics.mean(seconds):.2f}",
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def figure(results: Sequence[Mapping[str, Any]], recorded: Recorded, path: Path) -> None:
    """Draw the best loss so far over trials: mean of the seeds, and their range."""
    from matplotlib import pyplot as plt

    drawn, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, (kind, _, _) in SEARCHES.items():
        axes = panels[int(kind == "weights")]
        runs = [np.minimum.accumulate(r["losses"]) for r in results if r["name"] == name]
        if runs:
            values = np.stack(runs) - recorded.dense
            trials = np.arange(1, values.shape[1] + 1)
            (line,) = axes.plot(trials, values.mean(0), label=name)
            axes.fill_between(
                trials, values.min(0), values.max(0), color=line.get_color(), alpha=0.12, lw=0
            )
    for axes, title in zip(
        panels, ("one ratio per kind", "around the least predicted loss"), strict=True
    ):
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set(xlabel="trial", ylabel="loss beyond dense, nats per token")
        axes.legend(fontsize="small", frameon=False)
    panels[0].set_ylim(0.22, 0.5)
    drawn.suptitle("Best loss so far: mean and range of the seeds (mind the scales)")
    drawn.savefig(path, dpi=150)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--only", help="searches whose name begins so")
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    file, picture = HERE / "results.jsonl", HERE / "convergence.png"
    if SMOKE:
        folder = Path(tempfile.mkdtemp())
        file, picture = folder / "results.jsonl", folder / "convergence.png"
        options.seeds, options.trials = 1, 9
    torch.set_num_threads(1)
    recorded = Recorded.load()
    errors = ", ".join(f"{name} {value:.3f}" for name, value in held_back(recorded).items())
    print(f"surrogate of {len(recorded.rows)} trials, held back in fifths: {errors}")
    if not options.table_only:
        model = Surrogate(recorded, range(len(recorded.rows)))
        known = {(r["name"], r["seed"]) for r in read(file)}
        for seed in range(options.seeds):
            for name, (kind, starts, propose) in SEARCHES.items():
                if (name, seed) in known or not name.startswith(options.only or ""):
                    continue
                losses, seconds = search(kind, starts, propose, model, options.trials, seed)
                row = {"name": name, "seed": seed, "seconds": round(seconds, 2)}
                row["losses"] = [round(value, 5) for value in losses]
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
    results = read(file)
    show(results, options.trials)
    figure(results, recorded, picture)


if __name__ == "__main__":
    main()
