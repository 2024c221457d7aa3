"""Searches at equal trials, on a surrogate of the real model that ten seeds can afford.

    python experiments/02_search/run.py                 # everything that is missing, then tables
    python experiments/02_search/run.py --only tpe      # searches whose name begins so
    python experiments/02_search/run.py --table-only

Results are appended to results.jsonl, a line per search and seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from racing import SORTS, Races, WindowSurrogate, replayed
from searches import OURS, RECIPE, SEARCHES, Evaluate, exact, search, spaces
from surrogate import HERE, Recorded, Surrogate, held_back

from lrbo.trials.racing import Race

matplotlib.use("Agg")
SMOKE = bool(os.environ.get("LRBO_SMOKE"))
COMPARED = [name for name in SEARCHES if not name[0].isdigit()]
BUDGETS = [RECIPE, *(name for name in SEARCHES if name[0].isdigit())]
# Fewer seeds of those whose proposals take seconds, by number of variables.
SEEDS = {"5": 5, "20": 3, "210": 2}
CONFIDENCES = (0.99, 0.95)
BATCH = 4  # windows per forward pass, after which a race is looked at
SAME = 0.001  # nats per token, the spread of the search over seeds
Rows = Sequence[Mapping[str, Any]]


def read(file: Path) -> list[dict[str, Any]]:
    """Return the results so far."""
    return [json.loads(x) for x in file.read_text("utf-8").splitlines()] if file.is_file() else []


class Runs:
    """Runs what is missing, and writes it down."""

    def __init__(self, file: Path, recorded: Recorded, seeds: int, trials: int) -> None:
        """Read what is there and make the surrogates."""
        self.file, self.recorded, self.seeds, self.trials = file, recorded, seeds, trials
        self.model = Surrogate(recorded, range(len(recorded.rows)))
        self.spaces = spaces(recorded)
        self.known = {(row["name"], row["seed"]) for row in read(file)}

    def write(self, name: str, seed: int, **values: Any) -> None:
        """Append a result."""
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"name": name, "seed": seed, **values}) + "\n")

    def compare(self, only: str) -> None:
        """Run the searches of whole trials."""
        for seed in range(self.seeds):
            for name, (kind, starts, make) in SEARCHES.items():
                if (name, seed) in self.known or not name.startswith(only):
                    continue
                if seed >= SEEDS.get(name.partition(" ")[0], self.seeds):
                    continue
                space = self.spaces[kind]
                result = search(space, starts, make(space, seed), exact(self.model), self.trials)
                losses = [round(value, 5) for value in result.losses[: self.trials]]
                self.write(name, seed, seconds=round(result.seconds, 2), losses=losses)

    def race(self) -> None:
        """Run the search of lrbo with racing."""
        windows = WindowSurrogate(self.model)
        kind, starts, make = SEARCHES[OURS]
        space = self.spaces[kind]
        for seed in range(self.seeds):
            for confidence in CONFIDENCES:
                name = f"race {confidence}"
                if (name, seed) in self.known:
                    continue
                races = Races(Race(confidence), BATCH)
                search(space, starts, make(space, seed), _raced(windows, races), self.trials)
                assert races.best is not None
                self.write(
                    name,
                    seed,
                    scored=round(float(np.mean(races.scored)), 4),
                    given_up=round(races.given_up, 4),
                    best=round(float(races.best.mean()), 5),
                )


def _raced(windows: WindowSurrogate, races: Races) -> Evaluate:
    """Return the evaluation of trials that may be given up."""
    return lambda allocation: races(windows(allocation))


def show(results: Rows, names: Sequence[str], trials: int, title: str) -> None:
    """Print a table: best loss after some trials, and against lrbo seed by seed."""
    best = {
        name: {r["seed"]: np.minimum.accumulate(r["losses"]) for r in results if r["name"] == name}
        for name in SEARCHES
    }
    target = statistics.median(float(x[trials - 1]) for x in best[RECIPE].values())
    marks = (10, 20, 30, 50)
    titles = [f"after {mark}" for mark in marks]
    print(f"\n| {title} | " + " | ".join(titles) + " | trials to reach | won | seconds |")
    print("|---|" + "---:|" * (len(marks) + 3))
    for name in names:
        runs = best[name]
        if not runs:
            continue
        cells = []
        for mark in marks:
            values = [float(x[min(mark, trials) - 1]) for x in runs.values()]
            cells.append(f"{statistics.mean(values):.4f} ({statistics.pstdev(values):.4f})")
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


def show_replays(recorded: Recorded, seeds: int) -> None:
    """Print what racing saves and loses among recorded trials, in random orders."""
    heads = "windows per look | tokens scored | trials given up | same best"
    print(f"\n| recorded trials | confidence | {heads} |")
    print("|---|" + "---:|" * 5)
    for name, sorts in SORTS.items():
        for confidence in CONFIDENCES:
            for batch in (BATCH, 1):
                raced = [Races(Race(confidence), batch) for _ in range(seeds)]
                same = sum(
                    replayed(recorded, sorts, races, seed) for seed, races in enumerate(raced)
                )
                scored = statistics.mean(float(np.mean(races.scored)) for races in raced)
                given_up = statistics.mean(races.given_up for races in raced)
                print(
                    f"| {len(raced[0].scored)} {name} | {confidence} | {batch} | {scored:.0%} | "
                    f"{given_up:.0%} | {same} of {seeds} |"
                )


def show_races(results: Rows) -> None:
    """Print what racing does to the search of lrbo."""
    plain = {r["seed"]: min(r["losses"]) for r in results if r["name"] == OURS}
    print("\n| search of lrbo | tokens scored | trials given up | best loss | seeds no worse |")
    print("|---|" + "---:|" * 4)
    values = list(plain.values())
    ends = f"{statistics.mean(values):.4f} ({statistics.pstdev(values):.4f})"
    print(f"| without racing | 100% | 0% | {ends} | - |")
    for confidence in CONFIDENCES:
        rows = [r for r in results if r["name"] == f"race {confidence}"]
        if not rows:
            continue
        best = [r["best"] for r in rows]
        as_good = sum(r["best"] <= plain[r["seed"]] + SAME for r in rows)
        print(
            f"| racing, {confidence} | {statistics.mean(r['scored'] for r in rows):.0%} | "
            f"{statistics.mean(r['given_up'] for r in rows):.0%} | {statistics.mean(best):.4f} "
            f"({statistics.pstdev(best):.4f}) | {as_good} of {len(rows)} |"
        )


def figure(results: Rows, recorded: Recorded, path: Path) -> None:
    """Draw the best loss so far over trials: mean of the seeds, and their range."""
    from matplotlib import pyplot as plt

    drawn, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in COMPARED:
        axes = panels[int(SEARCHES[name][0] == "weights")]
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
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--only", default="", help="searches whose name begins so, or race")
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    file, picture = HERE / "results.jsonl", HERE / "convergence.png"
    if SMOKE:
        folder = Path(tempfile.mkdtemp())
        file, picture = folder / "results.jsonl", folder / "convergence.png"
        options.seeds, options.trials = 1, 3
    torch.set_num_threads(1)
    recorded = Recorded.load()
    if SMOKE:
        recorded.rows = recorded.rows[::4]
    errors = ", ".join(f"{name} {value:.3f}" for name, value in held_back(recorded).items())
    print(f"surrogate of {len(recorded.rows)} trials, held back in fifths: {errors}")
    if not options.table_only:
        runs = Runs(file, recorded, options.seeds, options.trials)
        runs.compare(options.only)
        if "race".startswith(options.only):
            runs.race()
    results = read(file)
    show(results, COMPARED, options.trials, "search")
    show(results, BUDGETS, options.trials, "variables, and how Ax knows the budget")
    show_replays(recorded, options.seeds)
    show_races(results)
    figure(results, recorded, picture)


if __name__ == "__main__":
    main()
