"""Which search finds the best allocation of the byte menu, on the surrogate with measured noise.

    python experiments/05_bytes/searches.py

Ax as lrbo uses it; weights drawn from what trials say about the predictions (correction.py); both
in turn. All begin at the allocation of least predicted loss, and take the best measured trial.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np
from correction import Correction
from surrogate import Recorded, Surrogate, held_back

from lrbo.allocation.allocate import Allocation
from lrbo.optimization.proposals import Observation, SearchClient
from lrbo.optimization.space import sobol_point

INITIAL = 7  # trials before the surrogate model of Ax takes over
AFTER = (10, 20, 30)
KINDS = ("ax", "corrected", "in turn")
GAIN = 0.1  # of the loss beyond dense: how many seeds reach it


def search(kind: str, seed: int, surrogate: Surrogate, noise: float) -> list[float]:
    """Return the share of the loss that the best of some trials gains over the first."""
    recorded = surrogate.recorded
    space, generator = recorded.space, np.random.default_rng(1000 + seed)
    client, observations = SearchClient(space, seed), list[Observation]()
    tried: list[Allocation] = []
    measured: list[float] = []
    true: list[float] = []

    def evaluate(point: Mapping[str, float], allocation: Allocation) -> None:
        true.append(surrogate(allocation) - recorded.dense)
        measured.append(max(true[-1] + noise * generator.standard_normal(), 1e-3))
        observations.append(Observation(point, recorded.dense + measured[-1]))
        tried.append(allocation)

    evaluate(dict.fromkeys(space.names, 0.0), space.problem.by_loss())
    for trial in range(1, AFTER[-1]):
        is_ax = kind == "ax" or (kind == "in turn" and trial % 2 == 0)
        if is_ax and trial < INITIAL:
            point = sobol_point(space, trial - 1, seed)
        elif is_ax:
            point = client.ask(trial, observations)
        else:
            correction = Correction.of(space, list(zip(tried, measured, strict=True)))
            point = space.project(correction.draw(1000 * seed + trial))
        allocation = space.allocate(point)
        for attempt in range(20):
            if all(allocation.options != other.options for other in tried):
                break
            step = 0.02 * (attempt + 1)
            point = space.project(
                {name: x + step * generator.standard_normal() for name, x in point.items()}
            )
            allocation = space.allocate(point)
        evaluate(point, allocation)
    best = [true[int(np.argmin(measured[:count]))] for count in AFTER]
    return [1 - loss / true[0] for loss in best]


def main() -> None:
    """Search with every seed, and print how much is gained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=3.25, help="per parameter of the blocks")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--noise", type=float, default=0.005, help="of a trial, nats per token")
    options = parser.parse_args()
    recorded = Recorded.load(options.bits)
    print({name: round(value, 3) for name, value in held_back(recorded).items()})
    surrogate = Surrogate(recorded, list(range(len(recorded.rows))))
    print(f"| search | {' | '.join(f'after {count}' for count in AFTER)} | {GAIN:.0%} or more |")
    print("|---|" + "---:|" * (len(AFTER) + 1))
    for kind in options.kinds:
        gains = np.array(
            [search(kind, seed, surrogate, options.noise) for seed in range(options.seeds)]
        )
        cells = (
            f"{100 * m:.1f}% ({100 * s:.1f})"
            for m, s in zip(gains.mean(0), gains.std(0), strict=True)
        )
        reached = f"{(gains[:, -1] >= GAIN).sum()} of {len(gains)}"
        print(f"| {kind} | {' | '.join(cells)} | {reached} |", flush=True)


if __name__ == "__main__":
    main()
